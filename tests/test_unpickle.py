"""Every layout is read as pickle and torch read it; nothing hostile runs, hangs or takes memory."""

import builtins
import bz2
import collections
import datetime
import decimal
import enum
import functools
import gzip
import io
import itertools
import json
import lzma
import operator
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import uuid
import zipfile
import zlib
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT, run
from plumbing import sources, unpickle

FLOATS = np.random.default_rng(0).standard_normal((6, 4, 50), np.float32)  # more than VIEW bytes


def as_numpy(x):
    if isinstance(x, torch.Tensor):
        return x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
    return (x["bfloat16"].astype("u4") << 16).view("f4") if x.dtype == unpickle.BFLOAT16 else x


def check(path, content):
    """The file's content equals what was saved, and its arrays are views of a memory map."""
    read = unpickle.load(path)
    assert sorted(read) == sorted(content)
    for key, value in content.items():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            got = read[key]
            assert got.shape == value.shape and np.array_equal(as_numpy(got), as_numpy(value))
            assert not got.flags.writeable and not got.flags.owndata
        else:
            assert value == read[key]
    return read


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_of_every_protocol(tmp_path, protocol):
    base = torch.from_numpy(FLOATS).clone()
    content = {
        "c": FLOATS,
        "fortran": np.asfortranarray(FLOATS),
        "big endian": FLOATS.astype(">f4"),
        "half": FLOATS.astype("f2"),
        "strided": FLOATS[::2, 1:3],
        "small": FLOATS[:1, :1, :3],
        "tensor": base,
        "half tensor": base.half(),
        "bfloat16": base.bfloat16(),
        "view": base[1::2, 1:, 3:7].transpose(1, 2),
        "parameter": torch.nn.Parameter(base),
        "numbers": [1, 2.5, True, None, "short", -(2**40)],
        "scalar": np.float32(1.5),
        "names": np.array(["ab", "c"]),
        "config": {"a": {"b": [1, (2, 3)]}, "size": torch.Size([2, 3])},
    }
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol))
    check(tmp_path / "e.pkl", content)
    lists = {
        "arrays": [FLOATS[0], FLOATS[1]],
        "objects": np.array(["a", None, "b"], object),
        "text": ["x" * 999],
    }
    (tmp_path / "l.pkl").write_bytes(pickle.dumps(lists, protocol))
    read = unpickle.load(tmp_path / "l.pkl")
    assert all(np.array_equal(a, b) for a, b in zip(read["arrays"], lists["arrays"]))
    assert read["objects"] == ["a", None, "b"] and read["text"] == ["x" * 999]


@pytest.mark.parametrize("protocol", [3, 5])
def test_numpy_before_version_2(tmp_path, protocol):
    data = pickle.dumps({"x": FLOATS}, protocol)
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(b"c" + old, b"c" + new).replace(
            bytes([len(old)]) + old, bytes([len(new)]) + new
        )
    assert b"_core" not in data
    (tmp_path / "e.pkl").write_bytes(data)
    check(tmp_path / "e.pkl", {"x": FLOATS})


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    base = torch.randn(6, 4, 50)
    content = {
        "x": base,
        "shared": base[2:, :, ::3],
        "half": base.half(),
        "b": base.bfloat16(),
        "keys": ["a"],
        "n": {"k": 1},
    }
    torch.save(content, tmp_path / "e.pt", _use_new_zipfile_serialization=zipped)
    read = check(tmp_path / "e.pt", content)
    span = [a.__array_interface__["data"][0] for a in (read["x"], read["shared"])]
    assert span[1] - span[0] == 2 * 4 * 50 * 4  # one storage


def test_many_small_tensors(tmp_path, monkeypatch):
    """What is read of a tensor in a list, but not kept, does not count against the room."""
    monkeypatch.setattr(unpickle, "ROOM", 1 << 16)
    x = torch.randn(300, 768)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"x": [row.clone() for row in x]}))
    assert np.array_equal(np.stack(unpickle.load(tmp_path / "e.pkl")["x"]), x)


