"""
Is it good? Metrics of generated embeddings, and the baselines to read them against.

    python score.py generated.npy --data_dir=data/mine

Everything is measured in standardized space: each channel minus the training set's mean,
divided by its standard deviation. There a token cosine of 0 means "no better than the mean",
no channel dominates by its scale, and the cosines have a meaning: where the condition
explains a share R^2 of the target's variance, one exact draw from p(target | cond) has an
expected cosine near R^2, and the conditional mean, the best any regressor can do, near R.

Baselines: `mean` predicts the training mean; `ridge` regresses a token on the condition's
token at the same place (or on the pooled condition, if the token counts differ); `nearest`
takes the target of the training sample whose pooled condition is nearest; `shuffled` scores
the generated samples against the truth of another condition; `floor` scores targets of the
training set, which are exact samples, but of no condition: what the Frechet distance of so
many perfect samples is.

Of several draws of each condition, it is also measured whether their spread is the truth's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

METRICS = {  # name: what it says, and which way is better
    "token_cosine": "cosine of generated and true token, mean over tokens (higher)",
    "pooled_cosine": "the same of the mean over a sample's tokens (higher)",
    "retrieval_r1": "share of samples whose own truth is nearest by pooled cosine (higher)",
    "frechet": "Frechet distance of the Gaussians fitted to all tokens (lower)",
    "l2": "Euclidean distance of generated and true token, mean over tokens (lower)",
    "norm_ratio": "mean token norm, generated over true (near 1)",
    "std_ratio": "standard deviation per channel, generated over true, root mean square (near 1)",
    "snr_db": "10 log10 of true power over error power (higher)",
}
SPREAD = {  # of several draws of each condition
    "spread_ratio": "their standard deviation over that of the truth about their mean (1: as it should be)",
    "energy_score": "distance of draw and true token less half that of two draws (lower; of one prediction its l2)",
    "coverage": "share of true values between the lowest and the highest draw (near (draws - 1) / (draws + 1))",
}
LIMIT = 5000  # samples that are scored, unless told: the first ones
GROUPS = 20  # of samples, which the bootstrap resamples


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


def retrieval_hits(pooled, rows, target):
    """(B,) of pooled samples (B, D): 1 where of all pooled targets (N, D) the nearest by cosine is the sample's own,
    which is in row rows[i]; 1/k where k are as near."""
    similarity = pooled @ (target / target.norm(dim=-1, keepdim=True).clamp(min=1e-12)).T
    own = similarity[torch.arange(len(rows)), torch.as_tensor(rows)][:, None]
    return ((similarity > own).sum(1) == 0).double() / (similarity == own).sum(1)


def add_up(n, groups, measure):
    """{name: (groups, ...)}: sums in float64 of what measure(rows) returns, {name: value}, over the rows of each
    group, a chunk at a time. Figures are functions of such sums, so that memory does not grow with n."""
    totals = []
    for rows in np.array_split(np.arange(n), groups):
        total = {}
        for part in np.array_split(rows, -(-len(rows) // 256)):
            for name, value in measure(part).items():
                total[name] = total.get(name, 0) + torch.as_tensor(value, dtype=torch.float64)
        totals.append(total)
    return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}


def jackknife(sums, values):
    """bootstrap(), by leaving out one group after the other (Efron and Tibshirani 1993, chapter 11): for the Frechet
    distance, which is larger the fewer different samples there are, as in a bootstrap's sets they are."""
    groups, total = (
        len(next(iter(sums.values()))),
        {name: value.sum(0) for name, value in sums.items()},
    )
    results = [
        values({k: total[k] - v[g] for k, v in sums.items()})
        for g in range(groups if groups > 1 else 0)
    ]
    names = results[0] if results else ()
    return {
        name: float(1.96 * ((groups - 1) * np.var([r[name] for r in results])) ** 0.5)
        for name in names
    }


