import io
import itertools
import json
import sys

import numpy as np
import pytest
import torch

from conftest import make_pickle, refused, run, train
from plumbing.dataset import ARRAYS, open_dataset
from report import score


def test_metrics_on_cases_with_known_values():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(400, 4, 16, generator=g)
    exact = score.metrics(target, target)
    assert (
        exact["token_cosine"] == pytest.approx(1, abs=1e-5)
        and exact["retrieval_r1"] == 1
        and exact["l2"] == 0
    )
    assert (
        exact["frechet"] == pytest.approx(0, abs=1e-6)
        and exact["norm_ratio"] == exact["std_ratio"] == 1
        and exact["snr_db"] > 100
    )
    half = score.metrics(target / 2, target)
    assert half["token_cosine"] == pytest.approx(1, abs=1e-5)
    assert half["norm_ratio"] == pytest.approx(0.5) and half["std_ratio"] == pytest.approx(0.5)
    assert half["snr_db"] == pytest.approx(
        10 * np.log10(4), abs=1e-4
    )  # the error is half of the truth
    assert half["l2"] == pytest.approx(target.norm(dim=-1).mean().item() / 2, rel=1e-5)
    other = score.metrics(torch.randn(400, 4, 16, generator=g), target)
    assert abs(other["token_cosine"]) < 0.03 and other["retrieval_r1"] < 0.02
    zero = score.metrics(torch.zeros_like(target), target)
    assert zero["token_cosine"] == 0 and zero["snr_db"] == pytest.approx(0, abs=1e-6)
    assert zero["retrieval_r1"] == pytest.approx(1 / 400)  # all tied: chance, not luck


def frechet(a, b):
    return score.metrics(a, b)["frechet"]


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
    assert score.metrics(draw, truth)["token_cosine"] == pytest.approx(R**2, abs=0.01)
    assert score.metrics(R * explained, truth)["token_cosine"] == pytest.approx(R, abs=0.01)
    assert score.metrics(draw, truth)["std_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("tokens", [4, 3])
def test_ridge_equals_scikit_learns(tokens):
    from sklearn.linear_model import Ridge

    g = np.random.default_rng(0)
    cond = g.standard_normal((60, tokens, 8)).astype(np.float32)
    target = g.standard_normal((60, 4, 5)).astype(np.float32) + (cond @ g.standard_normal((8, 5)))[
        :, :1
    ].astype(np.float32)
    ours = score.fit_ridge(
        torch.from_numpy(cond).__getitem__, torch.from_numpy(target).__getitem__, 60
    )
    features = cond if tokens == 4 else cond.mean(1, keepdims=True).repeat(4, 1)
    held_out = np.arange(0, 60, 10)
    fit = np.setdiff1d(np.arange(60), held_out)
    x = np.concatenate([features, np.ones((60, 4, 1), np.float32)], -1)
    top = np.linalg.eigvalsh(x[fit].reshape(-1, 9).T.astype(float) @ x[fit].reshape(-1, 9))[-1]
    errors, penalties = [], np.logspace(-6, 1, 15) * top
    for penalty in penalties:
        model = Ridge(alpha=penalty, fit_intercept=False).fit(
            x[fit].reshape(-1, 9), target[fit].reshape(-1, 5)
        )
        errors.append(
            ((model.predict(x.reshape(-1, 9)).reshape(60, 4, 5) - target)[held_out] ** 2).mean()
        )
    best = Ridge(alpha=penalties[np.argmin(errors)], fit_intercept=False).fit(
        x.reshape(-1, 9), target.reshape(-1, 5)
    )
    assert np.allclose(
        ours(torch.from_numpy(cond)).numpy(),
        best.predict(x.reshape(-1, 9)).reshape(60, 4, 5),
        atol=1e-3,
    )


def test_metrics_equal_other_peoples():
    """Those of scipy, scikit-learn and numpy, on sets of different means, covariances and norms."""
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import cosine
    from sklearn.metrics.pairwise import cosine_similarity

    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 8, 8))
    y = rng.standard_normal((300, 4, 8)) @ mix[0] + 1
    x = 0.7 * y + rng.standard_normal((300, 4, 8)) @ mix[1] - 0.5
    ours = score.metrics(torch.from_numpy(x), torch.from_numpy(y))
    flat_x, flat_y, pooled_x, pooled_y = x.reshape(-1, 8), y.reshape(-1, 8), x.mean(1), y.mean(1)
    cov_x, cov_y = np.cov(flat_x.T), np.cov(flat_y.T)
    expected = {
        "token_cosine": np.mean([1 - cosine(a, b) for a, b in zip(flat_x, flat_y)]),
        "pooled_cosine": np.diag(cosine_similarity(pooled_x, pooled_y)).mean(),
        "retrieval_r1": (cosine_similarity(pooled_x, pooled_y).argmax(1) == np.arange(300)).mean(),
        "frechet": ((flat_x.mean(0) - flat_y.mean(0)) ** 2).sum()
        + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real),
        "l2": np.linalg.norm(x - y, axis=-1).mean(),
        "norm_ratio": np.linalg.norm(x, axis=-1).mean() / np.linalg.norm(y, axis=-1).mean(),
        "std_ratio": np.sqrt(np.trace(cov_x) / np.trace(cov_y)),
        "snr_db": 10 * np.log10((y**2).mean() / ((x - y) ** 2).mean()),
    }
    assert ours == pytest.approx(expected, rel=1e-6) and 0.03 < ours["retrieval_r1"] < 0.9


