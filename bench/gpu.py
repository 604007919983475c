"""
Is training and sampling right on a GPU, and how fast? One command, under eight minutes on an H100.

    python bench/gpu.py                                   # all sections
    python bench/gpu.py --only parity,speed --out results
    python bench/gpu.py --device cpu                      # the same sections, small

Prints a row as soon as it is measured, and writes all of them as JSON to gpu.json in --out. A
section that would not end before --deadline seconds is skipped. Needs no network and no data: it
makes random embeddings, and the digits where scikit-learn is installed. Exits with 1 if a result is
wrong (rows that end in WRONG), whatever the speed.

    ceilings    what the device can do: copies, products of random matrices
    parity      output and all gradients beside float64 on the CPU, eager and compiled, by precision
                and by backend of attention; the solver
    curves      train.py on the digits: the validation loss of each dtype is that of a CPU
    resume      runs that are killed and go on (bench/resume.py), and by how much they differ
    torchrun    DDP and FSDP with one process equal a run without, and read each other's checkpoints
    speed       the default model: where the time of an iteration goes, and train.py itself
    diffusers   the same weights in BLIP3-o's model of diffusers' parts, where that is installed
    memory      peak memory of training and sampling
    sampling    samples per second by batch size
    checkpoint  how long writing one stops training, and reading it takes
"""

import argparse
import copy
import functools
import gc
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
import sample
from bench import resume
from bench.train import make_dataset
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig, flops_per_sample
from plumbing import checkpoint, run_folder
from plumbing.distributed import pick_dtype
from plumbing.optim import make_optimizer, step_in_backward

ROOT = Path(__file__).parents[1]
PEAK = 989e12  # operations per second of an H100 or H200 in bfloat16, by the datasheet
SHAPES = {"target_dim": 768, "cond_dim": 1280, "conditioning": "aligned", "conv": True}
SHAPES |= {"rope": "grid"}
DIGITS = ["config/train_digits.py", "--max_iters=300", "--warmup_iters=50", "--eval_interval=300"]
TINY = "--dim=64 --n_layer=2 --n_head=2 --multiple_of=32 --batch_size=8 --warmup_iters=4"
TINY += " --gradient_accumulation_steps=2 --learning_rate=1e-3 --eval_size=32 --eval_samples=8"
TINY += " --save_interval=10 --log_interval=1"

start = time.monotonic()
rows = []


def row(section, name, value, unit="", right=True):
    """Print and keep a figure; right: False if it shows a fault."""
    rows.append({"section": section, "name": name, "value": value, "unit": unit, "right": right})
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    mark = "" if right else "   WRONG"
    seconds = time.monotonic() - start
    print(f"{seconds:5.0f} s  {section:10} {name:52} {text:>12} {unit}{mark}", flush=True)


