"""
Open a pickle, torch.save file, .safetensors or .npy without trusting it and without loading it.

The file is memory-mapped and parsed by the standard library's unpickler, with no opcodes left but
those that plain values need and no names but those of arrays and tensors. Long byte strings become
views of the map. So arrays and tensors come out as numpy arrays that take no memory of their own.

    content = unpickle.load("embeddings.pkl")  # {"eva_blip3o_embeddings": array, ...}

torch.load is not used: with weights_only=True, a file of 244 bytes still makes it take 2 GB.
"""

import io
import json
import math
import mmap
import pickle
import re
import struct
import zipfile
from pickle import UnpicklingError

import numpy as np

VIEW = 256  # bytes: a longer string is a view of the map, a shorter one a copy
ROOM = 1 << 26  # bytes of small objects that a file may make, beside half of its own size
DIRECTORY = 1 << 24  # bytes that the directory of a zip file may have
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # begins a torch.save file of the format before zip
LONGEST_TEXT = 1 << 20  # bytes
SAVE_AGAIN = (
    "it stores arrays as text: save it again with pickle.dump(content, f, protocol=4) "
    "or torch.save(content, f, pickle_protocol=4)"
)

BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has no bfloat16: its bits, under their name


class Tensor(np.ndarray):
    """An array that the file holds as a torch tensor."""


class Reader:
    """A file over a memoryview, for the unpickler.

    room: a list of one number, the bytes of small objects that may still be made, which nested
    files share
    """

    def __init__(self, data, room):
        self.data, self.position, self.room = data, 0, room

    def read(self, n):
        part = self.data[self.position : self.position + n]
        if len(part) != n:
            raise UnpicklingError("it is cut short")
        self.position += n
        self.room[0] -= 32 + min(n, VIEW)  # about what an object takes, beside its bytes
        if self.room[0] < 0:
            raise UnpicklingError("it holds more small objects than embeddings of this size would")
        return part if n >= VIEW else part.tobytes()

    def readline(self):
        start = bytes(self.data[self.position : self.position + VIEW])
        return bytes(self.read(start.index(b"\n") + 1))


# ---------------------------------------------------------------- what a pickle may build


class Dict(dict):
    def __setitem__(self, key, value):
        # hashing can take forever: a tuple of tuples of tuples, or integers of the same hash
        if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
            raise UnpicklingError("a dict with keys that are not plain")
        super().__setitem__(key, value)


