import datetime
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prepare
import sample
from conftest import ROOT, TINY, make_pickle, refused, run
from plumbing import sources
from plumbing.configurator import configure
from plumbing.dataset import FILES, open_dataset
from plumbing.sources import DataError

COND, TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"


def convert(source, out, *args):
    sources = source if isinstance(source, list) else [source]
    return run("prepare.py", *sources, f"--out={out}", "--val_fraction=0.25", *args)


def prepare_here(sources, out, **options):
    """The same in this process."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags = [f"--out={out}", "--val_fraction=0.25", *flags]
    config = configure(vars(prepare), flags)
    prepare.prepare(sources, config)


def load(out):
    data = open_dataset(out)
    items = {
        which: [
            json.loads(line) for line in (out / f"{which}_items.jsonl").read_text().splitlines()
        ]
        for which in ("train", "val")
    }
    return data, items


def test_round_trip(tmp_path):
    content = make_pickle(tmp_path / "e.pkl")
    done = convert(tmp_path / "e.pkl", tmp_path / "out")
    assert "train_cond.npy    (30, 4, 6)" in done.stdout and "grid 2x2" in done.stdout
    assert "0 of 40 samples" in done.stderr and done.stderr.endswith("\n")
    data, items = load(tmp_path / "out")
    train, val = prepare.split(40, 0.25, 0)
    assert len(val) == 10 and sorted([*train, *val]) == list(range(40))
    for which, rows in (("train", train), ("val", val)):
        for name, key in (("cond", COND), ("target", TARGET)):
            array = data[f"{which}_{name}"]
            assert array.dtype == np.float32 and np.array_equal(array, content[key][rows].numpy())
        assert items[which] == [
            {"key": content["keys"][i], "caption": content["captions"][i]} for i in rows
        ]
    for name, key in (("cond", COND), ("target", TARGET)):
        x = content[key][train].double().flatten(0, 1).numpy()
        assert data["stats"][f"{name}_mean"].dtype == np.float64
        assert np.allclose(data["stats"][f"{name}_mean"], x.mean(0), atol=1e-12)
        assert np.allclose(data["stats"][f"{name}_std"], x.std(0), atol=1e-10)
    meta = data["meta"]
    assert meta["config"] == {"eva_model": "test"} and meta["grid"] == [2, 2]
    assert meta["settings"]["seed"] == 0 and meta["settings"]["val_fraction"] == 0.25
    size = (tmp_path / "e.pkl").stat().st_size
    assert meta["sources"] == [{"path": str(tmp_path / "e.pkl"), "bytes": size}]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["f2", ">f4", "f8", "fortran", torch.float16, torch.bfloat16])
def test_every_kind_of_array(tmp_path, kind, protocol):
    make = {"fortran": lambda x: np.asfortranarray(x.numpy())}.get(
        kind,
        (lambda x: x.to(kind))
        if isinstance(kind, torch.dtype)
        else lambda x: x.numpy().astype(kind),
    )
    content = make_pickle(tmp_path / "e.pkl")
    for key in (COND, TARGET):
        content[key] = make(content[key])
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    prepare_here([tmp_path / "e.pkl"], tmp_path / "out")
    array = open_dataset(tmp_path / "out")["val_cond"]
    kept = {"f2": "f2", "f8": "f8", torch.float16: "f2"}.get(
        kind, "f4"
    )  # bfloat16 has no numpy type: widened
    want = content[COND][prepare.split(40, 0.25, 0)[1]]
    want = want.double().numpy() if isinstance(want, torch.Tensor) else want
    assert array.dtype == np.dtype(kept) and np.array_equal(array.astype("f8"), want.astype("f8"))


def test_tensor_views_and_spatial_grids(tmp_path):
    big = torch.randn(80, 6, 6, 7)
    content = {
        COND: big[::2, 1:3, 2:5, :6].transpose(1, 2),
        TARGET: big[1::2, :2, :3].transpose(1, 2),
    }
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    convert(tmp_path / "e.pkl", tmp_path / "out", "--grid=3x2")
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
    contents = [
        make_pickle(shards / f"embeddings_shard_{i}.pkl", n=n, seed=i)
        for i, n in ((2, 10), (10, 13))
    ]
    (shards / "embeddings_manifest.json").write_text('{"total_samples": 23}')
    convert(shards, tmp_path / "out")
    data, items = load(tmp_path / "out")
    train, val = prepare.split(23, 0.25, 0)
    whole = torch.cat([c[COND] for c in contents])
    assert np.array_equal(data["train_cond"], whole[train]) and np.array_equal(
        data["val_cond"], whole[val]
    )
    assert [i["key"] for i in items["val"]] == [
        (contents[0]["keys"] + contents[1]["keys"])[i] for i in val
    ]
    convert(
        [shards / "embeddings_shard_2.pkl", shards / "embeddings_shard_10.pkl"], tmp_path / "again"
    )
    assert np.array_equal(load(tmp_path / "again")[0]["train_cond"], data["train_cond"])
    for manifest, message in (
        ('{"total_samples": 24}', "promises 24 samples, the files hold 23"),
        ('{"samples": 23}', "promises None samples, the files hold 23"),
    ):
        (shards / "embeddings_manifest.json").write_text(manifest)
        with pytest.raises(DataError, match=message):
            prepare_here([shards], tmp_path / "bad")


def test_a_dataset_is_overwritten_only_on_demand(tmp_path):
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    convert(tmp_path / "a.pkl", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    for source in ("a.pkl", "b.pkl"):
        assert "--overwrite=True" in refused("prepare.py", tmp_path / source, f"--out={out}")
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    convert(tmp_path / "b.pkl", out, "--overwrite=True")
    assert load(out)[1]["val"][0]["key"].startswith("key 2.")
    assert (out / "notes.txt").read_text() == "mine"
    pair = out / "train_cond.npy", out / "train_target.npy"
    line = refused(
        "prepare.py", *pair, f"--out={tmp_path}/../{tmp_path.name}/out", "--overwrite=True"
    )
    assert "train_cond.npy is both a source and a file to be written" in line
    (out / "meta.json").rename(tmp_path / "meta.json")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    (tmp_path / "link.npy").symlink_to(out / "train_target.npy")
    for pair in ((out / "train_cond.npy", out / "train_target.npy"),
                 (tmp_path / "link.npy", tmp_path / "link.npy")):  # fmt: skip
        for flags in ({}, {"overwrite": True}):  # what is not ours is never overwritten
            with pytest.raises(DataError, match="holds train_cond.npy, but no dataset of"):
                prepare_here(pair, out, **flags)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    (tmp_path / "meta.json").rename(out / "meta.json")
    assert load(out)[1]["val"][0]["key"].startswith("key 2.")


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_output_that_nobody_takes_ends_nothing(tmp_path, kind):
    """prepare.py > /dev/full 2>&1; prepare.py 2>&1 | true"""
    make_pickle(tmp_path / "a.pkl")
    where = "> /dev/full 2>&1" if kind == "full disk" else "2>&1 | true"
    command = f'"$0" prepare.py {tmp_path}/a.pkl --out={tmp_path}/out {where}'
    code = subprocess.run(["bash", "-o", "pipefail", "-c", command, sys.executable], cwd=ROOT)
    assert code.returncode == 0 and len(open_dataset(tmp_path / "out")["val_cond"]) == 4


def test_a_path_that_ascii_lacks(tmp_path):
    folder = tmp_path / "größe"
    folder.mkdir()
    make_pickle(folder / "a.pkl")
    ascii = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", fork=False)
    done = run("prepare.py", folder / "a.pkl", f"--out={folder / 'data'}", **ascii)
    assert "gr\\xf6" in done.stdout
    run("train.py", *TINY, f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}", **ascii)
    run("sample.py", f"--out_dir={folder / 'out'}", "--steps=1", "--draws=1", **ascii)
    run("-m", "report.plot", folder / "out", **ascii)


def test_a_home_folder_is_expanded(tmp_path):
    make_pickle(tmp_path / "e.pkl")
    run("prepare.py", tmp_path / "e.pkl", "--out=~/out", HOME=str(tmp_path))
    assert len(open_dataset(tmp_path / "out")["val_cond"]) == 4


def test_other_token_counts(tmp_path):
    make_pickle(tmp_path / "e.pkl", **{COND: torch.randn(40, 9, 6)})
    line = "9 condition and 4 target tokens: the model will use cross-attention;"
    assert line in convert(tmp_path / "e.pkl", tmp_path / "out").stdout
    data = open_dataset(tmp_path / "out")
    assert data["val_cond"].shape == (10, 9, 6) and data["val_target"].shape == (10, 4, 5)
    assert data["meta"]["grid"] == [2, 2]
    make_pickle(tmp_path / "e.pkl", **{COND: torch.randn(40, 5, 6)})
    out = convert(tmp_path / "e.pkl", tmp_path / "one more").stdout
    assert "5 condition and 4 target tokens" in out and "--drop_cls=True aligns them" in out
    out = convert(tmp_path / "e.pkl", tmp_path / "aligned", "--drop_cls=True").stdout
    assert "cross-attention" not in out
    assert open_dataset(tmp_path / "aligned")["val_cond"].shape == (10, 4, 6)


def refused_here(sources, out, **options):
    """The error of sources that are no dataset; nothing of one is left."""
    with pytest.raises(DataError) as e:
        prepare_here(sources, out, **options)
    assert not list(out.glob("*"))
    return str(e.value)


def bad(tmp_path, **changes):
    make_pickle(tmp_path / "e.pkl", **changes)
    return refused_here([tmp_path / "e.pkl"], tmp_path / "out")


def test_a_mistake_gets_one_line(tmp_path):
    make_pickle(tmp_path / "e.pkl", **{TARGET: torch.randn(39, 4, 5)})
    source, out = tmp_path / "e.pkl", f"--out={tmp_path / 'out'}"
    assert "40 conditions but 39 targets" in refused("prepare.py", source, out)
    assert "no such file" in refused("prepare.py", tmp_path / "nowhere.pkl", out)
    assert "python prepare.py SRC" in refused("prepare.py", out)
    assert "python prepare.py SRC" in refused("prepare.py", source)
    assert "did you mean 'pool'" in refused("prepare.py", source, out, "--pol=2")
    assert "write --key=value" in refused("prepare.py", source, "--out")
    for wrong in ("pool=0", "seed=-1", "val_fraction=-1.0"):
        assert f"{wrong} must be" in refused("prepare.py", source, out, f"--{wrong}")
    assert not (tmp_path / "out").exists()


def test_bad_values(tmp_path):
    nan = torch.randn(40, 4, 5)
    nan[3, 2, 1], nan[7, 0, 0] = float("nan"), float("inf")
    line = bad(tmp_path, **{TARGET: nan})
    assert "in 2 of 40 samples" in line and "sample 3 (key 'key 0.3')" in line
    assert "5 tokens of 5 channels are not clearly a square" in bad(
        tmp_path, **{c: torch.randn(40, 5, 5) for c in (COND, TARGET)}
    )
    assert "int64" in bad(tmp_path, **{COND: torch.ones(40, 4, 5, dtype=torch.int64)})
    assert "complex64" in bad(tmp_path, **{TARGET: torch.ones(40, 4, 5, dtype=torch.complex64)})
    assert "(40, 0, 5)" in bad(tmp_path, **{COND: torch.ones(40, 0, 5)})
    assert "list of 0; expected floats" in bad(tmp_path, **{COND: []})


def test_bad_keys_and_captions(tmp_path):
    assert "keys is not a list of 40" in bad(tmp_path, keys=["a", "b"])
    hostile = np.frombuffer(b"\xff\xff\xff\x7f" * 40, "<U1")  # no such character
    for keys in (hostile, "x" * 40, {1, 2}, datetime.date(2020, 1, 1)):
        assert "e.pkl: keys is not a list of 40" in bad(tmp_path, keys=keys)
    for keys, found in (
        ([[1]] * 40, "list of 1"),
        ([0.5] * 40, "<float>"),
        (np.ones(40), "<float>"),
        ([True] * 40, "<bool>"),
        ([datetime.date(2020, 1, 1)] * 40, "<datetime.date>"),
    ):
        assert f"e.pkl: keys hold {found}, not text or integers" in bad(tmp_path, keys=keys)
    for captions in (["c" * 200 * 40] * 40, [["c", "d"] * 10_000] * 40):
        assert "captions repeat the same strings" in bad(tmp_path, captions=captions)
    line = bad(tmp_path, captions=[["a", Path("b")]] * 40)
    assert "e.pkl: captions hold <pathlib.PosixPath>, not text or integers" in line


def test_several_captions_per_image(tmp_path):
    captions = [["a cat", "a pet"], "one", [], None, ("x", "y")] * 8
    for i, kept in enumerate((captions, np.array(captions, object))):
        make_pickle(tmp_path / "e.pkl", captions=kept, labels=[[1, 2], 3] * 20)
        prepare_here([tmp_path / "e.pkl"], tmp_path / f"{i}")
        for row, item in zip(prepare.split(40, 0.25, 0)[1], load(tmp_path / f"{i}")[1]["val"]):
            expected = captions[row]
            assert item["caption"] == (list(expected) if type(expected) is tuple else expected)
            assert item["label"] == ([1, 2], 3)[row % 2]


def test_a_warning_of_repeated_keys(tmp_path, capsys):
    paths = [tmp_path / f"{i}.pkl" for i in range(3)]
    keys = [[0, 1, "2"], ["0", 1, None], [0, 1, None]]
    for path, named in zip(paths, keys):
        make_pickle(path, n=3, keys=named)
    prepare_here(paths, tmp_path / "out")
    assert "WARNING: 3 samples have the key of an earlier one" in capsys.readouterr().out
    prepare_here(paths[:1], tmp_path / "one")
    assert "WARNING" not in capsys.readouterr().out


def test_bad_samples_are_left_out_on_demand(tmp_path, capsys):
    content = make_pickle(tmp_path / "e.pkl", n=12, seed=1)
    more = make_pickle(tmp_path / "f.pkl", n=1500, seed=2)
    content[COND][3, 2, 1] = float("nan")
    more[TARGET][7, 0, 0] = more[COND][7, 0, 0] = float("inf")
    more[TARGET][1499, 3, 4] = float("nan")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(more))
    pair = [tmp_path / "e.pkl", tmp_path / "f.pkl"]
    line = refused_here(pair, tmp_path / "out")
    assert "in 3 of 1512 samples, the first in sample 3 (key 'key 1.3'); --skip_bad=True" in line
    prepare_here(pair, tmp_path / "out", skip_bad=True)
    line = "3 of 1512 samples, left out: sample 3 (key 'key 1.3'), sample 19 (key 'key 2.7'), "
    assert f"{line}sample 1511 (key 'key 2.1499')\n" in capsys.readouterr().out
    data, items = load(tmp_path / "out")
    split = dict(zip(("train", "val"), prepare.split(1512, 0.25, 0)))
    for which, rows in split.items():
        rows = [row for row in rows if row not in (3, 19, 1511)]
        for kind, key in (("cond", COND), ("target", TARGET)):
            whole = torch.cat([content[key], more[key]])[rows].numpy()
            assert np.array_equal(data[f"{which}_{kind}"], whole)
            assert which == "val" or np.allclose(
                data["stats"][f"{kind}_mean"], whole.mean((0, 1)), atol=1e-5
            )
        keys = content["keys"] + more["keys"]
        assert [item["key"] for item in items[which]] == [keys[row] for row in rows]
    # nothing is left
    content[COND][:] = float("nan")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    line = refused_here(pair[:1], tmp_path / "none", skip_bad=True)
    assert "in 12 of 12 samples" in line


def test_a_pickle_that_promises_another_number(tmp_path, capsys):
    make_pickle(tmp_path / "e.pkl", n=12, total_samples=999)
    prepare_here([tmp_path / "e.pkl"], tmp_path / "out")
    line = "e.pkl: its total_samples is 999, but it holds 12\n"
    assert line in capsys.readouterr().out
    make_pickle(tmp_path / "e.pkl", n=12, total_samples=np.ones(300))
    prepare_here([tmp_path / "e.pkl"], tmp_path / "array")
    assert "total_samples is array of shape (300,), float64" in capsys.readouterr().out


def test_a_config_that_json_lacks(tmp_path):
    config = {"when": datetime.date(2020, 1, 1), "scale": float("nan"), "kinds": {"a"}}
    make_pickle(tmp_path / "e.pkl", config=config, beside=Path("a"))
    prepare_here([tmp_path / "e.pkl"], tmp_path / "out")

    def refuse(name):
        raise AssertionError(name)

    meta = json.loads((tmp_path / "out" / "meta.json").read_text(), parse_constant=refuse)
    expected = {"when": "<datetime.date>", "scale": None, "kinds": "<builtins.set>"}
    assert meta["config"] == expected
    out = run("prepare.py", tmp_path / "e.pkl", "--inspect=True").stdout
    assert "'beside': <pathlib.PosixPath>\n" in out


def test_keys_are_strings_integers_or_none(tmp_path):
    mixed = ["a", 1, None] * 10
    for i, keys in enumerate((np.arange(30), np.array([f"k{i}" for i in range(30)]), mixed)):
        named = keys if isinstance(keys, list) else keys.tolist()
        make_pickle(tmp_path / "e.pkl", n=30, keys=None, captions=keys)
        prepare_here([tmp_path / "e.pkl"], tmp_path / f"{i}")
        expected = [{"key": None, "caption": named[i]} for i in prepare.split(30, 0.25, 0)[1]]
        assert load(tmp_path / f"{i}")[1]["val"] == expected


def test_bad_files(tmp_path):
    out = tmp_path / "out"
    line = bad(tmp_path, **{COND: None})
    assert f"no key '{COND}'" in line and f"'{TARGET}'" in line
    make_pickle(tmp_path / "three.pkl", n=3)
    line = refused_here([tmp_path / "three.pkl"], out, val_fraction=0.1)
    assert "3 samples with val_fraction=0.1" in line
    for data, message in (
        ((tmp_path / "three.pkl").read_bytes()[:-200], "cannot be read as embeddings"),
        (pickle.dumps({}), r"it holds \[\]"),
        (pickle.dumps([1, 2]), "holds a list of 2, not a dict"),
    ):
        (tmp_path / "e.pkl").write_bytes(data)
        assert re.search(message, refused_here([tmp_path / "e.pkl"], out))
    (tmp_path / "empty").mkdir()
    line = refused_here([tmp_path / "empty"], out)
    assert "no folder of .pkl or .pt files, of .safetensors, or of cond/*.npy" in line
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2, grid=(3, 3))
    pair = [tmp_path / "a.pkl", tmp_path / "b.pkl"]
    assert "[9, 6, 'float32', (3, 3)]" in refused_here(pair, out)
    make_pickle(tmp_path / "b.pkl", seed=2, C=7)
    assert "b.pkl" in refused_here(pair, out)
    assert "--dtype=bfloat16" in refused_here(pair[:1], out, dtype="bfloat16")


def test_grid_of_tokens_that_are_not_a_square(tmp_path):
    make_pickle(tmp_path / "e.pkl", grid=(2, 3))
    convert(tmp_path / "e.pkl", tmp_path / "out", "--grid=2x3")
    assert load(tmp_path / "out")[0]["meta"]["grid"] == [2, 3]
    out = tmp_path / "bad"
    assert "6 tokens of 5 channels are not (4, 3)" in refused_here(
        [tmp_path / "e.pkl"], out, grid="4x3"
    )
    for text in ("2", "2x", "0x6", "-2x-3", "2x3x1"):
        line = refused_here([tmp_path / "e.pkl"], out, grid=text)
        assert f"--grid={text} is not ROWSxCOLUMNS" in line


# ---------------------------------------------------------------- layouts


def arrays(source, out, **options):
    """The prepared arrays of each split, and the grid; source may be a dict to pickle."""
    if isinstance(source, dict):
        out.mkdir()
        (out / "e.pkl").write_bytes(pickle.dumps(source))
        source = [out / "e.pkl"]
    prepare_here(source, out / "data", **options)
    data = open_dataset(out / "data")
    return data, data["meta"]["grid"]


def same(data, cond, target):
    for which, rows in zip(("train", "val"), prepare.split(len(cond), 0.25, 0)):
        assert np.array_equal(data[f"{which}_cond"], cond[rows])
        assert np.array_equal(data[f"{which}_target"], target[rows])


def test_lists_of_samples_and_of_batches(tmp_path):
    cond, target = np.random.default_rng(0).standard_normal((2, 12, 4, 90), np.float32)
    same(
        arrays({COND: list(cond), TARGET: [*map(torch.tensor, target)]}, tmp_path / "a")[0],
        cond,
        target,
    )
    same(
        arrays({COND: [cond[:5], cond[5:]], TARGET: np.split(target, 4)}, tmp_path / "b")[0],
        cond,
        target,
    )
    objects = np.empty(12, object)
    objects[:] = list(cond)
    same(arrays({COND: objects, TARGET: tuple(target)}, tmp_path / "c")[0], cond, target)
    with pytest.raises(DataError, match=r"array of shape \(1, 3, 90\), float32; .* same in all"):
        arrays({COND: [cond[0], cond[0, :3]], TARGET: target[:2]}, tmp_path / "d")
    with pytest.raises(DataError, match="stack them"):
        arrays({COND: list(cond.reshape(12, 2, 2, 90)), TARGET: list(target)}, tmp_path / "grids")
    with pytest.raises(
        DataError, match="4 tokens .* not clearly a square; .*--channels_first=True"
    ):
        arrays({COND: cond[:, :, None], TARGET: target}, tmp_path / "two grids")
    with pytest.raises(DataError, match="repeats the same arrays"):
        arrays({COND: [cond] * 1000, TARGET: [target] * 1000}, tmp_path / "e")


def test_cls_tokens_are_dropped_and_grids_pooled(tmp_path):
    x = np.random.default_rng(0).standard_normal((8, 17, 6), np.float32)
    content = {COND: x[:, 1:], TARGET: torch.tensor(x)}
    data, grid = arrays(content, tmp_path / "a", drop_cls=True)
    assert grid == [4, 4]
    same(data, x[:, 1:], x[:, 1:])
    pooled = (
        torch.nn.functional.avg_pool2d(torch.tensor(x[:, 1:]).mT.reshape(8, 6, 4, 4), 2)
        .flatten(2)
        .mT.numpy()
    )
    data, grid = arrays(content, tmp_path / "b", drop_cls=True, pool=2)
    assert grid == [2, 2]
    assert all(
        np.allclose(data["val_" + name], pooled[prepare.split(8, 0.25, 0)[1]], atol=1e-6)
        for name in ("cond", "target")
    )
    data, grid = arrays(
        {COND: x[:, :12], TARGET: x[:, :12].reshape(8, 2, 6, 6)}, tmp_path / "c", pool=2, grid="2x6"
    )
    assert grid == [1, 3] and np.allclose(data["val_cond"], data["val_target"], atol=1e-6)
    assert np.allclose(
        data["train_cond"][0, 0],
        x[prepare.split(8, 0.25, 0)[0][0], [0, 1, 6, 7]].mean(0),
        atol=1e-6,
    )
    for options, message in (
        (dict(), "17 tokens of 6 channels are not clearly a square; say .* --drop_cls=True"),
        (dict(drop_cls=True, pool=3), "16 tokens are not a grid that --pool=3 divides"),
        (dict(pool=2), "17 tokens are not a grid that --pool=2 divides"),
        (dict(drop_cls=True, grid="2x9"), r"17 tokens of 6 channels are not \(2, 9\)"),
    ):
        with pytest.raises(DataError, match=message):
            arrays([tmp_path / "a" / "e.pkl"], tmp_path / "d", **options)
    data, _ = arrays({COND: x[:, 1:], TARGET: x[:, 1:]}, tmp_path / "e", drop_cls=True)
    same(data, x[:, 1:], x[:, 1:])  # there was none to drop


def test_registers_are_dropped(tmp_path):
    x = np.random.default_rng(0).standard_normal((8, 21, 6), np.float32)  # 4x4 and 5 more
    content = {COND: x, TARGET: x[:, 5:]}
    data, grid = arrays(content, tmp_path / "a", drop_tokens=5)
    assert grid == [4, 4]
    same(data, x[:, 5:], x[:, 5:])
    nine = {COND: x[:, :9], TARGET: x[:, :4]}  # nine are a grid as well
    data, grid = arrays(nine, tmp_path / "b", drop_tokens=5)
    assert grid == [2, 2]
    same(data, x[:, 5:9], x[:, :4])
    pooled = {COND: x[:, 0], TARGET: x[:, :4]}
    same(arrays(pooled, tmp_path / "c", drop_tokens=5)[0], x[:, :1], x[:, :4])
    wide = {COND: x[:, :11], TARGET: x[:, :11]}
    data, grid = arrays(wide, tmp_path / "d", drop_tokens=5, grid="2x3")
    assert grid == [2, 3]
    same(data, x[:, 5:11], x[:, 5:11])
    for options in (dict(drop_tokens=4), dict(drop_tokens=-4), dict(drop_cls=True)):
        with pytest.raises(DataError, match="21 tokens .* not clearly a square; .*--drop_tokens=5"):
            arrays({COND: x, TARGET: x}, tmp_path / f"{options}", **options)


def test_channels_first(tmp_path):
    rng = np.random.default_rng(0)
    last = rng.standard_normal((12, 4, 4, 6), np.float32)  # (N, H, W, C)
    tokens = last.reshape(12, 16, 6)
    first = np.moveaxis(last, -1, 1)  # (N, C, H, W), a view
    grids = {COND: np.ascontiguousarray(first), TARGET: torch.tensor(first)}
    with pytest.raises(DataError, match="24 tokens .*--grid=ROWSxCOLUMNS, --channels_first=True"):
        arrays(grids, tmp_path / "a")
    for i, source in enumerate(
        (
            grids,
            {COND: first, TARGET: np.ascontiguousarray(tokens.transpose(0, 2, 1))},
            {COND: list(first), TARGET: list(tokens.transpose(0, 2, 1))},
        )
    ):
        if i == 2:
            source[COND] = [x.reshape(6, 16) for x in source[COND]]
        data, grid = arrays(source, tmp_path / f"{i}", channels_first=True)
        assert grid == [4, 4]
        same(data, tokens, tokens)
    # a grid that is no square must be named in either order
    tall = {COND: tokens.reshape(12, 2, 8, 6), TARGET: tokens.reshape(12, 2, 8, 6)}
    with pytest.raises(DataError, match="16 tokens .*--grid=ROWSxCOLUMNS"):
        arrays(tall, tmp_path / "tall")
    data, grid = arrays(tall, tmp_path / "named", grid="2x8")
    assert grid == [2, 8]
    same(data, tokens, tokens)
    tall = {key: np.moveaxis(x, -1, 1) for key, x in tall.items()}
    with pytest.raises(DataError, match="16 tokens .*--grid=ROWSxCOLUMNS"):
        arrays(tall, tmp_path / "first", channels_first=True)
    data, grid = arrays(tall, tmp_path / "both", grid="2x8", channels_first=True)
    assert grid == [2, 8]
    same(data, tokens, tokens)
    pooled = {COND: tokens[:, 0], TARGET: tokens[:, 0]}
    same(arrays(pooled, tmp_path / "pooled", channels_first=True)[0], tokens[:, :1], tokens[:, :1])


def test_tokens_that_look_like_channels_are_asked_about(tmp_path):
    """(N, channels, tokens) is not taken for (N, tokens, channels)."""

    def is_unclear(*shape, **options):
        np.save(tmp_path / "x.npy", np.zeros((1, *shape), np.float16))
        content = sources.load_pickle(tmp_path / "x.npy")
        return sources.Rows(content, "array", tmp_path / "x.npy", **options).is_unclear

    channels = (384, 512, 768, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048, 3072, 4096)
    for width in channels:
        for tokens in (16, 49, 64, 144, 196, 256, 257, 261, 576, 577, 729):
            assert not is_unclear(tokens, width) and is_unclear(width, tokens)
        assert not is_unclear(1024, width) and not is_unclear(32, 32, width)
    for tokens, width in ((16, 16), (16, 4), (64, 8), (256, 16), (1369, 1024), (77, 768)):
        assert not is_unclear(tokens, width)
    assert not is_unclear(768) and not is_unclear(32, 32, 256)

    x = np.random.default_rng(0).standard_normal((8, 1024, 256), np.float32)
    line = "1024 tokens of 256 channels .*--grid=ROWSxCOLUMNS, --channels_first=True"
    for kind, source in enumerate(({COND: x, TARGET: x[:, :4]}, {COND: x[:, :4], TARGET: x})):
        with pytest.raises(DataError, match=line):
            arrays(source, tmp_path / f"{kind}")
    data, grid = arrays([tmp_path / "1" / "e.pkl"], tmp_path / "right", grid="32x32")
    assert grid == [32, 32]
    same(data, x[:, :4], x)
    turned = x.transpose(0, 2, 1)
    data, grid = arrays({COND: x, TARGET: x}, tmp_path / "turned", channels_first=True)
    assert grid == [16, 16]
    same(data, turned, turned)


def test_npy_pairs(tmp_path):
    cond, target = np.random.default_rng(0).standard_normal((2, 12, 4, 9), np.float32)
    for i in (0, 1):
        np.save(tmp_path / f"cond_{i}.npy", cond[6 * i : 6 * i + 6])
        np.save(tmp_path / f"target_{i}.npy", np.asfortranarray(target[6 * i : 6 * i + 6]))
    paths = [tmp_path / f"{name}_{i}.npy" for name in ("cond", "target") for i in (0, 1)]
    convert(paths, tmp_path / "out")
    same(open_dataset(tmp_path / "out"), cond, target)
    assert "3 .npy files: name all conditions first" in refused(
        "prepare.py", *paths[:3], f"--out={tmp_path / 'o'}"
    )


def test_pooled_embeddings_are_one_token(tmp_path):
    """Arrays (N, D), or lists of vectors, on both sides or on one."""
    rng = np.random.default_rng(0)
    cond = rng.standard_normal((12, 7), np.float32)
    target = rng.standard_normal((12, 5), np.float32)
    grids = rng.standard_normal((12, 4, 5), np.float32)
    pooled = cond[:, None], target[:, None]  # one token each
    np.save(tmp_path / "c.npy", cond)
    np.save(tmp_path / "t.npy", np.asfortranarray(target))
    for i, source in enumerate(
        (
            {COND: cond, TARGET: torch.tensor(target)},
            {COND: list(cond), TARGET: [*map(torch.tensor, target)]},
            [tmp_path / "c.npy", tmp_path / "t.npy"],
        )
    ):
        data, grid = arrays(source, tmp_path / f"{i}", drop_cls=True)
        assert grid == [1, 1]
        same(data, *pooled)
    data, grid = arrays({COND: cond, TARGET: grids}, tmp_path / "to grid")
    assert grid == [2, 2]
    same(data, pooled[0], grids)
    data, grid = arrays({COND: grids, TARGET: target}, tmp_path / "from grid")
    assert grid == [1, 1]
    same(data, grids, pooled[1])
    data, grid = arrays({COND: cond, TARGET: grids}, tmp_path / "smaller", pool=2)
    train, _ = prepare.split(12, 0.25, 0)
    assert grid == [1, 1] and np.array_equal(data["train_cond"], pooled[0][train])
    assert np.allclose(data["train_target"], grids.mean(1, keepdims=True)[train], atol=1e-6)
    with pytest.raises(DataError, match=r"1 tokens of 5 channels are not \(2, 2\)"):
        arrays({COND: grids, TARGET: target}, tmp_path / "asked", grid="2x2")
    with pytest.raises(DataError, match="1 conditions but 12 targets"):
        arrays({COND: [cond[0]], TARGET: target}, tmp_path / "one")


def save_pairs(folder, **lists):
    """One .npy per array, in the folders cond and target; the names are not in natural order."""
    for kind, values in lists.items():
        (folder / kind).mkdir(parents=True)
        for i, x in enumerate(values):
            np.save(folder / kind / f"s{i}.npy", x)


def test_folders_of_npy_pairs(tmp_path):
    rng = np.random.default_rng(0)
    cond = rng.standard_normal((12, 4, 9), np.float32)
    target = rng.standard_normal((12, 5), np.float32).astype("f2")
    save_pairs(tmp_path / "a", cond=cond, target=target)  # one sample per file
    data, grid = arrays([tmp_path / "a"], tmp_path / "1")
    same(data, cond, target[:, None])
    assert grid == [1, 1]
    named = [item["key"] for item in load(tmp_path / "1" / "data")[1]["val"]]
    assert named == [f"s{i}" for i in prepare.split(12, 0.25, 0)[1]]  # s2 before s10
    assert (len(data["meta"]["sources"])) == 24
    out = run("prepare.py", tmp_path / "a", "--inspect=True").stdout
    assert "s2.npy:\n  'array': array of shape (1, 4, 9), float32; 1 samples, the first 1" in out
    # batches, of any number of samples; two such folders
    save_pairs(
        tmp_path / "b", cond=[cond[:1], cond[1:9]], target=[target[:1, None], target[1:9, None]]
    )
    save_pairs(tmp_path / "c", cond=[cond[9:]], target=[target[9:, None]])
    data, _ = arrays([tmp_path / "b", tmp_path / "c"], tmp_path / "2")
    same(data, cond, target[:, None])
    assert load(tmp_path / "2" / "data")[1]["val"][0] == {"key": None, "caption": None}
    # the same pooled arrays, named as files, are batches
    save_pairs(tmp_path / "d", cond=[cond[:, 0]], target=[target])
    files = [tmp_path / "d" / "cond" / "s0.npy", tmp_path / "d" / "target" / "s0.npy"]
    same(arrays(files, tmp_path / "3")[0], cond[:, :1], target[:, None])


def test_bad_folders_of_npy_pairs(tmp_path):
    save_pairs(tmp_path / "a", cond=np.ones((12, 4, 9)), target=np.ones((12, 4, 9)))
    paths = {kind: tmp_path / "a" / kind / "s7.npy" for kind in ("cond", "target")}
    paths["target"].rename(tmp_path / "s7.npy")
    assert f"{paths['target']}: " in refused("prepare.py", tmp_path / "a", f"--out={tmp_path}/out")
    paths["cond"].unlink()
    (tmp_path / "s7.npy").rename(paths["target"])
    line = refused_here([tmp_path / "a"], tmp_path / "out")
    assert f"{paths['cond']}: " in line and "No such file" in line
    for wrong, message in (
        (np.ones((3, 9)), f"{paths['cond']}: cond is"),
        (np.ones((2, 4, 9)), f"{paths['cond']}: 2 conditions but 1 targets"),
        (
            np.ones((4, 9), int),
            f"{paths['cond']}: array: array of shape (1, 4, 9), int64; expected",
        ),
        (np.ones(()), "array of shape (1,), float64; expected floats"),
    ):
        np.save(paths["cond"], wrong)
        assert message in refused_here([tmp_path / "a"], tmp_path / "out")
    paths["cond"].write_bytes(pickle.dumps({"a": 1}))
    assert "no key 'array'" in refused_here([tmp_path / "a"], tmp_path / "out")


def test_open_files_do_not_grow_with_a_folder_of_pairs(tmp_path):
    save_pairs(tmp_path / "a", cond=np.ones((200, 4, 9)), target=np.ones((200, 4, 9)))
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
    script = (
        f"import sys, runpy; sys.argv.pop(0); {few}; runpy.run_path('prepare.py', None, '__main__')"
    )
    run("-c", script, "prepare.py", tmp_path / "a", f"--out={tmp_path / 'out'}")
    assert len(open_dataset(tmp_path / "out")["val_cond"]) == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors(tmp_path, dtype):
    content = make_pickle(tmp_path / "e.pkl", n=12)
    content = {key: content[key].to(dtype) for key in (COND, TARGET)}
    wide = [x.float() if dtype == torch.bfloat16 else x for x in content.values()]
    names = {"keys": torch.arange(12), "mask": torch.ones(3, dtype=torch.bool)}
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, rows in ((2, slice(5)), (10, slice(5, 12))):
        part = {key: x[rows].contiguous() for key, x in content.items()}
        save_file(part, folder / f"e_{i}.safetensors", metadata={"made": "by hand"})
    save_file(content | names, tmp_path / "e.safetensors")
    pair = [folder / "e_2.safetensors", folder / "e_10.safetensors"]
    for i, source in enumerate(([tmp_path / "e.safetensors"], pair, [folder])):
        same(arrays(source, tmp_path / f"{i}")[0], *wide)
    items = load(tmp_path / "0" / "data")[1]["val"]
    assert [item["key"] for item in items] == prepare.split(12, 0.25, 0)[1].tolist()
    out = run("prepare.py", tmp_path / "e.safetensors", "--inspect=True").stdout
    kind = str(dtype).removeprefix("torch.")
    assert f"'{COND}': array of shape (12, 4, 6), {kind}; 12 samples, the first 8 from" in out
    assert "'mask': array of shape (3,), bool\n" in out
    conditions, _ = sample.read_conditions(tmp_path / "e.safetensors", COND)
    assert np.array_equal(conditions[:], wide[0])


def test_labels_are_kept(tmp_path):
    for i, labels in enumerate((list("abc") * 10, np.arange(30), torch.arange(30))):
        make_pickle(tmp_path / "e.pkl", n=30, labels=labels)
        prepare_here([tmp_path / "e.pkl"], tmp_path / f"{i}")
        val = prepare.split(30, 0.25, 0)[1]
        values = list(labels) if isinstance(labels, list) else labels.tolist()
        assert load(tmp_path / f"{i}")[1]["val"] == [
            {"key": f"key 0.{i}", "caption": f"caption 0.{i}", "label": values[i]} for i in val
        ]
        out = run("prepare.py", tmp_path / "e.pkl", "--inspect=True").stdout
        assert re.search("'labels': (list of 30|array of)", out)
    assert "labels is not a list of 40" in bad(tmp_path, labels=["a", "b"])
    assert "labels hold <float>, not text or integers" in bad(tmp_path, labels=[0.5] * 40)


def test_output_dtype(tmp_path):
    x = np.random.default_rng(0).standard_normal((8, 4, 60), np.float32)
    for source in (x, torch.tensor(x).bfloat16(), x.astype("f8"), x.astype("f2")):
        for dtype in ("float16", "float32"):
            data, _ = arrays(
                {COND: source, TARGET: source}, tmp_path / f"{source.dtype}{dtype}", dtype=dtype
            )
            want = source.float().numpy() if isinstance(source, torch.Tensor) else source
            same(data, want.astype(dtype), want.astype(dtype))
            wide = (
                data["train_cond"].astype("f8").reshape(-1, 60)
            )  # statistics are of what is stored
            assert np.allclose(data["stats"]["cond_std"], wide.std(0), rtol=1e-12)
    x[5, 3, 2] = -70000
    with pytest.raises(DataError, match="too large values in 1 of 8 .* the first in sample 5"):
        arrays({COND: x, TARGET: x}, tmp_path / "over", dtype="float16")
    wide = {COND: 0 * x, TARGET: torch.tensor(x).bfloat16()}
    with pytest.raises(DataError, match="too large values in 1 of 8 .* the first in sample 5"):
        arrays(wide, tmp_path / "over16", dtype="float16")
    x[5, 3, 2] = np.inf
    with pytest.raises(
        DataError,
        match=r"in 1 of 8 samples, the first in sample 5 \(key None\); --skip_bad=True",
    ):
        arrays({COND: x, TARGET: x}, tmp_path / "inf", dtype="float16")
    huge = x.astype("f8")
    huge[5, 3, 2] = 1e200  # its square is Inf
    with pytest.raises(DataError, match="in 1 of 8 samples, the first in sample 5"):
        arrays({COND: np.zeros_like(x), TARGET: huge}, tmp_path / "huge")
    x[5, 3, 2] = 1
    arrays({COND: x, TARGET: x}, tmp_path / "one")
    arrays({COND: x.astype("f2"), TARGET: x}, tmp_path / "two")
    with pytest.raises(DataError, match="in .*e.pkl"):
        arrays([tmp_path / "one" / "e.pkl", tmp_path / "two" / "e.pkl"], tmp_path / "mixed")


def test_sums_are_exact_for_every_float16():
    finite = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)].reshape(-1, 1, 2)
    for dtype in (np.float16, np.float32, np.float64):
        x = finite.astype(dtype)
        wide = x[:, 0].astype(np.float64)
        sums = prepare.moments(x).sum(0)
        expected = [[len(x)] * 2, wide.sum(0), (wide**2).sum(0)]
        assert np.allclose(sums, expected, rtol=1e-13, atol=0)
        for value in (np.inf, -np.inf, np.nan):
            bad = x.copy()
            bad[1, 0, 1] = value
            is_finite = np.isfinite(prepare.moments(bad)).all((1, 2))
            assert np.flatnonzero(~is_finite).tolist() == [1]


# ---------------------------------------------------------------- memory


WATCH = """if True:
    import sys, threading, time
    sys.path.insert(0, sys.argv.pop(1))
    import prepare, re
    peak = 0
    def watch():
        global peak
        while True:
            status = open("/proc/self/status").read()
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) // 1024)
            time.sleep(0.002)
    threading.Thread(target=watch, daemon=True).start()
    prepare.main()
    print("peak", peak)
