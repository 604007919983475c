"""
model.py beside diffusers' LuminaNextDiT2DModel: training steps and velocity evaluations, and the
share of the machine's arithmetic that they use.

    python bench/model.py                      # both sizes and precisions, ten minutes on two cores
    python bench/model.py --sizes=256 --rounds=15

Both models hold the same weights and get the same inputs, (B, 64, 768) and conditions
(B, 64, 1280), in one process and in turn. Ratios are medians over the rounds of (reference / ours),
with the lowest and highest behind them. A training step is forward, backward and fused AdamW. A
velocity evaluation is one call of what the solver calls; ours has computed the condition's part
before (its time, once per trajectory, is printed). "of the product" is the step's floating-point
operations per second over those of one 4096 x 4096 x 4096 product in the same round. Only matrix
products are counted: those that forward and backward pass need, attention included, without
recomputation. precision: torch's float32_matmul_precision, for both models and the product;
train.py uses medium on a CPU. glibc is told to keep freed memory, for all: else the kernel hands
out fresh pages in every step.
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
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
from model import NextDiT, NextDiTConfig
from plumbing import exchange

T, D, C = 64, 768, 1280
SIZES = {
    "256": dict(dim=256, n_layer=6, n_head=4, batch=32),
    "768": dict(dim=768, n_layer=12, n_head=12, batch=8),
}


def build(dim, n_layer, n_head):
    """The reference with weights of some training, gates open, and ours with the same."""
    torch.manual_seed(0)
    reference = LuminaNextDiT2DModel(
        sample_size=8, patch_size=1, in_channels=D, hidden_size=dim, num_layers=n_layer,
        num_attention_heads=n_head, num_kv_heads=n_head, multiple_of=256, norm_eps=1e-5,
        learn_sigma=False, qk_norm=True, cross_attention_dim=C,
    )  # fmt: skip
    torch.nn.init.zeros_(reference.pad_token)
    for block in reference.layers:
        torch.nn.init.normal_(block.gate, std=0.5)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        sizes, state = exchange.from_diffusers(folder)
        ours = NextDiT(NextDiTConfig(**sizes))
        ours.load_state_dict(state)
    rope = get_2d_rotary_pos_embed_lumina(dim // n_head, 8, 8)
    mask = torch.ones(1, T)

    def wrapped(x, t, cond):  # (B, T, D) at our time; the velocity runs the other way
        image = x.transpose(1, 2).unflatten(2, (8, 8))
        out = reference(
            image, 1000 * (1 - t), cond, mask.expand(len(x), T), rope, cross_attention_kwargs={}
        ).sample
        return -out.flatten(2).transpose(1, 2)

    wrapped.parameters = reference.parameters
    return wrapped, ours


def step(model, parameters, batch):
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, fused=True
    )  # all the work, and the weights stay equal
    x, t, cond, target = batch

    def run():
        F.mse_loss(model(x, t, cond), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def tera(model, batch):
    """10^12 operations of a training step's matrix products."""
    x, t, cond, target = batch
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # others are not counted
        F.mse_loss(model(x, t, cond), target).backward()
    for p in model.parameters():
        p.grad = None
    return counter.get_total_flops() / 1e12


def race(title, runs, rounds, flops=0.0):
    """Time the runs in turn and print them beside the first."""
    for run in runs.values():
        for _ in range(3):
            run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    first = next(iter(runs))
    print(title)
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(times[first], seconds))
        line = f"  {name:20} {1000 * statistics.median(seconds):8.1f} ms"
        line += f"   {statistics.median(ratios):5.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if "product" in runs:
            work = 2 * 4096**3 / 1e12 if name == "product" else flops[name]
            line += f"   {work / statistics.median(seconds):6.3f} TFLOP/s"
            shares = sorted(
                work / s / (2 * 4096**3 / 1e12 / p) for s, p in zip(seconds, times["product"])
            )
            line += f"   {100 * statistics.median(shares):5.1f}% of the product"
        print(line, flush=True)


def bench_size(size, precision, rounds, product):
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(precision)
    sizes = SIZES[size].copy()
    B = sizes.pop("batch")
    reference, ours = build(**sizes)
    ours.null_cond.requires_grad_(False)  # the reference has none
    compiled = torch.compile(ours, fullgraph=True)
    batch = torch.randn(B, T, D), torch.rand(B), torch.randn(B, T, C), torch.randn(B, T, D)
    x, t, cond, _ = batch
    with torch.no_grad():
        expected = reference(x, t, cond)
        error = ((ours(x, t, cond) - expected).norm() / expected.norm()).item()
    assert error < 1e-5, f"the models differ by {error}"
    flops = {"reference": tera(reference, batch), "ours": tera(ours, batch)}
    millions = sum(p.numel() for p in reference.parameters()) / 1e6
    giga = {name: f"{1000 * value:.1f}" for name, value in flops.items()}
    print(
        f"\ndim {sizes['dim']}, {sizes['n_layer']} layers, batch {B}, float32, "
        f"precision {precision}: {millions:.1f} M parameters, {giga['reference']} GFLOP per step "
        f"for the reference, {giga['ours']} for ours"
    )
    steps = {
        "reference": step(reference, reference.parameters(), batch),
        "ours": step(ours, list(ours.parameters()), batch),
        "ours, compiled": step(compiled, list(ours.parameters()), batch),
        "product": lambda: product[0] @ product[1],
    }
    race("training step", steps, rounds, flops | {"ours, compiled": flops["ours"]})

    config = flow.FlowConfig(cond_dropout=0.1)
    with torch.no_grad():
        for guidance in (1.0, 3.0):
            mine, fast = (
                flow.guided_velocity(net, cond, config, guidance) for net in (ours, compiled)
            )

            def theirs(x, t):  # the null condition of BLIP3-o is zero
                times = torch.full((len(x),), t)
                v = reference(x, times, cond)
                if guidance == 1:
                    return v
                null = reference(x, times, 0 * cond)
                return null + guidance * (v - null)

            assert torch.allclose(mine(x, 0.4), theirs(x, 0.4), atol=1e-3)
            runs = {"reference": theirs, "ours": mine, "ours, compiled": fast}
            runs = {name: functools.partial(velocity, x, 0.4) for name, velocity in runs.items()}
            runs["context, once"] = lambda: flow.guided_velocity(ours, cond, config, guidance)
            race(f"velocity evaluation, guidance {guidance:g}", runs, rounds)


KEEP = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=34359738368"


def main():
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": KEEP}
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--precision", nargs="+", choices=["highest", "medium"], default=["highest", "medium"]
    )
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
