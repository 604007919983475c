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
    ridge     the mean of model.Prior: regresses each token on the condition's token at the same
              place and the 3x3 around that (or, where the token counts differ, on their mean)
    gaussian  draws from model.Prior: ridge, plus noise fitted to what ridge leaves. A model that is
              no better is not worth its training
    floor     takes targets of the training set: perfect samples, but of no particular condition.
              Its Frechet distances are those that so many perfect samples have by chance
    shuffled  scores the generated samples against the truth of other conditions

What tells a sampler that draws every token by itself from an exact one: frechet_patch,
frechet_pooled, neighbours and, of several draws, the variogram score, neighbours_of_draws and the
spread by frequency. token_cosine, r2, frechet, std_ratio and spread_ratio do not.
"""

import json
import math
from collections import Counter
from functools import partial
from itertools import combinations
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
    "frechet",  # Frechet distance between Gaussians fitted to all tokens (lower)
    "frechet_patch",  # to 2x2 tokens side by side (lower)
    "frechet_pooled",  # to the means over the tokens of a sample (lower)
    "neighbours",  # cosine of tokens side by side (near that of the truth)
    "std_ratio",  # standard deviation per channel, generated over true, root mean square (near 1)
)
SPREAD = (  # of several draws per condition
    "spread_ratio",  # their deviation over the truth's (near 1)
    "variogram_score",  # of differences of neighbours (lower)
    "neighbours_of_draws",  # cosine of neighbours in the difference of two draws (near the next)
    "neighbours_of_truth",  # the same in the difference of the truth and a draw
    "mean_token_cosine",  # of the mean of infinitely many draws (higher; compare with ridge)
    "mean_r2",  # of the same
)
LIMIT = 5000  # at most so many samples are scored, the first ones
GROUPS = 20  # of samples; the jackknife leaves out one at a time
WIDE = 2048  # channels: of more than these
NARROW = 384  # so many are scored, see narrow()
LEADING = 128  # principal components of patches and of pooled tokens

# ---- settings of python -m report.score FILE, a .npy of raw (N, T, D) or (N, draws, T, D)
data_dir = ""  # dataset that prepare.py wrote
split = "val"  # val | train: the split whose samples FILE holds, in its order
save = ""  # .json to write the scores to
# ----


cosine = partial(F.cosine_similarity, dim=-1)  # (..., D), (..., D) -> (...); 0 of a zero vector


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians, (D,) and (D, D), as in
    FID (Heusel et al. 2017, arXiv 1706.08500). NaN if the first is not finite."""
    # eigh would raise an error; the trace below is not finite either
    values, vectors = torch.linalg.eigh(cov_a.nan_to_num(0, 0, 0))
    root = vectors * values.clamp(min=0).sqrt()  # root root^T = S_a
    product = root.T @ cov_b @ root
    values = torch.linalg.eigvalsh(product)  # those of S_a S_b
    trace = values.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    distance = shift + (cov_a + cov_b).trace() - 2 * trace
    return distance.clamp(min=0)


