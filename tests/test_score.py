import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from conftest import make_pickle, refused, run, train
from plumbing.dataset import ARRAYS, KINDS, open_dataset
from report import score
from report.plot import draw_samples

BASELINES = {"truth", "mean", "ridge", "gaussian", "floor", "shuffled"}


def square(x):
    """The grid of tokens (N, T, D): a square, else a row."""
    side = math.isqrt(x.shape[1])
    return (side, side) if side**2 == x.shape[1] else (1, x.shape[1])


def metrics(generated, target):
    return score.metrics(generated, target, square(target))


def test_metrics_on_cases_with_known_values():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(400, 4, 16, generator=g)
    exact = metrics(target, target)
    assert exact["token_cosine"] == pytest.approx(1, abs=1e-5)
    for name in ("frechet", "frechet_patch", "frechet_pooled"):
        assert exact[name] == pytest.approx(0, abs=1e-6)
    assert exact["r2"] == exact["std_ratio"] == 1
    half = metrics(target / 2, target)
    assert half["token_cosine"] == pytest.approx(1, abs=1e-5)
    assert half["std_ratio"] == pytest.approx(0.5)
    assert half["r2"] == pytest.approx(0.75)  # the error is half of the truth
    other = metrics(torch.randn(400, 4, 16, generator=g), target)
    assert abs(other["token_cosine"]) < 0.03
    assert other["r2"] == pytest.approx(-1, abs=0.03)
    zero = metrics(torch.zeros_like(target), target)
    assert zero["token_cosine"] == zero["r2"] == zero["neighbours"] == 0


def frechet(a, b):
    return metrics(a, b)["frechet"]


def test_frechet_distance_of_known_gaussians():
    """Between N(m, diag(a^2)) and N(0, diag(b^2)) it is |m|^2 + sum (a - b)^2; a rotation of both
    changes nothing."""
    g = torch.Generator().manual_seed(0)
    a, b, m = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 1, 3]), torch.tensor([1.0, 0, 2])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]
    x = torch.randn(2000, 100, 3, generator=g) * a + m
    y = torch.randn(2000, 100, 3, generator=g) * b
    assert frechet(x, y) == pytest.approx(5 + 2, rel=0.02)
    assert frechet(x @ rotation, y @ rotation) == pytest.approx(frechet(x, y), rel=1e-3)


def test_an_exact_draw_has_cosine_r2_and_the_mean_r():
    """The claim that tells a user what to expect: y = R e + sqrt(1 - R^2) n, in many channels."""
    g = torch.Generator().manual_seed(0)
    explained, (n1, n2) = (
        torch.randn(500, 4, 256, generator=g),
        torch.randn(2, 500, 4, 256, generator=g),
    )
    R = 0.6
    truth, draw = R * explained + 0.8 * n1, R * explained + 0.8 * n2
    assert metrics(draw, truth)["token_cosine"] == pytest.approx(R**2, abs=0.01)
    assert metrics(R * explained, truth)["token_cosine"] == pytest.approx(R, abs=0.01)
    assert metrics(draw, truth)["std_ratio"] == pytest.approx(1, abs=0.01)


def test_metrics_equal_other_peoples():
    """Those of scipy, scikit-learn and numpy, on sets of different means, covariances and norms."""
    from scipy.linalg import sqrtm

    def frechet_of(x, y):
        cov_x, cov_y = np.cov(x.T), np.cov(y.T)
        trace = np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + trace

    from scipy.spatial.distance import cosine

    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 8, 8))
    y = rng.standard_normal((300, 6, 8)) @ mix[0] + 1
    x = 0.7 * y + rng.standard_normal((300, 6, 8)) @ mix[1] - 0.5
    ours = score.metrics(torch.from_numpy(x), torch.from_numpy(y), (2, 3))
    flat_x, flat_y, pooled_x, pooled_y = x.reshape(-1, 8), y.reshape(-1, 8), x.mean(1), y.mean(1)
    squares = [0, 1, 3, 4], [1, 2, 4, 5]
    patches = [np.concatenate([z[:, i].reshape(300, 32) for i in squares]) for z in (x, y)]
    neighbours = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    cosines = [1 - cosine(z[i], z[j]) for z in x for i, j in neighbours]
    expected = {
        "token_cosine": np.mean([1 - cosine(a, b) for a, b in zip(flat_x, flat_y)]),
        "r2": 1 - ((x - y) ** 2).mean() / (y**2).mean(),
        "frechet": frechet_of(flat_x, flat_y),
        "frechet_patch": frechet_of(*patches),  # of so few channels no component is left out
        "frechet_pooled": frechet_of(pooled_x, pooled_y),
        "neighbours": np.mean(cosines),
        "std_ratio": np.sqrt(np.trace(np.cov(flat_x.T)) / np.trace(np.cov(flat_y.T))),
    }
    assert ours == pytest.approx(expected, rel=1e-5)


