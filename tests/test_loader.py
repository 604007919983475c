import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import measured, train
from loader import Loader, open_dataset


def rows_of(loader, steps):
    return [loader.rows(step, micro) for step in steps for micro in range(loader.micro_batches)]


def test_epochs_without_replacement(dataset):
    """Back to back: an epoch may end within a micro-batch; each is another permutation, and another seed's others."""
    loader = Loader(
        open_dataset(dataset),
        "channel",
        "cpu",
        batch_size=4,
        micro_batches=2,
        subset_size=22,
        seed=3,
    )
    rows = np.concatenate(rows_of(loader, range(11)))  # 88 = 4 epochs of 22
    epochs = rows.reshape(4, 22)
    assert (np.sort(epochs) == np.arange(22)).all() and len({tuple(epoch) for epoch in epochs}) == 4
    other = Loader(
        open_dataset(dataset),
        "channel",
        "cpu",
        batch_size=4,
        micro_batches=2,
        subset_size=22,
        seed=4,
    )
    assert not np.array_equal(np.concatenate(rows_of(other, range(11))), rows)
    # the same rows in micro-batches of another size: what counts is the place in the iteration
    halves = Loader(
        open_dataset(dataset),
        "channel",
        "cpu",
        batch_size=2,
        micro_batches=4,
        subset_size=22,
        seed=3,
    )
    assert np.array_equal(np.concatenate(rows_of(halves, range(11))), rows)


def test_stream_starts_anywhere(dataset):
    loader = Loader(open_dataset(dataset), "channel", "cpu", batch_size=3, micro_batches=4)
    batches = list(itertools.islice(loader.stream(5, range(2, 4)), 6))
    for i, (target, cond) in enumerate(batches):
        rows = loader.rows(5 + i // 2, 2 + i % 2)
        data = open_dataset(dataset)
        assert torch.equal(
            target, loader.target.encode(torch.from_numpy(data["train_target"][rows]))
        )
        assert torch.equal(cond, loader.cond.encode(torch.from_numpy(data["train_cond"][rows])))
    assert batches[0][0].mean().abs() < 0.5 and 0.5 < batches[0][0].std() < 1.5  # normalized


def mapped(folder):
    """MB of the files in a folder that are this process's memory."""
    maps = Path("/proc/self/smaps").read_text().split(str(folder))[1:]
    return sum(int(entry.split("Rss:")[1].split()[0]) for entry in maps) / 1024


@pytest.mark.parametrize("preload", [False, True])
def test_reading_leaves_memory_flat(tmp_path, preload):
    """What was read does not stay; preloaded, it is held once."""
    rng = np.random.default_rng(0)
    data = {
        "stats": {f"{n}_{s}": np.ones(256) for n in ("target", "cond") for s in ("mean", "std")}
    }
    for name, n in (
        ("train_target", 5000),
        ("train_cond", 5000),
        ("val_target", 1),
        ("val_cond", 1),
    ):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((n, 32, 256), np.float32))
        data[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    loader = Loader(data, "channel", "cpu", batch_size=50, preload=preload)
    assert all(
        array.flags.owndata == preload for array in loader.arrays.values()
    )  # a copy, or views of the files
    for step in range(100):
        loader.read("train", loader.rows(step, 0))
        assert mapped(tmp_path) == 0
    stream = loader.stream(0, range(1))
    for _ in range(10):
        next(stream)
    stream.close()
    assert mapped(tmp_path) == 0
    data["train_cond"][::50].copy()
    assert mapped(tmp_path) > 3  # a read of 100 samples, if it is not let go


def test_preload_changes_no_bit(dataset, tmp_path, trained):
    train(dataset, tmp_path / "out", "--preload=True")
    assert measured(tmp_path / "out") == measured(trained)
