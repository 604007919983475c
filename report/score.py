"""
Is it good? Metrics of generated embeddings, beside the baselines that give them a meaning.

    python -m report.score generated.npy --data_dir=data/mine

Everything is measured in standardized space: each channel minus the mean of the training set,
divided by its standard deviation. There a token cosine of 0 means "no better than the mean", no
channel dominates by its scale, and a cosine can be read: where the condition explains a share R^2
of the target's variance, one exact draw from p(target | cond) has an expected cosine near R^2, and
the conditional mean, the best that any regressor can predict, one near R.

Baselines:
    truth     the truth itself, for `neighbours`
    mean      predicts the mean of the training set
    ridge     the mean of model.Prior: regresses each token on the condition's 3x3 tokens around
              its place (or on the mean of them all, where the token counts differ)
    gaussian  draws from model.Prior: ridge, plus noise fitted to what ridge leaves. A model that is
              no better is not worth its training
    floor     takes targets of the training set: perfect samples, but of no particular condition.
              Its Frechet distances are those that so many perfect samples have by chance
    shuffled  scores the generated samples against the truth of other conditions

What tells a sampler that draws every token by itself from an exact one: frechet_patch,
frechet_pooled, neighbours and, of several draws, the variogram score, neighbours_of_draws and the
spread by frequency. token_cosine, r2, frechet, std_ratio and spread_ratio do not, and retrieval_r1
prefers the wrong one: deviations that are independent cancel when tokens are averaged. An exact
draw's pooled cosine is near the R^2 of pooled tokens, and its truth is often not the nearest one.
"""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Prior
from plumbing.configurator import configure_paths, set_up_console
from plumbing.dataset import open_dataset, split_arrays

METRICS = (
    "token_cosine",  # cosine of generated and true token, mean over tokens (higher is better)
    "r2",  # share of the truth's power that is predicted; of an exact draw 2 R^2 - 1 (higher)
    "retrieval_r1",  # share of samples whose own truth is the nearest by pooled cosine (higher)
    "frechet",  # Frechet distance between Gaussians fitted to all tokens (lower)
    "frechet_patch",  # to 2x2 tokens side by side (lower)
    "frechet_pooled",  # to the means over the tokens of a sample (lower)
    "neighbours",  # cosine of tokens side by side (near that of the truth)
    "std_ratio",  # standard deviation per channel, generated over true, root mean square (near 1)
)
SPREAD = {  # of several draws per condition
    "spread_ratio": "their deviation over the truth's: near 1",
    "variogram_score": "of differences of neighbours: lower",
    "neighbours_of_draws": "of the difference of two draws: near the next",
    "neighbours_of_truth": "of the difference of truth and draw",
    "mean_token_cosine": "of the mean of infinitely many draws: higher, compare with ridge",
    "mean_r2": "of the same",
}
LIMIT = 5000  # how many samples are scored by default: the first ones
GROUPS = 20  # of samples; the jackknife leaves out one at a time
WIDE = 2048  # channels: of more than these,
NARROW = 384  # the covariances are of so many, see narrow()
LEADING = 128  # principal components of patches and of pooled tokens

# ---- settings of python -m report.score FILE, a .npy of raw (N, T, D) or (N, draws, T, D)
data_dir = ""  # dataset that prepare.py wrote
split = "val"  # val | train: the split whose samples FILE holds, in its order
limit: int | None = None  # score the first so many; None: at most 5000
save = ""  # .json to write the scores to
# ----


def norm(x):
    """(..., D) -> (...)"""
    return x.norm(dim=-1)


def cosine(a, b):
    """(..., D), (..., D) -> (...); 0 where a vector is 0."""
    norms = norm(a) * norm(b)
    return (a * b).sum(-1) / norms.clamp(min=1e-12)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians, (D,) and (D, D), as in
    FID (Heusel et al. 2017, arXiv 1706.08500)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # root root^T = S_a
    values = torch.linalg.eigvalsh(root.T @ cov_b @ root)  # those of S_a S_b
    trace = values.clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * trace


