"""
Batches of a prepared dataset: which rows they are, and how they get to the device without the model waiting.

    loader = Loader(open_dataset("data/digits"), "channel", "cuda", batch_size=32, micro_batches=8)
    for target, cond in loader.stream(step=0, micros=range(8)): ...    # for ever
"""

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from flow import Normalizer
from unpickle import drop_pages

ARRAYS = ("train_cond", "train_target", "val_cond", "val_target")
FILES = (*(f"{name}.npy" for name in ARRAYS), "train_items.jsonl", "val_items.jsonl", "stats.npz")


def open_dataset(data_dir):
    """dict(meta, stats, train_cond, train_target, val_cond, val_target), arrays memory-mapped.

    Raises ValueError where the dataset is missing, incomplete or not what meta.json says.
    """
    folder, make = Path(data_dir), f"make it with: python prepare.py SRC --out={data_dir}"
    if not (folder / "meta.json").is_file():
        state = (
            "is incomplete: it has no meta.json"
            if any((folder / name).exists() for name in FILES)
            else "does not exist"
        )
        raise ValueError(f"the dataset {str(data_dir)!r} {state}; {make}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        with np.load(folder / "stats.npz") as stats:
            data |= {"meta": meta, "stats": dict(stats)}
        for name in ARRAYS:
            if list(data[name].shape) != meta["shapes"][name]:
                raise ValueError(
                    f"{name}.npy has shape {data[name].shape}, meta.json says {meta['shapes'][name]}"
                )
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        if len(meta["grid"]) != 2 or not isinstance(meta["layout"], dict):
            raise ValueError("meta.json has no grid or layout")
    except Exception as e:  # a damaged file can raise anything
        raise ValueError(
            f"the dataset {str(data_dir)!r} is damaged: {e}; {make} --overwrite=True"
        ) from e
    return data


class Loader:
    """
    data: open_dataset(...); normalize: see flow.Normalizer, into whose space batches are taken
    batch_size: samples in a micro-batch; micro_batches: of them in an iteration, over all processes
    subset_size: train on the first so many samples only
    seed: of the order: epochs are permutations by (seed, epoch), back to back, so that the rows of a micro-batch
        are a function of (seed, iteration, its place in the iteration) and of nothing else
    preload: hold the arrays in memory, a copy in each process, instead of reading them as they are needed
    """

    def __init__(
        self, data, normalize, device, batch_size, micro_batches=1, subset_size=None, seed=0, preload=False
    ):  # fmt: skip
        self.device, self.cuda = device, torch.device(device).type == "cuda"
        self.batch_size, self.micro_batches, self.seed = batch_size, micro_batches, seed
        n = len(data["train_cond"])
        self.n_train, self.n_val = min(subset_size or n, n), len(data["val_cond"])
        self.arrays = {k: v for k, v in data.items() if k.startswith(("train_", "val_"))}
        if preload:
            files = self.arrays
            self.arrays = {
                k: np.array(v[: self.n_train if k[0] == "t" else None]) for k, v in files.items()
            }
            self.forget(files.values())
        self.stats = {
            name: torch.from_numpy(value).float() for name, value in data["stats"].items()
        }
        self.target, self.cond = (
            Normalizer(normalize, self.stats[f"{n}_mean"], self.stats[f"{n}_std"], device)
            for n in ("target", "cond")
        )
        self.epoch_order = functools.lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_train)

    def rows(self, step, micro):
        """Rows of micro-batch `micro` of iteration `step`."""
        n, start = self.n_train, (step * self.micro_batches + micro) * self.batch_size
        end = start + self.batch_size
        parts = [
            self.epoch_order(e)[max(start - e * n, 0) : end - e * n]
            for e in range(start // n, (end - 1) // n + 1)
        ]
        return np.concatenate(parts)

    def read(self, split, rows):
        """Raw target (B, T, D) and cond (B, S, C) on the CPU, in memory from which a GPU can fetch them itself."""
        arrays = [self.arrays[f"{split}_{name}"] for name in ("target", "cond")]
        batch = [torch.from_numpy(np.asarray(array[rows])) for array in arrays]
        self.forget(arrays)
        return [x.pin_memory() for x in batch] if self.cuda else batch

    def target_tokens(self, n=65536):
        """(n, D) of the model's targets, or all that there are, from samples evenly spaced over the training split."""
        array = self.arrays["train_target"]
        rows = np.linspace(0, self.n_train - 1, min(self.n_train, -(-n // array.shape[1]))).astype(
            int
        )
        tokens = self.target.encode(torch.from_numpy(array[rows]).to(self.device)).flatten(0, 1)
        self.forget([array])
        return tokens

    def forget(self, arrays):
        """Let go of the pages that were read: they stay in the system's cache, but are not this process's memory."""
        for array in arrays:
            drop_pages(array)

    def place(self, batch):
        """What read() gave, on the device and normalized; the copy to a GPU is asynchronous."""
        target, cond = (x.to(self.device, non_blocking=True) for x in batch)
        return self.target.encode(target), self.cond.encode(cond)

    def batch(self, split, rows):
        return self.place(self.read(split, rows))

    def stream(self, step, micros):
        """The micro-batches `micros` of iteration `step` and of all after it; a thread reads one ahead."""
        ahead = (self.read("train", self.rows(s, m)) for s in itertools.count(step) for m in micros)
        with ThreadPoolExecutor(1) as thread:  # which alone runs that generator
            batch = thread.submit(next, ahead)
            while True:
                placed = self.place(batch.result())
                batch = thread.submit(next, ahead)
                yield placed
