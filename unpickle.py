"""
Open a pickle, a torch.save file or a .npy of embeddings without trusting it and without loading it.

The file is memory-mapped and parsed by the standard library's unpickler, with no opcodes left but those that plain
values need and no names but those of arrays and tensors. Long byte strings become views of the map. So arrays, and
tensors inside their nested torch serialization, come out as numpy arrays that take no memory of their own.

    content = unpickle.load("embeddings.pkl")  # {"eva_blip3o_embeddings": array over the map, "keys": [...], ...}
"""

import codecs
import functools
import math
import mmap
import os
import pickle
import re
import struct
import tempfile
import zipfile
from pickle import UnpicklingError

import numpy as np

VIEW = 256  # bytes: a longer string is a view of the map, a shorter one a copy
ROOM, MORE = (
    1 << 26,
    1 << 29,
)  # bytes of small objects that a file may make: ROOM + min(size, MORE) + size / 8
PIECE = 1 << 24  # bytes of text decoded at a time
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what a torch.save file of the format before zip begins with

BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has no bfloat16: its bits, under their name


class Tensor(np.ndarray):
    """An array that the file holds as a torch tensor."""


class Text:
    """A long string, as a view of its UTF-8."""

    def __init__(self, data):
        self.data = data

    def __str__(self):
        return str(self.data, "utf-8", "surrogatepass")


class Reader:
    """A file over a buffer, for the unpickler. What is read draws on `room`, a list of one number of bytes."""

    def __init__(self, data, room):
        self.data, self.position, self.room = memoryview(data), 0, room

    def read(self, n):
        part = self.data[self.position : self.position + n]
        if len(part) < n:
            raise UnpicklingError("it is cut short")
        self.position += n
        self.room[0] -= 32 + min(n, VIEW)  # about what an object takes, beside its bytes
        if self.room[0] < 0:
            raise UnpicklingError("it holds more small objects than embeddings of this size would")
        return part if n >= VIEW else part.tobytes()

    def readline(self):
        line, newline, _ = (
            self.data[self.position : self.position + VIEW].tobytes().partition(b"\n")
        )
        return bytes(self.read(len(line) + len(newline)))


class ZipBytes(Reader):
    """The same for zipfile, which asks for more than there is."""

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        self.position = offset + (0, self.position, len(self.data))[whence]
        if self.position < 0:
            raise UnpicklingError("a broken zip file")
        return self.position

    def read(self, n=-1):
        part = self.data[self.position :][: n if n >= 0 else None]
        self.position += len(part)
        self.room[0] -= 8 * len(
            part
        )  # an entry of 46 bytes and a name becomes an object of several hundred
        if self.room[0] < 0:
            raise UnpicklingError("it holds more zip entries than embeddings of this size would")
        return part.tobytes()


class Spool:
    """Where the bytes go that protocol 2 stores as text: to a temporary file, never larger than the source."""

    def __init__(self, size, folder):
        self.size, self.folder, self.used, self.map = size, folder, 0, None

    def encode(self, data):
        if self.map is None:
            self.file = tempfile.TemporaryFile(dir=self.folder)
            self.file.truncate(self.size)  # sparse: takes no room before it is written
            self.map = memoryview(mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ))
        decoder, start = codecs.getincrementaldecoder("utf-8")(), self.used
        for i in range(0, len(data), PIECE):
            part = decoder.decode(data[i : i + PIECE].tobytes(), i + PIECE >= len(data)).encode(
                "latin1"
            )
            if self.used + len(part) > self.size:
                raise UnpicklingError("it uses the same text as bytes again and again")
            self.file.seek(self.used)
            self.file.write(part)
            self.used += len(part)
        self.file.flush()
        return self.map[start : self.used]


# ---------------------------------------------------------------- what a pickle may build


