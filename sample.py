"""
Generate embeddings from a checkpoint, save them, score them.

    python sample.py --out_dir=out-digits --plot=True        # the validation split, with metrics
    python sample.py --out_dir=out --cond=conditions.npy --save=generated.npy
    torchrun --nproc_per_node=8 sample.py --out_dir=out --guidance=2.0 --guidance_interval=0.1,0.8
    python sample.py --out_dir=out --interpolate=3,8 --plot=True
    python sample.py --help

A run that is interrupted goes on where it was when the same command comes again, on as many
processes. With other settings, weights, conditions or code it starts anew.

From Python:

    import numpy as np, sample
    loaded = sample.load("out-digits")
    target = sample.generate(loaded, np.load("conditions.npy"), steps=20)  # (B, S, C) -> (B, T, D)
"""

import json
import os
import pickle
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import flow
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig
from plumbing import exchange
from plumbing.checkpoint import (
    Output,
    hash_files,
    read_checkpoint,
    read_weights,
    replace_file,
    unreadable,
)
from plumbing.configurator import configure, describe, user_errors_in_one_line
from plumbing.dataset import open_dataset
from plumbing.distributed import (
    all_reduce_sum,
    exit_process,
    init_distributed,
    pick_device,
    pick_dtype,
    print0,
)
from plumbing.sources import no_items, read_conditions, read_items
from plumbing.unpickle import drop_pages
from report import score

# ---- input
out_dir = "out"  # the folder of a run, or of a diffusers LuminaNextDiT2DModel
checkpoint = "ckpt_best.pt"  # in out_dir
weights = "ema"  # ema | model (the raw ones)
cond = ""  # .npy (B, S, C), .pkl or .pt of conditions; empty: those of the dataset
cond_key = "eva_blip3o_embeddings"  # their key in a .pkl or .pt
data_dir = ""  # dataset with conditions and truth; empty: the one that the model was trained on
split = "val"  # val | train
subset_size: int | None = None  # the first so many conditions only
# ---- output (of a part of the data, names end in _train, _first{subset_size} or both)
save = ""  # .npy to write (B, T, D); empty: generated.npy, or interpolation.npy, in out_dir
save_draws = False  # keep all draws (B, draws, T, D), as *_draws.npy
save_pickle = ""  # .pkl with conditions, truth, samples, captions, keys and metrics
plot = False  # draw samples.png in out_dir; with --save or --interpolate, a .png beside the .npy
# ---- sampling
steps = 10  # of the solver
method = "ab2"  # euler | heun (two evaluations of the model per step) | ab2 (one, as accurate)
shift = 1.0  # above 1: finer steps near noise
guidance = 1.0  # scale of classifier-free guidance; 1: none
guidance_interval = "0,1"  # guide from this t to that (t = 0 is noise, t = 1 is data)
draws: int | None = None  # per condition; the first is saved. None: 4 where they are scored, else 1
trajectory = False  # also save all states of the first draw (B, steps + 1, T, D), *_trajectory.npy
interpolate = ""  # i,j or i,j,n: instead, n (8) samples from condition i to j, from the same noise
batch_size = 32  # conditions at a time; larger for a small model on a GPU
seed = 0
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # auto (bfloat16 on cuda, else float32) | float32 | bfloat16 | float16
# ----


def build(sizes, state):
    """The model of these sizes whose parameters are the tensors in `state`, not copies of them."""
    with torch.device("meta"):  # allocates nothing
        model = NextDiT(NextDiTConfig(**sizes))
    model.load_state_dict(state, assign=True)
    return model


def describe_diffusers(config):
    """What a checkpoint would say of a diffusers model, which takes embeddings as they are."""
    stats = {}
    for name, channels in (("cond", config.cond_dim), ("target", config.target_dim)):
        stats[f"{name}_mean"] = torch.zeros(channels)
        stats[f"{name}_std"] = torch.ones(channels)
    known = {"stats": stats, "normalize": "none", "flow": {}, "config": {"data_dir": None}}
    return known | {"cond_tokens": None, "iter": 0}


