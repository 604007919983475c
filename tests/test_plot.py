import json

import numpy as np
import pytest

from conftest import refused, run
from plot import read_log, smooth


def test_smooth_is_the_mean_of_a_window():
    values = np.random.default_rng(0).standard_normal(50)
    by_hand = [values[max(i - 3, 0) : i + 4].mean() for i in range(50)]
    assert smooth(values, 7) == pytest.approx(by_hand) and smooth(values, 1) == pytest.approx(values)


def test_curves(tmp_path, trained):
    """Of two runs, one without evaluations and with a loss that was not finite."""
    plt = pytest.importorskip("matplotlib.pyplot")
    other = tmp_path / "other"
    other.mkdir()
    lines = [{"iter": i, "loss": 2.0 - i / 4 if i != 2 else None, "lr": 1e-3} for i in range(6)]
    (other / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, values = read_log(other)["loss"]
    assert steps.tolist() == [0, 1, 3, 4, 5] and values.tolist() == [2.0, 1.75, 1.25, 1.0, 0.75]
    run("plot.py", trained, other, f"--save={tmp_path / 'a.png'}")
    run("plot.py", trained, f"--save={tmp_path / 'b.png'}")
    a, b = (plt.imread(tmp_path / name) for name in ("a.png", "b.png"))
    orange = np.array([255, 127, 14]) / 255  # of the second run
    drawn = [(np.abs(image[..., :3] - orange).max(-1) < 0.02).sum() for image in (a, b)]
    assert a.shape[:2] == (750, 1200) and drawn[0] > 200 and drawn[1] == 0
    assert "cannot be read as a run's log" in refused("plot.py", tmp_path)
    (other / "log.jsonl").write_text("[1]\n")
    assert "cannot be read as a run's log" in refused("plot.py", other)