class DType:
    def __init__(self, spec, *flags):
        if not re.fullmatch(r"[?biufcO]\d{0,2}|[SU][1-9]\d{0,8}", spec):
            raise UnpicklingError("an array of a type that is neither numbers, strings nor objects")
        self.dtype = np.dtype(spec)

    def build(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """What numpy's _reconstruct makes, of which nothing but the state that follows is kept."""

    def __init__(self, *ignored):
        pass

    def build(self, state):
        _, shape, dtype, fortran, data = state
        self.array = make_array(data, dtype, shape, "F" if fortran else "C")

    def resolve(self):
        return self.array


class Storage:
    def __init__(self, dtype, data=b""):
        self.dtype, self.data = dtype, data


class LazyTensor:
    """What torch's _rebuild_tensor_v2 makes: a tensor whose storage may follow in the file."""

    def __init__(self, storage, offset, size, stride, *flags):
        self.storage, self.offset = storage, offset
        self.size, self.stride = size[:8], stride[:8]  # a hostile file could make them long

    def resolve(self):
        for n in (self.offset, *self.size, *self.stride):
            if type(n) is not int or n < 0:
                raise UnpicklingError("a tensor of impossible shape or stride")
        values = np.frombuffer(self.storage.data, self.storage.dtype)[self.offset :]
        # the number of elements, and where the last one stands: numpy's own check overflows
        count = math.prod(self.size)
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if count and max(count, last + 1) > len(values):
            raise UnpicklingError(f"a tensor larger than its storage: shape {tuple(self.size)}")
        strides = [step * values.itemsize for step in self.stride]
        return Tensor(self.size, values.dtype, values, 0, strides)


def make_array(data, dtype, shape, order):
    dtype = dtype.dtype
    if dtype.kind == "O":  # its objects, made of plain values like all others
        if not isinstance(data, list) or shape != (len(data),):
            raise UnpicklingError("an array of objects that is not a list of them")
        return data
    return np.ndarray(shape, dtype, data, order=order)


def make_scalar(dtype, data):
    if len(data) > VIEW:
        raise UnpicklingError(f"a single value of {len(data)} bytes")
    return make_array(data, dtype, (1,), "C").tolist()[0]


def make_bytes(text, encoding):
    if len(text) > VIEW:
        raise UnpicklingError(SAVE_AGAIN)
    return text.encode("latin1")


# every name that a pickle may mention, and what stands in its place: functions of ours that it may
# call, and inert values
NAMES = {
    "collections.OrderedDict": lambda: Dict(),
    "_codecs.encode": make_bytes,
    "__builtin__.bytes": lambda: b"",  # protocol 2's only way to say so
    "numpy.dtype": DType,
    "numpy.ndarray": None,
    "numpy.memmap": None,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy.core.multiarray.scalar": make_scalar,
    "numpy.core.numeric._frombuffer": make_array,
    "torch.Size": lambda size: tuple(size[:8]),
    "torch._utils._rebuild_tensor_v2": LazyTensor,
    "torch._utils._rebuild_parameter": lambda data, *flags: data,
    "torch.BFloat16Storage": BFLOAT16,
}
# the storages of torch, the same types in a safetensors file, and in numpy
TYPES = """\
torch.storage.UntypedStorage U8   u1
torch.FloatStorage           F32  <f4
torch.DoubleStorage          F64  <f8
torch.HalfStorage            F16  <f2
torch.BoolStorage            BOOL ?
torch.ByteStorage            U8   u1
torch.CharStorage            I8   i1
torch.ShortStorage           I16  <i2
torch.IntStorage             I32  <i4
torch.LongStorage            I64  <i8
torch.ComplexFloatStorage    C64  <c8
torch.ComplexDoubleStorage   C128 <c16
"""
SAFETENSORS = {"BF16": BFLOAT16}
for line in TYPES.splitlines():
    storage, name, kind = line.split()
    NAMES[storage] = SAFETENSORS[name] = np.dtype(kind)

OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINUNICODE BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"""


class Dispatch(dict):
    def __missing__(self, opcode):
        raise UnpicklingError(f"it uses the opcode {bytes([opcode])!r}, which no embeddings need")


class Unpickler(pickle._Unpickler):  # the one in C would copy every byte string
    """get_storage(key, dtype) -> Storage, where the pickle is one of torch."""

    dispatch = Dispatch()

    def __init__(self, reader, get_storage=None):
        super().__init__(reader)
        self.reader, self.get_storage = reader, get_storage

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if name == "torch.storage._load_from_bytes":
            return self.load_storage
        if name not in NAMES:
            raise UnpicklingError(f"it asks for {name!r}, which no embeddings need")
        return NAMES[name]

    def load_storage(self, data):
        room = self.reader.room
        before = room[0]
        value = load_file(Reader(memoryview(data), room))
        if isinstance(value, Storage):  # all else that was made for it is gone
            room[0] = before - VIEW
        return value

    def persistent_load(self, pid):
        _, dtype, key, _, _, *view = pid
        if not isinstance(dtype, np.dtype) or not isinstance(key, str) or any(view):
            raise UnpicklingError("a torch storage of unknown type")
        return self.get_storage(key, dtype)

    def load_frame(self):
        self.read(8)  # frames spare small reads from a file; here there are none

    def load_reduce(self):
        args = self.stack.pop()
        if type(args) is not tuple or len(args) > 16:  # a string would come apart into its bytes
            raise UnpicklingError("it calls something with arguments that nothing takes")
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self):
        state = self.stack.pop()
        self.stack[-1].build(state)  # of an Array or a DType, nothing else has that method

    def load_binunicode(self):
        (n,) = struct.unpack("<I", self.read(4))
        if n > LONGEST_TEXT:
            raise UnpicklingError(SAVE_AGAIN)
        self.append(str(self.read(n), "utf-8", "surrogatepass"))

    def load_empty_dictionary(self):
        self.append(Dict())

    load_bytearray8 = pickle._Unpickler.load_binbytes8


for name in OPCODES.split():
    opcode = getattr(pickle, name)[0]
    method = pickle._Unpickler.dispatch[opcode].__name__
    Unpickler.dispatch[opcode] = getattr(Unpickler, method)


# ---------------------------------------------------------------- files


def load_zip(data, room):
    """What torch.save wrote: a zip file of data.pkl and one uncompressed entry per storage."""
    end = data[-DIRECTORY:]  # zipfile finds the directory there, and counts positions from there
    archive = zipfile.ZipFile(io.BytesIO(end))
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("data.pkl")]
    if not pickles:
        raise UnpicklingError("a zip file that is not of torch.save; a .npz of several arrays?")
    folder = pickles[0].removesuffix("data.pkl")

    def read(name):
        entry = entries[name]
        start = entry.header_offset + len(data) - len(end)
        name_size, extra_size = struct.unpack("<HH", data[start + 26 : start + 30])
        start += 30 + name_size + extra_size
        if entry.compress_type or start + entry.file_size > len(data):
            raise UnpicklingError(f"{name!r} in the zip file is compressed or cut short")
        return data[start : start + entry.file_size]

    if folder + "byteorder" in entries and read(folder + "byteorder") != b"little":
        raise UnpicklingError("it was saved on a machine of another byte order")

    def get_storage(key, dtype):
        return Storage(dtype, read(f"{folder}data/{key}"))

    return Unpickler(Reader(read(pickles[0]), room), get_storage).load()


def load_legacy(reader):
    """What torch.save wrote before version 1.6, and what a pickled tensor holds.

    The storages follow the object that refers to them.
    """
    Unpickler(reader).load()  # the version
    if Unpickler(reader).load()["little_endian"] is not True:
        raise UnpicklingError("it was saved on a machine of another byte order")
    storages = {}

    def get_storage(key, dtype):
        return storages.setdefault(key, Storage(dtype))

    value = Unpickler(reader, get_storage).load()
    for key in Unpickler(reader).load():
        if not isinstance(key, str):
            raise UnpicklingError("a torch file with unknown storages")
        (n,) = struct.unpack("<q", reader.read(8))
        storages[key].data = reader.read(n * storages[key].dtype.itemsize)
    return value


def load_file(reader):
    """A pickle or a torch.save file that is no zip file, to its end."""
    value = Unpickler(reader).load()
    if value == TORCH_MAGIC:
        value = load_legacy(reader)
    if reader.position != len(reader.data):
        raise UnpicklingError(f"{len(reader.data) - reader.position} bytes follow its end")
    return value


def load_safetensors(data):
    """{name: array} of a safetensors file: the length of a JSON header, the header, the values."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + min(n, LONGEST_TEXT)]))
    content = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            dtype = SAFETENSORS.get(entry["dtype"], entry["dtype"])
            values = np.frombuffer(data[8 + n :][start:end], dtype)
            content[name] = values.reshape(entry["shape"])
    return content


def resolve(content):
    """The dict, with values in place of Array and LazyTensor, also in a list under a key."""
    lists = {}  # by identity: the same one may be there under many keys
    for key, value in content.items():
        value = resolve_one(value)
        if isinstance(value, (list, tuple)):
            if id(value) not in lists:
                lists[id(value)] = [resolve_one(item) for item in value]
            value = lists[id(value)]
        content[key] = value
    return content


def resolve_one(value):
    return value.resolve() if hasattr(value, "resolve") else value


def load(path):
    """What a pickle, a torch.save file, a .safetensors or a .npy (as {"array": ...}) holds.

    Arrays and tensors are read-only numpy arrays over a memory map, bfloat16 of dtype BFLOAT16.
    Nothing but the functions in NAMES can be called by the file. Raises OSError where it cannot be
    read, UnpicklingError whatever else is wrong with it.
    """
    try:
        with open(path, "rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        if data[:6] == b"\x93NUMPY":
            return {"array": np.load(path, mmap_mode="r")}
        if str(path).endswith(".safetensors"):
            return load_safetensors(data)
        room = [ROOM + len(data) // 2]
        is_zip = data[:2] == b"PK"
        value = load_zip(data, room) if is_zip else load_file(Reader(data, room))
        return resolve(value) if isinstance(value, dict) else value
    except OSError:
        raise
    except Exception as e:  # a hostile or broken file can raise anything: all of it means the same
        raise UnpicklingError(" ".join(str(e).split()) or type(e).__name__) from e


def drop_pages(array):
    """Give the pages of an array, or of Rows, over a memory map back to the kernel."""
    while hasattr(array, "base"):
        array = array.base
    owner = getattr(array, "obj", array)
    if hasattr(owner, "madvise"):  # as a mmap has, but not on Windows
        owner.madvise(mmap.MADV_DONTNEED)