def chunks(rows):
    """Parts of at most 24 rows, so that memory does not grow with the number of samples."""
    return np.array_split(rows, math.ceil(len(rows) / 24))


def evenly(total, n):
    """n of the integers below total, evenly spaced."""
    return np.linspace(0, total - 1, n, dtype=int)


def narrow(x):
    """(..., D) itself or, if D is more than WIDE, NARROW of the channels, evenly spaced, and scaled
    to stand for all: squared lengths stay about the same."""
    D = x.shape[-1]
    return x[..., evenly(D, NARROW)] * math.sqrt(D / NARROW) if D > WIDE else x


def with_constant(x):
    """(..., d) -> (..., 1 + d): 1 and the channels."""
    return F.pad(x, (1, 0), value=1.0)


def moments(x):
    """(1 + d, 1 + d) for vectors (..., d): their number, sum, and sum of outer products."""
    x = with_constant(x).flatten(0, -2).double()
    return x.T @ x


def gaussian(moments):
    """Mean (1 + d,) and covariance (1 + d, 1 + d) of the vectors with these moments. They include
    the constant, which varies by 0 and changes no figure."""
    n = moments[0, 0]
    mean = moments[0] / n
    centered = moments - n * torch.outer(mean, mean)
    return mean, centered / (n - 1).clamp(min=1)


def leading(x):
    """(d, at most LEADING): principal components of (n, d), found in at most 1,000 of them."""
    n = min(len(x), 1000)
    x = x[evenly(len(x), n)]
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: min(LEADING, n - 1)].T


def patches(x):
    """(B, H, W, D) -> (n, 4 * D): the tokens of all 2x2 places; of a single row, of 1x2."""
    H, W = x.shape[1:3]
    return x.unfold(1, min(2, H), 1).unfold(2, min(2, W), 1).flatten(3).flatten(0, 2)


def pairs(x):
    """All neighbours in (..., H, W, D): those on the left or above (..., n, D), and their right or
    lower ones."""
    return [
        torch.cat([x[..., part, :].flatten(-3, -2), x[..., part, :, :].flatten(-3, -2)], -2)
        for part in (slice(-1), slice(1, None))
    ]


def dct(n):
    """(n, n): the discrete cosine transform (DCT-II, orthonormal)."""
    k = torch.arange(n)
    return F.normalize((math.pi / n * torch.outer(k, k + 0.5)).cos())


def variance(x):
    """Over the draws of (B, M, ...). torch's own takes five times as long for so few."""
    return (x - x.mean(1, keepdim=True)).square().sum(1) / (x.shape[1] - 1)


def spread(x, y):
    """Of draws x (B, M, H, W, D) and truth y (B, H, W, D), means that make up SPREAD.

    spread_ratio is the ensemble forecasters' (Fortin et al. 2014, equation 15): if the truth is one
    more draw, its mean square distance from the mean of M draws is (1 + 1/M) times their variance.
    variogram_score is of order 0.5 (Scheuerer and Hamill 2015, equation 11), of neighbours, less
    what it owes to the number of draws; lowest in expectation for the true distribution.
    """
    M, H, W = x.shape[1:4]
    mean = x.mean(1)  # (B, H, W, D)
    steps, step = (torch.sub(*pairs(z)).abs().sqrt() for z in (x, y))  # (B, M, n, D), (B, n, D)
    waves = torch.kron(dct(H), dct(W)) @ torch.cat([x, y[:, None]], 1).flatten(2, 3)
    squares = (1 + 1 / M) * variance(waves[:, :M]), (waves[:, :M].mean(1) - waves[:, M]).square()
    frequency = F.one_hot(torch.arange(H)[:, None] + torch.arange(W)).flatten(0, 1).float()
    varies, error = (torch.einsum("btd,tf->f", z, frequency) / y.numel() for z in squares)
    # the mean of M draws has 1/M of their noise, that of infinitely many none
    noise = variance(x) / M  # (B, H, W, D)
    power = mean.square().sum(-1)  # (B, H, W)
    length = (power - noise.sum(-1)).clamp(min=0.2 * power).sqrt()  # it may not reach 0
    return {
        "variogram_score": ((steps.mean(1) - step).square() - variance(steps) / M).mean(),
        "neighbours_of_draws": cosine(*pairs(x[:, 0] - x[:, 1])).mean(),
        "neighbours_of_truth": cosine(*pairs(y - x[:, 1])).mean(),
        "variance": varies,  # by frequency k + l
        "error_of_mean": error,
        "noise_of_mean": noise.mean(),
        "mean_token_cosine": ((mean * y).sum(-1) / (length * norm(y)).clamp(min=1e-12)).mean(),
    }


