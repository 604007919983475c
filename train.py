"""
Train a NextDiT with flow matching on a dataset that prepare.py made.

    python train.py config/train_digits.py                                # one process
    torchrun --standalone --nproc_per_node=8 train.py --data_dir=data/mine --out_dir=out-mine
    python train.py --help
"""

import copy
import datetime
import json
import math
import os
import resource
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import flow
from checkpoint import open_folder, restore_checkpoint, restore_optimizer, save_checkpoint
from configurator import check_range, configure
from flow import FlowConfig
from loader import Loader, open_dataset
from measure import Evaluator, flops_per_sample, product_rate, summary
from model import NextDiT, NextDiTConfig
from optim import make_optimizer, step_in_backward
from parallel import (
    Interrupts,
    all_reduce_sum,
    exit_process,
    gather_state_dict,
    init_distributed,
    pick_device,
    shard_model,
)

# The defaults are a model of BLIP3-o's size; a config file or --key=value changes any of them.
# ---- I/O
out_dir = "out"
init_from = "scratch"  # scratch | resume (ckpt_last.pt) | auto (resume or scratch) | a diffusers model's folder
eval_interval = 1000  # iterations between evaluations
save_interval = (
    1000  # iterations between writes of ckpt_last.pt; ckpt_best.pt follows the evaluations
)
log_interval = 10  # iterations between log lines; reading the loss is a GPU sync point
eval_only = False  # with init_from=resume: evaluate ckpt_last.pt, print, exit
time_limit: float | None = (
    None  # minutes after which to save ckpt_last.pt and end, as SIGTERM and SIGINT do at once
)
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
preload = False  # read the arrays into memory at the start (each process its own), for slow storage
eval_batch_size = 64
eval_size = 2048  # validation samples in an evaluation, the first ones
eval_samples = 64  # of them, how many are also generated and scored
eval_sample_steps = 10  # of the solver, for these
# ---- model
dim = 1792
n_layer = 24
n_head = 28
n_kv_head: int | None = None  # None: n_head; fewer: grouped-query attention
multiple_of = 256  # the feed-forward's width, 8/3 dim, is rounded up to a multiple of this
ffn_dim_multiplier: float | None = None  # scales that width
norm_eps = 1e-5
qk_norm = True
conditioning = "auto"  # auto (aligned if condition and target have as many tokens, else cross) | aligned | cross
conv = True  # a depthwise 3x3 convolution before each block
rope = "grid"  # RoPE's frequencies: grid (for some ten rows and columns) | lumina (as in texts)
prior: bool | None = (
    None  # start from the best linear denoiser; None: where the data has more channels than dim
)
gradient_checkpointing = (
    False  # recompute blocks in the backward pass: less memory, a third more compute
)
# ---- flow
path = "linear"  # linear | cosine
sigma_min = 0.0  # noise left at t = 1 (data)
sigma_max = 1.0  # noise at t = 0
prediction = "v"  # v (velocity) | epsilon (noise; fragile at t = 0) | x (data)
loss_space = "native"  # of the error: native (the prediction's own) | v (taken to the velocity)
t_sampling = "uniform"  # uniform | logit_normal
t_mean = 0.0  # of logit(t), for logit_normal
t_std = 1.0
t_shift: float | None = (
    None  # > 1 trains more near noise; None: sqrt(tokens * channels / 4096), at least 1
)
cond_dropout = 0.1  # share of samples trained on the null condition, which guidance needs
l2_weight = 0.0  # weight of mean(output^2) in the loss
# ---- optimizer
optimizer = "adamw"  # adamw | muon (orthogonal steps in the blocks) | adafactor (2 bytes of state a parameter, not 8)
optimizer_in_backward = False  # step each parameter when it gets its gradient, which is then freed
max_iters = 100_000
num_epochs: float | None = None  # instead of max_iters
learning_rate: float | None = None  # None: 1.6 / dim
min_lr = 0.0  # where the cosine ends
warmup_iters = 1000
weight_decay = 0.05  # on matrices only: not on norms, biases and gates
beta1 = 0.9
beta2 = 0.95  # of adamw
grad_clip = 1.0  # 0: off
max_bad_steps = (
    10  # end the run after so many iterations in a row whose loss or gradient was not finite
)
ema_decay = 0.9999  # reached gradually: min(this, (1 + i) / (10 + i)); 0: the weights themselves
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # auto (bfloat16 or float16 on cuda, else float32) | float32 | bfloat16 | float16 (with a scaler)
compile: bool | None = None  # torch.compile; None: on cuda only (on a CPU it takes minutes to pay)
fsdp = False  # shard weights, gradients and optimizer state over the processes, for models that outgrow one GPU
dist_timeout = 10.0  # minutes that the processes wait for one of them before they give up
seed = 0