class Dict(dict):
    def __setitem__(self, key, value):
        # hashing can take forever: a tuple of tuples of tuples, or integers that all have the same hash
        if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
            raise UnpicklingError("a dict with keys that are not plain")
        super().__setitem__(key, value)


class DType:
    def __init__(self, dtype):
        self.value = dtype

    def build(self, state):
        if state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("an array of unknown byte order")
        self.value = self.value.newbyteorder(state[1])


class Array:
    """What numpy's _reconstruct makes, before and after BUILD gives it its state."""

    value = None

    def build(self, state):
        _, shape, dtype, fortran, data = state
        self.value = as_array(data, dtype, shape, "F" if fortran else "C")


class Storage:
    def __init__(self, data, dtype):
        self.data, self.dtype = data, dtype


def as_array(data, dtype, shape, order):
    if dtype.value.kind == "O":  # its objects, made of plain values like all others
        if not isinstance(data, list) or shape != (len(data),):
            raise UnpicklingError("an array of objects that is not a list of them")
        return data
    array = np.ndarray(shape, dtype.value, data, order=order)
    if array.nbytes != memoryview(data).nbytes:
        raise UnpicklingError(
            f"an array of {array.nbytes} bytes in a string of {memoryview(data).nbytes}"
        )
    return array


def make_array(unpickler, kind, shape, typecode):
    if kind != "ndarray":
        raise UnpicklingError(f"an array of class {type(kind).__name__}")
    return Array()


def make_dtype(unpickler, spec, *flags):
    if not isinstance(spec, str) or not re.fullmatch(r"[?biufcO]\d{0,2}|[SU][1-9]\d{0,8}", spec):
        raise UnpicklingError("an array of a type that is neither numbers, strings nor objects")
    return DType(np.dtype(spec))


def make_scalar(unpickler, dtype, data):
    if len(data) > VIEW:
        raise UnpicklingError(f"a single value of {len(data)} bytes")
    return as_array(data, dtype, (1,), "C").tolist()[0]


def make_bytes(unpickler, text, encoding):
    if encoding not in ("latin1", "latin-1"):
        raise UnpicklingError("bytes in an unknown encoding")
    return unpickler.spool.encode(text.data) if isinstance(text, Text) else text.encode("latin1")


def make_tensor(unpickler, storage, offset, size, stride, *flags):
    if storage.data is None:
        return None  # the first pass over a torch file: see load_legacy
    if (
        len(size) > 8
        or len(size) != len(stride)
        or any(type(n) is not int or n < 0 for n in (offset, *size, *stride))
    ):
        raise UnpicklingError("a tensor of impossible shape or stride")
    width = storage.dtype.itemsize
    last = offset + sum(
        (n - 1) * step for n, step in zip(size, stride)
    )  # numpy's own check overflows
    if max(math.prod(size), last + 1 if math.prod(size) else 0) * width > len(storage.data):
        raise UnpicklingError(
            f"a tensor of more elements than its storage holds: shape {tuple(size)}"
        )
    strides = [n * width for n in stride]
    return np.ndarray.__new__(Tensor, size, storage.dtype, storage.data, offset * width, strides)


def make_storage(unpickler, data):
    storage = load_torch(memoryview(data), unpickler.room, unpickler.spool)
    if not isinstance(storage, Storage):
        raise UnpicklingError("a nested file that is not a torch storage")
    return storage


