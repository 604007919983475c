import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import sample
from conftest import ROOT, TINY, TORCHRUN, checkpoint, make_pickle, refused, run, same, train
from model import NextDiT, NextDiTConfig
from plumbing import exchange
from plumbing.checkpoint import read_weights, replace_file
from report import score


@pytest.fixture(scope="module")
def loaded(trained):
    return sample.load(trained)


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the run's folder, to write into."""
    return shutil.copytree(trained, tmp_path / "run")


def test_python_api(trained, dataset):
    loaded = sample.load(trained)
    cond = np.load(dataset / "val_cond.npy")
    target = sample.generate(loaded, cond, steps=5)
    assert target.shape == (10, 4, 5) and target.dtype == torch.float32 and target.isfinite().all()
    truth = np.load(dataset / "val_target.npy")
    assert (
        abs(target.mean() - truth.mean()) < 0.5
    )  # raw targets, un-normalized: the dataset's mean is 3


def test_a_sample_depends_on_its_own_noise_only(loaded, dataset):
    cond = torch.from_numpy(np.load(dataset / "val_cond.npy"))
    together = sample.generate(loaded, cond, steps=3)
    alone = torch.cat(
        [sample.generate(loaded, cond[i : i + 1], steps=3, first=i) for i in range(10)]
    )
    assert torch.allclose(together, alone, atol=1e-5)
    states = sample.generate(loaded, cond, steps=3, trajectory=True)
    assert states.shape == (4, 10, 4, 5) and torch.allclose(states[-1], together, atol=1e-5)
    assert (together - sample.generate(loaded, cond, steps=3, draw=1)).abs().mean() > 0.1
    assert (together - sample.generate(loaded, cond, steps=3, seed=1)).abs().mean() > 0.1
    assert (together - sample.generate(loaded, cond, steps=3, shift=3.0)).abs().max() > 1e-3
    assert torch.equal(together, sample.generate(loaded, cond, steps=3))


def test_guidance_trajectory_and_interpolation(loaded, dataset):
    cond = torch.from_numpy(np.load(dataset / "val_cond.npy"))
    plain = sample.generate(loaded, cond, steps=4)
    assert (plain - sample.generate(loaded, cond, steps=4, guidance=3.0)).abs().max() > 1e-3
    states = sample.generate(loaded, cond, steps=4, trajectory=True)
    assert states.shape == (5, 10, 4, 5) and torch.equal(states[-1], plain)
    noise = loaded.target.encode(states[0])
    assert abs(noise.std() - 1) < 0.2 and abs(noise.mean()) < 0.2
    path = sample.interpolate_embeddings(loaded, cond[0], cond[1], n=3, steps=4)
    assert torch.allclose(path[0], plain[0], atol=1e-5) and path.shape == (3, 4, 5)
    assert torch.allclose(path[2], sample.generate(loaded, cond[1:2], steps=4)[0], atol=1e-5)
    assert torch.allclose(
        path[1], sample.generate(loaded, (cond[:1] + cond[1:2]) / 2, steps=4)[0], atol=1e-5
    )


def test_command_line_scores_and_saves_a_split(run_dir, dataset):
    args = ["--steps=4", "--draws=3", "--batch_size=3", "--plot=True", "--save_draws=True"]
    done = run(
        "sample.py", f"--out_dir={run_dir}", *args, f"--save_pickle={run_dir / 'results.pkl'}"
    )
    assert "10 conditions, 3 draws" in done.stdout
    generated, draws = np.load(run_dir / "generated.npy"), np.load(run_dir / "generated_draws.npy")
    assert (
        generated.shape == (10, 4, 5)
        and draws.shape == (10, 3, 4, 5)
        and np.array_equal(draws[:, 0], generated)
    )
    conditions, loaded = np.load(dataset / "val_cond.npy"), sample.load(run_dir)
    for draw in range(3):
        assert np.allclose(
            draws[:, draw], sample.generate(loaded, conditions, steps=4, draw=draw), atol=1e-5
        )
    metrics = json.loads((run_dir / "metrics.json").read_text())
    spread = {*score.SPREAD, "spread_0", "spread_1", "spread_2"}
    assert metrics.keys() - {"generated", "baselines", "samples", "confidence"} == {
        *score.METRICS, *spread, "draws",
    }  # fmt: skip
    assert metrics["draws"] == 3
    assert metrics["confidence"].keys() == {*score.METRICS, *spread}
    baselines = metrics["baselines"]
    assert baselines.keys() == {"truth", "mean", "ridge", "gaussian", "floor", "shuffled"}
    assert baselines.pop("gaussian").keys() == {*score.METRICS, *spread}
    for row in baselines.values():
        assert row.keys() == set(score.METRICS)
    stats = np.load(dataset / "stats.npz")
    standardized = [
        (x - stats["target_mean"]) / stats["target_std"]
        for x in (generated, np.load(dataset / "val_target.npy"))
    ]
    cosine = np.mean(
        [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(*(s.reshape(-1, 5) for s in standardized))
        ]
    )
    assert metrics["token_cosine"] == pytest.approx(cosine, abs=1e-5)
    for row in ("generated", "truth", "mean", "ridge", "gaussian", "floor", "shuffled"):
        assert any(line.startswith(row + " ") for line in done.stdout.splitlines())
    assert (run_dir / "samples.png").read_bytes()[:4] == b"\x89PNG"
    results = pickle.loads((run_dir / "results.pkl").read_bytes())
    assert results.keys() == {
        "eva_embeddings",
        "clip_targets",
        "generated_clip",
        "captions",
        "keys",
        "labels",
        "generation_metrics",
    }
    assert not list(run_dir.glob("*.partial"))
    items = [json.loads(line) for line in (dataset / "val_items.jsonl").read_text().splitlines()]
    assert np.array_equal(results["eva_embeddings"], conditions)
    assert np.array_equal(results["clip_targets"], np.load(dataset / "val_target.npy"))
    assert results["keys"] == [i["key"] for i in items] and np.array_equal(
        results["generated_clip"], generated
    )
    assert results["generation_metrics"]["token_cosine"] == metrics["token_cosine"]