config = configure(globals())
if debug:
    config |= dict(
        subset_size=min(subset_size or 64, 64), max_iters=min(max_iters, 10), num_epochs=None
    )
    config |= dict(eval_interval=5, log_interval=1, wandb_log=False)
    globals().update(
        config
    )  # from here on config is a snapshot: what follows may change these names

# ---------------------------------------------------------------- system
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0


def fail(message):
    print(
        f"error: {message}", file=sys.stderr
    )  # of every process: torchrun ends them all when the first is gone
    sys.exit(1) if world_size == 1 else exit_process(1)


try:
    device = pick_device(device)
except ValueError as e:
    fail(e)
device_type = device.split(":")[0]
if dtype == "auto":
    dtype = (
        "float32"
        if device_type != "cuda"
        else "bfloat16"
        if torch.cuda.is_bf16_supported()
        else "float16"
    )
if dtype not in ("float32", "bfloat16", "float16"):
    fail(f"dtype={dtype!r} is unknown; it is one of auto, float32, bfloat16, float16")
check_range(
    config, "batch_size gradient_accumulation_steps eval_batch_size eval_interval save_interval", 1
)
check_range(
    config, "log_interval eval_size eval_sample_steps max_iters subset_size max_bad_steps", 1
)
check_range(
    config,
    "seed eval_samples warmup_iters learning_rate min_lr weight_decay grad_clip l2_weight time_limit",
    0,
)
check_range(config, "num_epochs norm_eps dist_timeout", 0, above=True)
check_range(config, "beta1 beta2 ema_decay", 0, 1)
if optimizer_in_backward and (
    world_size > 1 or gradient_accumulation_steps > 1 or grad_clip or dtype == "float16"
):
    fail(
        "optimizer_in_backward=True needs one process, --gradient_accumulation_steps=1, --grad_clip=0 and no float16"
    )
if fsdp and (world_size == 1 or dtype == "float16" or optimizer == "adafactor"):
    fail("fsdp=True needs several processes (torchrun), float32 or bfloat16, and adamw or muon")
if gradient_accumulation_steps % world_size:
    multiple = math.ceil(gradient_accumulation_steps / world_size) * world_size
    fail(
        f"{gradient_accumulation_steps=} cannot be divided by {world_size} processes; {multiple} can"
    )
if world_size > 1:
    device = init_distributed(device, dist_timeout)
interrupts = Interrupts(time_limit)
# TF32 on cuda; on a CPU oneDNN, which is up to twice as fast as MKL, and float32 too unless there is AMX
torch.set_float32_matmul_precision("medium" if device_type == "cpu" else "high")
# no cache: a weight is used once in a pass, and its casts would be a second copy of the model
autocast = torch.autocast(
    device_type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False
)

# ---------------------------------------------------------------- data
try:
    data = open_dataset(data_dir)
    loader = Loader(
        data, normalize, device, batch_size, gradient_accumulation_steps, subset_size, seed, preload
    )
    flow_config = FlowConfig.of(config, *data["train_target"].shape[1:])
    model_config = NextDiTConfig.of(config, data)
except ValueError as e:
    fail(e)
samples_per_iter = batch_size * gradient_accumulation_steps
max_iters = (
    max_iters if num_epochs is None else math.ceil(num_epochs * loader.n_train / samples_per_iter)
)

