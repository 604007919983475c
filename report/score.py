"""
Is it good? Metrics of generated embeddings, beside the baselines that give them a meaning.

    python -m report.score generated.npy --data_dir=data/mine

Everything is measured in standardized space: each channel minus the mean of the training set,
divided by its standard deviation. There a token cosine of 0 means "no better than the mean", no
channel dominates by its scale, and a cosine can be read: where the condition explains a share R^2
of the target's variance, one exact draw from p(target | cond) has an expected cosine near R^2, and
the conditional mean, the best that any regressor can predict, one near R.

Baselines:
    mean      predicts the mean of the training set
    ridge     regresses each token on the condition's token at the same place (or on the mean of
              the condition's tokens, where the token counts differ)
    nearest   takes the target of the training sample with the nearest condition
    floor     takes targets of the training set: perfect samples, but of no particular condition.
              Its Frechet distance is what that many perfect samples have by chance
    shuffled  scores the generated samples against the truth of other conditions

With several draws per condition, it also measures whether they vary as the truth does.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.configurator import configure_paths, set_up_console
from plumbing.dataset import open_dataset, split_arrays

METRICS = (
    "token_cosine",  # cosine of generated and true token, mean over tokens (higher is better)
    "pooled_cosine",  # the same for the mean over the tokens of a sample (higher)
    "retrieval_r1",  # share of samples whose own truth is the nearest by pooled cosine (higher)
    "frechet",  # Frechet distance between Gaussians fitted to all tokens (lower)
    "l2",  # Euclidean distance of generated and true token, mean over tokens (lower)
    "norm_ratio",  # mean token norm, generated over true (near 1)
    "std_ratio",  # standard deviation per channel, generated over true, root mean square (near 1)
    "snr_db",  # 10 log10 of the power of the truth over that of the error (higher)
)
SPREAD = {  # of several draws per condition
    # their standard deviation over that of the truth about their mean
    "spread_ratio": "near 1 for exact draws",
    # distance of draw and true token minus half that of two draws
    "energy_score": "lower is better; of a single prediction it is the l2",
}
LIMIT = 5000  # how many samples are scored by default: the first ones
GROUPS = 20  # of samples; the jackknife leaves out one at a time
WIDE = 2048  # channels: of more than these,
NARROW = 384  # the covariances are of so many, see with_constant()

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


def pooled(samples, rows):
    """(N, D): means over the tokens of samples(rows) -> (B, T, D), scaled to length 1."""
    means = [samples(part).mean(1) for part in chunks(rows)]
    return F.normalize(torch.cat(means))


def with_constant(x):
    """(..., D) -> (..., 1 + D): 1 and the channels. If these are more than WIDE, NARROW of them,
    evenly spaced, and scaled to stand for all: squared lengths stay about the same."""
    D = x.shape[-1]
    if D > WIDE:
        x = x[..., evenly(D, NARROW)] * math.sqrt(D / NARROW)
    return F.pad(x, (1, 0), value=1.0)


def moments(x):
    """(1 + D, 1 + D) for tokens (B, T, D): their number, sum, and sum of outer products."""
    tokens = with_constant(x).flatten(0, 1).double()
    return tokens.T @ tokens


def gaussian(moments):
    """Mean (1 + D,) and covariance (1 + D, 1 + D) of the tokens with these moments. They include
    the constant, which varies by 0 and changes no figure."""
    n = moments[0, 0]
    mean = moments[0] / n
    centered = moments - n * torch.outer(mean, mean)
    return mean, centered / (n - 1).clamp(min=1)


def spread(x, y):
    """Of draws x (B, M, T, D) and truth y (B, T, D), tensors whose means make up SPREAD.

    spread_ratio is the ensemble forecasters' (Fortin et al. 2014, equation 15): if the truth is one
    more draw, its mean square distance from the mean of M draws is (1 + 1/M) times their variance.
    energy_score (Gneiting and Raftery 2007, equation 21), here of tokens, is lowest in expectation
    for the true distribution; of a single prediction it is the l2.
    """
    M = x.shape[1]
    energy = norm(x - y[:, None]).mean()
    for i in range(1, M):  # the distances between each draw and the i-th after it
        energy -= norm(x - x.roll(i, 1)).mean() / (2 * (M - 1))
    return {
        "energy_score": energy,
        "variance": (1 + 1 / M) * x.var(1),
        "error_of_mean": (x.mean(1) - y).square(),
    }


def measure(x, y, rows, true_pooled):
    """Of samples x (B, T, D), tensors whose means make up METRICS.

    y: (B, T, D) their truth, that of these rows; true_pooled: (N, D), pooled() of all
    """
    error = x - y
    mean = x.mean(1)  # (B, D)
    nearest = (mean @ true_pooled.T).argmax(1)  # of several that are equally near, the first
    return {
        "token_cosine": cosine(x, y),
        "pooled_cosine": cosine(mean, y.mean(1)),
        "retrieval_r1": (nearest == torch.as_tensor(rows)).float(),
        "l2": norm(error),
        "norm": norm(x),
        "true_norm": norm(y),
        "power": y.square(),
        "error": error.square(),
    }


def add_up(n, truth, predicted, draws=None):
    """({name: sums}, [sums of each group]) over n samples of measure(), and for `generated` of
    spread(); the groups are those of `generated`. The other arguments: see predictions()."""
    true_pooled = pooled(truth, np.arange(n))  # (N, D)
    sums = defaultdict(Counter)  # a Counter adds up values by their names
    groups = []
    parts = np.array_split(np.arange(n), min(GROUPS, n))
    for group in tqdm(parts, "scoring", leave=False, delay=1, disable=None):
        groups.append(Counter())
        for rows in chunks(group):
            y = truth(rows)
            true_moments = moments(y)  # costs the most, and serves all that is predicted
            for name, predict in predicted.items():
                x = predict(rows)
                values = measure(x, y, rows, true_pooled)
                if draws and name == "generated":
                    values |= spread(draws(rows), y)
                part = {key: len(rows) * value.mean().double() for key, value in values.items()}
                part |= {"samples": len(rows), "moments": moments(x), "true_moments": true_moments}
                sums[name].update(part)
                if name == "generated":
                    groups[-1].update(part)
    return sums, groups


def figures(sums):
    """METRICS and, of several draws, SPREAD from the sums of add_up(), as floats."""
    values = {name: total / sums["samples"] for name, total in sums.items()}
    mean, cov = gaussian(sums["moments"])
    true_mean, true_cov = gaussian(sums["true_moments"])
    values["frechet"] = frechet_distance(mean, cov, true_mean, true_cov)
    values["norm_ratio"] = values["norm"] / values["true_norm"]
    values["std_ratio"] = (cov.trace() / true_cov.trace()).sqrt()
    values["snr_db"] = 10 * (values["power"] / values["error"].clamp(min=1e-12)).log10()
    if "variance" in values:
        error = values["error_of_mean"].clamp(min=1e-12)
        values["spread_ratio"] = (values["variance"] / error).sqrt()
    return {name: values[name].item() for name in (*METRICS, *SPREAD) if name in values}


def confidence(totals, groups):
    """Half the widths of the 95% confidence intervals of figures(); {} for a single group.

    totals: {name: sum over all samples}; groups: [{name: sum over a group}]
    They are 1.96 times the standard error by the jackknife, which leaves out one group after the
    other (Efron and Tibshirani 1993, chapter 11).
    """
    n = len(groups)
    if n == 1:
        return {}
    estimates = []
    for group in groups:
        rest = Counter(totals)
        rest.subtract(group)
        estimates.append(figures(rest))
    widths = {}
    for name in estimates[0]:
        deviation = np.std([values[name] for values in estimates])
        widths[name] = 1.96 * (n - 1) ** 0.5 * deviation
    return widths


def metrics(generated, target):
    """METRICS, as floats, of two standardized float tensors (N, T, D); NaN if the generated ones
    are not finite."""
    if not generated.isfinite().all():
        return dict.fromkeys(METRICS, math.nan)
    sums, _ = add_up(len(target), target.__getitem__, {"generated": generated.__getitem__})
    return figures(sums["generated"])


def fit_ridge(cond, target, n):
    """Linear regression of each target token on the condition's token at its place (or, where the
    token counts differ, on the mean of the condition's tokens). Held-out training samples choose
    the penalty.

    cond, target: functions of rows -> standardized (B, S, C) and (B, T, D), of n training samples
    Returns a function from conditions (B, S, C) to predictions (B, T, D), all standardized.
    """
    _, T, D = target([0]).shape

    def inputs(x):
        """(B, T, 1 + C)"""
        if x.shape[1] != T:
            x = x.mean(1, keepdim=True).expand(-1, T, -1)
        return with_constant(x)

    def products(rows):
        """x^T x and x^T y of the inputs x and the targets y."""
        xx = xy = 0
        for part in chunks(rows):
            x = inputs(cond(part)).flatten(0, 1).double()
            xx += x.T @ x  # (1 + C, 1 + C)
            xy += x.T @ target(part).flatten(0, 1).double()  # (1 + C, D)
        return xx, xy

    def solve(xx, xy, penalty):
        return torch.linalg.solve(xx + penalty * torch.eye(len(xx)), xy)  # (1 + C, D)

    def error(penalty):
        """|x weight - y|^2 over the held-out tokens, without |y|^2."""
        weight = solve(xx - held_out_xx, xy - held_out_xy, penalty)
        return (weight * (held_out_xx @ weight - 2 * held_out_xy)).sum()

    enough = 262144 if D <= WIDE else 65536  # tokens
    rows = evenly(n, min(n, math.ceil(enough / T)))
    xx, xy = products(rows)
    held_out_xx, held_out_xy = products(rows[::10])
    largest = torch.linalg.eigvalsh(xx - held_out_xx)[-1].item()
    penalties = max(largest, 1e-6) * np.logspace(-6, 1, 15)
    best = min(penalties, key=error)
    weight = solve(xx, xy, best).float()  # once the penalty is chosen, every sample counts
    return lambda cond: inputs(cond) @ weight


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
    """What to score on the first N samples of a split: their truth, a function of rows ->
    standardized (B, T, D); {name: such a function} of the samples, the first draws, and of the
    baselines; and one that gives all draws (B, M, T, D), or None for a single draw.

    draws: raw (N, M, T, D), M for each condition; data: from open_dataset
    In the training split, `ridge` has seen the samples; the other baselines have not.
    """
    n, M = draws.shape[:2]
    stats = data["stats"]
    samples = standardized(draws[:, 0], stats, "target")
    cond = standardized(data[f"{split}_cond"], stats, "cond")
    truth = standardized(data[f"{split}_target"], stats, "target")
    train_cond = standardized(data["train_cond"], stats, "cond")
    train_target = standardized(data["train_target"], stats, "target")
    n_train = len(data["train_cond"])

    result = {"generated": samples}
    all_draws = None
    if M > 1:
        all_draws = standardized(draws, stats, "target")
        result[f"mean of {M}"] = lambda rows: all_draws(rows).mean(1)
    result["mean"] = lambda rows: torch.zeros_like(truth(rows))
    ridge = fit_ridge(train_cond, train_target, n_train)
    result["ridge"] = lambda rows: ridge(cond(rows))
    first = n if split == "train" else 0  # after the samples themselves
    others = n_train - first
    if others:
        candidates = first + evenly(others, min(others, 16384))
        pooled_candidates = pooled(train_cond, candidates)
        drawn = first + evenly(others, n)

        def nearest(rows):
            similarity = cond(rows).mean(1) @ pooled_candidates.T
            return train_target(candidates[similarity.argmax(1).numpy()])

        result["nearest"] = nearest
        result["floor"] = lambda rows: train_target(drawn[rows])
    if n > 1:
        result["shuffled"] = lambda rows: samples((rows + 1) % n)
    return truth, result, all_draws


def report(draws, data, split="val"):
    """Score raw `draws` (N, draws, T, D) against the first N samples of a split.

    Returns a dict, the text that shows it, and predictions(). The dict has the METRICS of the first
    draw, `samples` (N), `confidence` {name: half-width of the 95% interval}, `baselines`
    {name: metrics} and, for several draws, `mean_of_draws` (metrics) and `spread` (SPREAD); None
    is what is not finite, since JSON has no NaN.
    """
    n, M = draws.shape[:2]
    references = predictions(draws, data, split)
    sums, groups = add_up(n, *references)
    others = {name: figures(sums[name]) for name in sums}
    scores = others.pop("generated")
    widths = confidence(sums["generated"], groups)
    text = table({"generated": scores, "+- (95%)": widths} | others)
    result = scores | {
        "samples": n,
        "confidence": widths,
        "baselines": others,
    }
    if draws.shape[3] > WIDE:
        text += f"\nfrechet and std_ratio are estimates, from {NARROW} of the channels"
    if M > 1:
        result["mean_of_draws"] = {"draws": M} | others.pop(f"mean of {M}")
        result["spread"] = {"draws": M}
        text += f"\n{M} draws per condition:"
        for name, meaning in SPREAD.items():
            result["spread"][name] = result.pop(name)
            width = widths.get(name, math.nan)
            text += f"\n  {name:<14}{scores[name]:8.4f} +- {width:.4f}  ({meaning})"
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
            text += f"{row.get(name, math.nan):{max(len(name), 8) + 2}.4f}"
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
