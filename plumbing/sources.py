"""
What the sources of a dataset hold: shards of paired samples, opened without reading them.

unpickle.py opens a file. Here its entries become Rows, which convert samples a slice at a time.
"""

import contextlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np

from plumbing.dataset import KINDS, Joined
from plumbing.unpickle import BFLOAT16, DataError, describe, dtype_name
from plumbing.unpickle import load as load_pickle

CHANNELS = {*range(384, 9999, 128)}  # the usual numbers of channels
FLOATS = "float16 bfloat16 float32 float64".split()  # the types of embeddings


# ---------------------------------------------------------------- files


class Pair(tuple):
    """(cond/NAME.npy, target/NAME.npy): each is a sample, (channels,) or (tokens, channels), or a
    batch of samples."""


def natural_order(path):
    """A sort key of paths that puts shard_2 before shard_10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(path))


def list_folder(folder):
    """The shards in a folder, in natural order: (file,) of one kind, or Pairs."""
    for ending in ("pkl", "safetensors", "pt"):  # beside pickles, other files may be anything
        paths = sorted(folder.glob(f"*.{ending}"), key=natural_order)
        if paths:
            return [(path,) for path in paths]
    names = {path.name for kind in KINDS for path in folder.glob(f"{kind}/*.npy")}
    if not names:
        raise DataError(
            f"{folder}: no such file, and no folder of .pkl or .pt files, of .safetensors, "
            "or of cond/*.npy and target/*.npy"
        )
    # where a file has no partner, opening that fails
    names = sorted(names, key=natural_order)
    return [Pair(folder / kind / name for kind in KINDS) for name in names]


def find_files(sources):
    """(shards, arrays): the shards that the sources name, and the .npy files, of which two will be
    a shard."""
    shards, arrays = [], []
    for path in map(Path, sources):
        if path.suffix == ".npy":
            arrays.append(path)
        elif path.is_file():
            shards.append((path,))
        else:
            shards += list_folder(path)
    return shards, arrays


def load_contents(paths):
    """Yield the dicts in a shard's files. In a Pair, a single sample is named like its file."""
    for content in map(load_pickle, paths):
        array = content.get("array")
        if isinstance(paths, Pair) and getattr(array, "ndim", 3) < 3:
            content.update(array=array[None], keys=[paths[0].stem])
        yield content


def plain(value):
    """What JSON can hold of a value; "..." where a hostile file makes it too deep or too wide."""
    parts = json.JSONEncoder(default=describe).iterencode(value)
    try:
        return json.loads(
            "".join(itertools.islice(parts, 10_000)), parse_constant=lambda name: None
        )
    except (ValueError, RecursionError):
        return "..."


# ---------------------------------------------------------------- samples


def find_pieces(value, where):
    """The arrays (n, C), (n, T, C) or (n, H, W, C) that make up an entry, all of one kind."""
    pieces = [value]
    if isinstance(value, list) and value:
        pieces = [x[None] if getattr(x, "ndim", 3) < 3 else x for x in value]
    for piece in pieces:
        is_array = isinstance(piece, np.ndarray) and 1 < piece.ndim < 5 and piece.size
        is_float = is_array and dtype_name(piece) in FLOATS
        if not is_float or describe(piece[:1]) != describe(pieces[0][:1]):
            raise DataError(
                f"{where}: {describe(piece)}; expected floats of shape (samples, channels) or "
                "(samples, tokens, channels), the same in all of a list"
            )
    n, tokens, *_ = pieces[0].shape
    if len(pieces) > 1 and n == tokens > 1:
        raise DataError(f"{where}: samples (H, W, C) or batches (n, T, C)? stack them")
    return pieces


