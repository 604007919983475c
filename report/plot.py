"""
The pictures of runs.

    python -m report.plot out-a                # curves of a run -> out-a/curves.png
    python -m report.plot out-a out-b          # curves of several runs -> curves.png in this folder
    python -m report.plot samples out-a/generated.npy --data_dir=data/mine  # -> .png beside it

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), and with the first three principal components of the tokens as red, green and blue.
"""

import json
import sys
from pathlib import Path

import numpy as np

from plumbing.configurator import user_errors_in_one_line
from report import score

COMPARED = 500  # samples in the histogram of cosines, the first ones


def new_figure(width, height):
    """A figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from e
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def principal_colours(reference, encode):
    """Function from (..., D) tokens to (..., 3) colours: the first three principal components of
    `reference` (N, T, D), standardized by `encode`, their 1st to 99th percentile spread over
    [0, 1]."""
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
    columns = score.evenly(np.arange(len(samples)), min(12, len(samples)))
    shown = {"condition": np.concatenate([cond[i : i + 1] for i in columns])}
    if truth is not None:
        shown["truth"] = truth[columns]
    draws = samples[columns]  # (n, draws, T, D)
    for i in range(min(draws.shape[1], 3)):
        shown[f"sample {i + 1}"] = draws[:, i]
    if draws.shape[1] > 1:
        shown[f"mean of {draws.shape[1]}"] = draws.mean(1)

    images = []  # (label, images (n, T) or (n, T, 3), options of imshow)
    decoder = Path(folder or "", "decoder.npz")
    decoded = decoder.is_file()
    if decoded:
        weights = np.load(decoder)
        gray = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "bicubic"}
        for label, x in shown.items():
            weight = weights["cond" if label == "condition" else "target"]  # (D + 1,)
            images.append((label, x @ weight[:-1] + weight[-1], gray))
    encode_cond = score.standardizer(stats["cond_mean"], stats["cond_std"])
    encode = score.standardizer(stats["target_mean"], stats["target_std"])
    colours = principal_colours(shown.get("truth", shown["sample 1"]), encode)
    for label, x in shown.items():
        if label == "condition":
            images.append((label, principal_colours(x, encode_cond)(x), {}))
        elif not decoded or label not in ("sample 2", "sample 3"):
            images.append((label, colours(x), {}))
    heights = [0.95 * len(images)]  # inches
    if truth is not None:
        cosines = score.cosine(encode(shown["sample 1"]), encode(shown["truth"])).numpy()
        images.append(("cosine", cosines, {"cmap": "coolwarm_r", "vmin": -1, "vmax": 1}))
        heights = [0.95 * len(images), 4]

    fig = new_figure(12, sum(heights))
    top, *below = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = top.subplots(len(images), len(columns), squeeze=False)
    for row, (label, pictures, options) in zip(axes, images):
        row[0].set_ylabel(label, fontsize=10)
        H, W = grid_of(pictures.shape[1], grid)
        for ax, picture in zip(row, pictures):
            drawn = ax.imshow(picture.reshape(H, W, *picture.shape[1:]), **options)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for fig_below in below:
        top.colorbar(drawn, ax=axes, shrink=0.2, aspect=15, pad=0.01, anchor=(0, 0))
        draw_scores(fig_below, samples, encode, *references)
    fig.savefig(path)


def grid_of(tokens, grid):
    """(H, W) of so many tokens: the target's grid, or a square, or else a single row."""
    if tokens == grid[0] * grid[1]:
        return grid
    side = round(tokens**0.5)
    return (side, side) if side**2 == tokens else (1, tokens)


def token_cosines(samples, encode, truth, references, n):
    """{name: (n,)}: the mean token cosine with the truth of the first n samples, of the mean of
    their draws, and of baselines."""
    rows = np.arange(n)
    sets = score.compared(samples[: score.LIMIT], encode, references)
    sets["generated"] = lambda rows: encode(samples[rows, 0])
    y = truth(rows)  # (n, T, D)
    names = sets.keys() - {"mean", "floor"}  # of which one is zero, and the other like `shuffled`
    return {
        name: score.cosine(sets[name](rows), y).mean(1).numpy() for name in sets if name in names
    }


