"""
Train a NextDiT with flow matching on a dataset that prepare.py made.

    python train.py config/train_digits.py                                # one process
    torchrun --standalone --nproc_per_node=8 train.py --data_dir=data/mine --out_dir=out-mine
    python train.py --out_dir=out-mine --init_from=resume                 # go on with a run

Writes ckpt_last.pt, ckpt_best.pt, log.jsonl, and config.py, which repeats the run, into out_dir.
"""

import copy
import functools
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import flow
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig, flops_per_sample
from plumbing import checkpoint, distributed, exchange, run_folder
from plumbing.configurator import check_numbers, configure, describe, set_up_console
from plumbing.dataset import Loader, open_dataset
from plumbing.distributed import LAUNCHED, RANK, WORLD_SIZE, all_reduce_sum, map_rows, print0
from plumbing.optim import make_optimizer, step_in_backward
from report import score

# The defaults are a model of BLIP3-o's size. A config file or --key=value changes any of them.
# ---- I/O
out_dir = "out"
init_from = "scratch"  # scratch | resume | auto (resume if possible) | PATH of a run or other model
init_weights = "ema"  # which weights of PATH: ema | model (the raw ones)
overwrite = False  # replace the run that out_dir holds
eval_interval = 1000  # iterations between evaluations; ckpt_best.pt is the best one's
save_interval = 1000  # iterations between writes of ckpt_last.pt
log_interval = 10  # iterations between log lines
eval_only = False  # evaluate and exit; with init_from=resume ckpt_last.pt
time_limit: float | None = None  # minutes until the run saves and exits, as on SIGTERM or SIGINT
dry_run = False  # run one forward and backward pass, print the memory it took, exit
debug = False  # 64 samples, 10 iterations, anomaly detection, no wandb
wandb_log = False
wandb_project = "embedding-flow"
wandb_run_name: str | None = None  # None: wandb invents one
# ---- data
data_dir = "data/digits"
normalize = "channel"  # channel (mean 0, variance 1) | l2 (tokens of equal norm) | none
subset_size: int | None = None  # train on the first so many samples only
# samples per micro-batch, and micro-batches per iteration, divided among all processes; None: such
# that an iteration has 256 samples, on cuda in one micro-batch per process
batch_size: int | None = None
gradient_accumulation_steps: int | None = None
eval_batch_size = 64
eval_size = 2048  # validation samples per evaluation, the first ones
eval_samples = 64  # how many of them are also generated and scored
eval_sample_steps = 10  # solver steps for these
# ---- model
dim = 1792
n_layer = 24
n_head = 28
n_kv_head: int | None = None  # None: n_head; fewer: grouped-query attention
ffn_dim: int | None = None  # the feed-forward's width; None: 8/3 dim, by the next two
multiple_of = 256  # rounds it up to a multiple
ffn_dim_multiplier: float | None = None  # scales it
norm_eps = 1e-5
qk_norm = True
conditioning = "auto"  # aligned (token by token) | cross (attention) | auto: by token counts
cond_projection = False  # two layers make dim channels of each condition token first
conv = True  # a depthwise 3x3 convolution before each block
rope = "grid"  # RoPE frequencies: grid (for some ten rows and columns) | lumina (as for text)
prior: bool | None = None  # add a linear-Gaussian model's velocity; None: if data is wider than dim
gradient_checkpointing = False  # recompute blocks in the backward pass: less memory, slower
# ---- flow
path = "linear"  # linear | cosine
sigma_min = 0.0  # noise left at t = 1 (data)
sigma_max = 1.0  # noise at t = 0
prediction = "v"  # v (velocity) | epsilon (noise; fragile near t = 0) | x (data)
loss_space = "native"  # measure the error of the prediction itself (native) or of its velocity (v)
t_sampling = "uniform"  # uniform | logit_normal
t_mean = 0.0  # of logit(t), for logit_normal
t_std = 1.0
t_shift: float | None = None  # > 1 trains more near noise; None: by number of dimensions
cond_dropout = 0.1  # share of samples trained on the null condition, which guidance needs
learn_null_cond = True  # False: the null condition stays what it is, zero in a new model
l2_weight = 0.0  # weight of mean(output^2) in the loss
# ---- optimizer
optimizer = "adamw"  # adamw | adafactor (2 bytes of state per parameter instead of 8)
optimizer_in_backward = False  # update each parameter once it has a gradient, then free that
max_iters = 100_000
num_epochs: float | None = None  # if given, it decides max_iters
learning_rate: float | None = None  # None: 1.6 / dim
min_lr = 0.0  # at max_iters
warmup_iters = 1000
weight_decay = 0.05  # of matrices only, not of norms, biases and gates
beta1 = 0.9
beta2 = 0.95  # of adamw
grad_clip = 1.0  # 0: off
max_bad_steps = 10  # give up after so many iterations in a row without finite loss and gradient
ema_decay = 0.9999  # reached gradually: min(this, (1 + i) / (10 + i)); 0: no averaged weights
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # auto (bfloat16 on cuda, else float32) | float32 | bfloat16 | float16
compile: bool | None = None  # torch.compile; None: on cuda only (on a CPU it takes minutes to pay)
fsdp = False  # shard weights, gradients and optimizer over the processes (large models)
dist_timeout = 10.0  # minutes that the processes wait for one that hangs
seed = 0
# ----