class Bench:
    """The device, sizes for it, and what the sections share."""

    def __init__(self, device, folder):
        self.device = device
        self.folder = folder
        self.is_cuda = device.startswith("cuda")
        self.dtype = getattr(torch, pick_dtype("auto", device))
        # on a CPU, where inductor takes a minute, only what comes before it
        self.backend = "inductor" if self.is_cuda else "aot_eager"
        self.sizes = dict(dim=1792, n_layer=24, n_head=28)
        self.batches = [(256, 1), (128, 2), (32, 8)]  # samples per micro-batch, micro-batches
        self.sampling_batches = [8, 32, 128, 512]
        if not self.is_cuda:
            self.sizes = dict(dim=64, n_layer=2, n_head=2, multiple_of=32)
            self.batches = [(8, 1), (4, 2)]
            self.sampling_batches = [2, 4]

    def synchronize(self):
        if self.is_cuda:
            torch.cuda.synchronize()

    def ms(self, *functions, repeat=5, rounds=1):
        """Milliseconds of each function, the median over the rounds, in which they take turns."""
        times = [[] for _ in functions]
        for function in functions:
            function()
            function()
        for _ in range(rounds):
            for function, taken in zip(functions, times):
                self.synchronize()
                begin = time.perf_counter()
                for _ in range(repeat if self.is_cuda else 1):
                    function()
                self.synchronize()
                seconds = time.perf_counter() - begin
                taken.append(1000 * seconds / (repeat if self.is_cuda else 1))
        medians = [statistics.median(taken) for taken in times]
        return medians[0] if len(medians) == 1 else medians

    def peak_memory(self, run):
        """Peak memory in GB of a function: on a GPU its own, else that of the process so far."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run()
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def autocast(self):
        kind = self.dtype
        device_type = self.device.split(":")[0]
        return torch.autocast(device_type, kind, enabled=kind != torch.float32, cache_enabled=False)

    def model(self, compiled=True, **changes):
        torch.manual_seed(0)
        with torch.device(self.device):
            model = NextDiT(NextDiTConfig((8, 8), **self.sizes | SHAPES | changes))
        return self.compile(model) if compiled else model

    def compile(self, model):
        for block in model.layers:
            block.compile(dynamic=False, backend=self.backend)
        return model

    def batch(self, B):
        x_1 = torch.randn(B, 64, SHAPES["target_dim"], device=self.device)
        return x_1, torch.randn(B, 64, SHAPES["cond_dim"], device=self.device)

    def loss(self, model, batch, cfg=FlowConfig(t_shift=3.46)):  # noqa: B008
        with self.autocast():
            return flow.loss(model, *batch, cfg)[0].mean()

    @functools.cached_property
    def data(self):
        """A small prepared dataset."""
        tokens = (64, 1280), (64, 768)
        return make_dataset(
            self.folder / "random", 512, *tokens if self.is_cuda else ((64, 24),) * 2
        )

    @functools.cached_property
    def digits(self):
        """The demo's dataset, or random numbers where scikit-learn is missing."""
        folder = self.folder / "digits"
        pickle = ROOT / "data/digits/embeddings.pkl"
        if not pickle.exists() and python("data/digits/make.py", check=False).returncode:
            return make_dataset(folder, 400, (64, 48), (64, 32))
        python("prepare.py", pickle, f"--out={folder}")
        return folder

    def train(self, name, *flags, launcher=(), threads=1):
        """Run train.py; returns its output and the records of its log."""
        out = self.folder / name
        flags = [f"--device={self.device}", *flags, f"--out_dir={out}"]
        done = python(*launcher, ROOT / "train.py", *flags, threads=threads)
        return done.stdout + done.stderr, list(run_folder.read_log(out))


def python(*args, check=True, threads=1):
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def together(*functions):
    """The results of functions that run at the same time."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result() for future in [threads.submit(f) for f in functions]]


def distance(a, b):
    """||a - b|| / ||b||, in float64 on the CPU."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- sections


def ceilings(bench):
    name = torch.cuda.get_device_name() if bench.is_cuda else "CPU"
    row("ceilings", f"{name}, torch {torch.__version__}", os.cpu_count(), "CPU cores")
    n = 2**28 if bench.is_cuda else 2**22
    x = torch.randn(n, device=bench.device)
    y = torch.empty_like(x)
    row("ceilings", "copy", 2 * x.nbytes / bench.ms(lambda: y.copy_(x)) / 1e9, "TB/s")
    torch.set_float32_matmul_precision("high")
    for n, dtype in ((4096, bench.dtype), (8192, bench.dtype), (8192, torch.float32)):
        n = n if bench.is_cuda else n // 16
        a, b = torch.randn(2, n, n, device=bench.device, dtype=dtype)
        rate = 2 * n**3 / bench.ms(lambda: a @ b, repeat=10) * 1e3
        row("ceilings", f"product {n}, {dtype}"[:50], rate / 1e12, "TFLOP/s")