def measure(x, y, rows, true_pooled):
    """Of samples x (B, H, W, D), means that make up METRICS.

    y: (B, H, W, D) their truth, that of these rows; true_pooled: (N, D), of all, of length 1
    """
    nearest = (x.mean((1, 2)) @ true_pooled.T).argmax(1)  # of several, the first
    return {
        "token_cosine": cosine(x, y).mean(),
        "retrieval_r1": (nearest == torch.as_tensor(rows)).float().mean(),
        "neighbours": cosine(*pairs(narrow(x))).mean(),
        "power": x.square().mean(),
        "error": (x - y).square().mean(),
    }


def add_up(n, predicted, grid):
    """{name: [sums of each group of samples]} over n samples: of measure(), spread() and moments.
    predicted: see predictions(); grid: (H, W)"""

    def truth(rows):
        return predicted["truth"](rows)[:, 0].unflatten(1, grid)  # (B, H, W, D)

    means = torch.cat([truth(rows).mean((1, 2)) for rows in chunks(np.arange(n))])  # (N, D)
    patch_basis = leading(patches(narrow(truth(evenly(n, min(n, 100))))))
    pooled_basis, true_pooled = leading(means), F.normalize(means)
    sums = defaultdict(list)
    groups = np.array_split(np.arange(n), min(GROUPS, n))
    for group in tqdm(groups, "scoring", leave=False, delay=1, disable=None):
        parts = defaultdict(list)
        for rows in chunks(group):
            y = truth(rows)
            for name, predict in predicted.items():
                draws = predict(rows).unflatten(2, grid)  # (B, M, H, W, D)
                x = draws[:, 0]
                values = measure(x, y, rows, true_pooled)
                if draws.shape[1] > 1:
                    values |= spread(draws, y)
                part = {key: len(rows) * value.double() for key, value in values.items()}
                tokens = narrow(x)
                parts[name].append(part | {
                    "samples": len(rows),
                    "frechet": moments(tokens),
                    "frechet_patch": moments(patches(tokens) @ patch_basis),
                    "frechet_pooled": moments(x.mean((1, 2)) @ pooled_basis),
                })  # fmt: skip
        for name in predicted:
            sums[name].append(total(parts[name]))
            if name not in ("generated", "truth"):  # the others need no intervals
                sums[name] = [total(sums[name])]
    return sums


