"""
Does a run that is killed again and again end as one that is not? To the last bit?

    python bench/resume.py FOLDER                     # a free folder; about three minutes
    python bench/resume.py FOLDER --kills 40 --processes 2 --flags dtype=bfloat16

Trains on a small random dataset twice, with the same settings. The first run goes through. The
second is ended `kills` times by SIGKILL, SIGTERM, SIGINT or its time limit, and goes on with
--init_from=auto each time; then it may finish. The moments are random: in set-up, iterations,
evaluations and the writing of checkpoints.

Both must end with the same ckpt_last.pt and ckpt_best.pt (weights, averaged weights, optimizer,
scaler, counters, best loss) and the same log.jsonl but for the times. Exits with 1 where they
differ.
"""

import argparse
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
FLAGS = "--dim=64 --n_layer=2 --n_head=2 --multiple_of=32 --batch_size=4"
FLAGS += " --gradient_accumulation_steps=4 --warmup_iters=10 --learning_rate=3e-3 --ema_decay=0.9"
FLAGS += " --save_interval=7 --eval_interval=10 --log_interval=3"
FLAGS += " --eval_batch_size=4 --eval_samples=8 --eval_sample_steps=4"
CLOCK = ("ms", "samples_per_s", "mfu", "seconds_left")
KINDS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "time limit")
COMPARED = ("model", "ema", "optimizer", "scaler", "iter", "best_val_loss", "bad_steps")


def make_dataset(folder):
    rng = np.random.default_rng(0)
    cond = rng.standard_normal((200, 16, 12), np.float32)
    noise = rng.standard_normal((200, 16, 8), np.float32)
    target = cond @ rng.standard_normal((12, 8), np.float32) + noise
    content = {"eva_blip3o_embeddings": cond, "clip_blip3o_embeddings": target}
    source = folder / "random.pkl"
    source.write_bytes(pickle.dumps(content))
    data = folder / "data"
    prepare = [sys.executable, ROOT / "prepare.py", source, f"--out={data}", "--overwrite=True"]
    subprocess.run(prepare, check=True, capture_output=True)
    return data


class Run:
    """A run of train.py, its output in out/stdout.txt."""

    def __init__(self, out, processes, flags):
        out.mkdir(parents=True, exist_ok=True)
        self.output = out / "stdout.txt"
        self.processes = processes
        self.start = time.monotonic()
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}"]
        command += [ROOT / "train.py", f"--out_dir={out}", *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.output, "w") as f:
            self.process = subprocess.Popen(command, stdout=f, stderr=f, env=env)

    def wait_for_iteration(self, number=0, limit=math.inf):
        """Returns when this or a later iteration is logged, or so many seconds after the start: its
        number, seconds since the start."""
        iterations = []
        end = self.start + limit
        while self.process.poll() is None and not iterations and time.monotonic() < end:
            time.sleep(0.01)
            logged = map(int, re.findall(r"^iter (\d+) ", self.output.read_text(), re.M))
            iterations = [iteration for iteration in logged if iteration >= number]
        return max(iterations, default=0), time.monotonic() - self.start

    def finish(self):
        if self.process.wait():
            sys.exit(self.output.read_text())

    def workers(self):
        """Process ids of torchrun's processes, each of which has a session of its own. Children of
        train.py, such as inductor's, are none."""
        if self.processes == 1:
            return []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def send(self, number, rng):
        """SIGKILL goes to all processes, as when a node dies, or to one of them; another signal
        goes to torchrun or to the only process."""
        if self.process.poll() is not None:
            return
        pids = self.workers() if number == signal.SIGKILL else []
        if rng.random() < 0.5:
            pids = pids[:1]
        for pid in pids or [self.process.pid]:
            os.kill(pid, number)


