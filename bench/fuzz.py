"""
Mutate valid files at random and convert them: every case must end in a dataset or in our own error.

    python bench/fuzz.py FOLDER --cases=20000 --seed=0

FOLDER is for temporary files. A case is one of a dozen small valid files (pickles of protocols 3 to
5, torch.save files, safetensors, .npy pairs) with a few mutations: bytes flipped, cut out, repeated
or inserted, opcodes swapped, lengths replaced by extreme ones, the end cut off. It fails on any
exception but DataError, if it takes longer than --seconds, or if the process's memory grows by more
than --megabytes. Prints how the cases ended.
"""

import argparse
import collections
import contextlib
import io
import pickle
import random
import re
import signal
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare  # noqa: E402
from plumbing.configurator import configure  # noqa: E402
from plumbing.dataset import open_dataset  # noqa: E402
from plumbing.sources import DataError  # noqa: E402

COND, TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"
OPCODES = bytes(op[0] for op in vars(pickle).values() if type(op) is bytes and len(op) == 1)
EXTREMES = [0, 1, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
EXTREMES += [2**63 - 1, 2**64 - 1]


def seeds(folder):
    """Valid files: [(suffix, bytes)]."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4, 20), np.float32)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    names = dict(
        keys=[f"key {i}" for i in range(8)],
        captions=["a caption", "long " * 99] * 4,
        config={"a": [1, {"b": 2.5}]},
    )
    objects = np.array(["a", "b"] * 4, object)
    contents = [
        {COND: tx.half(), TARGET: ty.bfloat16(), **names},
        {COND: list(x), TARGET: list(y.astype(">f8")), "keys": np.arange(8)},
        {COND: np.asfortranarray(x), TARGET: y, "captions": objects},
    ]
    strided = {COND: tx[::2], TARGET: ty[1::2].transpose(1, 2)}
    found = [(".pkl", pickle.dumps({COND: x, TARGET: y, **names}, p)) for p in (3, 4, 5)]
    found.append((".pkl", pickle.dumps(strided, 3)))
    found += [(".pkl", pickle.dumps(content, 4)) for content in contents]
    for zipped in (True, False):
        torch.save(
            {COND: tx, TARGET: ty[:, :, :10], **names},
            folder / "seed.pt",
            _use_new_zipfile_serialization=zipped,
        )
        found.append((".pt", (folder / "seed.pt").read_bytes()))
    found.append((".safetensors", save({COND: tx.bfloat16(), TARGET: ty, "keys": torch.arange(8)})))
    np.save(folder / "seed.npy", x)
    return [*found, (".npy", (folder / "seed.npy").read_bytes())]


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        # two thirds hit the first 400 or the last 1000 bytes, where there is more structure
        at = rng.choice(
            [
                rng.randrange(len(data)),
                min(rng.randrange(400), len(data) - 1),
                max(0, len(data) - 1 - rng.randrange(1000)),
            ]
        )
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at] = rng.choice(OPCODES)
        elif kind == 3:
            data[at:at] = bytes([rng.choice(OPCODES)])
        elif kind == 4:
            layout = rng.choice(["<B", "<H", "<I", "<Q"])
            packed = struct.pack(layout, rng.choice(EXTREMES) % 256 ** struct.calcsize(layout))
            data[at : at + len(packed)] = packed
        elif kind == 5:
            del data[at : at + rng.choice([1, 2, 4, 100])]
        elif kind == 6:
            data[at:at] = data[at : at + rng.choice([1, 2, 8, 64])] * rng.choice([1, 2, 50])
        else:
            del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


def peak():
    """Of this process's memory, in MB, since it was last reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000


class Late(BaseException):
    """Not an Exception: nothing may catch it."""


def too_late(*_):
    raise Late


def fuzz(folder, cases, seed, seconds=5.0, megabytes=500, report=None):
    """Counter of how the cases ended: dataset, error.

    Raises at the first that ends otherwise, having kept its file.
    """
    folder, valid, outcomes = Path(folder), seeds(Path(folder)), collections.Counter()
    signal.signal(signal.SIGALRM, too_late)
    warnings.simplefilter("ignore")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = peak()
    flags = [f"--out={folder / 'out'}", "--val_fraction=0.25", "--overwrite=True"]
    config = configure(vars(prepare), flags)
    for case in range(cases):
        rng = random.Random(f"{seed}.{case}")
        suffix, data = valid[case % len(valid)]
        path = folder / f"case{suffix}"
        path.write_bytes(mutate(data, rng) if case >= len(valid) else data)
        paths = [path] if suffix != ".npy" else [path, folder / "seed.npy"]
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the progress
                prepare.prepare(paths, config)
            open_dataset(folder / "out")
            outcomes["dataset"] += 1
        except DataError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000, str(e)
            outcomes["error"] += 1
            if report is not None:
                report[str(e).rsplit(": ", 1)[-1][:60]] += 1
        except BaseException as e:
            signal.setitimer(signal.ITIMER_REAL, 0)
            kept = folder / f"failed{suffix}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(
                f"case {case} of seed {seed} ended in {e!r}; it is kept as {kept}"
            ) from e
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert (grown := peak() - start) < megabytes, f"case {case} of seed {seed} took {grown} MB"
    return outcomes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    args = parser.parse_args()
    messages = collections.Counter()
    outcomes = fuzz(args.folder, args.cases, args.seed, args.seconds, args.megabytes, messages)
    ends = f"{outcomes['dataset']} datasets, {outcomes['error']} errors"
    print(f"{args.cases} cases: {ends}, at most {peak()} MB")
    for message, count in messages.most_common(25):
        print(f"{count:7}  {message}")


if __name__ == "__main__":
    main()