class Call:
    """Pickles to a call of the function with these arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_zip_file_nested_in_a_pickle_is_refused(tmp_path):
    file = io.BytesIO()
    torch.save(torch.randn(6, 4, 50).untyped_storage(), file)
    storage = Call(torch.storage._load_from_bytes, file.getvalue())
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"x": storage}))
    with pytest.raises(sources.DataError, match="it uses the opcode b'P'"):
        unpickle.load(tmp_path / "e.pkl")


def test_arrays_stored_as_text_are_refused(tmp_path):
    """Protocol 2 does so. What is small is read."""
    small = {"scalar": np.float64(1.5), "numbers": np.arange(9), "config": {"a": np.float32(2)}}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(small, 2))
    read = unpickle.load(tmp_path / "e.pkl")
    assert read["scalar"] == 1.5 and np.array_equal(read["numbers"], np.arange(9))
    for value in (FLOATS, torch.from_numpy(FLOATS), np.zeros((50, 100, 200))):
        (tmp_path / "e.pkl").write_bytes(pickle.dumps({"x": value}, 2))
        with pytest.raises(sources.DataError, match="save it again .*protocol=4"):
            unpickle.load(tmp_path / "e.pkl")
    torch.save({"x": FLOATS}, tmp_path / "e.pt")
    with pytest.raises(sources.DataError, match="save it again .*pickle_protocol=4"):
        unpickle.load(tmp_path / "e.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_numpy_arrays(tmp_path, zipped):
    content = {"x": FLOATS, "y": torch.from_numpy(FLOATS), "keys": ["a" * 999], "n": np.float32(2)}
    zipped = dict(_use_new_zipfile_serialization=zipped)
    torch.save(content, tmp_path / "e.pt", pickle_protocol=4, **zipped)
    check(tmp_path / "e.pt", content)


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_safetensors_are_views(tmp_path):
    base = torch.from_numpy(FLOATS)
    kinds = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64".split()
    content = {kind: base.to(getattr(torch, kind)) for kind in kinds}
    content |= {"base": base, "empty": torch.ones(0, 3), "one": torch.tensor(2.0)}
    save_file(content, tmp_path / "e.safetensors", metadata={"dtype": "none"})
    read = unpickle.load(tmp_path / "e.safetensors")
    check(tmp_path / "e.safetensors", {key: content[key] for key in read})
    assert len(read) == len(content)


def test_bad_safetensors_end_in_one_line(tmp_path):
    x = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    good = safetensors({"x": x}, bytes(24))
    (tmp_path / "e.safetensors").write_bytes(good)
    assert sources.load_pickle(tmp_path / "e.safetensors")["x"].shape == (2, 3)
    bad = [good[:n] for n in range(len(good))]  # cut short anywhere
    changes = [
        {"data_offsets": offsets} for offsets in ([0, 20], [4, 28], [24, 0], [-4, 20], [0], 3)
    ]
    changes += [{"data_offsets": [0.0, 24.0]}, {"data_offsets": [2**70, 2**71]}]
    changes += [
        {"shape": shape} for shape in ([2**40, 2**40], [3, 3], [-1, -1], [2.0, 3.0], "23", [[2], 3])
    ]
    changes += [{"shape": [2**62, 2**62, 4]}, {"shape": [1] * 99 + [6]}]
    changes += [
        {"dtype": dtype} for dtype in ("F8_E4M3", "O", "U16", "F4", "", 1, [], {}, None, "i4,f4")
    ]
    bad += [safetensors({"x": x | change}, bytes(24)) for change in changes]
    bad += [
        safetensors(header, bytes(24))
        for header in ([x], 1, {"x": 1}, {"x": {}}, b"", b"{", b"\xff")
    ]
    bad.append(safetensors(b"[" * 900_000))
    bad.append(safetensors(b" " * (1 << 20) + json.dumps({"x": x}).encode(), bytes(24)))
    bad.append(struct.pack("<Q", 2**63) + good[8:])
    bad.append(struct.pack("<Q", 2**64 - 1) + good[8:])
    for data in bad:
        (tmp_path / "e.safetensors").write_bytes(data)
        with pytest.raises(sources.DataError) as e:
            sources.load_pickle(tmp_path / "e.safetensors")
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000, data[:200]


def test_long_lists_are_read_in_order(tmp_path):
    arrays = [np.full((2, 70), i, np.float32) for i in range(3000)]
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"x": arrays}))
    assert np.array_equal(unpickle.load(tmp_path / "e.pkl")["x"], arrays)


# ---------------------------------------------------------------- other versions, other objects


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_of_any_memory_order(tmp_path, protocol):
    for axes in itertools.permutations(range(3)):
        content = {"x": np.ascontiguousarray(FLOATS.transpose(axes)).transpose(np.argsort(axes))}
        (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol))
        assert np.array_equal(check(tmp_path / "e.pkl", content)["x"], FLOATS)


def array_pickle(module, order, *axes):
    """A pickle by the _frombuffer of a version of numpy."""
    shape = b"".join(b"K" + bytes([n]) for n in FLOATS.shape)
    call = b"c" + module + b".numeric\n_frombuffer\n(" + push(FLOATS.tobytes())
    call += b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R(" + shape + b"t" + text(order)
    for order in axes:
        call += b"N" if order is None else b"(" + bytes([75, order[0], 75, order[1], 75, order[2]])
        call += b"" if order is None else b"t"
    return b"\x80\x05}" + text("x") + call + b"tRs."


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_arrays_as_any_numpy_since_1_20_pickles_them(tmp_path, module):
    for args, expected in (
        (("C",), FLOATS),
        (("F",), FLOATS.reshape(-1).reshape(FLOATS.shape, order="F")),
        (("C", None), FLOATS),
        (("F", None), FLOATS.reshape(-1).reshape(FLOATS.shape, order="F")),
        (("K", (2, 0, 1)), FLOATS.transpose(2, 0, 1)),
        (("K", (0, 2, 1)), FLOATS.transpose(0, 2, 1)),
    ):
        (tmp_path / "e.pkl").write_bytes(array_pickle(module, *args))
        assert np.array_equal(check(tmp_path / "e.pkl", {"x": expected})["x"], expected)
    (tmp_path / "e.pkl").write_bytes(array_pickle(module, "K", (0, 0, 1)))
    with pytest.raises(sources.DataError, match="repeated axis"):
        unpickle.load(tmp_path / "e.pkl")


class Unframer:
    """Joins what is long from parts, as that of Python 3.15."""

    def __init__(self, file_read, file_readline, file_tell=None):
        self.file_read, self.readline = file_read, file_readline

    def read(self, n):
        parts = [self.file_read(min(n, 100))]
        while sum(map(len, parts)) < n:
            parts.append(self.file_read(min(n - sum(map(len, parts)), 100)))
        return b"".join(parts)

    def readinto(self, buffer):
        buffer[:] = self.read(len(buffer))
        return len(buffer)


def test_long_arrays_are_views_whatever_reads_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "_Unframer", Unframer)
    content = {"x": FLOATS, "y": torch.from_numpy(FLOATS), "text": ["long " * 999]}
    for protocol in (3, 4, 5):
        (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol))
        check(tmp_path / "e.pkl", content)


class Color(enum.Enum):
    RED = 1

    def __reduce_ex__(self, protocol):  # as in most versions of Python
        return Color, (self.value,)


class Attribute:
    def __reduce__(self):  # as an Enum's value in some of them
        return getattr, (Color, "RED")


Point = collections.namedtuple("Point", "x y")
OBJECTS = {
    "<datetime.datetime>": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    "<pathlib.PurePosixPath>": pathlib.PurePosixPath(*"abcdefghijklmnopqrst"),
    "<builtins.set>": {"a", ("b", 3)},
    "<torch.float16>": torch.float16,
    "<torch.device>": torch.device("cpu"),
    "<uuid.UUID>": uuid.UUID(int=5),
    "<builtins.complex>": 3 + 4j,
    "<test_unpickle.Color>": Color.RED,
    "<builtins.getattr>": Attribute(),
    "<test_unpickle.Point>": Point(1, 2),
    "<collections.Counter>": collections.Counter("aab"),
    "<collections.deque>": collections.deque([1, 2]),
    "<decimal.Decimal>": decimal.Decimal("1.5"),
    "<numpy.float32>": np.float32,
    "<torch._utils._rebuild_sparse_tensor>": torch.eye(3).to_sparse(),
    "<torch._utils._rebuild_tensor_v3>": torch.ones(3).to(torch.float8_e4m3fn),
    "<torch.nn.modules.linear.Linear>": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("named", OBJECTS)
def test_harmless_objects_leave_their_names(tmp_path, named, protocol):
    value = OBJECTS[named]
    content = {"x": FLOATS, "beside": value, "config": {"a": [value, {"b": value}]}}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol))
    torch.save(content, tmp_path / "e.pt", pickle_protocol=protocol)
    for name in ("e.pkl", "e.pt"):
        read = check(tmp_path / name, {"x": FLOATS} | dict.fromkeys(("beside", "config"), ANY))
        assert sources.describe(read["beside"]) == named
        assert sources.plain(read["config"]) == {"a": [named, {"b": named}]}
    for content in ({"x": value}, {"x": [value, value]}):
        (tmp_path / "e.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(sources.DataError, match=f"x: {named}; expected floats"):
            sources.Rows(sources.load_pickle(tmp_path / "e.pkl"), "x", tmp_path / "e.pkl")


class Keyword:
    """Pickles to NEWOBJ_EX from protocol 4 on."""

    def __new__(cls, *, size):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"size": 3}


@pytest.mark.parametrize("protocol", [4, 5])
def test_an_object_made_with_keywords_leaves_its_name(tmp_path, protocol):
    data = pickle.dumps({"x": FLOATS, "beside": Keyword(size=3)}, protocol)
    assert pickle.NEWOBJ_EX in data
    (tmp_path / "e.pkl").write_bytes(data)
    read = check(tmp_path / "e.pkl", {"x": FLOATS, "beside": ANY})
    assert sources.describe(read["beside"]) == "<test_unpickle.Keyword>"


def test_other_objects_of_a_config(tmp_path):
    """What can be kept is kept; JSON has neither NaN nor keys that are no strings."""
    config = {
        "default": collections.defaultdict(list, {"a": [1]}),
        "nan": [float("nan"), float("inf"), 1.5],
        1: {None: 1, (1, 2): 2, 0.5: 3, True: 4, Color.RED: 5, "s": 6},
        "numpy": [np.float32(1.5), np.int64(2), np.bool_(True)],
    }
    strings = np.array(["a", "bb"], np.dtypes.StringDType())
    dates = np.array(["2020-01-01"], "M8[D]")
    record = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")])
    content = {"config": config, "keys": strings, "dates": dates, "record": record}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    read = unpickle.load(tmp_path / "e.pkl")
    assert sources.plain(read["config"]) == {
        "default": {"a": [1]},
        "nan": [None, None, 1.5],
        "1": {
            "<NoneType>": 1,
            "<tuple>": 2,
            "0.5": 3,
            "True": 4,
            "<test_unpickle.Color>": 5,
            "s": 6,
        },
        "numpy": [1.5, 2, True],
    }
    assert read["keys"] == ["a", "bb"]
    assert sources.describe(read["dates"]) == "array of shape (1,), datetime64"


def test_a_negated_tensor_is_refused(tmp_path):
    """Its storage holds the values with the other sign."""
    x = torch.ones(300, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.save({"x": x}, tmp_path / "e.pt")
    with pytest.raises(sources.DataError, match="negated: save its clone"):
        unpickle.load(tmp_path / "e.pt")


def test_other_formats_are_named(tmp_path):
    data = pickle.dumps({"x": FLOATS})
    tar, npz, joblib = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    np.savez(npz, a=FLOATS, b=FLOATS)
    joblib.write(b"\x80\x04\x95" + bytes(8) + b"}" + text("x") + text("joblib.numpy_pickle"))
    joblib.write(text("NumpyArrayWrapper") + b"\x93)\x81" + FLOATS.tobytes())
    for name, packed in {
        "gzip": gzip.compress(data),
        "xz": lzma.compress(data),
        "bzip2": bz2.compress(data),
        "zlib_of_joblib": zlib.compress(data),
        "zstandard": b"\x28\xb5\x2f\xfd" + bytes(99),
        "lz4": b"\x04\x22\x4d\x18" + bytes(99),
        "joblib": joblib.getvalue(),
        "tar": tar.getvalue(),
        "CSV": b"key,x0,x1\n0,1.5,2.5\n",
        "JSON": b' {"x": [1, 2]}',
        "parquet": b"PAR1" + bytes(99),
        "arrow": b"ARROW1" + bytes(99),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
        "unknown": b"GIF89a" + bytes(99),
    }.items():
        (tmp_path / "e.pkl").write_bytes(packed)
        with pytest.raises(
            sources.DataError, match=f"its format is {name}: unpack it, or save the"
        ):
            unpickle.load(tmp_path / "e.pkl")
    (tmp_path / "e.pkl").write_bytes(npz.getvalue())
    with pytest.raises(sources.DataError, match="not of torch.save; save a .npz as .npy files"):
        unpickle.load(tmp_path / "e.pkl")
    # of whatever name
    save_file({"x": torch.from_numpy(FLOATS)}, tmp_path / "e.pkl")
    check(tmp_path / "e.pkl", {"x": FLOATS})


def test_safetensors_of_floats_that_numpy_lacks(tmp_path):
    x = torch.from_numpy(FLOATS)
    save_file({"x": x, "f8": x.to(torch.float8_e4m3fn)}, tmp_path / "e.safetensors")
    read = check(tmp_path / "e.safetensors", {"f8": ANY, "x": FLOATS})
    assert sources.describe(read["f8"]) == "array of shape (6, 4, 50), void8"


# ---------------------------------------------------------------- attacks


class State:
    def __setstate__(self, state):
        os.system("touch owned")


class Nested:
    def __init__(self, function, *args):
        self.file = io.BytesIO()
        torch.save(Call(function, *args), self.file, _use_new_zipfile_serialization=False)

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.file.getvalue(),)


def tensor(n, *args):
    """Pickles to a tensor over a storage of n numbers: args are offset, size and stride."""
    return Call(torch._utils._rebuild_tensor_v2, torch.zeros(n).storage(), *args, False, None)


TOUCH = Call(os.system, "touch owned")
reconstruct = np._core.multiarray._reconstruct
load_bytes = torch.storage._load_from_bytes
CALLS = {
    "os.system": (Call(os.system, "touch owned"), "posix.system"),
    "eval": (Call(builtins.eval, "open('owned', 'w')"), "eval"),
    "getattr": (Call(builtins.getattr, "", "join"), "<builtins.getattr>"),
    "attrgetter": (Call(operator.attrgetter("__class__.__base__")), "<operator.attrgetter>"),
    "partial": (functools.partial(os.system, "touch owned"), "posix.system"),
    "Popen": (Call(subprocess.Popen, ["touch", "owned"]), "Popen"),
    "torch.load": (Call(torch.load, "owned"), "<torch.serialization.load>"),
    "numpy.load": (Call(np.load, "owned", None, True), "<numpy.load>"),
    "nested pickle": (Call(load_bytes, pickle.dumps(TOUCH)), "posix.system"),
    "nested torch": (Nested(os.system, "touch owned"), "posix.system"),
    "foreign class": (Call(reconstruct, subprocess.Popen, (0,), b"b"), "Popen"),
    "class of a name": (Call(reconstruct, torch.FloatStorage, (0,), b"b"), "<Array>"),
    "object array": (np.array([Call(os.system, "touch owned")]), "posix.system"),
    "setstate": (State(), "<test_unpickle.State>"),
    "dtype of objects": (Call(np.dtype, [("a", object)]), None),
    "storage call": (Call(torch.FloatStorage, 10**12), None),
    "stride 0": (tensor(4, 0, (10**6, 64, 768), (0, 0, 0)), None),
    "negative stride": (tensor(400, 399, (4,), (-1,)), None),
    "offset": (tensor(400, 399, (4,), (1,)), None),
    "huge stride": (tensor(4000, 0, (5, 4, 50), (2**60, 50, 1)), None),
    "a shape of tuples": (tensor(400, 0, (10**9, (1,)), (1, 1)), None),
}  # fmt: skip


@pytest.mark.parametrize("wrap", ["pickle", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_called(tmp_path, monkeypatch, name, wrap):
    monkeypatch.chdir(tmp_path)
    attack, named = CALLS[name]
    content = {"x": FLOATS, "extra": attack}
    torch.save(content, "e.pkl", pickle_protocol=4) if wrap == "torch" else (
        tmp_path / "e.pkl"
    ).write_bytes(pickle.dumps(content))
    if named is not None and named.startswith("<"):  # what stands for it
        assert sources.describe(sources.load_pickle("e.pkl")["extra"]) == named
        content = {"x": attack}  # and it is refused where embeddings are looked for
        (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(sources.DataError, match=f"x: {named}; expected floats"):
            sources.Rows(sources.load_pickle("e.pkl"), "x", tmp_path / "e.pkl")
    else:
        with pytest.raises(sources.DataError) as e:
            sources.load_pickle("e.pkl")
        assert "\n" not in str(e.value) and (named is None or named in str(e.value))
    assert not (tmp_path / "owned").exists()


def text(s):
    return b"\x8c" + bytes([len(s)]) + s.encode()


def entry(value):
    return b"\x80\x04}" + text("captions") + value + b"s."


def zip_file(*entries, how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as z:
        for name, data in entries:
            z.writestr(name, data)
    return file.getvalue()


def push(data):
    return b"B" + struct.pack("<I", len(data)) + data


storage = (
    b"\x80\x04("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x00tQ."
)
many = (("a/data.pkl", storage), *((f"a/data/{i}", b"") for i in range(20_000)))
many_entries = zip_file(*many, how=zipfile.ZIP_STORED)
scalar_global = b"cnumpy.core.multiarray\nscalar\n\x940cnumpy\ndtype\n"
laughs = b"]" + b"".join(b"\x940](" + 2 * bytes([ord("h"), i]) + b"e" for i in range(200))
tuples = b")" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(200))
repeated_text = b"\x80\x04c_codecs\nencode\n\x94X" + struct.pack("<I", 1 << 16) + b"a" * (1 << 16)
repeated_text += b"\x94" + text("latin1") + b"\x94" + b"h\x00h\x01h\x02\x86R" * 3000 + b"."
long_value = scalar_global + text("S1000000") + b"\x85R" + push(bytes(10**6)) + b"\x86\x94"
one_hash = b"".join(
    b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(60_000)
)
npy_header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}\n".ljust(70)
# name -> bytes of a file, and part of the error, or None where the bomb may be read without harm
BOMBS = {
    "deep lists": (entry(b"]" * 10**6 + b"a" * (10**6 - 1)), None),
    "deep tuples": (entry(b")" + b"\x85" * 10**6), None),
    "deep key": (b"\x80\x04}" + b")" + b"\x85" * 10**6 + b"Ns.", "read"),
    "tuples of tuples as a key": (b"\x80\x04}" + tuples + b"Ns.", "read"),
    "lists of lists": (entry(laughs), None),
    "lists of lists in the config": (b"\x80\x04}" + text("config") + laughs + b"s.", None),
    "memo far away": (entry(b"]r" + b"\xff" * 4), None),
    "many objects": (b"\x80\x04(" + b"]" * (1 << 24) + b"l.", "small objects"),
    "many memos": (b"\x80\x04]" + b"\x94" * (1 << 24) + b".", "small objects"),
    "BINBYTES8": (entry(b"\x8e" + struct.pack("<Q", 1 << 60)), "cut short"),
    "BYTEARRAY8": (entry(b"\x96" + struct.pack("<Q", 1 << 45)), "cut short"),
    "BINUNICODE8": (entry(b"\x8d" + struct.pack("<Q", 1 << 63)), "opcode"),
    "BINUNICODE": (entry(b"X" + struct.pack("<I", 1 << 20)), "cut short"),
    "text without end": (entry(b"X" + struct.pack("<I", 1 << 31)), "save it again"),
    "FRAME": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.", None),
    "LONG4": (entry(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)), "opcode"),
    "extension code": (entry(b"\x82\x01"), "opcode"),
    "persistent id": (entry(b"K\x01Q"), "cannot unpack"),
    "persistent text": (entry(b"Pos.system\n"), "opcode"),
    "out-of-band buffer": (entry(b"\x97"), "opcode"),
    "INST": (entry(b"(ios\nsystem\n"), "opcode"),
    "a set of tuples of tuples": (entry(b"\x8f(" + tuples[:1000] + b"\x90"), "read"),
    "a frozenset of them": (entry(b"(" + tuples[:1000] + b"\x91"), "read"),
    "an object of much": (entry(b"cx\ny\n(" + b"N" * 65 + b"t\x81"), "arguments"),
    "a name without end": (entry(b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + text("b")
                                 + b"\x93"), "read"),
    "a command as an object": (entry(b"cposix\nsystem\n)\x81"), "posix.system"),
    "a command with keywords": (entry(b"cposix\nsystem\n)}\x92"), "posix.system"),
    "void": (entry(b"cnumpy.core.numeric\n_frombuffer\n(" + push(b"a") + b"cnumpy\ndtype\n"
                   + text("V0") + b"\x85R\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85"
                   + text("C") + b"tR"), "read"),
    "a global without end": (b"\x80\x02c" + b"a" * 10**6, None),
    "not a pickle": (b"GIF89a" + bytes(1000), "its format is unknown"),
    "empty": (b"", "empty"),
    "after the end": (pickle.dumps({}) + b"more", "4 bytes follow"),
    "compressed": (zip_file(("a/data.pkl", b"x" * 300), ("a/data/0", bytes(10**8))), "compressed"),
    "a zip of something": (zip_file(("readme", b"x" * 1000)), "not of torch.save"),
    "a broken zip": (b"PK\x03\x04" + bytes(1000), None),
    "repeated text": (repeated_text, "save it again"),
    "many zip entries": (many_entries, None),
    "a directory beyond the end of a zip": (b"PK" + bytes(1 << 25) + many_entries[-22:], None),
    "a long size again and again": (entry(b"ctorch\nSize\n\x940](" + b"K\x01" * 10**5 + b"e\x85\x94"
                                          + b"0h\x00h\x01R" * 10**5), None),
    "a long value again and again": (entry(long_value + b"0h\x00h\x01R" * 10**4), "value of"),
    "a string as arguments": (entry(b"ctorch\nSize\n" + push(bytes(10**7)) + b"R"), "arguments"),
    "keys of one hash": (b"\x80\x04}(" + one_hash + b"u.", "read"),
    "escape sequences": (b"\x80\x02c\x1b[2J\nx\n.", "<\\x1b[2J.x>, not a dict"),
    "a list under many keys": (b"\x80\x04](" + b"N" * 10**5 + b"e\x940}(" + b"".join(
        b"J" + struct.pack("<i", i) + b"h\x00" for i in range(10**5)) + b"u.", None),
    "npy beyond its end": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 70) + npy_header, None),
}  # fmt: skip


def test_bombs_do_not_go_off(tmp_path):
    """Each ends in our error or as plain values, and all of them in bounded time and memory."""
    for i, (data, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{i}.pkl").write_bytes(data)
    script = """if True:
        import sys, time, re; sys.path.insert(0, sys.argv[1])
        from plumbing import sources
        for i in range(int(sys.argv[3])):
            start = time.perf_counter()
            try:
                content = sources.load_pickle(f"{sys.argv[2]}/{i}.pkl")
                sources.plain(content), [sources.describe(v) for v in content.values()]
                line = "read"
            except sources.DataError as e:
                line = str(e)
            peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1000
            print(f"{time.perf_counter() - start:.1f} {peak} {line}")
    """
    lines = run("-c", script, ROOT, tmp_path, len(BOMBS)).stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for (name, (_, due)), line in zip(BOMBS.items(), lines):
        seconds, megabytes, message = line.split(" ", 2)
        assert float(seconds) < 20 and int(megabytes) < 500, (name, line)
        assert "Error" not in message and (due is None or due in message), (name, line)


def mapped():
    """MB of files in this process's memory."""
    status = open("/proc/self/status").read()
    return int(status.split("RssFile:")[1].split()[0]) // 1024