set_up_console()  # until the training loop
config = configure(globals())
folder = Path(out_dir)
last, best = folder / "ckpt_last.pt", folder / "ckpt_best.pt"
newest = Path(init_from)  # it may name one of this run's own
if init_from in ("resume", "auto"):
    newest = last if last.exists() else best
resume = init_from == "resume" or newest in (last, best) and newest.exists()
ckpt, parameters = {}, None
given = {}  # the settings that come with the weights; those of the command line win
if resume:
    ckpt = checkpoint.read_checkpoint(newest)
    given = ckpt["config"]
elif init_from not in ("scratch", "auto"):
    ckpt, parameters = exchange.open_model(init_from, init_weights)
    given = ckpt["model_args"] | ckpt["flow"] | {"normalize": ckpt["normalize"]}
flags = [f"--{key}={value}" for key, value in given.items() if key in config]
# a run goes on wherever it lies now, not where it began
config = configure(globals(), flags + sys.argv[1:] + [f"--out_dir={out_dir}"])
if debug:
    subset_size, max_iters, num_epochs = 64, 10, None
    eval_interval, log_interval, wandb_log = 5, 1, False
positive = """
batch_size gradient_accumulation_steps subset_size eval_batch_size eval_size eval_sample_steps
eval_interval save_interval log_interval max_iters num_epochs dim n_layer n_head n_kv_head ffn_dim
multiple_of ffn_dim_multiplier norm_eps t_std t_shift max_bad_steps dist_timeout
"""
check_numbers(config, positive, any_sign="t_mean")

