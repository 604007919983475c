"""
What a sample costs, and how good it is: solvers beside each other, and the default beside BLIP3-o's
model, made of diffusers' parts, with 50 Euler steps.

    python train.py config/train_digits.py
    python bench/sample.py out-digits [out-real ...]     # folders of runs, with their datasets

First a table, by solver and number of evaluations of the model (NFE), of samples for the whole
validation split, one per condition, from the same noise. Error: root mean square distance to where
ab2 with 1,000 steps ends, relative to the size of that; metrics of score.py; seconds.

Then, for models that BLIP3-o has (config/train_blip3o.py before the config of the sizes), in one
process and in turn, the whole way from raw conditions to raw embeddings: sample.generate as it is,
and the same weights in diffusers' parts, driven by FlowMatchEulerDiscreteScheduler with 50 steps as
BLIP3-o drives them, from noise that they need not draw, with torch's default
float32_matmul_precision and with the one that sample.py sets.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
import sample
from bench.speedrun import Reference
from plumbing import exchange
from plumbing.dataset import open_dataset
from report import score

EVALUATIONS = {"euler": 1, "heun": 2, "ab2": 1}  # of the model, per step
PRECISION = "medium"  # float32_matmul_precision of sample.py


def reference(loaded):
    """run(cond, noise, batch_size), raw to raw: the same weights in BLIP3-o's model of diffusers'
    parts, 50 Euler steps."""
    config = loaded.model.config
    model = Reference(config)
    state = exchange.reference_state(asdict(config), loaded.model.state_dict())
    state.pop("pad_token")
    model.net.load_state_dict(state)

    @torch.no_grad()
    def run(cond, noise, batch_size):
        made = []
        for i in range(0, len(cond), batch_size):
            c = loaded.cond.encode(torch.as_tensor(cond[i : i + batch_size]))
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(50, sigmas=np.linspace(1, 1 / 50, 50))
            x = noise[i : i + batch_size]
            for timestep in scheduler.timesteps:
                v = model.velocity(x, timestep.expand(len(x)), c)
                x = scheduler.step(v, timestep, x).prev_sample
            made.append(loaded.target.decode(x))
        return torch.cat(made)

    return run


def bench(folder, evaluations, rounds, batch_size, shift):
    loaded = sample.load(folder)
    data = open_dataset(loaded.data_dir)
    cond, (T, D) = np.array(data["val_cond"]), data["val_target"].shape[1:]
    encode = score.standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    truth = encode(data["val_target"])
    grid = data["meta"]["grid"]

    def ours(**settings):
        parts = range(0, len(cond), batch_size)
        return torch.cat(
            [sample.generate(loaded, cond[i : i + batch_size], first=i, **settings) for i in parts]
        )

    torch.set_float32_matmul_precision(PRECISION)
    print(f"\n{folder}: {len(cond)} conditions, batches of {batch_size}, shift {shift:g}\n")
    exact = encode(ours(steps=1000, method="ab2", shift=shift))

    def row(name, n, samples, seconds=""):
        error = ((samples - exact).norm() / exact.norm()).item()
        metrics = score.metrics(samples, truth, grid)
        figures = f"{metrics['frechet']:.4f} | {metrics['token_cosine']:.4f}"
        print(f"| {name} | {n} | {error:.4f} | {figures} | {seconds} |", flush=True)

    print("| solver, steps | NFE | error | Frechet | token cosine | seconds |")
    print("|---|---|---|---|---|---|")
    row("ab2, 1000", 1000, exact)
    for n in evaluations:
        for method, per_step in EVALUATIONS.items():
            if n % per_step == 0:
                steps = n // per_step
                start = time.perf_counter()
                samples = ours(steps=steps, method=method, shift=shift)
                seconds = f"{time.perf_counter() - start:.2f}"
                row(f"{method}, {steps}", n, encode(samples), seconds)

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
        default, many = (score.metrics(encode(x), truth, grid)["frechet"] for x in pair)
        quality.append(default / many)
    print()
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["ours, the default"]))
        distance = score.metrics(encode(results[name]), truth, grid)["frechet"]
        ours_faster = f"{statistics.median(ratios):5.2f} times ours"
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        seconds = f"{statistics.median(seconds):7.2f} s"
        print(f"{name:26} {seconds}, {ours_faster} {spread}, Frechet {distance:.4f}", flush=True)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in quality)
    print(f"Frechet distance, the default over 50 Euler steps, with other seeds: {ratios}")


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
