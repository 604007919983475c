"""
prepare.py beside `cp` and beside pickle.load + np.save: speed and memory.

    python bench/prepare.py FOLDER        # a free folder on the disk to measure; 1 and 8 GB pickles
    python bench/prepare.py FOLDER --gb=1 --rounds=5

Writes a pickle of random embeddings (N, 64, 1280) and (N, 64, 768) into FOLDER and converts it in
separate processes, one of each kind in a round, timed from start to end, imports included. Warm:
the file is in the page cache. Cold: it has been dropped from it. Ratios are of cp's time of the
same round to the process's, so that 1 is as fast as cp; the table has their median. Memory is the
peak of RssAnon, sampled every 5 ms. Needs three times the pickle's size on the disk, and as much
free memory for the page cache; leaves nothing there. Leave the machine alone meanwhile.
"""

import argparse
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
KEYS = {"eva_blip3o_embeddings": 1280, "clip_blip3o_embeddings": 768}
LOAD_AND_SAVE = """import sys, pickle, numpy as np
content = pickle.load(open(sys.argv[1], "rb"))
for key in ("eva_blip3o_embeddings", "clip_blip3o_embeddings"):
    np.save(sys.argv[2] + "/" + key, content[key])"""


def write_pickle(path, gb, dtype):
    """In a process of its own, since this one's memory should stay small."""
    n = int(gb * 1e9 / (64 * sum(KEYS.values()) * np.dtype(dtype).itemsize))
    block = (
        np.random.default_rng(0)
        .standard_normal((min(n, 128), 64, max(KEYS.values())), np.float32)
        .astype(dtype)
    )
    content = {
        "keys": [f"{i:08d}" for i in range(n)],
        "captions": [f"photograph number {i}" for i in range(n)],
    }
    for key, channels in KEYS.items():
        content[key] = np.tile(block[..., :channels], (-(-n // len(block)), 1, 1))[:n]
    with open(path, "wb") as f:
        pickle.dump(content, f)


def anonymous(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024
    except (OSError, IndexError):  # it has just ended
        return 0


def run(command):
    """(seconds, peak RssAnon in MB) of a command that must succeed."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, peak


def drop_cache(path):
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder, gb, dtype, rounds):
    source, out = folder / "bench.pkl", folder / "bench-out"
    subprocess.run(
        [sys.executable, __file__, str(folder), f"--gb={gb}", f"--dtype={dtype}", "--write"],
        check=True,
    )
    size = source.stat().st_size / 1e9
    convert = [sys.executable, ROOT / "prepare.py", source, f"--out={out}"]
    commands = {"cp": ["cp", source, out / "copy"], "prepare.py": convert}
    if dtype == "float32":
        commands["prepare.py --dtype=float16"] = [*convert, "--dtype=float16"]
    commands["pickle.load + np.save"] = [sys.executable, "-c", LOAD_AND_SAVE, source, out]
    for state in ("warm", "cold"):
        results = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                os.sync()
                if state == "cold":
                    drop_cache(source)
                else:
                    subprocess.run(["cat", source], stdout=subprocess.DEVNULL, check=True)
                results[name].append(run(command))
        for name, figures in results.items():
            seconds, peaks = zip(*figures)
            ratios = sorted(a / b for (a, _), b in zip(results["cp"], seconds))
            speed = size / statistics.median(seconds)
            print(
                f"{size:5.1f} GB {dtype} {state}  {name:28} {speed:6.2f} GB/s"
                f"  {statistics.median(ratios):5.2f} of cp ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                f"  {max(peaks):6.0f} MB anonymous",
                flush=True,
            )
    shutil.rmtree(out)
    source.unlink()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write_pickle(args.folder / "bench.pkl", args.gb[0], args.dtype[0])
    for gb in args.gb:
        for dtype in args.dtype:
            measure(args.folder, gb, dtype, args.rounds)


if __name__ == "__main__":
    main()