def with_widths(truth, samples, grid=None):
    """The metrics of samples, or of several draws, and half the widths of their confidence
    intervals."""
    samples = samples if samples.ndim == 4 else samples[:, None]
    predicted = {"truth": truth[:, None].__getitem__, "generated": samples.__getitem__}
    sums = score.add_up(len(truth), predicted, grid or square(truth))
    groups = sums["generated"], sums["truth"]
    return score.figures(*groups), score.confidence(*groups)


def test_confidence_intervals(one_thread):
    """Of a mean they hold the truth in about 95% of cases; of every metric they are as wide as it
    varies between data sets."""
    rng = np.random.default_rng(0)
    truth = torch.ones(150, 1, 1)
    held = []
    for _ in range(100):
        # token_cosine is here the share of positive signs less that of negative ones, 0.2
        x = torch.from_numpy(rng.random((150, 1, 1)) - 0.4).float()
        values, widths = with_widths(truth, x)
        held.append(abs(values["token_cosine"] - 0.2) < widths["token_cosine"])
    assert 0.88 < np.mean(held) <= 0.99

    g = torch.Generator().manual_seed(0)
    for D in (3, 24):
        results = []
        for _ in range(40):
            y = torch.randn(100, 9, D, generator=g)
            x = 1.3 * torch.randn(100, 3, 9, D, generator=g)
            x += y[:, None] / 2
            results.append(with_widths(y, x))
        for name in (*score.METRICS, *score.SPREAD):
            values = [values[name] for values, _ in results]
            width = np.mean([widths[name] for _, widths in results])
            assert 0.7 < width / (1.96 * np.std(values)) < 1.6, name


def posterior(scale, draws=4, n=500, D=3):
    """Truth and draws (N, draws, T, D) of a conditional distribution of known mean and standard
    deviation; that of the draws is `scale` times as large."""
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(n, 4, D, generator=g), torch.rand(n, 4, D, generator=g) + 0.5
    truth = mean + std * torch.randn(n, 4, D, generator=g)
    return truth, mean[:, None] + scale * std[:, None] * torch.randn(n, draws, 4, D, generator=g)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("draws", [2, 8])
def test_spread_of_a_known_posterior(scale, draws):
    truth, x = posterior(scale, draws)
    values, width = with_widths(truth, x)
    exact = (
        (1 + 1 / draws) * scale**2 / (1 + scale**2 / draws)
    ) ** 0.5  # of variances, by the law of large numbers
    assert (
        values["spread_ratio"] == pytest.approx(exact, rel=0.03)
        and 0.005 < width["spread_ratio"] / exact < 0.1
    )
    assert scale != 1 or exact == 1


def test_variogram_score():
    """By its definition, less what it owes to the number of draws; lowest for the truth."""
    truth, x = posterior(1.0)
    steps = [(x[:, :, i] - x[:, :, j]).abs() ** 0.5 for i, j in ((0, 1), (2, 3), (0, 2), (1, 3))]
    steps = torch.stack(steps)  # (4, N, draws, D)
    real = [(truth[:, i] - truth[:, j]).abs() ** 0.5 for i, j in ((0, 1), (2, 3), (0, 2), (1, 3))]
    expected = (steps.mean(2) - torch.stack(real)) ** 2 - steps.var(2) / 4
    ours = with_widths(truth, x)[0]["variogram_score"]
    assert ours == pytest.approx(expected.mean().item(), rel=1e-4)
    many = with_widths(*posterior(1.0, 32))[0]["variogram_score"]
    assert many == pytest.approx(ours, rel=0.03)  # whatever the number of draws
    for scale in (0.5, 2.0):
        assert with_widths(*posterior(scale))[0]["variogram_score"] > 1.02 * ours