def parity(bench):
    sizes = dict(target_dim=96, cond_dim=48, dim=128, n_layer=2, n_head=4, multiple_of=32)
    sizes |= dict(conv=True, rope="grid")
    torch.manual_seed(0)
    x, t, cond = torch.randn(8, 64, 96), torch.rand(8), torch.randn(8, 64, 48)
    drop = torch.arange(8) % 4 == 0

    def run(model, dtype, autocast=None):
        """Output and all gradients."""
        device = model.final.weight.device
        model.zero_grad()
        batch = [a.to(device, dtype) for a in (x, t, cond)]
        enabled = autocast is not None
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=enabled):
            out = model(*batch, drop.to(device))
        scale = 1024 if autocast == torch.float16 else 1  # as GradScaler does
        (scale * (out.to(dtype) ** 2).mean()).backward()
        return [out, *(p.grad / scale for p in model.parameters())]

    def errors(result, truth):
        """Of the output, and the largest of a gradient: relative to its norm or, since some are
        zero but for rounding, to the root mean square of all norms."""
        floor = statistics.mean(g.norm().item() ** 2 for g in truth[1:]) ** 0.5
        worst = 0.0
        for a, b in zip(result[1:], truth[1:]):
            difference = (a.cpu().double() - b).norm().item()
            worst = max(worst, difference / max(b.norm().item(), floor))
        return distance(result[0], truth[0]), worst

    arithmetics = {  # name: float32_matmul_precision, autocast, largest error
        "float32": ("highest", None, 1e-5),
        "TF32": ("high", None, 2e-3),
        "bfloat16": ("high", torch.bfloat16, 2e-2),
        "float16": ("high", torch.float16, 2e-2),
    }
    for conditioning, prior in (("aligned", True), ("cross", False)):
        config = NextDiTConfig((8, 8), **sizes, conditioning=conditioning, prior=prior)
        reference = NextDiT(config)
        for p in reference.parameters():
            if not p.any():  # what starts silent would hide faults
                torch.nn.init.normal_(p, std=0.1)
        if prior:
            torch.nn.init.normal_(reference.prior.weight, std=0.1)
            torch.nn.init.orthogonal_(reference.prior.places)
            torch.nn.init.orthogonal_(reference.prior.channels)
            torch.nn.init.uniform_(reference.prior.variance, 0.01, 2)
        truth = run(copy.deepcopy(reference).double(), torch.float64)
        eager = copy.deepcopy(reference).to(bench.device)
        compiled = bench.compile(copy.deepcopy(eager))
        for name, (precision, autocast, limit) in arithmetics.items():
            torch.set_float32_matmul_precision(precision)
            models = {"eager": eager}
            if name in ("float32", "bfloat16"):
                models["compiled"] = compiled
            for kind, model in models.items():
                out, worst = errors(run(model, torch.float32, autocast), truth)
                label = f"{conditioning}, {name}, {kind}"
                row("parity", f"{label}: output", out, right=out < limit)
                row("parity", f"{label}: worst gradient", worst, right=worst < limit)
    torch.set_float32_matmul_precision("high")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):  # fmt: skip
        try:
            with sdpa_kernel(backend):
                out, worst = errors(run(eager, torch.float32, torch.bfloat16), truth)
        except RuntimeError:
            row("parity", f"{backend.name} with bfloat16", "is not there")
            continue
        row("parity", f"{backend.name} with bfloat16: output", out, right=out < 2e-2)
        row("parity", f"{backend.name} with bfloat16: worst gradient", worst, right=worst < 2e-2)
    torch.set_float32_matmul_precision("highest")
    noise = flow.sample_noise(range(8), (64, 96), seed=0)
    ends = []
    for model, dtype in ((reference.double(), torch.float64), (eager, torch.float32)):
        device = model.final.weight.device
        with torch.no_grad():
            velocity = flow.guided_velocity(model, cond.to(device, dtype), FlowConfig(), 2.0)
            ends.append(flow.integrate(velocity, noise.to(device, dtype), steps=10))
    error = distance(ends[1], ends[0])
    row("parity", "ten steps of the solver, guided", error, right=error < 1e-4)
    torch.set_float32_matmul_precision("high")


def curves(bench):
    settings = {"bfloat16": ("--dtype=bfloat16",)}
    if bench.is_cuda:
        settings |= {"float32": (), "float16": ("--dtype=float16",)}
        settings["bfloat16, compiled"] = ("--dtype=bfloat16", "--compile=True")
    flags = [*DIGITS, f"--data_dir={bench.digits}"]
    if not bench.is_cuda:
        flags += ["--max_iters=4", "--eval_size=32", "--eval_samples=0"]

    def run(name, *more):
        _, log = bench.train(f"curve {name}", *flags, "--dtype=float32", "--compile=False", *more)
        return log[-1]["val_loss"]

    runs = [functools.partial(run, "CPU", "--device=cpu")]
    runs += [functools.partial(run, name, *more) for name, more in settings.items()]
    expected, *losses = together(*runs) if bench.is_cuda else [r() for r in runs]
    row("curves", "validation loss: CPU, float32", expected)
    for name, loss in zip(settings, losses):
        right = abs(loss / expected - 1) < 0.04
        row("curves", f"validation loss: {bench.device}, {name}", loss, right=right)


