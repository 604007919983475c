"""
The pictures of runs.

    python plot.py out-a out-b                                             # curves of runs -> out-a/curves.png
    python plot.py samples out-a/generated.npy --data_dir=data/mine        # samples -> out-a/samples.png

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), otherwise with their first three principal components as red, green and blue.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import score
from loader import open_dataset

HISTOGRAM = 500  # samples in the histogram of cosines, the first ones


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
    axes = np.linalg.eigh(np.atleast_2d(np.cov(x.T)))[1][:, :-4:-1]
    low, high = np.percentile(x @ axes, [1, 99], axis=0)

    def colours(tokens):
        some = np.clip((flat(tokens) @ axes - low) / np.maximum(high - low, 1e-12), 0, 1)
        return np.concatenate(
            [some, np.full((*some.shape[:-1], 3 - some.shape[-1]), 0.5)], -1
        )  # of one or two channels

    return colours


def draw_samples(path, cond, truth, samples, grid, stats, folder=None, rows=None, shown=None):
    """Write a PNG: for n conditions the condition, the truth, draws and their mean, and how near the first is to the
    truth, token by token; then, of all samples, which truth they are nearest to, and how near beside the baselines.

    cond (N, S, C), truth (N, T, D) or None, samples (N, draws, T, D), all raw; grid (H, W) of T
    stats: cond_mean and so on; folder: of the dataset, whose decoder.npz, if it has one, shows tokens as pixels
    rows: score.baselines of the first N samples or fewer; needed where there is truth
    shown: which samples; by default the first
    """
    decoder = Path(folder or "") / "decoder.npz"
    plt, M = pyplot(), samples.shape[1]
    shown = np.arange(min(8 if decoder.is_file() else 10, len(samples))) if shown is None else shown
    n = len(shown)
    stats = {name: np.asarray(value) for name, value in stats.items()}
    side = round(
        cond.shape[1] ** 0.5
    )  # the condition's grid: the target's, else square, else one row
    cond_grid = (
        grid
        if cond.shape[1] == grid[0] * grid[1]
        else (side, side)
        if side**2 == cond.shape[1]
        else (1, cond.shape[1])
    )
    tokens = {"condition": np.array(cond[shown])} | (
        {} if truth is None else {"truth": np.array(truth[shown])}
    )
    tokens |= {f"sample {i + 1}": np.array(samples[shown, i]) for i in range(min(M, 3))}
    tokens |= {f"mean of {M}": np.array(samples[shown]).mean(1)} if M > 1 else {}
    many = np.array(samples[:256, 0] if truth is None else truth[:256])
    colours = {
        "condition": principal_colours(np.array(cond[:256]), stats["cond_mean"], stats["cond_std"]),
        "target": principal_colours(many, stats["target_mean"], stats["target_std"]),
    }
    columns = []  # (title, images (n, H, W) or (n, H, W, 3), options of imshow)
    for shows in ("decoded", "colours") if decoder.is_file() else ("colours",):
        for title, x in tokens.items():
            kind = "condition" if title == "condition" else "target"
            if shows == "decoded":
                with np.load(decoder) as weights:
                    images = decoded(x, weights["cond" if kind == "condition" else "target"])
            elif decoder.is_file() and title in ("sample 2", "sample 3"):
                continue  # no room
            else:
                images = colours[kind](x)
            images = images.reshape(
                n, *(cond_grid if kind == "condition" else grid), *images.shape[2:]
            )
            pixels = dict(
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="bicubic" if shows == "decoded" else "nearest",
            )
            columns.append((title, images, pixels))
    if truth is not None:
        encode = score.standardizer(stats["target_mean"], stats["target_std"])
        near = score.cosine(encode(tokens["sample 1"]), encode(tokens["truth"])).numpy()
        limit = np.abs(near).max() or 1
        columns.append(
            ("cosine", near.reshape(n, *grid), dict(cmap="coolwarm_r", vmin=-limit, vmax=limit))
        )

    blocks = max(1, min(n, round(11 / len(columns))))
    height = -(-n // blocks)  # in images
    ratios = ([1] * len(columns) + [0.3]) * blocks  # a gap after each block
    cell = 12 / (sum(ratios) + 0.5)
    parts = [cell * height * 1.03 + 0.4] + ([4] if truth is not None else [])  # inches
    fig = plt.figure(figsize=(12, sum(parts)), layout="constrained")
    top, *bottom = fig.subfigures(len(parts), 1, height_ratios=parts, squeeze=False)[:, 0]
    axes = top.subplots(height, len(ratios) - 1, squeeze=False, width_ratios=ratios[:-1])
    for ax in axes.flat:
        ax.axis("off")
    for i in range(n):
        for j, (title, images, options) in enumerate(columns):
            ax = axes[i // blocks, i % blocks * (len(columns) + 1) + j]
            picture = ax.imshow(images[i], **options)
            if i < blocks:
                ax.set_title(title, fontsize=11)
    if truth is not None:
        top.colorbar(picture, ax=axes, shrink=0.5, pad=0.01, aspect=40).ax.tick_params(labelsize=9)
        draw_scores(bottom[0], samples, encode, rows)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def token_cosines(samples, encode, rows, n):
    """{name: (n,)}: mean cosine of tokens with the truth, of n samples, the mean of draws and baselines."""
    index, first = np.arange(n), encode(samples[:n, 0])
    compared = {"samples": first}
    if samples.shape[1] > 1:
        compared[f"mean of {samples.shape[1]}"] = encode(samples[:n]).mean(1)
    compared |= {name: rows[name](index) for name in ("ridge", "nearest") if name in rows}
    compared["shuffled"] = first.roll(1, 0)
    return {
        name: score.cosine(x, rows["truth"](index)).mean(1).numpy() for name, x in compared.items()
    }


def draw_scores(fig, samples, encode, rows, n=HISTOGRAM, shown=40):
    """The retrieval matrix of the first samples, and the histogram of cosines of the first n beside the baselines."""
    n = min(n, len(samples))
    shown, index = min(shown, n), np.arange(n)
    truth, first = rows["truth"](index), encode(samples[:n, 0])
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.9])
    pooled, true_pooled = first[:shown].mean(1), truth[:shown].mean(1)
    image = left.imshow(score.cosine(pooled[:, None], true_pooled[None]), cmap="viridis")
    hits = score.retrieval_hits(first.mean(1), index, truth.mean(1)).mean()
    left.set_title(f"pooled cosine (R@1 {hits:.0%} of {n})", fontsize=11)
    left.set_xlabel("truth", fontsize=10)
    left.set_ylabel("sample", fontsize=10)
    fig.colorbar(image, ax=left, shrink=0.85).ax.tick_params(labelsize=9)

    cosines = token_cosines(samples, encode, rows, n)
    low, high = min(map(np.min, cosines.values())), max(map(np.max, cosines.values()))
    for i, (name, values) in enumerate(cosines.items()):
        style = dict(
            bins=np.linspace(low, high, 41), color=f"C{i}", label=f"{name} ({values.mean():.3f})"
        )
        right.hist(values, histtype="stepfilled", alpha=0.15, **style | {"label": None})
        right.hist(values, histtype="step", lw=1.6, **style)
    right.set_title(f"token cosine of {n} samples with their truth (mean)", fontsize=11)
    right.tick_params(labelsize=9)
    right.set_yticks([])
    right.spines[["top", "right", "left"]].set_visible(False)
    right.legend(fontsize=10)


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
            loss.plot(
                steps, smooth(values, max(1, len(values) // 50)), color=color, alpha=0.35, lw=1
            )
        for key, style in (("val_loss_raw", ":"), ("val_loss", "-")):
            if key in run:
                loss.plot(*run[key], style, color=color, label=name if style == "-" else None)
        n = sum(f"val_loss_t{b}" in run for b in range(100))
        for b in range(n):
            steps, values = run[f"val_loss_t{b}"]
            label = f"t {b / n:.2g} to {(b + 1) / n:.2g}" if i == 0 else None
            bins.plot(
                steps, values, color=color, alpha=1 - 0.8 * b / n, lw=2.4 - 1.8 * b / n, label=label
            )
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
    if sys.argv[1:2] == ["samples"]:
        parser = argparse.ArgumentParser(
            prog="plot.py samples", description="Draw samples.", allow_abbrev=False
        )
        parser.add_argument(
            "generated", help=".npy of embeddings (N, T, D) or (N, draws, T, D), in a split's order"
        )
        parser.add_argument(
            "--data_dir", required=True, help="dataset folder written by prepare.py"
        )
        parser.add_argument("--split", default="val", choices=["train", "val"])
        parser.add_argument(
            "--limit", type=int, help="for a file of fewer than all samples: the first so many"
        )
        parser.add_argument("--save", help="PNG to write; by default samples.png beside the .npy")
        args = parser.parse_args(sys.argv[2:])
        path = Path(args.save or Path(args.generated).with_name("samples.png"))
    else:
        parser = argparse.ArgumentParser(
            description=__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("runs", nargs="+", help="folders of runs")
        parser.add_argument(
            "--save", help="PNG to write; by default curves.png in the first folder"
        )
        args = parser.parse_args()
        path = Path(args.save or Path(args.runs[0]) / "curves.png")
    try:
        if hasattr(args, "runs"):
            draw_curves(path, args.runs)
        else:
            data = open_dataset(args.data_dir)
            truth = data[f"{args.split}_target"]
            samples = score.read_generated(args.generated, truth, args.limit)
            samples = samples if samples.ndim == 4 else samples[:, None]
            rows = score.baselines(data, args.split, min(len(samples), HISTOGRAM))
            given = (
                data[f"{args.split}_cond"],
                truth,
                samples,
                data["meta"]["grid"],
                data["stats"],
                args.data_dir,
            )
            draw_samples(path, *given, rows)
    except (OSError, ValueError, EOFError) as e:
        sys.exit(f"error: {e}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
