import numpy as np
import pytest
import torch

import score
from conftest import refused, run


def test_metrics_on_cases_with_known_values():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(400, 4, 16, generator=g)
    exact = score.metrics(target, target)
    assert exact["token_cosine"] == pytest.approx(1, abs=1e-5) and exact["retrieval_r1"] == 1 and exact["l2"] == 0
    assert (
        exact["frechet"] == pytest.approx(0, abs=1e-6)
        and exact["norm_ratio"] == exact["std_ratio"] == 1
        and exact["snr_db"] > 100
    )
    half = score.metrics(target / 2, target)
    assert half["token_cosine"] == pytest.approx(1, abs=1e-5)
    assert half["norm_ratio"] == pytest.approx(0.5) and half["std_ratio"] == pytest.approx(0.5)
    assert half["snr_db"] == pytest.approx(10 * np.log10(4), abs=1e-4)  # the error is half of the truth
    assert half["l2"] == pytest.approx(target.norm(dim=-1).mean().item() / 2, rel=1e-5)
    other = score.metrics(torch.randn(400, 4, 16, generator=g), target)
    assert abs(other["token_cosine"]) < 0.03 and other["retrieval_r1"] < 0.02
    zero = score.metrics(torch.zeros_like(target), target)
    assert zero["token_cosine"] == 0 and zero["snr_db"] == pytest.approx(0, abs=1e-6)
    assert zero["retrieval_r1"] == pytest.approx(1 / 400)  # all tied: chance, not luck


def test_frechet_distance_of_known_gaussians():
    """Between N(m, diag(a^2)) and N(0, diag(b^2)) it is |m|^2 + sum (a - b)^2; a rotation of both changes nothing."""
    g = torch.Generator().manual_seed(0)
    a, b, m = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 1, 3]), torch.tensor([1.0, 0, 2])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]
    x = torch.randn(200_000, 1, 3, generator=g) * a + m
    y = torch.randn(200_000, 1, 3, generator=g) * b
    assert score.frechet_distance(x, y) == pytest.approx(5 + 2, rel=0.02)
    assert score.frechet_distance(x @ rotation, y @ rotation) == pytest.approx(score.frechet_distance(x, y), rel=1e-3)


def test_an_exact_draw_has_cosine_r2_and_the_mean_r():
    """The claim that tells a user what to expect: y = R e + sqrt(1 - R^2) n, in many channels."""
    g = torch.Generator().manual_seed(0)
    explained, (n1, n2) = torch.randn(500, 4, 256, generator=g), torch.randn(2, 500, 4, 256, generator=g)
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
    target = g.standard_normal((60, 4, 5)).astype(np.float32) + (cond @ g.standard_normal((8, 5)))[:, :1].astype(
        np.float32
    )
    ours = score.Ridge(cond, target, torch.as_tensor, torch.as_tensor)
    features = cond if tokens == 4 else cond.mean(1, keepdims=True).repeat(4, 1)
    held_out = np.arange(0, 60, 10)
    fit = np.setdiff1d(np.arange(60), held_out)
    x = np.concatenate([features, np.ones((60, 4, 1), np.float32)], -1)
    top = np.linalg.eigvalsh(x[fit].reshape(-1, 9).T.astype(float) @ x[fit].reshape(-1, 9))[-1]
    errors, penalties = [], np.logspace(-6, 1, 15) * top
    for penalty in penalties:
        model = Ridge(alpha=penalty, fit_intercept=False).fit(x[fit].reshape(-1, 9), target[fit].reshape(-1, 5))
        errors.append(((model.predict(x.reshape(-1, 9)).reshape(60, 4, 5) - target)[held_out] ** 2).mean())
    best = Ridge(alpha=penalties[np.argmin(errors)], fit_intercept=False).fit(x.reshape(-1, 9), target.reshape(-1, 5))
    assert np.allclose(
        ours(torch.from_numpy(cond)).numpy(), best.predict(x.reshape(-1, 9)).reshape(60, 4, 5), atol=1e-3
    )


def test_command_line_scores_a_file(dataset, tmp_path):
    np.save(tmp_path / "truth.npy", np.load(dataset / "val_target.npy"))
    table = run("score.py", tmp_path / "truth.npy", f"--data_dir={dataset}").stdout.splitlines()
    assert table[0].split() == list(score.METRICS)
    rows = {line.split()[0]: dict(zip(score.METRICS, map(float, line.split()[1:]))) for line in table[1:]}
    assert rows.keys() == {"generated", "mean", "ridge", "shuffled"}
    assert rows["generated"]["token_cosine"] == 1 and rows["mean"]["token_cosine"] == 0
    assert rows["ridge"]["token_cosine"] > 0.8 > 0.3 > rows["shuffled"]["token_cosine"]
    np.save(tmp_path / "short.npy", np.load(dataset / "val_target.npy")[:3])
    assert "(3, 4, 5)" in refused("score.py", tmp_path / "short.npy", f"--data_dir={dataset}")
    np.save(tmp_path / "nan.npy", np.full((10, 4, 5), np.nan, np.float32))
    assert "holds NaN" in refused("score.py", tmp_path / "nan.npy", f"--data_dir={dataset}")
    assert "nowhere" in refused("score.py", tmp_path / "nowhere.npy", f"--data_dir={dataset}")
