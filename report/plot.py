"""
The pictures of runs.

    python -m report.plot out-a                # curves of a run -> out-a/curves.png
    python -m report.plot out-a out-b          # curves of several runs -> curves.png in this folder
    python -m report.plot samples out-a/generated.npy --data_dir=data/mine  # -> .png beside it

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), and with three principal components of the tokens as red, green and blue: the first ones
and, of targets, further ones.
"""

import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from plumbing.configurator import configure_paths, set_up_console
from plumbing.run_folder import read_log
from report import score

# options of imshow
PIXELS = dict(cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
COSINES = dict(cmap="coolwarm_r", vmin=-1, vmax=1)

# ---- settings
save = ""  # .png to write; empty: see above
data_dir = ""  # for samples: dataset that prepare.py wrote
split = "val"  # for samples: val | train
# ----


def new_figure(height):
    """A figure of 12 inches by `height`. It is drawn without pyplot, and so without a backend."""
    # in the shells of a notebook it names a backend that may not be installed, and none is needed
    os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from e
    return Figure(figsize=(12, height), layout="constrained")


def principal_colours(arrays, encode, first):
    """Colours (N, T, 3) of each of the arrays (N, T, D): three principal components, from number
    `first` on, of the first one, standardized by `encode`, their 1st to 99th percentile spread over
    [0, 1]."""
    arrays = [encode(x).numpy() for x in arrays]
    x = np.concatenate(arrays[0])  # (N * T, D)
    axes = np.linalg.svd(x - x.mean(0), full_matrices=False).Vh[first:]  # the largest come first
    axes = np.resize(axes[:3], (3, x.shape[1])).T  # (D, 3): with fewer than 3, the same again
    low, high = np.percentile(x @ axes, [1, 99], axis=0)
    scale = np.maximum(high - low, 1e-12)
    return [np.clip((x @ axes - low) / scale, 0, 1) for x in arrays]


def grid_height(tokens, grid):
    """Rows of the image of so many tokens: of the target's grid, or a square, or a single row."""
    if tokens == math.prod(grid):
        return grid[0]
    side = math.isqrt(tokens)
    return side if tokens == side**2 else 1


def draw_samples(path, cond, truth, samples, grid, stats, folder=None, references=None):
    """Write a PNG. For some samples, a column each: the condition, the truth, draws and their mean,
    a draw of the baseline `gaussian` (up to score.WIDE channels), and the cosine of the first draw
    and the truth, token by token.

    cond (N, S, C), truth (N, T, D) or None, samples (N, draws, T, D), all raw; grid (H, W) of T
    stats: cond_mean and so on; folder: of the dataset, for its decoder.npz
    references: score.predictions for the samples; None: without `gaussian`
    """
    N, M, _, D = samples.shape
    columns = score.evenly(N, min(12, N))
    draws = samples[columns]  # (n, M, T, D)
    targets = {}
    if truth is not None:
        targets["truth"] = truth[columns]
    for i in range(min(M, 3)):
        targets[f"sample {i + 1}"] = draws[:, i]
    if M > 1:
        targets[f"mean of {M}"] = draws.mean(1)
    if references and D <= score.WIDE:
        gaussian = references["gaussian"](columns)[:, 0]  # standardized
        targets["gaussian"] = gaussian.numpy() * stats["target_std"] + stats["target_mean"]
    # {kind: {label: tokens (n, T, D)}}
    embeddings = {"cond": {"condition": cond[columns]}, "target": targets}

    images = []  # (label, pictures (n, T) or (n, T, 3), options of imshow)
    decoder = Path(folder or "", "decoder.npz")
    if decoder.is_file():
        for kind in embeddings:
            *weights, bias = np.load(decoder)[kind]  # (D + 1,)
            for label, x in embeddings[kind].items():
                x = x[..., : len(weights)]  # further channels are none of its images
                images.append((label, x @ weights + bias, PIXELS))
        for label in ("sample 2", "sample 3"):  # their pixels are enough
            targets.pop(label, None)
    few = ("truth", "sample 1", "gaussian")  # whose further components are enough
    further = {label: x for label, x in targets.items() if label in few}
    for kind, tokens, first in (
        ("cond", embeddings["cond"], 0),
        ("target", targets, 0),
        ("target", further, min(33, D // 2)),
    ):
        encode = score.standardizer(stats[f"{kind}_mean"], stats[f"{kind}_std"])
        colours = principal_colours(tokens.values(), encode, first)
        for label, pictures in zip(tokens, colours):
            images.append((f"{label}\n{first + 1} to {first + 3}", pictures, {}))

    if truth is not None:  # `encode` is that of the targets now
        cosines = score.cosine(encode(targets["sample 1"]), encode(targets["truth"]))
        images.append(("cosine", cosines.numpy(), COSINES))
    fig = new_figure(0.95 * len(images))
    axes = fig.subplots(len(images), len(columns), squeeze=False)
    for row, (label, pictures, options) in zip(axes, images):
        row[0].set_ylabel(label)
        for ax, picture in zip(row, pictures):
            height = grid_height(len(picture), grid)
            shown = ax.imshow(np.split(picture, height), **options)
            ax.set(xticks=[], yticks=[], frame_on=False)
    if truth is not None:  # of the last row
        fig.colorbar(shown, ax=axes, shrink=0.2, anchor=(0, 0), pad=0.01)
    fig.savefig(path)


def read_curves(out_dir):
    """{name: [(iteration, value)]} of what a run measured; what was not finite is left out."""
    curves = defaultdict(list)
    try:
        for record in read_log(Path(out_dir)):
            for name, value in record.items():
                if value is not None:
                    curves[name].append((record["iter"], value))
    except Exception as e:  # another file of this name can raise anything
        raise ValueError(f"{out_dir}/log.jsonl cannot be read as a run's log: {e}") from e
    return curves


def draw_curves(path, out_dirs):
    """Write a PNG with the curves of runs: losses, validation loss by t, metrics of samples,
    learning rate."""
    fig = new_figure(7.5)
    losses, by_t, rates, cosines, neighbours, distances = fig.subplots(2, 3).flat
    for i, out_dir in enumerate(out_dirs):
        run = read_curves(out_dir)

        def draw(ax, name, **style):
            ax.plot(*zip(*run[name]), color=f"C{i}", **style)  # nothing, if it has no points

        draw(losses, "loss", alpha=0.4, lw=0.8)
        draw(losses, "val_loss_raw", ls=":")
        draw(losses, "val_loss")
        draw(cosines, "val_token_cosine")
        draw(neighbours, "val_neighbours")
        draw(distances, "val_frechet_patch")
        draw(rates, "lr", label=out_dir)
        bins = [name for name in run if name.startswith("val_loss_t")]
        for b, name in enumerate(bins):
            draw(by_t, name, lw=2.4 / (1 + b))
    titles = (
        "loss (faint: training; solid: validation; dotted: raw)",
        "validation loss by t, from noise (thick) to data (thin)",
        "learning rate",
        "samples: token cosine",
        "samples: cosine of neighbours",
        "samples: Fréchet distance of patches",
    )
    for ax, title in zip(fig.axes, titles):
        ax.set(xlabel="iteration")
        ax.set_title(title, size="medium")
        ax.grid(alpha=0.25)
    for ax in (losses, by_t, distances):
        ax.set_yscale("log", subs=[2, 3, 5])
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    fig.legend(loc="outside lower center")
    fig.savefig(path)


def main():
    set_up_console()
    _, paths = configure_paths(globals())
    if not paths:
        raise ValueError("name the folders of runs, or samples and a file")
    if paths[0] == "samples":
        data, samples = score.open_samples(paths[1:], data_dir, split)
        path = save or Path(paths[1]).with_suffix(".png")
        draw_samples(
            path,
            data[f"{split}_cond"],
            data[f"{split}_target"],
            samples,
            data["meta"]["grid"],
            data["stats"],
            data["folders"][0],
            score.predictions(samples, data, split),
        )
    else:
        path = save or Path(paths[0] if len(paths) == 1 else "", "curves.png")
        draw_curves(path, paths)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