class Rows:
    """The samples of one entry of a file, converted when a slice rows[i:j] is taken.

    The entry is an array (N, C), which is one token, (N, T, C) or (N, H, W, C), or a list of (C,)
    or (T, C) samples or of (n, T, C) or (n, H, W, C) batches.
    The options are the settings of prepare.py, of which the others do not matter here.
    """

    def __init__(
        self, content, key, path,
        dtype="source", grid="", drop_tokens=0, drop_cls=False, pool=1, channels_first=False,
        **others,
    ):  # fmt: skip
        if key not in content:
            raise DataError(
                f"{path}: no key {key!r} (choose --cond_key, --target_key); "
                f"it holds {str(list(content))[:200]}"
            )
        where = f"{path}: {key}"
        pieces = find_pieces(content[key], where)
        if channels_first:
            pieces = [np.moveaxis(piece, 1, -1) for piece in pieces]
        self.pieces = Joined(pieces)
        self.base = pieces[0]  # drop_pages looks for it, by numpy's name for what is viewed
        self.nbytes = sum(piece.nbytes for piece in pieces)
        if self.nbytes > path.stat().st_size:
            raise DataError(f"{where} repeats the same arrays: it is larger than the file")
        _, *shape, channels = self.base.shape
        tokens = math.prod(shape)
        asked = tuple(map(int, re.findall(r"\d+", grid)))
        # (N, H, W, C) of no square may be (N, C, H, W), and (N, T, C) may be (N, C, T)
        is_swapped = CHANNELS.intersection(shape) and channels not in CHANNELS
        self.is_unclear = not asked and (is_swapped or len(set(shape)) > 1)
        self.question = (
            f"{where}: {tokens} tokens of {channels} channels are not "
            f"{asked or 'clearly a square'}; say --grid=ROWSxCOLUMNS, --channels_first=True, "
            "--drop_cls=True or --drop_tokens=5"
        )
        grid, self.n_dropped = None, 0
        for drop in (0, drop_tokens or drop_cls):
            side = math.isqrt(abs(tokens - drop))
            expected = asked or (side, side)
            if 0 < math.prod(expected) == tokens - drop <= tokens:
                grid, self.n_dropped = expected, drop
        tokens -= self.n_dropped
        self.pool = min(pool, tokens)  # embeddings of one token are pooled already
        if self.pool > 1:
            grid = tuple(side // pool for side in grid or (0, 0))
            if math.prod(grid) * pool**2 != tokens:
                raise DataError(
                    f"{where}: {tokens} tokens are not a grid that --pool={pool} divides"
                )
            tokens = math.prod(grid)
        if dtype == "source":
            dtype = dtype_name(self.base).replace("bfloat16", "float32")
        self.grid, self.dtype = grid, dtype
        self.layout = [tokens, channels, dtype, grid]

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, rows):
        """Samples (n, T, C) in C order, a view of the file where nothing has to be converted.
        Values that are too large become Inf."""
        x = self.pieces[rows]
        if x.dtype == BFLOAT16:
            x = (x["bfloat16"].astype("uint32") << 16).view("float32")
        n, *_, C = x.shape
        p = self.pool
        x = x.reshape(n, -1, C)[:, self.n_dropped :]  # (n, H * W, C)
        if p > 1:
            x = x.reshape(n, -1, p, self.grid[1], p, C)  # (n, H, p, W, p, C)
            x = x.mean((2, 4), np.result_type(x, "float32")).reshape(n, -1, C)  # (n, T, C)
        return np.ascontiguousarray(x, self.dtype)


def load_shard(paths, cond_key, target_key, **options):
    """dict(cond, target, content) of a file, or of a .npy of conditions and one of targets.

    cond and target are Rows with these options; content is all that the first file holds.
    """
    if len(paths) == 2:
        cond_key = target_key = "array"
    contents = list(load_contents(paths))
    cond = Rows(contents[0], cond_key, paths[0], **options)
    target = Rows(contents[-1], target_key, paths[-1], **options)
    if len(cond) != len(target):
        raise DataError(f"{paths[0]}: {len(cond)} conditions but {len(target)} targets")
    for rows in (cond, target):
        if rows.is_unclear or rows is target and not rows.grid:
            raise DataError(rows.question)
    return dict(cond=cond, target=target, content=contents[0])


# ---------------------------------------------------------------- keys, captions and labels


def items(content, n, path):
    """An iterator of {"key": ..., "caption": ...} of each of a file's n samples, with a "label" if
    it has labels. A caption or a label may be a list."""
    columns = dict.fromkeys(("key", "caption"), [None] * n)
    room = 3 * path.stat().st_size
    for name in ("key", "caption", "label"):
        values = content.get(f"{name}s")
        if values is None:
            continue
        if getattr(values, "shape", None) == (n,):
            with contextlib.suppress(ValueError, SystemError):  # its bytes are no text (numpy)
                values = values.tolist()
        if not isinstance(values, list) or len(values) != n:
            raise DataError(f"{path}: {name}s is not a list of {n} strings: {describe(values)}")
        columns[name] = values
        for value in values:
            for text in value if isinstance(value, list | tuple) and name != "key" else [value]:
                if type(text) not in (str, int, type(None)):
                    raise DataError(f"{path}: {name}s hold {describe(text)}, not text or integers")
                room -= 1 + len(str(text))
            if room < 0:
                raise DataError(f"{path}: keys or captions repeat the same strings endlessly")
    return (dict(zip(columns, values)) for values in zip(*columns.values()))
