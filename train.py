"""
Train a NextDiT with flow matching on a dataset that prepare.py made.

    python train.py config/train_digits.py                                # one process
    torchrun --standalone --nproc_per_node=8 train.py --data_dir=data/mine --out_dir=out-mine
    python train.py --help
"""

import copy
import datetime
import functools
import gc
import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import flow
import score
from checkpoint import restore_checkpoint, save_checkpoint
from configurator import check_range, configure
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig, pick_device
from optim import make_optimizer, step_in_backward
from prepare import open_dataset

# The defaults are BLIP3-o's model; a config file or --key=value changes any of them.
# ---- I/O
out_dir = "out"
init_from = "scratch"  # scratch | resume (ckpt_last.pt) | auto (resume or scratch) | a diffusers model's folder
eval_interval = 1000  # iterations between evaluations
save_interval = 1000  # iterations between writes of ckpt_last.pt; ckpt_best.pt follows the evaluations
log_interval = 10  # iterations between log lines; reading the loss is a GPU sync point
eval_only = False  # with init_from=resume: evaluate ckpt_last.pt, print, exit
dry_run = False  # set up, run one forward and backward pass, print the memory it took, exit
debug = False  # 64 samples, 10 iterations, anomaly detection, no wandb
wandb_log = False
wandb_project = "embedding-flow"
wandb_run_name: str | None = None  # None: wandb invents one
# ---- data
data_dir = "data/digits"
normalize = "channel"  # channel (zero mean, unit variance) | l2 (tokens of norm sqrt(channels); norms are lost) | none
subset_size: int | None = None  # train on the first so many samples only
batch_size = 32  # samples in a micro-batch
gradient_accumulation_steps = 8  # micro-batches in an iteration, over all processes: they divide it
eval_batch_size = 64
eval_size = 2048  # validation samples in an evaluation, the first ones
eval_samples = 64  # of them, how many are also generated, to report their cosine
eval_sample_steps = 10  # midpoint steps for these
# ---- model
dim = 1792
n_layer = 24
n_head = 28
n_kv_head: int | None = None  # None: n_head; fewer: grouped-query attention
multiple_of = 256  # the feed-forward's width, 8/3 dim, is rounded up to a multiple of this
ffn_dim_multiplier: float | None = None  # scales that width
norm_eps = 1e-5
qk_norm = True
gradient_checkpointing = False  # recompute blocks in the backward pass: less memory, a third more compute
# ---- flow
path = "linear"  # linear | cosine
sigma_min = 0.0  # noise left at t = 1 (data)
sigma_max = 1.0  # noise at t = 0
prediction = "v"  # v (velocity) | epsilon (noise; fragile at t = 0) | x (data)
loss_space = "native"  # of the error: native (the prediction's own) | v (taken to the velocity)
t_sampling = "uniform"  # uniform | logit_normal
t_mean = 0.0  # of logit(t), for logit_normal
t_std = 1.0
t_shift = 1.0  # > 1 trains more near noise
cond_dropout = 0.1  # share of samples trained on the null condition, which guidance needs
l2_weight = 0.0  # weight of mean(output^2) in the loss
# ---- optimizer
optimizer = "adamw"  # adamw | adafactor (2 bytes of state a parameter instead of 8)
optimizer_in_backward = False  # step each parameter when it gets its gradient, which is then freed
max_iters = 100_000
num_epochs: float | None = None  # instead of max_iters
learning_rate = 3e-4
min_lr = 0.0  # where the cosine ends
warmup_iters = 1000
weight_decay = 0.05  # on matrices only: not on norms, biases and gates
beta1 = 0.9
beta2 = 0.95  # of adamw
grad_clip = 1.0  # 0: off
ema_decay = 0.9999  # reached gradually: min(this, (1 + i) / (10 + i)); 0: the weights themselves
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # auto (bfloat16 or float16 on cuda, else float32) | float32 | bfloat16 | float16 (with a scaler)
compile: bool | None = None  # torch.compile; None: on cuda only (on a CPU it takes minutes to pay)
seed = 0

config = configure(globals())
if debug:
    config |= dict(subset_size=64, max_iters=10, num_epochs=None, eval_interval=5, log_interval=1, wandb_log=False)
    globals().update(config)  # from here on config is a snapshot: what follows may change these names

# ---------------------------------------------------------------- system
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0


def fail(message):
    sys.exit(f"error: {message}" if master else 1)


try:
    device = pick_device(device)
except ValueError as e:
    fail(e)
device_type = device.split(":")[0]
if dtype == "auto":
    dtype = "float32" if device_type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
