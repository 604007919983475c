"""
What training costs beyond this machine, computed from the model's own numbers.

    python bench/plan.py                # the paper's size, 60 million pairs, 8, 64, 512 GPUs
    python bench/plan.py --config config/train_real.py --pairs 1e6 --gpus 1 8

The defaults of train.py and config/train_blip3o.py, (64, 1280) -> (64, 768). Taken from the model:
parameters, operations of a sample's forward and backward pass (matrix products, counted by torch),
and what autograd keeps of a sample in between. Assumed, and printed above the table: the share of a
GPU's peak that is reached, bandwidths; that reading is hidden behind arithmetic, and all-reduce
behind the backward pass of a step's last batch, two thirds of its arithmetic. "of a step": the time
of all-reduce over that of a step's arithmetic. Pace and hours are DDP's.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import NextDiT, NextDiTConfig, flops_per_sample
from plumbing.configurator import read_defaults, read_file

ROOT, BLIP3O = Path(__file__).parents[1], "config/train_blip3o.py"


def model_config(settings, grid, cond_dim, target_dim):
    """What train.py makes of its settings for as many condition tokens as target tokens."""
    names = NextDiTConfig.__dataclass_fields__
    chosen = {name: settings[name] for name in names if name in settings}
    if chosen["conditioning"] == "auto":
        chosen["conditioning"] = "aligned"
    if chosen["prior"] is None:
        chosen["prior"] = target_dim > chosen["dim"]
    return NextDiTConfig(**chosen, grid=grid, cond_dim=cond_dim, target_dim=target_dim)


def kept(config, n_layer, B, S):
    """Bytes that autograd keeps for a batch's backward pass in bfloat16, less the weights."""
    model = NextDiT(replace(config, n_layer=n_layer))
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    T = math.prod(config.grid)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = model(
            torch.randn(B, T, config.target_dim), torch.rand(B), torch.randn(B, S, config.cond_dim)
        )
    assert out.shape == (B, T, config.target_dim)
    return sum(storage.nbytes() for at, storage in storages.items() if at not in weights)


def kept_per_sample(config, S):
    """Of one sample in all layers. What two samples keep more than one is no cast of a weight."""
    first, second = (kept(config, n, 2, S) - kept(config, n, 1, S) for n in (1, 2))
    return first + (config.n_layer - 1) * (second - first)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="of train.py; by default its defaults, the paper's size")
    parser.add_argument("--pairs", type=float, default=60e6)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--per-gpu", type=int, default=128, help="samples a GPU and pass")
    parser.add_argument("--accumulate", type=int, default=1, help="passes a step")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[64, 1280, 768], help="tokens, channels of both"
    )
    parser.add_argument(
        "--tflops", type=float, default=989, help="peak of a GPU in bfloat16, 10^12 a second"
    )
    parser.add_argument("--share", type=float, default=0.4, help="of that peak that is reached")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument(
        "--nvlink", type=float, default=450, help="GB a second and GPU inside a node, one way"
    )
    parser.add_argument(
        "--network", type=float, default=50, help="GB a second and GPU between nodes (400 Gbit)"
    )
    parser.add_argument(
        "--disk", type=float, default=2, help="GB a second at which a checkpoint is written"
    )
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name != "config" and not all(
            n > 0 for n in (value if isinstance(value, list) else [value])
        ):
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    defaults = {
        name: default["value"]
        for name, default in read_defaults((ROOT / "train.py").read_text()).items()
    }
    sizes = read_file(args.config, ROOT) if args.config else {}
    T, C, D = args.shape
    rows = max(n for n in range(1, math.isqrt(T) + 1) if T % n == 0)
    grid = (rows, T // rows)
    samples = args.pairs * args.epochs
    print(f"""assumed:
  GPUs of {args.tflops:g} TFLOP/s (H100 SXM, bfloat16), {args.share:.0%} of it reached
  {args.per_gpu} samples a GPU and pass, {args.accumulate} passes a step, float16 on disk
  {args.nvlink:g} GB/s inside a node of {args.node}, {args.network:g} GB/s a GPU between nodes
  ring all-reduce of float32 gradients, once a step
  20 bytes per parameter in memory, 16 of them (weights, average, AdamW's moments) written at
  {args.disk:g} GB/s""")
    of = f" with {args.config}" if args.config else ""
    for name, recipe in (("train.py's defaults" + of, {}), (BLIP3O + of, read_file(BLIP3O, ROOT))):
        config = model_config(defaults | sizes | recipe, grid, C, D)
        with torch.device("meta"):
            n = sum(p.numel() for p in NextDiT(config).parameters())
        flops, per_sample = flops_per_sample(config, T), kept_per_sample(config, T)
        print(
            f"\n{name}: {n / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOP per sample, forward "
            f"and backward; {args.pairs:.3g} pairs x {args.epochs:g}: {samples * flops:.2e} FLOP"
        )
        columns = [
            "GPUs",
            "batch",
            "steps",
            "samples/s",
            "hours",
            "read/s node",
            "DDP a GPU",
            "FSDP a GPU",
        ]
        columns += ["all-reduce", "of a step", "checkpoint"]
        print("".join(f"{c:>12}" for c in columns))
        for gpus in args.gpus:
            batch = gpus * args.per_gpu * args.accumulate
            seconds = (
                batch / gpus * flops / (args.share * args.tflops * 1e12)
            )  # of a step's arithmetic
            volume = 2 * (gpus - 1) / gpus * 4 * n  # that a GPU sends in a step
            reduction = volume / (1e9 * (args.nvlink if gpus <= args.node else args.network))
            hidden = 2 / 3 * seconds / args.accumulate
            rate, activations = (
                batch / (seconds + max(0, reduction - hidden)),
                args.per_gpu * per_sample,
            )
            read = min(gpus, args.node) / gpus * rate * T * (C + D) * 2
            row = (f"{gpus}", f"{batch}", f"{samples / batch:.0f}", f"{rate:.0f}",
                   f"{samples / rate / 3600:.3g}",
                   f"{read / 1e9:.2f} GB", f"{(20 * n + activations) / 1e9:.3g} GB",
                   f"{(20 * n / gpus + activations) / 1e9:.3g} GB", f"{volume / 1e9:.2g} GB",
                   f"{reduction / seconds:.0%}", f"{16 * n / args.disk / 1e9:.2g} s")  # fmt: skip
            print("".join(f"{value:>12}" for value in row))


if __name__ == "__main__":
    main()
