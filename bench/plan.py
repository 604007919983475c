"""
What training costs on machines larger than this one, computed from the model's own numbers.

    python bench/plan.py                # the paper's size, 60 million pairs, 8, 64, 512 GPUs
    python bench/plan.py --config config/train_real.py --pairs 1e6 --gpus 1 8

Plans for two recipes, train.py's defaults and config/train_blip3o.py, on (64, 1280) -> (64, 768).
Three numbers come from the model: its parameters, the operations of a training step per sample
(matrix products, counted by torch), and what autograd keeps per sample for the backward pass.

What is assumed is printed above the tables: bandwidths, and what bench/gpu.py measured on an H200,
the share of the GPU's peak that forward and backward reach and the time of the optimizer.
Reading is taken to be hidden behind arithmetic, and all-reduce behind the backward pass of the last
micro-batch, two thirds of its arithmetic. The column "share" is the time of all-reduce over the
time of an iteration's arithmetic. Samples per second and hours are those of DDP.
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

ROOT = Path(__file__).parents[1]
BLIP3O = "config/train_blip3o.py"
COLUMNS = ("GPUs", "batch", "iterations", "samples/s", "hours", "read/s node")
COLUMNS += ("DDP, GPU", "FSDP, GPU", "all-reduce", "share", "checkpoint")
BYTES_IN_MEMORY = 20  # per parameter, in float32: weight, gradient, average, AdamW's two moments
BYTES_ON_DISK = 16  # all of these but the gradient


def default_settings():
    defaults = read_defaults((ROOT / "train.py").read_text())
    return {name: value for name, (value, _) in defaults.items()}


def model_config(settings, grid, cond_tokens, cond_dim, target_dim):
    """What train.py makes of its settings for data of these shapes."""
    names = NextDiTConfig.__dataclass_fields__
    chosen = {name: settings[name] for name in names if name in settings}
    if chosen["conditioning"] == "auto":
        chosen["conditioning"] = "aligned" if cond_tokens == math.prod(grid) else "cross"
    path = [settings[name] for name in ("path", "prediction", "sigma_min", "sigma_max")]
    if chosen["prior"] is None:
        chosen["prior"] = path == ["linear", "v", 0, 1] and target_dim > chosen["dim"]
    return NextDiTConfig(**chosen, grid=grid, cond_dim=cond_dim, target_dim=target_dim)


def kept(config, n_layer, B, S):
    """Bytes, without the weights, that autograd keeps for the backward pass of B samples in
    bfloat16."""
    model = NextDiT(replace(config, n_layer=n_layer))
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    T = config.n_tokens
    x_t = torch.randn(B, T, config.target_dim)
    cond = torch.randn(B, S, config.cond_dim)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = model(x_t, torch.rand(B), cond)
    assert out.shape == x_t.shape
    return sum(storage.nbytes() for at, storage in storages.items() if at not in weights)


def kept_per_sample(config, S):
    """Bytes kept per sample, in all layers.

    Two samples less one, because casts of the weights are kept only once per batch.
    """
    first, second = (kept(config, n, 2, S) - kept(config, n, 1, S) for n in (1, 2))
    return first + (config.n_layer - 1) * (second - first)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--config", help="of train.py; by default its defaults, the paper's size")
    option("--pairs", type=float, default=60e6, help="samples of the dataset")
    option("--epochs", type=float, default=1)
    option("--gpus", type=int, nargs="+", default=[8, 64, 512])
    option("--per-gpu", type=int, default=128, help="samples per GPU and micro-batch")
    option("--accumulate", type=int, default=1, help="micro-batches per iteration and GPU")
    shape = "tokens, channels of the condition, channels of the target"
    option("--shape", type=int, nargs=3, default=[64, 1280, 768], help=shape)
    option("--tflops", type=float, default=989, help="peak per GPU in bfloat16, 10^12 per second")
    option("--share", type=float, default=0.38, help="of that peak that forward and backward reach")
    what = "picoseconds per parameter for clipping, update and averages"
    option("--optimizer", type=float, default=15.3, help=what)
    option("--node", type=int, default=8, help="GPUs per node")
    option("--nvlink", type=float, default=450, help="GB/s per GPU inside a node, one way")
    option("--network", type=float, default=50, help="GB/s per GPU between nodes (400 Gbit/s)")
    option("--disk", type=float, default=2, help="GB/s at which a checkpoint is written")
    args = parser.parse_args()
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if name != "config" and min(numbers) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def plan(args, gpus, params, flops, activations):
    """A row of the table.

    params: of the model; flops: per sample; activations: bytes per sample
    """
    T, C, D = args.shape
    batch = gpus * args.per_gpu * args.accumulate
    arithmetic = batch / gpus * flops / (args.share * args.tflops * 1e12)  # seconds per iteration
    sent = 2 * (gpus - 1) / gpus * 4 * params  # bytes per iteration and GPU
    bandwidth = args.nvlink if gpus <= args.node else args.network
    all_reduce = sent / (1e9 * bandwidth)  # seconds per iteration
    hidden = 2 / 3 * arithmetic / args.accumulate
    update = args.optimizer * params / 1e12  # seconds per iteration
    rate = batch / (arithmetic + update + max(0, all_reduce - hidden))  # samples per second
    samples = args.pairs * args.epochs
    read = min(gpus, args.node) / gpus * rate * T * (C + D) * 2  # bytes per second and node
    state = BYTES_IN_MEMORY * params
    activations = args.per_gpu * activations
    return (
        f"{gpus}",
        f"{batch}",
        f"{samples / batch:.0f}",
        f"{rate:.0f}",
        f"{samples / rate / 3600:.3g}",
        f"{read / 1e9:.2f} GB",
        f"{(state + activations) / 1e9:.3g} GB",
        f"{(state / gpus + activations) / 1e9:.3g} GB",
        f"{sent / 1e9:.2g} GB",
        f"{all_reduce / arithmetic:.0%}",
        f"{BYTES_ON_DISK * params / args.disk / 1e9:.2g} s",
    )


def main():
    args = parse_args()
    T, C, D = args.shape
    rows = max(n for n in range(1, math.isqrt(T) + 1) if T % n == 0)
    grid = (rows, T // rows)
    print(f"""assumed:
  GPUs of {args.tflops:g} TFLOP/s (H100 SXM, bfloat16), {args.share:.0%} of it reached by forward
  and backward; {args.optimizer:g} ps per parameter for clipping, AdamW and the averages
  {args.per_gpu} samples per GPU and micro-batch, {args.accumulate} micro-batches per iteration
  data in float16 on disk
  {args.nvlink:g} GB/s inside a node of {args.node}, {args.network:g} GB/s per GPU between nodes
  ring all-reduce of float32 gradients, once per iteration
  {BYTES_IN_MEMORY} bytes per parameter in memory
  {BYTES_ON_DISK} of them (weights, average, AdamW's moments) written at {args.disk:g} GB/s""")
    settings = default_settings()
    of = ""
    if args.config:
        settings |= read_file(args.config)
        of = f" with {args.config}"
    recipes = {
        "train.py's defaults" + of: settings,
        BLIP3O + of: settings | read_file(ROOT / BLIP3O),
    }
    for name, recipe in recipes.items():
        config = model_config(recipe, grid, T, C, D)
        with torch.device("meta"):
            params = sum(p.numel() for p in NextDiT(config).parameters())
        flops = flops_per_sample(config, T)
        activations = kept_per_sample(config, T)
        total = args.pairs * args.epochs * flops
        print(
            f"\n{name}: {params / 1e6:.3g} M parameters\n"
            f"{flops / 1e9:.3g} GFLOP per sample, forward and backward; "
            f"{args.pairs:.3g} pairs x {args.epochs:g}: {total:.2e} FLOP"
        )
        print("".join(f"{column:>12}" for column in COLUMNS))
        for gpus in args.gpus:
            row = plan(args, gpus, params, flops, activations)
            print("".join(f"{value:>12}" for value in row))


if __name__ == "__main__":
    main()
