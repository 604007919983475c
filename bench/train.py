"""
Where the time of train.py goes, and how two processes scale over one.

    python bench/train.py FOLDER                  # a free folder; about ten minutes
    python bench/train.py FOLDER --cases real --rounds 5

For the sizes of config/train_digits.py and config/train_real.py, with the model of config/train_blip3o.py, on random
embeddings of those shapes, with the same global batch throughout: the loop of train.py itself runs, its parts timed
from outside. On a CPU every call returns when its work is done, so the shares are of the wall clock:

    data        waiting for a batch that a thread reads ahead, and normalizing it
    forward     the model and its loss
    backward    of one that does not synchronize
    all-reduce  what the backward pass that synchronizes takes longer (the rest is hidden), and agreeing on the loss
    optimizer   the norm of the gradients, the step, the averaged weights
    other       the rest: logging above all

The lines of 1 process x 1 thread and 2 x 1 are run in turn, `rounds` times; scaling is the ratio of their samples/s in
a round, and of it the median.
"""

import argparse
import json
import os
import pickle
import runpy
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PARTS = ("data", "forward", "backward", "all-reduce", "optimizer", "other")
CASES = {  # name: config, samples, (tokens, condition's channels), (tokens, target's channels)
    "digits": ("config/train_digits.py", 1617, (64, 48), (64, 32)),
    "real": ("config/train_real.py", 800, (64, 1280), (64, 768)),
}
WARMUP, ACCUMULATION = (
    3,
    4,
)  # two micro-batches for each of two processes, so that one does not synchronize


def make_dataset(folder, samples, cond, target):
    rng = np.random.default_rng(0)
    names = ("eva_blip3o_embeddings", cond), ("clip_blip3o_embeddings", target)
    content = {
        name: rng.standard_normal((samples, *shape), np.float32).astype(np.float16)
        for name, shape in names
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "random.pkl").write_bytes(pickle.dumps(content))
    prepare = [
        sys.executable,
        ROOT / "prepare.py",
        folder / "random.pkl",
        f"--out={folder / 'data'}",
    ]
    subprocess.run([*prepare, "--overwrite=True"], check=True, capture_output=True)
    return folder / "data"


def profiled(args):
    """Run train.py in this process with `args` and print the seconds of its parts, as JSON, from process 0."""
    sys.path.insert(0, str(ROOT))
    import torch

    import flow
    from plumbing import dataset, distributed, optim

    micro_steps = ACCUMULATION // int(os.environ.get("WORLD_SIZE", 1))
    spent, backwards, batches, clock, inside = Counter(), [], 0, {}, []

    def timed(part, call, keep=None, when=lambda kwargs: True):
        def run(*args, **kwargs):
            start = time.perf_counter()
            inside.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()
                seconds = time.perf_counter() - start
                if when(kwargs) and part not in inside:  # Muon's step is partly AdamW's
                    spent[part] += seconds
                if keep is not None:
                    keep.append(seconds)
                clock["end"] = time.perf_counter() if part == "optimizer" else clock.get("end")

        return run

    stream = dataset.Loader.stream

    def timed_stream(self, *args):
        nonlocal batches
        it = stream(self, *args)
        wait = timed("data", it.__next__)
        while True:
            batches += 1
            if batches == WARMUP * micro_steps + 1:
                spent.clear()
                backwards.clear()
                clock["start"] = time.perf_counter()
            yield wait()

    dataset.Loader.stream = timed_stream
    flow.loss = timed(
        "forward", flow.loss, when=lambda kwargs: "generator" in kwargs
    )  # not that of evaluations
    torch.Tensor.backward = timed("backward", torch.Tensor.backward, backwards)
    distributed.total = timed("all-reduce", distributed.total)
    distributed.leave = lambda code: None
    torch.nn.utils.clip_grad_norm_ = timed("optimizer", torch.nn.utils.clip_grad_norm_)
    for kind in (torch.optim.AdamW, optim.Muon, optim.Adafactor):
        kind.step = timed("optimizer", kind.step)
    torch._foreach_lerp_ = timed("optimizer", torch._foreach_lerp_)
    sys.argv = ["train.py", *args]
    run = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    whole = clock["end"] - clock["start"]
    if run["world_size"] > 1:
        plain = [s for i, s in enumerate(backwards) if (i + 1) % micro_steps]
        extra = max(0.0, sum(backwards) - statistics.mean(plain) * len(backwards))
        spent["backward"] -= extra
        spent["all-reduce"] += extra
    spent["other"] = whole - sum(spent[part] for part in PARTS if part != "other")
    if run["master"]:
        iters = len(backwards) // micro_steps
        print(
            "\nRESULT "
            + json.dumps(
                {"rate": iters * run["samples_per_iter"] / whole, "parts": spent, "whole": whole}
            )
        )


def measure(processes, threads, flags):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    command = [sys.executable, *launch, __file__, "--profile", *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    if done.returncode or "RESULT" not in done.stdout:
        sys.exit(done.stdout + done.stderr)
    return json.loads(
        next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    )


def main():
    if sys.argv[1:2] == ["--profile"]:
        return profiled(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iters", type=int, default=30)
    parser.add_argument(
        "--flags", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of train.py"
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.iters < 1:
        parser.error("--rounds and --iters are at least 1")
    for name in args.cases:
        config, *shapes = CASES[name]
        folder = args.folder / name
        flags = [ROOT / "config/train_blip3o.py", ROOT / config]
        flags += [f"--data_dir={make_dataset(folder, *shapes)}", f"--out_dir={folder / 'out'}"]
        flags += [
            f"--gradient_accumulation_steps={ACCUMULATION}",
            f"--max_iters={WARMUP + args.iters}",
        ]
        flags += [
            "--batch_size=8",
            "--eval_interval=100000",
            "--save_interval=100000",
            "--eval_size=8",
        ]
        flags += ["--eval_samples=0", *(f"--{flag}" for flag in args.flags)]
        print(f"\n{name}: {config}, 4 micro-batches of 8 an iteration", flush=True)
        print(
            f"{'processes x threads':24}"
            + "".join(f"{part:>12}" for part in PARTS)
            + f"{'samples/s':>12}",
            flush=True,
        )
        runs = {"1 x 1": [], "2 x 1": [], "1 x 2": []}
        for _ in range(args.rounds):
            for setting, results in runs.items():
                results.append(measure(int(setting[0]), int(setting[-1]), flags))
        for setting, results in runs.items():
            shares = (
                statistics.median(r["parts"].get(part, 0) / r["whole"] for r in results)
                for part in PARTS
            )
            rate = statistics.median(r["rate"] for r in results)
            print(
                f"{setting:24}"
                + "".join(f"{100 * share:11.1f}%" for share in shares)
                + f"{rate:12.1f}",
                flush=True,
            )
        for setting in ("2 x 1", "1 x 2"):
            ratios = sorted(b["rate"] / a["rate"] for a, b in zip(runs["1 x 1"], runs[setting]))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"{setting} over 1 x 1: {statistics.median(ratios):.2f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
