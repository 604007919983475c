"""
Turn files of paired embeddings into memory-mapped arrays, without trusting the files.

    python prepare.py embeddings.pkl --out=data/mine
    python prepare.py shards/ more.pt --out=data/mine --val_fraction=0.05 --dtype=float16
    python prepare.py cond.npy target.npy --out=data/mine
    python prepare.py pairs/ --out=data/mine                 # pairs/cond/*.npy, pairs/target/*.npy
    python prepare.py embeddings.pkl --inspect=True          # what is in it? converts nothing
    python prepare.py --help

A source is a pickle, torch.save or safetensors file, or a folder of them (read in natural order,
checked against embeddings_manifest.json if there is one), or .npy files, first the conditions, then
as many targets, or a folder of .npy files in cond/ and target/, paired by their names.

A file holds a dict with two entries of N samples, each an array or tensor (N, tokens, channels),
(N, rows, columns, channels) or, pooled, (N, channels), or a list of (tokens, channels) samples,
(channels,) vectors or (n, tokens, channels) batches; and, if you like, lists `captions`, `keys` and
`labels` and a dict `config`. In a folder of .npy pairs, a file is one element of such a list.

DIR then holds train_*.npy and val_*.npy, *_items.jsonl, stats.npz and meta.json. They are made in a
temporary folder inside DIR and moved once all are complete, meta.json last.
"""

import array
import contextlib
import functools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from plumbing.configurator import check_numbers, configure_paths, set_up_console
from plumbing.dataset import ARRAYS, FILES, KINDS, made_ahead, statistics
from plumbing.sources import (
    DataError,
    Rows,
    describe,
    find_files,
    items,
    load_contents,
    load_shard,
    plain,
)  # fmt: skip

SLICE = 1 << 20  # bytes of samples, of both kinds, that are converted at a time: they fit the cache

# ---- the dataset
out = ""  # DIR, its folder
overwrite = False  # replace the dataset in DIR, once the new one is whole
inspect = False  # print what the sources hold and convert nothing
# ---- the sources
cond_key = "eva_blip3o_embeddings"  # key of the conditions
target_key = "clip_blip3o_embeddings"  # key of the targets
grid = ""  # ROWSxCOLUMNS of tokens, if they are not a square
# ---- conversion
dtype = "source"  # of the arrays: float16 | float32 | source (as it is there)
channels_first = False  # embeddings are (N, channels, tokens) or (N, channels, rows, columns)
drop_tokens = 0  # drop the first so many, class token and registers, where they exceed a grid
drop_cls = False  # the same as drop_tokens=1
pool = 1  # average squares of pool x pool tokens
skip_bad = False  # leave out samples with NaN, Inf or too large values
# ---- split
val_fraction = 0.1  # share of samples held out
seed = 0  # of the permutation that chooses them
# ----


def split(n, val_fraction, seed):
    """Sorted indices (train, val) of n samples, by a permutation from the seed."""
    n_val = round(n * val_fraction)
    if not 0 < n_val < n:
        raise DataError(
            f"{n} samples with val_fraction={val_fraction} leave {n - n_val} for training "
            f"and {n_val} for validation"
        )
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[n_val:]), np.sort(order[:n_val])


# ---------------------------------------------------------------- the first pass: what there is


def survey(shards, load):
    """Compare the shards with each other; no embedding is read.

    Returns the first shard and a Counter of the samples in each folder.
    """
    first = load(shards[0])
    counts, hashes = Counter(), array.array("q")  # 8 bytes per sample
    for paths in shards:
        shard = load(paths)
        for kind in KINDS:
            if shard[kind].layout != first[kind].layout:
                raise DataError(
                    f"{paths[0]}: {kind} is {shard[kind].layout}, "
                    f"but {first[kind].layout} in {shards[0][0]}"
                )
        n = len(shard["cond"])
        counts[paths[0].parent] += n
        promised = plain(shard["content"].get("total_samples", n))
        if promised != n:
            print(f"WARNING: {paths[0]}: its total_samples is {promised}, but it holds {n}")
        for item in items(shard["content"], n, paths[0]):
            if item["key"] is not None:
                hashes.append(hash(repr(item["key"])))
    hashes = np.sort(hashes)  # np.unique would make a table of 50 bytes per sample
    repeated = (np.diff(hashes) == 0).sum()
    if repeated:
        print(f"WARNING: {repeated} samples have the key of an earlier one")
    return first, counts


