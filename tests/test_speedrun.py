import importlib.util
import json

import pytest

from conftest import ROOT, make_pickle, run

spec = importlib.util.spec_from_file_location("speedrun", ROOT / "bench" / "speedrun.py")
speedrun = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speedrun)


CONFIG = """
dim, n_layer, n_head, multiple_of = 32, 2, 2, 16
batch_size, gradient_accumulation_steps = 16, 1
ema_decay = 0.9
"""


def test_the_default_recipe_wins(tmp_path):
    """The race, shortened. A target token is noise and a function of the condition's token at its
    place."""
    make_pickle(tmp_path / "a.pkl", n=300, grid=(4, 4), C=12, D=16)
    run("prepare.py", tmp_path / "a.pkl", f"--out={tmp_path / 'data'}", "--val_fraction=0.2")
    (tmp_path / "config.py").write_text(CONFIG)
    script = ["bench/speedrun.py", tmp_path / "race"]
    flags = ["--config", tmp_path / "config.py", "--budget=5", "--seeds=1"]
    flags += ["--samples=60", "--rates", "0.003", "0.01", "--batches", "16"]
    done = run(*script, tmp_path / "data", *flags)
    record = json.loads((tmp_path / "race" / "race-data.json").read_text())
    theirs = [r for r in record["results"] if r["is_reference"]]
    ours = [r for r in record["results"] if not r["is_reference"]]
    assert {r["name"] for r in theirs} == {f"reference, {r}, batch 16" for r in ("0.003", "0.01")}
    assert sorted(r["budget"] for r in ours) == pytest.approx([0.25, 0.5, 1, 5 / 3, 2.5, 5])
    assert all(r["seconds"] >= r["budget"] for r in record["results"])
    best, longest = speedrun.best_reference(theirs), max(ours, key=lambda r: r["budget"])
    assert longest["loss"] < best["loss"] and longest["numbers"] <= best["numbers"]
    assert longest["mean_token_cosine"] > best["mean_token_cosine"] + 0.05
    lines = speedrun.verdict(record["results"])
    assert lines[-1] in done.stdout and "median of the seeds: 1/" in lines[-1]
    run(*script, "--picture")
    assert (tmp_path / "race" / "speedrun.png").stat().st_size > 5000


def test_the_verdict_is_that_of_the_worst_metric():
    """The shortest of our runs that is as good, for each metric by itself."""
    theirs = dict.fromkeys(speedrun.METRICS, 0.5)
    theirs |= dict(name="r", is_reference=True, seed=0, seconds=60.0, loss=1.0)
    ours = []
    for seconds, error, cosine in ((10.0, 0.4, 0.4), (20.0, 0.6, 0.45), (30.0, 0.3, 0.6)):
        metrics = dict.fromkeys(speedrun.METRICS, error) | {"mean_token_cosine": cosine}
        ours.append(metrics | dict(name="o", is_reference=False, seed=0, seconds=seconds, loss=2.0))
    lines = speedrun.verdict([theirs, *ours])
    assert "frechet_patch 1/6.0" in lines[0] and "mean_token_cosine 1/2.0" in lines[0]
    assert lines[1].endswith("1/2.0")
    assert speedrun.verdict([theirs, ours[0]])[1].endswith("never")
