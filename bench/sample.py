"""
What a sample costs, and how good it is: solvers beside each other, and the default beside diffusers at 50 Euler steps.

    python train.py config/train_digits.py
    python bench/sample.py out-digits [out-real ...]        # folders of runs, whose datasets are still there

First a table, by solver and number of evaluations of the model (NFE), of samples for the whole validation split, one
of each condition, from the same noise: error, the root mean square distance to where ab3 with 1,000 steps ends,
relative to the size of that; metrics of score.py; seconds. Then, if diffusers has such a model (config/train_blip3o.py
before the config of the sizes), in one process and in turn, the whole way from raw conditions to raw embeddings:
sample.generate as it is, and the same weights in diffusers' LuminaNextDiT2DModel driven
by FlowMatchEulerDiscreteScheduler with 50 steps as BLIP3-o drives it, from noise that it need not draw, with torch's
default float32_matmul_precision and with the one that sample.py sets.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
import sample
import score
from loader import open_dataset


def steps_of(method, evaluations):
    """How many steps take so many evaluations; None if none do."""
    calls = [0]

    def count(x, t):
        calls[0] += 1
        return x

    for steps in range(1, evaluations + 1):
        calls[0] = 0
        flow.integrate(count, torch.zeros(1), steps, method)
        if calls[0] == evaluations:
            return steps
    return None


def reference(loaded):
    """run(cond, noise, batch_size): the same weights in diffusers, 50 steps of its scheduler; raw to raw."""
    config, (H, W) = loaded.model.config, loaded.model.config.grid
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.to_diffusers(folder)
        model = LuminaNextDiT2DModel.from_pretrained(folder).eval()
    rope = get_2d_rotary_pos_embed_lumina(config.dim // config.n_head, H, W)

    @torch.no_grad()
    def run(cond, noise, batch_size):
        made = []
        for i in range(0, len(cond), batch_size):
            c = loaded.cond.encode(torch.as_tensor(cond[i : i + batch_size]))
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(50, sigmas=np.linspace(1, 1 / 50, 50))
            x, mask = (
                noise[i : i + batch_size].transpose(1, 2).unflatten(2, (H, W)),
                torch.ones(c.shape[:2]),
            )
            for timestep in scheduler.timesteps:
                v = model(
                    x, timestep.expand(len(x)), c, mask, rope, cross_attention_kwargs={}
                ).sample
                x = scheduler.step(v, timestep, x).prev_sample
            made.append(loaded.target.decode(x.flatten(2).transpose(1, 2)))
        return torch.cat(made)

    return run


def bench(folder, evaluations, rounds, batch_size, shift):
    loaded = sample.load(folder)
    data = open_dataset(loaded.data_dir)
    cond, (T, D) = np.array(data["val_cond"]), data["val_target"].shape[1:]
    encode = score.standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    truth = encode(data["val_target"])

    def ours(**settings):
        parts = range(0, len(cond), batch_size)
        return torch.cat(
            [sample.generate(loaded, cond[i : i + batch_size], first=i, **settings) for i in parts]
        )

    torch.set_float32_matmul_precision(PRECISION)
    print(f"\n{folder}: {len(cond)} conditions, batches of {batch_size}, shift {shift:g}\n")
    exact = encode(ours(steps=1000, method="ab3", shift=shift))

    def row(name, n, samples, seconds=""):
        error, metrics = (
            ((samples - exact).norm() / exact.norm()).item(),
            score.metrics(samples, truth),
        )
        figures = " | ".join(
            f"{metrics[m]:.4f}" for m in ("frechet", "token_cosine", "retrieval_r1")
        )
        print(f"| {name} | {n} | {error:.4f} | {figures} | {seconds} |", flush=True)
        return metrics["frechet"]

    print(
        "| solver, steps | NFE | error | Frechet | token cosine | R@1 | seconds |\n|---|---|---|---|---|---|---|"
    )
    row("ab3, 1000", 1001, exact)
    frechet = {}
    for n in evaluations:
        for method in flow.METHODS:
            if steps := steps_of(method, n):
                start = time.perf_counter()
                samples = ours(steps=steps, method=method, shift=shift)
                seconds = f"{time.perf_counter() - start:.2f}"
                frechet[method, steps] = row(f"{method}, {steps}", n, encode(samples), seconds)

    if loaded.model.config.conditioning != "cross" or loaded.model.config.prior:
        return
    theirs, noise = reference(loaded), flow.sample_noise(range(len(cond)), (T, D), seed=0)
    runs = {
        "diffusers, 50 Euler steps": ("highest", lambda: theirs(cond, noise, batch_size)),
        f"diffusers, {PRECISION}": (PRECISION, lambda: theirs(cond, noise, batch_size)),
        "ours, the default": (PRECISION, ours),
    }
    times, results = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name, (precision, run) in runs.items():
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - start)
    torch.set_float32_matmul_precision(PRECISION)
    euler = ours(
        steps=50, method="euler"
    )  # they are the same samples, or the race would be no race
    assert (results["diffusers, 50 Euler steps"] - euler).norm() < 1e-3 * euler.norm()
    quality = []
    for seed in range(1, 6):
        pair = (ours(seed=seed), ours(seed=seed, steps=50, method="euler"))
        default, many = (score.metrics(encode(x), truth)["frechet"] for x in pair)
        quality.append(default / many)
    print()
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["ours, the default"]))
        distance = score.metrics(encode(results[name]), truth)["frechet"]
        print(f"{name:26} {statistics.median(seconds):7.2f} s, {statistics.median(ratios):5.2f} times ours "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}), Frechet {distance:.4f}", flush=True)  # fmt: skip
    print(f"Frechet distance of the default over that of 50 Euler steps, with other seeds: "
          f"{', '.join(f'{ratio:.3f}' for ratio in quality)}")  # fmt: skip


PRECISION = "medium"  # float32_matmul_precision of sample.py


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of runs on the linear path, predicting v")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[4, 6, 8, 10, 16, 24, 50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shift", type=float, default=1.0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for folder in args.runs:
        bench(folder, args.evaluations, args.rounds, args.batch_size, args.shift)


if __name__ == "__main__":
    main()
