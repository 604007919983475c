"""
Generate embeddings from a checkpoint, score them, save them.

    python sample.py --out_dir=out-digits --plot=True            # the validation split, with metrics
    python sample.py --out_dir=out --cond=conditions.npy --save=generated.npy
    python sample.py --out_dir=out --steps=50 --method=euler --guidance=2.0
    python sample.py --help

or from Python:

    import numpy as np, sample
    loaded = sample.load("out-digits")
    target = sample.generate(loaded, np.load("conditions.npy"), steps=20)    # (B, S, C) -> (B, T, D)
"""

import json
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import flow
import score
from checkpoint import read_checkpoint, unreadable, weights_by_block
from configurator import configure
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig, pick_device
from prepare import open_dataset
from sources import get_rows, items, load_pickle

# ---- I/O
out_dir = "out"  # where train.py wrote, or a folder of diffusers' LuminaNextDiT2DModel
checkpoint = "ckpt_best.pt"  # in out_dir
weights = "ema"  # ema | model (the raw ones)
cond = ""  # .npy (B, S, C), .pkl or .pt of conditions; empty: those of the dataset
cond_key = "eva_blip3o_embeddings"  # in a .pkl or .pt
data_dir = ""  # dataset to read conditions and truth from; empty: the one trained on
split = "val"  # val | train
subset_size: int | None = None  # the first so many conditions only
save = ""  # .npy to write; empty: out_dir/generated.npy
save_draws = False  # also write all draws (B, draws, T, D), as *_draws.npy
save_pickle = ""  # .pkl with conditions, truth, generated, captions, keys and metrics
plot = False  # draw conditions, truth and samples into out_dir/samples.png
# ---- sampling
steps = 12  # of the solver; midpoint and heun evaluate the model twice a step, rk4 four times
method = "midpoint"  # euler | midpoint | heun | rk4
shift = 1.0  # > 1: finer steps near noise
guidance = 1.0  # classifier-free guidance; 1: none
draws = 4  # samples of each condition where there is truth: the first is saved, their mean scored beside ridge
batch_size = 64
seed = 0
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # of weights and arithmetic: auto (bfloat16 on cuda, else float32) | float32 | bfloat16 | float16
# ----


def load(path, device="auto", weights="ema", dtype="auto", grid=None):
    """A trained model, ready to sample.

    path: a checkpoint, the folder of a run (then its ckpt_best.pt), or a folder of diffusers' LuminaNextDiT2DModel,
        whose embeddings are taken as they are (normalize none)
    weights: 'ema' or 'model', the raw ones
    dtype: of the arithmetic (torch.autocast) and so of the matrices, which are converted one by one from a memory
        map; auto, float32, bfloat16 or float16. Norms, biases and the state are float32.
    grid: (H, W) of a diffusers model; by default square
    Returns a namespace: model, flow (FlowConfig), cond and target (Normalizer), stats (None for a diffusers model, as
    are data_dir, cond_tokens and config), data_dir, cond_tokens, config (the run's), iter, device, dtype.
    Raises ValueError with one line on what is wrong.
    """
    path, device = Path(path), pick_device(device)
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} is unknown; it is one of ema, model")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is unknown; it is one of auto, float32, bfloat16, float16")

    def cast(p):  # what is left as it is stays a view of the map, and keeps all that was read of it in memory
        return p.to(device, getattr(torch, dtype) if p.dim() > 1 else torch.float32, copy=dtype != "float32")

    if path.is_dir() and not (path / "ckpt_best.pt").exists() and any(path.glob("*.safetensors")):
        model = NextDiT.from_diffusers(path, grid, cast)
        ckpt, flow_config = {"stats": None, "config": None, "iter": 0, "cond_tokens": None}, FlowConfig()
        means = {"cond": torch.zeros(model.config.cond_dim), "target": torch.zeros(model.config.target_dim)}
        normalizers = {name: Normalizer("none", mean, mean + 1, device) for name, mean in means.items()}
    else:
        path = path / "ckpt_best.pt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no checkpoint {path}; train one with: python train.py --out_dir={path.parent}")
        ckpt = read_checkpoint(path)
        try:
            with torch.device("meta"):  # no parameters before those of the file
                model = NextDiT(NextDiTConfig(**ckpt["model_args"] | {"gradient_checkpointing": False}))
            state = {name: cast(p) for block in weights_by_block(path, weights) for name, p in block.items()}
            model.load_state_dict(state, assign=True)
            flow_config = FlowConfig(**ckpt["flow"])
            normalizers = {
                name: Normalizer(ckpt["normalize"], ckpt["stats"][f"{name}_mean"], ckpt["stats"][f"{name}_std"], device)
                for name in ("cond", "target")
            }
            ckpt = {name: ckpt[name] for name in ("stats", "config", "iter", "cond_tokens")}
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise ValueError(unreadable(path, e)) from e
    return SimpleNamespace(
        model=model.eval().requires_grad_(False), flow=flow_config, **normalizers, **ckpt,
        data_dir=ckpt["config"] and ckpt["config"]["data_dir"], device=device, dtype=dtype,
    )  # fmt: skip