def resumed(bench):
    kills, iters = (3, 300) if bench.is_cuda else (1, 40)
    flags = [f"--kills={kills}", f"--iters={iters}", "--flags", f"device={bench.device}"]
    folder = bench.folder / "resume"
    done = python("bench/resume.py", folder, *flags, check=False)
    whole, parts = (resume.load(folder / name) for name in ("whole", "parts"))
    differences = re.findall("^.*DIFFERS.*$", done.stdout, re.M)
    if done.returncode and not differences:
        raise RuntimeError(done.stdout + done.stderr)
    weights = [torch.cat([x.flatten() for x in ckpt["model"].values()]) for ckpt in (whole, parts)]
    error = distance(*weights)
    row("resume", f"{kills} kills: difference of the weights", error, right=error < 1e-4)
    equal = "yes" if done.returncode == 0 else "no"
    row("resume", "checkpoints and log equal to the last bit", equal)
    for line in differences:
        row("resume", line, "")


def torchrun(bench):
    base = [*TINY.split(), f"--data_dir={bench.data}", "--dtype=float32", "--eval_interval=10"]
    iters = 20 if bench.is_cuda else 10
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    kinds = {"plain": ((), []), "DDP": (launch, []), "FSDP": (launch, ["--fsdp=True"])}
    compiled = (False, True) if bench.is_cuda else (False,)
    cases = [(kind, c) for kind in kinds for c in compiled]

    def run(kind, c, name, *more):
        launcher, own = kinds[kind]
        flags = [*base, *own, f"--compile={c}", f"--max_iters={iters}", *more]
        return bench.train(name, *flags, launcher=launcher)

    def name_of(kind, c):
        return f"{kind} {'compiled' if c else 'eager'}"

    runs = [functools.partial(run, *case, name_of(*case)) for case in cases]
    results = together(*runs) if bench.is_cuda else [r() for r in runs]
    expected = results[0][1][-1]["val_loss"]
    for case, (text, log) in zip(cases, results):
        error = abs(log[-1]["val_loss"] / expected - 1)
        row(
            "torchrun",
            f"{name_of(*case)}: validation loss, beside plain",
            error,
            right=error < 1e-3,
        )
        found = re.findall(r"^.*[Ww]arning.*$", text, re.M)
        row("torchrun", f"{name_of(*case)}: warnings", len(found), right=not found)
        for line in found:
            print(line)
    # each goes on from the other's checkpoint
    pairs = [("plain", "FSDP")]
    if bench.is_cuda:
        pairs += [("FSDP", "DDP"), ("DDP", "FSDP")]
    for kind, other in pairs:
        shutil.copytree(bench.folder / f"{other} eager", bench.folder / f"{kind} after {other}")
    more = ["--init_from=resume", f"--max_iters={iters + 4}", "--fsdp=False"]
    runs = [
        functools.partial(run, kind, False, f"{kind} after {other}", *more, *kinds[kind][1])
        for kind, other in pairs
    ]
    results = together(*runs) if bench.is_cuda else [r() for r in runs]
    expected = results[0][1][-1]["val_loss"]
    for (kind, other), (_, log) in zip(pairs, results):
        error = abs(log[-1]["val_loss"] / expected - 1)
        row("torchrun", f"{kind} goes on after {other}", error, right=error < 1e-3)