if dtype not in ("float32", "bfloat16", "float16"):
    fail(f"dtype={dtype!r} is unknown; it is one of auto, float32, bfloat16, float16")
torch.autograd.set_detect_anomaly(debug)
check_range(config, "batch_size gradient_accumulation_steps eval_batch_size eval_interval save_interval", 1)
check_range(config, "log_interval eval_size eval_sample_steps max_iters subset_size", 1)
check_range(config, "seed eval_samples warmup_iters learning_rate min_lr weight_decay grad_clip l2_weight", 0)
check_range(config, "num_epochs norm_eps", 0, above=True)
check_range(config, "beta1 beta2 ema_decay", 0, 1)
if optimizer_in_backward and (world_size > 1 or gradient_accumulation_steps > 1 or grad_clip or dtype == "float16"):
    fail("optimizer_in_backward=True needs one process, --gradient_accumulation_steps=1, --grad_clip=0 and no float16")
if gradient_accumulation_steps % world_size:
    multiple = math.ceil(gradient_accumulation_steps / world_size) * world_size
    fail(f"{gradient_accumulation_steps=} cannot be divided by {world_size} processes; {multiple} can")
if world_size > 1:
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
# TF32 on cuda; on a CPU oneDNN, which is up to twice as fast as MKL, and float32 too unless there is AMX
torch.set_float32_matmul_precision("medium" if device_type == "cpu" else "high")
# no cache: a weight is used once in a pass, and its casts would be a second copy of the model
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False)

# ---------------------------------------------------------------- data
try:
    data = open_dataset(data_dir)
    stats = {name: torch.from_numpy(value).float() for name, value in data["stats"].items()}
    to_target = Normalizer(normalize, stats["target_mean"], stats["target_std"], device)
    to_cond = Normalizer(normalize, stats["cond_mean"], stats["cond_std"], device)
    flow_config = FlowConfig(**{f.name: config[f.name] for f in fields(FlowConfig)})
    from_data = dict(grid=tuple(data["meta"]["grid"]), target_dim=len(to_target.mean), cond_dim=len(to_cond.mean))
    model_config = NextDiTConfig(**{f.name: (config | from_data)[f.name] for f in fields(NextDiTConfig)})
except ValueError as e:
    fail(e)
n_train, n_val = len(data["train_cond"]), min(eval_size, len(data["val_cond"]))
n_train = min(subset_size or n_train, n_train)
samples_per_iter = batch_size * gradient_accumulation_steps
if num_epochs is not None:
    max_iters = math.ceil(num_epochs * n_train / samples_per_iter)


@functools.lru_cache(maxsize=2)
def epoch_order(epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_train)


