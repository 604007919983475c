"""
The pictures of a run. `python sample.py --out_dir=out-digits --plot=True` draws samples.

Token grids are shown as images: decoded to pixels where the dataset has a decoder.npz (as the
digits do), otherwise with their first three principal components as red, green and blue.
"""

from pathlib import Path

import numpy as np


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
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from e
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