def chunks(rows):
    """Parts of at most 24 rows, so that memory does not grow with the number of samples."""
    return np.array_split(rows, len(rows) // 24 + 1)


def evenly(total, n):
    """n of the integers below total, evenly spaced."""
    return np.linspace(0, total - 1, n, dtype=int)


def narrow(x):
    """(..., D) itself or, if D is more than WIDE, NARROW of the channels, evenly spaced: the
    covariances of all would take minutes."""
    D = x.shape[-1]
    return x[..., evenly(D, NARROW)] if D > WIDE else x


def moments(x):
    """(1 + d, 1 + d) for vectors (..., d): their number, sum, and sum of outer products."""
    x = F.pad(x, (1, 0), value=1.0).flatten(0, -2).double()
    return x.T @ x


def mean_and_covariance(moments):
    """Mean (1 + d,) and covariance (1 + d, 1 + d) of the vectors with these moments. They include
    the constant, which varies by 0 and changes no figure."""
    n = moments[0, 0]
    mean = moments[0] / n
    centered = moments - torch.outer(mean, moments[0])
    return mean, centered / (n - 1).clamp(min=1)


def leading(x):
    """(d, at most LEADING): principal components of (n, d), found in at most 1,000 of them."""
    n = min(len(x), 1000)
    x = x[evenly(len(x), n)]
    x = x - x.mean(0)
    components = torch.linalg.svd(x, full_matrices=False).Vh
    return components[: min(LEADING, n - 1)].T


def patches(x):
    """(B, H, W, D) -> (n, 4 * D): the tokens of all 2x2 places; of a single row, of 1x2."""
    size = [min(2, n) for n in x.shape[1:3]]
    x = F.unfold(x.movedim(3, 1), size)  # (B, 4 * D, n / B)
    return x.mT.flatten(0, 1)


def neighbours(f, x):
    """Mean of f(one, other) over all tokens of (..., H, W, D) that lie side by side or one above
    the other."""
    beside = f(x[..., :-1, :], x[..., 1:, :])
    below = f(x[..., :-1, :, :], x[..., 1:, :, :])
    return torch.cat([beside.flatten(), below.flatten()]).mean()


def squared_mean(x):
    """(B, M, ...) -> (B, ...): the square of the mean of infinitely many draws, from M of them: the
    mean product of two different ones. The square of their own mean has noise in it, too."""
    M = x.shape[1]
    products = x.sum(1).square() - x.square().sum(1)  # the sum of M (M - 1)
    return products / (M * (M - 1))


def variogram(a, b):
    """Of neighbours (B, M + 1, ..., D), M draws and their truth: the square by which the root of
    their difference is wrong on average, (B, ..., D)."""
    steps = (a - b).abs().sqrt()
    return squared_mean(steps[:, :-1] - steps[:, -1:])


def dct(n):
    """(n, n): the discrete cosine transform (DCT-II, orthonormal)."""
    k = torch.arange(n)
    angles = math.pi / n * torch.outer(k, k + 0.5)
    return F.normalize(angles.cos())


def spectrum(x):
    """(n, H, W, D) -> (H + W - 1,): mean power at each frequency k + l."""
    H, W = x.shape[1:3]
    transform = torch.kron(dct(H), dct(W))  # (T, T)
    waves = transform @ x.flatten(1, 2)  # (n, T, D)
    frequency = torch.arange(H)[:, None] + torch.arange(W)  # (H, W)
    power = waves.square().mean((0, 2))  # (T,)
    return torch.bincount(frequency.flatten(), power)


def spread(x, y):
    """Of draws x (B, M, H, W, D) and truth y (B, H, W, D), means that make up SPREAD.

    spread_ratio is the ensemble forecasters' (Fortin et al. 2014, equation 15): if the truth is one
    more draw, its mean square distance from the mean of M draws is (1 + 1/M) times their variance.
    variogram_score is of order 0.5 (Scheuerer and Hamill 2015, equation 11), of neighbours, less
    what it owes to the number of draws; lowest in expectation for the true distribution.
    """
    M = x.shape[1]
    truths = y[:, None]
    mean = x.mean(1)  # (B, H, W, D)
    power = mean.square().sum(-1)  # (B, H, W)
    share = squared_mean(x).sum(-1) / power.clamp(min=1e-12)  # of the power that is not noise
    length = share.clamp(min=0.2).sqrt()  # it may not reach 0
    return {
        "variogram_score": neighbours(variogram, torch.cat([x, truths], 1)),
        "neighbours_of_draws": neighbours(cosine, x[:, 0] - x[:, 1]),
        "neighbours_of_truth": neighbours(cosine, y - x[:, 1]),
        "mean_token_cosine": (cosine(mean, y) / length).mean(),
        "mean_error": squared_mean(x - truths).mean(),
        # the mean square of deviations is (M - 1)/M of the variance
        "deviation": (M + 1) / (M - 1) * spectrum((x - mean[:, None]).flatten(0, 1)),
        "deviation_of_truth": spectrum(y - mean),
    }


def measure(draws, y, patch_basis, pooled_basis):
    """{name: sum over the samples} of what makes up METRICS and, of several draws, SPREAD.

    draws: (B, M, H, W, D); y: (B, H, W, D), their truth; the bases: principal components of the
    truth's patches and pooled tokens
    """
    x = draws[:, 0]
    means = {
        "token_cosine": cosine(x, y).mean(),
        "neighbours": neighbours(cosine, x),
        "power": y.square().mean(),
        "error": (x - y).square().mean(),
    }
    if draws.shape[1] > 1:
        means |= spread(draws, y)
    sums = {name: len(x) * mean.double() for name, mean in means.items()}
    sums["samples"] = len(x)
    sums["frechet"] = moments(x)
    sums["frechet_patch"] = moments(patches(x) @ patch_basis)
    pooled = x.mean((1, 2))  # (B, D)
    sums["frechet_pooled"] = moments(pooled @ pooled_basis)
    return sums


def add_up(n, predicted, grid):
    """{name: [the sums of measure() for each group of samples]} over n samples.

    predicted: see predictions(); grid: (H, W)
    """

    def truth(rows):
        return predicted["truth"](rows)[:, 0].unflatten(1, grid)  # (B, H, W, D)

    rows = evenly(n, min(n, 100))
    patch_basis = leading(patches(truth(rows)))
    pooled = [truth(rows).mean((1, 2)) for rows in chunks(np.arange(n))]
    pooled_basis = leading(torch.cat(pooled))
    groups = np.array_split(np.arange(n), min(GROUPS, n))
    sums = {name: [Counter() for _ in groups] for name in predicted}
    for i, group in enumerate(tqdm(groups, "scoring", leave=False, delay=1, disable=None)):
        for rows in chunks(group):
            y = truth(rows)
            for name, predict in predicted.items():
                draws = predict(rows).unflatten(2, grid)  # (B, M, H, W, D)
                # the others need no intervals, and so no groups
                place = i if name in ("generated", "truth") else 0
                part = measure(draws, y, patch_basis, pooled_basis)
                sums[name][place].update(part)  # which adds, in a Counter
    return sums


def total(groups):
    """The sums over all groups."""
    sums = Counter()
    for group in groups:
        sums.update(group)
    return sums


def figures(groups, true_groups):
    """METRICS and, of several draws, SPREAD and the spread_ratio by frequency, spread_0 and so on,
    as floats, from groups of add_up() and the truth's same groups."""
    sums = total(groups)
    true_sums = total(true_groups)
    n = sums.pop("samples")
    values = {name: value / n for name, value in sums.items()}
    for name in ("frechet_patch", "frechet_pooled", "frechet"):
        mean, cov = mean_and_covariance(sums[name])
        true_mean, true_cov = mean_and_covariance(true_sums[name])
        values[name] = frechet_distance(mean, cov, true_mean, true_cov)
    ratio = cov.trace() / true_cov.trace()  # of tokens, the last ones
    values["std_ratio"] = ratio.sqrt()
    power = values.pop("power")
    values["r2"] = 1 - values.pop("error") / power
    if "mean_error" in values:
        values["mean_r2"] = 1 - values.pop("mean_error") / power
        deviation = values.pop("deviation")
        true_deviation = values.pop("deviation_of_truth")
        ratio = deviation.sum() / true_deviation.sum()
        values["spread_ratio"] = ratio.sqrt()
        ratios = deviation / true_deviation
        for i, ratio in enumerate(ratios.sqrt()):
            values[f"spread_{i}"] = ratio
    return {name: value.item() for name, value in values.items()}


def confidence(groups, true_groups):
    """Half the widths of the 95% confidence intervals of figures(); {} for a single group.

    They are 1.96 times the standard error by the jackknife, which leaves out one group after the
    other (Efron and Tibshirani 1993, chapter 11).
    """
    n = len(groups)
    if n == 1:
        return {}
    others = combinations(groups, n - 1)  # all but the last one, and so on
    true_others = combinations(true_groups, n - 1)
    estimates = list(map(figures, others, true_others))
    factor = 1.96 * (n - 1) ** 0.5
    return {name: factor * np.std([values[name] for values in estimates]) for name in estimates[0]}


def metrics(generated, target, grid):
    """METRICS, as floats, of two standardized float tensors (N, T, D), their tokens on a grid
    (H, W), see narrow(); not finite where the generated ones are not."""
    predicted = {
        "truth": narrow(target)[:, None].__getitem__,
        "generated": narrow(generated)[:, None].__getitem__,
    }
    sums = add_up(len(target), predicted, grid)
    return figures(sums["generated"], sums["truth"])


def as_tensor(x):
    """An array or tensor of any real type as a float32 tensor on the CPU."""
    if torch.is_tensor(x):
        return x.cpu().float()
    return torch.from_numpy(np.array(x, np.float32))


def standardizer(mean, std):
    """Function from raw (..., D) arrays or tensors to standardized float32 tensors on the CPU. What
    is wrong in a constant channel counts in units of the channel that varies most."""
    mean = as_tensor(mean)
    std = as_tensor(std)
    largest = std.max() or 1
    std = std.where(std > 1e-6 * largest, largest)
    return lambda x: (as_tensor(x) - mean) / std


def predictions(draws, data, split):
    """What to score on the first N samples of a split: {name: function of rows -> standardized
    (B, draws, T, D), see narrow()} of their truth, the samples (`generated`) and the baselines.

    draws: raw (N, M, T, D), M for each condition; data: from open_dataset
    In the training split, `ridge` and `gaussian` have seen the samples; the others have not.
    """
    n, M = draws.shape[:2]
    stats = data["stats"]

    def standardized(array, kind):
        """Function of rows -> standardized samples of a raw array; kind: cond or target."""
        encode = standardizer(narrow(stats[f"{kind}_mean"]), narrow(stats[f"{kind}_std"]))
        return lambda rows: encode(narrow(array[rows]))

    samples = standardized(draws, "target")
    cond = standardized(data[f"{split}_cond"], "cond")
    truth = standardized(data[f"{split}_target"], "target")
    train_cond = standardized(data["train_cond"], "cond")
    train_target = standardized(data["train_target"], "target")
    n_train = len(data["train_cond"])
    prior = Prior(data["meta"]["grid"], truth([0]).shape[2], cond([0]).shape[2])
    prior.fit(lambda rows: (train_target(rows), train_cond(rows)), n_train, tokens=131072)

    def ridge(rows):
        """(B, 1, T, D)"""
        return prior.mean(cond(rows))[:, None]

    def gaussian(rows):
        """(B, M, T, D), functions of the row"""
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        shape = M, *prior.variance.shape
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return prior.add(ridge(rows), prior.variance.sqrt() * noise)

    result = {
        "truth": lambda rows: truth(rows)[:, None],
        "generated": samples,
        "mean": lambda rows: torch.zeros_like(truth(rows))[:, None],
        "ridge": ridge,
        "gaussian": gaussian,
    }
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
    n, M, _, D = draws.shape
    grid = data["meta"]["grid"]
    references = predictions(draws, data, split)
    sums = add_up(n, references, grid)
    baselines = {name: figures(sums[name], sums["truth"]) for name in sums}
    scores = baselines.pop("generated")
    widths = confidence(sums["generated"], sums["truth"])
    rows = {"generated": scores, "+- (95%)": widths} | baselines
    text = table(METRICS, rows)
    if D > WIDE:
        text += f"\nof {NARROW} of the {D} channels"
    if M > 1:
        text += f"\n\n{M} draws per condition\n{table(SPREAD, rows)}\n"
        text += "spread_ratio by frequency, from the mean of the grid on:"
        for i in range(sum(grid) - 1):
            text += f" {scores[f'spread_{i}']:.2f}"
    result = scores | {
        "samples": n,
        "draws": M,
        "confidence": widths,
        "baselines": baselines,
    }
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return result, text, references


def table(names, rows):
    """Lines of text: these figures, of each {label: figures} that has them."""
    text = " " * 10
    for name in names:
        text += f"  {name:>8}"
    for label, row in rows.items():
        if names[0] in row:
            text += f"\n{label:<10}"
            for name in names:
                text += f"  {row[name]:{max(len(name), 8)}.4f}"
    return text


def open_samples(paths, data_dir, split):
    """Open what a command line names, here and in report/plot.py: a dataset, and the one file with
    embeddings (N, T, D) or (N, draws, T, D) of the first samples of its split.

    Returns the dataset and at most LIMIT embeddings (n, draws, T, D).
    Raises ValueError where the file does not hold them.
    """
    if len(paths) != 1 or not data_dir:
        raise ValueError(f"name one file of samples, not {paths}, and its --data_dir")
    data = open_dataset(data_dir)
    _, target = split_arrays(data, split)
    draws = np.lib.format.open_memmap(paths[0], mode="r")
    found = f"{paths[0]} holds {draws.shape}; the targets are {target.shape}"
    if draws.ndim == 3:
        draws = draws[:, None]
    if draws.shape[2:] != target.shape[1:] or not 0 < len(draws) <= len(target):
        raise ValueError(found)
    return data, draws[:LIMIT]


def main():
    set_up_console()
    _, paths = configure_paths(globals())
    data, draws = open_samples(paths, data_dir, split)
    result, text, _ = report(draws, data, split)
    if save:
        Path(save).write_text(json.dumps(result, indent=1))
    print(text)


if __name__ == "__main__":
    main()
