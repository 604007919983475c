"""
Turn pickles of paired embeddings into memory-mapped arrays, without trusting the pickles.

    python prepare.py embeddings.pkl --out=data/mine
    python prepare.py shards/ more.pkl --out=data/mine --val_fraction=0.05
    python prepare.py --help

A source is a pickle or a folder of pickles (read in natural order, checked against
embeddings_manifest.json if there is one). A pickle holds a dict with two arrays or tensors
of N samples, (N, tokens, channels) or (N, rows, columns, channels), and, if you like, lists
`captions` and `keys` and a dict `config`. One shard at a time is held in memory.

OUT then holds train_*.npy and val_*.npy, *_items.jsonl, stats.npz, and meta.json, which is
written last: where it is, the dataset is complete.
"""

import argparse
import collections
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ARRAYS = ("train_cond", "train_target", "val_cond", "val_target")
FILES = (*(f"{name}.npy" for name in ARRAYS), "train_items.jsonl", "val_items.jsonl", "stats.npz")
CHUNK = 128  # samples converted at a time: bounds the float64 copy that the statistics need


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


# ---------------------------------------------------------------- reading pickles


def _load_storage(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _empty_array(cls, shape, typecode):
    if cls is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of class {cls!r}")
    return np.ndarray(shape, np.dtype(typecode))


def _dtype(spec, *flags):
    if np.dtype(spec).kind not in "biufcSU":
        raise pickle.UnpicklingError(f"an array of dtype {spec!r}")
    return np.dtype(spec, *flags)


def _from_buffer(buffer, dtype, shape, order):
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


# every name that a pickle may call, and what is called in its place
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): np.ndarray,  # only ever an argument of _reconstruct
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): np._core.multiarray.scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is not on the list of what embeddings need"
            )
        return ALLOWED[module, name]


def load_pickle(path):
    """The dict in a pickle of plain values, numpy arrays and torch tensors.

    Nothing but the functions in ALLOWED can be called by the file. Raises DataError.
    """
    try:
        with open(path, "rb") as f:
            content = Unpickler(f).load()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except Exception as e:  # a hostile or broken file can raise anything: all of it means the same
        raise DataError(
            f"{path}: not a readable pickle of embeddings: {' '.join(str(e).split()) or type(e).__name__}"
        ) from e
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict of embeddings")
    return content


def get_array(content, key, path):
    """(array (N, T, channels), grid or None) from a pickle's entry, bfloat16 widened to float32."""
    if key not in content:
        held = ", ".join(f"{k} {tuple(v.shape)}" if hasattr(v, "shape") else str(k) for k, v in content.items())
        raise DataError(f"{path}: no key {key!r}; it holds: {held or 'nothing'} (choose with --cond_key, --target_key)")
    value = content[key]
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise DataError(f"{path}: {key} is {getattr(value, 'dtype', type(value).__name__)}, not an array of floats")
    grid = value.shape[1:3] if value.ndim == 4 else None
    if grid:
        value = value.reshape(len(value), -1, value.shape[-1])
    if value.ndim != 3 or 0 in value.shape:
        raise DataError(f"{path}: {key} has shape {value.shape}; expected (samples, tokens, channels), none of them 0")
    return value.astype(value.dtype.newbyteorder("="), copy=False), grid


def load_shard(path, cond_key, target_key):
    """dict(cond, target, grid, keys, captions, config) of one pickle, checked."""
    content = load_pickle(path)
    cond, _ = get_array(content, cond_key, path)
    target, grid = get_array(content, target_key, path)
    if len(cond) != len(target):
        raise DataError(f"{path}: {len(cond)} conditions but {len(target)} targets")
    shard = dict(cond=cond, target=target, grid=grid, config=content.get("config"))
    for name in ("keys", "captions"):
        values = content.get(name)
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not isinstance(values, (list, tuple, type(None))) or any(
            not isinstance(v, (str, int)) for v in values or []
        ):
            raise DataError(f"{path}: {name} is not a list of strings or integers")
        shard[name] = [None] * len(cond) if values is None else list(values)
        if len(shard[name]) != len(cond):
            raise DataError(f"{path}: {len(shard[name])} {name} for {len(cond)} samples")
    return shard


# ---------------------------------------------------------------- the dataset on disk


