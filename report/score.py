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

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.configurator import user_errors_in_one_line
from plumbing.dataset import open_dataset

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


def cosine(a, b):
    """(..., D), (..., D) -> (...); 0 where a vector is 0."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians, (D,) and (D, D), as in
    FID (Heusel et al. 2017, arXiv 1706.08500)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


def most_similar(x, candidates):
    """(B,) for x (B, D): which of the candidates (N, D) is nearest by cosine. Of several that are
    equally near, the first."""
    return (x @ F.normalize(candidates, dim=-1).T).argmax(1)


def chunks(rows, size=256):
    """Parts of at most `size` rows, so that memory does not grow with the number of samples."""
    return np.array_split(rows, -(-len(rows) // size))


def evenly(rows, n):
    """n of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, n).astype(int)]


def pooled(samples, rows):
    """(N, D): means over the tokens of samples(rows) -> (B, T, D)."""
    return torch.cat([samples(part).mean(1) for part in chunks(rows)])


def moments(x):
    """(1 + D, 1 + D) for tokens (B, T, D): their number, sum, and sum of outer products."""
    tokens = F.pad(x.flatten(0, 1).double(), (1, 0), value=1.0)  # (B * T, 1 + D)
    return tokens.T @ tokens


def gaussian(moments):
    """Mean (D,) and covariance (D, D) of the tokens with these moments."""
    n = moments[0, 0]
    mean = moments[0, 1:] / n
    return mean, (moments[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)


def spread(x, y):
    """Of draws x (B, M, T, D) and truth y (B, T, D), values (B,) that make up SPREAD.

    spread_ratio is the ensemble forecasters' (Fortin et al. 2014, equation 15): if the truth is one
    more draw, its mean square distance from the mean of M draws is (1 + 1/M) times their variance.
    energy_score (Gneiting and Raftery 2007, equation 21), here of tokens, is lowest in expectation
    for the true distribution; of a single prediction it is the l2.
    """
    M = x.shape[1]
    energy = (x - y[:, None]).norm(dim=-1).mean((1, 2))
    for i in range(1, M):  # each draw and the i-th after it
        energy -= (x - x.roll(i, 1)).norm(dim=-1).mean((1, 2)) / (2 * (M - 1))
    return {
        "energy_score": energy,
        "variance": (1 + 1 / M) * x.var(1).mean((1, 2)),
        "error_of_mean": (x.mean(1) - y).square().mean((1, 2)),
    }


def measure(x, y, rows, true_pooled):
    """{name: sum} over samples x (B, T, D) of what makes up METRICS; or over several draws
    x (B, M, T, D), SPREAD too, and METRICS of the first.

    y: (B, T, D) their truth; true_pooled: (N, D) of all, theirs in these rows
    """
    values = {}
    if x.ndim == 4:
        values = spread(x, y)
        x = x[:, 0]  # (B, T, D)
    mean = x.mean(1)  # (B, D)
    values |= {  # each (B,)
        "samples": torch.ones(len(rows)),
        "token_cosine": cosine(x, y).mean(1),
        "pooled_cosine": cosine(mean, true_pooled[rows]),
        "retrieval_r1": most_similar(mean, true_pooled) == torch.as_tensor(rows),
        "l2": (x - y).norm(dim=-1).mean(1),
        "norm": x.norm(dim=-1).sum(1),
        "true_norm": y.norm(dim=-1).sum(1),
        "power": y.square().sum((1, 2)),
        "error": (x - y).square().sum((1, 2)),
    }
    sums = {name: value.sum(dtype=torch.float64) for name, value in values.items()}
    return sums | {"moments": moments(x)}


def add(sums, more):
    """Add {name: value} to {name: sum}."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def add_up(sets, truth, n):
    """({name: sums}, [sums of a group of samples]) of measure() for sets {name: function of rows ->
    samples}; groups are those of the first set.

    truth: function of rows -> standardized (B, T, D), of n samples
    """
    true_pooled = pooled(truth, np.arange(n))  # (N, D)
    sums = {name: {} for name in sets}
    groups = []
    for group in np.array_split(np.arange(n), min(GROUPS, n)):
        groups.append({})
        for rows in chunks(group):
            y = truth(rows)
            true_moments = {"true_moments": moments(y)}  # costs most, and serves all sets
            for i, (name, samples) in enumerate(sets.items()):
                more = true_moments | measure(samples(rows), y, rows, true_pooled)
                add(sums[name], more)
                if i == 0:
                    add(groups[-1], more)
    return sums, groups


def figures(sums):
    """METRICS and, of several draws, SPREAD from the sums of measure(), as floats."""
    mean, cov = gaussian(sums["moments"])
    true_mean, true_cov = gaussian(sums["true_moments"])
    means = ("token_cosine", "pooled_cosine", "retrieval_r1", "l2", "energy_score")
    values = {name: sums[name] / sums["samples"] for name in means if name in sums}
    values["frechet"] = frechet_distance(mean, cov, true_mean, true_cov)
    values["norm_ratio"] = sums["norm"] / sums["true_norm"]
    values["std_ratio"] = (cov.trace() / true_cov.trace()).sqrt()
    values["snr_db"] = 10 * (sums["power"] / sums["error"].clamp(min=1e-12)).log10()
    if "variance" in sums:
        values["spread_ratio"] = (sums["variance"] / sums["error_of_mean"].clamp(min=1e-12)).sqrt()
    return {name: float(value) for name, value in values.items()}


def confidence(whole, groups):
    """Half the widths of the 95% confidence intervals of figures(); {} for a single group.

    whole: {name: sum over all samples}; groups: [{name: sum over a group}]
    They are 1.96 times the standard error by the jackknife, which leaves out one group after the
    other (Efron and Tibshirani 1993, chapter 11).
    """
    if len(groups) == 1:
        return {}
    left = [figures({name: whole[name] - group[name] for name in whole}) for group in groups]
    widths = {}
    for name in left[0]:
        variance = (len(groups) - 1) * np.var([values[name] for values in left])
        widths[name] = float(1.96 * variance**0.5)
    return widths


def metrics(generated, target):
    """METRICS, as floats, of two standardized float tensors (N, T, D)."""
    sums, _ = add_up({"generated": generated.__getitem__}, target.__getitem__, len(target))
    return figures(sums["generated"])


class Ridge:
    """Linear regression of each target token on the condition's token at its place (or, where the
    token counts differ, on the mean of the condition's tokens). Held-out training samples choose
    the penalty.

    cond (N, S, C), target (N, T, D): arrays, memory-mapped or not, read in chunks
    encode_cond, encode_target: functions that standardize them
    max_tokens: fit on about so many target tokens at most, of samples evenly spaced
    """

    def __init__(self, cond, target, encode_cond, encode_target, max_tokens=262144):
        self.encode_cond = encode_cond
        self.tokens = target.shape[1]

        def products(rows):
            x, y = self.features(cond[rows]), encode_target(target[rows])
            return moments(torch.cat([x, y], -1))  # (1 + C + D, 1 + C + D)

        def solve(moments, penalty):
            xx, xy = moments[:n, :n], moments[:n, n:]  # (1 + C, 1 + C), (1 + C, D)
            return torch.linalg.solve(xx + penalty * torch.eye(n, dtype=xx.dtype), xy)

        n = 1 + cond.shape[2]
        rows = evenly(np.arange(len(cond)), min(len(cond), -(-max_tokens // self.tokens)))
        everything = sum(products(part) for part in chunks(rows))
        held = sum(products(part) for part in chunks(rows[::10]))
        fitted = everything - held
        top = max(torch.linalg.eigvalsh(fitted[:n, :n])[-1].item(), 1e-6)
        penalties = top * np.logspace(-6, 1, 15)
        errors = []
        for penalty in penalties:
            weight = solve(fitted, penalty)  # (1 + C, D)
            # |x weight - y|^2 over the held-out tokens, without |y|^2
            errors.append((weight * (held[:n, :n] @ weight - 2 * held[:n, n:])).sum().item())
        # once the penalty is chosen, every sample counts
        weight = solve(everything, penalties[np.argmin(errors)])
        self.bias, self.weight = weight[0].float(), weight[1:].float()

    def features(self, cond):
        x = self.encode_cond(cond)  # (B, S, C)
        if x.shape[1] != self.tokens:
            x = x.mean(1, keepdim=True).expand(-1, self.tokens, -1)  # (B, T, C)
        return x

    def __call__(self, cond):
        """(B, S, C) raw conditions -> (B, T, D) standardized predictions, on the CPU."""
        return self.features(cond) @ self.weight + self.bias


def standardizer(mean, std):
    """Function from raw (..., D) arrays, or tensors on the CPU, to standardized float32 tensors."""
    mean = np.asarray(mean, np.float32)
    std = np.asarray(std, np.float32)
    std = np.where(std > 1e-6, std, np.float32(1))  # a constant channel stays as it is
    return lambda x: torch.from_numpy((np.asarray(x, np.float32) - mean) / std)


def nearest(train_cond, rows, cond, encode):
    """(N,) for conditions (N, S, C): which of the training samples `rows` has the nearest
    condition, by the cosine of the means over tokens."""
    train = pooled(lambda part: encode(train_cond[part]), rows)
    means = pooled(lambda part: encode(cond[part]), np.arange(len(cond)))
    return rows[torch.cat([most_similar(part, train) for part in means.split(256)])]


def baselines(data, split, n):
    """What to read the first n samples of a split against: their truth, a function of rows ->
    standardized (B, T, D), and {name: such a function}.

    data: from open_dataset
    In the training split, `ridge` has seen the samples; the other baselines have not.
    """
    stats = data["stats"]
    encode_cond = standardizer(stats["cond_mean"], stats["cond_std"])
    encode = standardizer(stats["target_mean"], stats["target_std"])
    train_cond, train_target = data["train_cond"], data["train_target"]
    cond, target = data[f"{split}_cond"], data[f"{split}_target"]
    ridge = Ridge(train_cond, train_target, encode_cond, encode)
    result = {
        "mean": lambda rows: torch.zeros(len(rows), *target.shape[1:]),
        "ridge": lambda rows: ridge(cond[rows]),
    }
    others = np.arange(n if split == "train" else 0, len(train_cond))  # not the samples themselves
    if len(others):
        candidates = evenly(others, min(len(others), 16384))
        neighbours = nearest(train_cond, candidates, cond[:n], encode_cond)
        drawn = evenly(others, n)
        result["nearest"] = lambda rows: encode(train_target[neighbours[rows]])
        result["floor"] = lambda rows: encode(train_target[drawn[rows]])
    return (lambda rows: encode(target[rows])), result


def compared(draws, encode, references):
    """{name: function of rows -> standardized samples} of raw draws (N, M, T, D) and of what they
    are read against. `generated` gives (B, M, T, D) if there are several draws, the others
    (B, T, D)."""
    n, M = draws.shape[:2]

    def first(rows):
        return encode(draws[rows, 0])

    def every(rows):
        return encode(draws[rows])

    sets = {"generated": first}
    if M > 1:
        sets = {"generated": every, f"mean of {M}": lambda rows: every(rows).mean(1)}
    sets |= references
    if n > 1:
        sets["shuffled"] = lambda rows: first((rows + 1) % n)
    return sets


def report(draws, data, split="val"):
    """Score raw `draws` (N, draws, T, D) against the first N samples of a split.

    Returns a dict, the text that shows it, and baselines(). The dict has the METRICS of the first
    draw, `samples` (N), `confidence` {name: half-width of the 95% interval}, `baselines`
    {name: metrics} and, for several draws, `mean_of_draws` (metrics) and `spread` (SPREAD).
    """
    n, M = draws.shape[:2]
    encode = standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    truth, references = baselines(data, split, n)
    sums, groups = add_up(compared(draws, encode, references), truth, n)
    others = {name: figures(of_samples) for name, of_samples in sums.items()}
    widths = confidence(sums["generated"], groups)
    scores = others.pop("generated")
    spread = {name: scores.pop(name) for name in SPREAD if name in scores}
    text = table({"generated": scores, "+- (95%)": widths} | others)
    result = scores | {"samples": n, "confidence": widths, "baselines": others}
    if M > 1:
        result["mean_of_draws"] = {"draws": M} | others.pop(f"mean of {M}")
        result["spread"] = {"draws": M} | spread
        text += f"\n{M} draws per condition:"
    for name, value in spread.items():
        text += f"\n  {name:<14}{value:8.4f} +- {widths.get(name, math.nan):.4f}  ({SPREAD[name]})"
    return result, text, (truth, references)


def table(rows):
    """Lines of text: the metrics of each {name: metrics}."""
    width = {name: max(len(name), 8) + 2 for name in METRICS}
    lines = [" " * 10 + "".join(name.rjust(width[name]) for name in METRICS)]
    for name, row in rows.items():
        if row:
            lines.append(f"{name:<10}" + "".join(f"{row[m]:{width[m]}.4f}" for m in METRICS))
    return "\n".join(lines)


def read_generated(path, target, limit=None):
    """The embeddings (N, draws, T, D) in a .npy of (N, T, D) or (N, draws, T, D), of the samples of
    `target` (N, T, D): the first LIMIT, or the first `limit`, which are all that it need hold.

    Raises ValueError where it does not hold them, or where they are not finite.
    """
    n = limit or min(len(target), LIMIT)
    generated = np.lib.format.open_memmap(path, mode="r")
    shape = generated.shape
    fits = len(shape) in (3, 4) and shape[-2:] == target.shape[1:]
    if not fits or not n <= len(generated) <= len(target):
        wanted = f"the targets are {target.shape}, of which the first {n} are scored"
        raise ValueError(f"{path} holds {shape}; {wanted}")
    for rows in chunks(np.arange(n)):
        largest = np.abs(generated[rows].astype(np.float64)).max()
        if not largest < 1e15:  # beyond, squares overflow in float32
            raise ValueError(f"{path} holds NaN, Inf or numbers above 1e15")
    return generated[:n].reshape(n, -1, *target.shape[1:])


def make_parser(doc, saved):
    """A command line that --help describes with `doc`, and its --save with `saved`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--save", type=Path, help=saved)
    return parser


def open_samples(parser):
    """Parse a command line that says which samples to look at, here and in report/plot.py.

    Returns the arguments, the dataset and the samples.
    """
    option = parser.add_argument
    option("file", type=Path, help=".npy of raw (N, T, D) or (N, draws, T, D), in a split's order")
    option("--data_dir", required=True, help="dataset that prepare.py wrote")
    option("--split", default="val", choices=["train", "val"])
    option("--limit", type=int, help=f"only the first so many samples (default: {LIMIT})")
    args = parser.parse_args()
    data = open_dataset(args.data_dir)
    return args, data, read_generated(args.file, data[f"{args.split}_target"], args.limit)


def main():
    user_errors_in_one_line()
    parser = make_parser(__doc__, ".json to write the scores to")
    args, data, draws = open_samples(parser)
    result, text, _ = report(draws, data, args.split)
    print(text)
    if args.save:
        args.save.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
