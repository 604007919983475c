"""
The pictures of runs.

    python -m report.plot out-a                # curves of a run -> out-a/curves.png
    python -m report.plot out-a out-b          # curves of several runs -> curves.png in this folder
    python -m report.plot samples out-a/generated.npy --data_dir=data/mine     # -> out-a/generated.png

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), and with the first three principal components of the tokens as red, green and blue.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from report import score

COMPARED = 500  # samples in the histogram of cosines, the first ones


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from e
    return plt


def principal_colours(reference, mean, std):
    """Function from (..., D) tokens to (..., 3) colours: the first three principal components of
    `reference` (N, T, D), standardized, their 1st to 99th percentile spread over [0, 1]."""
    encode = score.standardizer(mean, std)
    x = encode(reference).numpy().reshape(-1, reference.shape[-1])
    axes = np.linalg.eigh(np.atleast_2d(np.cov(x.T)))[1][:, :-4:-1]  # (D, 3)
    low, high = np.percentile(x @ axes, [1, 99], axis=0)

    def colours(tokens):
        components = (encode(tokens).numpy() @ axes - low) / np.maximum(high - low, 1e-12)
        missing = np.full((*components.shape[:-1], 3 - components.shape[-1]), 0.5)  # D < 3
        return np.concatenate([np.clip(components, 0, 1), missing], -1)

    return colours


def draw_samples(path, cond, truth, samples, grid, stats, folder=None, references=None):
    """Write a PNG. For some samples, a column each: the condition, the truth, draws and their mean,
    and the cosine of the first draw and the truth, token by token. Below, for all samples: which
    truth they are nearest to, and how near they are beside the baselines.

    cond (N, S, C), truth (N, T, D) or None, samples (N, draws, T, D), all raw; grid (H, W) of T
    stats: cond_mean and so on; folder: of the dataset, for its decoder.npz
    references: score.baselines of the first N samples or COMPARED; needed where there is a truth
    """
    plt = pyplot()
    M = samples.shape[1]
    n = min(12, len(samples))
    columns = np.arange(n) if truth is not None else score.evenly(np.arange(len(cond)), n)
    side = round(cond.shape[1] ** 0.5)
    cond_grid = (side, side) if side**2 == cond.shape[1] else (1, cond.shape[1])
    if cond.shape[1] == grid[0] * grid[1]:
        cond_grid = grid
    tokens = {"condition": cond[columns]}
    if truth is not None:
        tokens["truth"] = truth[columns]
    for i in range(min(M, 3)):
        tokens[f"sample {i + 1}"] = samples[columns, i]
    if M > 1:
        tokens[f"mean of {M}"] = samples[columns].mean(1)

    decoder = Path(folder or "", "decoder.npz")
    skipped = ()
    rows = []  # (label, images (n, T) or (n, T, 3), options of imshow)
    if decoder.is_file():
        skipped = ("sample 2", "sample 3")  # in colours
        gray = dict(cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        for label, x in tokens.items():
            weight = np.load(decoder)["cond" if label == "condition" else "target"]  # (D + 1,)
            rows.append((label, x @ weight[:-1] + weight[-1], gray))
    reference = samples[:256, 0] if truth is None else truth[:256]
    cond_colours = principal_colours(cond[:256], stats["cond_mean"], stats["cond_std"])
    colours = principal_colours(reference, stats["target_mean"], stats["target_std"])
    for label, x in tokens.items():
        if label not in skipped:
            rows.append((label, (cond_colours if label == "condition" else colours)(x), {}))
    if truth is not None:
        encode = score.standardizer(stats["target_mean"], stats["target_std"])
        cosines = score.cosine(encode(tokens["sample 1"]), encode(tokens["truth"])).numpy()
        rows.append(("cosine", cosines, dict(cmap="coolwarm_r", vmin=-1, vmax=1)))

    heights = [0.95 * len(rows), 4] if truth is not None else [0.95 * len(rows)]  # inches
    fig = plt.figure(figsize=(12, sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(len(rows), n, squeeze=False)
    for i, (label, images, options) in enumerate(rows):
        H, W = cond_grid if label == "condition" else grid
        axes[i, 0].set_ylabel(label, fontsize=10)
        for ax, image in zip(axes[i], images):
            shown = ax.imshow(image.reshape(H, W, *image.shape[1:]), **options)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    if truth is not None:
        parts[0].colorbar(shown, ax=axes, shrink=0.2, aspect=15, pad=0.01, anchor=(0, 0))
        draw_scores(parts[1], samples, encode, references)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def token_cosines(samples, encode, references, n):
    """{name: (n,)}: the mean token cosine with the truth of the first n samples, of the mean of
    their draws, and of baselines."""
    rows = np.arange(n)
    others = score.shuffled(rows, min(len(samples), score.LIMIT))
    compared = {"samples": encode(samples[rows, 0])}
    if samples.shape[1] > 1:
        compared[f"mean of {samples.shape[1]}"] = encode(samples[rows]).mean(1)
    for name in ("ridge", "nearest"):
        if name in references:
            compared[name] = references[name](rows)
    compared["shuffled"] = encode(samples[others, 0])
    truth = references["truth"](rows)
    return {name: score.cosine(x, truth).mean(1).numpy() for name, x in compared.items()}


def draw_scores(fig, samples, encode, references, shown=40):
    """The pooled cosines of the first samples with all their truths, and the histogram of token
    cosines beside the baselines."""
    n = min(COMPARED, len(samples))
    rows = np.arange(n)
    pooled = encode(samples[:n, 0]).mean(1)  # (n, D)
    true_pooled = references["truth"](rows).mean(1)
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.9])
    matrix = left.imshow(score.cosine(pooled[:shown, None], true_pooled[None, :shown]))
    hits = score.retrieval_hits(pooled, rows, true_pooled).sum() / n
    left.set_title(f"pooled cosine (R@1 {hits:.0%} of {n})", fontsize=11)
    left.set(xlabel="truth", ylabel="sample")
    fig.colorbar(matrix, ax=left, shrink=0.85)

    cosines = token_cosines(samples, encode, references, n)
    bins = np.histogram_bin_edges(np.concatenate(list(cosines.values())), 40)
    for i, (name, values) in enumerate(cosines.items()):
        colors = dict(fc=(f"C{i}", 0.15), ec=f"C{i}")
        label = f"{name} ({values.mean():.3f})"
        right.hist(values, bins, histtype="stepfilled", lw=1.6, label=label, **colors)
    right.set_title(f"token cosine of {n} samples with their truth (mean)", fontsize=11)
    right.set_yticks([])
    right.spines[["top", "right", "left"]].set_visible(False)
    right.legend(fontsize=10)


def read_log(out_dir):
    """{name: (iterations, values)} of what a run measured; what was not finite is left out."""
    path = Path(out_dir, "log.jsonl")
    curves = {}
    try:
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # a kill cut it short
            record = json.loads(line)
            for name, value in record.items():
                if isinstance(value, int | float):
                    curves.setdefault(name, []).append((record["iter"], value))
    except (OSError, ValueError, AttributeError, KeyError) as e:
        raise ValueError(f"{path} cannot be read as a run's log: {e}") from e
    return {name: np.array(points).T for name, points in curves.items()}


def smooth(values, span):
    """Mean over a window of `span` values, shorter at the ends."""
    window = np.ones(span)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def draw_curves(path, out_dirs):
    """Write a PNG with the curves of runs: losses, validation loss by t, token cosine of samples,
    learning rate."""
    plt = pyplot()
    runs = {str(out_dir)[-40:]: read_log(out_dir) for out_dir in out_dirs}
    fig, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    (losses, by_t), (cosines, rates) = axes
    for i, (name, run) in enumerate(runs.items()):
        color = f"C{i}"

        def draw(ax, key, label=None, **style):
            if key in run:
                ax.plot(*run[key], color=color, label=label, **style)

        if "loss" in run:
            iterations, values = run["loss"]
            run["loss"] = iterations, smooth(values, max(1, len(values) // 50))
        draw(losses, "loss", alpha=0.35, lw=1)
        draw(losses, "val_loss_raw", ls=":")
        draw(losses, "val_loss", name)
        bins = [key for key in run if key.startswith("val_loss_t")]
        for b, key in enumerate(bins):
            low, high = b / len(bins), (b + 1) / len(bins)
            label = f"t {low:.2g} to {high:.2g}" if i == 0 else None
            draw(by_t, key, label, alpha=1 - 0.8 * low, lw=2.4 - 1.8 * low)
        draw(cosines, "val_token_cosine")
        if "ridge_token_cosine" in run:
            cosines.axhline(run["ridge_token_cosine"][1][-1], color=color, ls="--", lw=1, alpha=0.7)
        draw(rates, "lr")
    losses.set_title("loss (faint: training; solid: validation; dotted: validation, raw weights)")
    by_t.set_title("validation loss by t, from noise (0) to data (1)")
    cosines.set_title("token cosine of samples (dashed: ridge regression)")
    rates.set_title("learning rate")
    for ax in axes.flat:
        ax.title.set_fontsize(10)
        ax.set_xlabel("iteration", fontsize=9)
        ax.grid(alpha=0.25)
        ax.margins(x=0.02)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (losses, by_t):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9)
        if all((line.get_ydata() > 0).all() for line in ax.lines):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.tick_params(axis="y", which="both", labelsize=8)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if sys.argv[1:2] == ["samples"]:
        parser.add_argument("samples", choices=["samples"])
        score.add_arguments(parser)
        saved = "FILE with the ending .png"
    else:
        parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
        saved = "curves.png in the folder of a single run; of several, in this folder"
    parser.add_argument("--save", type=Path, help=f".png to write (default: {saved})")
    args = parser.parse_args()
    try:
        if "runs" in args:
            folder = args.runs[0] if len(args.runs) == 1 else Path()
            path = args.save or folder / "curves.png"
            draw_curves(path, args.runs)
        else:
            path = args.save or args.file.with_suffix(".png")
            data, samples = score.open_samples(args)
            samples = samples if samples.ndim == 4 else samples[:, None]
            references = score.baselines(data, args.split, min(len(samples), COMPARED))
            cond, truth = data[f"{args.split}_cond"], data[f"{args.split}_target"]
            given = (samples, data["meta"]["grid"], data["stats"], args.data_dir, references)
            draw_samples(path, cond, truth, *given)
    except (OSError, ValueError, EOFError) as e:
        sys.exit(f"error: {e}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
