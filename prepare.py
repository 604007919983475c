"""
Turn pickles of paired embeddings into memory-mapped arrays, without trusting the pickles.

    python prepare.py embeddings.pkl --out=data/mine
    python prepare.py shards/ more.pt --out=data/mine --val_fraction=0.05 --dtype=float16
    python prepare.py cond.npy target.npy --out=data/mine
    python prepare.py embeddings.pkl --inspect=True          # what is in it? converts nothing
    python prepare.py --help

A source is a pickle or torch.save file, or a folder of them (read in natural order, checked
against embeddings_manifest.json if there is one), or .npy files, first the conditions, then as many
targets. A pickle holds a dict with two entries of N samples, each an array or tensor
(N, tokens, channels) or (N, rows, columns, channels), or a list of (tokens, channels) samples or
(n, tokens, channels) batches; and, if you like, lists `captions` and `keys` and a dict `config`.

DIR then holds train_*.npy and val_*.npy, *_items.jsonl, stats.npz and meta.json. They are made in a
temporary folder inside DIR and moved once all are complete, meta.json last.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loader import ARRAYS, FILES
from sources import DataError, find_files, inspect, items, load_shard, pair_arrays, plain

SLICE = 1 << 23  # bytes of samples that are converted at a time
AHEAD = 3  # slices that are converted while one is written
BLOCK = 1 << 16  # float64 values that are summed at a time, which should fit a core's cache


def split(n, val_fraction, seed):
    """Sorted indices (train, val) of n samples, by a permutation from the seed."""
    if seed < 0:
        raise DataError(f"seed={seed} must not be negative")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be between 0 and 1")
    n_val = round(n * val_fraction)
    if not 0 < n_val < n:
        raise DataError(
            f"{n} samples with val_fraction={val_fraction} leave {n - n_val} for training "
            f"and {n_val} for validation"
        )
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[n_val:]), np.sort(order[:n_val])


# ---------------------------------------------------------------- the first pass: what there is


def survey(shards, manifests, load):
    """Compare the shards with each other and with their manifests; no embedding is read.

    Returns the number of samples in each shard.
    """
    first = load(shards[0])
    counts, keys = [], set()
    for paths in shards:
        shard = load(paths)
        for kind in ("cond", "target"):
            found = shard[kind].layout, shard[kind].grid
            expected = first[kind].layout, first[kind].grid
            if found != expected:
                raise DataError(f"{paths[0]}: {kind} is {found}, but {expected} in {shards[0][0]}")
        counts.append(len(shard["cond"]))
        for item in items(shard["content"], counts[-1], paths[0]):
            key = repr(item["key"])  # a string: integers can be chosen to have the same hash
            if key in keys:
                raise DataError(f"{paths[0]}: the key {key[:80]} is there twice")
            if item["key"] is not None:
                keys.add(key)
    for folder, (n_samples, n_shards) in manifests.items():
        held = [n for paths, n in zip(shards, counts) if paths[0].parent == folder]
        if n_shards is None:
            n_shards = len(held)
        if (n_samples, n_shards) != (sum(held), len(held)):
            raise DataError(
                f"{folder}: its manifest promises {n_samples} samples in {n_shards} shards, "
                f"its pickles hold {sum(held)} in {len(held)}"
            )
    return counts


# ---------------------------------------------------------------- the second pass: convert


def moments(samples):
    """Sums of (n, T, C) over samples and tokens, and of the squares, in float64: (2, C).

    They are not finite where a value is not.
    """
    tokens = samples.reshape(-1, samples.shape[-1])  # (n * T, C)
    step = max(1, BLOCK // tokens.shape[1])
    sums = np.zeros((2, tokens.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(tokens), step):
            block = tokens[start : start + step].astype(np.float64)
            sums[0] += block.sum(0)
            sums[1] += np.einsum("nc,nc->c", block, block)
    return sums


def convert(rows, splits, pool):
    """Yield (samples, their moments) in order, in runs of samples of the same split."""
    step = max(1, SLICE * len(rows) // rows.nbytes)

    def convert_slice(start):
        samples = rows[start : start + step]  # (n, T, C)
        names = splits[start : start + step]
        borders = np.flatnonzero(names[1:] != names[:-1]) + 1
        return [(run, moments(run)) for run in np.split(samples, borders)]

    pending = collections.deque()
    for start in range(0, len(rows), step):
        pending.append(pool.submit(convert_slice, start))
        if len(pending) > AHEAD:
            yield from pending.popleft().result()
    for future in pending:
        yield from future.result()


def write_arrays(shards, counts, load, splits, shapes, folder):
    """Write all samples, in order, each to the files of its split; returns the arrays' moments."""
    first = load(shards[0])
    totals = {name: np.zeros((2, shape[-1])) for name, shape in shapes.items()}
    not_finite = {}  # number of a sample -> "cond" or "target"
    with contextlib.ExitStack() as stack:
        files = {}
        for which in ("train", "val"):
            files[which] = stack.enter_context(open(folder / f"{which}_items.jsonl", "w"))
        for name, shape in shapes.items():
            files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
            descr = first[name.split("_")[1]].dtype.str
            header = dict(descr=descr, fortran_order=False, shape=tuple(shape))
            np.lib.format.write_array_header_1_0(files[name], header)
        bar = stack.enter_context(tqdm(total=2 * len(splits), unit=" arrays", desc="converting"))
        pool = stack.enter_context(ThreadPoolExecutor(2))
        n_before = 0
        for paths, n in zip(shards, counts):
            shard = load(paths)
            if len(shard["cond"]) != n:
                raise DataError(f"{paths[0]}: changed while it was read")
            names = splits[n_before : n_before + n]
            for which, item in zip(names, items(shard["content"], n, paths[0])):
                files[which].write(json.dumps(item) + "\n")
            for kind in ("cond", "target"):
                i = 0  # number in the shard
                for samples, sums in convert(shard[kind], names, pool):
                    name = f"{names[i]}_{kind}"
                    files[name].write(samples)
                    totals[name] += sums
                    if not np.isfinite(sums).all():
                        finite = np.isfinite(samples).all((1, 2))
                        for j in np.flatnonzero(~finite):
                            not_finite.setdefault(n_before + i + int(j), kind)
                    i += len(samples)
                    bar.update(len(samples))
            n_before += n
    if not_finite:
        i = min(not_finite)
        keys = (json.loads(line)["key"] for line in open(folder / f"{splits[i]}_items.jsonl"))
        key = next(itertools.islice(keys, int((splits[:i] == splits[i]).sum()), None))
        raise DataError(
            f"NaN or Inf in {len(not_finite)} of {len(splits)} samples, "
            f"the first in the {not_finite[i]} of sample {i} (key {key!r})"
        )
    return totals


