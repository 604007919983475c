"""
Where the time of train.py goes, and how two processes scale over one.

    python bench/train.py FOLDER                  # a free folder; about ten minutes
    python bench/train.py FOLDER --cases real --rounds 5

Runs train.py itself and times its parts from outside. The sizes are those of
config/train_digits.py and config/train_real.py, the model is that of config/train_blip3o.py, the
data are random embeddings of the same shapes. The global batch is the same throughout. On a CPU
every call returns when its work is done, so that the shares below are of the wall clock:

    data        waiting for a batch that a thread reads ahead, and normalizing it
    forward     the model and its loss
    backward    the backward passes, as long as those that do not synchronize
    all-reduce  what the backward passes that synchronize take longer (the rest is hidden), and
                agreeing on the loss
    optimizer   the norm of the gradients, the update, the averaged weights
    other       the rest: logging above all

1 process with 1 thread, 2 processes with 1 thread and 1 process with 2 threads run in turn, in
--rounds rounds. Scaling is the ratio of their samples per second in a round; printed are its median
and its range.
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
CASES = {  # name: config, samples, (tokens, channels of the condition) and of the target
    "digits": ("config/train_digits.py", 1617, (64, 48), (64, 32)),
    "real": ("config/train_real.py", 800, (64, 1280), (64, 768)),
}
RUNS = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2)}  # processes, threads
WARMUP = 3  # iterations that do not count
ACCUMULATION = 4  # two for each of two processes, so that one of them does not synchronize
FLAGS = f"--batch_size=8 --gradient_accumulation_steps={ACCUMULATION}"
FLAGS += " --eval_interval=100000 --save_interval=100000 --eval_size=8 --eval_samples=0"


def make_dataset(folder, samples, cond, target):
    rng = np.random.default_rng(0)
    content = {}
    for name, shape in (("eva_blip3o_embeddings", cond), ("clip_blip3o_embeddings", target)):
        values = rng.standard_normal((samples, *shape), np.float32)
        content[name] = values.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "random.pkl"
    source.write_bytes(pickle.dumps(content))
    data = folder / "data"
    prepare = [sys.executable, ROOT / "prepare.py", source, f"--out={data}", "--overwrite=True"]
    subprocess.run(prepare, check=True, capture_output=True)
    return data


class Profile:
    """Seconds spent in the parts of train.py, from iteration WARMUP to the last update."""

    def __init__(self, micro_steps):
        self.micro_steps = micro_steps
        self.batches = 0
        self.spent = Counter()
        self.backwards = []  # seconds of each backward pass

    def timed(self, part, function):
        """The function, with its seconds added to those of a part."""

        def run(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            end = time.perf_counter()
            self.spent[part] += end - start
            if part == "backward":
                self.backwards.append(end - start)
            if part == "optimizer":  # the evaluation after the last one does not count
                self.end = end
                self.parts = self.spent.copy()
            return result

        return run

    def timed_stream(self, stream):
        def run(*args):
            batches = stream(*args)
            wait = self.timed("data", batches.__next__)
            while True:
                if self.batches == WARMUP * self.micro_steps:
                    self.spent.clear()
                    self.backwards.clear()
                    self.start = time.perf_counter()
                self.batches += 1
                yield wait()

        return run


def profile_train(args):
    """Run train.py in this process; process 0 prints the seconds of its parts, as JSON."""
    sys.path.insert(0, str(ROOT))
    import torch

    import flow
    from plumbing import dataset, distributed, optim

    micro_steps = ACCUMULATION // int(os.environ.get("WORLD_SIZE", 1))
    profile = Profile(micro_steps)
    patches = [
        ("data", flow.Normalizer, "encode"),
        ("forward", flow, "loss"),
        ("backward", torch.Tensor, "backward"),
        ("all-reduce", distributed, "all_reduce_sum"),
        ("optimizer", torch.nn.utils, "clip_grad_norm_"),
        ("optimizer", torch.optim.AdamW, "step"),
        ("optimizer", optim.Adafactor, "step"),
        ("optimizer", torch, "_foreach_lerp_"),
    ]
    for part, owner, name in patches:
        setattr(owner, name, profile.timed(part, getattr(owner, name)))
    dataset.Loader.stream = profile.timed_stream(dataset.Loader.stream)
    distributed.exit_process = lambda: None  # the figures are still to be printed
    sys.argv = ["train.py", *args]
    run = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    seconds = profile.end - profile.start
    parts = profile.parts
    if run["WORLD_SIZE"] > 1:
        backwards = profile.backwards
        unsynchronized = [s for i, s in enumerate(backwards) if (i + 1) % micro_steps]
        expected = statistics.mean(unsynchronized) * len(backwards)
        extra = max(0.0, sum(backwards) - expected)
        parts["backward"] -= extra
        parts["all-reduce"] += extra
    parts["other"] = seconds - parts.total()
    if run["RANK"] == 0:
        iterations = len(profile.backwards) // micro_steps
        rate = iterations * run["samples_per_iter"] / seconds
        shares = {part: parts[part] / seconds for part in PARTS}
        print("\nRESULT " + json.dumps({"rate": rate, "shares": shares}))


def measure(processes, threads, flags):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [__file__, "--profile", *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    _, found, result = done.stdout.partition("RESULT ")
    if done.returncode or not found:
        sys.exit(done.stdout + done.stderr)
    return json.loads(result)


def bench(name, folder, rounds, iters, flags):
    config, *shapes = CASES[name]
    data = make_dataset(folder, *shapes)
    flags = [f"--data_dir={data}", f"--out_dir={folder / 'out'}", "--overwrite=True", *flags]
    flags = [ROOT / "config/train_blip3o.py", ROOT / config, *FLAGS.split(), *flags]
    flags.append(f"--max_iters={WARMUP + iters}")
    print(f"\n{name}: {config}, {ACCUMULATION} micro-batches of 8 per iteration")
    heading = "".join(f"{part:>12}" for part in (*PARTS, "samples/s"))
    print(f"{'processes x threads':24}{heading}", flush=True)
    results = {setting: [] for setting in RUNS}
    for _ in range(rounds):
        for setting, (processes, threads) in RUNS.items():
            results[setting].append(measure(processes, threads, flags))
    for setting, figures in results.items():
        row = ""
        for part in PARTS:
            share = statistics.median(figure["shares"][part] for figure in figures)
            row += f"{100 * share:11.1f}%"
        rate = statistics.median(figure["rate"] for figure in figures)
        print(f"{setting:24}{row}{rate:12.1f}", flush=True)
    for setting in ("2 x 1", "1 x 2"):
        pairs = zip(results["1 x 1"], results[setting])
        ratios = sorted(figure["rate"] / one["rate"] for one, figure in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{setting} over 1 x 1: {statistics.median(ratios):.2f} ({spread})", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("folder", type=Path)
    option("--cases", nargs="+", choices=CASES, default=list(CASES))
    option("--rounds", type=int, default=5)
    option("--iters", type=int, default=30)
    option("--flags", nargs="*", default=[], metavar="KEY=VALUE", help="settings of train.py")
    args = parser.parse_args()
    if args.rounds < 1 or args.iters < 1:
        parser.error("--rounds and --iters must be at least 1")
    flags = [f"--{flag}" for flag in args.flags]
    for name in args.cases:
        bench(name, args.folder / name, args.rounds, args.iters, flags)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--profile"]:
        profile_train(sys.argv[2:])
    else:
        main()
