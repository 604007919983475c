"""
A prepared dataset, projected on leading principal components: few channels, for models that are
wider than their data.

    python bench/project.py data/photos wide --cond 256 --target 128
    python prepare.py wide/cond.npy wide/target.npy --out=data/wide

The components are those of the training split, of standardized channels. The files hold all samples
in an order of which prepare.py, with the same val_fraction and seed, makes the same two splits.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from plumbing.dataset import open_dataset
from prepare import split
from report import score


def components(tokens, n, count):
    """(D, count): the leading principal components of tokens(rows) -> (B, T, D), n samples."""
    moments = sum(score.moments(tokens(rows)) for rows in score.chunks(np.arange(n)))
    _, covariance = score.mean_and_covariance(moments)
    _, vectors = torch.linalg.eigh(covariance[1:, 1:])  # without the constant
    return vectors.flip(1)[:, :count].float()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder that prepare.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cond", type=int, default=256, help="channels")
    parser.add_argument("--target", type=int, default=128, help="channels")
    args = parser.parse_args()
    data = open_dataset(args.data)
    settings = data["meta"]["settings"]
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in ("cond", "target"):
        arrays = [data[f"{name}_{kind}"] for name in ("train", "val")]
        stats = data["stats"]
        encode = score.standardizer(stats[f"{kind}_mean"], stats[f"{kind}_std"])
        n = len(arrays[0])
        basis = components(lambda rows: encode(arrays[0][rows]), n, vars(args)[kind])
        n = sum(map(len, arrays))
        shape = n, arrays[0].shape[1], basis.shape[1]
        path = args.out / f"{kind}.npy"
        made = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for array, places in zip(arrays, split(n, settings["val_fraction"], settings["seed"])):
            for rows in score.chunks(np.arange(len(places))):
                made[places[rows]] = (encode(array[rows]) @ basis).numpy()
        print(f"wrote {path} {shape}")


if __name__ == "__main__":
    main()