def parts_of_an_iteration(bench):
    """Milliseconds of an iteration by size of its micro-batches."""
    torch.set_float32_matmul_precision("high")
    model = bench.model()
    flops = flops_per_sample(model.config, 64)
    params = list(model.parameters())
    row("speed", "parameters", sum(p.numel() for p in params) / 1e6, "million")
    opt = make_optimizer(model, "adamw", 1e-4, 0.05, (0.9, 0.95))
    ema = [p.detach().clone() for p in params]
    n = 8192 if bench.is_cuda else 512
    a, b = torch.randn(2, n, n, device=bench.device, dtype=bench.dtype)
    product = 2 * n**3 / bench.ms(lambda: a @ b, repeat=10) * 1e3

    def average():
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 0.01)

    bench.loss(model, bench.batch(2)).backward()
    clip, update, ema_ms = (
        bench.ms(f)
        for f in (lambda: torch.nn.utils.clip_grad_norm_(params, 1.0), opt.step, average)
    )
    rest = clip + update + ema_ms
    for name, ms in (("clip", clip), ("AdamW", update), ("averages", ema_ms)):
        row("speed", name, ms, "ms")
    totals = {}
    for B, micros in bench.batches:
        batch = bench.batch(B)
        step = functools.partial(lambda batch: bench.loss(model, batch).backward(), batch)
        begin = time.perf_counter()
        step()
        bench.synchronize()
        row("speed", f"{B} x {micros}: first pass, compiles", time.perf_counter() - begin, "s")
        forward = bench.ms(lambda: bench.loss(model, batch).detach(), repeat=3)
        both = bench.ms(step, repeat=4)
        peak = bench.peak_memory(step)
        totals[B] = micros * both + rest
        rate = B * micros / totals[B] * 1e3
        label = f"{B} x {micros}"
        row("speed", f"{label}: forward", micros * forward, "ms")
        row("speed", f"{label}: backward", micros * (both - forward), "ms")
        row("speed", f"{label}: iteration", totals[B], "ms")
        row("speed", f"{label}: samples", rate, "per second")
        row("speed", f"{label}: MFU, of 989 TFLOP/s", 100 * flops * rate / PEAK, "%")
        row("speed", f"{label}: of the product", 100 * flops * rate / product, "%")
        row("speed", f"{label}: peak memory", peak, "GB")
    return totals


