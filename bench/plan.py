"""
What training costs beyond this machine, computed from the model's own numbers.

    python bench/plan.py                                       # the paper's size, 60 million pairs, 8, 64, 512 GPUs
    python bench/plan.py --config config/train_real.py --pairs 1e6 --gpus 1 8

Both conditionings of train.py, (64, 1280) -> (64, 768), float16 on disk. Taken from the model: parameters, operations
of a sample's forward and backward pass (matrix products, counted by torch), and what autograd keeps of a sample for
the backward pass. Assumed, and written beside the table: how much of a GPU's peak is reached, bandwidths, and that
reading and all-reduce are hidden behind arithmetic unless they take longer than it.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from configurator import read_defaults, read_file
from measure import flops_per_sample
from model import NextDiT, NextDiTConfig

ROOT = Path(__file__).parents[1]


def kept(config, n_layer, B, S):
    """Bytes that autograd keeps for the backward pass of a batch, in bfloat16 arithmetic, less the weights."""
    model = NextDiT(replace(config, n_layer=n_layer))
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    T = math.prod(config.grid)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(B, T, config.target_dim), torch.rand(B), torch.randn(B, S, config.cond_dim))
    assert out.shape == (B, T, config.target_dim)
    return sum(storage.nbytes() for at, storage in storages.items() if at not in weights)


def kept_per_sample(config, S):
    """Of one sample in all layers. What two samples keep more than one is no cast of a weight."""
    first, second = (kept(config, n, 2, S) - kept(config, n, 1, S) for n in (1, 2))
    return first + (config.n_layer - 1) * (second - first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="of train.py; by default its defaults, the paper's size")
    parser.add_argument("--pairs", type=float, default=60e6)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--per-gpu", type=int, default=128, help="samples a GPU and step")
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 1280, 768], help="tokens, channels of both")
    parser.add_argument(
        "--tflops", type=float, default=989, help="peak of a GPU in bfloat16, 10^12 a second (H100 SXM)"
    )
    parser.add_argument("--share", type=float, default=0.4, help="of that peak that is reached")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--nvlink", type=float, default=450, help="GB a second and GPU inside a node, one way")
    parser.add_argument("--network", type=float, default=50, help="GB a second and GPU between nodes (400 Gbit)")
    parser.add_argument("--disk", type=float, default=2, help="GB a second at which a checkpoint is written")
    args = parser.parse_args()
    settings = {name: default["value"] for name, default in read_defaults((ROOT / "train.py").read_text()).items()}
    settings |= read_file(args.config, ROOT) if args.config else {}
    (T, C, D), sizes = args.shape, {k: v for k, v in settings.items() if k in NextDiTConfig.__dataclass_fields__}
    grid = (math.isqrt(T), T // math.isqrt(T))
    print(
        f"assumed: {args.share:.0%} of {args.tflops:g} TFLOP/s, {args.per_gpu} samples a GPU and step, float16 on disk;"
    )
    print(f"{args.nvlink:g} GB/s inside a node of {args.node}, {args.network:g} GB/s a GPU between; ring all-reduce of")
    print("gradients in float32; checkpoints of weights, their average and AdamW's moments, 16 bytes a parameter,")
    print(f"at {args.disk:g} GB/s")
    for conditioning in ("aligned", "cross"):
        chosen = sizes | dict(conditioning=conditioning, prior=conditioning == "aligned")
        config = NextDiTConfig(grid=grid, target_dim=D, cond_dim=C, **chosen)
        with torch.device("meta"):
            n = sum(p.numel() for p in NextDiT(config).parameters())
        flops, per_sample = flops_per_sample(config, T), kept_per_sample(config, T)
        print(f"\n{conditioning}: {n / 1e6:.0f} M parameters, {flops / 1e12:.3f} TFLOP a sample, forward and backward; "
              f"{args.pairs:.3g} pairs x {args.epochs:g}: {args.pairs * args.epochs * flops:.2e} FLOP")  # fmt: skip
        columns = ["GPUs", "batch", "samples/s", "hours", "read/s node", "DDP a GPU", "FSDP a GPU"]
        columns += ["all-reduce", "of a step", "checkpoint"]
        print("".join(f"{c:>12}" for c in columns))
        for gpus in args.gpus:
            seconds = args.per_gpu * flops / (args.share * args.tflops * 1e12)  # of a step
            rate, state, activations = gpus * args.per_gpu / seconds, 20 * n, args.per_gpu * per_sample
            volume = 2 * (gpus - 1) / gpus * 4 * n  # that a GPU sends in a step
            slow = volume / (1e9 * (args.nvlink if gpus <= args.node else args.network))
            row = (f"{gpus}", f"{gpus * args.per_gpu}", f"{rate:.0f}", f"{args.pairs * args.epochs / rate / 3600:.1f}",
                   f"{min(gpus, args.node) / gpus * rate * T * (C + D) * 2 / 1e9:.2f} GB",
                   f"{(state + activations) / 1e9:.0f} GB", f"{(state / gpus + activations) / 1e9:.0f} GB",
                   f"{volume / 1e9:.1f} GB", f"{slow / seconds:.0%}", f"{16 * n / args.disk / 1e9:.0f} s")  # fmt: skip
            print("".join(f"{value:>12}" for value in row))


if __name__ == "__main__":
    main()