# every name that a pickle may call, and what is called in its place, with the unpickler as first argument
CALLS = {
    ("collections", "OrderedDict"): lambda unpickler: Dict(),
    ("_codecs", "encode"): make_bytes,
    ("numpy", "dtype"): make_dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): make_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): make_scalar for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): lambda unpickler, *args: as_array(*args)
        for core in ("core", "_core")
    },
    ("torch", "Size"): lambda unpickler, size: tuple(size[:8]),
    ("__builtin__", "bytes"): lambda unpickler: b"",  # protocol 2's only way to say so
    ("torch.storage", "_load_from_bytes"): make_storage,
    ("torch._utils", "_rebuild_tensor_v2"): make_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda unpickler, data, *flags: data,
}
# every name that a pickle may mention: inert values
NAMES = {("numpy", name): "ndarray" for name in ("ndarray", "memmap")}
NAMES |= {("torch.storage", "UntypedStorage"): np.dtype("u1")} | {
    ("torch", f"{name}Storage"): np.dtype(spec) if isinstance(spec, str) else spec
    for name, spec in dict(
        Float="<f4", Double="<f8", Half="<f2", BFloat16=BFLOAT16, Bool="?", Byte="u1", Char="i1", Short="<i2",
        Int="<i4", Long="<i8", ComplexFloat="<c8", ComplexDouble="<c16",
    ).items()
}  # fmt: skip

OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID""".split()


class Dispatch(dict):
    def __missing__(self, opcode):
        raise UnpicklingError(
            f"it uses the opcode {bytes([opcode])!r}, which embeddings do not need"
        )


class Unpickler(pickle._Unpickler):  # the one in C would copy every byte string
    def __init__(self, reader, spool, storages=None):
        super().__init__(reader)
        self.room, self.spool, self.storages = reader.room, spool, storages

    def find_class(self, module, name):
        if (module, name) in NAMES:
            return NAMES[module, name]
        if (module, name) not in CALLS:
            raise UnpicklingError(
                f"it asks for {module + '.' + name!r}, which is not on the list of what embeddings need"
            )
        return functools.partial(CALLS[module, name], self)

    def persistent_load(self, pid):
        if (
            self.storages is None
            or not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] != "storage"
        ):
            raise UnpicklingError("a persistent id outside a torch file")
        if not isinstance(pid[1], np.dtype) or not isinstance(pid[2], str):
            raise UnpicklingError("a torch storage of unknown type")
        if any(pid[5:]):
            raise UnpicklingError("a view of a storage, as torch wrote before version 0.4")
        return self.storages(pid[2], pid[1])

    def load_frame(self):
        self.read(8)  # frames spare small reads from a file; here there are none

    def load_reduce(self):
        args = self.stack.pop()
        if (
            type(args) is not tuple or len(args) > 16
        ):  # a long string would come apart into its bytes
            raise UnpicklingError("it calls something with arguments that nothing takes")
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self):
        state, instance = self.stack.pop(), self.stack[-1]
        if type(instance) not in (Array, DType):
            raise UnpicklingError("it sets the state of something that is not an array")
        instance.build(state)

    def load_text(self, layout):
        data = self.read(*struct.unpack(layout, self.read(struct.calcsize(layout))))
        self.append(
            Text(data) if isinstance(data, memoryview) else str(data, "utf-8", "surrogatepass")
        )

    dispatch = Dispatch(
        (op, pickle._Unpickler.dispatch[op])
        for op in (getattr(pickle, name)[0] for name in OPCODES)
    )
    dispatch |= {
        pickle.FRAME[0]: load_frame,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.EMPTY_DICT[0]: lambda self: self.append(Dict()),
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
        pickle.SHORT_BINUNICODE[0]: lambda self: self.load_text("<B"),
        pickle.BINUNICODE[0]: lambda self: self.load_text("<I"),
        pickle.BINUNICODE8[0]: lambda self: self.load_text("<Q"),
    }


# ---------------------------------------------------------------- files


def load_zip(data, room, spool):
    """What torch.save wrote: a zip file of data.pkl and one uncompressed entry a storage."""
    entries = {entry.filename: entry for entry in zipfile.ZipFile(ZipBytes(data, room)).infolist()}
    names = [name for name in entries if name.endswith("data.pkl") and name.count("/") < 2]
    if len(names) != 1:
        raise UnpicklingError("a zip file that is not of torch.save")
    prefix = names[0].removesuffix("data.pkl")

    def read(name):
        entry = entries[name]
        start = entry.header_offset
        start += 30 + sum(
            struct.unpack("<HH", data[start + 26 : start + 30])
        )  # the lengths of name and extra field
        if entry.compress_type or start + entry.file_size > len(data):
            raise UnpicklingError(f"{name!r} in the zip file is compressed or cut short")
        return data[start : start + entry.file_size]

    if prefix + "byteorder" in entries and bytes(read(prefix + "byteorder")[:8]) != b"little":
        raise UnpicklingError("it was saved on a machine of another byte order")
    return Unpickler(
        Reader(read(names[0]), room),
        spool,
        lambda key, dtype: Storage(read(f"{prefix}data/{key}"), dtype),
    ).load()


def load_legacy(reader, spool):
    """What torch.save wrote before version 1.6, and what a pickled tensor holds: storages follow the object.

    So the object is read twice, first to learn what storages there are.
    """
    version, system = (Unpickler(reader, spool).load() for _ in range(2))
    if version != 1001 or system.get("little_endian") is not True:
        raise UnpicklingError("a torch file of unknown version or byte order")
    start, found, used = reader.position, {}, spool.used
    Unpickler(reader, spool, lambda key, dtype: found.setdefault(key, Storage(None, dtype))).load()
    keys = Unpickler(reader, spool).load()
    if not all(isinstance(key, str) for key in keys):
        raise UnpicklingError("a torch file with unknown storages")
    for key in keys:
        n = struct.unpack("<q", reader.read(8))[0] * found[key].dtype.itemsize
        if n < 0:
            raise UnpicklingError("a storage of negative size")
        found[key].data = reader.read(n)
    end, reader.position, spool.used = reader.position, start, used
    value = Unpickler(reader, spool, lambda key, dtype: Storage(found[key].data, dtype)).load()
    reader.position = end
    return value


def load_torch(data, room, spool):
    if data[:2] == b"PK":
        return load_zip(data, room, spool)
    reader = Reader(data, room)
    value = Unpickler(reader, spool).load()
    value = load_legacy(reader, spool) if type(value) is int and value == TORCH_MAGIC else value
    if reader.position != len(data):
        raise UnpicklingError(f"{len(data) - reader.position} bytes follow its end")
    return value


def settle(content):
    """The dict with its Arrays, also those in a list under a key, replaced by what they became."""
    lists = {}  # by identity: the same one may be there under many keys
    for key, value in content.items():
        content[key] = value = value.value if isinstance(value, Array) else value
        if isinstance(value, (list, tuple)):
            if id(value) not in lists:
                lists[id(value)] = [v.value if isinstance(v, Array) else v for v in value]
            content[key] = lists[id(value)]
    return content


def load(path, scratch=None):
    """What a pickle, a torch.save file or a .npy (as {"array": ...}) holds.

    Arrays and tensors are read-only numpy arrays over a memory map, bfloat16 of dtype BFLOAT16; strings
    of more than VIEW bytes are Text. `scratch` is the folder for the temporary file that arrays of protocol
    2 need. Nothing but the functions in CALLS can be called by the file. Raises OSError where it cannot
    be read, and UnpicklingError, whatever else is wrong with it.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            raise UnpicklingError("it is empty")
        data = memoryview(mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ))
    try:
        if data[:6] == b"\x93NUMPY":
            return {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        value = load_torch(data, [ROOM + min(size, MORE) + size // 8], Spool(size, scratch))
        return settle(value) if isinstance(value, dict) else value
    except OSError:
        raise
    except KeyError as e:
        raise UnpicklingError(f"it refers to {e}, which it does not hold") from e
    except Exception as e:  # a hostile or broken file can raise anything: all of it means the same
        raise UnpicklingError(" ".join(str(e).split()) or type(e).__name__) from e


def drop_pages(array):
    """Give the pages of an array over a memory map back to the kernel."""
    while isinstance(array, np.ndarray):
        array = array.base
    owner = getattr(array, "obj", array)
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