def bootstrap(sums, values, repeats=200):
    """{name: half the width of a 95% confidence interval} of values({name: sums over all groups}): 1.96 times the
    standard error by resampling groups of samples (Efron and Tibshirani 1993, chapter 6)."""
    rng, groups, results = np.random.default_rng(0), len(next(iter(sums.values()))), []
    for _ in range(repeats if groups > 1 else 0):
        weights = torch.from_numpy(
            np.bincount(rng.integers(groups, size=groups), minlength=groups)
        ).double()
        results.append(
            values({name: torch.tensordot(weights, value, 1) for name, value in sums.items()})
        )
    spread = {
        name: np.std([r[name] for r in results], ddof=1) for name in (results[0] if results else ())
    }
    return {
        name: float(1.96 * (groups / (groups - 1)) ** 0.5 * value) for name, value in spread.items()
    }


def moments(side, x):
    """Sums over the tokens of x (B, T, D), their names behind the side's."""
    flat = x.flatten(0, 1).double()
    sums = {
        "tokens": len(flat),
        "norm": x.norm(dim=-1).sum(),
        "first": flat.sum(0),
        "second": flat.T @ flat,
    }
    return {f"{side}_{name}": value for name, value in sums.items()}


def combine(sums, distance=True):
    """METRICS, with or without the Frechet distance, of the sums that a Scorer makes."""

    def gaussian(n, first, second):
        mean = first / n
        return mean, (second - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)

    a, b = (
        gaussian(*(sums[f"{side}_{name}"] for name in ("tokens", "first", "second")))
        for side in "ab"
    )
    pairs = sums["pairs"]
    return {
        "token_cosine": float(sums["cosine"] / pairs),
        "pooled_cosine": float(sums["pooled_cosine"] / pairs),
        "retrieval_r1": float(sums["hits"] / pairs),
        **({"frechet": frechet_distance(*a, *b)} if distance else {}),
        "l2": float(sums["distance"] / pairs),
        "norm_ratio": float(sums["a_norm"] / sums["b_norm"]),
        "std_ratio": float((a[1].trace() / b[1].trace()).sqrt()),
        "snr_db": float(
            10 * torch.log10(sums["b_second"].trace() / sums["error"].clamp(min=1e-12))
        ),
    }


class Scorer:
    """METRICS of sets of samples against one truth.

    truth: function of rows -> standardized (B, T, D); n: how many samples it has; groups: of them, for the bootstrap
    """

    def __init__(self, truth, n, groups=GROUPS):
        self.truth, self.n, self.groups, pooled = truth, n, min(groups, n), []

        def measure(rows):
            y = truth(rows)
            pooled.append(y.mean(1))
            return moments("b", y)

        self.sums, self.pooled = add_up(n, self.groups, measure), torch.cat(pooled)

    def __call__(self, samples, confidence=False):
        """(metrics, half-widths of their 95% confidence intervals, {} without `confidence`) of samples(rows)."""

        def measure(rows):
            x, y = samples(rows), self.truth(rows)
            pooled = x.mean(1)
            return moments("a", x) | {
                "pairs": len(rows),
                "cosine": cosine(x, y).mean(1).sum(),
                "pooled_cosine": cosine(pooled, self.pooled[rows]).sum(),
                "hits": retrieval_hits(pooled, rows, self.pooled).sum(),
                "distance": (x - y).norm(dim=-1).mean(1).sum(),
                "error": (x - y).square().sum(),
            }

        sums = add_up(self.n, self.groups if confidence else 1, measure) | self.sums
        result = combine({name: value.sum(0) for name, value in sums.items()})
        if not confidence:
            return result, {}
        width = jackknife(sums, combine) | bootstrap(
            sums, lambda sums: combine(sums, distance=False)
        )
        return result, {name: width[name] for name in METRICS if name in width}

    def spread(self, draws):
        """(SPREAD, half-widths) of draws(rows) -> (B, draws, T, D), at least 2 of each condition.

        spread_ratio is the ensemble forecasters' (Fortin et al. 2014, equation 15): if the truth is one more draw,
        its mean square distance from the mean of M draws is (1 + 1/M) times their variance. The energy score
        (Gneiting and Raftery 2007, equation 21), here of tokens, is lowest in expectation for the true distribution.
        """

        def measure(rows):
            x, y = draws(rows), self.truth(rows)[:, None]
            M = x.shape[1]
            to_truth = (x - y).norm(dim=-1).mean((1, 2)).sum()
            apart = sum(
                (x[:, i] - x[:, j]).norm(dim=-1).mean(1).sum() for i in range(M) for j in range(i)
            )
            return {
                "pairs": len(rows),
                "variance": (1 + 1 / M) * x.var(1).mean((1, 2)).sum(),
                "error": (x.mean(1) - y[:, 0]).square().mean((1, 2)).sum(),
                "energy": to_truth - apart / (M * (M - 1)),
                "inside": ((x.amin(1) <= y[:, 0]) & (y[:, 0] <= x.amax(1)))
                .double()
                .mean((1, 2))
                .sum(),
            }

        def values(sums):
            ratio = (sums["variance"] / sums["error"].clamp(min=1e-12)).sqrt()
            energy, inside = sums["energy"] / sums["pairs"], sums["inside"] / sums["pairs"]
            return {
                "spread_ratio": float(ratio),
                "energy_score": float(energy),
                "coverage": float(inside),
            }

        sums = add_up(self.n, self.groups, measure)
        return values({name: value.sum(0) for name, value in sums.items()}), bootstrap(sums, values)