def with_widths(truth, samples):
    """The metrics of samples, or of several draws, and half the widths of their confidence
    intervals."""
    draws = None
    if samples.ndim == 4:
        draws = samples.__getitem__
        samples = samples[:, 0]
    predicted = {"generated": samples.__getitem__}
    sums, groups = score.add_up(len(truth), truth.__getitem__, predicted, draws)
    return score.figures(sums["generated"]), score.confidence(sums["generated"], groups)


def test_confidence_intervals(one_thread):
    """Of a mean they hold the truth in about 95% of cases; of every metric they are as wide as it
    varies between data sets."""
    rng = np.random.default_rng(0)
    truth = torch.zeros(150, 1, 1)
    held = []
    for _ in range(100):
        x = torch.from_numpy(rng.exponential(size=(150, 1, 1))).float()  # of mean l2 1
        values, widths = with_widths(truth, x)
        held.append(abs(values["l2"] - 1) < widths["l2"])
    assert 0.88 < np.mean(held) <= 0.99

    g = torch.Generator().manual_seed(0)
    for D in (3, 48):
        results = []
        for _ in range(40):
            y = torch.randn(100, 4, D, generator=g)
            x = 1.3 * torch.randn(100, 3, 4, D, generator=g)
            x += y[:, None] / 2
            results.append(with_widths(y, x))
        for name in (*score.METRICS, *score.SPREAD):
            values = [values[name] for values, _ in results]
            if np.std(values) > 1e-3:  # else all samples are nearest to their own truth
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


def test_energy_score():
    """By scipy's distances; in expectation lowest for the truth, and in closed form for a standard
    normal one."""
    from scipy.spatial.distance import cdist, pdist

    truth, x = posterior(1.0)
    ours = with_widths(truth, x)[0]["energy_score"]
    pairs = [(x[i, :, t].numpy(), truth[i, None, t].numpy()) for i in range(500) for t in range(4)]
    assert ours == pytest.approx(
        np.mean([cdist(a, b).mean() - pdist(a).mean() / 2 for a, b in pairs]), rel=1e-5
    )
    for scale in (0.5, 2.0):
        truth, wrong = posterior(scale)
        assert with_widths(truth, wrong)[0]["energy_score"] > 1.02 * ours
    g = torch.Generator().manual_seed(0)
    y, x = torch.randn(2000, 4, 1, generator=g), torch.randn(2000, 4, 4, 1, generator=g)
    normal = with_widths(y, x)[0]["energy_score"]
    assert normal == pytest.approx(np.pi**-0.5, rel=0.03)  # E|X - Y| / 2