def batch_rows(step, micro):
    """Rows of micro-batch `micro` of iteration `step`: epochs without replacement, back to back."""
    start = (step * gradient_accumulation_steps + micro) * batch_size
    return np.array([epoch_order(i // n_train)[i % n_train] for i in range(start, start + batch_size)])


def get_batch(split, rows):
    """Normalized target (B, T, D) and condition (B, S, C) on the device; the copy is asynchronous on a GPU."""
    batch = []
    for name, normalizer in (("target", to_target), ("cond", to_cond)):
        x = torch.from_numpy(np.asarray(data[f"{split}_{name}"][rows]))
        x = x.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else x.to(device)
        batch.append(normalizer.encode(x))
    return batch


# ---------------------------------------------------------------- model and optimizer
torch.manual_seed(seed)
last = Path(out_dir) / "ckpt_last.pt"
resume = init_from == "resume" or (init_from == "auto" and last.exists())
if eval_only and not resume and init_from in ("scratch", "auto"):
    fail("eval_only=True needs a checkpoint: add --init_from=resume")
try:
    if init_from in ("scratch", "resume", "auto"):
        raw_model = NextDiT(model_config)
    else:
        raw_model = NextDiT.from_diffusers(init_from, model_config.grid, lambda p: p.float())
        raw_model.config.gradient_checkpointing, held = gradient_checkpointing, asdict(raw_model.config)
        if differ := [f"{k} is {held[k]}, the data's {v}" for k, v in from_data.items() if held[k] != v]:
            raise ValueError(f"{init_from} does not fit {data_dir}: {', '.join(differ)}")
    model_args = asdict(raw_model.config)
    config |= {k: v for k, v in model_args.items() if k in config}  # a diffusers model has its own
    opt = make_optimizer(raw_model.to(device), optimizer, learning_rate, weight_decay, (beta1, beta2))
    raw_model.null_cond.requires_grad_(cond_dropout > 0)  # else nothing trains it, and DDP would wait for its gradient
    ema_model = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay else raw_model
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    ckpt = {"iter": 0, "best_val_loss": math.inf, "wandb_id": None}
    if resume:
        settings = {k: config[k] for k in ("optimizer", "normalize", "path", "prediction", "sigma_min", "sigma_max")}
        settings |= {k: v for k, v in model_args.items() if k != "gradient_checkpointing"}
        ckpt = restore_checkpoint(last, settings, stats, raw_model, ema_model, opt, scaler)
        old = ckpt["config"] | {"init_from": init_from}
        if master and (changed := [f"{k} {old.get(k)} -> {v}" for k, v in config.items() if old.get(k) != v]):
            print("changed since the checkpoint:", ", ".join(changed))
except ValueError as e:
    fail(e)
step, best_val_loss, wandb_id = ckpt["iter"], ckpt["best_val_loss"], ckpt["wandb_id"]
params = list(raw_model.parameters())
norms = step_in_backward(opt) if optimizer_in_backward else None  # of the gradients, as backward meets them
model = raw_model
if device_type == "cuda" if compile is None else compile:
    for block in raw_model.layers if optimizer_in_backward else ():  # one compiled backward pass would return all
        block.compile()  # gradients at its end
    model = raw_model if optimizer_in_backward else torch.compile(raw_model)
model = DDP(model, gradient_as_bucket_view=True) if world_size > 1 else model


def get_lr(step):
    """Linear warmup, then a cosine from learning_rate to min_lr at max_iters."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    progress = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------- evaluation
T_BINS = 4
val_flow = replace(flow_config, cond_dropout=0.0, l2_weight=0.0)
standardize = score.standardizer(stats["target_mean"], stats["target_std"])


@torch.no_grad()
def evaluate(net, generate):
    """Validation loss, over all t and in bins of t, and the token cosine of generated samples.

    Noise and t are functions of a sample's row, so losses compare between iterations, runs,
    batch sizes and process counts. Batches are dealt out to the processes.
    """
    sums = torch.zeros(2, T_BINS + 1)  # sum and count of the loss per bin, and of the cosine
    for first in range(rank * eval_batch_size, n_val, world_size * eval_batch_size):
        rows = np.arange(first, min(first + eval_batch_size, n_val))
        x_1, cond = get_batch("val", rows)
        t = torch.from_numpy((rows + 0.5) * 0.6180339887498949 % 1).float()  # golden ratio: any rows cover [0, 1]
        x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0).to(device)
        with autocast:
            losses, _ = flow.loss(net, x_1, cond, val_flow, x_0=x_0, t=t.to(device))
        sums[:, :T_BINS].index_add_(1, (t * T_BINS).long(), torch.stack([losses.cpu(), torch.ones(len(t))]))
        if generate and (k := min(len(rows), eval_samples - first)) > 0:
            x = flow_config.sigma_max * flow.sample_noise(rows[:k], x_1.shape[1:], seed=0, draw=1).to(device)
            with autocast:
                x = flow.integrate(flow.guided_velocity(net, cond[:k], flow_config), x, eval_sample_steps)
            samples, truth = standardize(to_target.decode(x).cpu()), standardize(data["val_target"][rows[:k]])
            sums[:, T_BINS] += torch.tensor([score.cosine(samples, truth).mean(1).sum(), k])
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    means = (sums[0] / sums[1]).tolist()
    result = {"val_loss": (sums[0, :T_BINS].sum() / n_val).item()}
    result |= {f"val_loss_t{i}": mean for i, mean in enumerate(means[:T_BINS]) if not math.isnan(mean)}
    return result | ({"val_token_cosine": means[T_BINS]} if generate and eval_samples else {})


# ---------------------------------------------------------------- checkpoints and logs
def save(name):
    """Write out_dir/name; returns whether that worked: training goes on without."""
    state = {
        "model": raw_model.state_dict(), "ema": ema_model.state_dict(), "optimizer": opt.state_dict(),
        "scaler": scaler.state_dict(), "iter": step, "best_val_loss": best_val_loss, "wandb_id": wandb_id,
        "config": config, "model_args": model_args, "flow": asdict(flow_config), "normalize": normalize,
        "stats": stats, "cond_tokens": data["train_cond"].shape[1],
    }  # fmt: skip
    try:
        save_checkpoint(Path(out_dir) / name, state)
    except OSError as e:
        print(f"WARNING: {name} not written ({e}); the previous one is untouched", flush=True)
        return False
    return True


def write_log(record):
    with open(Path(out_dir) / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")
    if wandb_log:
        wandb.log(record, step=record["iter"])


wandb_log = wandb_log and master and not (eval_only or dry_run)
if master and not (eval_only or dry_run):
    if Path(out_dir).is_file():
        fail(f"out_dir={out_dir!r} is a file")
    os.makedirs(out_dir, exist_ok=True)
    (Path(out_dir) / "config.json").write_text(json.dumps(config, indent=1))
    log = Path(out_dir) / "log.jsonl"
    kept = log.read_text().splitlines(keepends=True) if step and log.exists() else []
    kept = [entry for entry in kept if entry.endswith("}\n") and json.loads(entry)["iter"] < step]
    log.write_text("".join(kept))  # without what is run again, and without a line that a kill cut short
if wandb_log:
    import wandb

    try:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=out_dir, id=wandb_id, resume="allow")
    except wandb.errors.Error as e:
        fail(f"wandb: {e} (run `wandb login`, or set WANDB_MODE=offline)")
    wandb_id = wandb.run.id

# ---------------------------------------------------------------- training loop
if master:
    print(" ".join(f"{k}={v}" for k, v in config.items()))
    print(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters on {world_size} x {device}, {dtype}")
    epochs = max_iters * samples_per_iter / n_train
    print(f"{n_train} samples, {samples_per_iter} an iteration, {max_iters} iterations ({epochs:.1f} epochs)")
micro_steps = gradient_accumulation_steps // world_size  # of this process
generator, clock, first_step = torch.Generator(device), time.perf_counter(), step
while True:
    lr = get_lr(step)
    for group in opt.param_groups:
        group["lr"] = lr
    record, final = {"iter": step}, step >= max_iters

    if (step % eval_interval == 0 or final or eval_only) and not dry_run:
        paused = time.perf_counter()
        record |= evaluate(ema_model, generate=True)  # the EMA weights are what gets sampled
        if ema_model is not raw_model:
            record["val_loss_raw"] = evaluate(raw_model, generate=False)["val_loss"]
        if master:
            print(f"iter {step}: " + " | ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "iter"), flush=True)
            if step > 0 and record["val_loss"] < best_val_loss and not eval_only:
                previous, best_val_loss = best_val_loss, record["val_loss"]
                best_val_loss = best_val_loss if save("ckpt_best.pt") else previous
        clock += time.perf_counter() - paused  # the pace is that of training alone
    if eval_only:
        break
    if master and step > 0 and (step % save_interval == 0 or final) and not dry_run:
        save("ckpt_last.pt")
    if final:
        if master:
            write_log(record)
            print(f"done: {max_iters} iterations, best validation loss {best_val_loss:.4f}, in {out_dir}")
        break

    loss = torch.zeros((), device=device)  # of the global batch
    for m in range(micro_steps):
        micro = rank * micro_steps + m  # index in the global batch: noise and t do not depend on the process count
        x_1, cond = get_batch("train", batch_rows(step, micro))
        generator.manual_seed(flow.mix(flow.TRAINING, seed, step, micro))
        if world_size > 1:
            model.require_backward_grad_sync = m == micro_steps - 1
        with autocast:
            losses, _ = flow.loss(model, x_1, cond, flow_config, generator=generator)
        micro_loss = losses.mean() / micro_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    if dry_run:
        rss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = torch.cuda.max_memory_allocated() if device_type == "cuda" else rss
        if master:
            print(f"dry run: loss {loss.item():.4f}; peak memory of the forward and backward pass {peak / 1e9:.2f} GB")
        break
    if optimizer_in_backward:
        grad_norm = torch.stack(norms).norm()
        norms.clear()
    else:
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
    if ema_decay:
        torch._foreach_lerp_(list(ema_model.parameters()), params, 1 - min(ema_decay, (1 + step) / (10 + step)))

    if step % log_interval == 0:
        if world_size > 1:
            dist.all_reduce(loss)
        record |= {"loss": loss.item() / world_size, "grad_norm": grad_norm.item(), "lr": lr}
        if not math.isfinite(record["loss"]):
            fail(f"the loss is {record['loss']} at iteration {step}; lower learning_rate ({learning_rate})")
        pace = (time.perf_counter() - clock) / (step + 1 - first_step)  # seconds an iteration
        record |= {"ms": 1000 * pace, "samples_per_s": samples_per_iter / pace}
        if master:
            left = datetime.timedelta(seconds=round(pace * (max_iters - step - 1)))
            line = f"iter {step} | loss {record['loss']:.4f} | grad norm {grad_norm:.3f} | lr {lr:.2e}"
            print(f"{line} | {1000 * pace:.0f} ms | {samples_per_iter / pace:.1f} samples/s | {left} left", flush=True)
    if master and len(record) > 1:
        write_log(record)
    step += 1
if wandb_log:
    wandb.finish()
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    del model  # DDP holds the process group too, whose threads must end before the interpreter does
    gc.collect()
