"""
The prepared dataset: open it, and deal out raw batches of it.

    data = open_dataset("data/digits")    # memory-mapped arrays, statistics, meta.json
    loader = Loader(data, batch_size=32, micro_batches=8)
    for target, cond in loader.stream(iteration=0, micros=range(8)): ...    # never ends

torch is imported where it is needed, because prepare.py starts ten times as fast without it.
"""

import functools
import glob
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.unpickle import drop_pages

KINDS = ("cond", "target")
ARRAYS = ("train_cond", "train_target", "val_cond", "val_target")
FILES = (*(f"{name}.npy" for name in ARRAYS), "train_items.jsonl", "val_items.jsonl", "stats.npz")


class Joined:
    """Arrays (n, ...) one after the other as one (N, ...), whose rows are read where they are."""

    def __init__(self, arrays):
        self.arrays = arrays
        lengths = [len(array) for array in arrays]
        self.ends = np.cumsum(lengths)
        self.shape = (sum(lengths), *arrays[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """The samples in a slice or an array of rows: a copy, unless there is but one array."""
        if len(self.arrays) == 1:
            return self.arrays[0][rows]
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
        which = np.searchsorted(self.ends, rows, "right")
        # a negative index: counted from the end of its array
        return np.stack([self.arrays[i][row - self.ends[i]] for i, row in zip(which, rows)])


def open_dataset(data_dir):
    """dict(meta, stats, folders, train_cond, train_target, val_cond, val_target) of a folder, or of
    several as one: data/a,data/b or data/part*. The arrays are memory-mapped.

    meta: the content of meta.json, of the first folder
    stats: {cond_mean, cond_std (C,), target_mean, target_std (D,)} of the training split
    Raises ValueError where a folder is missing, incomplete or not what its meta.json says, or does
    not go with the first.
    """
    folders = []
    for name in str(data_dir).split(","):
        pattern = os.path.expanduser(name)
        folders += sorted(glob.glob(pattern)) or [pattern]
    if os.path.isdir(data_dir):  # whatever characters are in its name
        folders = [data_dir]
    parts = [open_folder(folder) for folder in folders]
    joined = parts[0] | {"folders": list(map(os.path.abspath, folders))}
    if len(parts) == 1:
        return joined
    layouts = [part["meta"]["layout"] for part in parts]
    for folder, layout in zip(folders, layouts):
        if layout != layouts[0]:
            raise ValueError(f"{folder} does not go with {folders[0]}: {layout}, not {layouts[0]}")
    for name in ARRAYS:
        joined[name] = Joined([part[name] for part in parts])
    moments = {kind: sum(part["moments"][kind] for part in parts) for kind in KINDS}
    joined["stats"] = statistics(moments)
    return joined


def statistics(moments):
    """Mean and standard deviation of each channel, {cond_mean, cond_std (C,), ...}.

    moments: {"cond": (3, C), "target": (3, D)}, the number of tokens and sums over them of the
        values and of their squares, in float64
    """
    stats = {}
    for kind, (count, total, square) in moments.items():
        mean = total / count
        variance = square / count - mean**2
        variance[variance < 1e-12 * square / count] = 0  # less is only rounding
        stats[f"{kind}_mean"] = mean
        stats[f"{kind}_std"] = np.sqrt(variance)
    return stats


def open_folder(data_dir):
    """open_dataset() for one folder."""
    folder = Path(data_dir)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        stats = dict(np.load(folder / "stats.npz"))
        moments = {kind: stats.pop(f"{kind}_moments") for kind in KINDS}
        data = {"meta": meta, "moments": moments, "stats": stats}
        for name in ARRAYS:
            data[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
            shape = list(data[name].shape)
            expected = meta["shapes"][name]
            if shape != expected:
                raise ValueError(f"{name}.npy has shape {shape}, meta.json says {expected}")
        for name in FILES:
            (folder / name).stat()  # raises OSError if it is missing
    except Exception as e:  # a damaged file can raise anything
        state = f"is incomplete or damaged: {e}" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"the dataset {data_dir!r} {state}; name it with --data_dir, or make it with: "
            f"python prepare.py SRC --out={data_dir}"
        ) from e
    return data


def split_arrays(data, split):
    """Conditions (N, S, C) and targets (N, T, D) of a split: train or val. Raises ValueError."""
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} is unknown; it is one of train, val")
    return data[f"{split}_cond"], data[f"{split}_target"]


@dataclass
class Loader:
    """Which samples each micro-batch holds, and the samples themselves, as they are in the files.

    Epochs are permutations that follow each other without a gap, each a function of (seed, epoch).
    The rows of a micro-batch are therefore a function of (seed, iteration, place in the iteration)
    alone: a resumed run, and one on another number of processes, sees the same data.

    data: from open_dataset; batch_size: samples per micro-batch
    micro_batches: per iteration, over all processes; subset_size: use the first so many samples
    pin_memory: put batches in page-locked memory, so that copies to a GPU overlap with its work
    """

    data: dict
    batch_size: int
    micro_batches: int = 1
    subset_size: int | None = None
    seed: int = 0
    pin_memory: bool = False

    def __post_init__(self):
        n = len(self.data["train_cond"])
        self.n_train = min(n, self.subset_size or n)
        self.n_val = len(self.data["val_cond"])
        self.epoch_order = functools.lru_cache(2)(self.epoch_order)

    def epoch_order(self, epoch):
        rows = np.arange(self.n_train, dtype=np.uint32)  # half the memory of the default
        return np.random.default_rng([self.seed, epoch]).permutation(rows)

    def rows(self, iteration, micro):
        """(batch_size,) rows of the training split in micro-batch `micro` of an iteration."""
        first = (iteration * self.micro_batches + micro) * self.batch_size
        places = range(first, first + self.batch_size)
        n = self.n_train
        return np.array([self.epoch_order(i // n)[i % n] for i in places])

    def read(self, split, rows):
        """Target (B, T, D) and condition (B, S, C), raw, as tensors on the CPU."""
        import torch

        batch = []
        for name in ("target", "cond"):
            array = self.data[f"{split}_{name}"]
            x = torch.from_numpy(array[rows])
            batch.append(x.pin_memory() if self.pin_memory else x)
            drop_pages(array)  # they stay in the system's cache, but are not this process's memory
        return batch

    def stream(self, iteration, micros):
        """The micro-batches `micros` of an iteration and of all after it, read ahead."""
        return made_ahead(
            self.read("train", self.rows(i, micro))
            for i in itertools.count(iteration)
            for micro in micros
        )


def made_ahead(items):
    """The items of an iterator. A thread makes the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item