def test_conditions_from_files(run_dir, dataset, tmp_path):
    content = make_pickle(tmp_path / "new.pkl", n=5, seed=5)
    np.save(tmp_path / "new.npy", content["eva_blip3o_embeddings"].numpy())
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=2", "--method=euler", "--subset_size=4"]
    (run_dir / "metrics.json").write_text("{}")  # of generated.npy, which stays as it is
    for kind in ("npy", "pkl"):
        done = run(
            *args,
            f"--cond={tmp_path}/new.{kind}",
            f"--save={tmp_path}/{kind}.npy",
            f"--save_pickle={tmp_path}/{kind}.out",
            "--plot=True",
        )
        assert "4 conditions, 1 draws" in done.stdout and "ridge" not in done.stdout
    assert pickle.loads((tmp_path / "pkl.out").read_bytes())["keys"] == content["keys"][:4]
    a, b = np.load(tmp_path / "npy.npy"), np.load(tmp_path / "pkl.npy")
    assert a.shape == (4, 4, 5) and np.array_equal(a, b)
    # a file of the dataset itself
    run(*args, f"--cond={dataset}/val_cond.npy", f"--save={tmp_path}/c.npy")
    assert np.load(tmp_path / "c.npy").shape == (4, 4, 5)


def test_raw_weights_and_best_checkpoint(trained):
    ckpt = torch.load(trained / "ckpt_best.pt", weights_only=True)
    for weights in ("ema", "model"):
        state = sample.load(trained, weights=weights).model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in ckpt[weights].items())
    assert any(not torch.equal(ckpt["ema"][name], ckpt["model"][name]) for name in ckpt["ema"])


def test_half_the_memory(trained, dataset):
    """In bfloat16 the matrices are kept as autocast would cast them: the samples are the same as
    with float32 weights."""
    cond = np.load(dataset / "val_cond.npy")
    half, whole = sample.load(trained, dtype="bfloat16"), sample.load(trained)
    kept = {p.dtype for p in half.model.parameters() if p.dim() > 1}
    assert kept == {torch.bfloat16} and {p.dtype for p in half.model.parameters()} == {
        torch.bfloat16,
        torch.float32,
    }
    expected, exact = sample.generate(whole, cond, steps=4), sample.generate(half, cond, steps=4)
    whole.dtype = "bfloat16"
    assert (exact - sample.generate(whole, cond, steps=4)).norm() < 2e-3 * exact.norm()
    assert 1e-5 < (exact - expected).norm() / expected.norm() < 2e-2


LOAD = """import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sample
# without what the files' pages take, which the system can have back
held = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
before = held()
loaded = sample.load(sys.argv[2], dtype=sys.argv[3])
size = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**20
for p in loaded.model.parameters():
    p.sum()  # a map takes no memory before it is read
print(size, held() - before)"""


@pytest.mark.parametrize(
    "kind, dtype", [("ckpt", "bfloat16"), ("ckpt", "float32"), ("diffusers", "bfloat16")]
)
def test_loading_holds_one_copy(tmp_path, kind, dtype):
    config = NextDiTConfig(grid=(2, 2), target_dim=5, cond_dim=6, dim=512, n_layer=16, n_head=8)
    model = NextDiT(config)
    if kind == "diffusers":
        facts = dict(model_args=dataclasses.asdict(config), flow=exchange.VELOCITY, stats={})
        facts |= dict(normalize="none", cond_tokens=4, code="")
        exchange.save_model(tmp_path, facts, model.state_dict())
    else:
        stats = {
            f"{n}_{m}": torch.ones(c)
            for n, c in (("cond", 6), ("target", 5))
            for m in ("mean", "std")
        }
        state = dict(
            model=model.state_dict(), ema=model.state_dict(), model_args=dataclasses.asdict(config)
        )
        state |= dict(
            stats=stats, flow={}, normalize="none", config={"data_dir": ""}, iter=0, cond_tokens=4
        )
        torch.save(state, tmp_path / "ckpt_best.pt")
    no_gaps = {
        "MALLOC_MMAP_THRESHOLD_": "1048576"
    }  # freed memory is the system's again, not a gap in glibc's heap
    size, growth = map(float, run("-c", LOAD, ROOT, tmp_path, dtype, **no_gaps).stdout.split())
    assert size > 120 and growth < 1.3 * size, (size, growth)


def test_a_checkpoint_replaced_while_it_is_read(trained, tmp_path):
    """Its weights are those of before."""
    path = shutil.copy(trained / "ckpt_best.pt", tmp_path / "ckpt.pt")
    ckpt, parameters = read_weights(path, "ema")
    zeros = {name: torch.zeros_like(x) for name, x in parameters}
    replace_file(path, lambda f: torch.save(ckpt | {"ema": zeros}, f))
    assert same(dict(parameters), checkpoint(trained, "ckpt_best.pt")["ema"])