def check_manifests(sources, counts):
    """The folders that have a manifest must hold as many samples as it promises."""
    for folder in map(Path, sources):
        manifest = folder / "embeddings_manifest.json"
        if manifest.is_file():
            promised = json.loads(manifest.read_text()).get("total_samples")
            if promised != counts[folder]:
                raise DataError(
                    f"{manifest} promises {promised} samples, the files hold {counts[folder]}"
                )


# ---------------------------------------------------------------- the second pass: convert


def moments(samples):
    """The number of tokens and sums over them of values and of squares: (n, T, C) -> float64
    (n, 3, C).

    A sample with NaN, Inf or an overflow has sums that are not finite.
    """
    wide = samples.astype(np.float64)
    total = wide.sum(1)  # (n, C)
    count = np.full_like(total, samples.shape[1])
    return np.stack([count, total, np.einsum("ntc,ntc->nc", wide, wide)], 1)


def convert(shard, is_val):
    """Yield the samples in order, in slices: ({kind: samples}, {kind: moments}, is_good).

    is_good: whether each sample is finite, (n,)
    is_val: whether it goes to the validation split; the moments (3, C) are of the other good ones
    """
    n = len(is_val)
    step = max(1, SLICE * n // sum(shard[kind].nbytes for kind in KINDS))
    for start in range(0, n, step):
        part = slice(start, start + step)
        with np.errstate(all="ignore"):  # NaN, Inf and an overflow remain in every sum
            samples = {kind: shard[kind][part] for kind in KINDS}  # (n, T, C)
            sums = {kind: moments(x) for kind, x in samples.items()}  # (n, 3, C)
            is_good = np.isfinite(sum(x.sum((1, 2)) for x in sums.values()))
        train = is_good & ~is_val[part]
        sums = {kind: x[train].sum(0) for kind, x in sums.items()}
        yield samples, sums, is_good


def write_headers(files, layout, counts):
    """Write the headers of the arrays, which have room for any counts; returns the shapes."""
    shapes = {}
    for name in ARRAYS:
        which, kind = name.split("_")
        tokens, channels, dtype, _ = layout[kind]
        shapes[name] = counts[which], tokens, channels
        header = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shapes[name])
        file = files[f"{name}.npy"]
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
    return shapes


def write_arrays(shards, load, is_val, files):
    """Write all samples and items, in order, each to its split.

    Returns the moments {"cond": (3, C), "target": (3, D)} of the training split, and the number of
    samples in each split.
    """
    totals, counts, left_out = Counter(), Counter(), []
    i = 0  # samples that are written
    for paths in shards:
        shard = load(paths)
        n = len(shard["cond"])
        rows = items(shard["content"], n, paths[0])
        for samples, sums, is_good in made_ahead(convert(shard, is_val[i : i + n])):
            totals.update(sums)
            for good, item, cond, target in zip(is_good, rows, *samples.values()):
                if i % 1000 == 0:
                    print(f"\r{i:,} of {len(is_val):,} samples", end="", file=sys.stderr)
                if good:
                    which = "val" if is_val[i] else "train"
                    counts[which] += 1
                    files[f"{which}_cond.npy"].write(cond)
                    files[f"{which}_target.npy"].write(target)
                    files[f"{which}_items.jsonl"].write(f"{json.dumps(item)}\n".encode())
                else:
                    left_out.append(f"sample {i} (key {item['key']!r:.80})")
                i += 1
    if left_out:
        line = f"NaN, Inf or too large values in {len(left_out)} of {i} samples"
        if not skip_bad or len(counts) < 2:  # or all of a split are bad
            raise DataError(f"{line}, the first in {left_out[0]}; --skip_bad=True leaves them out")
        print(f"WARNING: {line}, left out: {', '.join(left_out)}")
    return totals, counts


# ---------------------------------------------------------------- the dataset on disk