def metrics(generated, target):
    """METRICS, as floats, of two standardized float tensors (N, T, D)."""
    if generated.shape != target.shape:
        raise ValueError(
            f"generated {tuple(generated.shape)} and true {tuple(target.shape)} embeddings differ in shape"
        )
    return Scorer(target.__getitem__, len(target), groups=1)(generated.__getitem__)[0]


class Ridge:
    """Linear regression of each target token from the condition's token at its place (or, if the token
    counts differ, from the pooled condition), with a penalty chosen on held-out training samples.

    cond (N, S, C), target (N, T, D): arrays, memory-mapped or not, read in chunks
    encode_cond, encode_target: functions on float tensors that standardize them
    max_tokens: fit on so many target tokens at the most, of samples evenly spaced
    """

    def __init__(self, cond, target, encode_cond, encode_target, max_tokens=262144):
        self.encode_cond, self.encode_target = encode_cond, encode_target
        self.aligned = cond.shape[1] == target.shape[1]
        self.tokens = target.shape[1]
        rows = np.unique(
            np.linspace(0, len(cond) - 1, min(len(cond), -(-max_tokens // target.shape[1]))).astype(
                int
            )
        )
        held_out = rows[::10] if len(rows) >= 20 else rows
        fit = np.setdiff1d(rows, held_out) if len(rows) >= 20 else rows
        xx, xy = self._products(cond, target, fit)
        values, vectors = torch.linalg.eigh(xx)
        rotated, errors = vectors.T @ xy, {}
        truth, features = (
            self._load(target, held_out, encode_target),
            self._features(self._load(cond, held_out)),
        )
        for penalty in np.logspace(-6, 1, 15) * values[-1].item():
            weight = vectors @ (rotated / (values.clamp(min=0) + penalty)[:, None])
            errors[penalty] = (features @ weight.float() - truth).square().mean().item()
        if len(fit) < len(rows):  # with the penalty chosen, every sample counts
            more_xx, more_xy = self._products(cond, target, held_out)
            xx, xy = xx + more_xx, xy + more_xy
        penalty = min(errors, key=errors.get)
        self.weight = torch.linalg.solve(
            xx + penalty * torch.eye(len(xx), dtype=xx.dtype), xy
        ).float()

    def _load(self, array, rows, encode=torch.as_tensor):
        return encode(torch.from_numpy(np.array(array[rows])))

    def _products(self, cond, target, rows):
        xx, xy = 0, 0
        for part in np.array_split(rows, -(-len(rows) // 64)):
            x = self._features(self._load(cond, part)).flatten(0, 1).double()
            y = self._load(target, part, self.encode_target).flatten(0, 1).double()
            xx, xy = xx + x.T @ x, xy + x.T @ y
        return xx, xy

    def _features(self, cond):
        x = self.encode_cond(cond)
        x = x if self.aligned else x.mean(1, keepdim=True).expand(-1, self.tokens, -1)
        return torch.cat([x, torch.ones(*x.shape[:-1], 1)], dim=-1)

    def __call__(self, cond):
        """(B, S, C) raw condition -> (B, T, D) standardized prediction, on the CPU."""
        return self._features(cond) @ self.weight


def standardizer(mean, std):
    """Function from raw (..., D) arrays or tensors to standardized float32 tensors."""
    mean, std = (torch.as_tensor(s, dtype=torch.float32) for s in (mean, std))
    std = std.where(std > 1e-6, 1.0)
    return lambda x: (
        ((x.float() if torch.is_tensor(x) else torch.from_numpy(np.array(x, np.float32))) - mean)
        / std
    )


def nearest(train_cond, rows, cond, encode):
    """(N,) of `rows`, of training samples, that whose pooled condition is nearest to that of each of `cond` (N, S, C),
    by cosine."""

    def pooled(array, rows):
        return torch.cat(
            [encode(array[part]).mean(1) for part in np.array_split(rows, -(-len(rows) // 256))]
        )

    train, found = pooled(train_cond, rows), []
    train /= train.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    for part in pooled(cond, np.arange(len(cond))).split(1024):
        found.append((part @ train.T).argmax(1))
    return rows[torch.cat(found).numpy()]


def baselines(data, split, n):
    """{name: function of rows -> standardized (B, T, D)} for the first n samples of a split: `truth`, and what to read
    generated samples against. Of the training split, `ridge` has seen the samples; the others have not.

    data: the arrays of a dataset and its `stats`, as prepare.open_dataset gives them
    """
    to_cond, to_target = (
        standardizer(*(data["stats"][f"{k}_{s}"] for s in ("mean", "std")))
        for k in ("cond", "target")
    )
    train_cond, train_target, cond, target = (
        data[f"{s}_{k}"] for s in ("train", split) for k in ("cond", "target")
    )
    ridge = Ridge(train_cond, train_target, to_cond, to_target)
    result = {
        "truth": lambda rows: to_target(target[rows]),
        "mean": lambda rows: torch.zeros(len(rows), *target.shape[1:]),
        "ridge": lambda rows: ridge(cond[rows]),
    }
    others = np.arange(n if split == "train" else 0, len(train_cond))  # not the samples themselves
    if len(others):
        some = others[np.unique(np.linspace(0, len(others) - 1, 16384).astype(int))]
        neighbours = nearest(train_cond, some, cond[:n], to_cond)
        spaced = others[np.linspace(0, len(others) - 1, n).astype(int)]
        result["nearest"] = lambda rows: to_target(train_target[neighbours[rows]])
        result["floor"] = lambda rows: to_target(train_target[spaced[rows]])
    return result


def report(generated, data, split="val", limit=LIMIT, rows=None):
    """Score raw `generated` (N, T, D), or (N, draws, T, D), against the first N samples of a split, at most `limit`.
    rows: from baselines(), if they are there already

    Returns {metric: value} of the first draw, with `samples` (how many), `confidence` (half-widths of 95% intervals),
    `baselines` {name: metrics} and, of several draws, `mean_of_draws` (metrics) and `spread` (SPREAD and how sure);
    and a text that says it.
    """
    n, several = min(len(generated), limit), generated.ndim == 4
    rows = dict(rows or baselines(data, split, n))
    encode = standardizer(data["stats"]["target_mean"], data["stats"]["target_std"])
    first = (
        (lambda rows: encode(generated[rows, 0]))
        if several
        else (lambda rows: encode(generated[rows]))
    )
    scorer = Scorer(rows.pop("truth"), n)
    result, confidence = scorer(first, confidence=True)
    lines = {"generated": result} | ({"+- (95%)": confidence} if confidence else {})
    result = result | {"samples": n, "confidence": confidence}
    if several and generated.shape[1] > 1:
        M = generated.shape[1]
        result["mean_of_draws"] = lines[f"mean of {M}"] = scorer(
            lambda rows: encode(generated[rows]).mean(1)
        )[0]
        spread, width = scorer.spread(lambda rows: encode(generated[rows]))
        result["mean_of_draws"] = {"draws": M, **result["mean_of_draws"]}
        result["spread"] = {"draws": M, **spread, "confidence": width}
    result["baselines"] = {name: scorer(samples)[0] for name, samples in rows.items()}
    if n > 1:
        result["baselines"]["shuffled"] = scorer(lambda rows: first((rows + 1) % n))[0]
    text = table(lines | result["baselines"])
    if "spread" in result:
        l2 = ", ".join(
            f"{name} {result['baselines'][name]['l2']:.4f}" for name in ("mean", "ridge")
        )
        exact = {"spread_ratio": "1", "coverage": f"{(M - 1) / (M + 1):.4f}"}
        notes = {name: f"exact draws: {value}" for name, value in exact.items()} | {
            "energy_score": f"l2: {l2}"
        }
        text += f"\n{M} draws of each condition:"
        for name in SPREAD:
            sure = f"+- {width[name]:.4f}" if name in width else ""
            text += f"\n  {name:<14}{spread[name]:8.4f} {sure:<10} ({notes[name]})"
    return result, text


def read_generated(path, target, limit=None):
    """Embeddings in a .npy, (N, T, D) or (N, draws, T, D), for `target` (N, T, D), or of its first samples, at least
    `limit`. Raises ValueError with one line where they are not, or those that count are not finite."""
    N, T, D = target.shape
    n = min(N, LIMIT) if limit is None else limit
    if not 1 <= n <= N:
        raise ValueError(f"limit={limit}: there are {N} samples")
    generated = np.load(path, mmap_mode="r")
    held = (
        generated.shape
        if isinstance(generated, np.ndarray) and generated.dtype.kind in "fiu"
        else ()
    )
    complete = held[:1] == (N,) or held and limit and n <= held[0] <= N
    if len(held) not in (3, 4) or 0 in held or held[-2:] != (T, D) or not complete:
        raise ValueError(f"{path} holds {held or 'no numbers'}; the targets are {(N, T, D)}")
    for part in np.array_split(np.arange(n), -(-n // 256)):
        if (
            not np.abs(generated[part].astype(np.float64)).max() < 1e15
        ):  # beyond, squares leave float32
            raise ValueError(f"{path} holds NaN, Inf or numbers above 1e15")
    return generated


def table(rows):
    """Lines of text: a row of metrics for each {name: metrics}."""
    width = {m: max(len(m), 8) + 2 for m in METRICS}
    lines = [" " * 10 + "".join(m.rjust(width[m]) for m in METRICS)]
    lines += [
        f"{name:<10}" + "".join(f"{row[m]:{width[m]}.4f}" for m in METRICS)
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "generated",
        help=".npy of raw embeddings, (N, T, D) or (N, draws, T, D), in a split's order",
    )
    parser.add_argument("--data_dir", required=True, help="dataset folder written by prepare.py")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument(
        "--limit",
        type=int,
        help=f"score the first so many samples only; by default at most {LIMIT}",
    )
    parser.add_argument("--save", help=".json to write")
    args = parser.parse_args()
    folder = Path(args.data_dir)
    try:
        names = [f"{s}_{k}" for s in {"train", args.split} for k in ("cond", "target")]
        data = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        with np.load(folder / "stats.npz") as stats:
            data["stats"] = dict(stats)
        generated = read_generated(args.generated, data[f"{args.split}_target"], args.limit)
        if args.save and not Path(args.save).absolute().parent.is_dir():
            raise ValueError(f"there is no folder to write {args.save} into")
    except (OSError, ValueError, EOFError) as e:
        sys.exit(f"error: {e}")
    result, text = report(generated, data, args.split, args.limit or LIMIT)
    print(text)
    if args.save:
        Path(args.save).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