@pytest.fixture
def refuse(monkeypatch, capsys):
    """refused(), but in this process, which has torch already."""

    def refuse(*args):
        precision = torch.get_float32_matmul_precision()
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capsys.readouterr()
        with pytest.raises((SystemExit, ValueError, OSError)) as end:
            sample.main()
        torch.set_float32_matmul_precision(precision)
        if not isinstance(end.value, SystemExit):
            sys.excepthook(end.type, end.value, None)
        printed = capsys.readouterr().err
        if isinstance(end.value, SystemExit) and end.value.code != 1:
            printed += end.value.code  # a text, which Python prints before it ends with code 1
        lines = [line for line in printed.splitlines() if line.strip() and "batch/s" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return refuse


def test_bad_input(run_dir, refuse, dataset, tmp_path):
    args = [f"--out_dir={run_dir}"]
    np.save(tmp_path / "wide.npy", np.zeros((3, 4, 9), np.float32))
    np.save(tmp_path / "long.npy", np.zeros((3, 5, 6), np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 6), np.float32))
    assert "(4, 9); this model takes (4, 6)" in refuse(*args, f"--cond={tmp_path}/wide.npy")
    assert "(5, 6); this model takes (4, 6)" in refuse(*args, f"--cond={tmp_path}/long.npy")
    np.save(tmp_path / "nan.npy", np.full((3, 4, 6), np.nan, np.float32))
    np.save(tmp_path / "flat.npy", np.zeros((3, 6), np.float32))
    assert "NaN or Inf in condition number 0" in refuse(*args, f"--cond={tmp_path}/nan.npy")
    late = np.zeros((3, 4, 6), np.float32)
    late[2] = np.inf
    np.save(tmp_path / "late.npy", late)
    assert "NaN or Inf in condition number 2" in refuse(*args, f"--cond={tmp_path}/late.npy")
    assert "this is read, or written twice" in refuse(*args, f"--save={dataset}/val_target.npy")
    np.save(tmp_path / "a_draws.npy", np.zeros((3, 4, 6), np.float32))
    cond = f"--cond={tmp_path}/a_draws.npy"
    assert "this is read, or written twice" in refuse(
        *args, cond, f"--save_pickle={tmp_path}/a_draws.npy"
    )
    args_of_draws = [cond, f"--save={tmp_path}/a.npy", "--save_draws=True"]
    assert "this is read, or written twice" in refuse(*args, *args_of_draws)
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    assert "a zip file that is not of torch.save" in refuse(*args, f"--cond={tmp_path}/several.npy")
    make_pickle(tmp_path / "short.pkl", n=5, keys=["a"])
    assert "keys is not a list of 5" in refuse(*args, f"--cond={tmp_path}/short.pkl")
    words = refuse(*args, "--interpolate=1,10")
    assert "interpolate=(1, 10): two of the conditions 0 to 9 and" in words
    assert "interpolate takes tuple, not '1;2'" in refuse(*args, "--interpolate=1;2")
    assert "interval 0.5 to 0.2" in refuse(*args, "--guidance=2.0", "--guidance_interval=0.5,0.2")
    assert "shape (1, 6)" in refuse(*args, f"--cond={tmp_path}/flat.npy")
    assert "device='tpu'" in refuse(*args, "--device=tpu")
    assert "shape (0, 4, 6)" in refuse(*args, f"--cond={tmp_path}/none.npy")
    assert "subset_size=0" in refuse(*args, "--subset_size=0")
    assert "batch_size=0" in refuse(*args, "--batch_size=0")
    assert "draws=0" in refuse(*args, "--draws=0")
    assert "No such file" in refuse(*args, f"--cond={tmp_path}/nowhere.npy")
    assert "method='rk5'" in refuse(*args, "--method=rk5")
    assert "steps=0" in refuse(*args, "--steps=0")
    assert "shift=0" in refuse(*args, "--shift=0")
    assert "shift=1e+300 must be finite" in refuse(*args, "--shift=1e300")
    assert "must end in .npy" in refuse(*args, "--save=foo")
    assert "no/x.npy cannot be written" in refuse(*args, "--save=no/x.npy")
    assert "did you mean 'steps'" in refuse(*args, "--step=3")
    assert "there is no" in refuse(*args, "--checkpoint=ckpt_lsat.pt")
    assert "there is no" in refuse(f"--out_dir={tmp_path}/nowhere")
    assert "dataset 'nowhere' does not exist" in refuse(*args, "--data_dir=nowhere")
    (run_dir / "ckpt_best.pt").write_bytes((run_dir / "ckpt_best.pt").read_bytes()[:5000])
    assert "cannot be read as a checkpoint" in refuse(*args)