# ---------------------------------------------------------------- model and optimizer
torch.manual_seed(seed)
last = Path(out_dir) / "ckpt_last.pt"
resume = init_from == "resume" or (init_from == "auto" and last.exists())
if eval_only and (dry_run or not resume and init_from in ("scratch", "auto")):
    fail("eval_only=True needs a checkpoint, --init_from=resume, and no dry_run=True")
try:
    if init_from in ("scratch", "resume", "auto"):
        raw_model = NextDiT(model_config)
    else:
        raw_model = NextDiT.from_diffusers(init_from, model_config.grid, lambda p: p.float())
        raw_model.config.gradient_checkpointing, held = (
            gradient_checkpointing,
            asdict(raw_model.config),
        )
        wanted = {name: getattr(model_config, name) for name in ("grid", "target_dim", "cond_dim")}
        if differ := [
            f"{k} is {held[k]}, the data's {v}" for k, v in wanted.items() if held[k] != v
        ]:
            raise ValueError(f"{init_from} does not fit {data_dir}: {', '.join(differ)}")
    model_args = asdict(raw_model.config)
    learning_rate = 1.6 / raw_model.config.dim if learning_rate is None else learning_rate
    chosen = (
        model_args | asdict(flow_config) | {"learning_rate": learning_rate}
    )  # a diffusers model has its own sizes
    config |= {k: v for k, v in chosen.items() if k in config}
    if raw_model.prior is not None and not resume:
        raw_model.prior.fit(loader.target_tokens())
    raw_model.null_cond.requires_grad_(
        cond_dropout > 0
    )  # else nothing trains it, and DDP would wait for its gradient
    ema_model = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay else raw_model
    nets = {"model": raw_model} | ({"ema": ema_model} if ema_decay else {})
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    ckpt = {"iter": 0, "best_val_loss": math.inf, "bad_steps": 0, "wandb_id": None}
    if resume:
        settings = {
            k: config[k]
            for k in ("optimizer", "normalize", "path", "prediction", "sigma_min", "sigma_max")
        }
        settings |= {k: v for k, v in model_args.items() if k != "gradient_checkpointing"}
        ckpt = restore_checkpoint(last, settings, loader.stats, nets, scaler)
        old = ckpt["config"] | {"init_from": init_from}
        if master and (
            changed := [f"{k} {old.get(k)} -> {v}" for k, v in config.items() if old.get(k) != v]
        ):
            print("changed since the checkpoint:", ", ".join(changed))
    for net in nets.values():  # until now on the CPU, so that a GPU never holds more than its part
        if fsdp:
            shard_model(net, dtype)
        net.to(device)
    opt = make_optimizer(raw_model, optimizer, learning_rate, weight_decay, (beta1, beta2))
    if resume:
        restore_optimizer(last, opt)
except ValueError as e:
    fail(e)
step, best_val_loss, wandb_id, bad_steps = (
    ckpt[k] for k in ("iter", "best_val_loss", "wandb_id", "bad_steps")
)
if all_reduce_sum(device, step % 10007)[0] != world_size * (
    step % 10007
):  # float32 counts no further than 2^24
    fail(
        f"the processes do not see the same {last}: out_dir must be on a file system that they share"
    )
params, ema_params = list(raw_model.parameters()), list(ema_model.parameters())
norms = (
    step_in_backward(opt) if optimizer_in_backward else None
)  # of the gradients, as backward meets them
model = raw_model
if device_type == "cuda" if compile is None else compile:
    by_block = optimizer_in_backward or fsdp  # where parameters come and go during a pass
    for block in raw_model.layers if by_block else ():
        block.compile()
    model = raw_model if by_block else torch.compile(raw_model)
if fsdp:
    warnings.filterwarnings(
        "ignore", message=".*returned a view tensor"
    )  # nothing is written into it
