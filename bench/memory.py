"""
Peak memory of training and sampling, as whole processes, and whether the settings that save it cost
quality.

    python bench/memory.py FOLDER      # a free folder with 20 GB; 20 minutes, 12 GB of memory
    python bench/memory.py FOLDER --sizes 256 768
    python bench/memory.py --compare config/train_digits.py [--data_dir=DIR] [--seeds 0 1 2]

Each line is a run of train.py or of sample.py with BLIP3-o's model (config/train_blip3o.py) on
random embeddings, (64, 1280) -> (64, 768). Training takes two iterations at batch 32, with their
evaluations and checkpoints. Sampling takes 8 conditions at batch 8, from that checkpoint. The
figure is the peak resident memory that the operating system reports when the process ends. About
0.4 GB of it are libraries.

All run with MALLOC_MMAP_THRESHOLD_=4194304: else glibc keeps tensors of some MB in a heap, whose
gaps may take as much again.

--compare trains with the config's own settings and with LEAN, everything else equal, and prints the
validation losses of the weights that would be sampled.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.train import make_dataset

ROOT = Path(__file__).parents[1]
BLIP3O = ROOT / "config/train_blip3o.py"
SIZES = {
    "256": dict(dim=256, n_layer=6, n_head=4),
    "768": dict(dim=768, n_layer=12, n_head=12),
    "1792": dict(dim=1792, n_layer=24, n_head=28),
}
ONE_MICRO_BATCH = dict(batch_size=32, gradient_accumulation_steps=1)
SHORT = dict(max_iters=2, warmup_iters=1, eval_interval=2, eval_size=8, eval_batch_size=8)
SHORT |= dict(eval_samples=0, overwrite=True)
LEAN = dict(optimizer="adafactor", optimizer_in_backward=True, gradient_checkpointing=True)
LEAN |= dict(ema_decay=0, grad_clip=0)
TRAIN = {  # name: settings, bytes per parameter that a run takes at least
    "AdamW, EMA": ({}, 20),
    "AdamW": (dict(ema_decay=0), 16),
    "AdamW, checkpointing": (dict(ema_decay=0, gradient_checkpointing=True), 16),
    "lean": (LEAN, 6),
    "lean, bfloat16": (LEAN | dict(dtype="bfloat16"), 6),
}
SAMPLE = dict(subset_size=8, batch_size=8, steps=2, draws=1)


def run(script, *args, **settings):
    """Peak resident memory in GB of a run that must succeed."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, ROOT / script, *args, *flags]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4194304"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if process.returncode:
            sys.exit(f"failed: {' '.join(map(str, command))}\n{out.read()}")
    return usage.ru_maxrss * 1024 / 1e9


def count_parameters(sizes):
    import torch

    from model import NextDiT, NextDiTConfig

    config = NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280, **sizes)
    with torch.device("meta"):
        return sum(p.numel() for p in NextDiT(config).parameters())


def measure(folder, names):
    data = make_dataset(folder, 80, (64, 1280), (64, 768))
    out = folder / "out"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of memory
    for name in names:
        sizes = SIZES[name]
        params = count_parameters(sizes)
        print(f"\n{sizes}: {params / 1e6:,.0f} M parameters", flush=True)
        for setting, (changes, bytes_per_parameter) in TRAIN.items():
            least = params * bytes_per_parameter
            if least > 0.8 * machine:
                figure = f"more than {least / 1e9:.1f} GB, not run"
            else:
                settings = sizes | ONE_MICRO_BATCH | SHORT | changes
                peak = run("train.py", BLIP3O, data_dir=data, out_dir=out, **settings)
                figure = f"{peak:6.2f} GB"
            print(f"  train batch 32  {setting:22} {figure}", flush=True)
        for dtype in ("float32", "bfloat16"):
            peak = run("sample.py", out_dir=out, dtype=dtype, **SAMPLE)
            print(f"  sample batch 8  {dtype:22} {peak:6.2f} GB", flush=True)
    shutil.rmtree(out)


def compare(config, data_dir, seeds):
    data = {} if data_dir is None else {"data_dir": data_dir}
    for seed in seeds:
        losses = []
        for changes in ({}, LEAN):
            with tempfile.TemporaryDirectory() as out:
                run("train.py", config, out_dir=out, seed=seed, **data | ONE_MICRO_BATCH | changes)
                last = (Path(out) / "log.jsonl").read_text().splitlines()[-1]
            losses.append(json.loads(last)["val_loss"])
        own, lean = losses
        figures = f"{own:.4f}, lean {lean:.4f} ({100 * (lean / own - 1):+.1f}%)"
        print(f"{config} seed {seed}: validation loss {figures}", flush=True)


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