def test_nearest_is_scikit_learns():
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    train, cond = rng.standard_normal((300, 4, 8)), rng.standard_normal((50, 4, 8))
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(train.mean(1))
    theirs = neighbours.kneighbors(cond.mean(1))[1][:, 0]
    number = np.arange(300.0)[:, None, None]  # the targets
    stats = {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
    data = dict(train_cond=train, val_cond=cond, train_target=number, val_target=number[:50])
    _, ours, _ = score.predictions(number[:50, None], data | {"stats": stats}, "val")
    assert np.array_equal(ours["nearest"](np.arange(50))[:, 0, 0], theirs)
    data |= dict(train_cond=cond, train_target=number[:50])
    _, ours, _ = score.predictions(number[:20, None], data | {"stats": stats}, "train")
    assert ours["nearest"](np.arange(20)).min() >= 20  # none of the samples themselves


def test_baselines(dataset):
    """Perfect samples of no condition are at the floor; in the training split no sample is its own
    baseline."""
    data = open_dataset(dataset)
    result, _, _ = score.report(data["val_target"][:, None], data)
    assert result["samples"] == 10 and result["token_cosine"] == pytest.approx(1)
    assert result["baselines"].keys() == {"mean", "ridge", "nearest", "floor", "shuffled"}
    standardize = score.standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    rows = np.linspace(0, 29, 10).astype(int)
    floor = score.metrics(standardize(data["train_target"][rows]), standardize(data["val_target"]))
    assert result["baselines"]["floor"] == pytest.approx(floor)
    result, _, _ = score.report(data["train_target"][:20, None], data, "train")
    assert result["samples"] == 20 and result["baselines"]["floor"]["token_cosine"] < 0.5
    assert result["baselines"]["nearest"]["token_cosine"] < 0.99
    result, _, _ = score.report(
        data["train_target"][:, None], data, "train"
    )  # none is left to compare with
    assert result["baselines"].keys() == {"mean", "ridge", "shuffled"}


@pytest.mark.parametrize("draws", [1, 3])
def test_one_sample(dataset, draws):
    """It has scores, but no confidence intervals, and nobody to be shuffled with."""
    data = open_dataset(dataset)
    x = np.repeat(data["val_target"][:1, None], draws, 1)
    result, text, _ = score.report(x, data)
    assert result["samples"] == 1 and result["token_cosine"] == pytest.approx(1)
    assert result["baselines"].keys() == {"mean", "ridge", "nearest", "floor"}
    assert result["confidence"] == {} and "nan" in text
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
        line.split()[0]: dict(zip(score.METRICS, map(float, line.split()[-8:])))
        for line in table[1:]
    }
    assert rows.keys() == {"generated", "+-", "mean", "ridge", "nearest", "floor", "shuffled"}
    assert rows["generated"]["token_cosine"] == 1 and rows["mean"]["token_cosine"] == 0
    assert rows["ridge"]["token_cosine"] > 0.8 > 0.3 > rows["shuffled"]["token_cosine"]
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["baselines"]["ridge"]["l2"] == pytest.approx(rows["ridge"]["l2"], abs=1e-4)
    np.save(
        tmp_path / "draws.npy",
        truth[:6, None] + np.array([-0.1, 0, 0.1], np.float32)[:, None, None],
    )
    done = run("-m", "report.score", tmp_path / "draws.npy", f"--data_dir={dataset}", "--limit=6")
    mean = next(line for line in done.stdout.splitlines() if line.startswith("mean of 3"))
    assert mean.split()[3] == "1.0000" and "energy_score" in done.stdout
    np.save(tmp_path / "short.npy", truth[:3])
    assert "(3, 4, 5)" in refused(
        "-m", "report.score", tmp_path / "short.npy", f"--data_dir={dataset}"
    )
    assert "(3, 4, 5)" in refused(
        "-m", "report.score", tmp_path / "short.npy", f"--data_dir={dataset}", "--limit=4"
    )
    assert "split='test' is unknown" in refused(
        "-m", "report.score", tmp_path / "truth.npy", f"--data_dir={dataset}", "--split=test"
    )
    assert "the first 11" in refused(
        "-m", "report.score", tmp_path / "truth.npy", f"--data_dir={dataset}", "--limit=11"
    )
    assert "No such file" in refused(
        "-m", "report.score", tmp_path / "truth.npy", f"--data_dir={dataset}", "--save=no/a.json"
    )
    np.save(tmp_path / "huge.npy", truth.astype(">f8") * 1e20)
    assert "above 1e15" in refused(
        "-m", "report.score", tmp_path / "huge.npy", f"--data_dir={dataset}"
    )
    np.save(tmp_path / "big.npy", truth.astype(">f8"))
    assert (
        run("-m", "report.score", tmp_path / "big.npy", f"--data_dir={dataset}").stdout.splitlines()
        == table
    )
    np.save(tmp_path / "nan.npy", np.full((10, 4, 5), np.nan, np.float32))
    assert "holds NaN" in refused(
        "-m", "report.score", tmp_path / "nan.npy", f"--data_dir={dataset}"
    )
    assert "nowhere" in refused(
        "-m", "report.score", tmp_path / "nowhere.npy", f"--data_dir={dataset}"
    )


