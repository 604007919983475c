import builtins
import json
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch

import prepare
from conftest import make_pickle, refused, run

COND, TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"


def convert(source, out, *args):
    sources = source if isinstance(source, list) else [source]
    return run("prepare.py", *sources, f"--out={out}", "--val_fraction=0.25", *args)


def load(out):
    data = prepare.open_dataset(out)
    items = {
        which: [json.loads(line) for line in (out / f"{which}_items.jsonl").read_text().splitlines()]
        for which in ("train", "val")
    }
    return data, items


def test_round_trip(tmp_path):
    content = make_pickle(tmp_path / "e.pkl")
    out = convert(tmp_path / "e.pkl", tmp_path / "out").stdout
    assert "train_cond.npy    (30, 4, 6)" in out and "grid 2x2" in out
    data, items = load(tmp_path / "out")
    train, val = prepare.split(40, 0.25, 0)
    assert len(val) == 10 and sorted([*train, *val]) == list(range(40))
    for which, rows in (("train", train), ("val", val)):
        for name, key in (("cond", COND), ("target", TARGET)):
            array = data[f"{which}_{name}"]
            assert array.dtype == np.float32 and np.array_equal(array, content[key][rows].numpy())
        assert items[which] == [{"key": content["keys"][i], "caption": content["captions"][i]} for i in rows]
    for name, key in (("cond", COND), ("target", TARGET)):
        x = content[key][train].double().flatten(0, 1).numpy()
        assert data["stats"][f"{name}_mean"].dtype == np.float64
        assert np.allclose(data["stats"][f"{name}_mean"], x.mean(0), atol=1e-12)
        assert np.allclose(data["stats"][f"{name}_std"], x.std(0), atol=1e-10)
    meta = data["meta"]
    assert (
        meta["config"] == {"eva_model": "test"}
        and meta["seed"] == 0
        and meta["val_fraction"] == 0.25
        and meta["grid"] == [2, 2]
    )
    assert meta["sources"][0]["file"] == "e.pkl" and meta["sources"][0]["bytes"] == (tmp_path / "e.pkl").stat().st_size


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["f2", ">f4", "f8", "fortran", torch.float16, torch.bfloat16])
def test_every_kind_of_array(tmp_path, kind, protocol):
    make = {"fortran": lambda x: np.asfortranarray(x.numpy())}.get(
        kind, (lambda x: x.to(kind)) if isinstance(kind, torch.dtype) else lambda x: x.numpy().astype(kind)
    )
    content = make_pickle(tmp_path / "e.pkl")
    for key in (COND, TARGET):
        content[key] = make(content[key])
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    prepare.prepare([tmp_path / "e.pkl"], tmp_path / "out", COND, TARGET, 0.25, 0)
    array = prepare.open_dataset(tmp_path / "out")["val_cond"]
    kept = {"f2": "f2", "f8": "f8", torch.float16: "f2"}.get(kind, "f4")  # bfloat16 has no numpy type: widened
    want = content[COND][prepare.split(40, 0.25, 0)[1]]
    want = want.double().numpy() if isinstance(want, torch.Tensor) else want
    assert array.dtype == np.dtype(kept) and np.array_equal(array.astype("f8"), want.astype("f8"))


def test_tensor_views_and_spatial_grids(tmp_path):
    big = torch.randn(80, 6, 6, 7)
    content = {COND: big[::2, 1:3, 2:5, :6], TARGET: big[1::2, :2, :3].transpose(1, 2)}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    convert(tmp_path / "e.pkl", tmp_path / "out")
    data, items = load(tmp_path / "out")
    val = prepare.split(40, 0.25, 0)[1]
    assert data["meta"]["grid"] == [3, 2] and data["val_cond"].shape == (10, 6, 6)
    assert np.array_equal(data["val_cond"], content[COND][val].flatten(1, 2)) and np.array_equal(
        data["val_target"], content[TARGET][val].flatten(1, 2)
    )
    assert items["val"][0] == {"key": None, "caption": None}