def test_frequencies_are_scipys():
    from scipy.fft import dctn

    x = np.random.default_rng(0).standard_normal((5, 7))
    ours = score.dct(5).double() @ x @ score.dct(7).double().T
    assert np.allclose(ours, dctn(x, norm="ortho"), atol=1e-5)


@pytest.mark.parametrize("draws", [2, 4, 16])
def test_the_mean_of_infinitely_many_draws(draws):
    """Its token cosine and R2 are those of the known mean, from few draws as from many."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(400, 4, 64, generator=g)
    truth = mean + 1.5 * torch.randn(400, 4, 64, generator=g)
    x = mean[:, None] + 1.5 * torch.randn(400, draws, 4, 64, generator=g)
    expected = metrics(mean, truth)
    values, widths = with_widths(truth, x)
    for name in ("token_cosine", "r2"):
        difference = abs(values[f"mean_{name}"] - expected[name])
        assert difference < (0.03 if draws == 2 else 0.01) and widths[f"mean_{name}"] < 0.03


def test_the_mean_of_draws_that_vary_differently():
    """Token by token: one of four varies ten times as much as the others."""
    g = torch.Generator().manual_seed(0)
    std = torch.tensor([0.3, 0.3, 0.3, 3.0])[:, None]
    mean = torch.randn(400, 4, 64, generator=g)
    truth = mean + std * torch.randn(400, 4, 64, generator=g)
    x = mean[:, None] + std * torch.randn(400, 4, 4, 64, generator=g)
    expected, ours = metrics(mean, truth), with_widths(truth, x)[0]
    for name in ("token_cosine", "r2"):
        assert ours[f"mean_{name}"] == pytest.approx(expected[name], abs=0.01)


def test_gaussian_is_exact_where_the_world_is():
    """Data of the linear-Gaussian model: its draws have the metrics of the floor and of an exact
    sampler."""
    g = torch.Generator().manual_seed(0)
    space = torch.linalg.cholesky(0.5 * torch.eye(4) + 0.5)
    cond = torch.randn(1300, 4, 6, generator=g)
    noise = space @ torch.randn(1300, 4, 5, generator=g) @ torch.randn(5, 5, generator=g)
    target = cond @ torch.randn(6, 5, generator=g) + noise
    stats = {}
    for kind, x in (("cond", cond), ("target", target)):
        stats |= {f"{kind}_mean": x.mean((0, 1)), f"{kind}_std": x.std((0, 1))}
    arrays = dict(train_cond=cond[:800], train_target=target[:800])
    arrays |= dict(val_cond=cond[800:], val_target=target[800:])
    data = {name: x.numpy() for name, x in arrays.items()}
    data |= {"stats": stats, "meta": {"grid": (2, 2)}}
    draws = data["val_target"][:, None].repeat(3, 1)
    rows = score.report(draws, data)[0]["baselines"]
    ours, floor, ridge = rows["gaussian"], rows["floor"], rows["ridge"]
    for name in ("frechet", "frechet_patch", "frechet_pooled"):
        assert ours[name] < 3 * floor[name] and ours[name] < 0.15 * ridge[name]
    assert ours["neighbours"] == pytest.approx(rows["truth"]["neighbours"], abs=0.03)
    assert ours["neighbours_of_draws"] == pytest.approx(ours["neighbours_of_truth"], abs=0.04)
    for name in ("spread_ratio", "spread_0", "spread_1", "spread_2"):
        assert ours[name] == pytest.approx(1, abs=0.06)
    assert ours["mean_r2"] == pytest.approx(ridge["r2"], abs=0.02)


def test_baselines(dataset):
    """Perfect samples of no condition are at the floor; in the training split no sample is its own
    baseline."""
    data = open_dataset(dataset)
    result, _, _ = score.report(data["val_target"][:, None], data)
    assert result["samples"] == 10 and result["token_cosine"] == pytest.approx(1)
    assert result["baselines"].keys() == BASELINES
    standardize = score.standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    rows = np.linspace(0, 29, 10).astype(int)
    floor = metrics(standardize(data["train_target"][rows]), standardize(data["val_target"]))
    assert result["baselines"]["floor"] == pytest.approx(floor)
    result, _, _ = score.report(data["train_target"][:20, None], data, "train")
    assert result["samples"] == 20 and result["baselines"]["floor"]["token_cosine"] < 0.5
    result, _, _ = score.report(
        data["train_target"][:, None], data, "train"
    )  # none is left to compare with
    assert result["baselines"].keys() == BASELINES - {"floor"}


@pytest.mark.parametrize("draws", [1, 3])
def test_one_sample(dataset, draws):
    """It has scores, but no confidence intervals, and nobody to be shuffled with."""
    data = open_dataset(dataset)
    x = np.repeat(data["val_target"][:1, None], draws, 1)
    result, text, _ = score.report(x, data)
    assert result["samples"] == 1 and result["token_cosine"] == pytest.approx(1)
    assert result["baselines"].keys() == BASELINES - {"shuffled"}
    assert result["confidence"] == {} and "+-" not in text and ("shuffled" not in text)
    assert "NaN" not in json.dumps(result)


def test_command_line_scores_a_file(dataset, tmp_path):
    truth = np.load(dataset / "val_target.npy")
    np.save(tmp_path / "truth.npy", truth)
    table = run(
        "-m",
        "report.score",
        tmp_path / "truth.npy",
        f"--data_dir={dataset}",
        f"--save={tmp_path}/a.json",
    ).stdout.splitlines()
    assert table[0].split() == list(score.METRICS)
    rows = {
        line.split()[0]: dict(zip(score.METRICS, map(float, line.split()[-7:])))
        for line in table[1:]
    }
    assert rows.keys() == {"generated", "+-"} | BASELINES
    assert rows["generated"]["token_cosine"] == 1
    assert rows["ridge"]["token_cosine"] > 0.8 > 0.3 > rows["shuffled"]["token_cosine"]
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["baselines"]["ridge"]["r2"] == pytest.approx(rows["ridge"]["r2"], abs=1e-4)
    np.save(
        tmp_path / "draws.npy",
        truth[:6, None] + np.array([-0.1, 0, 0.1], np.float32)[:, None, None],
    )
    done = run("-m", "report.score", tmp_path / "draws.npy", f"--data_dir={dataset}")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    names, *lines = lines[lines.index("3 draws per condition") + 1 :]
    assert names.split() == list(score.SPREAD)
    assert [line[:10].strip() for line in lines[:3]] == ["generated", "+- (95%)", "gaussian"]
    spread = dict(zip(score.SPREAD, map(float, lines[0].split()[1:])))
    for name in ("mean_r2", "mean_token_cosine"):
        assert spread[name] == pytest.approx(1, abs=1e-3)
    assert len(lines[3].split(":")[1].split()) == 3  # frequencies
    np.save(tmp_path / "big.npy", truth.astype(">f8"))
    assert (
        run("-m", "report.score", tmp_path / "big.npy", f"--data_dir={dataset}").stdout.splitlines()
        == table
    )


def test_mistakes_on_the_command_line(dataset, tmp_path):
    def refusal(array, *args):
        np.save(tmp_path / "a.npy", array)
        return refused("-m", "report.score", tmp_path / "a.npy", f"--data_dir={dataset}", *args)

    truth = np.load(dataset / "val_target.npy")
    assert "(10, 4, 3); the targets are (10, 4, 5)" in refusal(truth[..., :3])
    assert "(20, 4, 5)" in refusal(truth.repeat(2, 0))
    assert "(0, 4, 5)" in refusal(truth[:0])
    assert "split='test' is unknown" in refusal(truth, "--split=test")
    assert "No such file" in refusal(truth, "--save=no/a.json")
    assert "nowhere" in refused("-m", "report.score", "nowhere.npy", f"--data_dir={dataset}")
    assert "name one file" in refused("-m", "report.score", f"--data_dir={dataset}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(dataset, value):
    """Their figures are NaN. The baselines are as ever."""
    data = open_dataset(dataset)
    draws = data["val_target"][:, None].repeat(2, 1).astype(np.float32)
    expected = score.report(draws, data)[0]["baselines"]["ridge"]
    draws[3, 0, 1, 2] = value
    result, text, _ = score.report(draws, data)
    assert result["frechet"] is result["r2"] is result["spread_ratio"] is None and "nan" in text
    assert result["baselines"]["ridge"] == expected
    x, y = (torch.from_numpy(array) for array in (draws[:, 0], data["val_target"].copy()))
    assert not np.isfinite(metrics(x, y)["frechet"])


def test_what_is_not_finite_is_null():
    """Metrics of a single token have no spread: NaN in the table, None in what is saved."""
    stats = {f"{kind}_mean": np.zeros(3) for kind in KINDS}
    stats |= {f"{kind}_std": np.ones(3) for kind in KINDS}
    data = dict.fromkeys(ARRAYS, np.ones((1, 1, 3)))
    data |= {"stats": stats, "meta": {"grid": (1, 1)}}
    result, text, _ = score.report(np.ones((1, 1, 1, 3)), data)
    assert result["std_ratio"] is None and result["baselines"]["ridge"]["std_ratio"] is None
    assert result["token_cosine"] == pytest.approx(1) and "nan" in text
    json.dumps(result, allow_nan=False)


def test_a_table_that_nobody_takes(dataset, tmp_path):
    """The scores are saved all the same."""
    np.save(tmp_path / "a.npy", np.load(dataset / "val_target.npy"))
    args = [tmp_path / "a.npy", f"--data_dir={dataset}", f"--save={tmp_path}/a.json"]
    full = 'import os; os.dup2(os.open("/dev/full", os.O_WRONLY), 1)\n'
    module = "import runpy; runpy.run_module('report.score', run_name='__main__', alter_sys=True)"
    done = run("-c", full + module, *args)
    assert done.stderr == "WARNING: cannot print: [Errno 28] No space left on device\n"
    assert json.loads((tmp_path / "a.json").read_text())["samples"] == 10


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal(monkeypatch, terminal):
    """A bar once it takes longer than a second, and none in a log file."""
    clock = itertools.count()  # seconds
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    x = torch.randn(40, 1, 2, 3)
    score.add_up(40, {"truth": x.__getitem__, "generated": x.__getitem__}, (1, 2))
    assert ("scoring" in sys.stderr.getvalue()) == terminal


def test_of_many_channels_some_are_scored(monkeypatch, tmp_path):
    """Evenly spaced, first and last among them; all figures are those of these channels."""
    g = np.random.default_rng(0)
    names = [*ARRAYS, "draws"]
    every = {name: g.standard_normal((20, 4, 500), np.float32) for name in names}
    stats = {f"{kind}_mean": g.random(500) for kind in KINDS}
    stats |= {f"{kind}_std": 1 + g.random(500) for kind in KINDS}
    meta = {"meta": {"grid": (2, 2)}}
    kept = np.linspace(0, 499, 384, dtype=int)
    assert kept[0] == 0 and kept[-1] == 499
    few = {name: x[..., kept] for name, x in every.items()}
    few_stats = {name: x[kept] for name, x in stats.items()}
    expected, text, _ = score.report(few["draws"][:, None], few | meta | {"stats": few_stats})
    monkeypatch.setattr(score, "WIDE", 400)
    result, long_text, references = score.report(
        every["draws"][:, None], every | meta | {"stats": stats}
    )
    assert result == expected and long_text == f"{text}\nof 384 of the 500 channels"
    x, y = (torch.from_numpy(every[name]) for name in ("draws", "val_target"))
    assert metrics(y, x) == metrics(y[..., kept], x[..., kept])
    draw_samples(
        tmp_path / "a.png", every["val_cond"], every["val_target"], every["draws"][:, None],
        (2, 2), stats, references=references,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_results_know_no_units(tmp_path, scale):
    """Train, sample, score: with everything in other units all is the same, up to these. A channel
    that is constant in training is constant in the samples, whatever the others' scale."""
    made, metrics = [], []
    for factor in (1.0, scale):
        folder = tmp_path / str(factor)
        folder.mkdir()
        content = make_pickle(folder / "a.pkl")
        names = ("eva_blip3o_embeddings", "clip_blip3o_embeddings")
        content = {name: content[name].double() * torch.tensor(1e-3) for name in names}
        content["clip_blip3o_embeddings"][..., 2] = 0.7
        content = {name: (factor * value).float() for name, value in content.items()}
        make_pickle(folder / "a.pkl", **content)
        run("prepare.py", folder / "a.pkl", f"--out={folder / 'data'}")
        train(folder / "data", folder / "out")
        run("sample.py", f"--out_dir={folder / 'out'}", "--steps=4", "--draws=1")
        made.append(np.load(folder / "out" / "generated.npy") / factor)
        metrics.append(json.loads((folder / "out" / "metrics.json").read_text()))
        assert (made[-1][..., 2] == np.float32(content[names[1]][0, 0, 2]) / factor).all()
    live = [0, 1, 3, 4]
    assert np.abs(made[0] - made[1])[..., live].max() < 1e-3 * made[0][..., live].std()
    for name in score.METRICS:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-3), name