def test_flipped_bytes_and_sparse_weights(run_dir, refuse):
    """A line each, neither samples of damaged weights nor a crash."""
    best = run_dir / "ckpt_best.pt"
    data = bytearray(best.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(x ^ 0xFF for x in data[middle : middle + 400])
    whole = torch.load(best, weights_only=True)
    best.write_bytes(data)
    line = refuse(f"--out_dir={run_dir}")
    assert "ckpt_best.pt cannot be read as a checkpoint: it is damaged" in line
    assert "ckpt_last.pt" in line
    x = whole["ema"]["x_embed.weight"]
    with torch.sparse.check_sparse_tensor_invariants(False):
        rows, columns = torch.arange(len(x) + 1), torch.full((len(x),), 10**9)
        whole["ema"]["x_embed.weight"] = torch.sparse_csr_tensor(rows, columns, x[:, 0], x.shape)
    torch.save(whole, best)
    assert "ema.x_embed.weight: torch.sparse_csr, torch.float32" in refuse(f"--out_dir={run_dir}")


def test_a_run_before_its_first_evaluation(run_dir, refuse):
    """It has no ckpt_best.pt: ckpt_last.pt is taken, and a line says so."""
    args = ["sample.py", f"--out_dir={run_dir}", "--draws=1", "--steps=2"]
    run(*args, "--checkpoint=ckpt_last.pt")
    expected = np.load(run_dir / "generated.npy")
    (run_dir / "ckpt_best.pt").unlink()
    done = run(*args)
    lines = [line for line in done.stdout.splitlines() if "ckpt_best.pt" in line]
    assert len(lines) == 1 and "ckpt_last.pt" in lines[0]
    assert np.array_equal(np.load(run_dir / "generated.npy"), expected)
    (run_dir / "ckpt_last.pt").write_bytes(b"")
    assert "ckpt_last.pt cannot be read as a checkpoint: " in refuse(*args[1:])
    (run_dir / "ckpt_last.pt").unlink()
    assert "no ckpt_best.pt, and no safetensors model" in refuse(*args[1:])


def with_class_tokens(x, n):
    return torch.cat([torch.full_like(x[:, :n], 99), x], 1)


def larger_grid(x):
    """(N, 2x2, C) -> (N, 4x4, C) whose means of 2x2 are x."""
    n, _, C = x.shape
    x = x.reshape(n, 2, 1, 2, 1, C) + torch.tensor([[-1.0, 1], [2, -2]])[:, None, :, None]
    return x.reshape(n, 16, C)


def channels_first(x):
    return x.transpose(1, 2).contiguous()


PREPARED = {
    "drop_tokens": (lambda x: with_class_tokens(x, 3), ["--drop_tokens=3"]),
    "drop_cls": (lambda x: with_class_tokens(x, 1), ["--drop_cls=True"]),
    "pool": (larger_grid, ["--pool=2"]),
    "channels_first": (channels_first, ["--channels_first=True"]),
    "all": (
        lambda x: channels_first(with_class_tokens(larger_grid(x), 2)),
        ["--drop_tokens=2", "--pool=2", "--channels_first=True"],
    ),
}


@pytest.mark.parametrize("name", PREPARED)
def test_conditions_are_prepared_as_the_datasets(run_dir, dataset, refuse, tmp_path, name):
    """By the settings in meta.json, from a pickle and a .npy; what fits is taken as it is."""
    change, flags = PREPARED[name]
    content = make_pickle(tmp_path / "plain.pkl")
    raw = {key: change(content[key]) for key in ("eva_blip3o_embeddings", "clip_blip3o_embeddings")}
    make_pickle(tmp_path / "raw.pkl", **raw)
    run("prepare.py", tmp_path / "raw.pkl", f"--out={tmp_path / 'data'}", *flags)
    assert np.load(tmp_path / "data" / "val_cond.npy").shape[1:] == (4, 6)
    np.save(tmp_path / "plain.npy", content["eva_blip3o_embeddings"].numpy())
    np.save(tmp_path / "raw.npy", raw["eva_blip3o_embeddings"].numpy())
    args = [f"--out_dir={run_dir}", f"--save={tmp_path}/made.npy", "--steps=2", "--subset_size=5"]
    made = []
    for file in ("plain.npy", "raw.npy", "raw.pkl"):
        data = f"--data_dir={tmp_path / 'data'}"
        run("sample.py", *args, data, f"--cond={tmp_path / file}")
        made.append(np.load(tmp_path / "made.npy"))
    assert np.allclose(made[0], made[1], atol=1e-4) and np.array_equal(made[1], made[2])
    # the run's own dataset was prepared in another way: the line names the flags
    words = refuse(*args, f"--cond={tmp_path / 'raw.npy'}")
    assert "; this model takes (4, 6)" in words and "--channels_first" in words
    # and the checkpoint knows how the run's own dataset was prepared, though that may be gone
    ckpt = torch.load(run_dir / "ckpt_best.pt", weights_only=True)
    ckpt["data_meta"] = json.loads((tmp_path / "data" / "meta.json").read_text())
    ckpt["data_path"] = str(tmp_path / "gone")
    torch.save(ckpt, run_dir / "ckpt_best.pt")
    run("sample.py", *args, f"--cond={tmp_path / 'raw.pkl'}")
    assert np.array_equal(np.load(tmp_path / "made.npy"), made[1])
    # one of an earlier version does not: the flags are named
    del ckpt["data_meta"]
    torch.save(ckpt, run_dir / "ckpt_best.pt")
    words = refuse(*args, f"--cond={tmp_path / 'raw.npy'}")
    for flag in ("--drop_tokens", "--pool", "--channels_first", "--data_dir"):
        assert flag in words


def test_a_condition_takes_few_bytes(tmp_path):
    """Nothing is kept of the conditions' items."""
    n = 20_000
    content = {"eva_blip3o_embeddings": np.ones((n, 1, 2), np.float16)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    read = functools.partial(sample.read_conditions, tmp_path / "a.pkl", "eva_blip3o_embeddings")
    read()
    tracemalloc.start()
    conditions, named = read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * n and len(conditions) == n
    assert next(named) == {"key": None, "caption": None}


def cut(text, first, second):
    """The integer between two words of a text."""
    return int(text.split(first)[1].split(second)[0])


@pytest.fixture
def conditions(tmp_path):
    """A .npy of 600 conditions."""
    cond = np.random.default_rng(0).standard_normal((600, 4, 6))
    np.save(tmp_path / "cond.npy", cond.astype(np.float32))
    return tmp_path / "cond.npy"


def batches_written(folder):
    """How many batches the notes of an interrupted run speak of; 0 where there are none yet."""
    return sum(note.stat().st_size for note in folder.glob("process_*"))


@pytest.fixture
def stop_after(tmp_path):
    """A script that runs sample.py until its last process has written some batches and then gets a
    signal: stop_after(batches, signal)."""

    def stop_after(batches, number):
        script = tmp_path / f"stop_after_{batches}.py"
        script.write_text(f"""import runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from plumbing import output
write = output.Output.write
def write_and_stop(self, first, arrays):
    write(self, first, arrays)
    is_last = output.RANK == output.WORLD_SIZE - 1
    if is_last and self.progress.tell() == {batches}:
        while (self.folder / "process_0").stat().st_size == 0:
            time.sleep(0.01)  # the first process has a batch as well
        signal.raise_signal({int(number)})  # here and now, not at some later point
output.Output.write = write_and_stop
runpy.run_path({str(ROOT / "sample.py")!r}, run_name="__main__")""")
        return script

    return stop_after


def test_an_interrupted_run_goes_on(run_dir, conditions, tmp_path, stop_after):
    args = [f"--out_dir={run_dir}", f"--cond={conditions}", "--subset_size=60"]
    args += ["--batch_size=5", "--draws=2", "--save_draws=True"]
    run("sample.py", *args, f"--save={tmp_path}/whole.npy")
    for number, batches in ((signal.SIGKILL, 3), (signal.SIGINT, 7)):
        done = run(stop_after(batches, number), *args, f"--save={tmp_path}/cut.npy", check=False)
        assert done.returncode != 0
        assert batches_written(tmp_path / "cut.npy.partial") == batches
        assert not (tmp_path / "cut.npy").exists()
    assert "error: interrupted: the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("sample.py", *args, f"--save={tmp_path}/cut.npy").stdout
    assert "7 of 12 batches were there" in done
    for name in ("", "_draws"):
        whole = (tmp_path / f"whole{name}.npy").read_bytes()
        assert (tmp_path / f"cut{name}.npy").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.npy", "cut_draws.npy"]


def test_several_interrupted_processes_go_on(run_dir, conditions, tmp_path, stop_after):
    """Each from its own note; another number of processes starts anew."""
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    args = [f"--out_dir={run_dir}", f"--cond={conditions}", "--subset_size=80", "--batch_size=10"]
    run("sample.py", *args, f"--save={tmp_path}/whole.npy")
    script = stop_after(2, signal.SIGKILL)
    assert run(*launch, script, *args, f"--save={tmp_path}/cut.npy", check=False).returncode != 0
    assert (tmp_path / "cut.npy.partial" / "process_1").stat().st_size == 2
    shutil.copytree(tmp_path / "cut.npy.partial", tmp_path / "again.npy.partial")
    (tmp_path / "again.npy.partial" / "cut.npy").rename(tmp_path / "again.npy.partial/again.npy")
    done = run("sample.py", *args, f"--save={tmp_path}/cut.npy", processes=2)
    assert "of 4 batches were there" in done.stdout
    done = run("sample.py", *args, f"--save={tmp_path}/again.npy").stdout
    assert "starting anew" in done and "were there" not in done
    for name in ("cut", "again"):
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_other_settings_start_anew(run_dir, conditions, tmp_path):
    args = ["sample.py", f"--out_dir={run_dir}", f"--cond={conditions}", "--batch_size=300"]
    args += [f"--save={tmp_path}/a.npy"]
    spoilt = np.load(conditions)
    spoilt[400] = np.nan
    np.save(conditions, spoilt)
    assert "number 400" in refused(*args)
    assert batches_written(tmp_path / "a.npy.partial") == 1
    assert "number 400" in refused(*args, "--seed=1")  # not what seed 0 has made
    np.save(conditions, np.nan_to_num(spoilt))
    done = run(*args, "--seed=1").stdout  # nor what was made of other conditions
    assert "were there" not in done and "starting anew" in done
    expected = sample.generate(sample.load(run_dir), np.nan_to_num(spoilt), seed=1)
    assert np.allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)
    np.save(conditions, spoilt)
    assert "number 400" in refused(*args)
    (run_dir / "ckpt_best.pt").touch()  # a checkpoint that was written anew
    assert "starting anew" in run(*args, "--subset_size=300").stdout


def test_other_code_starts_anew(run_dir, conditions, tmp_path):
    """After an edit of the model, no file has rows of both versions."""
    code = tmp_path / "code"
    code.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    for folder in ("plumbing", "report"):
        shutil.copytree(ROOT / folder, code / folder)
    args = ["sample.py", f"--out_dir={run_dir}", f"--cond={conditions}", "--batch_size=300"]
    args += [f"--save={tmp_path}/a.npy"]
    spoilt = np.load(conditions)
    spoilt[400] = np.nan
    np.save(conditions, spoilt)
    assert "number 400" in refused(*args, cwd=code)
    assert batches_written(tmp_path / "a.npy.partial") == 1
    (code / "flow.py").write_text((code / "flow.py").read_text() + "# an edit\n")
    done = run(*args, cwd=code, check=False)
    assert "starting anew" in done.stdout and "were there" not in done.stdout


def test_what_follows_sampling_can_be_repeated(run_dir, tmp_path):
    """A run that ends while it scores or draws has its samples when it comes again."""
    args = ["sample.py", f"--out_dir={run_dir}", "--draws=2", "--steps=2"]
    args += [f"--save={tmp_path}/a.npy"]
    broken = "from report import score; score.table = None"
    assert run(*args, patch=broken, check=False).returncode == 1
    assert (tmp_path / "a.npy").exists() and not (tmp_path / "a_draws.npy").exists()
    made = (tmp_path / "a.npy").stat().st_mtime_ns
    done = run(*args, "--plot=True").stdout
    assert "1 of 1 batches were there" in done and "generated" in done
    assert (tmp_path / "a.npy").stat().st_mtime_ns == made
    assert sorted(path.name for path in tmp_path.glob("a*")) == [
        "a.npy",
        "a.png",
        "a_metrics.json",
    ]


def test_a_part_does_not_overwrite_the_whole(run_dir, tmp_path):
    """Samples, metrics and picture of a part have names of their own."""
    for name in ("generated.npy", "metrics.json", "samples.png"):
        (run_dir / name).write_text("of the whole split")
    args = ["sample.py", f"--out_dir={run_dir}", "--draws=1", "--steps=2"]
    run(*args, "--subset_size=4", "--plot=True")
    run(*args, "--split=train", "--subset_size=6")
    for name in ("generated.npy", "metrics.json", "samples.png"):
        assert (run_dir / name).read_text() == "of the whole split"
    for suffix, n in (("_first4", 4), ("_train_first6", 6)):
        assert len(np.load(run_dir / f"generated{suffix}.npy")) == n
        assert json.loads((run_dir / f"metrics{suffix}.json").read_text())["samples"] == n
    assert (run_dir / "samples_first4.png").read_bytes()[:4] == b"\x89PNG"


def test_weights_dtype_and_split_of_the_command_line(run_dir, dataset, tmp_path):
    args = [
        "sample.py",
        f"--out_dir={run_dir}",
        "--split=train",
        "--draws=1",
        "--steps=2",
        f"--save={tmp_path}/a.npy",
    ]
    run(*args, "--weights=model", "--dtype=bfloat16")
    cond, truth = (np.load(dataset / f"train_{n}.npy") for n in ("cond", "target"))
    made = torch.from_numpy(np.load(tmp_path / "a.npy"))
    assert torch.allclose(
        made,
        sample.generate(sample.load(run_dir, weights="model", dtype="bfloat16"), cond, 2),
        atol=1e-3,
    )
    assert (
        made - sample.generate(sample.load(run_dir, weights="model"), cond, 2)
    ).abs().max() > 2e-3
    stats = np.load(dataset / "stats.npz")
    standardize = score.standardizer(stats["target_mean"], stats["target_std"])
    metrics = json.loads((tmp_path / "a_metrics.json").read_text())
    expected = score.metrics(standardize(made), standardize(truth), (2, 2))
    assert metrics["r2"] == pytest.approx(expected["r2"], rel=1e-4)


def test_further_draws_are_of_what_is_scored(run_dir, dataset, tmp_path):
    args = [
        "sample.py",
        f"--out_dir={run_dir}",
        "--steps=2",
        "--batch_size=3",
        f"--save={tmp_path}/a.npy",
    ]
    done = run(*args, patch="from report import score; score.LIMIT = 4").stdout
    assert "10 conditions, 4 draws" in done
    metrics = json.loads((tmp_path / "a_metrics.json").read_text())
    assert metrics["draws"] == metrics["samples"] == 4
    expected = sample.generate(sample.load(run_dir), np.load(dataset / "val_cond.npy"), steps=2)
    assert np.allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)