def test_what_is_not_finite_is_null():
    """Metrics of a single token have no spread: NaN in the table, None in what is saved."""
    stats = {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
    data = dict.fromkeys(ARRAYS, np.ones((1, 1, 3))) | {"stats": stats}
    result, text, _ = score.report(np.ones((1, 1, 1, 3)), data)
    assert result["std_ratio"] is None and result["baselines"]["mean"]["std_ratio"] is None
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
    x = torch.randn(40, 2, 3)
    score.add_up(40, x.__getitem__, {"generated": x.__getitem__})
    assert ("scoring" in sys.stderr.getvalue()) == terminal


D = 480  # channels of the tests below


def wide(n, seed):
    """Tokens (n, 4, D) of variance 1 in every channel, about, mixed from independent components
    whose variances fall from 27 to 0.1."""
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    std = (27 / (1 + torch.arange(D) / 3)).sqrt()
    return std * torch.randn(n, 4, D, generator=g.manual_seed(seed + 1)) @ mix


@pytest.mark.parametrize(
    "change, low, high",
    [
        (lambda x: 0.8 * x, 0.95, 1.05),  # all directions alike: nothing is lost
        (lambda x: x + 0.1 * torch.randn(D, generator=torch.Generator().manual_seed(1)), 0.8, 1.2),
        (lambda x: x + 0.5 * torch.randn(x.shape), 0.7, 1.0),  # small directions are mixed
        (lambda x: x.roll(1, -1), 0.7, 1.1),  # as large as it was, but of other directions
    ],
)
def test_of_many_channels_some_are_compared(monkeypatch, change, low, high):
    """Of a known distance they find so much; what is cheap stays exact."""
    torch.manual_seed(0)
    x = wide(400, 0)
    y = change(x)
    exact = score.metrics(y, x)
    monkeypatch.setattr(score, "WIDE", 400)
    ours = score.metrics(y, x)
    assert ours == score.metrics(y, x)
    assert low < ours.pop("frechet") / exact.pop("frechet") < high
    assert ours.pop("std_ratio") == pytest.approx(exact.pop("std_ratio"), rel=0.01)
    assert ours == pytest.approx(exact, rel=1e-5)


def test_some_channels_stand_for_all(monkeypatch):
    """Evenly spaced, first and last among them; squared lengths stay about the same."""
    x = wide(500, 1)
    assert torch.equal(score.with_constant(x)[..., 1:], x)
    monkeypatch.setattr(score, "WIDE", 400)
    kept = score.with_constant(x)
    assert kept.shape == (500, 4, 1 + 384) and (kept[..., 0] == 1).all()
    assert kept[..., 1:].square().sum() / x.square().sum() == pytest.approx(1, abs=0.05)
    channels = score.with_constant(torch.arange(D))[1:] / (D / 384) ** 0.5
    assert channels[0] == 0 and channels[-1] == pytest.approx(D - 1)
    assert set(channels.diff().round().tolist()) == {1, 2}


def test_ridge_of_many_channels(monkeypatch):
    """Some channels of the condition predict most of what all of them do."""
    cond = wide(1200, 0)
    weight = torch.randn(D, 5, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    target = cond @ weight / D**0.5 + 0.1 * torch.randn(1200, 4, 5, generator=g)
    new = wide(200, 2)
    expected = score.fit_ridge(cond.__getitem__, target.__getitem__, 1200)(new)
    monkeypatch.setattr(score, "WIDE", 400)
    ours = score.fit_ridge(cond.__getitem__, target.__getitem__, 1200)(new)
    error = (ours - expected).square().mean() / expected.square().mean()
    assert 0 < error < 0.15


def test_the_table_says_what_is_estimated(monkeypatch, dataset):
    data = open_dataset(dataset)
    draws = data["val_target"][:, None]
    assert "estimates" not in score.report(draws, data)[1]
    stats = {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
    data = dict.fromkeys(ARRAYS, wide(20, 0).numpy()) | {"stats": stats}
    monkeypatch.setattr(score, "WIDE", 400)
    result, text, _ = score.report(data["val_target"][:, None], data)
    assert "frechet and std_ratio are estimates, from 384 of the channels" in text
    assert result["frechet"] == pytest.approx(0, abs=1e-3)


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
