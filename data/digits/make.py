"""
The embedded dataset: paired token embeddings of scikit-learn's 1,797 handwritten digits.

    python data/digits/make.py                 # writes embeddings.pkl and decoder.npz here
    python prepare.py data/digits/embeddings.pkl --out=data/digits

Every 8x8 image becomes 64 tokens, one per pixel, twice: the target encoder sees the image,
the condition encoder a blurred and noisy view of it, so that the condition leaves the target
uncertain. The encoders are fixed random convolutions. decoder.npz holds the linear maps from
a token back to its pixel, fitted on the training images, so that embeddings can be looked at.
"""

import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2]))
import prepare  # noqa: E402

HERE = Path(__file__).parent
BLUR = 0.9  # standard deviation, in pixels
NOISE = 0.12  # standard deviation; an image's range is [0, 1]


def degrade(images, generator):
    """(N, 1, 8, 8) -> the same, blurred by a Gaussian and with noise added."""
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / BLUR) ** 2)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    return F.conv2d(images, kernel, padding=2) + NOISE * torch.randn(
        images.shape, generator=generator
    )


def encode(images, width, seed):
    """(N, 1, 8, 8) -> (N, 64, width) tokens: two random 3x3 convolutions with a GELU between."""
    g = torch.Generator().manual_seed(seed)
    hidden = F.conv2d(
        images,
        torch.randn(4 * width, 1, 3, 3, generator=g),
        torch.randn(4 * width, generator=g) / 2,
        padding=1,
    )
    tokens = F.conv2d(
        F.gelu(hidden), torch.randn(width, 4 * width, 3, 3, generator=g) / width, padding=1
    )
    return tokens.flatten(2).transpose(1, 2).contiguous()


def fit_decoder(tokens, images):
    """(channels + 1,) least-squares map from a token, with a constant 1, to its pixel."""
    x = tokens.flatten(0, 1).double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(x, images.flatten().double()[:, None]).solution[:, 0].numpy()


def main():
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    views = degrade(images, torch.Generator().manual_seed(1))
    cond, target = encode(views, width=48, seed=2), encode(images, width=32, seed=3)
    # prepare.py's split by its defaults: the decoder must not see validation images
    train, val = prepare.split(len(images), prepare.val_fraction, prepare.seed)
    decoder = dict(
        target=fit_decoder(target[train], images[train]),
        cond=fit_decoder(cond[train], views[train]),
    )
    content = {
        "eva_blip3o_embeddings": cond,
        "clip_blip3o_embeddings": target,
        "captions": [f"the digit {label}" for label in digits.target],
        "keys": [f"digit_{i:04d}" for i in range(len(images))],
        "config": {
            "eva_model": "random convolutions on a blurred, noisy view",
            "clip_model": "random convolutions",
        },
    }
    (HERE / "embeddings.pkl").write_bytes(pickle.dumps(content))
    np.savez(HERE / "decoder.npz", **decoder)
    for name, tokens, truth in (
        ("target", target[val], images[val]),
        ("cond", cond[val], views[val]),
    ):
        pixels = tokens.double() @ torch.from_numpy(decoder[name][:-1]) + decoder[name][-1]
        explained = 1 - (pixels - truth.flatten(1)).square().mean() / truth.var()
        print(
            f"{name}: {tuple(tokens.shape[1:])} tokens, pixels decoded with "
            f"R^2 {explained:.3f} on unseen images"
        )
    print(f"wrote {HERE / 'embeddings.pkl'} ({len(images)} samples) and {HERE / 'decoder.npz'}")


if __name__ == "__main__":
    main()
