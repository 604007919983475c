"""
What the sources of a dataset hold: shards of paired samples, opened without reading them.

`unpickle.py` opens a file; here its entries become Rows, samples that are converted a slice at a time.
"""

import hashlib
import itertools
import json
import math
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np

import unpickle

FLOATS = (*map(np.dtype, ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8")), unpickle.BFLOAT16)


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


def load_pickle(path, scratch=None):
    """The dict in a pickle, .pt or .npy file: see unpickle.load. Raises DataError."""
    try:
        content = unpickle.load(path, scratch)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except pickle.UnpicklingError as e:
        raise DataError(f"{path}: not a readable pickle of embeddings: {e}") from e
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict of embeddings")
    return content


def describe(value):
    """One line on what a file holds under a key."""
    if isinstance(value, np.ndarray):
        dtype = "bfloat16" if value.dtype == unpickle.BFLOAT16 else value.dtype.name
        return f"{'tensor' if isinstance(value, unpickle.Tensor) else 'array'} {tuple(value.shape)} {dtype}"
    if isinstance(value, list):
        return f"list of {len(value)}" + (
            f", first {describe(value[0])}" if value and type(value[0]) is not list else ""
        )
    return (
        json.dumps(plain(value))[:1000]
        if isinstance(value, (dict, str, int, float))
        else type(value).__name__
    )


def plain(value, room=None):
    """What JSON can hold of a value, cut off where a hostile file makes it deep or wide."""
    room = room or [10_000, 0]  # values left, depth
    room[0] -= 1
    if room[0] < 0 or room[1] > 20:
        return "..."
    if isinstance(value, (dict, list, tuple)):
        room[1] += 1
        items = itertools.islice(
            value.items() if isinstance(value, dict) else enumerate(value), room[0] + 1
        )
        items = {str(k): plain(v, room) for k, v in items}
        room[1] -= 1
        return items if isinstance(value, dict) else list(items.values())
    if isinstance(value, unpickle.Text):
        value = str(value.data[:10_000], "utf-8", "replace")
    return value if isinstance(value, (str, int, float, type(None))) else f"<{describe(value)}>"


def find_grid(tokens, asked):
    """(H, W) of that many tokens: as asked, or a square; None if neither."""
    side = math.isqrt(tokens)
    return (
        asked
        if asked and math.prod(asked) == tokens
        else (side, side)
        if 0 < side * side == tokens
        else None
    )


class Rows:
    """The samples of one key of a file, (n, tokens, channels), converted a slice at a time.

    value: an array (N, T, C) or (N, H, W, C), or a list of (T, C) samples or of such arrays. `grid`, asked or
    found, is (H, W), or None where the tokens are no square. Raises DataError.
    """

    def __init__(self, value, where, dtype="source", grid=None, drop_cls=False, pool=1):
        pieces = value if isinstance(value, list) else [value]
        for piece in pieces:
            if not isinstance(piece, np.ndarray) or piece.dtype not in FLOATS:
                raise DataError(f"{where} is {describe(piece)}, not an array of floats")
        if (
            value is pieces
            and all(p.ndim == 3 and 1 < p.shape[0] == p.shape[1] for p in pieces)
            and len(pieces) > 1
        ):
            raise DataError(
                f"{where}: samples (rows, columns, channels) or batches (n, tokens, channels)? stack them"
            )
        self.pieces = pieces = [p[None] if value is pieces and p.ndim == 2 else p for p in pieces]
        shape = pieces[0].shape if pieces else (0,)
        if len(shape) not in (3, 4) or any(0 in piece.shape for piece in pieces):
            raise DataError(
                f"{where} has shape {shape}; expected (samples, tokens, channels), none of them 0"
            )
        for piece in pieces:
            if (piece.shape[1:], piece.dtype) != (shape[1:], pieces[0].dtype):
                raise DataError(f"{where} mixes {describe(pieces[0])} and {describe(piece)}")
        tokens, self.channels, self.pool = math.prod(shape[1:-1]), shape[-1], pool
        self.cls = int(
            drop_cls and len(shape) == 3 and bool(find_grid(tokens - 1, grid))
        )  # tokens to drop in front
        self.tokens = tokens - self.cls
        self.grid = shape[1:3] if len(shape) == 4 else find_grid(self.tokens, grid)
        if pool > 1:
            if not self.grid or self.grid[0] % pool or self.grid[1] % pool:
                raise DataError(
                    f"{where}: --pool={pool} does not divide its grid, {self.grid} of {self.tokens} tokens"
                )
            self.grid, self.tokens = (
                (self.grid[0] // pool, self.grid[1] // pool),
                self.tokens // pool**2,
            )
        self.source = (
            np.dtype("f4")
            if pieces[0].dtype == unpickle.BFLOAT16
            else pieces[0].dtype.newbyteorder("=")
        )
        self.dtype = self.source if dtype == "source" else np.dtype(dtype)
        self.layout = [self.tokens, self.channels, self.dtype.name]
        self.ends = np.cumsum([len(piece) for piece in pieces])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, rows):
        """The samples of a slice, (n, tokens, channels), a copy of which nothing but itself stays in memory."""
        first, stop, _ = rows.indices(len(self))
        pieces = range(
            np.searchsorted(self.ends, first, "right"), np.searchsorted(self.ends, stop) + 1
        )
        starts = [self.ends[i] - len(self.pieces[i]) for i in pieces]
        parts = [
            self.convert(self.pieces[i][max(first - s, 0) : stop - s])
            for i, s in zip(pieces, starts)
        ]
        samples = np.concatenate(parts)
        for i in pieces:
            unpickle.drop_pages(self.pieces[i])
        return samples

    @property
    def nbytes(self):
        return sum(piece.nbytes for piece in self.pieces)

    def portions(self, size):
        """Yields ([(piece, start, stop), ...], number of the first sample): runs of samples, of about `size` bytes."""
        step, slices, first, n = max(1, size // self.pieces[0][0].nbytes), [], 0, 0
        for piece in self.pieces:
            for i in range(0, len(piece), step):
                slices.append((piece, i, min(i + step, len(piece))))
                n += slices[-1][2] - i
                if n >= step:
                    yield slices, first
                    slices, first, n = [], first + n, 0
        if slices:
            yield slices, first

    def convert(self, x):
        """A slice of a piece -> (n, tokens, channels) in C order, a view of the file where nothing changes.

        Raises DataError where a finite value overflows.
        """
        n, p = len(x), self.pool
        if x.dtype == unpickle.BFLOAT16:
            x = (x["bfloat16"].astype(np.uint32) << 16).view(np.float32)
        x = x.reshape(n, -1, self.channels)[:, self.cls :]
        if p > 1:
            x = x.astype(np.promote_types(self.source, np.float32))
            x = x.reshape(n, self.grid[0], p, self.grid[1], p, self.channels)
            x = sum(x[:, :, i, :, j] for i in range(p) for j in range(p)) / p**2
            x = x.reshape(n, -1, self.channels)
        try:
            with np.errstate(over="raise"):
                return np.ascontiguousarray(x, self.dtype)
        except FloatingPointError as e:
            worst = np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max()
            raise DataError(f"{worst:g} is too large for {self.dtype}") from e

    def __array__(self, dtype=None, copy=None):
        return np.concatenate([self.convert(piece) for piece in self.pieces]).astype(
            dtype or self.dtype, copy=False
        )


def get_rows(content, key, path, **options):
    """Rows of a file's entry; raises DataError where it is missing or repeats itself beyond the file's size."""
    if key not in content:
        held = ", ".join(
            f"{str(k)[:80]!r}: {describe(v)}" for k, v in itertools.islice(content.items(), 20)
        )
        raise DataError(
            f"{path}: no key {key!r}; it holds {held or 'nothing'} (choose with --cond_key, --target_key)"
        )
    rows = Rows(content[key], f"{path}: {key}", **options)
    if rows.nbytes > Path(path).stat().st_size:
        raise DataError(f"{path}: {key} repeats the same arrays: it is larger than the file")
    return rows


def load_shard(paths, cond_key, target_key, scratch=None, other_grid=False, **options):
    """dict(cond, target, keys, captions, config) of one pickle, or of a .npy of conditions and one of targets.

    other_grid: conditions may have other tokens than targets."""
    if len(paths) == 1:
        content = load_pickle(paths[0], scratch)
    else:
        content = {
            key: load_pickle(path).get("array") for key, path in zip((cond_key, target_key), paths)
        }
    cond, target = (
        get_rows(content, k, p, **options)
        for k, p in zip((cond_key, target_key), (paths[0], paths[-1]))
    )
    if len(cond) != len(target):
        raise DataError(f"{paths[0]}: {len(cond)} conditions but {len(target)} targets")
    if cond.tokens != target.tokens and not other_grid:
        hint = (
            "--drop_cls=True drops a first token, " if abs(cond.tokens - target.tokens) == 1 else ""
        )
        words = f"{cond.tokens} tokens in a condition but {target.tokens} in a target"
        raise DataError(f"{paths[0]}: {words}; {hint}--other_grid=True allows it")
    if cond.grid != target.grid and not other_grid:
        raise DataError(
            f"{paths[0]}: a grid of {cond.grid} in a condition but {target.grid} in a target"
        )
    if options.get("drop_cls") and not cond.cls and not target.cls:
        raise DataError(
            f"{paths[0]}: --drop_cls=True, but {cond.tokens} and {target.tokens} tokens are no grid and one more"
        )
    shard = dict(cond=cond, target=target, config=content.get("config"))
    for name in ("keys", "captions"):
        values = content.get(name)
        if not isinstance(values, (list, type(None))) and not (
            isinstance(values, np.ndarray) and values.ndim == 1
        ):
            raise DataError(f"{paths[0]}: {name} is not a list of strings or integers")
        shard[name] = [None] * len(cond) if values is None else values
        if len(shard[name]) != len(cond):
            raise DataError(f"{paths[0]}: {len(shard[name])} {name} for {len(cond)} samples")
        listed = values if isinstance(values, list) else []
        strings = (v.data if isinstance(v, unpickle.Text) else v for v in listed)
        if (
            sum(len(v) for v in strings if isinstance(v, (str, memoryview)))
            > paths[0].stat().st_size
        ):
            raise DataError(
                f"{paths[0]}: its {name} repeat the same strings: they are larger than the file"
            )
    return shard


def items(shard, path):
    """Yields {"key": ..., "caption": ...} of every sample."""
    for i in range(len(shard["keys"])):
        try:
            pair = [shard["keys"][i], shard["captions"][i]]
            pair = [v.item() if isinstance(v, np.generic) else v for v in pair]
            pair = [str(v) if isinstance(v, unpickle.Text) else v for v in pair]
        except Exception as e:  # neither numpy nor UTF-8 take all bytes for text
            raise DataError(f"{path}: a key or caption that is no text: {e}") from e
        for name, value in zip(("keys", "captions"), pair):
            if not isinstance(value, (str, int, type(None))):
                raise DataError(f"{path}: {name} is not a list of strings or integers")
        yield dict(zip(("key", "caption"), pair))


def read_conditions(path, key):
    """Conditions (B, S, C), an array or what can be sliced like one, and a function that gives their items
    [{key, caption}], of a .npy or, through the safe reader, a .pkl or .pt."""
    if str(path).endswith((".pkl", ".pickle", ".pt", ".pth")):
        content = load_pickle(path)
        rows = get_rows(content, key, path)
        named = {
            n: [None] * len(rows) if content.get(n) is None else content[n]
            for n in ("keys", "captions")
        }
        for name, values in named.items():
            if not hasattr(values, "__len__") or len(values) != len(rows):
                raise DataError(
                    f"{path}: {name} is not a list of {len(rows)}, as many as there are conditions"
                )
        return rows, lambda: list(items(named, path))
    if not str(path).endswith(".npy"):
        raise DataError(f"{path}: conditions are read from .npy, .pkl or .pt files")
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: {e}") from e
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: holds several arrays; conditions are one, of shape (B, S, C)")
    if array.ndim != 3 or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: holds {array.dtype} of shape {array.shape}, not numbers of shape (B, S, C)"
        )
    return array, partial(no_items, len(array))


def read_items(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def no_items(n):
    return [{"key": None, "caption": None}] * n


def find_files(sources):
    """The files that the sources name, and {folder: its manifest}."""
    files, promised = [], {}
    for source in map(Path, sources):
        if source.is_file():
            files.append(source)
        elif source.is_dir():
            natural = lambda p: [
                int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)
            ]  # noqa: E731
            kinds = (
                (".pkl", ".pickle"),
                (".pt", ".pth"),
            )  # torch files beside pickles may be anything
            found = next(
                filter(
                    None,
                    (
                        [p for p in source.iterdir() if p.suffix in kind and p.is_file()]
                        for kind in kinds
                    ),
                ),
                None,
            )
            if not found:
                raise DataError(f"{source}: a folder without .pkl or .pt files")
            files += sorted(found, key=natural)
            manifest = source / "embeddings_manifest.json"
            if manifest.is_file():
                try:
                    promised[source] = json.loads(manifest.read_text())
                    promised[source]["total_samples"] = int(promised[source]["total_samples"])
                except Exception as e:  # JSON may hold anything
                    raise DataError(f"{manifest}: no readable total_samples in it") from e
        else:
            raise DataError(f"{source}: no such file or folder")
    return files, promised


def pair_arrays(files):
    """The files as shards: [pickle] or [conditions.npy, targets.npy]."""
    arrays = [path for path in files if path.suffix == ".npy"]
    if len(arrays) % 2:
        raise DataError(
            f"{len(arrays)} .npy files: name all conditions first, then as many targets"
        )
    half = len(arrays) // 2
    return [[path] for path in files if path.suffix != ".npy"] + list(
        map(list, zip(arrays[:half], arrays[half:]))
    )


def digest(path, part=1 << 22):
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
    kind = (
        "whole file"
        if size <= 4 * part
        else f"size, then {part} bytes at 0, size // 2 and size - {part}"
    )
    return {"file": path.name, "bytes": size, "sha256": h.hexdigest(), "sha256_of": kind}


def inspect(files):
    """Print what the files hold, with the value range of the first samples, and convert nothing."""
    for path in files:
        content = load_pickle(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        for key, value in itertools.islice(content.items(), 100):
            line = f"  {str(key)[:80]!r}: {describe(value)}"
            try:
                rows = Rows(value, key)
            except DataError:  # not embeddings
                print(line)
                continue
            x = rows.convert(rows.pieces[0][:8]).astype(np.float64)
            finite = x[np.isfinite(x)]
            spread = f"{finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.4g}, std {finite.std():.4g}"
            bad = f", {x.size - finite.size} not finite" if finite.size < x.size else ""
            print(
                f"{line}; {len(rows)} samples, the first {len(x)}: {spread if finite.size else 'nothing finite'}{bad}"
            )