def test_folder_of_shards_in_natural_order(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    contents = [make_pickle(shards / f"embeddings_shard_{i}.pkl", n=n, seed=i) for i, n in ((2, 10), (10, 13))]
    (shards / "embeddings_manifest.json").write_text('{"total_samples": 23}')
    convert(shards, tmp_path / "out")
    data, items = load(tmp_path / "out")
    train, val = prepare.split(23, 0.25, 0)
    whole = torch.cat([c[COND] for c in contents])
    assert np.array_equal(data["train_cond"], whole[train]) and np.array_equal(data["val_cond"], whole[val])
    assert [i["key"] for i in items["val"]] == [(contents[0]["keys"] + contents[1]["keys"])[i] for i in val]
    convert([shards / "embeddings_shard_2.pkl", shards / "embeddings_shard_10.pkl"], tmp_path / "again")
    assert np.array_equal(load(tmp_path / "again")[0]["train_cond"], data["train_cond"])
    (shards / "embeddings_manifest.json").write_text('{"total_samples": 24}')
    assert "promises 24 samples, its pickles hold 23" in refused("prepare.py", shards, f"--out={tmp_path / 'bad'}")


def test_a_dataset_is_not_overwritten_by_another(tmp_path):
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2)
    out = tmp_path / "out"
    convert(tmp_path / "a.pkl", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert "already holds exactly this" in convert(tmp_path / "a.pkl", out).stdout
    assert "--overwrite=True" in refused("prepare.py", tmp_path / "b.pkl", f"--out={out}")
    assert "--overwrite=True" in refused("prepare.py", tmp_path / "a.pkl", f"--out={out}", "--seed=1")
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    convert(tmp_path / "b.pkl", out, "--overwrite=True")
    assert load(out)[1]["val"][0]["key"].startswith("key 2.")


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack, name",
    [
        (Call(os.system, "touch owned"), "posix.system"),
        (Call(builtins.eval, "open('owned', 'w')"), "builtins.eval"),
        (Call(subprocess.Popen, ["touch", "owned"]), "subprocess.Popen"),
        (Call(torch.load, "owned"), "torch.serialization.load"),
        (Call(np.load, "owned", None, True), "numpy.load"),
        (Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, "touch owned"))), None),
        (Call(np._core.multiarray._reconstruct, subprocess.Popen, (0,), b"b"), "subprocess.Popen"),
        (np.array([Call(os.system, "touch owned")]), None),
    ],
)
def test_pickles_cannot_run_code(tmp_path, monkeypatch, attack, name):
    monkeypatch.chdir(tmp_path)
    make_pickle(tmp_path / "e.pkl", extra=attack)
    with pytest.raises(prepare.DataError) as e:
        prepare.load_pickle(tmp_path / "e.pkl")
    assert not (tmp_path / "owned").exists() and "\n" not in str(e.value)
    assert name is None or name in str(e.value)


def bad(tmp_path, **changes):
    make_pickle(tmp_path / "e.pkl", **changes)
    out = tmp_path / "out"
    line = refused("prepare.py", tmp_path / "e.pkl", f"--out={out}")
    assert not (out / "meta.json").exists() and not (out.exists() and any(out.iterdir()))
    return line


def test_bad_input(tmp_path):
    nan = torch.randn(40, 4, 5)
    nan[3, 2, 1], nan[7, 0, 0] = float("nan"), float("inf")
    assert "2 of 40 samples" in (line := bad(tmp_path, **{TARGET: nan})) and "sample 3 (key 'key 0.3')" in line
    assert "40 conditions but 39 targets" in bad(tmp_path, **{TARGET: torch.randn(39, 4, 5)})
    assert "5 target tokens are not a square" in bad(tmp_path, **{TARGET: torch.randn(40, 5, 5)})
    assert "int64" in bad(tmp_path, **{COND: torch.ones(40, 4, 5, dtype=torch.int64)})
    assert "(40, 0, 5)" in bad(tmp_path, **{COND: torch.ones(40, 0, 5)})
    assert "2 keys for 40 samples" in bad(tmp_path, keys=["a", "b"])
    assert "keys is not a list of strings" in bad(tmp_path, keys=[[1]] * 40)
    assert "'same' is there twice" in bad(tmp_path, keys=["same"] * 40)
    line = bad(tmp_path, **{COND: None})
    assert f"no key '{COND}'" in line and f"{TARGET} (40, 4, 5)" in line
    make_pickle(tmp_path / "three.pkl", n=3)
    assert "3 samples with val_fraction=0.1" in refused(
        "prepare.py", tmp_path / "three.pkl", f"--out={tmp_path / 'out'}"
    )
    (tmp_path / "e.pkl").write_bytes((tmp_path / "three.pkl").read_bytes()[:-200])
    assert "not a readable pickle" in refused("prepare.py", tmp_path / "e.pkl", f"--out={tmp_path / 'out'}")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps([1, 2]))
    assert "holds a list" in refused("prepare.py", tmp_path / "e.pkl", f"--out={tmp_path / 'out'}")
    assert "no such file" in refused("prepare.py", tmp_path / "nowhere.pkl", f"--out={tmp_path / 'out'}")
    (tmp_path / "empty").mkdir()
    assert "without .pkl" in refused("prepare.py", tmp_path / "empty", f"--out={tmp_path / 'out'}")
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2, C=7)
    assert "b.pkl" in refused("prepare.py", tmp_path / "a.pkl", tmp_path / "b.pkl", f"--out={tmp_path / 'out'}")


def test_grid_of_tokens_that_are_not_a_square(tmp_path):
    make_pickle(tmp_path / "e.pkl", grid=(2, 3))
    convert(tmp_path / "e.pkl", tmp_path / "out", "--grid=2x3")
    assert load(tmp_path / "out")[0]["meta"]["grid"] == [2, 3]
    assert "--grid=4x3" in refused("prepare.py", tmp_path / "e.pkl", f"--out={tmp_path / 'o2'}", "--grid=4x3")


def test_incomplete_and_damaged_datasets_are_refused(dataset, tmp_path):
    with pytest.raises(prepare.DataError, match="does not exist; make it with: python prepare.py"):
        prepare.open_dataset(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dataset.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "stats.npz").write_bytes(b"PK")
    with pytest.raises(prepare.DataError, match="damaged"):
        prepare.open_dataset(copy)
    (copy / "stats.npz").write_bytes((dataset / "stats.npz").read_bytes())
    np.save(copy / "val_cond.npy", np.zeros((3, 4, 6), np.float32))
    with pytest.raises(prepare.DataError, match="damaged: val_cond.npy has shape"):
        prepare.open_dataset(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(prepare.DataError, match="incomplete"):
        prepare.open_dataset(copy)
