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

import fileinput
import json
import os
import pickle
import shutil
import sys
from itertools import islice, starmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import flow
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig
from plumbing import exchange
from plumbing.checkpoint import load_weights, replace_file, same_statistics
from plumbing.configurator import check_numbers, configure, describe, set_up_console
from plumbing.dataset import made_ahead, open_dataset, split_arrays
from plumbing.distributed import (
    LAUNCHED,
    RANK,
    WORLD_SIZE,
    exit_process,
    init_distributed,
    pick_device,
    pick_dtype,
    print0,
)
from plumbing.output import Output
from plumbing.run_folder import ROOT
from plumbing.sources import Rows, items, load_pickle
from plumbing.unpickle import drop_pages
from report import score

# ---- input
out_dir = "out"  # the folder of a run, or of safetensors: of plumbing/exchange.py, of BLIP3-o
checkpoint = ""  # in out_dir; empty: ckpt_best.pt
weights = "ema"  # ema | model (the raw ones)
cond = ""  # .npy (B, S, C) or (B, C), .pkl, .pt or .safetensors; empty: those of the dataset
cond_key = "eva_blip3o_embeddings"  # their key in a file that is no .npy
data_dir = ""  # dataset with conditions and truth; empty: the one that the model was trained on
split = "val"  # val | train
subset_size: int | None = None  # the first so many conditions only
# ---- output (of a part of the data, names end in _train, _first{subset_size} or both)
save = ""  # .npy to write (B, T, D); empty: generated.npy, or interpolation.npy, in out_dir
save_draws = False  # keep all draws (B, draws, T, D), as *_draws.npy
save_pickle = ""  # .pkl with conditions, truth, samples, captions, keys, labels and metrics
plot = False  # draw samples.png in out_dir; with --save or --interpolate, a .png beside the .npy
# ---- sampling
steps = 10  # of the solver
method = "ab2"  # euler | heun (two evaluations of the model per step) | ab2 (one, as accurate)
shift = 1.0  # above 1: finer steps near noise
guidance = 1.0  # scale of classifier-free guidance; 1: none
guidance_interval = (0.0, 1.0)  # as 0.1,0.8: guide from this t to that (0: noise, 1: data)
draws: int | None = None  # per condition; the first is saved. None: 4 where they are scored, else 1
trajectory = False  # also save all states of the first draw (B, steps + 1, T, D), *_trajectory.npy
interpolate = ()  # i,j or i,j,n: instead, n (8) samples from condition i to j, from the same noise
batch_size: int | None = None  # conditions at a time; None: 128 on cuda, else 32
seed = 0
# ---- system
device = "auto"  # auto (cuda, else mps, else cpu) | cuda | cpu | mps | cuda:1
dtype = "auto"  # auto (bfloat16 on cuda, else float32) | float32 | bfloat16 | float16
compile: bool | None = None  # torch.compile; None: on cuda, for 5,000 samples or more
# ----