def draw_scores(fig, samples, encode, truth, references, shown=40):
    """The pooled cosines of the first samples with all their truths, and the histogram of token
    cosines beside the baselines."""
    n = min(COMPARED, len(samples))
    pooled = encode(samples[:n, 0]).mean(1)  # (n, D)
    true_pooled = truth(np.arange(n)).mean(1)
    hits = (score.most_similar(pooled, true_pooled).numpy() == np.arange(n)).mean()
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.9])
    matrix = left.imshow(score.cosine(pooled[:shown, None], true_pooled[None, :shown]))
    left.set_title(f"pooled cosine (R@1 {hits:.0%} of {n})", fontsize=11)
    left.set(xlabel="truth", ylabel="sample")
    fig.colorbar(matrix, ax=left, shrink=0.85)

    cosines = token_cosines(samples, encode, truth, references, n)
    bins = np.histogram_bin_edges(np.concatenate(list(cosines.values())), 40)
    for i, (name, values) in enumerate(cosines.items()):
        label = f"{name} ({values.mean():.3f})"
        style = {"histtype": "stepfilled", "lw": 1.6, "fc": (f"C{i}", 0.15), "ec": f"C{i}"}
        right.hist(values, bins, label=label, **style)
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
    fig = new_figure(12, 7.5)
    losses, by_t, cosines, rates = fig.subplots(2, 2).flat
    for i, out_dir in enumerate(out_dirs):
        run = read_log(out_dir)
        curves = {  # what is drawn of it: where, and how
            "loss": (losses, {"alpha": 0.35, "lw": 1}),
            "val_loss_raw": (losses, {"ls": ":"}),
            "val_loss": (losses, {"label": str(out_dir)[-40:]}),
            "val_token_cosine": (cosines, {}),
            "lr": (rates, {}),
        }
        bins = [key for key in run if key.startswith("val_loss_t")]
        for b, key in enumerate(bins):
            low, high = b / len(bins), (b + 1) / len(bins)
            style = {"alpha": 1 - 0.8 * low, "lw": 2.4 - 1.8 * low}
            if i == 0:
                style["label"] = f"t {low:.2g} to {high:.2g}"
            curves[key] = (by_t, style)
        if "loss" in run:
            iterations, values = run["loss"]
            run["loss"] = iterations, smooth(values, max(1, len(values) // 50))
        for key, (ax, style) in curves.items():
            if key in run:
                ax.plot(*run[key], color=f"C{i}", **style)
    titles = {
        losses: "loss (faint: training; solid: validation; dotted: validation, raw weights)",
        by_t: "validation loss by t, from noise (0) to data (1)",
        cosines: "token cosine of samples",
        rates: "learning rate",
    }
    for ax, title in titles.items():
        ax.set_title(title, fontsize=10)
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
    fig.savefig(path)


def main():
    user_errors_in_one_line()
    parser = score.make_parser(__doc__, ".png to write (default: see above)")
    if sys.argv[1:2] == ["samples"]:
        parser.add_argument("samples")
        args, data, samples = score.open_samples(parser)
        path = args.save or args.file.with_suffix(".png")
        cond, truth = data[f"{args.split}_cond"], data[f"{args.split}_target"]
        references = score.baselines(data, args.split, min(len(samples), COMPARED))
        given = (data["meta"]["grid"], data["stats"], args.data_dir, references)
        draw_samples(path, cond, truth, samples, *given)
    else:
        parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
        args = parser.parse_args()
        path = args.save or Path("curves.png")
        if len(args.runs) == 1 and not args.save:
            path = args.runs[0] / "curves.png"
        draw_curves(path, args.runs)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
