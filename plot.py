"""
The pictures of runs.

    python plot.py out-a out-b                              # the curves of one or several runs -> out-a/curves.png
    python sample.py --out_dir=out-digits --plot=True       # samples, by draw_samples

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), otherwise with their first three principal components as red, green and blue.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from e
    return plt


def decoded(tokens, weights):
    """(..., T, D) tokens -> (..., T) pixels in [0, 1] by a linear map with bias, (D + 1,)."""
    return np.clip(tokens @ weights[:-1] + weights[-1], 0, 1)


def principal_colours(reference, mean, std):
    """Function from (..., T, D) tokens to (..., T, 3) colours: the first three principal
    components of `reference` (N, T, D), standardized, their 1st to 99th percentile spread over [0, 1]."""

    def flat(tokens):
        return (tokens.astype(np.float32) - mean) / np.where(std > 1e-6, std, 1)

    x = flat(reference).reshape(-1, reference.shape[-1])
    axes = np.linalg.eigh(np.cov(x.T))[1][:, :-4:-1]
    low, high = np.percentile(x @ axes, [1, 99], axis=0)
    return lambda tokens: np.clip((flat(tokens) @ axes - low) / (high - low), 0, 1)


def draw_samples(path, cond, truth, samples, grid, stats, data_dir, n=12, blocks=2):
    """Write a PNG: for n conditions the condition, the truth (if known), the draws and, of several, their mean.

    cond (N, S, C), truth (N, T, D) or None, samples (N, draws, T, D), all raw; grid (H, W) of T
    """
    plt = pyplot()
    n, cond, truth = min(n, len(cond)), np.asarray(cond), None if truth is None else np.asarray(truth)
    decoder = Path(data_dir) / "decoder.npz"
    if decoder.is_file():
        with np.load(decoder) as weights:
            show_cond, show_target = (lambda x, w=weights[name]: decoded(x, w) for name in ("cond", "target"))
    else:
        stats = {name: np.asarray(value) for name, value in stats.items()}
        show_cond = principal_colours(cond, stats["cond_mean"], stats["cond_std"])
        show_target = principal_colours(samples if truth is None else truth, stats["target_mean"], stats["target_std"])

    side = round(cond.shape[1] ** 0.5)  # the condition's grid: the target's, else square, else one row
    cond_grid = (
        grid if cond.shape[1] == grid[0] * grid[1] else (side, side) if side**2 == cond.shape[1] else (1, cond.shape[1])
    )
    columns = [("condition", show_cond(cond[:n]), cond_grid)]
    if truth is not None:
        columns.append(("truth", show_target(truth[:n]), grid))
    columns += [(f"sample {i + 1}", show_target(samples[:n, i]), grid) for i in range(min(samples.shape[1], 4))]
    if samples.shape[1] > 1:
        columns.append((f"mean of {samples.shape[1]}", show_target(samples[:n].mean(1)), grid))

    rows = -(-n // blocks)
    ratios = ([1] * len(columns) + [0.35]) * blocks  # a gap after each block
    fig, axes = plt.subplots(
        rows,
        len(ratios) - 1,
        figsize=(12, 12 * rows / sum(ratios) + 0.3),
        squeeze=False,
        width_ratios=ratios[:-1],
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for i in range(n):
        for j, (title, images, (H, W)) in enumerate(columns):
            ax = axes[i % rows, i // rows * (len(columns) + 1) + j]
            ax.imshow(
                images[i].reshape(H, W, *images.shape[2:]),
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="bicubic" if decoder.is_file() else "nearest",
            )
            if i % rows == 0:
                ax.set_title(title, fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def read_log(out_dir):
    """{name: (iterations, values)} of what a run measured, in order; what was not finite is left out."""
    path, curves = Path(out_dir) / "log.jsonl", {}
    try:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else a kill cut it short
                record = json.loads(line)
                for name, value in record.items():
                    if isinstance(value, int | float):
                        curves.setdefault(name, []).append((record["iter"], value))
    except (OSError, ValueError, AttributeError, KeyError) as e:
        raise ValueError(f"{path} cannot be read as a run's log: {e}") from e
    return {name: tuple(map(np.array, zip(*points))) for name, points in curves.items()}


def smooth(values, span):
    """Mean over a window of `span` values, shorter at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(len(values))
    low, high = np.maximum(i - span // 2, 0), np.minimum(i + span // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_curves(path, out_dirs):
    """Write a PNG with the curves of runs: loss, validation loss by t, cosine of samples, learning rate."""
    plt, runs = pyplot(), {str(out_dir)[-40:]: read_log(out_dir) for out_dir in out_dirs}
    fig, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    (loss, bins), (cosine, rate) = axes
    for i, (name, run) in enumerate(runs.items()):
        color = f"C{i}"
        if "loss" in run:
            steps, values = run["loss"]
            loss.plot(steps, smooth(values, max(1, len(values) // 50)), color=color, alpha=0.35, lw=1)
        for key, style in (("val_loss_raw", ":"), ("val_loss", "-")):
            if key in run:
                loss.plot(*run[key], style, color=color, label=name if style == "-" else None)
        n = sum(f"val_loss_t{b}" in run for b in range(100))
        for b in range(n):
            steps, values = run[f"val_loss_t{b}"]
            label = f"t {b / n:.2g} to {(b + 1) / n:.2g}" if i == 0 else None
            bins.plot(steps, values, color=color, alpha=1 - 0.8 * b / n, lw=2.4 - 1.8 * b / n, label=label)
        if "val_token_cosine" in run:
            cosine.plot(*run["val_token_cosine"], color=color, label=name)
        if "ridge_token_cosine" in run:
            cosine.axhline(run["ridge_token_cosine"][1][-1], color=color, ls="--", lw=1, alpha=0.7)
        if "lr" in run:
            rate.plot(*run["lr"], color=color)
    titles = {
        loss: "loss (faint: training; solid: validation, averaged weights; dotted: raw weights)",
        bins: "validation loss by t, from noise (0) to data (1)",
        cosine: "token cosine of samples (dashed: ridge regression)",
        rate: "learning rate",
    }
    for ax, title in titles.items():
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("iteration", fontsize=9)
        ax.grid(alpha=0.25)
        ax.margins(x=0.02)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (loss, bins):
        if ax.lines and all((np.asarray(line.get_ydata()) > 0).all() for line in ax.lines):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.tick_params(axis="y", which="both", labelsize=8)
        if ax.lines:
            ax.legend(fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="their folders")
    parser.add_argument("--save", help="PNG to write; by default curves.png in the first folder")
    args = parser.parse_args()
    path = Path(args.save or Path(args.runs[0]) / "curves.png")
    try:
        draw_curves(path, args.runs)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