def total(parts):
    """The sums of {name: sum} over parts."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def figures(sums, true_sums):
    """METRICS and, of several draws, SPREAD and the spread_ratio by frequency, spread_0 and so on,
    as floats, from sums of add_up() and those of the truth."""
    values = {name: value / sums["samples"] for name, value in sums.items()}
    for name in ("frechet_patch", "frechet_pooled", "frechet"):
        mean, cov = gaussian(sums[name])
        true_mean, true_cov = gaussian(true_sums[name])
        values[name] = frechet_distance(mean, cov, true_mean, true_cov).clamp(min=0)
    values["std_ratio"] = (cov.trace() / true_cov.trace()).sqrt()
    power = true_sums["power"] / true_sums["samples"]
    values["r2"] = 1 - values["error"] / power
    names = [*METRICS]
    if "variance" in values:
        error = values["error_of_mean"]
        values["mean_r2"] = 1 - (error.sum() - values["noise_of_mean"]) / power
        error = error.clamp(min=1e-12)
        values["spread_ratio"] = (values["variance"].sum() / error.sum()).sqrt()
        by_frequency = enumerate((values["variance"] / error).sqrt())
        waves = {f"spread_{i}": ratio for i, ratio in by_frequency}
        values |= waves
        names += [*SPREAD, *waves]
    return {name: values[name].item() for name in names}


def confidence(groups, true_groups):
    """Half the widths of the 95% confidence intervals of figures(); {} for a single group.

    They are 1.96 times the standard error by the jackknife, which leaves out one group after the
    other (Efron and Tibshirani 1993, chapter 11).
    """
    n = len(groups)
    if n == 1:
        return {}
    estimates = [
        figures(*(total(sums[:i] + sums[i + 1 :]) for sums in (groups, true_groups)))
        for i in range(n)
    ]
    return {
        name: 1.96 * (n - 1) ** 0.5 * np.std([values[name] for values in estimates])
        for name in estimates[0]
    }


def metrics(generated, target, grid):
    """METRICS, as floats, of two standardized float tensors (N, T, D), their tokens on a grid
    (H, W); NaN if the generated ones are not finite."""
    if not generated.isfinite().all():
        return dict.fromkeys(METRICS, math.nan)
    predicted = {"truth": target[:, None].__getitem__, "generated": generated[:, None].__getitem__}
    sums = add_up(len(target), predicted, grid)
    return figures(*(total(sums[name]) for name in ("generated", "truth")))


def standardizer(mean, std):
    """Function from raw (..., D) arrays, or tensors on the CPU, to standardized float32 tensors.
    What is wrong in a constant channel counts in units of the channel that varies most."""
    mean = np.asarray(mean, np.float32)
    std = np.array(std, np.float32)
    largest = std.max() or 1
    std[std <= 1e-6 * largest] = largest
    return lambda x: torch.from_numpy((np.asarray(x, np.float32) - mean) / std)


def standardized(array, stats, kind):
    """Function of rows -> standardized samples of a raw array; kind: cond or target."""
    encode = standardizer(stats[f"{kind}_mean"], stats[f"{kind}_std"])
    return lambda rows: encode(array[rows])


def predictions(draws, data, split):
    """What to score on the first N samples of a split: {name: function of rows -> standardized
    (B, draws, T, D)} of their truth, of the samples (`generated`) and of the baselines.

    draws: raw (N, M, T, D), M for each condition; data: from open_dataset
    In the training split, `ridge` and `gaussian` have seen the samples; the others have not.
    """
    n, M = draws.shape[:2]
    stats = data["stats"]
    samples = standardized(draws, stats, "target")
    cond = standardized(data[f"{split}_cond"], stats, "cond")
    truth = standardized(data[f"{split}_target"], stats, "target")
    train_cond = standardized(data["train_cond"], stats, "cond")
    train_target = standardized(data["train_target"], stats, "target")
    n_train = len(data["train_cond"])
    is_narrow = draws.shape[3] <= WIDE  # else the noise would take minutes
    prior = Prior(data["meta"]["grid"], draws.shape[3], narrow(cond([0])).shape[2])
    prior.fit(lambda rows: (train_target(rows), narrow(train_cond(rows))), n_train, is_narrow)

    def ridge(rows):
        """(B, 1, T, D)"""
        return prior.mean(narrow(cond(rows)))[:, None]

    def gaussian(rows):
        """(B, M, T, D), functions of the row"""
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        shape = M, *prior.variance.shape
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return prior.draw(ridge(rows), noise)

    result = {
        "truth": lambda rows: truth(rows)[:, None],
        "generated": samples,
        "mean": lambda rows: torch.zeros_like(truth(rows))[:, None],
        "ridge": ridge,
    }
    if is_narrow:
        result["gaussian"] = gaussian
    first = n if split == "train" else 0  # after the samples themselves
    if n_train > first:
        drawn = first + evenly(n_train - first, n)
        result["floor"] = lambda rows: train_target(drawn[rows])[:, None]
    if n > 1:
        result["shuffled"] = lambda rows: samples((rows + 1) % n)[:, :1]
    return result


def report(draws, data, split="val"):
    """Score raw `draws` (N, draws, T, D) against the first N samples of a split.

    Returns a dict, the text that shows it, and predictions(). The dict has the figures() of the
    samples, `samples` (N), `draws` (M), `confidence` {name: half-width of the 95% interval} and
    `baselines` {name: figures}, the truth among them; None is what is not finite, since JSON has no
    NaN.
    """
    n, M = draws.shape[:2]
    references = predictions(draws, data, split)
    sums = add_up(n, references, data["meta"]["grid"])
    rows = {name: figures(total(sums[name]), total(sums["truth"])) for name in sums}
    scores = rows.pop("generated")
    widths = confidence(sums["generated"], sums["truth"])
    text = table({"generated": scores, "+- (95%)": widths} | rows)
    if draws.shape[3] > WIDE:
        text += f"\nestimates, from {NARROW} of the channels: "
        text += "frechet, frechet_patch, neighbours, std_ratio"
    result = scores | {"samples": n, "draws": M, "confidence": widths, "baselines": rows}
    if M > 1:
        text += f"\n{M} draws per condition     generated  +- (95%)  gaussian"
        for name, meaning in SPREAD.items():
            text += f"\n  {name:<22}"
            for row in (scores, widths, rows.get("gaussian", {})):
                text += f"{row.get(name, math.nan):10.4f}"
            text += f"  {meaning}"
        waves = (f"{scores[f'spread_{i}']:.2f}" for i in range(sum(data["meta"]["grid"]) - 1))
        text += f"\n  by frequency, from the mean of the grid on: {' '.join(waves)}"
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return result, text, references


def table(rows):
    """Lines of text: the metrics of each {name: metrics}."""
    text = " " * 10
    for name in METRICS:
        text += f"  {name:>8}"
    for label, row in rows.items():
        text += f"\n{label:<10}"
        for name in METRICS:
            text += f"  {row.get(name, math.nan):{max(len(name), 8)}.4f}"
    return text


def open_samples(paths, data_dir, split, limit):
    """Open what a command line names, here and in report/plot.py: a dataset, and the one file with
    embeddings (N, T, D) or (N, draws, T, D) of its split.

    Returns the dataset and the first LIMIT or `limit` embeddings (n, draws, T, D).
    Raises ValueError where the file does not hold them, or where they are not finite.
    """
    if len(paths) != 1 or not data_dir:
        raise ValueError(f"name one file of samples, not {paths}, and its --data_dir")
    data = open_dataset(data_dir)
    _, target = split_arrays(data, split)
    draws = np.lib.format.open_memmap(paths[0], mode="r")
    n = min(len(target), LIMIT) if limit is None else limit
    found = f"{paths[0]} holds {draws.shape}; the targets are {target.shape}"
    if draws.ndim == 3:
        draws = draws[:, None]
    if draws.shape[2:] != target.shape[1:] or not 0 < n <= len(draws) <= len(target):
        raise ValueError(f"{found}, of which the first {n} are scored; --limit=N changes that")
    draws = draws[:n]
    if not all(float(abs(x).max()) < 1e15 for x in draws):  # squares overflow in float32
        raise ValueError(f"{paths[0]} holds NaN, Inf or numbers above 1e15")
    return data, draws


def main():
    set_up_console()
    _, paths = configure_paths(globals())
    data, draws = open_samples(paths, data_dir, split, limit)
    result, text, _ = report(draws, data, split)
    if save:
        Path(save).write_text(json.dumps(result, indent=1))
    print(text)


if __name__ == "__main__":
    main()