def toy(n=600, draws=4, seed=0):
    """Truth (n, 16, 8), on a 4x4 grid, of known mean and residual, whose neighbours have a cosine
    of about 0.5; exact draws (n, draws, 16, 8); and draws with the right covariance of channels in
    every token, but each token's residual by itself."""
    g = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    space = torch.linalg.cholesky((-torch.cdist(places, places) / 1.5).exp())  # (16, 16)
    channels = torch.randn(8, 8, generator=g) / 8**0.5
    x = torch.randn(n, draws + 2, 16, 8, generator=g) @ channels
    together = space @ x
    mean, truth = together[:, 0], together[:, 0] + together[:, 1]
    return mean, truth, mean[:, None] + together[:, 2:], mean[:, None] + x[:, 2:]


def test_joint_structure_is_seen():
    """Each of the metrics of joint structure prefers the exact sampler to one that draws every
    token by itself, by more than its standard error; those of single tokens do not."""
    mean, truth, exact, wrong = toy()
    a, a_width = with_widths(truth, exact)
    b, b_width = with_widths(truth, wrong)

    def margin(error):
        """By how many standard errors the error of the wrong sampler is larger."""
        names = [name for name in a if name in error(a)[1]]
        se = sum((width[name] / 1.96) ** 2 for name in names for width in (a_width, b_width))
        return (error(b)[0] - error(a)[0]) / se**0.5

    true_neighbours = with_widths(truth, truth)[0]["neighbours"]
    assert true_neighbours == pytest.approx(np.exp(-1 / 1.5), abs=0.05)
    for name in ("frechet_patch", "frechet_pooled", "variogram_score"):
        assert margin(lambda x: (x[name], [name])) > 1, name
    assert margin(lambda x: (abs(x["neighbours"] - true_neighbours), ["neighbours"])) > 1
    names = ["neighbours_of_draws", "neighbours_of_truth"]
    assert margin(lambda x: (abs(x[names[0]] - x[names[1]]), names)) > 1
    for name in ("spread_0", "spread_6"):  # slow waves vary too little, fast ones too much
        assert margin(lambda x: (abs(np.log(x[name])), [name])) > 1, name
    assert b["spread_0"] < 0.8 < 1.2 < b["spread_6"]
    for name in ("token_cosine", "r2", "std_ratio", "spread_ratio"):
        assert abs(margin(lambda x: (x[name], [name]))) < 2, name


def test_a_projected_dataset(dataset, tmp_path):
    """bench/project.py keeps the split and its order; channels are uncorrelated, the largest
    first."""
    run("bench/project.py", dataset, tmp_path / "wide", "--cond=4", "--target=3")
    files = (tmp_path / "wide" / f"{kind}.npy" for kind in ("cond", "target"))
    run("prepare.py", *files, f"--out={tmp_path / 'data'}", "--val_fraction=0.25")
    old, new = open_dataset(dataset), open_dataset(tmp_path / "data")
    assert new["train_cond"].shape == (30, 4, 4)
    standardize = score.standardizer(old["stats"]["target_mean"], old["stats"]["target_std"])
    x = standardize(old["train_target"]).flatten(0, 1).numpy()
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for name in ("train", "val"):
        expected = standardize(old[f"{name}_target"]).numpy() @ axes[:3].T
        assert np.allclose(np.abs(new[f"{name}_target"]), np.abs(expected), atol=2e-3)
