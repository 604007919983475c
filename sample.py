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
from configurator import configure
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig, pick_device
from prepare import open_dataset
from sources import get_rows, items, load_pickle

# ---- I/O
out_dir = "out"  # where train.py wrote
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
dtype = "auto"  # auto (bfloat16 on cuda, else float32) | float32 | bfloat16 | float16
# ----


def load(path, device="auto", weights="ema"):
    """A trained model, ready to sample.

    path: a checkpoint, or the folder of a run (then its ckpt_best.pt)
    weights: 'ema' or 'model', the raw ones
    Returns a namespace: model, flow (FlowConfig), cond and target (Normalizer), stats, cond_tokens,
    data_dir, config (the run's), iter, device. Raises ValueError with one line on what is wrong.
    """
    path, device = Path(path), pick_device(device)
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} is unknown; it is one of ema, model")
    if path.is_dir():
        path = path / "ckpt_best.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; train one with: python train.py --out_dir={path.parent}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model = NextDiT(NextDiTConfig(**ckpt["model_args"]))
        model.load_state_dict(ckpt[weights])
        stats, flow_config = ckpt["stats"], FlowConfig(**ckpt["flow"])
        cond, target = (
            Normalizer(ckpt["normalize"], stats[f"{n}_mean"], stats[f"{n}_std"], device) for n in ("cond", "target")
        )
        keep = {name: ckpt[name] for name in ("config", "iter", "cond_tokens")}
    except Exception as e:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(e).__name__}: {str(e).splitlines()[0]}") from e
    model.config.gradient_checkpointing = False
    model = model.to(device).eval().requires_grad_(False)
    data_dir = keep["config"]["data_dir"]
    return SimpleNamespace(
        model=model, flow=flow_config, cond=cond, target=target, stats=stats, data_dir=data_dir, device=device, **keep
    )


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
    dtype="auto",
    trajectory=False,
):
    """Generate target embeddings for raw conditions.

    loaded: from load(); cond: (B, S, C) array or tensor, raw (not normalized)
    steps, method, shift: of the solver, see flow.integrate
    guidance: classifier-free guidance scale; 1 is none
    seed, draw, first: sample i starts from noise that is a function of (seed, first + i, draw)
        alone, so neither the batch size nor the number of conditions changes a sample
    dtype: of the model's arithmetic; the state is float32
    trajectory: return the states at every step, noise first, instead of the last alone
    Returns raw targets (B, T, D), float32 on the CPU; with trajectory (steps + 1, B, T, D).
    Raises ValueError where cond is not finite or not of the model's shape, or a setting is unknown.
    """
    model, T = loaded.model, loaded.model.config.grid[0] * loaded.model.config.grid[1]
    cond = torch.as_tensor(cond)
    if cond.dim() != 3 or cond.shape[2] != model.config.cond_dim or cond.shape[1] != loaded.cond_tokens:
        expected = f"(B, {loaded.cond_tokens}, {model.config.cond_dim})"
        raise ValueError(f"conditions have shape {tuple(cond.shape)}; this model was trained on {expected}")
    if not cond.isfinite().all():
        bad = (~cond.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"NaN or Inf in {len(bad)} of {len(cond)} conditions, the first is number {first + bad[0]}")
    if dtype == "auto":
        dtype = "bfloat16" if loaded.device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is unknown; it is one of auto, float32, bfloat16, float16")
    rows = range(first, first + len(cond))
    x = loaded.flow.sigma_max * flow.sample_noise(rows, (T, model.config.target_dim), seed, draw).to(loaded.device)
    with torch.autocast(torch.device(loaded.device).type, getattr(torch, dtype), enabled=dtype != "float32"):
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
    loaded = load(Path(out_dir) / checkpoint, device, weights)
    data, folder = None, data_dir or loaded.data_dir
    target = Path(save or Path(out_dir) / "generated.npy")
    if target.suffix != ".npy":
        raise ValueError(f"save={save!r} must end in .npy")
    for path in (target, Path(save_pickle)):
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    if cond:
        (conditions, items), truth = read_conditions(cond, cond_key), None
    elif split in ("val", "train"):
        data = open_dataset(folder)
        conditions, truth = data[f"{split}_cond"], data[f"{split}_target"]
        items = [json.loads(line) for line in (Path(folder) / f"{split}_items.jsonl").read_text().splitlines()]
    else:
        raise ValueError(f"split={split!r} is unknown; it is one of val, train")
    n = len(conditions) if subset_size is None else min(subset_size, len(conditions))
    if n < 1 or draws < 1 or batch_size < 1:
        raise ValueError(f"nothing to generate: {n} conditions, draws={draws}, batch_size={batch_size}")
    conditions, truth, items = conditions[:n], None if truth is None else truth[:n], items[:n]

    n_draws = draws if truth is not None or save_draws or plot else 1
    H, W = loaded.model.config.grid
    samples = np.empty((n, n_draws, H * W, loaded.model.config.target_dim), np.float32)
    start = time.perf_counter()
    with tqdm(total=n * n_draws, unit="sample") as bar:
        for first in range(0, n, batch_size):
            rows = slice(first, min(first + batch_size, n))
            batch = np.array(conditions[rows])
            for draw in range(n_draws):
                samples[rows, draw] = generate(loaded, batch, steps, method, guidance, seed, shift, draw, first, dtype)
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
