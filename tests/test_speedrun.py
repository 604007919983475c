import importlib.util
import json

import pytest

from conftest import ROOT, make_pickle, run

spec = importlib.util.spec_from_file_location("speedrun", ROOT / "bench" / "speedrun.py")
speedrun = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speedrun)


def test_when_a_curve_reaches_a_loss():
    curve = [[1.0, 2.0], [3.0, 1.0], [4.0, 1.2], [5.0, 0.8]]
    assert [speedrun.reached(curve, loss) for loss in (2.5, 1.5, 1.0, 0.9)] == pytest.approx(
        [1.0, 2.0, 3.0, 4.75]
    )
    assert speedrun.reached(curve, 0.7) is None


def test_the_default_recipe_wins(tmp_path):
    """The race, shortened: targets that are a function of the condition's token at their place, and noise."""
    make_pickle(tmp_path / "a.pkl", n=300, grid=(4, 4), C=12, D=16)
    run("prepare.py", tmp_path / "a.pkl", f"--out={tmp_path / 'data'}", "--val_fraction=0.2")
    config = "dim, n_layer, n_head, multiple_of, batch_size, gradient_accumulation_steps = 32, 2, 2, 16, 16, 1"
    (tmp_path / "config.py").write_text(config + "\nema_decay = 0.9\n")
    args = ["bench/speedrun.py", tmp_path / "race"]
    flags = [
        "--config",
        tmp_path / "config.py",
        "--budget=5",
        "--seeds=1",
        "--rates",
        "0.003",
        "0.01",
    ]
    done = run(*args, tmp_path / "data", *flags)
    record = json.loads((tmp_path / "race" / "race-data.json").read_text())
    results = {(r["name"], r["budget"]): r for r in record["results"]}
    assert results.keys() == {
        ("reference 0.003", 5),
        ("reference 0.01", 5),
        ("ours", 5),
        ("ours", 1),
        ("ours", 0.5),
    }
    ours, theirs = (
        results["ours", 5],
        min((results[f"reference {r}", 5] for r in (0.003, 0.01)), key=lambda r: r["loss"]),
    )
    assert all(
        r["curve"][-1][0] >= r["budget"] and r["numbers"] <= theirs["numbers"]
        for r in results.values()
    )
    assert ours["loss"] < theirs["loss"] and ours["token_cosine"] > max(
        theirs["token_cosine"], ours["shuffled"] + 0.1
    )
    assert speedrun.reached(ours["curve"], theirs["loss"]) < 2.5
    assert (
        "ratio, median of 1 seeds: 1/" in done.stdout
        and "At equal time better in token_cosine" in done.stdout
    )
    run(*args, "--picture")
    assert (tmp_path / "race" / "speedrun.png").stat().st_size > 5000