def end_early(out, kind, setup, iterations, pace, rng, processes, flags):
    """Start the run again and end it after so many iterations, each of which takes `pace` seconds.

    The set-up before them takes `setup` seconds; SIGKILL sometimes comes during it. Returns the
    run's output.
    """
    # a run goes on with its own settings: without this flag the last time limit would stay
    limit = (0.4 * setup + iterations * pace) / 60 if kind == "time limit" else None
    in_setup = rng.random() < 0.15 and kind == "SIGKILL"
    run = Run(out, processes, [*flags, "--init_from=auto", f"--time_limit={limit}"])
    if kind != "time limit":
        if in_setup:
            run.wait_for_iteration(limit=rng.uniform(0, setup))
        else:
            first, start = run.wait_for_iteration()
            last, end = run.wait_for_iteration(first + iterations)
            pace = (end - start) / max(1, last - first)  # of now: the load may have changed
            time.sleep(rng.uniform(0, 3) * pace)  # to anywhere in an iteration
        run.send(getattr(signal, kind), rng)
    run.process.wait()
    return run.output.read_text()


def last_logged(out):
    """The last iteration in the log."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1])["iter"] if complete else None


def load(out, name="ckpt_last.pt"):
    return torch.load(out / name, weights_only=True) if (out / name).exists() else {"iter": None}


def differences(a, b, name):
    """Yield the names of what differs in nested dicts, lists and tensors."""
    if isinstance(a, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{name} {key}")
    elif isinstance(a, list | tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{name} {i}")
    elif isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield f"{name} (by {(a - b).abs().max():.2g})"
    elif a != b:
        yield f"{name} ({a}, {b})"


def log_without_times(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("folder", type=Path)
    option("--kills", type=int, default=20)
    option("--iters", type=int, default=300)
    option("--processes", type=int, default=1)
    option("--flags", nargs="*", default=[], metavar="KEY=VALUE", help="settings of train.py")
    option("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    return args


def main():
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = args.folder / "whole"
    parts = args.folder / "parts"
    for out in (whole, parts):
        shutil.rmtree(out, ignore_errors=True)
    flags = [*FLAGS.split(), f"--max_iters={args.iters}", f"--data_dir={make_dataset(args.folder)}"]
    flags += [f"--{flag}" for flag in args.flags]

    run = Run(whole, args.processes, flags)
    _, setup = run.wait_for_iteration()
    run.finish()
    loop = time.monotonic() - run.start - setup
    seconds = f"{setup:.1f} s of set-up, {loop:.1f} s of the rest"
    print(f"uninterrupted: {args.iters} iterations, {seconds}", flush=True)

    rng = random.Random(args.seed)
    for kill in range(1, args.kills + 1):
        kind = rng.choice(KINDS)
        iterations = rng.randint(0, int(0.7 * args.iters / args.kills))
        pace = loop / args.iters
        text = end_early(parts, kind, setup, iterations, pace, rng, args.processes, flags)
        if "done:" in text:
            sys.exit(f"the run ended before it was killed {args.kills} times: give it more --iters")
        if kind != "SIGKILL" and "stopped before iteration" not in text:
            sys.exit(f"{kind}: no clean end\n{text}")
        saved = load(parts)["iter"]
        print(f"{kill:3} {kind:10} log at {last_logged(parts)}, checkpoint of {saved}", flush=True)
    Run(parts, args.processes, [*flags, "--init_from=auto", "--time_limit=None"]).finish()

    compared = {"log.jsonl": [log_without_times(out) for out in (whole, parts)]}
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        pair = load(whole, name), load(parts, name)
        for key in COMPARED:
            compared[f"{name}: {key}"] = [ckpt[key] for ckpt in pair]
    is_equal = True
    for name, pair in compared.items():
        different = [*differences(*pair, "")]
        is_equal &= not different
        text = f"DIFFERS in {len(different)}:{';'.join(different[:3])}" if different else "equal"
        print(f"{name:28} {text}")
    sys.exit(not is_equal)


if __name__ == "__main__":
    main()
