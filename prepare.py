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
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.dataset import ARRAYS, FILES
from plumbing.sources import DataError, find_files, inspect, items, load_shard, pair_arrays, plain

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

    Returns the number of samples in each shard, and the repr() of every sample's key: a string,
    since integers can be chosen to have the same hash.
    """
    first = load(shards[0])
    counts, keys = [], []
    for paths in shards:
        shard = load(paths)
        for kind in ("cond", "target"):
            found = shard[kind].layout, shard[kind].grid
            expected = first[kind].layout, first[kind].grid
            if found != expected:
                raise DataError(f"{paths[0]}: {kind} is {found}, but {expected} in {shards[0][0]}")
        counts.append(len(shard["cond"]))
        keys += [repr(item["key"]) for item in items(shard["content"], counts[-1], paths[0])]
    for key, count in collections.Counter(keys).items():
        if count > 1 and key != "None":
            raise DataError(f"the key {key[:80]} is there twice")
    for folder, (n_samples, n_shards) in manifests.items():
        held = [n for paths, n in zip(shards, counts) if paths[0].parent == folder]
        if (n_samples, n_shards) != (sum(held), len(held)):
            raise DataError(
                f"{folder}: its manifest promises {n_samples} samples in {n_shards} shards, "
                f"its pickles hold {sum(held)} in {len(held)}"
            )
    return counts, keys


# ---------------------------------------------------------------- the second pass: convert


def moments(samples):
    """Sums over samples and tokens of the values and of their squares: (n, T, C) -> float64 (2, C).

    A channel with NaN, Inf or an overflow has sums that are not finite.
    """
    tokens = samples.reshape(-1, samples.shape[-1])  # (n * T, C)
    step = max(1, BLOCK // tokens.shape[1])
    sums = np.zeros((2, tokens.shape[1]))
    with np.errstate(all="ignore"):
        for start in range(0, len(tokens), step):
            block = tokens[start : start + step].astype(np.float64)
            sums[0] += block.sum(0)
            sums[1] += np.einsum("nc,nc->c", block, block)
    return sums


def convert(rows, splits, pool):
    """Yield (samples, their moments), in order, in runs of samples that go to the same split.

    splits: the split of each row, "train" or "val"
    """
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


def open_files(stack, folder, shapes, layout):
    """{name: file} for the arrays, their headers written, and for the items of either split."""
    files = {}
    for name, shape in shapes.items():
        files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
        _, _, dtype = layout[name.split("_")[1]]
        header = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=tuple(shape))
        np.lib.format.write_array_header_1_0(files[name], header)
    for which in ("train", "val"):
        files[which] = stack.enter_context(open(folder / f"{which}_items.jsonl", "w"))
    return files


def write_arrays(shards, counts, load, splits, keys, files):
    """Write all samples and items, in order, each to its split; return the moments per array."""
    totals = collections.Counter()
    not_finite = {}  # number of a sample -> "cond" or "target"
    n_before = 0  # samples in the shards before
    with ThreadPoolExecutor(2) as pool, tqdm(total=2 * len(splits), desc="converting") as bar:
        for paths, n in zip(shards, counts):
            shard = load(paths)
            if len(shard["cond"]) != n:
                raise DataError(f"{paths[0]}: changed while it was read")
            names = splits[n_before : n_before + n]
            for which, item in zip(names, items(shard["content"], n, paths[0])):
                files[which].write(json.dumps(item) + "\n")
            for kind in ("cond", "target"):
                i = 0  # samples of the shard that are written
                for samples, sums in convert(shard[kind], names, pool):
                    name = f"{names[i]}_{kind}"
                    files[name].write(samples)
                    totals[name] = totals[name] + sums
                    if not np.isfinite(sums).all():
                        for row in range(len(samples)):
                            if not np.isfinite(moments(samples[row : row + 1])).all():
                                not_finite.setdefault(n_before + i + row, kind)
                    i += len(samples)
                    bar.update(len(samples))
            n_before += n
    if not_finite:
        i = min(not_finite)
        raise DataError(
            f"NaN or Inf in {len(not_finite)} of {len(splits)} samples, "
            f"the first in the {not_finite[i]} of sample {i} (key {keys[i]})"
        )
    return totals


def statistics(totals, shapes):
    """Mean and standard deviation of each channel over the tokens of the training split."""
    stats = {}
    for kind in ("cond", "target"):
        n_samples, n_tokens, _ = shapes[f"train_{kind}"]
        mean, square = totals[f"train_{kind}"] / (n_samples * n_tokens)  # (C,) each
        variance = square - mean**2
        variance[variance < 1e-12 * square] = 0  # less is only rounding
        stats[f"{kind}_mean"] = mean
        stats[f"{kind}_std"] = np.sqrt(variance)
    return stats


# ---------------------------------------------------------------- the dataset on disk


def prepare(args):
    """Convert what the command line names; returns the content of meta.json. Raises DataError."""
    out = Path(args.out)
    if (out / "meta.json").is_file() and not args.overwrite:
        raise DataError(f"{out} holds a dataset: choose another --out or pass --overwrite=True")
    if args.pool < 1:
        raise DataError(f"--pool={args.pool} must be 1 or more")
    paths, manifests = find_files(args.sources)
    for path in paths:
        if path.name in FILES and path.resolve().parent == out.resolve():
            raise DataError(f"{path} is both a source and a file to be written")
    shards = pair_arrays(paths)

    @functools.lru_cache(8)
    def load(paths):
        options = dict(dtype=args.dtype, grid=args.grid, drop_cls=args.drop_cls, pool=args.pool)
        return load_shard(paths, args.cond_key, args.target_key, **options)

    counts, keys = survey(shards, manifests, load)
    shard = load(shards[0])
    layout = {kind: shard[kind].layout for kind in ("cond", "target")}
    grid = shard["target"].grid
    check_tokens(layout["cond"][0], layout["target"][0], grid, args)
    splits = np.full(sum(counts), "train")
    splits[split(len(splits), args.val_fraction, args.seed)[1]] = "val"
    shapes = {}
    for name in ARRAYS:
        which, kind = name.split("_")
        shapes[name] = [int((splits == which).sum()), *layout[kind][:2]]
    meta = dict(
        shapes=shapes,
        grid=grid,
        layout=layout,
        settings=vars(args),
        sources=[dict(path=str(path.resolve()), bytes=path.stat().st_size) for path in paths],
        config=plain(shard["content"].get("config")),
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        for left_over in out.glob(".partial-*"):  # of a run that was killed
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
            folder = Path(folder)
            with contextlib.ExitStack() as stack:
                files = open_files(stack, folder, shapes, layout)
                totals = write_arrays(shards, counts, load, splits, keys, files)
            np.savez(folder / "stats.npz", **statistics(totals, shapes))
            (folder / "meta.json").write_text(json.dumps(meta, indent=1))
            # without meta.json there is no dataset, until all of the new one is in place
            (out / "meta.json").unlink(missing_ok=True)
            for name in (*FILES, "meta.json"):
                os.replace(folder / name, out / name)
    finally:
        with contextlib.suppress(OSError):  # which says that it is not empty
            out.rmdir()
    return meta


def check_tokens(cond_tokens, target_tokens, grid, args):
    """Refuse target tokens without a grid; say what other condition tokens mean for the model."""
    in_source = target_tokens * args.pool**2
    if args.grid and math.prod(args.grid) != in_source:
        asked = "x".join(map(str, args.grid))
        raise DataError(f"--grid={asked} is not ROWSxCOLUMNS of {in_source} tokens")
    if not grid:
        raise DataError(
            f"{in_source} target tokens are not a square; "
            "say --grid=ROWSxCOLUMNS or --drop_cls=True"
        )
    if cond_tokens != target_tokens:
        line = f"{cond_tokens} condition tokens for {target_tokens} target tokens: "
        line += "the model will use cross-attention"
        if cond_tokens == target_tokens + 1:
            line += "; --drop_cls=True drops the first one, which aligns them"
        print(line)


# ---------------------------------------------------------------- the command line


def yes_or_no(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"takes True or False, not {text!r}")
    return text == "True"


def rows_x_columns(text):
    rows, columns = map(int, text.split("x"))
    if min(rows, columns) < 1:
        raise ValueError
    return rows, columns


def parse_args(command_line=None):
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
        type=rows_x_columns,
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
    args = parser.parse_args(command_line)
    if not args.out and not args.inspect:
        parser.error("--out=DIR is required")
    return args


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up as after Ctrl-C
    try:
        if args.inspect:
            return inspect(find_files(args.sources)[0])
        meta = prepare(args)
    except DataError as e:  # names in a hostile file may hold what a terminal obeys
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(e)[:2000])
        sys.exit(f"error: {line}")
    except (OSError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'interrupted'}; no new dataset was left in {args.out}")
    print(f"{args.out}: grid {meta['grid'][0]}x{meta['grid'][1]}")
    for name in ARRAYS:
        array = np.load(Path(args.out) / f"{name}.npy", mmap_mode="r")
        shape, dtype, megabytes = str(array.shape), array.dtype.name, array.nbytes / 1e6
        print(f"  {name + '.npy':17} {shape:18} {dtype:8} {megabytes:10.1f} MB")


if __name__ == "__main__":
    main()
