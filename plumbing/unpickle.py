"""
Open a pickle, torch.save file, .safetensors or .npy without trusting it and without loading it.

The file is memory-mapped and parsed by the opcodes of the standard library's unpickler, of those
only that plain values and objects need, and with no names but those of arrays and tensors: of any
other object an Unknown is kept, which says its name. Long byte strings become views of the map. So
arrays and tensors come out as numpy arrays that take no memory of their own.

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
import types
import zipfile

import numpy as np

VIEW = 256  # bytes: a longer string is a view of the map, a shorter one a copy
ROOM = 67_000_000  # bytes of small objects that a file may make, beside half of its own size
STORAGE_ROOM = 10_000  # the same of a file nested in it, a storage of torch, which takes 4,000
DIRECTORY = 16_000_000  # bytes that the directory of a zip file may have
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # begins a torch.save file of the format before zip
LONGEST_TEXT = 1_048_576  # bytes
SAVE_AGAIN = (
    "it stores arrays as text: save it again with pickle.dump(content, f, protocol=4) "
    "or torch.save(content, f, pickle_protocol=4)"
)
# how files of other formats begin
FORMATS = rb"""(?xs)
    (?P<gzip> \x1f\x8b) | (?P<xz> \xfd7zXZ) | (?P<bzip2> BZh) | (?P<zstandard> \x28\xb5\x2f\xfd) |
    (?P<zlib_of_joblib> x[\x01\x5e\x9c\xda]) | (?P<joblib> .{,9999}?joblib\.numpy_pickle) |
    (?P<lz4> \x04\x22\x4d\x18) | (?P<parquet> PAR1) | (?P<arrow> ARROW1 | \xff{4}) |
    (?P<HDF5> \x89HDF) | (?P<tar> .{257}ustar) | (?P<JSON> \s*[\[{]) |
    (?P<CSV> [\w\s"#.+-]{1,9999}[,;\t]) | (?P<unknown> [^\x80P])
"""

BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # numpy has no bfloat16: its bits, under their name


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


# ---------------------------------------------------------------- what a pickle may build


class Unknown(str):
    """Stands for an object that is neither array nor plain value, such as "<datetime.datetime>".

    Nothing of it is called, and what it would be made of is forgotten.
    """

    dtype = np.dtype("O")  # as that of an array: numpy's strings are pickled as a list of them

    def __call__(self, *ignored):
        return self

    build = append = extend = add = __setitem__ = __call__


class Dict(dict):
    def __setitem__(self, key, value):
        # as JSON has them: hashing others can take forever, such as a tuple of tuples of tuples, or
        # integers of the same hash
        is_plain = isinstance(key, str | int | float)
        super().__setitem__(str(key) if is_plain else f"<{type(key).__name__}>", value)


class DType:
    def __init__(self, spec, *flags):
        if not re.fullmatch(r"[?biufcmMO]\d*|[SUV][1-9]\d{0,8}", spec):
            spec = "O"  # of which make_array takes no memory
        self.dtype = np.dtype(spec)

    def build(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for an array or tensor that resolve() makes once the whole file is read.

    It is what numpy's _reconstruct makes, of which nothing but the state that follows is kept.
    """

    def build(self, state):
        _, shape, dtype, fortran, data = state
        self.resolve = lambda: make_array(data, dtype, shape, "F" if fortran else "C")


class Storage(types.SimpleNamespace):
    """The dtype of tensors and, once the pickle is read, their data."""


def make_tensor(storage, offset, size, stride, gradient, hooks, *negated):
    """What torch's _rebuild_tensor_v2 makes, an Array as long as the storage has no data yet."""

    def resolve():
        # a hostile file could make the shape long
        if negated or len(size) + len(stride) > 16 or min((offset, *size, *stride)) < 0:
            raise DataError("a tensor of impossible strides, or negated: save its clone()")
        values = np.frombuffer(storage.data, storage.dtype)[offset:]
        # the number of elements, and where the last one stands: numpy's own check overflows
        count = math.prod(size)
        last = sum((n - 1) * step for n, step in zip(size, stride))
        if count and max(count, last + 1) > len(values):
            raise DataError(f"a tensor larger than its storage: shape {tuple(size)}")
        strides = [step * values.itemsize for step in stride]
        return np.ndarray(size, values.dtype, values, 0, strides)

    array = Array()
    array.resolve = resolve
    return array


def make_array(data, dtype, shape, order, axes=None):
    if dtype.dtype.kind == "O":  # its objects, made of plain values like all others
        return data if shape == (len(data),) else Unknown("<array of objects>")
    array = np.ndarray(shape, dtype.dtype, data, order=order)
    return array if axes is None else array.transpose(axes)  # of order K, which ndarray takes for C


def make_scalar(dtype, data):
    if len(data) > VIEW:
        raise DataError(f"a single value of {len(data)} bytes")
    return np.frombuffer(data, dtype.dtype).item()


def make_bytes(text, encoding):
    if len(text) > VIEW:
        raise DataError(SAVE_AGAIN)
    return text.encode("latin1")


def load_storage(data):
    """The storage of a pickled tensor, a file in the old format of torch.save in a byte string."""
    storage = load_file(memoryview(data), STORAGE_ROOM)
    if not isinstance(storage, Storage):  # all else that was made for it is gone
        raise DataError("a tensor without a storage")
    return storage


# names that a pickle may mention, and what stands in their place: functions of ours that it may
# call, and inert values
NAMES = {
    "collections.OrderedDict": lambda: Dict(),
    "collections.defaultdict": lambda *factory: Dict(),
    "_codecs.encode": make_bytes,
    "numpy.dtype": DType,
    "numpy.core.multiarray._reconstruct": lambda *ignored: Array(),
    "numpy.core.multiarray.scalar": make_scalar,
    "numpy.core.numeric._frombuffer": make_array,
    "torch.storage._load_from_bytes": load_storage,
    "torch.Size": lambda size: tuple(size[:8]),
    "torch._utils._rebuild_tensor_v2": make_tensor,
    "torch._utils._rebuild_parameter": lambda data, *flags: data,
    "torch.BFloat16Storage": BFLOAT16,
}
# what nobody needs who means well: it would not be called, but better leave such a file alone
COMMANDS = r"(posix|nt|subprocess|sys|runpy)\.|\w*builtin\w*\.(eval|exec|open|__import__)$"
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
torch.QUInt8Storage          U8   u1
torch.QInt8Storage           I8   i1
torch.QInt32Storage          I32  <i4
torch.UInt16Storage          U16  <u2
torch.UInt32Storage          U32  <u4
torch.UInt64Storage          U64  <u8
"""
SAFETENSORS = {"BF16": BFLOAT16}
for line in TYPES.splitlines():
    storage, name, kind = line.split()
    NAMES[storage] = SAFETENSORS[name] = np.dtype(kind)

OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINUNICODE BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    EMPTY_SET ADDITEMS FROZENSET NEWOBJ NEWOBJ_EX
    MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"""
OPCODES = {getattr(pickle, name) for name in OPCODES.split()}


class Unpickler(pickle._Unpickler):  # the one in C would copy every byte string
    """A file over a memoryview, and the reader of the pickles in it.

    room: the bytes of small objects that may still be made
    storages: {key: Storage} of those that the pickles mention, where they are of torch
    """

    def __init__(self, data, room):
        self.data, self.room, self.storages = data, room, {}

    def load(self):
        """The next value. The library's own loop would read through what may copy long strings."""
        self.stack, self.metastack, self.memo = [], [], {}
        self.append = self.stack.append
        while True:
            opcode = self.read(1)
            if opcode == pickle.STOP:
                return self.stack.pop()
            if opcode not in OPCODES:
                raise DataError(f"it uses the opcode {opcode!r}, which no embeddings need")
            method = self.dispatch[opcode[0]].__name__
            getattr(self, method)()  # of this class where it has one

    def read(self, n):
        part, self.data = self.data[:n], self.data[n:]
        if len(part) != n:
            raise DataError("it is cut short")
        self.room -= 32 + min(n, VIEW)  # about what an object takes, beside its bytes
        if self.room < 0:
            raise DataError("it holds more small objects than embeddings of this size would")
        return part if n > VIEW else part.tobytes()

    def readline(self):
        return self.read(re.match(rb".{,255}\n", self.data).end())

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if re.match(COMMANDS, name):
            raise DataError(f"it asks for {name!r}, which no embeddings need")
        return NAMES.get(name, Unknown(f"<{ascii(name)[1:-1][:80]}>"))

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        if not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise DataError("a torch storage of unknown type")
        return self.storages.setdefault(key, Storage(dtype=dtype))

    def load_frame(self):
        self.read(8)  # frames spare small reads from a file; here there are none

    def load_reduce(self):
        args = self.stack[-1]
        if type(args) is not tuple or len(args) > 64:  # a string would come apart into its bytes
            raise DataError("it calls something with arguments that nothing takes")
        super().load_reduce()

    def load_build(self):
        # of an Array, a DType or an Unknown: nothing else has that method
        self.stack[-2].build(self.stack.pop())

    def load_binunicode(self):
        if int.from_bytes(self.data[:4], "little") > LONGEST_TEXT:
            raise DataError(SAVE_AGAIN)
        super().load_binunicode()

    def load_empty_dictionary(self):
        self.append(Dict())

    def load_empty_set(self):
        self.append(Unknown("<builtins.set>"))  # hashing its items could take forever

    def load_frozenset(self):
        self.pop_mark()
        self.load_empty_set()

    def load_newobj_ex(self):
        self.stack.pop()  # its keyword arguments
        self.load_reduce()

    load_newobj = load_reduce
    load_bytearray8 = pickle._Unpickler.load_binbytes8


# ---------------------------------------------------------------- in words


def dtype_name(array):
    """The name "float32" in any byte order; numpy itself has no bfloat16."""
    return "bfloat16" if array.dtype == BFLOAT16 else array.dtype.name


def describe(value):
    """What a file holds under a key, in a few words."""
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, {dtype_name(value)}"
    if isinstance(value, Unknown):
        return value
    if hasattr(value, "__len__"):
        return f"{type(value).__name__.lower()} of {len(value)}"
    return f"<{type(value).__name__}>"


# ---------------------------------------------------------------- files


def load_zip(data, room):
    """What torch.save wrote: a zip file of data.pkl and one uncompressed entry per storage."""
    end = data[-DIRECTORY:]  # zipfile finds the directory there, and counts positions from there
    archive = zipfile.ZipFile(io.BytesIO(end))
    names = archive.namelist()
    folder = names[0].split("/")[0]
    if f"{folder}/data.pkl" not in names:
        raise DataError("a zip file that is not of torch.save; save a .npz as .npy files")

    def read(name):
        entry = archive.getinfo(f"{folder}/{name}")
        start = entry.header_offset + len(data) - len(end)
        if entry.compress_type:
            raise DataError(f"{name!r} in the zip file is compressed")
        # 30 bytes, of which 4 are the sizes of the name and the extra field that follow
        start += 30 + sum(struct.unpack_from("<HH", data, start + 26))
        return data[start:][: entry.file_size]

    file = Unpickler(read("data.pkl"), room)
    value = file.load()
    for key, storage in file.storages.items():
        storage.data = read(f"data/{key}")
    return value


def load_file(data, room):
    """A pickle, or what torch.save wrote before version 1.6 and pickles of tensors hold."""
    file = Unpickler(data, room)
    value = file.load()
    if value == TORCH_MAGIC:
        file.load()  # the version
        file.load()  # the machine's byte order, taken to be ours
        value = file.load()
        for key in file.load():
            if not isinstance(key, str):
                raise DataError("a torch file with unknown storages")
            storage = file.storages[key]
            n = int.from_bytes(file.read(8), "little")
            storage.data = file.read(n * storage.dtype.itemsize)
    if file.data:
        raise DataError(f"{len(file.data)} bytes follow its end")
    return value


def load_safetensors(data):
    """{name: array} of a safetensors file: the length of a JSON header, the header, the values."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + n][:LONGEST_TEXT]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = SAFETENSORS.get(entry["dtype"], "V1")  # as numpy has no floats of one byte
        values = np.frombuffer(data[8 + n :][start:end], dtype)
        header[name] = values.reshape(entry["shape"])
    return header


def resolve(content):
    """Put arrays and tensors in place of each Array in the dict, also in a list under a key."""
    lists = {}  # by identity: the same one may be there under many keys
    for key, value in content.items():
        value = resolve_one(value)
        if isinstance(value, list | tuple):
            if id(value) not in lists:
                lists[id(value)] = [resolve_one(item) for item in value]
            value = lists[id(value)]
        content[key] = value


def resolve_one(value):
    return value.resolve() if hasattr(value, "resolve") else value


def load(path):
    """What a pickle, a torch.save file, a .safetensors or a .npy (as {"array": ...}) holds.

    Arrays and tensors are read-only numpy arrays over a memory map, bfloat16 of dtype BFLOAT16.
    Nothing but the functions in NAMES can be called by the file. Raises DataError whatever is wrong
    with it.
    """
    try:
        data = memoryview(np.memmap(path, mode="r").base)
        if data[:6] == b"\x93NUMPY":
            return {"array": np.load(path, mmap_mode="r")}
        if data[8:9] == b"{":
            return load_safetensors(data)
        foreign = re.match(FORMATS, data)
        if foreign:
            raise DataError(
                f"its format is {foreign.lastgroup}: unpack it, or save the arrays in it with "
                "numpy.save or pickle.dump(content, f, protocol=4)"
            )
        load_content = load_zip if data[:2] == b"PK" else load_file
        content = load_content(data, ROOM + len(data) // 2)
        if not isinstance(content, dict):
            raise DataError(f"it holds a {describe(content)}, not a dict")
        resolve(content)
        return content
    except Exception as e:  # a hostile or broken file can raise anything: all of it means the same
        reason = f"cannot be read as embeddings: {' '.join(str(e).split())}"
        raise DataError(f"{path}: {reason[:1000]}") from e


def drop_pages(array):
    """Give the pages of an array, of Rows or of Joined, over a memory map back to the kernel."""
    for owner in getattr(array, "arrays", [array]):
        while hasattr(owner, "base"):
            owner = owner.base
        owner = getattr(owner, "obj", owner)
        if hasattr(owner, "madvise"):  # as a mmap has, but not on Windows
            owner.madvise(mmap.MADV_DONTNEED)
