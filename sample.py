"""
Generate embeddings from a checkpoint, score them, save them.

    python sample.py --out_dir=out-digits --plot=True            # the validation split, with metrics
    python sample.py --out_dir=out --cond=conditions.npy --save=generated.npy
    torchrun --nproc_per_node=8 sample.py --out_dir=out --guidance=2.0 --guidance_interval=0.1,0.8
    python sample.py --out_dir=out --interpolate=3,8 --plot=True
    python sample.py --help

or from Python:

    import numpy as np, sample
    loaded = sample.load("out-digits")
    target = sample.generate(loaded, np.load("conditions.npy"), steps=20)    # (B, S, C) -> (B, T, D)
"""

import json
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import flow
import score
from checkpoint import Output, read_checkpoint, replace_file, unreadable, weights_by_block
from configurator import configure
from flow import FlowConfig, Normalizer
from loader import open_dataset
from model import NextDiT, NextDiTConfig
from parallel import pick_device
from sources import no_items, read_conditions, read_items
from unpickle import drop_pages

# ---- I/O
out_dir = "out"  # where train.py wrote, or a folder of diffusers' LuminaNextDiT2DModel
checkpoint = "ckpt_best.pt"  # in out_dir
weights = "ema"  # ema | model (the raw ones)
cond = ""  # .npy (B, S, C), .pkl or .pt of conditions; empty: those of the dataset
cond_key = "eva_blip3o_embeddings"  # in a .pkl or .pt
data_dir = ""  # dataset to read conditions and truth from; empty: the one trained on
split = "val"  # val | train
subset_size: int | None = None  # the first so many conditions only
save = ""  # .npy to write (B, T, D); empty: generated.npy, or interpolation.npy, in out_dir
save_draws = False  # keep all draws (B, draws, T, D), as *_draws.npy
save_pickle = ""  # .pkl with conditions, truth, generated, captions, keys and metrics
plot = False  # draw conditions, truth and samples into out_dir/samples.png (or interpolation.png)
# ---- sampling
steps = 10  # of the solver
method = "ab2"  # evaluations a step: ab2, ab3 (and one more) 1 | euler 1 | midpoint, heun 2 | rk4 4
shift = 1.0  # > 1: finer steps near noise
guidance = 1.0  # classifier-free guidance; 1: none
guidance_interval = "0,1"  # from this t (noise is 0) to that (data is 1)
draws: int | None = (
    None  # samples of each condition, the first is saved; None: 4 where there is truth to score, else 1
)
trajectory = False  # also write the states of the first draw at all times (B, steps + 1, T, D), as *_trajectory.npy
interpolate = ""  # i,j or i,j,n: instead, n (8) samples on the way from condition i to condition j, of one noise
batch_size = 32  # conditions at a time; larger for a small model on a GPU
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
    are data_dir, cond_tokens and config), path, data_dir, cond_tokens, config (the run's), iter, device, dtype.
    Raises ValueError with one line on what is wrong.
    """
    path, device = Path(path), pick_device(device)
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} is unknown; it is one of ema, model")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"dtype={dtype!r} is unknown; it is one of auto, float32, bfloat16, float16"
        )

    if (
        device == "cpu"
    ):  # a large piece that is freed teaches glibc to keep memory, not to fetch it anew at every step
        torch.empty(33_000_000, dtype=torch.uint8)

    def cast(
        p,
    ):  # what is left as it is stays a view of the map, and keeps all that was read of it in memory
        return p.to(
            device, getattr(torch, dtype) if p.dim() > 1 else torch.float32, copy=dtype != "float32"
        )

    if path.is_dir() and not (path / "ckpt_best.pt").exists() and any(path.glob("*.safetensors")):
        model = NextDiT.from_diffusers(path, grid, cast)
        ckpt, flow_config = (
            {"stats": None, "config": None, "iter": 0, "cond_tokens": None},
            FlowConfig(),
        )
        means = {
            "cond": torch.zeros(model.config.cond_dim),
            "target": torch.zeros(model.config.target_dim),
        }
        normalizers = {
            name: Normalizer("none", mean, mean + 1, device) for name, mean in means.items()
        }
    else:
        path = path / "ckpt_best.pt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"no checkpoint {path}; train one with: python train.py --out_dir={path.parent}"
            )
        ckpt = read_checkpoint(path)
        try:
            with torch.device("meta"):  # no parameters before those of the file
                model = NextDiT(
                    NextDiTConfig(**ckpt["model_args"] | {"gradient_checkpointing": False})
                )
            state = {
                name: cast(p)
                for block in weights_by_block(path, weights)
                for name, p in block.items()
            }
            model.load_state_dict(state, assign=True)
            flow_config = FlowConfig(**ckpt["flow"])
            normalizers = {
                name: Normalizer(
                    ckpt["normalize"],
                    ckpt["stats"][f"{name}_mean"],
                    ckpt["stats"][f"{name}_std"],
                    device,
                )
                for name in ("cond", "target")
            }
            ckpt = {name: ckpt[name] for name in ("stats", "config", "iter", "cond_tokens")}
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise ValueError(unreadable(path, e)) from e
    return SimpleNamespace(
        model=model.eval().requires_grad_(False), flow=flow_config, **normalizers, **ckpt,
        path=path, data_dir=ckpt["config"] and ckpt["config"]["data_dir"], device=device, dtype=dtype,
    )  # fmt: skip


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
):  # fmt: skip
    """Generate target embeddings for raw conditions.

    loaded: from load(); cond: (B, S, C) array or tensor, raw (not normalized)
    steps, method, shift: of the solver, see flow.integrate
    guidance, guidance_interval: classifier-free guidance scale, 1 is none, and from which t to which it acts
    seed, draw, first: sample i starts from noise that is a function of (seed, first + i, draw)
        alone, so neither the batch size nor the number of conditions changes a sample
    same_noise: all start from that of (seed, first, draw)
    trajectory: return the states at every step, noise first, instead of the last alone
    batch_size: how many conditions at a time
    Returns raw targets (B, T, D), float32 on the CPU; with trajectory (steps + 1, B, T, D).
    Raises ValueError where cond is not finite or not of the model's shape, or a setting is unknown.
    """
    model, T = loaded.model, loaded.model.config.grid[0] * loaded.model.config.grid[1]
    cond = as_tensor(cond)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    tokens = loaded.cond_tokens or (*cond.shape, 0, 0)[1]  # a diffusers model does not say how many
    if cond.dim() != 3 or 0 in cond.shape or cond.shape[1:] != (tokens, model.config.cond_dim):
        expected = f"(B, {loaded.cond_tokens or 'any'}, {model.config.cond_dim})"
        raise ValueError(
            f"conditions have shape {tuple(cond.shape)}; this model was trained on {expected}"
        )
    if len(cond) > batch_size:
        shared = (steps, method, shift, guidance, guidance_interval, seed, draw)
        firsts = [first if same_noise else first + i for i in range(0, len(cond), batch_size)]
        parts = zip(cond.split(batch_size), firsts)
        return torch.cat(
            [generate(loaded, c, *shared, i, same_noise, trajectory, batch_size) for c, i in parts],
            -3,
        )
    if not cond.isfinite().all():
        bad = (~cond.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"NaN or Inf in {len(bad)} of {len(cond)} conditions, the first is number {first + bad[0]}"
        )
    rows = [first] * len(cond) if same_noise else range(first, first + len(cond))
    x = loaded.flow.sigma_max * flow.sample_noise(
        rows, (T, model.config.target_dim), seed, draw
    ).to(loaded.device)
    half = loaded.dtype != "float32"
    with torch.autocast(
        torch.device(loaded.device).type, getattr(torch, loaded.dtype), enabled=half
    ):
        cond = loaded.cond.encode(cond.to(loaded.device))
        velocity = flow.guided_velocity(model, cond, loaded.flow, guidance, guidance_interval)
        states = flow.integrate(velocity, x, steps, method, shift, trajectory=trajectory)
    states = loaded.target.decode(states).cpu()
    if not states.isfinite().all():
        raise ValueError(
            f"the samples are not finite, with guidance={guidance} and conditions up to {cond.abs().max():g}"
        )
    return states


def interpolate_embeddings(loaded, cond_a, cond_b, n=8, **settings):
    """Targets (n, T, D) for n conditions on the line from cond_a (S, C) to cond_b, all from the same noise.
    `settings` are generate()'s."""
    return generate(loaded, line(cond_a, cond_b, n), same_noise=True, **settings)


def as_tensor(x):
    """An array or tensor of any real type as a float32 tensor on the CPU."""
    with np.errstate(over="ignore"):  # what is too large is Inf, and refused
        return (
            x.detach().cpu().float().contiguous()
            if torch.is_tensor(x)
            else torch.from_numpy(np.array(x, np.float32, order="C"))
        )


def line(a, b, n):
    a, b = as_tensor(a), as_tensor(b)
    if a.shape != b.shape or a.dim() != 2 or n < 2:
        raise ValueError(
            f"no line of {n} from {tuple(a.shape)} to {tuple(b.shape)}: two conditions (S, C), n at least 2"
        )
    return torch.lerp(a, b, torch.linspace(0, 1, n)[:, None, None])  # (n, S, C)


def numbers(text, kind, what):
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError as e:
        raise ValueError(
            f"{what}={text!r}: {kind.__name__} numbers with commas between them"
        ) from e


def main():
    config = configure(globals())
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        print(" ".join(f"{k}={v}" for k, v in config.items()))
    code = 0
    try:
        run(config, rank, world_size)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        code = 130
    if world_size > 1:
        from parallel import exit_process

        exit_process(code)
    sys.exit(code)


def run(config, rank, world_size):
    torch.set_float32_matmul_precision("medium")  # as in train.py
    master, place, wait = rank == 0, pick_device(device), lambda: None
    if world_size > 1:
        from torch.distributed import barrier as wait

        from parallel import init_distributed

        place = init_distributed(
            place, timeout=7 * 24 * 60
        )  # nobody waits for another before the end
    data = open_dataset(data_dir) if data_dir else None
    path = (
        Path(out_dir) if checkpoint == "ckpt_best.pt" else Path(out_dir) / checkpoint
    )  # or a diffusers model
    loaded = load(path, place, weights, dtype, data and tuple(data["meta"]["grid"]))
    folder = data_dir or loaded.data_dir
    if loaded.stats is None:  # a diffusers model has none
        loaded.stats = data and data["stats"]
    if plot and loaded.stats is None:
        raise ValueError(
            f"{out_dir} holds no statistics for the picture's colours: add --data_dir=DIR"
        )
    target = Path(save or Path(out_dir) / ("interpolation.npy" if interpolate else "generated.npy"))
    if target.suffix != ".npy":
        raise ValueError(f"save={save!r} must end in .npy")
    for path in (target, Path(save_pickle)):
        if not path.parent.is_dir() or save_pickle and Path(save_pickle).is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    if cond:
        (conditions, get_items), truth = read_conditions(cond, cond_key), None
    elif folder is None:
        raise ValueError(
            f"{out_dir} says of no dataset: add --cond=FILE.npy, or --data_dir=DIR for its conditions"
        )
    elif split in ("val", "train"):
        data = data or open_dataset(folder)
        conditions, truth = data[f"{split}_cond"], data[f"{split}_target"]
        get_items = partial(read_items, Path(folder) / f"{split}_items.jsonl")
    else:
        raise ValueError(f"split={split!r} is unknown; it is one of val, train")
    shape = (
        loaded.model.config.grid[0] * loaded.model.config.grid[1],
        loaded.model.config.target_dim,
    )
    if truth is not None and truth.shape[1:] != shape:
        raise ValueError(
            f"{folder} has targets of shape {truth.shape[1:]}; the model makes {shape}"
        )
    origin = None  # number of the sample whose noise all have
    if interpolate:
        given = numbers(interpolate, int, "interpolate")
        origin, end, count = (*given, 8)[:3] if len(given) in (2, 3) else (-1, -1, 0)
        if not (0 <= min(origin, end) <= max(origin, end) < len(conditions) and count > 1):
            raise ValueError(
                f"interpolate={interpolate!r}: i,j or i,j,n of {len(conditions)} conditions, n above 1"
            )
        conditions = line(*(conditions[i : i + 1][0] for i in (origin, end)), count).numpy()
        truth, get_items = None, partial(no_items, count)
    n = len(conditions) if subset_size is None or interpolate else min(subset_size, len(conditions))
    n_draws = draws if draws is not None else 1 if truth is None else 4
    n_several = (
        n if draws is not None or save_draws else min(n, score.LIMIT)
    )  # of which there are several draws
    if n < 1 or n_draws < 1 or batch_size < 1:
        raise ValueError(
            f"nothing to generate: {n} conditions, draws={draws}, batch_size={batch_size}"
        )
    settings = dict(
        steps=steps, method=method, shift=shift, guidance=guidance, seed=seed, batch_size=batch_size
    )
    settings["same_noise"] = bool(interpolate)
    settings["guidance_interval"] = numbers(guidance_interval, float, "guidance_interval")
    # one sample in one step: what is wrong shows before a file is made
    generate(loaded, conditions[:1], **settings | {"steps": min(steps, 1)})
    named = get_items()[:n] if save_pickle else None

    draws_file, states_file = (
        target.with_name(f"{target.stem}_{name}.npy") for name in ("draws", "trajectory")
    )
    files = {target: (n, *shape)} | ({states_file: (n, steps + 1, *shape)} if trajectory else {})
    files |= {draws_file: (n_several, n_draws, *shape)} if n_draws > 1 or save_draws else {}
    read = [Path(cond)] if cond else sorted(Path(folder).glob("*.npy"))
    for path in (*files, Path(save_pickle)):
        if (
            path.is_file()
            and any(path.samefile(other) for other in read)
            or Path(save_pickle) == target
        ):
            raise ValueError(f"{path} is read, or written twice: save to another file")
    decisive = {
        k: v
        for k, v in config.items()
        if k not in ("plot", "save_pickle", "save_draws", "device", "dtype")
    }
    decisive |= {
        "files": {str(path): shape for path, shape in files.items()},
        "arithmetic": [place[:4], loaded.dtype],
    }
    read += sorted(loaded.path.glob("*.safetensors")) or [loaded.path]
    decisive["read"] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in read]
    batches, stale = (
        -(-n // batch_size),
        [path for path in (draws_file, states_file) if path not in files],
    )
    output = Output(files, stale, batches, decisive, master, wait)
    if master and len(output.due) < batches:
        print(f"{batches - len(output.due)} of {batches} batches were there")
    calls, clock = [], time.perf_counter()
    loaded.model.register_forward_hook(lambda *call: calls.append(1))
    due, made = output.due[rank::world_size], 0
    with (
        tqdm(total=len(due), unit="batch", disable=not master) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        written = None  # the batch before, while the device is busy with this one
        for batch in due:
            first = batch * batch_size
            rows = np.array(conditions[first : min(first + batch_size, n)])
            drop_pages(conditions)
            samples = []
            for draw in range(n_draws if first < n_several else 1):
                where = dict(draw=draw, first=origin if interpolate else first)
                samples.append(
                    generate(
                        loaded, rows, **settings, **where, trajectory=trajectory and draw == 0
                    ).numpy()
                )
            arrays, made = {}, made + len(samples)
            if trajectory:
                arrays[states_file], samples[0] = samples[0].swapaxes(0, 1), samples[0][-1]
            arrays[target] = samples[0]
            if draws_file in files and first < n_several:
                arrays[draws_file] = np.stack(samples, 1)[: n_several - first]
            if written:
                written.result()
            written = writer.submit(output.write, batch, first, arrays)
            bar.update()
        if written:
            written.result()
    output.close()
    if not master:
        return
    if made:
        seconds, evaluations = time.perf_counter() - clock, len(calls) // made
        print(
            f"{n} conditions, {n_draws} draws, {evaluations} model evaluations a sample, {seconds:.1f} s"
        )
    generated = np.load(target, mmap_mode="r")
    samples = np.load(draws_file, mmap_mode="r") if draws_file in files else generated[:, None]
    metrics = rows = None
    if truth is not None:
        rows = score.baselines(data, split, min(len(samples), score.LIMIT))
        metrics, text = score.report(samples, data, split, rows=rows)
        print(text)
        record = json.dumps({"generated": str(target)} | metrics, indent=1)
        replace_file(Path(out_dir) / "metrics.json", lambda f: f.write(record.encode()))
    elif target == Path(out_dir) / "generated.npy":
        (Path(out_dir) / "metrics.json").unlink(missing_ok=True)  # of the samples that were there
    if save_pickle:
        results = {
            "eva_embeddings": np.asarray(conditions[:n]),
            "clip_targets": None if truth is None else np.asarray(truth[:n]),
            "generated_clip": np.asarray(generated),
            "captions": [item["caption"] for item in named],
            "keys": [item["key"] for item in named],
            "generation_metrics": metrics,
        }
        replace_file(save_pickle, lambda f: pickle.dump(results, f, protocol=5))
        print(f"wrote {save_pickle}")
    if plot:
        from plot import draw_samples

        picture = (
            target.with_suffix(".png") if save or interpolate else Path(out_dir) / "samples.png"
        )
        shown = (
            np.linspace(0, n - 1, min(n, 12)).astype(int) if interpolate else None
        )  # from end to end
        some = conditions if interpolate else conditions[:256]
        draw_samples(
            picture,
            some,
            truth,
            samples,
            loaded.model.config.grid,
            loaded.stats,
            folder,
            rows,
            shown,
        )
        print(f"wrote {picture}")
    transient = [draws_file] if draws_file in files and not save_draws else []
    output.finish(transient)
    for path in files.keys() - set(transient):
        print(f"wrote {path} {files[path]}")


if __name__ == "__main__":
    main()
