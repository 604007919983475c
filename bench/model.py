"""
model.py beside BLIP3-o's model, made of diffusers' parts: training steps and velocity evaluations,
and the share of the machine's arithmetic that they use.

    python bench/model.py                      # both sizes and precisions, ten minutes on two cores
    python bench/model.py --sizes=256 --rounds=15

Both models hold the same weights and get the same inputs, (B, 64, 768) and conditions
(B, 64, 1280), in one process and in turn. Ratios are reference over ours: the median over the
rounds, and the range.

A training step is forward, backward and fused AdamW. A velocity evaluation is one call of what the
solver calls. Ours has computed the condition's part before; "context, once" is the time of that,
per trajectory.

"of the product" is a training step's operations per second over those of a product of two
4096 x 4096 matrices in the same round. Only matrix products are counted: those that forward and
backward pass need, attention included, without recomputation. "precision" is torch's
float32_matmul_precision, for both models and the product; train.py uses medium on a CPU.

glibc is told to keep freed memory, for all: else the kernel hands out fresh pages in every step.
"""

import argparse
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
from bench.speedrun import Reference
from model import NextDiT, NextDiTConfig
from plumbing import checkpoint, exchange

T, D, C = 64, 768, 1280
SIZES = {
    "256": dict(dim=256, n_layer=6, n_head=4, batch=32),
    "768": dict(dim=768, n_layer=12, n_head=12, batch=8),
}
PRECISIONS = ["highest", "medium"]
PRODUCT = 2 * 4096**3  # operations of the product that the models are compared with
KEEP = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=34359738368"


def build(dim, n_layer, n_head):
    """The reference, with open gates as after some training, and ours with the same weights."""
    torch.manual_seed(0)
    sizes = dict(dim=dim, n_layer=n_layer, n_head=n_head)
    config = NextDiTConfig((8, 8), target_dim=D, cond_dim=C, cond_projection=True, **sizes)
    reference = Reference(config)
    for block in reference.net.layers:
        torch.nn.init.normal_(block.gate, std=0.5)
    ours = NextDiT(config)
    with tempfile.TemporaryDirectory() as folder:
        reference.net.save_pretrained(folder)
        _, parameters = exchange.open_model(folder)
        checkpoint.load_weights(ours, parameters, torch.clone)
    ours.null_cond.requires_grad_(False)  # the reference has none
    return reference, ours


def training_step(model, parameters, batch):
    """A function that takes a step. With a learning rate of 0 the weights stay equal."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    x, t, cond, target = batch

    def run():
        F.mse_loss(model(x, t, cond), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def count_flops(model, batch):
    """Operations of a training step's matrix products."""
    x, t, cond, target = batch
    # of the kinds of attention only this one is counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.mse_loss(model(x, t, cond), target).backward()
    for p in model.parameters():
        p.grad = None
    return counter.get_total_flops()


def race(title, runs, rounds, flops=None):
    """Time the runs in turn and print them beside the first; with `flops`, {name: operations},
    also beside the run "product"."""
    for run in runs.values():
        for _ in range(3):
            run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    print(title)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = sorted(a / b for a, b in zip(first, seconds))
        line = f"  {name:20} {1000 * median:8.1f} ms"
        line += f"   {statistics.median(ratios):5.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if flops is not None:
            line += f"   {flops[name] / median / 1e12:6.3f} TFLOP/s"
            work = flops[name] / PRODUCT
            shares = [work * p / s for p, s in zip(times["product"], seconds)]
            line += f"   {100 * statistics.median(shares):5.1f}% of the product"
        print(line, flush=True)


def bench_training(reference, ours, compiled, batch, rounds, flops, product):
    a, b = product
    runs = {
        "reference": training_step(reference, reference.parameters(), batch),
        "ours": training_step(ours, ours.parameters(), batch),
        "ours, compiled": training_step(compiled, ours.parameters(), batch),
        "product": lambda: a @ b,
    }
    race("training step", runs, rounds, flops)


@torch.no_grad()
def bench_velocity(reference, ours, compiled, batch, rounds, guidance):
    x, _, cond, _ = batch
    config = flow.FlowConfig(cond_dropout=0.1)
    prepare = functools.partial(flow.guided_velocity, ours, cond, config, guidance)
    mine = prepare()
    fast = flow.guided_velocity(compiled, cond, config, guidance)

    def theirs(x, t):
        times = torch.full((len(x),), t)
        v = reference(x, times, cond)
        if guidance == 1:
            return v
        null = reference(x, times, 0 * cond)  # BLIP3-o's null condition is zero
        return null + guidance * (v - null)

    assert torch.allclose(mine(x, 0.4), theirs(x, 0.4), atol=1e-3)
    runs = {
        "reference": lambda: theirs(x, 0.4),
        "ours": lambda: mine(x, 0.4),
        "ours, compiled": lambda: fast(x, 0.4),
        "context, once": prepare,
    }
    race(f"velocity evaluation, guidance {guidance:g}", runs, rounds)


def bench_size(size, precision, rounds, product):
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(precision)
    sizes = SIZES[size].copy()
    B = sizes.pop("batch")
    reference, ours = build(**sizes)
    compiled = torch.compile(ours, fullgraph=True)
    x, t, cond = torch.randn(B, T, D), torch.rand(B), torch.randn(B, T, C)
    batch = x, t, cond, torch.randn(B, T, D)
    with torch.no_grad():
        expected = reference(x, t, cond)
        error = ((ours(x, t, cond) - expected).norm() / expected.norm()).item()
    assert error < 1e-5, f"the models differ by {error}"
    flops = {"reference": count_flops(reference, batch), "ours": count_flops(ours, batch)}
    flops |= {"ours, compiled": flops["ours"], "product": PRODUCT}
    millions = sum(p.numel() for p in reference.parameters()) / 1e6
    print(
        f"\ndim {sizes['dim']}, {sizes['n_layer']} layers, batch {B}, float32, "
        f"precision {precision}: {millions:.1f} M parameters, "
        f"{flops['reference'] / 1e9:.1f} GFLOP per step for the reference, "
        f"{flops['ours'] / 1e9:.1f} for ours"
    )
    bench_training(reference, ours, compiled, batch, rounds, flops, product)
    for guidance in (1.0, 3.0):
        bench_velocity(reference, ours, compiled, batch, rounds, guidance)


def main():
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        env = {**os.environ, "GLIBC_TUNABLES": KEEP}
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    product = torch.randn(2, 4096, 4096)
    for size in args.sizes:
        for precision in args.precision:
            bench_size(size, precision, args.rounds, product)


if __name__ == "__main__":
    main()