def test_pages_are_given_back(tmp_path):
    x = np.ones((50, 100, 2000), np.float32)  # 40 MB
    for name, content in (("array", {"x": x}), ("list", {"x": list(x)})):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps(content))
        rows = sources.Rows(sources.load_pickle(path), "x", path)
        unpickle.drop_pages(rows)  # those that the unpickler has read
        before = mapped()
        assert rows[:].sum() == x.size and mapped() > before + 30
        unpickle.drop_pages(rows)
        assert mapped() < before + 10


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(sources.DataError, match="No such file"):
        sources.load_pickle(tmp_path / "none.pkl")
    with pytest.raises(sources.DataError, match="directory"):
        sources.load_pickle(tmp_path)


def test_fuzzed_files_end_in_arrays_or_our_error(tmp_path):
    sys.path.insert(0, str(ROOT / "bench"))
    import fuzz

    start = time.perf_counter()
    outcomes = fuzz.fuzz(tmp_path, cases=500, seed=0, seconds=5)
    assert sum(outcomes.values()) == 500 and outcomes["dataset"] > 20 and outcomes["error"] > 100
    assert time.perf_counter() - start < 120


@pytest.mark.filterwarnings("ignore")
def test_the_fuzzer_of_checkpoints_knows_good_from_bad(tmp_path):
    sys.path.insert(0, str(ROOT / "bench"))
    import fuzz

    truth = {name: x.clone() for name, x in fuzz.make_model().state_dict().items()}
    odd = dict(fuzz.checkpoint_seeds(tmp_path, truth))
    path = tmp_path / "case.pt"
    for name, end in (("plain", "weights"), ("float64", "weights"), ("nested", "refused")):
        path.write_bytes(odd[name])
        assert fuzz.read_in_a_process(path, truth, 30).startswith(end)
    path.write_bytes(odd["plain"])
    other = {name: x + 1 for name, x in truth.items()}
    assert fuzz.read_in_a_process(path, other, 30) == "escape: other weights, torch.float32"
