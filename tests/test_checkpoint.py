"""What is read from checkpoints: whole files, and dense tensors only."""

import collections
import re
import sys
import tracemalloc
import zipfile

import pytest
import torch

from conftest import ROOT, refused
from plumbing import checkpoint

sys.path.insert(0, str(ROOT / "bench"))
import fuzz  # noqa: E402


def state(**changes):
    """A checkpoint whose every kind of tensor is there."""
    matrix = torch.randn(16, 8)
    found = dict(model_args={"cond_dim": 8}, config={"seed": 0}, iter=5, scaler={}, bad_steps=0)
    for name in ("model", "ema"):
        found[name] = {"0.weight": matrix.clone(), "0.bias": torch.zeros(16)}
    found["stats"] = found["data_stats"] = {"cond_mean": torch.zeros(8)}
    moments = dict(step=torch.tensor(2.0), exp_avg=matrix.clone(), exp_avg_sq=matrix.clone())
    found["optimizer"] = {"state": {0: moments}, "param_groups": []}
    return found | changes


def damage(path, at, n=400):
    """Flip bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    for i in range(at, at + n):
        data[i] ^= 0xFF
    path.write_bytes(data)


FINE = ("one of another shape", "a parameter", "float64", "float16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["model", "ema", "stats", "optimizer"])
def test_only_dense_floats_are_read(tmp_path, where):
    """Sparse, quantized, nested, meta, int8, bool, complex and float8 tensors are refused by name,
    wherever they stand; no sparse one is looked into."""
    odd = fuzz.odd_tensors(torch.randn(16, 8))
    odd["expanded"] = torch.zeros(1, 1).expand(16, 8)  # one number, that says it is many
    for name, tensor in odd.items():
        if not torch.is_tensor(tensor):
            continue
        content = state()
        holder = content["optimizer"]["state"][0] if where == "optimizer" else content[where]
        key = list(holder)[-1]
        holder[key] = tensor
        torch.save(content, tmp_path / "a.pt")
        if name in FINE:
            checkpoint.read_checkpoint(tmp_path / "a.pt")
            continue
        words = rf"a\.pt .*{where}\.(state\.0\.)?{re.escape(key)}: .*not a dense tensor of floats"
        with pytest.raises(ValueError, match=words):
            checkpoint.read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a number", "a list", "None", "transposed shape"])
def test_weights_that_are_not_the_models(tmp_path, name):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16))
    odd = fuzz.odd_tensors(torch.randn(16, 8))[name]
    torch.save(state(ema={"0.weight": odd, "0.bias": torch.zeros(16)}), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"0\.weight") as error:
        _, parameters = checkpoint.read_weights(tmp_path / "a.pt", "ema")
        checkpoint.load_weights(model, parameters, torch.Tensor.float)
    assert "\n" not in str(error.value)
    models = {"ema": model, "model": model}
    with pytest.raises(ValueError, match=r"0\.weight"):
        ckpt = checkpoint.read_checkpoint(tmp_path / "a.pt")
        checkpoint.restore(tmp_path / "a.pt", ckpt, {"seed": 0}, {}, models, None)


def test_missing_weights(tmp_path):
    torch.save(state(ema=3), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="has no weights 'ema'"):
        checkpoint.read_weights(tmp_path / "a.pt", "ema")


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_optimizer_state_of_another_shape(name):
    """A fused kernel would read beyond its end."""
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(16, 8))], fused=True)
    checkpoint.restore_optimizer(state(), opt)
    ckpt = state()
    ckpt["optimizer"]["state"][0][name] = torch.zeros(0)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 has shape \(0,\)"):
        checkpoint.restore_optimizer(ckpt, opt)


def test_a_damaged_file(tmp_path):
    """Wherever its bytes have changed; the line says what to do."""
    path = tmp_path / "ckpt_best.pt"
    torch.save(state(ema={"a": torch.zeros(100_000)}), path)
    whole = path.read_bytes()
    for at in (0, 1500, len(whole) // 2, len(whole) - 450):
        path.write_bytes(whole)
        checkpoint.read_checkpoint(path)
        damage(path, at)
        with pytest.raises(ValueError, match="ckpt_best.pt cannot be read.*ckpt_last.pt") as error:
            checkpoint.read_checkpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    damage(path, len(whole) // 2, n=1)
    with pytest.raises(ValueError, match="it is damaged"):
        checkpoint.read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read_checkpoint(path)


def test_a_compressed_file(tmp_path):
    """Its CRCs are right, but torch would take its bytes for values."""
    torch.save(state(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="it is damaged"):
        checkpoint.read_checkpoint(tmp_path / "b.pt")


def test_a_file_is_checked_once_and_in_pieces(tmp_path, monkeypatch):
    """By the first process alone."""
    path = tmp_path / "a.pt"
    weights = {str(i): torch.zeros(1) for i in range(40)} | {"a": torch.zeros(1 << 23)}
    torch.save(state(ema=weights), path)
    calls = collections.Counter()
    testzip = zipfile.ZipFile.testzip

    def count(self):
        calls["testzip"] += 1
        return testzip(self)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", count)
    tracemalloc.start()
    _, parameters = checkpoint.read_weights(path, "ema")
    assert len(parameters) == 41
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert calls["testzip"] == 1 and peak < 8 << 20
    damage(path, path.stat().st_size // 3)
    monkeypatch.setattr(checkpoint, "RANK", 1)
    monkeypatch.setattr(torch, "load", lambda *args, **options: state())
    checkpoint.read_checkpoint(path)
    assert calls["testzip"] == 1


def test_a_damaged_run_is_not_resumed(dataset, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("ckpt_last.pt", "config.py"):
        (out / name).write_bytes((trained / name).read_bytes())
    damage(out / "ckpt_last.pt", (out / "ckpt_last.pt").stat().st_size // 2)
    words = refused("train.py", f"--out_dir={out}", "--init_from=resume")
    assert "ckpt_last.pt cannot be read as a checkpoint: it is damaged" in words
    assert "ckpt_best.pt" in words
    (out / "ckpt_last.pt").write_bytes(b"")
    words = refused("train.py", f"--out_dir={out}", "--init_from=auto")
    assert "ckpt_last.pt cannot be read as a checkpoint: " in words


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_checkpoints_are_read_right_or_refused(tmp_path):
    outcomes = fuzz.fuzz_checkpoints(tmp_path, cases=100, seed=0)
    ends = collections.Counter()
    for (_, end), count in outcomes.items():
        ends[end.split(":")[0]] += count
    assert ends.keys() == {"weights", "refused"} and sum(ends.values()) == 100
    assert ends["weights"] >= 8 and ends["refused"] > 50


def test_a_copy_without_pinned_memory(monkeypatch):
    """Where the host has none left, a checkpoint is copied as any tensor is."""
    to = torch.Tensor.to

    def without(x, *args, non_blocking=False, **kwargs):
        if non_blocking:
            raise RuntimeError("CUDA error: out of memory")
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", without)
    x = torch.arange(3.0)
    copied = checkpoint.gather({"a": {"b": x}, "c": 1}, copy=True)
    assert torch.equal(copied["a"]["b"], x) and copied["a"]["b"] is not x and copied["c"] == 1