@torch.no_grad()
def generate(
    loaded,
    cond,
    steps=12,
    method="midpoint",
    guidance=1.0,
    seed=0,
    shift=1.0,
    draw=0,
    first=0,
    trajectory=False,
):
    """Generate target embeddings for raw conditions.

    loaded: from load(); cond: (B, S, C) array or tensor, raw (not normalized)
    steps, method, shift: of the solver, see flow.integrate
    guidance: classifier-free guidance scale; 1 is none
    seed, draw, first: sample i starts from noise that is a function of (seed, first + i, draw)
        alone, so neither the batch size nor the number of conditions changes a sample
    trajectory: return the states at every step, noise first, instead of the last alone
    Returns raw targets (B, T, D), float32 on the CPU; with trajectory (steps + 1, B, T, D).
    Raises ValueError where cond is not finite or not of the model's shape, or a setting is unknown.
    """
    model, T = loaded.model, loaded.model.config.grid[0] * loaded.model.config.grid[1]
    cond = torch.as_tensor(cond)
    tokens = loaded.cond_tokens or (*cond.shape, 0, 0)[1]  # a diffusers model does not say how many
    if cond.dim() != 3 or 0 in cond.shape or cond.shape[1:] != (tokens, model.config.cond_dim):
        expected = f"(B, {loaded.cond_tokens or 'any'}, {model.config.cond_dim})"
        raise ValueError(f"conditions have shape {tuple(cond.shape)}; this model was trained on {expected}")
    if not cond.isfinite().all():
        bad = (~cond.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"NaN or Inf in {len(bad)} of {len(cond)} conditions, the first is number {first + bad[0]}")
    rows = range(first, first + len(cond))
    x = loaded.flow.sigma_max * flow.sample_noise(rows, (T, model.config.target_dim), seed, draw).to(loaded.device)
    half = loaded.dtype != "float32"
    with torch.autocast(torch.device(loaded.device).type, getattr(torch, loaded.dtype), enabled=half):
        velocity = flow.guided_velocity(model, loaded.cond.encode(cond.to(loaded.device)), loaded.flow, guidance)
        states = flow.integrate(velocity, x, steps, method, shift, trajectory=trajectory)
    return loaded.target.decode(states).cpu()


def interpolate(loaded, cond_a, cond_b, n=8, **settings):
    """Targets for n conditions on the line from cond_a (S, C) to cond_b, all from the same noise:
    (n, T, D). `settings` are generate()'s."""
    weights = torch.linspace(0, 1, n)
    a, b = torch.as_tensor(cond_a).float(), torch.as_tensor(cond_b).float()
    return torch.cat([generate(loaded, torch.lerp(a, b, w)[None], **settings) for w in weights])


def read_conditions(path, key):
    """Array (B, S, C) and items [{key, caption}] of a .npy or, through the safe reader, a .pkl or .pt."""
    if str(path).endswith((".pkl", ".pickle", ".pt", ".pth")):
        content = load_pickle(path)
        array = np.asarray(get_rows(content, key, path))
        named = {name: content.get(name) or [None] * len(array) for name in ("keys", "captions")}
        return array, list(items(named, path))
    if not str(path).endswith(".npy"):
        raise ValueError(f"{path}: conditions are read from .npy, .pkl or .pt files")
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{path}: {e}") from e
    if array.ndim != 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: holds {array.dtype} of shape {array.shape}, not numbers of shape (B, S, C)")
    return array, [{"key": None, "caption": None}] * len(array)


def main():
    config = configure(globals())
    print(" ".join(f"{k}={v}" for k, v in config.items()))
    try:
        run()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


