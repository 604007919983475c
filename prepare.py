"""
Turn pickles of paired embeddings into memory-mapped arrays, without trusting or loading the pickles.

    python prepare.py embeddings.pkl --out=data/mine
    python prepare.py shards/ more.pt --out=data/mine --val_fraction=0.05 --dtype=float16
    python prepare.py cond.npy target.npy --out=data/mine
    python prepare.py embeddings.pkl --inspect=True          # what is in it? converts nothing
    python prepare.py --out=data/mine --verify=True          # is this dataset whole?
    python prepare.py --help

A source is a pickle or torch.save file, or a folder of them (read in natural order, checked against
embeddings_manifest.json if there is one), or .npy files, the conditions first, then as many targets.
A pickle holds a dict with two entries of N samples, each an array or tensor (N, tokens, channels) or
(N, rows, columns, channels), or a list of (tokens, channels) samples or (n, tokens, channels) batches;
and, if you like, lists `captions` and `keys` and a dict `config`.

OUT then holds train_*.npy and val_*.npy, *_items.jsonl, stats.npz, and meta.json, which is
written last: where it is, the dataset is complete.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loader import ARRAYS, FILES, open_dataset
from sources import DataError, digest, find_files, inspect, items, load_shard, pair_arrays, plain
from unpickle import drop_pages

CHUNK = 1 << 24  # bytes of the source that one task converts
BLOCK = 1 << 19  # float64 values summed at a time, which should fit a core's cache
DROP = 1 << 28  # bytes after which pages of the source are given back
WORKERS = min(8, os.cpu_count() or 1)


# ---------------------------------------------------------------- the dataset on disk


def split(n, val_fraction, seed):
    """Sorted indices (train, val) of n samples, by a permutation from the seed."""
    if seed < 0 or not 0 < val_fraction < 1:
        raise DataError(
            f"seed={seed} must not be negative and val_fraction={val_fraction} must be between 0 and 1"
        )
    order, n_val = np.random.default_rng(seed).permutation(n), round(n * val_fraction)
    if not 0 < n_val < n:
        raise DataError(
            f"{n} samples with val_fraction={val_fraction} leave {n - n_val} for training and {n_val} for validation"
        )
    return np.sort(order[n_val:]), np.sort(order[:n_val])


# ---------------------------------------------------------------- converting


def survey(shards, promised, load):
    """First pass, which reads no embeddings: layout, counts and bytes of all shards, checked against each other."""
    first, counts, nbytes, seen = None, [], 0, set()
    for paths in shards:
        shard = load(*paths)
        layout, grid = (
            {name: shard[name].layout for name in ("cond", "target")},
            shard["target"].grid,
        )
        first = first or dict(layout=layout, grid=grid, config=plain(shard["config"]))
        if (layout, grid) != (first["layout"], first["grid"]):
            was = f"{first['layout']}, grid {first['grid']}"
            raise DataError(
                f"{paths[0]}: [tokens, channels, dtype] is {layout}, grid {grid}; in {shards[0][0]} {was}"
            )
        counts.append(len(shard["cond"]))
        nbytes += shard["cond"].nbytes + shard["target"].nbytes
        for item in items(shard, paths[0]):
            key = repr(item["key"])  # a string, since integers can be chosen to have the same hash
            if key in seen:
                raise DataError(f"{paths[0]}: the key {key} is there twice")
            seen |= {key} - {"None"}
    for folder, manifest in promised.items():
        found = [n for paths, n in zip(shards, counts) if paths[0].parent == folder]
        asked = manifest["total_samples"], manifest.get("total_shards", len(found))
        if asked != (sum(found), len(found)):
            raise DataError(
                f"{folder}: its manifest promises {asked[0]} samples in {asked[1]} shards, "
                f"its pickles hold {sum(found)} in {len(found)}"
            )
    return first, counts, nbytes


def moments(x, skip=None):
    """Sums over all but the last axis of x (n, T, C) and of its squares, in float64: (2, C).

    The samples of the mask `skip` (n,) count as zeros. A value that is not finite, theirs included, makes sums
    that are not.
    """
    skip = np.zeros(len(x), bool) if skip is None else skip
    skip, x = np.repeat(skip, x.shape[1]), x.reshape(-1, x.shape[2])
    step = max(1, BLOCK // x.shape[1])
    wide, total = np.empty((min(step, len(x)), x.shape[1])), np.zeros((2, x.shape[1]))
    half, bits = x.dtype == np.float16, np.empty(wide.shape, np.int32)
    for i in range(0, len(x), step):
        part, block, narrow = x[i : i + step], wide[: len(x) - i], bits[: len(x) - i]
        if half:
            # numpy widens float16 one by one. Twice as fast: the bits of 2^-112 x in float32, where only the
            # exponent's bias differs. An exponent of 31, Inf or NaN, has to be looked for.
            np.copyto(narrow, part.view(np.int16))
            np.left_shift(narrow, 13, out=narrow)
            part = np.bitwise_and(narrow, ~0x70000000, out=narrow).view(np.float32)
            if max(part.max(), -part.min()) >= 2.0**-96:
                return np.full_like(total, np.nan)
            part[skip[i : i + step]] = 0
        np.copyto(block, part)
        with np.errstate(invalid="ignore"):
            if not half:
                block[skip[i : i + step]] *= 0
            total += block.sum(0), np.einsum("nc,nc->c", block, block)
    return total * [[2.0**112], [2.0**224]] if half else total


def copy(rows, slices, first, is_val, n_val, files):
    """Convert slices (piece, start, stop) of the rows, the samples from number `first` on, and write each to its split.

    n_val[i] validation samples come before sample i; files are (descriptor, position) of training's and
    validation's first. Returns the sums (2, C) of the training samples, and which samples are not finite.
    """
    try:
        parts = [rows.convert(piece[start:stop]) for piece, start, stop in slices]
    except DataError as e:
        raise DataError(f"from sample {first} on: {e}") from e
    x = parts[0] if len(parts) == 1 else np.concatenate(parts)
    mask = is_val[first : first + len(x)]
    total = moments(x, mask)
    bad = (
        []
        if np.isfinite(total).all()
        else (first + np.flatnonzero(~np.isfinite(x).all((1, 2)))).tolist()
    )
    for a, b in itertools.pairwise(
        [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(x)]
    ):  # runs of one split
        before = int(n_val[first + a])
        fd, origin = files[int(mask[a])]
        data, at = (
            memoryview(x[a:b]).cast("B"),
            origin + x[0].nbytes * (before if mask[a] else first + a - before),
        )
        while data:
            n = os.pwrite(fd, data, at)
            data, at = data[n:], at + n
    return total, bad, sum((stop - start) * piece[0].nbytes for piece, start, stop in slices)


def write_arrays(shards, counts, nbytes, layout, is_val, folder, load):
    """Second pass: copy every sample into its split, accumulating the training statistics.

    Writes the arrays and the items; returns the arrays' shapes and the statistics. Raises DataError.
    """
    n_val, shapes, files = np.cumsum([0, *is_val]), {}, {name: [] for name in layout}
    total, first, n_bad, dropped, where = (
        {name: np.zeros((2, c)) for name, (_, c, _) in layout.items()},
        0,
        0,
        0,
        None,
    )
    with contextlib.ExitStack() as stack:
        lines = [
            stack.enter_context(open(folder / f"{which}_items.jsonl", "w"))
            for which in ("train", "val")
        ]
        for which, name in itertools.product(("train", "val"), layout):
            *shape, dtype = layout[name]
            shape = int(n_val[-1] if which == "val" else len(is_val) - n_val[-1]), *shape
            f = stack.enter_context(open(folder / f"{which}_{name}.npy", "wb"))
            header = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(f, header)
            f.flush()
            files[name].append((f.fileno(), f.tell()))
            shapes[f"{which}_{name}"] = list(shape)
        bar = stack.enter_context(tqdm(total=nbytes, unit="B", unit_scale=True, desc="converting"))
        pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
        stack.callback(pool.shutdown, cancel_futures=True)
        for paths, n in zip(shards, counts):
            shard, bad = load(*paths), {}
            if len(shard["cond"]) != n:
                raise DataError(f"{paths[0]}: changed while it was read")
            tasks = [
                (name, slices, first + i)
                for name in layout
                for slices, i in shard[name].portions(CHUNK)
            ]
            results = pool.map(
                lambda task: copy(shard[task[0]], *task[1:], is_val, n_val, files[task[0]]), tasks
            )
            for i, item in enumerate(items(shard, paths[0]), first):  # while the pool works
                lines[int(is_val[i])].write(json.dumps(item) + "\n")
            for (name, slices, _), (sums, samples, size) in zip(tasks, results):
                total[name] += sums
                bad |= {i: name for i in samples if i not in bad}
                bar.update(size)
                if bar.n // DROP > dropped:
                    dropped = bar.n // DROP
                    drop_pages(slices[0][0])
            if bad and where is None:
                item = next(itertools.islice(items(shard, paths[0]), min(bad) - first, None))
                where = f"the {bad[min(bad)]} of sample {min(bad)} (key {item['key']!r})"
            first, n_bad = first + n, n_bad + len(bad)
    if n_bad:
        raise DataError(f"NaN or Inf in {n_bad} of {len(is_val)} samples, the first in {where}")
    stats = {}
    for name, (tokens, _, _) in layout.items():
        mean, square = total[name] / ((~is_val).sum() * tokens)
        variance = np.where(
            square - mean**2 > 1e-12 * square, square - mean**2, 0
        )  # less is only rounding
        if not np.isfinite(square).all():
            raise DataError(f"the squares of the {name} are too large for float64")
        stats |= {f"{name}_mean": mean, f"{name}_std": np.sqrt(variance)}
    return shapes, stats


def prepare(
    sources, out, cond_key, target_key, val_fraction, seed, grid=None, overwrite=False, dtype="source", drop_cls=False,
    pool=1, other_grid=False,
):  # fmt: skip
    """Convert the sources into the dataset folder `out`; returns its meta.json. Raises DataError.

    The flags of the command line say what the arguments are.
    """
    out, partial = Path(out), Path(out) / ".partial"
    if grid and not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", grid):
        raise DataError(f"--grid={grid} is not ROWSxCOLUMNS")
    if pool < 1:
        raise DataError(f"--pool={pool} must be 1 or more")
    files, promised = find_files(sources)
    shards = pair_arrays(files)
    request = dict(
        cond_key=cond_key,
        target_key=target_key,
        val_fraction=val_fraction,
        seed=seed,
        grid_asked=grid,
    )
    request |= dict(
        dtype=dtype, drop_cls=drop_cls, pool=pool, sources=[digest(path) for path in files]
    )
    request |= {"other_grid": True} if other_grid else {}
    if (out / "meta.json").is_file() and not overwrite:
        meta = open_dataset(out)["meta"]
        if {key: meta.get(key) for key in request} == request:
            print(
                f"{out} already holds exactly this dataset, by the sizes and digests of its sources"
            )
            return meta
        raise DataError(
            f"{out} holds another dataset; choose another --out or pass --overwrite=True"
        )

    made_out = not out.exists()
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # released when this process ends, however it does
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise DataError(f"another prepare.py is writing to {out}") from e
    try:
        for left_over in partial.iterdir():
            left_over.unlink()
        asked = tuple(map(int, grid.split("x"))) if grid else None
        options = dict(
            scratch=partial,
            other_grid=other_grid,
            dtype=dtype,
            grid=asked,
            drop_cls=drop_cls,
            pool=pool,
        )
        load = functools.lru_cache(8)(
            lambda *paths: load_shard(paths, cond_key, target_key, **options)
        )
        first, counts, nbytes = survey(shards, promised, load)
        layout, tokens = first["layout"], first["layout"]["target"][0]
        if asked and first["grid"] != tuple(n // pool for n in asked):
            raise DataError(f"--grid={grid} is not ROWSxCOLUMNS of {tokens * pool**2} tokens")
        if not first["grid"]:
            raise DataError(
                f"{tokens} target tokens are not a square; say --grid=ROWSxCOLUMNS or --drop_cls=True"
            )
        is_val = np.zeros(sum(counts), bool)
        is_val[split(len(is_val), val_fraction, seed)[1]] = True
        need = sum(
            len(is_val) * np.dtype(dtype).itemsize * t * c for t, c, dtype in layout.values()
        )
        if need > (free := shutil.disk_usage(partial).free):
            raise DataError(f"{out} needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        meta = dict(format_version=1, grid=list(first["grid"]), layout=layout, **request)
        meta["shapes"], stats = write_arrays(shards, counts, nbytes, layout, is_val, partial, load)
        np.savez(partial / "stats.npz", **stats)
        meta |= dict(config=first["config"], paths=[str(path.resolve()) for path in files])
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        if (
            out / "meta.json"
        ).is_file():  # what is safe on the disk is replaced by nothing less; else the kernel may
            for name in (*FILES, "meta.json"):  # write in its own time, as it does for cp
                with open(partial / name, "rb") as f:
                    os.fsync(f.fileno())
        (out / "meta.json").unlink(missing_ok=True)  # from here on there is no complete dataset
        for name in (*FILES, "meta.json"):
            os.replace(partial / name, out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        if made_out and not any(out.iterdir()):
            out.rmdir()
    return meta


def verify(out):
    """Read a dataset again and compare it with its meta.json and stats.npz. Raises DataError where they differ."""
    data = open_dataset(out)
    meta, stats = data["meta"], data["stats"]
    for name in ARRAYS:
        array, total = data[name], np.zeros((2, data[name].shape[-1]))
        size, due = (Path(out) / f"{name}.npy").stat().st_size, array.offset + array.nbytes
        if size != due:
            raise DataError(f"{name}.npy has {size} bytes instead of {due}")
        step = max(1, CHUNK // array[0].nbytes)
        for i in tqdm(range(0, len(array), step), desc=name, leave=False):
            total += (sums := moments(array[i : i + step]))
            if not np.isfinite(sums).all():
                raise DataError(
                    f"{name}.npy holds NaN or Inf among samples {i} to {min(i + step, len(array)) - 1}"
                )
            drop_pages(array)
        which, key = name.split("_")
        mean, square = total / (array.size // array.shape[-1])
        std = np.sqrt(np.maximum(square - mean**2, 0))
        if which == "train" and not (
            np.allclose(mean, stats[f"{key}_mean"], 1e-6, 1e-6 * std.max())
            and np.allclose(std, stats[f"{key}_std"], 1e-6, 1e-6 * std.max())
        ):
            raise DataError(f"{name}.npy has other statistics than stats.npz says")
        print(
            f"{name}.npy: {tuple(array.shape)} {array.dtype}, finite"
            + ", as stats.npz says" * (which == "train")
        )
    for which in ("train", "val"):
        with open(Path(out) / f"{which}_items.jsonl") as f:
            n = sum(1 for _ in map(json.loads, f))
        if n != len(data[f"{which}_cond"]):
            raise DataError(
                f"{which}_items.jsonl has {n} lines for {len(data[f'{which}_cond'])} samples"
            )
    for path, source in zip(map(Path, meta["paths"]), meta["sources"]):
        if path.is_file() and digest(path) != source:
            raise DataError(f"the source {path} is not what it was: its size or sha256 differs")
        print(
            f"{path}: "
            + (
                f"sha256 as recorded ({source['sha256_of']})"
                if path.is_file()
                else "not here, not compared"
            )
        )


def yes_or_no(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"takes True or False, not {text!r}")
    return text == "True"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, flag = parser.add_argument, dict(type=yes_or_no, default=False, metavar="True|False")
    add(
        "sources",
        nargs="*",
        metavar="SRC",
        help="a pickle or .pt file, a folder of them, or .npy files",
    )
    add("--out", metavar="DIR", help="the dataset's folder")
    add(
        "--cond_key",
        default="eva_blip3o_embeddings",
        help="key of the conditions (default: %(default)s)",
    )
    add(
        "--target_key",
        default="clip_blip3o_embeddings",
        help="key of the targets (default: %(default)s)",
    )
    add(
        "--val_fraction",
        type=float,
        default=0.1,
        help="share of samples held out (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    add(
        "--dtype",
        choices=("source", "float16", "float32"),
        default="source",
        help="of the arrays (default: the source's)",
    )
    add(
        "--grid",
        metavar="HxW",
        help="rows x columns of the source's tokens, if they are not a square",
    )
    add("--drop_cls", **flag, help="drop the first token where there is one more than a grid has")
    add(
        "--other_grid",
        **flag,
        help="let conditions have other tokens than targets: train.py then has cross-attention",
    )
    add(
        "--pool",
        type=int,
        default=1,
        help="average squares of so many by so many tokens (default: %(default)s)",
    )
    add("--overwrite", **flag, help="replace another dataset in DIR, once the new one is whole")
    add("--inspect", **flag, help="print what the sources hold and convert nothing")
    add("--verify", **flag, help="read the dataset in DIR again and compare it with its meta.json")
    args = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up as after Ctrl-C
    only_inspect, only_verify = args.pop("inspect"), args.pop("verify")
    if not args["out"] and not only_inspect:
        parser.error("--out=DIR is required")
    if not args["sources"] and not only_verify:
        parser.error("name a source: a pickle, a folder of pickles, or .npy files")
    try:
        if only_inspect:
            return inspect(find_files(args["sources"])[0])
        if only_verify:
            try:
                return verify(args["out"])
            except (TypeError, ValueError, LookupError, AttributeError) as e:
                raise (
                    e if isinstance(e, DataError) else DataError(f"{args['out']} is damaged: {e}")
                ) from e
        meta = prepare(**args)
    except DataError as e:  # names in a hostile file may hold what a terminal obeys
        sys.exit(
            "error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(e)[:2000])
        )
    except OSError as e:
        sys.exit(
            f"error: {e}" + (f"; no new dataset was left in {args['out']}" if args["out"] else "")
        )
    except KeyboardInterrupt:
        sys.exit(f"error: interrupted; no new dataset was left in {args['out']}")
    print(f"{args['out']}: grid {meta['grid'][0]}x{meta['grid'][1]}")
    for name, shape in meta["shapes"].items():
        size = (Path(args["out"]) / f"{name}.npy").stat().st_size
        dtype = meta["layout"][name.split("_")[1]][2]
        print(f"  {name + '.npy':17} {str(tuple(shape)):18} {dtype:8} {size / 1e6:10.1f} MB")


if __name__ == "__main__":
    main()
