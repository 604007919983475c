import importlib.util
import json

import pytest

from conftest import ROOT, make_pickle, run

spec = importlib.util.spec_from_file_location("speedrun", ROOT / "bench" / "speedrun.py")
speedrun = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speedrun)


def test_when_a_curve_reaches_a_loss():
    curve = [[1.0, 2.0], [3.0, 1.0], [4.0, 1.2], [5.0, 0.8]]
    seconds = [speedrun.reached(curve, loss) for loss in (2.5, 1.5, 1.0, 0.9)]
    assert seconds == pytest.approx([1.0, 2.0, 3.0, 4.75])
    assert speedrun.reached(curve, 0.7) is None


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
    done = run(*script, tmp_path / "data", *flags, "--rates", "0.003", "0.01")
    record = json.loads((tmp_path / "race" / "race-data.json").read_text())
    results = {(r["name"], r["budget"]): r for r in record["results"]}
    references = {("reference 0.003", 5), ("reference 0.01", 5)}
    assert results.keys() == references | {("ours", 5), ("ours", 1), ("ours", 0.5)}
    ours = results["ours", 5]
    theirs = min((results[key] for key in references), key=lambda r: r["loss"])
    for r in results.values():
        assert r["curve"][-1][0] >= r["budget"]
        assert r["numbers"] <= theirs["numbers"]
    assert ours["loss"] < theirs["loss"]
    assert ours["token_cosine"] > theirs["token_cosine"]
    assert ours["token_cosine"] > ours["shuffled"] + 0.1
    assert speedrun.reached(ours["curve"], theirs["loss"]) < 2.5
    assert "ratio, median of 1 seeds: 1/" in done.stdout
    assert "At equal time better in token_cosine" in done.stdout
    run(*script, "--picture")
    assert (tmp_path / "race" / "speedrun.png").stat().st_size > 5000