def split(n, val_fraction, seed):
    """Sorted indices (train, val) of n samples, by a permutation from the seed."""
    if seed < 0 or not 0 < val_fraction < 1:
        raise DataError(f"seed={seed} must not be negative and val_fraction={val_fraction} must be between 0 and 1")
    order, n_val = np.random.default_rng(seed).permutation(n), round(n * val_fraction)
    if not 0 < n_val < n:
        raise DataError(
            f"{n} samples with val_fraction={val_fraction} leave {n - n_val} for training and {n_val} for validation"
        )
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def open_dataset(data_dir):
    """dict(meta, stats, train_cond, train_target, val_cond, val_target), arrays memory-mapped.

    Raises DataError where the dataset is missing, incomplete or not what meta.json says.
    """
    folder, make = Path(data_dir), f"make it with: python prepare.py SRC --out={data_dir}"
    if not (folder / "meta.json").is_file():
        state = (
            "is incomplete: it has no meta.json"
            if any((folder / name).exists() for name in FILES)
            else "does not exist"
        )
        raise DataError(f"the dataset {str(data_dir)!r} {state}; {make}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        with np.load(folder / "stats.npz") as stats:
            data |= {"meta": meta, "stats": dict(stats)}
        for name in ARRAYS:
            if list(data[name].shape) != meta["shapes"][name]:
                raise ValueError(f"{name}.npy has shape {data[name].shape}, meta.json says {meta['shapes'][name]}")
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"the dataset {str(data_dir)!r} is damaged: {e}; {make} --overwrite=True") from e
    return data


# ---------------------------------------------------------------- converting


def find_files(sources):
    """The pickles that the sources name, and {folder: samples its manifest promises}."""
    files, promised = [], {}
    for source in map(Path, sources):
        if source.is_file():
            files.append(source)
        elif source.is_dir():
            natural = lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)]  # noqa: E731
            files += (found := sorted(source.glob("*.pkl"), key=natural))
            if not found:
                raise DataError(f"{source}: a folder without .pkl files")
            manifest = source / "embeddings_manifest.json"
            if manifest.is_file():
                try:
                    promised[source] = int(json.loads(manifest.read_text())["total_samples"])
                except (ValueError, KeyError, TypeError) as e:
                    raise DataError(f"{manifest}: no readable total_samples in it") from e
        else:
            raise DataError(f"{source}: no such file or folder")
    return files, promised