# ---------------------------------------------------------------- system
device = distributed.pick_device(device)
device_type = torch.device(device).type
dtype = distributed.pick_dtype(dtype, device)
torch_dtype = getattr(torch, dtype)
if gradient_accumulation_steps is None:
    micro = batch_size or (256 if device_type == "cuda" else 32)
    gradient_accumulation_steps = WORLD_SIZE * max(1, 256 // (micro * WORLD_SIZE))
batch_size = batch_size or max(1, 256 // gradient_accumulation_steps)
several_passes = LAUNCHED or gradient_accumulation_steps > 1
if optimizer_in_backward and (several_passes or grad_clip or dtype == "float16"):
    raise ValueError(
        "optimizer_in_backward=True needs one process, --gradient_accumulation_steps=1, "
        "--grad_clip=0 and no float16"
    )
if fsdp and (not LAUNCHED or dtype == "float16" or optimizer == "adafactor"):
    raise ValueError("fsdp=True needs torchrun, float32 or bfloat16, and adamw")
if gradient_accumulation_steps % WORLD_SIZE:
    raise ValueError(f"{gradient_accumulation_steps=} is no multiple of {WORLD_SIZE} processes")
if LAUNCHED:
    device = distributed.init_distributed(device, dist_timeout)
interrupts = distributed.Interrupts(time_limit, device)
# TF32 on cuda. On a CPU it chooses oneDNN, up to twice as fast as MKL; it computes in float32 as
# well, except on processors with AMX, where it uses bfloat16.
torch.set_float32_matmul_precision("medium")
# no cache: a weight is used once per pass, and its casts would be a second copy of the model
autocast = torch.autocast(device_type, torch_dtype, enabled=dtype != "float32", cache_enabled=False)

# ---------------------------------------------------------------- data
data = open_dataset(data_dir)
S, C = data["train_cond"].shape[1:]  # tokens and channels of a condition
T, D = data["train_target"].shape[1:]  # and of a target
loader = Loader(
    data, batch_size, gradient_accumulation_steps, subset_size, seed, pin_memory="cuda" in device
)
data_stats = {name: torch.from_numpy(value).float() for name, value in data["stats"].items()}
# the weights of a checkpoint expect embeddings that are normalized by its own
stats = ckpt.get("stats") or data_stats
cond_normalizer = Normalizer(normalize, stats["cond_mean"], stats["cond_std"], device)
target_normalizer = Normalizer(normalize, stats["target_mean"], stats["target_std"], device)
samples_per_iter = batch_size * gradient_accumulation_steps
if num_epochs is not None:
    max_iters = math.ceil(num_epochs * loader.n_train / samples_per_iter)
    config |= {"max_iters": max_iters, "num_epochs": None}


def encode(target, cond):
    """A raw batch, (B, T, D) and (B, S, C), on the device and normalized."""
    return target_normalizer.encode(target), cond_normalizer.encode(cond)


# ---------------------------------------------------------------- model and optimizer
# what the settings leave open, the data decides
if conditioning == "auto":
    conditioning = "aligned" if S == T else "cross"
if conditioning == "aligned" and S not in (1, T):
    raise ValueError(f"conditioning=aligned needs {T} condition tokens, as in the target, not {S}")
if t_shift is None:  # more dimensions need more noise (Zheng et al. 2025, arXiv 2510.11690)
    t_shift = max(1.0, math.sqrt(T * D / 4096))
can_have_prior = (path, prediction, sigma_min, sigma_max) == ("linear", "v", 0, 1)
if prior is None:  # a model narrower than its data cannot pass on the noise that v contains
    prior = can_have_prior and D > dim
if prior and not can_have_prior:
    raise ValueError("prior=True needs path=linear, prediction=v, sigma_min=0 and sigma_max=1")
if learning_rate is None:
    learning_rate = 1.6 / dim
# config.py and the checkpoints have the settings as they were decided
config |= dict(
    batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
    conditioning=conditioning, t_shift=t_shift, prior=prior, learning_rate=learning_rate,
    overwrite=False, time_limit=None, debug=False,  # these belong to this start, not to the run
)  # fmt: skip
flow_config = FlowConfig(**{name: config[name] for name in FlowConfig.__dataclass_fields__})
settings = {name: config[name] for name in NextDiTConfig.__dataclass_fields__ if name in config}
model_config = NextDiTConfig(data["meta"]["grid"], target_dim=D, cond_dim=C, **settings)
torch.manual_seed(seed)
raw_model = NextDiT(model_config)
if parameters:
    checkpoint.check_fixed(init_from, given, config | asdict(model_config))
    checkpoint.warn_of_distance(init_from, stats, data_stats)
    checkpoint.load_weights(raw_model, parameters)
if prior and not ckpt:
    raw_model.prior.fit(lambda rows: encode(*loader.read("train", rows)), loader.n_train)
# without dropout nothing trains the null condition, and DDP would wait for its gradient
raw_model.null_cond.requires_grad_(learn_null_cond and cond_dropout > 0)
ema_model = copy.deepcopy(raw_model).requires_grad_(False) if ema_decay else raw_model
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
iteration, bad_steps, wandb_id = 0, 0, None
saver = checkpoint.Saver(math.inf, device)
if resume:
    # without averages both are the raw model, and the last one counts
    models = {"ema": ema_model, "model": raw_model}
    checkpoint.restore(newest, ckpt, config, data_stats, models, scaler)
    iteration, bad_steps, wandb_id = ckpt["iter"], ckpt["bad_steps"], ckpt["wandb_id"]
    saver.best_val_loss = ckpt["best_val_loss"]
    config["init_from"] = given["init_from"]  # where the run began
# they were made on the CPU, and are sharded before they move: no GPU ever holds a whole one
for net in dict.fromkeys([raw_model, ema_model]):
    if fsdp:
        distributed.shard_model(net, torch_dtype)
    net.to(device)
opt = make_optimizer(raw_model, optimizer, learning_rate, weight_decay, (beta1, beta2))
if resume:
    checkpoint.restore_optimizer(ckpt, opt)
    last_lr = ckpt["optimizer"]["param_groups"][0]["lr"]
    del ckpt
if all_reduce_sum(torch.tensor(iteration, device=device)) != WORLD_SIZE * iteration:
    raise ValueError(f"the processes see different files {newest}: out_dir must be shared by them")
params, ema_params = list(raw_model.parameters()), list(ema_model.parameters())

if compile or compile is None and device_type == "cuda":
    # block by block: they are all alike, and DDP or FSDP work between them
    torch._dynamo.config.optimize_ddp = False  # would cut each of them at DDP's buckets
    for block in [*raw_model.layers, *ema_model.layers]:
        block.compile(dynamic=False)
model = raw_model
if LAUNCHED and not fsdp:
    model = DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=100)

# ---------------------------------------------------------------- steps, evaluations, checkpoints
micro_steps = gradient_accumulation_steps // WORLD_SIZE  # of this process
# the place of a micro-batch in the global batch decides its data and its noise
micros = range(RANK * micro_steps, (RANK + 1) * micro_steps)
# Endless pairs (target, cond), raw, on the CPU, one per micro-batch of this process. For a torch
# DataLoader, let its batch_sampler be loader.rows(i, micro), i from iteration on, for these micros.
batches = loader.stream(iteration, micros)
TIME_BINS = 4  # of t, from noise to data
# metrics of score.py
SAMPLED = ("token_cosine", "frechet", "frechet_patch", "neighbours")
standardize = score.standardizer(data_stats["target_mean"], data_stats["target_std"])
eval_flow = replace(flow_config, cond_dropout=0.0, l2_weight=0.0)
n_eval = min(eval_size, loader.n_val)
# a t for each validation sample: multiples of the golden ratio cover [0, 1] evenly
eval_t = (torch.arange(0.5, n_eval, dtype=torch.float64) * 0.6180339887498949 % 1).float()
evaluated = {"val_loss": ema_model}
if ema_decay:
    evaluated["val_loss_raw"] = raw_model


def get_lr(iteration):
    """Linear warmup, then a cosine from learning_rate to min_lr at max_iters."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / warmup_iters
    progress = (iteration - warmup_iters) / max(1, max_iters - warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return min_lr + (learning_rate - min_lr) * cosine


def forward_backward(micro):
    """Gradients of one micro-batch; returns (2,), its share of the loss and of the output norm."""
    x_1, cond = encode(*next(batches))
    noise_seed = flow.derive_seed(flow.TRAINING, seed, iteration, micro)
    generator = torch.Generator(device).manual_seed(noise_seed)
    is_last = micro == micros[-1]  # only then are gradients summed over the processes
    if fsdp:
        model.set_requires_gradient_sync(is_last)
    elif LAUNCHED:
        model.require_backward_grad_sync = is_last
    with autocast:
        losses, output = flow.loss(model, x_1, cond, flow_config, generator=generator)
    loss = losses.mean() / micro_steps
    scaler.scale(loss).backward()
    output_norm = output.norm(dim=-1).mean() / micro_steps  # over tokens
    return torch.stack([loss, output_norm]).detach()


def clip_gradients():
    """Clip the gradients and return their norm before."""
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    return norm.full_tensor() if fsdp else norm


if optimizer_in_backward:  # then they are gone when this is called: it only returns their norm
    clip_gradients = step_in_backward(opt)


def evaluate():
    """Mean losses over the validation samples, also by bins of t, of the averaged weights and of
    the raw ones; and metrics of a sample for each of the first eval_samples conditions.

    Noise and t are functions of a sample's row, so that values compare between runs.
    """

    def samples_of_rows(rows):
        _, cond = encode(*loader.read("val", rows))
        x_0 = flow.sample_noise(rows, (T, D), seed=0, draw=1).to(device)
        with autocast:
            velocity = flow.guided_velocity(ema_model, cond, flow_config)
            x_1 = flow.integrate(velocity, sigma_max * x_0, eval_sample_steps)
        return target_normalizer.decode(x_1)

    results = {}
    bins = (eval_t * TIME_BINS).long()
    for name, net in evaluated.items():

        def loss_of_rows(rows):
            x_1, cond = encode(*loader.read("val", rows))
            x_0 = flow.sample_noise(rows, (T, D), seed=0).to(device)
            with autocast:
                return flow.loss(net, x_1, cond, eval_flow, x_0=x_0, t=eval_t[rows].to(device))[0]

        losses = map_rows(loss_of_rows, n_eval, eval_batch_size, interrupts)
        results[name] = losses.mean().item()
        for i in range(TIME_BINS):
            results[f"{name}_t{i}"] = losses[bins == i].mean().item()
    if eval_samples:
        truth = data["val_target"][:eval_samples]  # (n, T, D), raw, as the samples
        samples = map_rows(samples_of_rows, len(truth), eval_batch_size, interrupts)
        metrics = score.metrics(standardize(samples), standardize(truth), model_config.grid)
        results |= {f"val_{name}": metrics[name] for name in SAMPLED}
    text = " ".join(f"{name}={value:.4g}" for name, value in results.items())
    print0(f"iter {iteration} | {text}")
    return results


def state():
    """What a checkpoint holds."""
    return dict(
        model=raw_model.state_dict(), ema=ema_model.state_dict(), optimizer=opt.state_dict(),
        scaler=scaler.state_dict(), iter=iteration, bad_steps=bad_steps, wandb_id=wandb_id,
        config=config, code=version, model_args=asdict(model_config), flow=asdict(flow_config),
        normalize=normalize, stats=stats, data_stats=data_stats, cond_tokens=S,
        data_meta=data["meta"], data_path=",".join(data["folders"]),
    )  # fmt: skip


def ask_wandb(function):
    """Whatever ails wandb or its service, the run goes on."""
    try:
        return function()
    except Exception as e:
        print0(f"WARNING: wandb: {e}")


def write_log(record):
    if RANK == 0:
        run_folder.append_log(folder, record)
        if wandb_log:
            ask_wandb(lambda: wandb.log(record, step=iteration))


# ---------------------------------------------------------------- start
print0(describe(config, __file__))
n_params = sum(p.numel() for p in params)
print0(f"{n_params / 1e6:.2f}M parameters on {WORLD_SIZE} x {device}, {dtype}")
print0(
    f"{loader.n_train} samples, {samples_per_iter} per iteration, "
    f"{max_iters} iterations ({max_iters * samples_per_iter / loader.n_train:.1f} epochs)"
)
if warmup_iters >= max_iters:
    print0(f"WARNING: the warmup, {warmup_iters} iterations, takes the whole run of {max_iters}")
if iteration > warmup_iters and get_lr(iteration) > 1.1 * last_lr:
    print0(f"WARNING: the learning rate rises from {last_lr:.2g} to {get_lr(iteration):.2g}")
if eval_only:
    evaluate()
    distributed.exit_process()
if dry_run:
    forward_backward(micros[0])
    import resource  # not on Windows

    peak = torch.cuda.max_memory_allocated()  # 0 on other devices
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print0(f"dry run: peak memory {peak / 1e9:.2f} GB")
    distributed.exit_process()
version = run_folder.code_version()
lock = run_folder.claim_folder(folder, resume or overwrite)  # as long as this is here
if RANK == 0:
    if wandb_log:
        import wandb

        init = functools.partial(
            wandb.init, project=wandb_project, name=wandb_run_name, id=wandb_id, resume="allow",
            config=config, dir=out_dir,
        )  # fmt: skip
        # offline where there is no network, no login or a wrong variable; wandb says how to send it
        # later
        run = ask_wandb(init) or init(mode="offline")
        wandb_id = run.id
    run_folder.open_run(folder, config, version, iteration, resume)

# ---------------------------------------------------------------- training loop
peak_flops = WORLD_SIZE * distributed.matmul_rate(device, torch_dtype)  # per second
peak_rate = peak_flops / flops_per_sample(model_config, S)  # samples per second
torch.autograd.set_detect_anomaly(debug)
first_iteration = iteration
seconds = 0.0  # of training: evaluations do not count, nor the first iteration, which compiles
bad_in_a_row, stop = 0, False
sys.excepthook = sys.__excepthook__  # from here on an error is the program's own
while not stop:
    lr = get_lr(iteration)
    for group in opt.param_groups:
        group["lr"] = lr
    record = {"iter": iteration}
    files, val_loss = [], None  # to be written
    done = iteration >= max_iters

    if done or iteration % eval_interval == 0:
        try:
            record |= evaluate()
        except InterruptedError:
            stop = True
            break
        saver.wait()
        # never an untrained model
        if (iteration or parameters) and record["val_loss"] < saver.best_val_loss:
            files, val_loss = [best], record["val_loss"]
    start = time.perf_counter()
    # not while updates are skipped: the last good checkpoint is where to go on from
    is_sound = bad_in_a_row == 0 and math.isfinite(record.get("val_loss", 0.0))
    if is_sound and (done or iteration > 0 and iteration % save_interval == 0):
        files.append(last)
    if files:
        saver.start(files, state(), val_loss)
    if done:
        write_log(record)
        break

    sums = sum(map(forward_backward, micros))  # (2,), loss and output norm
    sums = torch.stack([*sums, clip_gradients().to(device), interrupts.flag()])
    # the only time in an iteration that this process waits for the device
    means = all_reduce_sum(sums) / WORLD_SIZE
    loss, output_norm, grad_norm, stop = means.tolist()

    if math.isfinite(loss + grad_norm):
        bad_in_a_row = 0
        scaler.step(opt)
        if ema_decay:
            weight = 1 - min(ema_decay, (1 + iteration) / (10 + iteration))
            with torch.no_grad():  # else every average would be a node of an endless graph
                torch._foreach_lerp_(ema_params, params, weight)
    else:
        bad_steps += 1
        bad_in_a_row += 1
        print0(f"WARNING: iter {iteration} skipped: loss {loss}, gradient norm {grad_norm}")
    scaler.update()
    opt.zero_grad()

    if iteration > first_iteration:
        seconds += time.perf_counter() - start
    if iteration % log_interval == 0:
        text = f"iter {iteration} | loss {loss:.4f} | out {output_norm:.3g} | "
        text += f"grad {grad_norm:.3g} | lr {lr:.1e}"
        record |= dict(
            loss=loss, output_norm=output_norm, grad_norm=grad_norm, lr=lr, bad_steps=bad_steps
        )
        if seconds:
            pace = seconds / (iteration - first_iteration)
            rate = samples_per_iter / pace
            mfu = rate / peak_rate
            left = pace * (max_iters - iteration - 1)
            record |= dict(ms=1000 * pace, samples_per_s=rate, mfu=mfu, seconds_left=left)
            text += f" | {rate:.4g} samples/s | mfu {mfu:.0%} | {left / 60:.0f} min left"
        print0(text)
    if len(record) > 1:
        write_log(record)
    if bad_in_a_row >= max_bad_steps:
        sys.exit(
            f"error: no finite loss and gradient in {bad_in_a_row} iterations in a row; "
            f"lower {learning_rate=}"
        )
    iteration += 1

# ---------------------------------------------------------------- the end
if stop and bad_in_a_row == 0:
    saver.start([last], state())
saved = saver.wait()
interrupts.restore()
if stop:
    print0(f"stopped before iteration {iteration} by {interrupts.reason or 'another process'}")
elif is_sound:
    print0(f"done: {iteration} iterations, best val_loss {saver.best_val_loss:.4f}, in {out_dir}")
else:
    sys.exit(f"error: the last iterations were not finite: {last} is an older one")
if not saved:
    sys.exit(f"error: {last} could not be written at the end: it is an older one")
if LAUNCHED:
    distributed.exit_process()