def test_any_array_of_numbers_is_taken(loaded, dataset):
    cond = np.load(dataset / "val_cond.npy")
    expected = sample.generate(loaded, cond, steps=2)
    for equal in (
        cond.astype(">f4"),
        cond.astype(np.longdouble),
        np.asfortranarray(cond),
        cond[::-1][::-1],
        torch.tensor(cond),
    ):
        assert torch.equal(sample.generate(loaded, equal, steps=2), expected)
    for bad, words in (
        (dict(steps=2.5), "steps=2.5"),
        (dict(seed=-1), "non-negative"),
        (dict(first=-1), "non-negative"),
        (dict(seed=1.5), "seed must be integer"),
        (dict(guidance=1e38, shift=2), "not finite: guidance=1e.38, steps=2, {'shift': 2}"),
        (dict(guidance_interval=(0, 1, 2)), "two times"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            sample.generate(loaded, cond, **dict(steps=2) | bad)
    with pytest.raises(ValueError, match="NaN or Inf in condition number 0"):
        sample.generate(loaded, np.full(cond.shape, 1e300))
    with pytest.raises(RuntimeError, match="must match"):
        sample.interpolate_embeddings(loaded, cond[0], cond[0, :2])


def test_a_full_disk_is_an_error_that_one_goes_on_from(run_dir, conditions, tmp_path):
    """After two batches, what is written to the file goes to a device that is always full."""
    full_disk = """
from plumbing import output
calls = []
def full(path, mode, **options):
    if mode == "r+b" and path.name == "a.npy":
        calls.append(path)
    return open("/dev/full" if len(calls) > 2 else path, mode, **options)
output.open = full
"""
    args = ["sample.py", f"--out_dir={run_dir}", f"--cond={conditions}", "--batch_size=150"]
    args += [f"--save={tmp_path}/a.npy"]
    assert "No space left on device" in refused(*args, patch=full_disk)
    assert "2 of 4 batches were there" in run(*args).stdout
    expected = sample.generate(sample.load(run_dir), np.load(conditions))
    assert np.allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_output_that_nobody_takes_ends_nothing(run_dir, tmp_path, kind):
    """sample.py > /dev/full 2>&1; sample.py 2>&1 | head -1"""
    run("sample.py", f"--out_dir={run_dir}", f"--save={tmp_path}/a.npy")
    command = [sys.executable, "sample.py", f"--out_dir={run_dir}", f"--save={tmp_path}/b.npy"]
    with open("/dev/full", "w") as full:
        stdout = full if kind == "full disk" else subprocess.PIPE
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = dict(stdout=stdout, stderr=subprocess.STDOUT, env=env)
        process = subprocess.Popen(command, cwd=ROOT, **pipes)
        if kind == "closed pipe":
            process.stdout.readline()
            process.stdout.close()
        assert process.wait(timeout=100) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert not (tmp_path / "b.npy.partial").exists()


def test_several_processes_write_the_same_file(run_dir, dataset, tmp_path):
    args = [
        f"--out_dir={run_dir}",
        "--batch_size=3",
        "--draws=2",
        "--save_draws=True",
        "--trajectory=True",
    ]
    run("sample.py", *args, f"--save={tmp_path}/one.npy")
    metrics = (tmp_path / "one_metrics.json").read_text().replace("one.npy", "two.npy")
    done = run("sample.py", *args, f"--save={tmp_path}/two.npy", processes=2)
    assert (
        "2/2" in done.stderr and "4/4" not in done.stderr
    )  # of four batches, two are the first process's
    assert done.stdout.count("10 conditions, 2 draws") == done.stdout.count("variogram_score") == 1
    assert (tmp_path / "two_metrics.json").read_text() == metrics
    for name in ("", "_draws", "_trajectory"):
        assert (tmp_path / f"one{name}.npy").read_bytes() == (
            tmp_path / f"two{name}.npy"
        ).read_bytes()


def test_trajectory_and_interpolation_of_the_command_line(run_dir, dataset, tmp_path):
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=4", "--batch_size=3"]
    run(*args, "--draws=1", "--trajectory=True", f"--save={tmp_path}/a.npy")
    states, last = np.load(tmp_path / "a_trajectory.npy"), np.load(tmp_path / "a.npy")
    assert states.shape == (10, 5, 4, 5) and np.array_equal(states[:, -1], last)
    cond, loaded = np.load(dataset / "val_cond.npy"), sample.load(run_dir)
    assert np.allclose(
        states.swapaxes(0, 1), sample.generate(loaded, cond, steps=4, trajectory=True), atol=1e-5
    )
    for odd in ("0,1,0", "0,1,-4", "0,1,2.5"):
        assert "how many samples, from 2" in refused(*args, f"--interpolate={odd}")
    (run_dir / "metrics.json").write_text("{}")
    run(*args, "--interpolate=7,2,5", "--plot=True")
    path = np.load(run_dir / "interpolation.npy")
    assert path.shape == (5, 4, 5) and np.allclose(path[0], last[7], atol=1e-5)
    assert np.allclose(
        path,
        sample.interpolate_embeddings(loaded, cond[7], cond[2], 5, steps=4, first=7),
        atol=1e-5,
    )
    assert (run_dir / "metrics.json").read_text() == "{}"
    assert (run_dir / "interpolation.png").stat().st_size > 1000


def test_guidance_of_the_command_line(run_dir, loaded, dataset, tmp_path):
    """It costs a second evaluation of the model where it acts, and needs a null condition."""
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=10", "--draws=1"]
    args += [f"--save={tmp_path}/a.npy"]
    cond = np.load(dataset / "val_cond.npy")
    calls = []
    hook = loaded.model.register_forward_hook(lambda *call: calls.append(1))
    for guidance, interval, evaluations in (
        (1, (0, 1), 10),
        (2, (0, 1), 20),
        (2, (0.25, 0.75), 15),
    ):
        calls.clear()
        made = sample.generate(loaded, cond, guidance=guidance, guidance_interval=interval)
        assert len(calls) == evaluations
    hook.remove()
    run(*args, "--guidance=2", "--guidance_interval=0.25,0.75")
    assert np.allclose(np.load(tmp_path / "a.npy"), made, atol=1e-5)
    ckpt = torch.load(run_dir / "ckpt_best.pt", weights_only=True)
    ckpt["flow"]["cond_dropout"] = 0.0
    torch.save(ckpt, run_dir / "ckpt_best.pt")
    assert "trained with cond_dropout > 0" in refused(*args, "--guidance=2")
    run(*args)


PEAK = """import runpy, sys
from pathlib import Path
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    assert not e.code, e
print("peak", int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)"""


@pytest.mark.parametrize("kind", ["npy", "pkl"])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, kind):
    """400 and 3200 samples of (16, 512) from conditions of (16, 512): 13 and 105 MB each."""
    config = NextDiTConfig(
        grid=(4, 4), target_dim=512, cond_dim=512, dim=8, n_layer=1, n_head=2, multiple_of=8
    )
    model = NextDiT(config)
    stats = {f"{n}_{m}": torch.ones(512) for n in ("cond", "target") for m in ("mean", "std")}
    state = dict(
        model=model.state_dict(),
        ema=model.state_dict(),
        model_args=dataclasses.asdict(config),
        stats=stats,
    )
    state |= dict(flow={}, normalize="none", config={"data_dir": ""}, iter=0, cond_tokens=16)
    torch.save(state, tmp_path / "ckpt_best.pt")
    peaks = []
    for n in (400, 3200):
        cond = np.random.default_rng(0).standard_normal((n, 16, 512)).astype(np.float32)
        np.save(tmp_path / "cond.npy", cond)
        (tmp_path / "cond.pkl").write_bytes(pickle.dumps({"eva_blip3o_embeddings": cond}))
        args = [
            "sample.py",
            f"--out_dir={tmp_path}",
            f"--cond={tmp_path}/cond.{kind}",
            "--steps=1",
            "--batch_size=100",
        ]
        peaks.append(
            cut(run("-c", PEAK, *args, MALLOC_MMAP_THRESHOLD_="1048576").stdout, "peak", "\n")
        )
        assert np.load(tmp_path / "generated.npy").shape == (n, 16, 512)
    assert peaks[1] < peaks[0] + 25, peaks


def test_training_samples_are_not_scored_as_validation(tmp_path):
    """Once the dataset was made anew with another split; unless it is named."""
    make_pickle(tmp_path / "a.pkl")
    prepare = ["prepare.py", tmp_path / "a.pkl", f"--out={tmp_path / 'data'}", "--overwrite=True"]
    run(*prepare)
    train(tmp_path / "data", tmp_path / "out", "--max_iters=1")
    args = ["sample.py", f"--out_dir={tmp_path / 'out'}", "--steps=1", "--draws=1"]
    metrics = tmp_path / "out" / "metrics.json"
    run(*prepare)  # the same data again
    run(*args)
    metrics.unlink()
    run(*prepare, "--seed=7")
    words = refused(*args)
    assert "data has changed since the model was trained" in words and "--data_dir=" in words
    assert not metrics.exists()
    assert "frechet" in run(*args, f"--data_dir={tmp_path / 'data'}").stdout and metrics.exists()


def test_a_checkpoint_of_an_earlier_version(run_dir):
    """Which knows its data by the statistics that it normalizes with alone."""
    ckpt = torch.load(run_dir / "ckpt_best.pt", weights_only=True)
    for name in ("data_stats", "data_meta", "data_path"):
        del ckpt[name]
    for name in ("ckpt_best.pt", "ckpt_last.pt"):
        torch.save(ckpt, run_dir / name)
    done = run("sample.py", f"--out_dir={run_dir}", "--steps=1", "--draws=1")
    assert "ridge" in done.stdout
    run("train.py", f"--out_dir={run_dir}", "--init_from=resume", "--max_iters=7")


def test_the_dataset_is_found_from_elsewhere(tmp_path):
    """Under its absolute path, though a relative one was typed."""
    make_pickle(tmp_path / "a.pkl")
    run("prepare.py", tmp_path / "a.pkl", f"--out={tmp_path / 'here' / 'data'}")
    relative = ["--data_dir=data", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"]
    run(ROOT / "train.py", *TINY, *relative, cwd=tmp_path / "here")
    args = [ROOT / "sample.py", f"--out_dir={tmp_path / 'out'}", "--steps=1", "--draws=1"]
    assert "frechet" in run(*args, cwd=tmp_path).stdout


def test_what_will_be_written_is_checked_before_the_first_sample(run_dir, tmp_path):
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=1", "--draws=1"]
    for name in (tmp_path, f"{tmp_path}/no/a.pkl", "/dev/null"):
        flag = f"--save_pickle={name}"
        assert "cannot be written" in refused(*args, flag)
        assert not (run_dir / "generated.npy").exists()
    missing = "import sys; sys.modules['matplotlib'] = None\n"
    assert "pictures need matplotlib" in refused(*args, "--plot=True", patch=missing)
    assert not (run_dir / "generated.npy").exists()


def test_what_belongs_to_samples_lies_beside_them(run_dir, tmp_path):
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=1", "--draws=1"]
    before = sorted(run_dir.iterdir())
    (tmp_path / "a.png").write_text("mine")
    run(*args, f"--save={tmp_path}/a.npy")
    assert (tmp_path / "a.png").read_text() == "mine"
    run(*args, f"--save={tmp_path}/a.npy", "--plot=True")
    names = sorted(path.name for path in tmp_path.glob("a*"))
    assert names == ["a.npy", "a.png", "a_metrics.json"] and sorted(run_dir.iterdir()) == before


def test_metrics_of_earlier_samples_go(run_dir, conditions):
    """They would look like those of the new ones."""
    args = ["sample.py", f"--out_dir={run_dir}", "--steps=1", "--draws=1"]
    run(*args)
    assert (run_dir / "metrics.json").exists()
    run(*args, f"--cond={conditions}")
    assert not (run_dir / "metrics.json").exists()