"""


@pytest.mark.parametrize("kind", ["numpy", "fortran", "tensor", "zip", "zip of numpy", "list"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    x = (
        np.random.default_rng(0)
        .integers(0, 0x3C00, (100, 64, 2048), dtype=np.uint16)
        .view(np.float16)
    )
    x = np.tile(x, (12, 1, 1))  # 315 MB
    x = {
        "fortran": np.asfortranarray,
        "tensor": torch.tensor,
        "zip": torch.tensor,
        "list": list,
    }.get(kind, np.asarray)(x)
    content = {COND: x, TARGET: np.zeros((1200, 64, 5), np.float32)}
    with open(tmp_path / "e.pkl", "wb") as f:
        if kind.startswith("zip"):
            torch.save(content, f, pickle_protocol=4)
        else:
            pickle.dump(content, f, protocol=4)
    del x, content
    out = run("-c", WATCH, ROOT, tmp_path / "e.pkl", f"--out={tmp_path / 'out'}").stdout
    assert int(out.split("peak ")[1]) < 150, out  # MB, numpy included
    (tmp_path / "e.pkl").unlink()


def test_memory_per_sample(tmp_path):
    """At most 20 bytes, in shards with keys: the arrays that grow are counted, and nothing else."""
    for i in range(20):
        x = np.zeros((2000, 1), np.float16)
        keys = [f"key {i}.{k}" for k in range(2000)]
        content = {COND: x, TARGET: x, "keys": keys}
        (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps(content))
    script = """if True:
        import sys, tracemalloc, json; sys.path.insert(0, sys.argv.pop(1))
        import prepare
        from plumbing.configurator import configure
        config = configure(vars(prepare), sys.argv[1:2])
        peaks = []
        for n in (5, 5, 20):  # the first one takes what is there once
            tracemalloc.start()
            prepare.prepare([f"{sys.argv[2]}/{i}.pkl" for i in range(n)], config)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            prepare.overwrite = True
        print((peaks[2] - peaks[1]) / 30_000)
    """
    done = run("-c", script, ROOT, f"--out={tmp_path / 'out'}", tmp_path)
    assert float(done.stdout.splitlines()[-1]) < 20


# ---------------------------------------------------------------- accidents


KILL = """if True:
    import sys, os, signal
    sys.path.insert(0, sys.argv.pop(1))
    name, calls = sys.argv.pop(1), int(sys.argv.pop(1))
    import prepare
    owner = os if hasattr(os, name) else prepare
    original = getattr(owner, name)
    def kill(*args):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(owner, name, kill)
    prepare.main()
