"""
Peak memory of training and sampling, as whole processes, and whether the settings that save it cost quality.

    python bench/memory.py FOLDER                  # a free folder with 20 GB; 20 minutes, 12 GB of memory
    python bench/memory.py FOLDER --sizes 256 768
    python bench/memory.py --compare config/train_digits.py [--data_dir=DIR] [--seeds 0 1 2]

Each line is one run of train.py with BLIP3-o's model (config/train_blip3o.py), two iterations at batch 32 on random
embeddings (64, 1280) -> (64, 768), with its evaluations and checkpoints, or one of sample.py, 8 conditions at batch 8,
from that checkpoint. The figure is the peak resident memory that the operating system reports of the process when it
ends, with the libraries, about 0.4 GB.
All run with MALLOC_MMAP_THRESHOLD_=4194304, without which glibc keeps tensors of some MB in a heap, whose gaps may
take as much again.
--compare trains with the config's own settings and with LEAN, everything else equal, and prints the validation
losses of the weights that would be sampled.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {
    "256": dict(dim=256, n_layer=6, n_head=4),
    "768": dict(dim=768, n_layer=12, n_head=12),
    "1792": dict(dim=1792, n_layer=24, n_head=28),
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304"}
BLIP3O = ROOT / "config/train_blip3o.py"
ONE_STEP = dict(batch_size=32, gradient_accumulation_steps=1)
LEAN = dict(
    optimizer="adafactor", optimizer_in_backward=True, gradient_checkpointing=True, ema_decay=0, grad_clip=0
)  # fmt: skip
TRAIN = {
    "AdamW, EMA": {},
    "AdamW": dict(ema_decay=0),
    "AdamW, checkpointing": dict(ema_decay=0, gradient_checkpointing=True),
    "lean": LEAN,
    "lean, bfloat16": LEAN | dict(dtype="bfloat16"),
}
SAMPLE = {"float32": dict(dtype="float32"), "bfloat16": dict(dtype="bfloat16")}


def run(script, *args, **flags):
    """Peak resident memory in GB of a run that must succeed."""
    command = [sys.executable, ROOT / script, *args, *(f"--{k}={v}" for k, v in flags.items())]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env=os.environ | MALLOC
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if process.returncode:
            sys.exit(f"failed: {' '.join(map(str, command))}\n{out.read()}")
    return usage.ru_maxrss * 1024 / 1e9


def make_dataset(folder):
    rng = np.random.default_rng(0)
    arrays = {"eva_blip3o_embeddings": 1280, "clip_blip3o_embeddings": 768}
    content = {
        name: rng.standard_normal((80, 64, c), np.float32).astype(np.float16)
        for name, c in arrays.items()
    }
    (folder / "random.pkl").write_bytes(pickle.dumps(content))
    run("prepare.py", folder / "random.pkl", out=folder / "data", overwrite=True)
    return folder / "data"


def measure(folder, sizes):
    import torch

    from model import NextDiT, NextDiTConfig

    data, out = make_dataset(folder), folder / "out"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    for name in sizes:
        with torch.device("meta"):
            model = NextDiT(
                NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280, **SIZES[name])
            )
        count = sum(p.numel() for p in model.parameters())
        print(f"\n{SIZES[name]}: {count / 1e6:,.0f} M parameters", flush=True)
        short = dict(
            max_iters=2,
            warmup_iters=1,
            eval_interval=2,
            eval_size=8,
            eval_batch_size=8,
            eval_samples=0,
        )
        for setting, flags in TRAIN.items():
            least = (
                count * {"AdamW, EMA": 20, "lean": 6, "lean, bfloat16": 6}.get(setting, 16) / 1e9
            )
            if least > 0.8 * ram:
                print(
                    f"  train batch 32  {setting:22} more than {least:.1f} GB, not run", flush=True
                )
                continue
            shutil.rmtree(out, ignore_errors=True)
            peak = run(
                "train.py",
                BLIP3O,
                data_dir=data,
                out_dir=out,
                **SIZES[name] | ONE_STEP | short | flags,
            )
            print(f"  train batch 32  {setting:22} {peak:6.2f} GB", flush=True)
        for setting, flags in SAMPLE.items():
            few = dict(subset_size=8, batch_size=8, steps=2, draws=1)
            peak = run("sample.py", out_dir=out, **few | flags)
            print(f"  sample batch 8  {setting:22} {peak:6.2f} GB", flush=True)
    shutil.rmtree(out)


def compare(config, data_dir, seeds):
    where = {} if data_dir is None else dict(data_dir=data_dir)
    for seed in seeds:
        losses = []
        for flags in ({}, LEAN):
            with tempfile.TemporaryDirectory() as out:
                run("train.py", config, out_dir=out, seed=seed, **where | ONE_STEP | flags)
                losses.append(
                    json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
                )
        a, b = losses
        print(
            f"{config} seed {seed}: validation loss {a:.4f}, lean {b:.4f} ({100 * (b / a - 1):+.1f}%)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--compare", metavar="CONFIG")
    parser.add_argument("--data_dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.compare:
        compare(args.compare, args.data_dir, args.seeds)
    elif args.folder:
        measure(args.folder, args.sizes)
    else:
        parser.error("give a FOLDER to measure in, or --compare")


if __name__ == "__main__":
    main()