def prepare(sources, config):
    """Convert the sources as the settings say; returns the content of meta.json.

    config: all settings, for meta.json. Raises DataError.
    """
    folder = Path(out)
    meta_path = folder / "meta.json"
    partial = folder / ".partial-dataset"
    names = (*FILES, "meta.json")
    written = [(folder / name).resolve() for name in names]
    is_ours = meta_path.is_file() and '"layout"' in meta_path.read_text()
    if is_ours and not overwrite:
        raise DataError(f"{out} holds a dataset: choose another --out or pass --overwrite=True")
    if not is_ours and not partial.exists():
        for path in written:
            if path.exists():
                raise DataError(
                    f"{out} holds {path.name}, but no dataset of prepare.py: choose another --out"
                )
    if dtype not in ("source", "float16", "float32"):
        raise DataError(f"--dtype={dtype} is not source, float16 or float32")
    if not re.fullmatch(r"([1-9]\d*x[1-9]\d*)?", grid):
        raise DataError(f"--grid={grid} is not ROWSxCOLUMNS")
    shards, arrays = find_files(sources)
    half, odd = divmod(len(arrays), 2)
    if odd:
        raise DataError(
            f"{len(arrays)} .npy files: name all conditions first, then as many targets"
        )
    shards += zip(arrays[:half], arrays[half:])
    paths = [path for files in shards for path in files]
    for path in paths:
        if path.resolve() in written:
            raise DataError(f"{path} is both a source and a file to be written")

    @functools.lru_cache(2)
    def load(paths):
        return load_shard(paths, **config)

    shard, counts = survey(shards, load)
    check_manifests(sources, counts)
    layout = {kind: shard[kind].layout for kind in KINDS}
    n = counts.total()
    _, val = split(n, val_fraction, seed)
    is_val = np.zeros(n, bool)
    is_val[val] = True
    partial.mkdir(parents=True, exist_ok=True)  # it is there where a run was killed
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(partial / name, "wb")) for name in FILES}
            write_headers(files, layout, Counter())
            totals, counts = write_arrays(shards, load, is_val, files)
            shapes = write_headers(files, layout, counts)
        np.savez(
            partial / "stats.npz",
            cond_moments=totals["cond"],
            target_moments=totals["target"],
            **statistics(totals),
        )
        meta = dict(
            shapes=shapes,
            grid=shard["target"].grid,
            layout=layout,
            settings=config,
            sources=[dict(path=str(path.resolve()), bytes=path.stat().st_size) for path in paths],
            config=plain(shard["content"].get("config")),
        )
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        # without meta.json there is no dataset, until all of the new one is in place
        meta_path.unlink(missing_ok=True)
        for name in names:
            (partial / name).replace(folder / name)
    finally:
        print(file=sys.stderr)  # ends the line that shows the progress
        shutil.rmtree(partial)
    return meta


# ---------------------------------------------------------------- the command line


def print_contents(shards, arrays):
    """Print what the files hold, with the value range of the first samples."""
    for paths in shards + [[path] for path in arrays]:
        for path, content in zip(paths, load_contents(paths)):
            print(f"{path}:")
            for key, value in content.items():
                line = f"  {str(key)[:80]!r}: {describe(value)}"
                with contextlib.suppress(DataError):  # which says that these are no embeddings
                    rows = Rows(content, key, path)
                    x = rows[:8]
                    numbers = f"the first {len(x)} from {x.min():.4g} to {x.max():.4g}"
                    line += f"; {len(rows)} samples, {numbers}"
                print(line)


def main():
    set_up_console()
    config, sources = configure_paths(globals())
    check_numbers(config, positive="pool")
    if not sources or not (out or inspect):
        sys.exit("error: name sources and a folder: python prepare.py SRC [SRC ...] --out=DIR")
    try:
        if inspect:
            return print_contents(*find_files(sources))
        meta = prepare(sources, config)
    except DataError as e:  # names in a hostile file may hold what a terminal obeys
        sys.exit(f"error: {repr(str(e)[:2000])[1:-1]}")
    except (OSError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'interrupted'}; no new dataset was left in {out}")
    print(f"{out}: grid {meta['grid'][0]}x{meta['grid'][1]}")
    for name in ARRAYS:
        x = np.load(f"{out}/{name}.npy", mmap_mode="r")
        print(f"  {name + '.npy':17} {x.shape!s:18} {x.dtype.name:8} {x.nbytes / 1e6:10.1f} MB")
    n_cond = meta["layout"]["cond"][0]  # tokens
    n_target = meta["layout"]["target"][0]
    if n_cond != n_target:
        print(
            f"{n_cond} condition and {n_target} target tokens: the model will use cross-attention;"
            "\nif a class token makes the difference, --drop_cls=True aligns them"
        )


if __name__ == "__main__":
    main()
