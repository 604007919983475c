"""
What the sources of a dataset hold: shards of paired samples, opened without reading them.

unpickle.py opens a file. Here its entries become Rows, which convert samples a slice at a time.
"""

import contextlib
import itertools
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np

from plumbing import unpickle

# the types of arrays that are read -> what they become
FLOATS = {np.dtype(order + name): np.dtype(name) for order in "<>" for name in ("f2", "f4", "f8")}
FLOATS[unpickle.BFLOAT16] = np.dtype("f4")


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


# ---------------------------------------------------------------- files


def natural_order(path):
    """A sort key that puts shard_2 before shard_10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), path.name)


def find_files(sources):
    """The files that the sources name, and {folder: its manifest} of the folders that have one."""
    files, manifests = [], {}
    for source in map(Path, sources):
        if source.is_file():
            files.append(source)
            continue
        if not source.is_dir():
            raise DataError(f"{source}: no such file or folder")
        found = [path for path in source.iterdir() if path.suffix in (".pkl", ".pickle")]
        if not found:  # beside pickles, torch files may be anything
            found = [path for path in source.iterdir() if path.suffix in (".pt", ".pth")]
        if not found:
            raise DataError(f"{source}: a folder without .pkl or .pt files")
        files += sorted(found, key=natural_order)
        manifest = source / "embeddings_manifest.json"
        if manifest.is_file():
            manifests[source] = read_manifest(manifest, len(found))
    return files, manifests


def read_manifest(path, n_shards):
    """(samples, shards) that a manifest promises; it may leave out the number of shards."""
    try:
        manifest = json.loads(path.read_text())
        return int(manifest["total_samples"]), manifest.get("total_shards", n_shards)
    except Exception as e:  # JSON may hold anything
        raise DataError(f"{path}: no readable total_samples in it") from e


def pair_arrays(files):
    """The files as shards: (pickle,) or (conditions.npy, targets.npy)."""
    arrays = [path for path in files if path.suffix == ".npy"]
    shards = [(path,) for path in files if path.suffix != ".npy"]
    half, odd = divmod(len(arrays), 2)
    if odd:
        raise DataError(
            f"{len(arrays)} .npy files: name all conditions first, then as many targets"
        )
    return shards + list(zip(arrays[:half], arrays[half:]))


def load_pickle(path):
    """The dict in a pickle, .pt or .npy file: see unpickle.load. Raises DataError."""
    try:
        content = unpickle.load(path)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except pickle.UnpicklingError as e:
        raise DataError(f"{path}: not a readable pickle of embeddings: {e}") from e
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict of embeddings")
    return content


# ---------------------------------------------------------------- in words


def describe(value):
    """One line on what a file holds under a key."""
    if isinstance(value, np.ndarray):
        kind = "tensor" if isinstance(value, unpickle.Tensor) else "array"
        dtype = "bfloat16" if value.dtype == unpickle.BFLOAT16 else value.dtype.name
        return f"{kind} {value.shape} {dtype}"
    if isinstance(value, list) and value:
        return f"list of {len(value)}, first {json.dumps(plain(value[0]))[:1000]}"
    if isinstance(value, (dict, str, int, float)):
        return json.dumps(plain(value))[:1000]
    return type(value).__name__


def plain(value):
    """What JSON can hold of a value; "..." where a hostile file makes it too deep or too wide."""
    parts = json.JSONEncoder(default=describe).iterencode(value)
    try:
        return json.loads("".join(itertools.islice(parts, 10_000)))
    except (ValueError, RecursionError):
        return "..."


# ---------------------------------------------------------------- samples


def find_grid(tokens, asked):
    """(H, W) of that many tokens: as asked, or a square; None if neither."""
    if asked and math.prod(asked) == tokens:
        return asked
    side = math.isqrt(tokens)
    return (side, side) if 0 < tokens == side**2 else None


def find_pieces(value, where):
    """The arrays (n, tokens, channels) or (n, rows, columns, channels) that make up an entry."""
    pieces = value if isinstance(value, list) else [value]
    for piece in pieces or [value]:
        if not isinstance(piece, np.ndarray) or piece.dtype not in FLOATS:
            raise DataError(f"{where} is {describe(piece)}, not an array of floats")
    if len(pieces) > 1 and all(p.ndim == 3 and 1 < p.shape[0] == p.shape[1] for p in pieces):
        raise DataError(f"{where}: samples (H, W, C) or batches (n, T, C)? stack them")
    if isinstance(value, list):
        pieces = [piece[None] if piece.ndim == 2 else piece for piece in pieces]
    for piece in pieces:
        if piece.ndim not in (3, 4) or 0 in piece.shape:
            raise DataError(
                f"{where} has shape {piece.shape}; expected (samples, tokens, channels)"
            )
    kinds = sorted({describe(piece[:1]) for piece in pieces})
    if len(kinds) > 1:
        raise DataError(f"{where} mixes {kinds[0]} and {kinds[1]}")
    return pieces


class Rows:
    """The samples of one entry of a file, converted when a slice rows[i:j] is taken.

    The entry is an array (N, T, C) or (N, H, W, C), or a list of (T, C) samples or of such arrays.
    dtype, grid, drop_cls and pool are what prepare.py's flags say, the grid as (H, W).
    """

    def __init__(self, content, key, path, dtype="source", grid=None, drop_cls=False, pool=1):
        self.where = f"{path}: {key}"
        if key not in content:
            entries = itertools.islice(content.items(), 20)
            held = ", ".join(f"{str(name)[:80]!r}: {describe(x)}" for name, x in entries)
            raise DataError(
                f"{path}: no key {key!r} (choose with --cond_key, --target_key); "
                f"it holds {held or 'nothing'}"
            )
        self.pieces = find_pieces(content[key], self.where)
        self.ends = np.cumsum([len(piece) for piece in self.pieces])
        self.nbytes = sum(piece.nbytes for piece in self.pieces)
        if self.nbytes > path.stat().st_size:
            raise DataError(f"{self.where} repeats the same arrays: it is larger than the file")
        _, *shape, self.channels = self.pieces[0].shape
        tokens = math.prod(shape)
        self.n_cls = 0  # tokens to drop in front
        if drop_cls and len(shape) == 1 and find_grid(tokens - 1, grid):
            self.n_cls = 1
        self.grid = tuple(shape) if len(shape) == 2 else find_grid(tokens - self.n_cls, grid)
        self.pool = pool
        if pool > 1:
            if not self.grid or self.grid[0] % pool or self.grid[1] % pool:
                raise DataError(
                    f"{self.where}: --pool={pool} does not divide its grid, {self.grid}"
                )
            self.grid = self.grid[0] // pool, self.grid[1] // pool
        self.tokens = (tokens - self.n_cls) // pool**2
        self.dtype = FLOATS[self.pieces[0].dtype] if dtype == "source" else np.dtype(dtype)
        self.layout = [self.tokens, self.channels, self.dtype.name]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, rows):
        """Samples (n, T, C) in C order, a view of the file where nothing has to be converted."""
        unpickle.drop_pages(self.pieces[0])  # which earlier slices have read
        start, stop, _ = rows.indices(len(self))
        first, last = np.searchsorted(self.ends, (start, stop - 1), "right")
        parts = []
        for i in range(first, last + 1):
            offset = self.ends[i] - len(self.pieces[i])
            parts.append(self.convert(self.pieces[i][max(start - offset, 0) : stop - offset]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def convert(self, x):
        """Some samples of a piece -> (n, T, C). Raises DataError where a finite value overflows."""
        if x.dtype == unpickle.BFLOAT16:
            x = (x["bfloat16"].astype(np.uint32) << 16).view(np.float32)
        x = x.reshape(len(x), -1, self.channels)[:, self.n_cls :]  # (n, H * W, C)
        if self.pool > 1:
            p, (height, width) = self.pool, self.grid
            x = x.reshape(len(x), height, p, width, p, self.channels)
            wide = np.promote_types(x.dtype, np.float32)
            x = x.mean((2, 4), dtype=wide)  # (n, H, W, C)
            x = x.reshape(len(x), -1, self.channels)  # (n, T, C)
        try:
            with np.errstate(over="raise"):
                return np.ascontiguousarray(x, self.dtype)
        except FloatingPointError as e:
            worst = np.abs(x[np.isfinite(x)]).max()
            raise DataError(f"{self.where}: {worst:g} is too large for {self.dtype}") from e


def load_shard(paths, cond_key, target_key, **options):
    """dict(cond, target, content) of a pickle, or of a .npy of conditions and one of targets.

    cond and target are Rows with these options; content is all that the pickle holds.
    """
    content = load_pickle(paths[0])
    if len(paths) == 2:
        arrays = [load_pickle(path).get("array") for path in paths]
        content = dict(zip((cond_key, target_key), arrays))
    cond = Rows(content, cond_key, paths[0], **options)
    target = Rows(content, target_key, paths[-1], **options)
    if len(cond) != len(target):
        raise DataError(f"{paths[0]}: {len(cond)} conditions but {len(target)} targets")
    if cond.tokens == target.tokens and cond.grid != target.grid:
        raise DataError(
            f"{paths[0]}: a grid of {cond.grid} in a condition but {target.grid} in a target"
        )
    if options.get("drop_cls") and not cond.n_cls and not target.n_cls:
        raise DataError(
            f"{paths[0]}: --drop_cls=True, but {cond.tokens} and {target.tokens} tokens "
            "are no grid and one more"
        )
    return dict(cond=cond, target=target, content=content)


# ---------------------------------------------------------------- keys and captions


def items(content, n, path):
    """Yields {"key": ..., "caption": ...} of each of a file's n samples."""
    columns = []
    for name in ("keys", "captions"):
        values = content.get(name)
        if values is None:
            values = [None] * n
        if isinstance(values, np.ndarray) and values.shape == (n,):
            try:
                values = values.tolist()
            except Exception as e:  # numpy does not take all bytes for text
                raise DataError(f"{path}: {name}: {e}") from e
        if not isinstance(values, list) or len(values) != n:
            raise DataError(f"{path}: {name} is not a list of {n} strings or integers")
        columns.append(values)
    room = path.stat().st_size
    for key, caption in zip(*columns):
        for value in (key, caption):
            if not isinstance(value, (str, int, type(None))):
                raise DataError(
                    f"{path}: a key or caption is a {type(value).__name__}, not a string"
                )
            room -= len(str(value or ""))
        if room < 0:
            raise DataError(f"{path}: its keys or captions repeat the same strings")
        yield {"key": key, "caption": caption}