def digest(path, part=1 << 24):
    """Name, size and sha256 of a file: of the whole, or of its size and three parts if it is large."""
    size, h = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as f:
        if size <= 4 * part:
            h.update(f.read())
        else:
            h.update(str(size).encode())
            for start in (0, size // 2, size - part):
                f.seek(start)
                h.update(f.read(part))
    kind = "whole file" if size <= 4 * part else f"size, then {part} bytes at 0, size // 2 and size - {part}"
    return {"file": path.name, "bytes": size, "sha256": h.hexdigest(), "sha256_of": kind}


def survey(files, promised, load):
    """First pass: layout, counts and items of all shards, checked against each other."""
    first, counts, items, seen = None, [], [], set()
    for path in files:
        shard = load(path)
        layout = {name: [*shard[name].shape[1:], str(shard[name].dtype)] for name in ("cond", "target")}
        first = first or dict(layout=layout, grid=shard["grid"], config=shard["config"])
        if layout != first["layout"]:
            raise DataError(f"{path}: [tokens, channels, dtype] is {layout}; in {files[0]} it is {first['layout']}")
        counts.append(len(shard["cond"]))
        for key, caption in zip(shard["keys"], shard["captions"]):
            if key is not None and key in seen:
                raise DataError(f"{path}: the key {key!r} is there twice")
            seen.add(key)
            items.append({"key": key, "caption": caption})
        del shard  # before the next one is loaded
    for folder, total in promised.items():
        found = sum(n for path, n in zip(files, counts) if path.parent == folder)
        if found != total:
            raise DataError(f"{folder}: its manifest promises {total} samples, its pickles hold {found}")
    return first, counts, items


def choose_grid(tokens, given, asked):
    """[H, W] of the target tokens: as asked, as the array's shape says, or square."""
    side = math.isqrt(tokens)
    if asked:
        if not re.fullmatch(r"\d+x\d+", asked) or math.prod(map(int, asked.split("x"))) != tokens:
            raise DataError(f"--grid={asked} is not ROWSxCOLUMNS of {tokens} tokens")
        return [int(n) for n in asked.split("x")]
    if not given and side * side != tokens:
        raise DataError(f"{tokens} target tokens are not a square; say --grid=ROWSxCOLUMNS")
    return list(given or (side, side))


def write_arrays(files, counts, layout, is_val, folder, load):
    """Second pass: copy every sample into its split, accumulating the training statistics.

    Returns the arrays' shapes, the statistics, and [(index, array)] of samples that are not finite.
    """
    arrays, next_row, bad = {}, collections.Counter(), []
    for which, n in (("train", int((~is_val).sum())), ("val", int(is_val.sum()))):
        for name, (tokens, channels, dtype) in layout.items():
            path = folder / f"{which}_{name}.npy"
            arrays[f"{which}_{name}"] = np.lib.format.open_memmap(path, "w+", dtype, (n, tokens, channels))
    sums = {name: np.zeros((2, channels)) for name, (_, channels, _) in layout.items()}  # of x and x^2, float64
    start = 0
    with tqdm(total=sum(a.nbytes for a in arrays.values()), unit="B", unit_scale=True, desc="writing") as bar:
        for path, n in zip(files, counts):
            shard = load(path)
            for i in range(0, n, CHUNK):
                val = is_val[start + i : start + min(i + CHUNK, n)]
                for name in layout:
                    chunk = shard[name][i : i + CHUNK]
                    bad += [(start + i + int(row), name) for row in np.flatnonzero(~np.isfinite(chunk).all((1, 2)))]
                    for which, mask in (("train", ~val), ("val", val)):
                        key, part = f"{which}_{name}", chunk[mask]
                        arrays[key][next_row[key] : next_row[key] + len(part)] = part
                        next_row[key] += len(part)
                    wide = chunk[~val].astype(np.float64)
                    sums[name] += wide.sum((0, 1)), (wide**2).sum((0, 1))
                    bar.update(chunk.nbytes)
            start += n
            del shard
    for array in arrays.values():
        array.flush()
    stats = {}
    for name, (tokens, _, _) in layout.items():
        mean, square = sums[name] / ((~is_val).sum() * tokens)
        stats |= {f"{name}_mean": mean, f"{name}_std": np.sqrt(np.maximum(square - mean**2, 0))}
    return {key: list(array.shape) for key, array in arrays.items()}, stats, bad


def prepare(sources, out, cond_key, target_key, val_fraction, seed, grid=None, overwrite=False):
    """Convert the sources into the dataset folder `out`; returns its meta.json. Raises DataError."""
    out, partial = Path(out), Path(out) / ".partial"
    files, promised = find_files(sources)
    request = dict(cond_key=cond_key, target_key=target_key, val_fraction=val_fraction, seed=seed, grid_asked=grid)
    request |= dict(sources=[digest(path) for path in files])
    if (out / "meta.json").is_file() and not overwrite:
        meta = open_dataset(out)["meta"]
        if {key: meta.get(key) for key in request} == request:
            print(f"{out} already holds exactly this dataset")
            return meta
        raise DataError(f"{out} holds another dataset; choose another --out or pass --overwrite=True")

    def load(path):
        return load_shard(path, cond_key, target_key)

    load = functools.lru_cache(1)(load) if len(files) == 1 else load  # of several, one at a time is all that fits
    first, counts, items = survey(files, promised, load)
    layout, n = first["layout"], sum(counts)
    train, val = split(n, val_fraction, seed)
    is_val = np.zeros(n, bool)
    is_val[val] = True
    meta = dict(format_version=1, grid=choose_grid(layout["target"][0], first["grid"], grid), layout=layout, **request)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta["shapes"], stats, bad = write_arrays(files, counts, layout, is_val, partial, load)
        if bad:
            where, name = bad[0]
            raise DataError(
                f"NaN or Inf in {len({i for i, _ in bad})} of {n} samples, the first in the {name} "
                f"of sample {where} (key {items[where]['key']!r})"
            )
        np.savez(partial / "stats.npz", **stats)
        for which, indices in (("train", train), ("val", val)):
            with open(partial / f"{which}_items.jsonl", "w") as f:
                f.writelines(json.dumps(items[i], default=str) + "\n" for i in indices)
        meta["config"] = json.loads(json.dumps(first["config"], default=str, skipkeys=True))
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        (out / "meta.json").unlink(missing_ok=True)  # from here on there is no complete dataset
        for name in (*FILES, "meta.json"):
            with open(partial / name, "rb") as f:
                os.fsync(f.fileno())
            os.replace(partial / name, out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def yes_or_no(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"takes True or False, not {text!r}")
    return text == "True"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sources", nargs="+", metavar="SRC", help="a pickle, or a folder of pickles")
    parser.add_argument("--out", required=True, metavar="DIR", help="the dataset's folder")
    parser.add_argument(
        "--cond_key", default="eva_blip3o_embeddings", help="key of the conditions (default: %(default)s)"
    )
    parser.add_argument(
        "--target_key", default="clip_blip3o_embeddings", help="key of the targets (default: %(default)s)"
    )
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="share of samples held out (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--grid", metavar="HxW", help="rows x columns of the target tokens, if they are not a square")
    parser.add_argument(
        "--overwrite", type=yes_or_no, default=False, metavar="True|False", help="replace another dataset in DIR"
    )
    args = vars(parser.parse_args())
    try:
        meta = prepare(**args)
    except DataError as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        sys.exit(f"error: writing {args['out']} failed: {e}; no dataset was left there")
    print(f"{args['out']}: grid {meta['grid'][0]}x{meta['grid'][1]}")
    for name, shape in meta["shapes"].items():
        size = (Path(args["out"]) / f"{name}.npy").stat().st_size
        dtype = meta["layout"][name.split("_")[1]][2]
        print(f"  {name + '.npy':17} {str(tuple(shape)):18} {dtype:8} {size / 1e6:10.1f} MB")


if __name__ == "__main__":
    main()