def run():
    torch.set_float32_matmul_precision("medium")  # as in train.py
    data = open_dataset(data_dir) if data_dir else None
    path = Path(out_dir) if checkpoint == "ckpt_best.pt" else Path(out_dir) / checkpoint  # or a diffusers model
    loaded = load(path, device, weights, dtype, data and tuple(data["meta"]["grid"]))
    folder = data_dir or loaded.data_dir
    if loaded.stats is None:  # a diffusers model has none
        loaded.stats = data and data["stats"]
    if plot and loaded.stats is None:
        raise ValueError(f"{out_dir} holds no statistics for the picture's colours: add --data_dir=DIR")
    target = Path(save or Path(out_dir) / "generated.npy")
    if target.suffix != ".npy":
        raise ValueError(f"save={save!r} must end in .npy")
    for path in (target, Path(save_pickle)):
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    if cond:
        (conditions, items), truth = read_conditions(cond, cond_key), None
    elif folder is None:
        raise ValueError(f"{out_dir} says of no dataset: add --cond=FILE.npy, or --data_dir=DIR for its conditions")
    elif split in ("val", "train"):
        data = data or open_dataset(folder)
        conditions, truth = data[f"{split}_cond"], data[f"{split}_target"]
        items = [json.loads(line) for line in (Path(folder) / f"{split}_items.jsonl").read_text().splitlines()]
    else:
        raise ValueError(f"split={split!r} is unknown; it is one of val, train")
    H, W = loaded.model.config.grid
    n = len(conditions) if subset_size is None else min(subset_size, len(conditions))
    if n < 1 or draws < 1 or batch_size < 1:
        raise ValueError(f"nothing to generate: {n} conditions, draws={draws}, batch_size={batch_size}")
    shape = H * W, loaded.model.config.target_dim
    if truth is not None and truth.shape[1:] != shape:
        raise ValueError(f"{folder} has targets of shape {truth.shape[1:]}; the model makes {shape}")
    conditions, truth, items = conditions[:n], None if truth is None else truth[:n], items[:n]

    n_draws = draws if truth is not None or save_draws or plot else 1
    samples = np.empty((n, n_draws, *shape), np.float32)
    start = time.perf_counter()
    with tqdm(total=n * n_draws, unit="sample") as bar:
        for first in range(0, n, batch_size):
            rows = slice(first, min(first + batch_size, n))
            batch = np.array(conditions[rows])
            for draw in range(n_draws):
                samples[rows, draw] = generate(loaded, batch, steps, method, guidance, seed, shift, draw, first)
                bar.update(len(batch))
    seconds = time.perf_counter() - start
    evaluations = steps * len(flow.METHODS[method][2]) * (1 if guidance == 1 else 2)
    print(f"{n} conditions, {n_draws} draws, {evaluations} model evaluations a sample, {seconds:.1f} s")

    np.save(target, samples[:, 0])
    print(f"wrote {target} {samples[:, 0].shape}")
    if save_draws:
        np.save(target.with_name(f"{target.stem}_draws.npy"), samples)
        print(f"wrote {target.with_name(f'{target.stem}_draws.npy')} {samples.shape}")
    (Path(out_dir) / "metrics.json").unlink(missing_ok=True)  # of an earlier run's samples
    metrics = None if truth is None else evaluate(loaded, data, conditions, truth, samples)
    if save_pickle:
        results = {
            "eva_embeddings": np.asarray(conditions),
            "clip_targets": None if truth is None else np.asarray(truth),
            "generated_clip": samples[:, 0],
            "captions": [item["caption"] for item in items],
            "keys": [item["key"] for item in items],
            "generation_metrics": metrics,
        }
        Path(save_pickle).write_bytes(pickle.dumps(results, protocol=4))
        print(f"wrote {save_pickle}")
    if plot:
        from plot import draw_samples

        picture = Path(out_dir) / "samples.png"
        draw_samples(picture, conditions, truth, samples, (H, W), loaded.stats, folder)
        print(f"wrote {picture}")


def evaluate(loaded, data, conditions, truth, out):
    """Score the draws (B, draws, T, D), print a table beside the baselines, write metrics.json."""
    to_cond, to_target = (
        score.standardizer(loaded.stats[f"{n}_mean"], loaded.stats[f"{n}_std"]) for n in ("cond", "target")
    )
    samples, target = to_target(out), to_target(truth)
    ridge = score.Ridge(data["train_cond"], data["train_target"], to_cond, to_target)
    result = score.report(samples[:, 0], target, ridge(conditions))
    rows = {"generated": result}
    if out.shape[1] > 1:
        result["mean_of_draws"] = {"draws": out.shape[1], **score.metrics(samples.mean(1), target)}
        rows[f"mean of {out.shape[1]}"] = result["mean_of_draws"]
    print(score.table(rows | result["baselines"]))
    (Path(out_dir) / "metrics.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