"""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "call", ["moments 1", "statistics 1", "replace 1", "replace 4", "replace 8"]
)
def test_killed_at_any_moment(tmp_path, call, old):
    """What is left is no dataset, or the old one; the next run starts clean."""
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2)
    out = tmp_path / "out"
    if old:
        convert(tmp_path / "a.pkl", out)
    args = (
        ROOT,
        *call.split(),
        tmp_path / "b.pkl",
        f"--out={out}",
        "--val_fraction=0.25",
        "--overwrite=True",
    )
    assert run("-c", KILL, *args, check=False).returncode == -signal.SIGKILL
    if old and not call.startswith("replace"):
        assert load(out)[1]["val"][0]["key"].startswith("key 1.")
    else:
        with pytest.raises(ValueError, match="incomplete|does not exist"):
            open_dataset(out)
    convert(tmp_path / "b.pkl", out, "--overwrite=True")
    assert load(out)[1]["val"][0]["key"].startswith("key 2.")
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "meta.json"])


def test_interrupted_or_out_of_disk(tmp_path):
    make_pickle(tmp_path / "a.pkl", seed=1)
    make_pickle(tmp_path / "b.pkl", seed=2)
    out = tmp_path / "out"
    convert(tmp_path / "a.pkl", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    args = tmp_path / "b.pkl", f"--out={out}", "--overwrite=True"
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    assert "too large" in (
        line := refused(
            "-c", KILL.replace("import prepare", f"import prepare; {full}"), ROOT, "link", 1, *args
        )
    )
    assert (
        "no new dataset was left" in line
        and {p.name: p.read_bytes() for p in out.iterdir()} == before
    )
    pause = KILL.replace("import prepare", "import prepare; prepare.moments = lambda x: input()")
    process = subprocess.Popen(
        [sys.executable, "-c", pause, ROOT, "link", "1", *map(str, args)],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(out.glob(".partial-*/*.npy")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    last = process.communicate("\n" * 9, timeout=120)[1].splitlines()[-1]  # the thread ends too
    assert "error: interrupted" in last and process.returncode == 1
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# ---------------------------------------------------------------- looking


def test_inspect_converts_nothing(tmp_path):
    content = make_pickle(tmp_path / "e.pkl", note="hello", grid_embeddings=np.array([1j]))
    content[TARGET][2, 1, 0] = float("nan")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    before = sorted(tmp_path.iterdir())
    out = run("prepare.py", tmp_path / "e.pkl", "--inspect=True").stdout
    low, high = content[COND][:8].min(), content[COND][:8].max()
    line = f"'{COND}': array of shape (40, 4, 6), float32; 40 samples, the first 8 from "
    assert line + f"{low:.4g} to {high:.4g}\n" in out
    line = f"'{TARGET}': array of shape (40, 4, 5), float32; 40 samples, the first 8 from "
    assert line + "nan to nan\n" in out
    assert "'grid_embeddings': array of shape (1,), complex128\n" in out
    assert "'keys': list of 40\n" in out and "'config': dict of 1\n" in out
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_of_an_array(tmp_path):
    np.save(tmp_path / "one.npy", np.ones((3, 4, 5), "f4"))
    out = run("prepare.py", tmp_path / "one.npy", "--inspect=True").stdout
    assert "'array': array of shape (3, 4, 5), float32; 3 samples, the first 3 from 1 to 1" in out


def test_conditions_from_files(tmp_path):
    """Of a .npy and of a pickle what can be converted."""
    x = np.arange(24).reshape(2, 3, 4)
    for dtype in ("f2", ">f4", "f8"):
        np.save(tmp_path / "c.npy", x.astype(dtype))
        conditions, named = sample.read_conditions(tmp_path / "c.npy", "c")
        assert len(conditions) == 2 and np.array_equal(conditions[1:], x[1:])
        assert list(named) == [{"key": None, "caption": None}] * 2
        np.save(tmp_path / "c.npy", x[:, 0].astype(dtype))  # pooled: one token each
        conditions, named = sample.read_conditions(tmp_path / "c.npy", "c")
        assert np.array_equal(conditions[:], x[:, :1]) and next(named)["key"] is None
    batches = {
        "c": [torch.tensor(x[:1]).bfloat16(), torch.tensor(x[1:]).bfloat16()],
        "keys": [1, 2],
    }
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(batches))
    conditions, named = sample.read_conditions(tmp_path / "c.pkl", "c")
    assert len(conditions) == 2 and np.array_equal(conditions[:], x)
    assert [item["key"] for item in named] == [1, 2]
    np.save(tmp_path / "scalar.npy", 1.0)
    with pytest.raises(sources.DataError, match=r"array of shape \(\), float64; expected"):
        sample.read_conditions(tmp_path / "scalar.npy", "c")
    (tmp_path / "renamed.npy").write_bytes((tmp_path / "c.pkl").read_bytes())
    assert len(sample.read_conditions(tmp_path / "renamed.npy", "c")[0]) == 2


def test_rows_of_a_file_are_sliced(tmp_path):
    """Over the borders of the arrays that hold them."""
    pieces = [
        np.random.default_rng(i).standard_normal((n, 4, 6)).astype(np.float32)
        for i, n in enumerate((3, 1, 4))
    ]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"cond": pieces}))
    content, whole = sources.load_pickle(tmp_path / "a.pkl"), np.concatenate(pieces)
    rows = sources.Rows(content, "cond", tmp_path / "a.pkl")
    assert len(rows) == 8 and np.array_equal(rows[:], whole)
    for first in range(8):
        for stop in (*range(first + 1, 9), 20):
            assert np.array_equal(rows[first:stop], whole[first:stop])