def statistics(totals, shapes):
    """Mean and standard deviation of each channel over the tokens of the training split."""
    stats = {}
    for kind in ("cond", "target"):
        n_samples, n_tokens, _ = shapes[f"train_{kind}"]
        mean, square = totals[f"train_{kind}"] / (n_samples * n_tokens)  # (C,) each
        if not np.isfinite(square).all():
            raise DataError(f"the squares of the {kind} are too large for float64")
        variance = square - mean**2
        variance[variance < 1e-12 * square] = 0  # less is only rounding
        stats[f"{kind}_mean"] = mean
        stats[f"{kind}_std"] = np.sqrt(variance)
    return stats


# ---------------------------------------------------------------- the dataset on disk


def prepare(
    sources,
    out,
    cond_key,
    target_key,
    val_fraction,
    seed,
    grid=None,
    overwrite=False,
    dtype="source",
    drop_cls=False,
    pool=1,
):
    """Convert the sources into the dataset folder `out`; returns its meta.json. Raises DataError.

    The flags of the command line say what the arguments are.
    """
    out = Path(out)
    if (out / "meta.json").is_file() and not overwrite:
        raise DataError(f"{out} holds a dataset: choose another --out or pass --overwrite=True")
    if grid and not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", grid):
        raise DataError(f"--grid={grid} is not ROWSxCOLUMNS")
    if pool < 1:
        raise DataError(f"--pool={pool} must be 1 or more")
    asked = tuple(map(int, grid.split("x"))) if grid else None
    files, manifests = find_files(sources)
    for path in files:
        if path.name in FILES and path.resolve().parent == out.resolve():
            raise DataError(f"{path} is both a source and a file to be written")
    shards = pair_arrays(files)
    options = dict(dtype=dtype, grid=asked, drop_cls=drop_cls, pool=pool)
    load = functools.partial(load_shard, cond_key=cond_key, target_key=target_key, **options)
    load = functools.lru_cache(8)(load)
    counts = survey(shards, manifests, load)
    shard = load(shards[0])
    target = shard["target"]
    tokens = target.tokens * pool**2
    if asked and target.grid != (asked[0] // pool, asked[1] // pool):
        raise DataError(f"--grid={grid} is not ROWSxCOLUMNS of {tokens} tokens")
    if not target.grid:
        raise DataError(
            f"{tokens} target tokens are not a square; say --grid=ROWSxCOLUMNS or --drop_cls=True"
        )
    say_how_tokens_pair(shard["cond"].tokens, target.tokens)

    splits = np.full(sum(counts), "train")
    splits[split(len(splits), val_fraction, seed)[1]] = "val"
    shapes, size = {}, 0
    for name in ARRAYS:
        which, kind = name.split("_")
        shapes[name] = [int((splits == which).sum()), shard[kind].tokens, shard[kind].channels]
        size += math.prod(shapes[name]) * shard[kind].dtype.itemsize
    meta = dict(
        format_version=1,
        shapes=shapes,
        grid=list(target.grid),
        layout={kind: shard[kind].layout for kind in ("cond", "target")},
        cond_key=cond_key,
        target_key=target_key,
        val_fraction=val_fraction,
        seed=seed,
        dtype=dtype,
        drop_cls=drop_cls,
        pool=pool,
        sources=[dict(path=str(path.resolve()), bytes=path.stat().st_size) for path in files],
        config=plain(shard["content"].get("config")),
    )
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        for left_over in out.glob(".partial-*"):  # of a run that was killed
            shutil.rmtree(left_over)
        free = shutil.disk_usage(out).free
        if size > free:
            raise DataError(f"{out} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
            folder = Path(folder)
            totals = write_arrays(shards, counts, load, splits, shapes, folder)
            np.savez(folder / "stats.npz", **statistics(totals, shapes))
            (folder / "meta.json").write_text(json.dumps(meta, indent=1))
            (out / "meta.json").unlink(missing_ok=True)  # from here on there is no whole dataset
            for name in (*FILES, "meta.json"):
                os.replace(folder / name, out / name)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    return meta


def say_how_tokens_pair(cond_tokens, target_tokens):
    if cond_tokens == target_tokens:
        return
    line = f"{cond_tokens} condition tokens for {target_tokens} target tokens: "
    line += "the model will use cross-attention"
    if cond_tokens == target_tokens + 1:
        line += "; --drop_cls=True drops the first one, which aligns them"
    print(line)


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
    add = parser.add_argument
    flag = dict(type=yes_or_no, default=False, metavar="True|False")
    expand = os.path.expanduser  # the shell leaves the ~ in --out=~/data
    add(
        "sources",
        nargs="+",
        type=expand,
        metavar="SRC",
        help="a pickle or .pt file, a folder of them, or .npy files",
    )
    add("--out", type=expand, metavar="DIR", help="the dataset's folder")
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
        "--pool",
        type=int,
        default=1,
        help="average squares of POOL x POOL tokens (default: %(default)s)",
    )
    add("--overwrite", **flag, help="replace the dataset in DIR, once the new one is whole")
    add("--inspect", **flag, help="print what the sources hold and convert nothing")
    args = vars(parser.parse_args())
    only_inspect = args.pop("inspect")
    out = args["out"]
    if not out and not only_inspect:
        parser.error("--out=DIR is required")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up as after Ctrl-C
    try:
        if only_inspect:
            return inspect(find_files(args["sources"])[0])
        meta = prepare(**args)
    except DataError as e:  # names in a hostile file may hold what a terminal obeys
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(e)[:2000])
        sys.exit(f"error: {line}")
    except OSError as e:
        sys.exit(f"error: {e}; no new dataset was left in {out}")
    except KeyboardInterrupt:
        sys.exit(f"error: interrupted; no new dataset was left in {out}")
    print(f"{out}: grid {meta['grid'][0]}x{meta['grid'][1]}")
    for name, shape in meta["shapes"].items():
        path = Path(out) / f"{name}.npy"
        dtype = meta["layout"][name.split("_")[1]][2]
        megabytes = path.stat().st_size / 1e6
        print(f"  {path.name:17} {str(tuple(shape)):18} {dtype:8} {megabytes:10.1f} MB")


if __name__ == "__main__":
    main()