def load(path, device="auto", weights="ema", dtype="auto", grid=None):
    """A trained model, ready to sample.

    path: a checkpoint, the folder of a run (for its ckpt_best.pt), or a folder of safetensors, see
        plumbing/exchange.py. Models from elsewhere take embeddings as they are (normalize none).
    weights: of a checkpoint, "ema" or "model", the raw ones
    dtype: of the arithmetic (torch.autocast) and so of the matrices, which are converted one by one
        from a memory map; auto, float32, bfloat16 or float16. Norms, biases and states are float32.
    grid: (H, W) of a model from elsewhere; by default square
    Returns a namespace: model, shape (T, D) of a sample, flow (FlowConfig), cond and target
    (Normalizer), stats, data_dir and cond_tokens (None where unknown), files (of the weights),
    device, dtype, batch_size.
    Raises ValueError with one line on what is wrong.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)

    def cast(parameter):
        kind = getattr(torch, dtype) if parameter.dim() > 1 else torch.float32
        # what is not copied stays a view of the file and keeps all that was read of it in memory
        return parameter.to(device, kind, copy=dtype != "float32")

    # On a CPU, glibc keeps freed blocks up to the size of the largest one so far. Freeing one of
    # 33 MB here lets later tensors reuse memory: a quarter less time for the samples of the demo.
    torch.empty(8_250_000)

    ckpt, parameters = exchange.open_model(path, weights, grid)
    config = NextDiTConfig(**ckpt["model_args"])
    with torch.device("meta"):  # allocates nothing
        model = NextDiT(config)
    load_weights(model, parameters, cast)
    stats = ckpt["stats"] or {"cond_mean": 0, "cond_std": 1, "target_mean": 0, "target_std": 1}
    return SimpleNamespace(
        model=model.eval().requires_grad_(False),
        shape=(config.n_tokens, config.target_dim),
        flow=FlowConfig(**ckpt["flow"]),
        cond=Normalizer(ckpt["normalize"], stats["cond_mean"], stats["cond_std"], device),
        target=Normalizer(ckpt["normalize"], stats["target_mean"], stats["target_std"], device),
        stats=stats,
        data_dir=ckpt.get("data_path", ckpt["config"]["data_dir"]),
        data_stats=ckpt.get("data_stats", stats),
        data_meta=ckpt.get("data_meta"),
        cond_tokens=ckpt["cond_tokens"],
        files=ckpt["files"],
        device=device,
        dtype=dtype,
        batch_size=128 if "cuda" in device else 32,  # where none is asked for
    )


def generate(loaded, cond, steps=10, first=0, batch_size=None, draw=0, **settings):
    """Generate target embeddings for raw conditions.

    loaded: from load(); cond: (N, S, C) array or tensor, raw (not normalized)
    first: sample i starts from noise that is a function of (seed, first + i, draw) alone, so
        neither the batch size nor the number of conditions changes it
    same_noise: True, and all start from that of (seed, first, draw)
    batch_size: how many conditions at a time; None: 128 on cuda, else 32
    guidance, guidance_interval: see flow.guided_velocity
    steps, method, shift, trajectory: see flow.integrate
    Returns raw targets (N, T, D), float32 on the CPU; with trajectory (steps + 1, N, T, D).
    Raises ValueError where cond is not finite or not of the model's shape, or a setting is unknown.
    """
    size = batch_size or loaded.batch_size
    offset = 0 if settings.get("same_noise") else 1
    batches = ((cond[i : i + size], first + offset * i, draw) for i in range(0, len(cond), size))
    return torch.cat([*generate_batches(loaded, batches, steps, **settings)], -3)


@torch.no_grad()
def generate_batches(
    loaded, batches, steps, guidance=1.0, guidance_interval=(0.0, 1.0), seed=0,
    same_noise=False, **solver,
):  # fmt: skip
    """Yield what generate() returns, for an iterator of (cond, first, draw). While the device works
    on one batch, a thread reads the next and makes its noise."""
    autocast = torch.autocast(
        torch.device(loaded.device).type,
        getattr(torch, loaded.dtype),
        enabled=loaded.dtype != "float32",
    )

    def read(cond, first, draw):
        B, S, C = cond.shape
        expected = loaded.cond_tokens or S, loaded.model.config.cond_dim
        if (S, C) != expected:
            raise ValueError(
                f"conditions of shape {(S, C)}; this model takes {expected}: --data_dir=DATASET "
                "would apply the --drop_tokens, --pool or --channels_first that prepare.py had "
                "for it"
            )
        cond = score.as_tensor(cond)
        bad = (~cond.isfinite()).nonzero()  # (values, 3), in the order of the samples
        if len(bad):
            raise ValueError(f"NaN or Inf in condition number {first + bad[0, 0].item()}")
        indices = [first] * B if same_noise else range(first, first + B)
        return cond, flow.sample_noise(indices, loaded.shape, seed, draw)

    for cond, x_0 in made_ahead(starmap(read, batches)):
        x_0 = loaded.flow.sigma_max * x_0.to(loaded.device)  # (B, T, D)
        cond = loaded.cond.encode(cond)
        with autocast:
            velocity = flow.guided_velocity(
                loaded.model, cond, loaded.flow, guidance, guidance_interval
            )
            x = flow.integrate(velocity, x_0, steps, **solver)
        x = loaded.target.decode(x).cpu()  # (B, T, D) or (steps + 1, B, T, D)
        if not x.isfinite().all():
            raise ValueError(f"the samples are not finite: {guidance=}, {steps=}, {solver}")
        yield x


def interpolate_embeddings(loaded, cond_a, cond_b, n=8, **settings):
    """Targets (n, T, D) for n conditions on the line from cond_a (S, C) to cond_b, all from the
    same noise. `settings` are those of generate()."""
    return generate(loaded, line(cond_a, cond_b, n), same_noise=True, **settings)


def line(a, b, n):
    """n conditions (n, S, C) from a (S, C) to b (S, C)."""
    shares = torch.linspace(0, 1, n)[:, None, None]  # (n, 1, 1)
    return torch.lerp(score.as_tensor(a), score.as_tensor(b), shares)


# ---- the script


def read_conditions(path, key, meta=None):
    """The conditions in a file, Rows (N, S, C), and an iterator of {"key": ..., "caption": ...}.

    meta: a dataset's. What is not of its conditions' shape is prepared as they were.
    """
    content = load_pickle(path)
    if list(content) == ["array"]:  # a .npy
        key = "array"
    rows = Rows(content, key, path)
    if meta and rows.layout[:2] != meta["layout"]["cond"][:2]:
        rows = Rows(content, key, path, **meta["settings"] | {"dtype": "source"})
    return rows, items(content, len(rows), path)


def main():
    set_up_console()
    config = configure(globals())
    check_numbers(config, "subset_size draws steps shift batch_size", any_sign="guidance")
    print0(describe(config, __file__))
    torch.set_float32_matmul_precision("medium")  # as in train.py
    own_device = pick_device(device)
    if LAUNCHED:
        # minutes: the processes that are ready wait for the slowest at the end
        own_device = init_distributed(own_device, timeout=10_000)

    # ---- model, conditions and truth
    data = open_dataset(data_dir) if data_dir else None
    grid = data and data["meta"]["grid"]
    loaded = load(Path(out_dir, checkpoint), own_device, weights, dtype, grid)
    shape = loaded.shape  # (T, D)
    size = batch_size or loaded.batch_size
    folder = data_dir or loaded.data_dir
    suffix = "" if split == "val" else f"_{split}"  # of the files' names
    truth = None
    if cond:
        meta = data["meta"] if data else loaded.data_meta
        conditions, named = read_conditions(Path(cond), cond_key, meta)
        read = [cond]  # files; `named` are the items of the conditions, with keys and captions
    elif not folder:
        raise ValueError(f"{out_dir} names no dataset: add --cond=FILE.npy or --data_dir=DIR")
    else:
        data = data or open_dataset(folder)
        conditions, truth = split_arrays(data, split)
        if truth.shape[1:] != shape:
            raise ValueError(
                f"{folder} has targets of shape {truth.shape[1:]}; the model makes {shape}"
            )
        if not data_dir and not same_statistics(loaded.data_stats, data["stats"]):
            raise ValueError(
                f"{folder} has changed since the model was trained, which may have seen samples of "
                f"this {split} split; --data_dir={folder} scores them all the same"
            )
        read = [path for part in data["folders"] for path in Path(part).glob("*.npy")]
        item_files = [f"{part}/{split}_items.jsonl" for part in data["folders"]]
        named = map(json.loads, fileinput.FileInput(item_files))
    if interpolate:
        i, j, n = (*interpolate, 8)[:3]
        numbers = range(len(conditions))
        if i not in numbers or j not in numbers or n not in range(2, 10_000):
            raise ValueError(
                f"{interpolate=}: two of the conditions 0 to {len(conditions) - 1} and, if you "
                "like, how many samples, from 2 to 9,999"
            )
        conditions = line(conditions[i : i + 1], conditions[j : j + 1], n)  # (n, S, C)
        truth = None
        named = []
    n = len(conditions)
    if subset_size:
        n = min(n, subset_size)
        suffix += f"_first{subset_size}"
    n_draws = draws or (1 if truth is None else 4)
    n_with_draws = n if save_draws else min(n, score.LIMIT)  # conditions with so many draws

    # ---- files
    name = "interpolation" if interpolate else "generated"
    target = Path(save or f"{out_dir}/{name}{suffix}.npy")
    if target.suffix != ".npy":
        raise ValueError(f"save={save!r} must end in .npy")
    metrics_path = target.with_name(f"{target.stem}_metrics.json")
    picture_path = target.with_suffix(".png")
    if not save and not interpolate:
        metrics_path = Path(f"{out_dir}/metrics{suffix}.json")
        picture_path = Path(f"{out_dir}/samples{suffix}.png")
    for path in (target, Path(save_pickle or target)):  # before hours of sampling
        is_other = path.exists() and not path.is_file()  # a folder, or a device
        if is_other or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: is its folder there, and writable?")
    if plot:
        from report.plot import draw_samples, new_figure

        new_figure(1)  # needs matplotlib
    partial_folder = Path(f"{target}.partial")
    states_path = target.with_name(f"{target.stem}_trajectory.npy")
    draws_path = partial_folder / "draws.npy"
    if save_draws:
        draws_path = target.with_name(f"{target.stem}_draws.npy")
    files = {target: (n, *shape), draws_path: (n_with_draws, n_draws, *shape)}
    if trajectory:
        files[states_path] = (n, steps + 1, *shape)
    read += loaded.files
    read += [ROOT / name for name in ("model.py", "flow.py", "sample.py")]
    modified = {os.path.realpath(path): os.path.getmtime(path) for path in read}
    paths = [*map(os.path.realpath, [*files, save_pickle]), *modified]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{save=}, {save_pickle=}: this is read, or written twice")
    # with another of these the samples would be others, but not with another picture or pickle
    made_with = config | dict(
        batch_size=size, device=own_device, dtype=loaded.dtype, plot=None, save_pickle=None,
        read=modified,
    )  # fmt: skip
    output = Output(partial_folder, files, made_with)

    # ---- samples
    if compile or compile is None and "cuda" in own_device and n * n_draws >= 5000:
        for block in loaded.model.layers:
            block.compile()
    batches = range(RANK * size, n, WORLD_SIZE * size)  # the first rows of this process's batches
    if output.done:
        print0(f"{output.done} of {len(batches)} batches were there")
    batches = batches[output.done :]

    def inputs():
        for first in batches:
            batch = conditions[first : min(first + size, n)]
            for draw in range(n_draws if first < n_with_draws else 1):
                yield batch, i if interpolate else first, draw

    made = generate_batches(
        loaded, inputs(), steps, guidance, guidance_interval, seed, bool(interpolate),
        method=method, shift=shift, trajectory=trajectory,
    )  # fmt: skip
    for first in tqdm(batches, unit="batch", disable=RANK > 0):
        count = n_draws if first < n_with_draws else 1
        # (B, draws, T, D) or (steps + 1, B, draws, T, D)
        samples = torch.stack([*islice(made, count)], -3)
        arrays = {}
        if trajectory:
            arrays[states_path] = samples[:, :, 0].swapaxes(0, 1)  # (B, steps + 1, T, D)
            samples = samples[-1]
        arrays |= {target: samples[:, 0], draws_path: samples}
        output.write(first, arrays)
        drop_pages(conditions)  # what was read stays in the system's cache, not in this process
    output.publish()
    if RANK > 0:
        exit_process()  # waits for the first one, which makes the report
    print(f"{n} conditions, {n_draws} draws")

    # ---- report
    metrics_path.unlink(missing_ok=True)  # of the samples that had this name before
    samples = np.load(draws_path, mmap_mode="r")  # (N or the first LIMIT, draws, T, D)
    metrics = references = None
    if truth is not None:
        metrics, text, references = score.report(samples[: score.LIMIT], data, split)
        print(text)
        metrics_path.write_text(json.dumps({"generated": str(target)} | metrics, indent=1))
    if save_pickle:
        results = {
            "eva_embeddings": np.asarray(conditions[:n]),
            "clip_targets": None if truth is None else np.asarray(truth[:n]),
            "generated_clip": np.load(target),
            "generation_metrics": metrics,
        }
        named = list(named)[:n]
        for name in ("caption", "key", "label"):
            results[f"{name}s"] = [item.get(name) for item in named]
        replace_file(save_pickle, lambda f: pickle.dump(results, f, protocol=5))
        print(f"wrote {save_pickle}")
    if plot:
        stats = data["stats"] if data else loaded.stats
        draw_samples(
            picture_path, conditions, truth, samples, loaded.model.config.grid, stats,
            data and data["folders"][0], references,
        )  # fmt: skip
        print(f"wrote {picture_path}")
    shutil.rmtree(partial_folder)
    for path, shape in files.items():
        if path.exists():  # unlike draws that were only scored
            print(f"wrote {path} {shape}")
    exit_process()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted: the same command goes on from here")