def load(path, device="auto", weights="ema", dtype="auto", grid=None):
    """A trained model, ready to sample.

    path: a checkpoint, the folder of a run (for its ckpt_best.pt), or a folder of diffusers'
        LuminaNextDiT2DModel, which takes embeddings as they are (normalize none)
    weights: "ema" or "model", the raw ones
    dtype: of the arithmetic (torch.autocast) and so of the matrices, which are converted one by one
        from a memory map; auto, float32, bfloat16 or float16. Norms, biases and states are float32.
    grid: (H, W) of a diffusers model; by default square
    Returns a namespace: model, flow (FlowConfig), cond and target (Normalizer), stats, config (the
    run's), data_dir and cond_tokens (None for a diffusers model), iter, path, device, dtype.
    Raises ValueError with one line on what is wrong.
    """
    path = Path(path)
    device = pick_device(device)
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} is unknown; it is one of ema, model")
    dtype = pick_dtype(dtype, device)

    def cast(parameter):
        kind = getattr(torch, dtype) if parameter.dim() > 1 else torch.float32
        # what is not copied stays a view of the file and keeps all that was read of it in memory
        return parameter.to(device, kind, copy=dtype != "float32")

    if device == "cpu":
        # Once it has freed a large block, glibc keeps memory for reuse instead of mapping it anew
        # for every tensor, which took a quarter of the time of the demo's samples.
        torch.empty(33_000_000, dtype=torch.uint8)

    best = path / "ckpt_best.pt"
    try:
        if not best.exists() and any(path.glob("*.safetensors")):
            model = build(*exchange.from_diffusers(path, grid, cast))
            ckpt = describe_diffusers(model.config)
        else:
            path = best if path.is_dir() else path
            if not path.is_file():
                advice = f"train one with: python train.py --out_dir={path.parent}"
                raise ValueError(f"no checkpoint {path}; {advice}")
            ckpt = read_checkpoint(path)
            state = {}
            for block in read_weights(path, weights):
                state |= {name: cast(parameter) for name, parameter in block.items()}
            model = build(ckpt["model_args"] | {"gradient_checkpointing": False}, state)
        stats = ckpt["stats"]
        cond, target = (
            Normalizer(ckpt["normalize"], stats[f"{name}_mean"], stats[f"{name}_std"], device)
            for name in ("cond", "target")
        )
        return SimpleNamespace(
            model=model.eval().requires_grad_(False),
            flow=FlowConfig(**ckpt["flow"]),
            cond=cond,
            target=target,
            stats=stats,
            config=ckpt["config"],
            data_dir=ckpt["config"]["data_dir"],
            cond_tokens=ckpt["cond_tokens"],
            iter=ckpt["iter"],
            path=path,
            device=device,
            dtype=dtype,
        )
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(unreadable(path, e)) from e


