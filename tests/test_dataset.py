"""The prepared dataset: which rows a batch has, and what reading costs."""

import itertools
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, make_pickle, refused, run
from plumbing.dataset import ARRAYS, Loader, made_ahead, open_dataset


def rows_of(loader, iterations):
    micros = range(loader.micro_batches)
    return np.concatenate([loader.rows(i, micro) for i in iterations for micro in micros])


def test_epochs_without_replacement(dataset):
    """Each epoch is another permutation, and so with another seed; one may end within a
    micro-batch."""
    data = open_dataset(dataset)
    loader = Loader(data, batch_size=4, micro_batches=2, subset_size=22, seed=3)
    rows = rows_of(loader, range(11))  # 88 = 4 epochs of 22
    epochs = rows.reshape(4, 22)
    assert (np.sort(epochs) == np.arange(22)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Loader(data, batch_size=4, micro_batches=2, subset_size=22, seed=4)
    assert not np.array_equal(rows_of(other, range(11)), rows)
    # the same rows in micro-batches of another size: what counts is the place in the iteration
    halves = Loader(data, batch_size=2, micro_batches=4, subset_size=22, seed=3)
    assert np.array_equal(rows_of(halves, range(11)), rows)
    # 4 bytes per sample and epoch, in the order of numpy's own permutation
    order = loader.epoch_order(2)
    assert order.itemsize == 4
    assert np.array_equal(order, np.random.default_rng([3, 2]).permutation(22))
    # a micro-batch longer than two epochs
    long = Loader(data, batch_size=88, subset_size=22, seed=3)
    assert np.array_equal(long.rows(0, 0), rows)


def test_stream_starts_anywhere(dataset):
    data = open_dataset(dataset)
    loader = Loader(data, batch_size=3, micro_batches=4)
    batches = list(itertools.islice(loader.stream(5, range(2, 4)), 6))
    for i, (target, cond) in enumerate(batches):
        rows = loader.rows(5 + i // 2, 2 + i % 2)
        assert torch.equal(target, torch.from_numpy(data["train_target"][rows]))
        assert torch.equal(cond, torch.from_numpy(data["train_cond"][rows]))


def mapped(folder):
    """MB of the files in a folder that are this process's memory."""
    maps = Path("/proc/self/smaps").read_text().split(str(folder))[1:]
    return sum(int(entry.split("Rss:")[1].split()[0]) for entry in maps) / 1024


def test_reading_leaves_memory_flat(tmp_path):
    """What was read does not stay this process's memory."""
    rng = np.random.default_rng(0)
    data = {}
    for name, n in (("train_target", 5000), ("train_cond", 5000), ("val_cond", 1)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((n, 32, 256), np.float32))
        data[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    loader = Loader(data, batch_size=50)
    for iteration in range(100):
        loader.read("train", loader.rows(iteration, 0))
        assert mapped(tmp_path) == 0
    stream = loader.stream(0, range(1))
    for _ in range(10):
        next(stream)
    stream.close()
    assert mapped(tmp_path) == 0
    data["train_cond"][::50].copy()
    assert mapped(tmp_path) > 3  # a read of 100 samples, if it is not let go


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "meta.json").unlink(), "is incomplete or damaged: .*meta.json"),
        (lambda folder: (folder / "stats.npz").unlink(), "No such file.*stats.npz"),
        (lambda folder: (folder / "val_items.jsonl").unlink(), "No such file.*val_items.jsonl"),
        (lambda folder: np.save(folder / "val_cond.npy", np.ones((3, 4, 6))), "has shape"),
    ],
)
def test_a_broken_dataset_is_refused(dataset, tmp_path, spoil, words):
    folder = shutil.copytree(dataset, tmp_path / "data")
    open_dataset(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        open_dataset(folder)
    with pytest.raises(ValueError, match="does not exist; name it with --data_dir, or"):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("shapes", [((6,), (5,)), ((6,), (4, 5)), ((4, 6), (5,))])
def test_pooled_embeddings_train_and_sample(tmp_path, shapes):
    """On both sides or on one, with the default settings but for the size."""
    rng = np.random.default_rng(0)
    for name, shape in zip(("c", "t"), shapes):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((40, *shape), np.float32))
    data, out = f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"
    pair = tmp_path / "c.npy", tmp_path / "t.npy"
    done = run("prepare.py", *pair, f"--out={tmp_path / 'data'}")
    assert ("cross-attention" in done.stdout) == (len(shapes[0]) != len(shapes[1]))
    run("train.py", *TINY, data, out)
    assert "ridge" in run("sample.py", out, "--steps=2", "--guidance=2").stdout
    made = tmp_path / "made.npy"
    run("sample.py", out, "--steps=2", f"--cond={pair[0]}", f"--save={made}")
    tokens = 1 if len(shapes[1]) == 1 else 4
    generated = np.load(made)
    assert generated.shape == (40, tokens, 5) and np.isfinite(generated).all()