def no_items(n):
    return [{"key": None, "caption": None}] * n


def read_items(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_conditions(path, key):
    """The conditions in a .npy, .pkl or .pt file as Rows, and a function that lists their items."""
    path = Path(path)
    content = load_pickle(path)
    rows = Rows(content, "array" if path.suffix == ".npy" else key, path)
    named = list(items(content, len(rows), path))
    return rows, lambda: named


# ---------------------------------------------------------------- looking


def inspect(files):
    """Print what the files hold, with the value range of the first samples, and convert nothing."""
    for path in files:
        content = load_pickle(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        for key, value in itertools.islice(content.items(), 100):
            line = f"  {str(key)[:80]!r}: {describe(value)}"
            with contextlib.suppress(DataError):  # which says that these are no embeddings
                rows = Rows(content, key, path)
                line += f"; {len(rows)} samples, {value_range(rows[:8])}"
            print(line)


def value_range(samples):
    """The range of the values, in words."""
    x = samples.astype(np.float64)
    finite = x[np.isfinite(x)]
    words = f"the first {len(x)}: "
    if finite.size:
        words += f"{finite.min():.4g} to {finite.max():.4g}, "
        words += f"mean {finite.mean():.4g}, std {finite.std():.4g}, "
    return words + f"{x.size - finite.size} not finite"