@torch.no_grad()
def generate(
    loaded,
    cond,
    steps=10,
    method="ab2",
    shift=1.0,
    guidance=1.0,
    guidance_interval=(0.0, 1.0),
    seed=0,
    draw=0,
    first=0,
    same_noise=False,
    trajectory=False,
    batch_size=32,
):
    """Generate target embeddings for raw conditions.

    loaded: from load(); cond: (B, S, C) array or tensor, raw (not normalized)
    steps, method, shift: of the solver, see flow.integrate
    guidance, guidance_interval: scale of classifier-free guidance, 1 is none, and from which t to
        which it acts
    seed, draw, first: sample i starts from noise that is a function of (seed, first + i, draw)
        alone, so neither the batch size nor the number of conditions changes a sample
    same_noise: all start from the noise of (seed, first, draw)
    trajectory: return the states at every step, noise first, instead of the last alone
    batch_size: how many conditions at a time
    Returns raw targets (B, T, D), float32 on the CPU; with trajectory (steps + 1, B, T, D).
    Raises ValueError where cond is not finite or not of the model's shape, or a setting is unknown.
    """
    config = loaded.model.config
    cond = as_tensor(cond)
    tokens = loaded.cond_tokens or "any"
    fits = cond.dim() == 3 and cond.shape[2] == config.cond_dim and 0 not in cond.shape
    if not fits or tokens not in ("any", cond.shape[1]):
        expected = f"this model was trained on (B, {tokens}, {config.cond_dim})"
        raise ValueError(f"conditions have shape {tuple(cond.shape)}; {expected}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    bad = [i for i, c in enumerate(cond, first) if not c.isfinite().all()]
    if bad:
        which = f"{len(bad)} of {len(cond)} conditions, the first is number {bad[0]}"
        raise ValueError(f"NaN or Inf in {which}")

    shape = (config.grid[0] * config.grid[1], config.target_dim)  # (T, D)
    precision = torch.autocast(
        loaded.device.split(":")[0], getattr(torch, loaded.dtype), loaded.dtype != "float32"
    )
    results = []
    for i in range(0, len(cond), batch_size):
        c = cond[i : i + batch_size].to(loaded.device)
        numbers = range(first + i, first + i + len(c))
        if same_noise:
            numbers = [first] * len(c)
        x = flow.sample_noise(numbers, shape, seed, draw).to(loaded.device)  # (B, T, D)
        with precision:
            c = loaded.cond.encode(c)
            velocity = flow.guided_velocity(
                loaded.model, c, loaded.flow, guidance, guidance_interval
            )
            x = loaded.flow.sigma_max * x
            x = flow.integrate(velocity, x, steps, method, shift, trajectory)
        x = loaded.target.decode(x).cpu()  # (B, T, D), or (steps + 1, B, T, D)
        if not x.isfinite().all():
            cause = f"guidance={guidance} and conditions up to {c.abs().max():g}"
            raise ValueError(f"the samples are not finite, with {cause}")
        results.append(x)
    return torch.cat(results, -3)


def interpolate_embeddings(loaded, cond_a, cond_b, n=8, **settings):
    """Targets (n, T, D) for n conditions on the line from cond_a (S, C) to cond_b, all from the
    same noise. `settings` are those of generate()."""
    return generate(loaded, line(cond_a, cond_b, n), same_noise=True, **settings)


def as_tensor(x):
    """An array or tensor of any real type as a float32 tensor on the CPU."""
    if not torch.is_tensor(x):
        with np.errstate(over="ignore"):  # what is too large becomes Inf, which is refused
            x = torch.from_numpy(np.array(x, np.float32, order="C"))
    return x.detach().cpu().float().contiguous()


def line(a, b, n):
    """n conditions (n, S, C) from a (S, C) to b (S, C)."""
    a, b = as_tensor(a), as_tensor(b)
    if a.shape != b.shape or a.dim() != 2 or n < 2:
        ends = f"from {tuple(a.shape)} to {tuple(b.shape)}"
        raise ValueError(f"no line of {n} {ends}: two conditions (S, C), n at least 2")
    return torch.lerp(a, b, torch.linspace(0, 1, n)[:, None, None])


def read_numbers(setting, kind):
    """The numbers in a setting that is a text."""
    text = globals()[setting]
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError as e:
        expected = f"{kind.__name__} numbers with commas between them"
        raise ValueError(f"{setting}={text!r}: {expected}") from e


# ---- the script


def main():
    user_errors_in_one_line()
    config = configure(globals())
    print0(describe(config, __file__))
    try:
        run(config)
    except KeyboardInterrupt:
        exit_process("interrupted: the same command goes on from here")
    exit_process()


def run(config):
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_float32_matmul_precision("medium")  # as in train.py
    place = pick_device(device)
    if world_size > 1:
        place = init_distributed(place, 7 * 24 * 60)  # nobody waits for another before the end

    # ---- model
    data = open_dataset(data_dir) if data_dir else None
    path = Path(out_dir) if checkpoint == "ckpt_best.pt" else Path(out_dir, checkpoint)
    loaded = load(path, place, weights, dtype, tuple(data["meta"]["grid"]) if data else None)
    sizes = loaded.model.config
    shape = (sizes.grid[0] * sizes.grid[1], sizes.target_dim)  # (T, D)

    # ---- conditions and truth
    folder = data_dir or loaded.data_dir
    truth = None
    suffix = ""  # of the files' names
    if cond:
        conditions, get_items = read_conditions(cond, cond_key)
    else:
        if folder is None:
            advice = "add --cond=FILE.npy, or --data_dir=DIR for its conditions"
            raise ValueError(f"{out_dir} names no dataset: {advice}")
        data = data or open_dataset(folder)
        if split not in ("val", "train"):
            raise ValueError(f"split={split!r} is unknown; it is one of val, train")
        conditions = data[f"{split}_cond"]
        truth = data[f"{split}_target"]
        get_items = partial(read_items, Path(folder, f"{split}_items.jsonl"))
        if truth.shape[1:] != shape:
            targets = f"{folder} has targets of shape {truth.shape[1:]}"
            raise ValueError(f"{targets}; the model makes {shape}")
        if split == "train":
            suffix = "_train"
    n = len(conditions)
    if subset_size is not None:
        n = min(n, subset_size)
        suffix += f"_first{subset_size}"
    origin = None  # the condition whose noise all share
    if interpolate:
        ends = read_numbers("interpolate", int)
        if len(ends) not in (2, 3) or min(ends) < 0 or max(ends[:2]) >= n:
            raise ValueError(f"interpolate={interpolate!r}: i,j or i,j,n of {n} conditions")
        origin, end, n = (*ends, 8)[:3]
        first, last = (np.array(conditions[i : i + 1])[0] for i in (origin, end))
        conditions = line(first, last, n).numpy()
        truth = None
        get_items = partial(no_items, n)
    n_draws = draws
    n_several = n  # so many conditions have n_draws draws, the others one
    if draws is None:
        n_draws = 1 if truth is None else 4
        if not save_draws:
            n_several = min(n, score.LIMIT)
    if min(n, n_draws, batch_size) < 1:
        counts = f"{n} conditions, draws={n_draws}, batch_size={batch_size}"
        raise ValueError(f"nothing to generate: {counts}")

    # ---- settings; one sample in one step shows what is wrong with them before a file is made
    names = ("steps", "method", "shift", "guidance", "seed", "trajectory", "batch_size")
    settings = {name: config[name] for name in names}
    settings["guidance_interval"] = read_numbers("guidance_interval", float)
    settings["same_noise"] = bool(interpolate)
    generate(loaded, conditions[:1], **settings | {"steps": min(steps, 1)})

    # ---- files
    name = "interpolation" if interpolate else "generated"
    target = Path(save or Path(out_dir, f"{name}{suffix}.npy"))
    if target.suffix != ".npy":
        raise ValueError(f"save={save!r} must end in .npy")
    metrics_path = Path(out_dir, f"metrics{suffix}.json")
    picture_path = target.with_suffix(".png")
    if not save and not interpolate:
        picture_path = Path(out_dir, f"samples{suffix}.png")
    draws_path, states_path = (
        target.with_name(f"{target.stem}_{name}.npy") for name in ("draws", "trajectory")
    )
    files = {target: (n, *shape)}
    if trajectory:
        files[states_path] = (n, steps + 1, *shape)
    if n_draws > 1 or save_draws:
        files[draws_path] = (n_several, n_draws, *shape)
    kept = [path for path in files if path != draws_path or save_draws]
    read = [Path(cond)] if cond else sorted(Path(folder).glob("*.npy"))
    read += sorted(loaded.path.glob("*.safetensors")) or [loaded.path]
    paths = [path.resolve() for path in (*files, Path(save_pickle), *read)]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is read, or written twice: save to another file")
    sources = [Path(__file__).with_name(name) for name in ("model.py", "flow.py", "sample.py")]
    made_with = {
        "settings": {k: v for k, v in config.items() if k not in ("plot", "save_pickle")},
        "arithmetic": [place[:4], loaded.dtype],
        "read": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in read],
        "code": hash_files(sources),
    }
    barrier = partial(all_reduce_sum, torch.zeros(1, device=place))
    output = Output(files, made_with, rank, world_size, barrier)

    # ---- samples
    batches = range(rank, -(-n // batch_size), world_size)  # those of this process
    if rank == 0 and output.done:
        print(f"{output.done} of {len(batches)} batches were there")
    start = time.perf_counter()
    for batch in tqdm(batches[output.done :], unit="batch", disable=rank > 0):
        first = batch * batch_size
        c = np.array(conditions[first : min(first + batch_size, n)])  # (B, S, C)
        drop_pages(conditions)  # what was read stays in the system's cache, not in this process
        number = origin if interpolate else first
        arrays = {}
        samples = []
        for draw in range(n_draws if first < n_several else 1):
            x = generate(loaded, c, **settings, draw=draw, first=number)
            if trajectory:
                if draw == 0:
                    arrays[states_path] = x.swapaxes(0, 1)  # (B, steps + 1, T, D)
                x = x[-1]
            samples.append(x)  # (B, T, D)
        arrays[target] = samples[0]
        if draws_path in files and first < n_several:
            arrays[draws_path] = torch.stack(samples, 1)[: n_several - first]  # (B, draws, T, D)
        output.write(first, arrays)
    output.publish(kept)
    if rank > 0:
        return
    print(f"{n} conditions, {n_draws} draws, {time.perf_counter() - start:.1f} s")

    # ---- report
    generated = np.load(target, mmap_mode="r")
    samples = generated[:, None]  # (N, draws, T, D)
    if draws_path in files:
        samples = np.load(output.locate(draws_path), mmap_mode="r")
    metrics = references = None
    if truth is not None:
        scored = samples[: score.LIMIT]
        references = score.baselines(data, split, len(scored))
        metrics, text = score.report(scored, data, split, references)
        print(text)
        record = json.dumps({"generated": str(target)} | metrics, indent=1).encode()
        replace_file(metrics_path, lambda f: f.write(record))
    elif not save and not interpolate:
        metrics_path.unlink(missing_ok=True)  # of the samples that had this name before
    if save_pickle:
        items = get_items()[:n]
        results = {
            "eva_embeddings": np.asarray(conditions[:n]),
            "clip_targets": None if truth is None else np.asarray(truth[:n]),
            "generated_clip": np.asarray(generated),
            "captions": [item["caption"] for item in items],
            "keys": [item["key"] for item in items],
            "generation_metrics": metrics,
        }
        replace_file(save_pickle, lambda f: pickle.dump(results, f, protocol=5))
        print(f"wrote {save_pickle}")
    if plot:
        from report.plot import draw_samples

        stats = data["stats"] if data else loaded.stats
        shown = conditions[: n if interpolate else min(n, 256)]
        draw_samples(picture_path, shown, truth, samples, sizes.grid, stats, folder, references)
        print(f"wrote {picture_path}")
    output.finish()
    for path in kept:
        print(f"wrote {path} {files[path]}")


if __name__ == "__main__":
    main()