def test_conditioning_on_a_label_as_in_the_readme(tmp_path):
    """The condition is noise, the label decides the target: the samples follow the label."""
    code = tmp_path / "code"
    for folder in ("plumbing", "report"):
        shutil.copytree(ROOT / folder, code / folder)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, code)
    section = (ROOT / "README.md").read_text().split("### Conditioning on a label")[1]
    snippet = section.split("```python\n")[1].split("```")[0]
    file = code / "plumbing" / "dataset.py"
    text = file.read_text()
    assert text.count("    return data\n") == 1
    file.write_text(text.replace("    return data\n", snippet + "    return data\n"))

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200) * 9  # 0 or 9
    target = np.where(labels == 9, 2, -2)[:, None] + 0.3 * rng.standard_normal((200, 5))
    cond = rng.standard_normal((200, 3))
    names = ("eva_blip3o_embeddings", "clip_blip3o_embeddings")
    content = dict(zip(names, (cond.astype("f2"), target.astype("f4"))))
    make_pickle(tmp_path / "e.pkl", keys=None, captions=None, labels=labels, **content)
    data, out = f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"
    run("prepare.py", tmp_path / "e.pkl", f"--out={tmp_path / 'data'}", cwd=code)
    long = ["--max_iters=60", "--batch_size=16", "--gradient_accumulation_steps=1"]
    run("train.py", *TINY, *long, "--eval_interval=30", "--save_interval=60", data, out, cwd=code)
    items = (tmp_path / "data" / "val_items.jsonl").read_text().splitlines()
    has_nine = np.array([json.loads(line)["label"] == 9 for line in items])
    for guidance in (1.0, 2.0):
        run("sample.py", out, f"--guidance={guidance}", cwd=code)
        generated = np.load(tmp_path / "out" / "generated.npy").mean((1, 2))  # (N,)
        assert ((generated > 0) == has_nine).mean() > 0.9


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Data sets of 20, 30 and 40 samples, and the raw content of each."""
    folder = tmp_path_factory.mktemp("three")
    contents = []
    for i, n in enumerate((20, 30, 40)):
        contents.append(make_pickle(folder / f"{i}.pkl", n=n, seed=i))
        run("prepare.py", folder / f"{i}.pkl", f"--out={folder / f'part{i}'}")
    return folder


def test_several_folders_are_one(three, monkeypatch):
    """Arrays, statistics and the samples of each iteration, by commas or by a pattern."""
    parts = [open_dataset(three / f"part{i}") for i in range(3)]
    data = open_dataset(",".join(str(three / f"part{i}") for i in range(3)))
    monkeypatch.setenv("HOME", str(three))
    assert open_dataset("~/part*")["folders"] == data["folders"]
    for name in ARRAYS:
        whole = np.concatenate([part[name] for part in parts])
        assert data[name].shape == whole.shape and len(data[name]) == len(whole)
        rows = np.random.default_rng(0).integers(0, len(whole), 50)
        assert np.array_equal(data[name][rows], whole[rows])
        for part in (slice(None), slice(3, 30), slice(1, 99, 2)):
            assert np.array_equal(data[name][part], whole[part])
    for kind in ("cond", "target"):
        whole = np.concatenate([part[f"train_{kind}"] for part in parts]).astype(float)
        for name, value in (("mean", whole.mean((0, 1))), ("std", whole.std((0, 1)))):
            assert np.allclose(data["stats"][f"{kind}_{name}"], value, rtol=1e-12)
    loader = Loader(data, 7, 2, seed=3)
    target, cond = loader.read("train", loader.rows(5, 1))
    whole = np.concatenate([part["train_target"] for part in parts])
    assert np.array_equal(target, whole[loader.rows(5, 1)]) and len(cond) == 7


def test_a_run_on_several_folders(three, tmp_path):
    """It trains, resumes, samples and scores; the items are those of all."""
    data, out = f"--data_dir={three}/part*", f"--out_dir={tmp_path / 'out'}"
    run("train.py", *TINY, data, out)
    run("train.py", out, "--init_from=resume", "--max_iters=7")
    pickled = tmp_path / "a.pkl"
    done = run("sample.py", out, "--steps=1", "--draws=1", f"--save_pickle={pickled}")
    assert "9 conditions, 1 draws" in done.stdout and "ridge" in done.stdout
    keys = pickle.loads(pickled.read_bytes())["keys"]
    assert [key.split()[1].split(".")[0] for key in keys] == [*"001112222"]
    run("-m", "report.score", tmp_path / "out" / "generated.npy", data)


def test_folders_that_do_not_go_together(three, tmp_path):
    make_pickle(tmp_path / "wide.pkl", C=7)
    run("prepare.py", tmp_path / "wide.pkl", f"--out={tmp_path / 'wide'}")
    words = refused("train.py", f"--data_dir={three / 'part0'},{tmp_path / 'wide'}")
    assert f"{tmp_path / 'wide'} does not go with {three / 'part0'}" in words
    words = refused("train.py", f"--data_dir={three / 'part0'},{tmp_path / 'nowhere'}")
    assert "nowhere' does not exist" in words
    old = shutil.copytree(three / "part1", tmp_path / "old[1],a")
    assert len(open_dataset(old)["train_cond"]) == 27  # a name, not a pattern


def test_made_ahead():
    """The next item is made while one is used, in order; an error comes in its turn."""
    made = []
    second = threading.Event()

    def items():
        for i in range(4):
            made.append(i)
            if i == 1:
                second.set()
            yield i
        raise ValueError("no more")

    ahead = made_ahead(items())
    assert next(ahead) == 0
    assert second.wait(60)  # without having been asked for it
    assert 3 not in made
    assert [next(ahead) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="no more"):
        next(ahead)
    assert [*made_ahead(iter([1, 2]))] == [1, 2]
