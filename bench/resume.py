"""
Does a run that is killed again and again end as one that is not? To the last bit?

    python bench/resume.py FOLDER                     # a free folder; about three minutes
    python bench/resume.py FOLDER --kills 40 --processes 2 --flags dtype=bfloat16

One run of train.py on a small random dataset goes through; another, of the same settings, is ended at random moments,
during set-up, iterations, evaluations and the writing of checkpoints, by SIGKILL, SIGTERM, SIGINT or its time limit,
and started again with --init_from=auto, `kills` times; then it may finish. Both must have the same ckpt_last.pt and
ckpt_best.pt (weights, averaged weights, optimizer, scaler, counters, best loss) and the same log.jsonl but for the
times. Exits with 1 where they differ.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
FLAGS = "--dim=64 --n_layer=2 --n_head=2 --multiple_of=32 --batch_size=4 --gradient_accumulation_steps=4 --ema_decay=0.9"
FLAGS += (
    " --warmup_iters=10 --learning_rate=3e-3 --save_interval=7 --eval_interval=10 --log_interval=3"
)
FLAGS += " --eval_batch_size=4 --eval_samples=8 --eval_sample_steps=4"
CLOCK = ("ms", "samples_per_s", "mfu", "seconds_left")


def make_dataset(folder):
    rng = np.random.default_rng(0)
    cond = rng.standard_normal((200, 16, 12), np.float32)
    target = cond @ rng.standard_normal((12, 8), np.float32) + rng.standard_normal(
        (200, 16, 8), np.float32
    )
    content = {"eva_blip3o_embeddings": cond, "clip_blip3o_embeddings": target}
    (folder / "random.pkl").write_bytes(pickle.dumps(content))
    prepare = [
        sys.executable,
        ROOT / "prepare.py",
        folder / "random.pkl",
        f"--out={folder / 'data'}",
    ]
    subprocess.run([*prepare, "--overwrite=True"], check=True, capture_output=True)
    return folder / "data"


class Run:
    """A run of train.py, its output in out/stdout.txt."""

    def __init__(self, out, processes, flags, rng=None):
        out.mkdir(parents=True, exist_ok=True)
        self.rng = rng
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *(launch if processes > 1 else []),
            ROOT / "train.py",
            f"--out_dir={out}",
            *flags,
        ]
        self.output, self.start = out / "stdout.txt", time.monotonic()
        with open(self.output, "w") as f:
            self.process = subprocess.Popen(
                command, stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def wait_for_iterations(self):
        while self.process.poll() is None and "\niter " not in self.output.read_text():
            time.sleep(0.01)
        return time.monotonic() - self.start

    def workers(self):
        """Process ids of torchrun's processes, each of which has a session of its own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def send(self, number):
        """SIGKILL to all, as when a node dies, or to one of several; other signals to torchrun or the only process."""
        if self.process.poll() is None:
            workers = self.workers() if number == signal.SIGKILL else []
            for pid in workers[: 1 if self.rng.random() < 0.5 else None] or [self.process.pid]:
                os.kill(pid, number)


def reached(out):
    """The last iteration in the log."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["iter"] if whole else None


def saved(out, name="ckpt_last.pt"):
    return torch.load(out / name, weights_only=True) if (out / name).exists() else {"iter": None}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def measured(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--flags", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of train.py"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills is at least 1")
    args.folder.mkdir(parents=True, exist_ok=True)
    whole, parts = args.folder / "whole", args.folder / "parts"
    for out in (whole, parts):
        shutil.rmtree(out, ignore_errors=True)
    flags = [*FLAGS.split(), f"--max_iters={args.iters}", f"--data_dir={make_dataset(args.folder)}"]
    flags += [f"--{flag}" for flag in args.flags]

    run = Run(whole, args.processes, flags)
    setup = run.wait_for_iterations()
    if run.process.wait():
        sys.exit(run.output.read_text())
    loop = time.monotonic() - run.start - setup
    print(
        f"uninterrupted: {args.iters} iterations, {setup:.1f} s of set-up, {loop:.1f} s of the rest",
        flush=True,
    )

    rng = random.Random(args.seed)
    for kill in range(args.kills):
        kind = rng.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "time limit"])
        delay, early = (
            rng.uniform(0, 0.9 * loop / args.kills),
            rng.random() < 0.15 and kind == "SIGKILL",
        )
        limit = [f"--time_limit={(0.4 * setup + delay) / 60}"] if kind == "time limit" else []
        run = Run(parts, args.processes, [*flags, "--init_from=auto", *limit], rng)
        if kind == "time limit":
            run.process.wait()
        else:
            if early:
                time.sleep(rng.uniform(0, setup))
            else:
                run.wait_for_iterations()
                time.sleep(delay)
            run.send(getattr(signal, kind))
            run.process.wait()
        text = run.output.read_text()
        if "done:" in text:
            sys.exit(f"the run ended before it was killed {args.kills} times: give it more --iters")
        if kind != "SIGKILL" and "stopped before iteration" not in text:
            sys.exit(f"{kind}: no clean end\n{text}")
        print(
            f"{kill + 1:3} {kind:10} log at {reached(parts)}, checkpoint of {saved(parts)['iter']}",
            flush=True,
        )
    run = Run(parts, args.processes, [*flags, "--init_from=auto"])
    if run.process.wait():
        sys.exit(run.output.read_text())

    equal = {"log.jsonl": measured(whole) == measured(parts)}
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        a, b = saved(whole, name), saved(parts, name)
        keys = ("model", "ema", "optimizer", "scaler", "iter", "best_val_loss", "bad_steps")
        equal |= {f"{name}: {key}": same(a[key], b[key]) for key in keys}
    for name, is_equal in equal.items():
        print(f"{name:28} {'equal' if is_equal else 'DIFFERS'}")
    sys.exit(not all(equal.values()))


if __name__ == "__main__":
    main()
