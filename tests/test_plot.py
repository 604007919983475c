import json
import sys

import numpy as np
import pytest
import torch

from conftest import refused, run
from plumbing.dataset import open_dataset
from report import plot, score
from report.plot import draw_samples, new_figure, principal_colours, read_curves


def test_curves(tmp_path, trained):
    """Of two runs, one without evaluations and with a loss that was not finite."""
    plt = pytest.importorskip("matplotlib.pyplot")
    other = tmp_path / "other"
    other.mkdir()
    lines = [{"iter": i, "loss": 2.0 - i / 4 if i != 2 else None, "lr": 1e-3} for i in range(6)]
    (other / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curves(other)["loss"] == [(0, 2.0), (1, 1.75), (3, 1.25), (4, 1.0), (5, 0.75)]
    run("-m", "report.plot", trained, other, f"--save={tmp_path / 'a.png'}")
    run("-m", "report.plot", trained)
    a, b = plt.imread(tmp_path / "a.png"), plt.imread(trained / "curves.png")
    orange = np.array([255, 127, 14]) / 255  # of the second run
    drawn = [(np.abs(image[..., :3] - orange).max(-1) < 0.02).sum() for image in (a, b)]
    assert a.shape[:2] == (750, 1200) and drawn[0] > 200 and drawn[1] == 0
    assert "cannot be read as a run's log" in refused("-m", "report.plot", tmp_path)
    (other / "log.jsonl").write_text("[1]\n")
    assert "cannot be read as a run's log" in refused("-m", "report.plot", other)


def test_as_many_curves_by_t_as_there_are_bins(tmp_path, monkeypatch):
    """TIME_BINS in train.py is anyone's to change."""
    record = {"iter": 1} | {f"val_loss_t{i}": 1.0 + i for i in range(7)}
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    figure = new_figure(7.5)
    monkeypatch.setattr(plot, "new_figure", lambda height: figure)
    plot.draw_curves(tmp_path / "a.png", [tmp_path])
    assert len(figure.axes[1].lines) == 7


def test_colours_are_principal_components():
    """As scikit-learn finds them in standardized tokens, spread over [0, 1], up to its sign."""
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    tokens = (rng.standard_normal((50, 6, 8)) @ rng.standard_normal((8, 8)) + 3).astype(np.float32)
    mean, std = tokens.mean((0, 1)), tokens.std((0, 1))
    encode = score.standardizer(mean, std)
    components = PCA(3).fit_transform(((tokens - mean) / std).reshape(-1, 8))
    low, high = np.percentile(components, [1, 99], axis=0)
    expected = np.clip((components - low) / (high - low), 0, 1).reshape(50, 6, 3)
    fewer, colours = principal_colours([tokens, tokens[:7]], encode, 0)[::-1]
    assert np.array_equal(fewer, colours[:7])
    for i in range(3):
        errors = [
            np.abs(colours[..., i] - x).max() for x in (expected[..., i], 1 - expected[..., i])
        ]
        assert min(errors) < 1e-3 < max(errors)


def image_of(*args):
    """What plot.py draws of samples."""
    plt = pytest.importorskip("matplotlib.pyplot")
    run("-m", "report.plot", "samples", *args)
    return plt.imread(args[0].with_suffix(".png"))[..., :3]


def test_samples(tmp_path, dataset):
    """Perfect samples, three draws of them: grids and cosines, in the order of the split, beside
    their file."""
    truth = np.load(dataset / "val_target.npy")
    np.save(tmp_path / "a.npy", truth)
    np.save(tmp_path / "b.npy", truth[:, None].repeat(3, 1)[:5])
    np.save(tmp_path / "c.npy", np.stack([truth, truth[::-1], truth], 1)[:5])
    one = image_of(tmp_path / "a.npy", f"--data_dir={dataset}")
    three = image_of(tmp_path / "b.npy", f"--data_dir={dataset}")
    assert three.shape[0] > one.shape[0] > 500  # rows for samples 2 and 3 and the mean
    for image in (one, three):
        blue = np.array([59, 76, 192]) / 255  # the map's colour for a cosine of 1
        assert image.shape[1] == 1200
        assert (np.abs(image - blue).max(-1) < 0.02).mean() > 0.01
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500
    other = image_of(tmp_path / "c.npy", f"--data_dir={dataset}")
    moved = np.flatnonzero(np.abs(other - three).max((1, 2)) > 0.02)
    assert 0 < len(moved) < 0.5 * three.shape[0]  # sample 2 and the mean
    np.save(tmp_path / "wide.npy", truth[..., :3])
    wide = ["-m", "report.plot", "samples", tmp_path / "wide.npy", f"--data_dir={dataset}"]
    assert "(10, 4, 3); the targets are (10, 4, 5)" in refused(*wide)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colours_of_few_channels(channels):
    tokens = np.random.default_rng(0).standard_normal((20, 4, channels)).astype(np.float32)
    colours = principal_colours([tokens], torch.from_numpy, 0)[0]
    assert colours.shape == (20, 4, 3) and colours.min() == 0 and colours.max() == 1


def test_more_samples_than_are_scored(tmp_path, dataset):
    """The columns are spread over all of them."""
    data = open_dataset(dataset)
    samples = data["val_target"][:, None].repeat(600, 0)
    cond, truth = (data[f"val_{kind}"].repeat(600, 0) for kind in ("cond", "target"))
    references = score.predictions(
        samples[:5000], data | {"val_target": truth, "val_cond": cond}, "val"
    )
    draw_samples(
        tmp_path / "a.png", cond, truth, samples, (2, 2), data["stats"], dataset, references
    )
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        new_figure(4)


DRAW = """
import sys
import numpy as np
from report.plot import draw_samples
cond, samples = np.random.default_rng(0).standard_normal((2, 3, 1, 4, 5))
stats = {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
draw_samples(sys.argv[1], cond[:, 0], None, samples, (2, 2), stats)
import matplotlib
print(matplotlib.rcParams._get("backend"), "matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_any_backend_in_the_environment(tmp_path, trained, backend):
    """The shells of notebooks have that of the notebook, which need not be installed here."""
    run("-m", "report.plot", trained, f"--save={tmp_path / 'a.png'}", MPLBACKEND=backend)
    done = run("-c", DRAW, tmp_path / "b.png", MPLBACKEND=backend)
    assert done.stdout.split()[-1] == "False"  # nor is pyplot touched
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_callers_backend_stays_as_it_is(tmp_path):
    """What was chosen before the picture is drawn, whatever the environment says."""
    chosen = "import matplotlib; matplotlib.use('pdf')\n"
    done = run("-c", chosen + DRAW, tmp_path / "a.png", MPLBACKEND="svg")
    assert done.stdout.split() == ["pdf", "False"]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_decoder_of_fewer_channels(tmp_path):
    """Conditions that were widened, by labels say, are decoded as before."""
    rng = np.random.default_rng(0)
    cond, samples = rng.standard_normal((3, 4, 8)), rng.standard_normal((3, 1, 4, 5))
    stats = {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
    np.savez(tmp_path / "decoder.npz", cond=np.ones(7), target=np.ones(6))
    draw_samples(tmp_path / "a.png", cond, None, samples, (2, 2), stats, tmp_path)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
