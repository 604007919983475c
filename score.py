"""
Is it good? Metrics of generated embeddings, and the baselines to read them against.

    python score.py generated.npy --data_dir=data/mine

Everything is measured in standardized space: each channel minus the training set's mean,
divided by its standard deviation. There a token cosine of 0 means "no better than the mean",
no channel dominates by its scale, and the cosines have a meaning: where the condition
explains a share R^2 of the target's variance, one exact draw from p(target | cond) has an
expected cosine near R^2, and the conditional mean, the best any regressor can do, near R.

Baselines: `mean` predicts the training mean; `ridge` regresses a token on the condition's
token at the same place (or on the pooled condition, if the token counts differ); `shuffled`
scores the generated samples against the truth of another condition.
"""

import argparse
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


def cosine(a, b):
    """(..., D), (..., D) -> (...); 0 where a vector is 0."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)


def moments(x):
    """(..., D) -> mean (D,), covariance (D, D), in float64 and in bounded memory."""
    x = x.flatten(0, -2)
    mean, cov = x.mean(0, dtype=torch.float64), 0
    for part in x.split(65536):
        centred = part.double() - mean
        cov = cov + centred.T @ centred
    return mean, cov / max(len(x) - 1, 1)


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of vectors (..., D), as in
    FID (Heusel et al. 2017, arXiv 1706.08500), on the tokens themselves."""
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


def retrieval_r1(generated, target):
    """Share of pooled samples (N, D) whose own target is the nearest by cosine; ties share the hit."""
    unit = target / target.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    hits = 0.0
    for start in range(0, len(generated), 1024):
        similarity = generated[start : start + 1024] @ unit.T
        own = similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))][:, None]
        hits += ((similarity > own).sum(1) == 0).double().div((similarity == own).sum(1)).sum().item()
    return hits / len(generated)


def metrics(generated, target):
    """The metrics above, as floats, of two standardized float tensors (N, T, D)."""
    if generated.shape != target.shape:
        raise ValueError(
            f"generated {tuple(generated.shape)} and true {tuple(target.shape)} embeddings differ in shape"
        )
    error, pooled, pooled_target = generated - target, generated.mean(1), target.mean(1)
    flat, flat_target = generated.flatten(0, 1), target.flatten(0, 1)
    return {
        "token_cosine": cosine(generated, target).mean().item(),
        "pooled_cosine": cosine(pooled, pooled_target).mean().item(),
        "retrieval_r1": retrieval_r1(pooled, pooled_target),
        "frechet": frechet_distance(generated, target),
        "l2": error.norm(dim=-1).mean().item(),
        "norm_ratio": (generated.norm(dim=-1).mean() / target.norm(dim=-1).mean()).item(),
        "std_ratio": (flat.var(0).mean() / flat_target.var(0).mean()).sqrt().item(),
        "snr_db": 10 * torch.log10(target.square().mean() / error.square().mean().clamp(min=1e-12)).item(),
    }


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
        rows = np.unique(np.linspace(0, len(cond) - 1, min(len(cond), -(-max_tokens // target.shape[1]))).astype(int))
        held_out = rows[::10] if len(rows) >= 20 else rows
        fit = np.setdiff1d(rows, held_out) if len(rows) >= 20 else rows
        xx, xy = self._products(cond, target, fit)
        values, vectors = torch.linalg.eigh(xx)
        rotated, errors = vectors.T @ xy, {}
        truth, features = self._load(target, held_out, encode_target), self._features(self._load(cond, held_out))
        for penalty in np.logspace(-6, 1, 15) * values[-1].item():
            weight = vectors @ (rotated / (values.clamp(min=0) + penalty)[:, None])
            errors[penalty] = (features @ weight.float() - truth).square().mean().item()
        if len(fit) < len(rows):  # with the penalty chosen, every sample counts
            more_xx, more_xy = self._products(cond, target, held_out)
            xx, xy = xx + more_xx, xy + more_xy
        penalty = min(errors, key=errors.get)
        self.weight = torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype), xy).float()

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
    return lambda x: (torch.as_tensor(np.array(x)).float() - mean) / std


def report(generated, target, ridge=None):
    """metrics() of standardized `generated` against `target`, with the key `baselines`."""
    out = metrics(generated, target)
    out["baselines"] = {"mean": metrics(torch.zeros_like(target), target)}
    if ridge is not None:
        out["baselines"]["ridge"] = metrics(ridge, target)
    if len(target) > 1:
        out["baselines"]["shuffled"] = metrics(generated.roll(1, 0), target)
    return out


def table(rows):
    """Lines of text: a row of metrics for each {name: metrics}."""
    width = {m: max(len(m), 8) + 2 for m in METRICS}
    lines = [" " * 10 + "".join(m.rjust(width[m]) for m in METRICS)]
    lines += [f"{name:<10}" + "".join(f"{row[m]:{width[m]}.4f}" for m in METRICS) for name, row in rows.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("generated", help=".npy of raw embeddings (N, T, D), in the order of the split")
    parser.add_argument("--data_dir", required=True, help="dataset folder written by prepare.py")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    args = parser.parse_args()
    folder = Path(args.data_dir)
    try:
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("train_cond", "train_target")}
        cond, target = (np.load(folder / f"{args.split}_{n}.npy", mmap_mode="r") for n in ("cond", "target"))
        with np.load(folder / "stats.npz") as stats:
            to_cond, to_target = (standardizer(stats[f"{n}_mean"], stats[f"{n}_std"]) for n in ("cond", "target"))
        generated = np.load(args.generated)
    except (OSError, ValueError, EOFError) as e:
        sys.exit(f"error: {e} (--data_dir is a folder that prepare.py wrote)")
    if not isinstance(generated, np.ndarray) or generated.dtype.kind != "f" or generated.shape != target.shape:
        held = getattr(generated, "shape", type(generated).__name__), getattr(generated, "dtype", "")
        sys.exit(f"error: {args.generated} holds {held}; the {args.split} targets are floats of {target.shape}")
    if not np.isfinite(generated).all():
        sys.exit(f"error: {args.generated} holds NaN or Inf")
    ridge = Ridge(arrays["train_cond"], arrays["train_target"], to_cond, to_target)
    result = report(to_target(generated), to_target(target), ridge(cond))
    print(table({"generated": result, **result["baselines"]}))


if __name__ == "__main__":
    main()