def speed(bench):
    totals = parts_of_an_iteration(bench)
    gc.collect()
    if bench.is_cuda:
        torch.cuda.empty_cache()
    # train.py itself
    iters = 40 if bench.is_cuda else 4
    flags = [f"--{name}={value}" for name, value in bench.sizes.items()]
    B, micros = bench.batches[0]
    flags += [f"--data_dir={bench.data}", "--max_iters=1000", "--eval_interval=1000"]
    flags += ["--eval_size=64", "--eval_samples=0", "--log_interval=1", "--prior=False"]
    if not bench.is_cuda:  # there the default is what is measured first
        flags += [f"--batch_size={B}", f"--gradient_accumulation_steps={micros}"]
    out = bench.folder / "real"
    command = [sys.executable, ROOT / "train.py", f"--device={bench.device}", f"--out_dir={out}"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        records = []
        while process.poll() is None and (not records or records[-1]["iter"] < iters):
            time.sleep(0.2)
            if (out / "log.jsonl").exists():
                records = list(run_folder.read_log(out))
        process.kill()
    records = [record for record in records if "ms" in record]
    a, b = records[len(records) // 4], records[-1]
    first = records[0]["iter"] - 1
    spent = [record["ms"] * (record["iter"] - first) for record in (a, b)]
    ms = (spent[1] - spent[0]) / (b["iter"] - a["iter"])
    row("speed", f"{B} x {micros}: iteration of train.py", ms, "ms")
    row("speed", f"{B} x {micros}: train.py over the sum of its parts", ms / totals[B])
    row("speed", "MFU that train.py reports, of its own product", 100 * records[-1]["mfu"], "%")


def diffusers(bench):
    try:
        from bench import model as race
    except ImportError as e:
        row("diffusers", "not installed", str(e)[:40])
        return
    n_layer = min(6, bench.sizes["n_layer"])
    names = ("dim", "n_head")
    reference, ours = race.build(n_layer=n_layer, **{name: bench.sizes[name] for name in names})
    reference, ours = reference.to(bench.device), ours.to(bench.device)
    B = bench.batches[0][0]
    target, cond = bench.batch(B)
    x, t = torch.randn_like(target), torch.rand(B, device=bench.device)
    fast = bench.compile(copy.deepcopy(ours))
    fast_reference = copy.deepcopy(reference)
    for block in fast_reference.net.layers:
        block.compile(dynamic=False, backend=bench.backend)
    models = {"diffusers": reference, "diffusers, compiled": fast_reference}
    models |= {"ours": ours, "ours, compiled": fast}
    cfg = FlowConfig()

    def velocity_of(model):
        if isinstance(model, NextDiT):
            return flow.guided_velocity(model, cond, cfg)
        return lambda x, s: model(x, torch.full((B,), s, device=bench.device), cond)

    def step_of(model):
        step = race.training_step(model, list(model.parameters()), (x, t, cond, target))

        def run():
            with bench.autocast():
                step()

        return run

    def evaluation_of(model):
        velocity = velocity_of(model)

        def run():
            with bench.autocast(), torch.no_grad():
                return velocity(x, 0.4)

        return run

    with bench.autocast(), torch.no_grad():
        evaluations = {name: evaluation_of(model) for name, model in models.items()}
    expected = evaluations["diffusers"]()
    error = distance(evaluations["ours"](), expected)
    row("diffusers", "velocity, ours beside theirs", error, right=error < 2e-2)
    torch._dynamo.reset()  # else what is compiled for four models and two tasks would be too much
    for kind, runs in (
        ("velocity", evaluations),
        ("training step", {name: step_of(model) for name, model in models.items()}),
    ):
        times = dict(zip(runs, bench.ms(*runs.values(), repeat=3, rounds=3)))
        for name, ms in times.items():
            row("diffusers", f"{kind}, {n_layer} layers, batch {B}: {name}", ms, "ms")
        for suffix in ("", ", compiled"):
            ratio = times[f"diffusers{suffix}"] / times[f"ours{suffix}"]
            row("diffusers", f"{kind}{suffix}: theirs over ours", ratio)


def memory(bench):
    B = 32 if bench.is_cuda else 4
    lean = dict(optimizer="adafactor", in_backward=True, checkpointing=True, averages=False)
    cases = {
        "AdamW, averages": {},
        "AdamW": dict(averages=False),
        "AdamW, checkpointing": dict(averages=False, checkpointing=True),
        "lean": lean,
    }

    def train(optimizer="adamw", in_backward=False, checkpointing=False, averages=True):
        model = bench.model(gradient_checkpointing=checkpointing)
        opt = make_optimizer(model, optimizer, 1e-4, 0.05, (0.9, 0.95))
        ema = copy.deepcopy(model) if averages else None
        if in_backward:
            step_in_backward(opt)
        for _ in range(2):
            bench.loss(model, bench.batch(B)).backward()
            if not in_backward:
                opt.step()
                opt.zero_grad()
        del ema

    for dtype in ("float32", "bfloat16"):
        peak = bench.peak_memory(lambda: generate(bench, sampler(bench, dtype), 8, steps=2))
        row("memory", f"sampling, batch 8: {dtype}", peak, "GB")
    for name, settings in cases.items():
        peak = bench.peak_memory(lambda: train(**settings))
        row("memory", f"training, batch {B}: {name}", peak, "GB")


def sampler(bench, dtype, compiled=False):
    """What sample.load() returns, for random weights."""
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig((8, 8), **bench.sizes | SHAPES)).eval().requires_grad_(False)
    state = {}
    for name, p in model.state_dict().items():
        state[name] = torch.zeros(p.shape, device=bench.device, dtype=kind if p.dim() > 1 else None)
        torch.nn.init.normal_(state[name], std=0.02)
    model.load_state_dict(state, assign=True)
    if compiled:
        for block in model.layers:
            block.compile(backend=bench.backend)
    widths = SHAPES["cond_dim"], SHAPES["target_dim"]
    normalizers = [Normalizer("none", torch.zeros(n), torch.ones(n), bench.device) for n in widths]
    return SimpleNamespace(
        model=model, shape=(64, widths[1]), flow=FlowConfig(), cond=normalizers[0],
        target=normalizers[1], cond_tokens=64, device=bench.device, dtype=dtype, batch_size=32,
    )  # fmt: skip


def generate(bench, loaded, B, steps=10, batches=1):
    cond = torch.randn(batches * B, 64, SHAPES["cond_dim"])
    return sample.generate(loaded, cond, batch_size=B, steps=steps)


def sampling(bench):
    dtype = str(bench.dtype)[6:]
    for compiled in (False, True):
        loaded = sampler(bench, dtype, compiled)
        kind = "compiled" if compiled else "eager"
        for B in bench.sampling_batches:
            generate(bench, loaded, B, steps=2)
            for batches in (1, 4) if B == bench.sampling_batches[-2] else (1,):
                ms = bench.ms(lambda: generate(bench, loaded, B, batches=batches), repeat=1)
                name = f"{batches} of {B}, {kind}, ten steps, {dtype}"
                row("sampling", name, batches * B / ms * 1e3, "samples/s")
    n = 512
    begin = time.perf_counter()
    flow.sample_noise(range(n), (64, 768), seed=0)
    row("sampling", f"noise of {n} samples", 1000 * (time.perf_counter() - begin), "ms")


def checkpoints(bench):
    model = bench.model(compiled=False, n_layer=min(6, bench.sizes["n_layer"]))
    opt = make_optimizer(model, "adamw", 1e-4, 0.05, (0.9, 0.95))
    bench.loss(model, bench.batch(2)).backward()
    opt.step()
    path = bench.folder / "ckpt_last.pt"
    saver = checkpoint.Saver(math.inf, bench.device)
    config = {"model_args": {}, "iter": 1}
    state = config | {"model": model.state_dict(), "optimizer": opt.state_dict()}
    for kind in ("the first", "the next"):
        saver.wait()
        bench.synchronize()
        begin = time.perf_counter()
        saver.start([path], state)
        row("checkpoint", f"training stops for {kind}", time.perf_counter() - begin, "s")
    expected = model.final_ada.weight.detach().clone()
    with torch.no_grad():  # the checkpoint must not see what comes later
        model.final_ada.weight.zero_()
    saver.wait()
    row("checkpoint", "until it is on the disk", time.perf_counter() - begin, "s")
    row("checkpoint", "its size", path.stat().st_size / 1e9, "GB")
    begin = time.perf_counter()
    state = checkpoint.read_checkpoint(path)
    model.load_state_dict(state["model"])
    checkpoint.restore_optimizer(state, opt)
    bench.synchronize()
    row("checkpoint", "reading it takes", time.perf_counter() - begin, "s")
    equal = torch.equal(model.final_ada.weight, expected)
    row("checkpoint", "holds the weights of its iteration", "yes" if equal else "no", right=equal)
    path.unlink()


SECTIONS = {  # name: function, seconds on an H100 or H200
    "ceilings": (ceilings, 10),
    "parity": (parity, 90),
    "curves": (curves, 90),
    "resume": (resumed, 90),
    "torchrun": (torchrun, 90),
    "speed": (speed, 90),
    "diffusers": (diffusers, 70),
    "memory": (memory, 15),
    "sampling": (sampling, 40),
    "checkpoint": (checkpoints, 30),
}
UNTIMED = ("parity", "curves", "resume", "torchrun")  # these run at the same time


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAME,...")
    parser.add_argument("--deadline", type=float, default=465, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, Path(folder))

        def run(name):
            section, seconds = SECTIONS[name]
            if bench.is_cuda and time.monotonic() - start + seconds > args.deadline:
                return row(name, "skipped: it would not end before the deadline", "")
            try:
                section(bench)
            except Exception as e:  # the other sections may still be right
                row(name, f"failed: {type(e).__name__}", "", right=False)
                print(e)
            gc.collect()
            torch._dynamo.reset()
            if bench.is_cuda:
                torch.cuda.empty_cache()

        untimed = [functools.partial(run, name) for name in UNTIMED if name in names]
        if bench.is_cuda and untimed:
            together(*untimed)
            names = [name for name in names if name not in UNTIMED]
        for name in names:
            run(name)
    (args.out / "gpu.json").write_text(json.dumps(rows, indent=1))
    sys.exit(not all(r["right"] for r in rows))


if __name__ == "__main__":
    main()