elif world_size > 1:
    model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def get_lr(step):
    """Linear warmup, then a cosine from learning_rate to min_lr at max_iters."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    progress = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------- checkpoints and logs
def save(name):
    """Write out_dir/name, all processes together; returns whether that worked: training goes on without."""
    state = {
        **{key: net.state_dict() for key, net in nets.items()}, "optimizer": opt.state_dict(),
        "scaler": scaler.state_dict(), "iter": step, "best_val_loss": best_val_loss, "wandb_id": wandb_id,
        "bad_steps": bad_steps, "config": config, "model_args": model_args, "flow": asdict(flow_config),
        "normalize": normalize, "stats": loader.stats, "cond_tokens": data["train_cond"].shape[1],
    }  # fmt: skip
    state, failed = gather_state_dict(state), 0
    state.setdefault("ema", state["model"])  # the same tensors, once in the file
    try:
        if master:
            save_checkpoint(Path(out_dir) / name, state)
    except OSError as e:
        print(f"WARNING: {name} not written ({e}); the previous one is untouched", flush=True)
        failed = 1
    return all_reduce_sum(device, failed)[0] == 0


def write_log(record):
    record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON knows no NaN
    size = log.stat().st_size if log.exists() else 0
    try:
        with open(log, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        print(f"WARNING: {log} not written ({e})", flush=True)
        if log.exists():
            os.truncate(log, size)  # no half a line
    if wandb_log:
        wandb.log(record, step=record["iter"])


log, wandb_log = Path(out_dir) / "log.jsonl", wandb_log and master and not (eval_only or dry_run)
if master and not (eval_only or dry_run):
    try:
        open_folder(out_dir, config, step, resume)
    except ValueError as e:
        fail(e)
if wandb_log:
    import wandb

    try:
        wandb.init(
            project=wandb_project,
            name=wandb_run_name,
            config=config,
            dir=out_dir,
            id=wandb_id,
            resume="allow",
        )
    except wandb.errors.Error as e:
        fail(f"wandb: {e} (run `wandb login`, or set WANDB_MODE=offline)")
    wandb_id = wandb.run.id

# ---------------------------------------------------------------- training loop
if master:
    print(" ".join(f"{k}={v}" for k, v in config.items()))
    print(
        f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters on {world_size} x {device}, {dtype}"
    )
    epochs = max_iters * samples_per_iter / loader.n_train
    print(
        f"{loader.n_train} samples, {samples_per_iter} an iteration, {max_iters} iterations ({epochs:.1f} epochs)"
    )
micro_steps = gradient_accumulation_steps // world_size  # of this process
micros = range(
    rank * micro_steps, (rank + 1) * micro_steps
)  # in the global batch: what decides their data and noise
batches, generator = loader.stream(step, micros), torch.Generator(device)
evaluation = eval_size, eval_batch_size, eval_samples, eval_sample_steps
evaluate = Evaluator(
    loader,
    flow_config,
    autocast,
    *evaluation,
    lambda: all_reduce_sum(device, interrupts.should_stop())[0] > 0,
)
flops = flops_per_sample(raw_model.config, data["train_cond"].shape[1]) / (
    world_size * product_rate(device, dtype)
)
torch.autograd.set_detect_anomaly(debug)
clock, first_step, stop, saved, bad_in_a_row = time.perf_counter(), step, False, True, 0
while True:
    lr = get_lr(step)
    for group in opt.param_groups:
        group["lr"] = lr
    record, final = {"iter": step}, step >= max_iters and not dry_run

    if (step % eval_interval == 0 or final or eval_only) and not (stop or dry_run):
        paused = time.perf_counter()
        results = evaluate(ema_model, generate=True)  # the EMA weights are what gets sampled
        if results and ema_decay:
            raw = evaluate(raw_model, generate=False)
            results = raw and results | {
                name.replace("loss", "loss_raw"): value for name, value in raw.items()
            }
        if results is None:
            stop = True
        else:
            record |= results
            if master:
                print(f"iter {step} | {summary(results)}", flush=True)
            if step > 0 and results["val_loss"] < best_val_loss and not eval_only:
                previous, best_val_loss = best_val_loss, results["val_loss"]
                best_val_loss = best_val_loss if save("ckpt_best.pt") else previous
        clock += time.perf_counter() - paused  # the pace is that of training alone
    if eval_only:
        saved = not stop
        break
    # not while steps are skipped: the weights may be why, and the last good checkpoint is where to go on from
    if (
        (step > 0 and step % save_interval == 0 or final or stop)
        and (bad_in_a_row == 0 or final)
        and not dry_run
    ):
        saved = save("ckpt_last.pt")
    if final or stop:
        if master and stop:
            print(
                f"stopped before iteration {step} by {interrupts.reason or 'a signal to another process'}"
            )
        elif master:
            write_log(record)
            print(
                f"done: {max_iters} iterations, best validation loss {best_val_loss:.4f}, in {out_dir}"
            )
        break

    loss, output_norm = torch.zeros(2, device=device)  # of the global batch
    for m, micro in enumerate(micros):
        x_1, cond = next(batches)
        generator.manual_seed(flow.mix(flow.TRAINING, seed, step, micro))
        if fsdp:
            model.set_requires_gradient_sync(m == micro_steps - 1)
        elif world_size > 1:
            model.require_backward_grad_sync = m == micro_steps - 1
        with autocast:
            losses, output = flow.loss(model, x_1, cond, flow_config, generator=generator)
        micro_loss = losses.mean() / micro_steps
        if not optimizer_in_backward or micro_loss.isfinite():  # else the step can be skipped later
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        output_norm += output.detach().norm(dim=-1).mean() / micro_steps
    if dry_run:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        peak = torch.cuda.max_memory_allocated() if device_type == "cuda" else rss
        if master:
            print(
                f"dry run: loss {loss.item():.4f}; peak memory of the forward and backward pass {peak / 1e9:.2f} GB"
            )
        break
    if optimizer_in_backward:
        grad_norm = torch.stack(norms).norm() if norms else math.nan
        norms.clear()
    else:
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        grad_norm = grad_norm.full_tensor() if fsdp else grad_norm
    # the only time in an iteration that the device is waited for
    sums = all_reduce_sum(device, loss, output_norm, grad_norm, interrupts.should_stop())
    loss, output_norm, grad_norm, stop = (value / world_size for value in sums)
    good = math.isfinite(loss) and math.isfinite(grad_norm)
    if not optimizer_in_backward:
        if good:
            scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
    if good and ema_decay:
        with (
            torch.no_grad()
        ):  # the parameters require gradients, and the averages would remember every iteration
            torch._foreach_lerp_(ema_params, params, 1 - min(ema_decay, (1 + step) / (10 + step)))
    bad_steps, bad_in_a_row = bad_steps + (not good), 0 if good else bad_in_a_row + 1
    if not good and master:
        print(f"WARNING: iter {step} skipped: loss {loss}, gradient norm {grad_norm}", flush=True)

    if step % log_interval == 0:
        pace = (time.perf_counter() - clock) / (step + 1 - first_step)  # seconds an iteration
        record |= dict(
            loss=loss, output_norm=output_norm, grad_norm=grad_norm, lr=lr, bad_steps=bad_steps
        )
        record |= dict(ms=1000 * pace, samples_per_s=samples_per_iter / pace)
        record |= dict(
            utilization=flops * samples_per_iter / pace, seconds_left=pace * (max_iters - step - 1)
        )
        if master:
            left = datetime.timedelta(seconds=round(record["seconds_left"]))
            rate = f"{record['samples_per_s']:.1f} samples/s, {record['utilization']:.0%} of peak | {left} left"
            state = f"output norm {output_norm:.2f} | gradient norm {grad_norm:.3f} | lr {lr:.2e}"
            print(f"iter {step} | loss {loss:.4f} | {state} | {rate}", flush=True)
    if master and len(record) > 1:
        write_log(record)
    if bad_in_a_row >= max_bad_steps:
        fail(
            f"no finite loss and gradient in {bad_in_a_row} iterations in a row; lower {learning_rate=}"
        )
    step += 1
if wandb_log:
    wandb.finish()
if not saved:
    fail(
        "the evaluation was broken off"
        if eval_only
        else f"{last} could not be written at the end: it is an older one"
    )
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    exit_process(0)
