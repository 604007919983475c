"""
Mutate valid files at random and read them: every case must end well or in our own error.

    python bench/fuzz.py FOLDER --cases=20000 --seed=0
    python bench/fuzz.py FOLDER --cases=2000 --kind=checkpoint

FOLDER is for temporary files. A case is one of some small valid files with a few mutations: bytes
flipped, cut out, repeated or inserted, opcodes swapped, lengths replaced by extreme ones, the end
cut off. Prints how the cases ended.

--kind=data: pickles of protocols 3 to 5, of arrays in any memory order and beside other objects,
torch.save files, safetensors and .npy pairs are converted to a dataset. A case fails on any
exception but DataError, if it takes longer than --seconds, or if the process's memory grows by more
than --megabytes.

--kind=checkpoint: files of torch.save, some of them with sparse, quantized, nested and other odd
tensors, are read as checkpoints, each in a process of its own. A case fails if that crashes, if it
takes longer than --seconds, on any exception but a ValueError of one line, and if weights other
than those that were saved come out. Where the pickle in the zip file was mutated and the CRC made
to fit, any weights will do. All failures are counted.
"""

import argparse
import collections
import contextlib
import datetime
import io
import os
import pickle
import random
import re
import signal
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare  # noqa: E402
from plumbing.configurator import configure  # noqa: E402
from plumbing.dataset import open_dataset  # noqa: E402
from plumbing.sources import DataError  # noqa: E402

COND, TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"
OPCODES = bytes(op[0] for op in vars(pickle).values() if type(op) is bytes and len(op) == 1)
EXTREMES = [0, 1, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
EXTREMES += [2**63 - 1, 2**64 - 1]


def seeds(folder):
    """Valid files: [(suffix, bytes)]."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4, 20), np.float32)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    names = dict(
        keys=[f"key {i}" for i in range(8)],
        captions=["a caption", "long " * 99] * 4,
        config={"a": [1, {"b": 2.5}]},
    )
    objects = np.array(["a", "b"] * 4, object)
    contents = [
        {COND: tx.half(), TARGET: ty.bfloat16(), **names},
        {COND: list(x), TARGET: list(y.astype(">f8")), "keys": np.arange(8)},
        {COND: np.asfortranarray(x), TARGET: y, "captions": objects},
    ]
    others = {"set": {1, "a"}, "when": datetime.date(2020, 1, 1), "path": Path("a"), "c": 1j}
    others |= {"dtype": torch.float16, "sparse": torch.eye(3).to_sparse()}
    others |= {"default": collections.defaultdict(list, a=[1]), "frozen": frozenset("ab")}
    turned = {COND: np.moveaxis(np.moveaxis(x, 1, 2).copy(), 1, 2), TARGET: y}
    turned |= {"config": others, "captions": [["a", "b"], "c"] * 4, **others}
    strided = {COND: tx[::2], TARGET: ty[1::2].transpose(1, 2)}
    found = [(".pkl", pickle.dumps({COND: x, TARGET: y, **names}, p)) for p in (3, 4, 5)]
    found.append((".pkl", pickle.dumps(strided, 3)))
    found += [(".pkl", pickle.dumps(content, 4)) for content in contents]
    found += [(".pkl", pickle.dumps(turned, p)) for p in (3, 5)]
    for zipped in (True, False):
        torch.save(
            {COND: tx, TARGET: ty[:, :, :10], **names},
            folder / "seed.pt",
            _use_new_zipfile_serialization=zipped,
        )
        found.append((".pt", (folder / "seed.pt").read_bytes()))
    found.append((".safetensors", save({COND: tx.bfloat16(), TARGET: ty, "keys": torch.arange(8)})))
    np.save(folder / "seed.npy", x)
    return [*found, (".npy", (folder / "seed.npy").read_bytes())]


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        # two thirds hit the first 400 or the last 1000 bytes, where there is more structure
        at = rng.choice(
            [
                rng.randrange(len(data)),
                min(rng.randrange(400), len(data) - 1),
                max(0, len(data) - 1 - rng.randrange(1000)),
            ]
        )
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at] = rng.choice(OPCODES)
        elif kind == 3:
            data[at:at] = bytes([rng.choice(OPCODES)])
        elif kind == 4:
            layout = rng.choice(["<B", "<H", "<I", "<Q"])
            packed = struct.pack(layout, rng.choice(EXTREMES) % 256 ** struct.calcsize(layout))
            data[at : at + len(packed)] = packed
        elif kind == 5:
            del data[at : at + rng.choice([1, 2, 4, 100])]
        elif kind == 6:
            data[at:at] = data[at : at + rng.choice([1, 2, 8, 64])] * rng.choice([1, 2, 50])
        else:
            del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


def peak():
    """Of this process's memory, in MB, since it was last reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000


class Late(BaseException):
    """Not an Exception: nothing may catch it."""


def too_late(*_):
    raise Late


def fuzz(folder, cases, seed, seconds=5.0, megabytes=500, report=None):
    """Counter of how the cases ended: dataset, error.

    Raises at the first that ends otherwise, having kept its file.
    """
    folder, valid, outcomes = Path(folder), seeds(Path(folder)), collections.Counter()
    signal.signal(signal.SIGALRM, too_late)
    warnings.simplefilter("ignore")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = peak()
    flags = [f"--out={folder / 'out'}", "--val_fraction=0.25", "--overwrite=True"]
    config = configure(vars(prepare), flags)
    for case in range(cases):
        rng = random.Random(f"{seed}.{case}")
        suffix, data = valid[case % len(valid)]
        path = folder / f"case{suffix}"
        path.write_bytes(mutate(data, rng) if case >= len(valid) else data)
        paths = [path] if suffix != ".npy" else [path, folder / "seed.npy"]
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with (
                contextlib.redirect_stderr(io.StringIO()),  # the progress
                contextlib.redirect_stdout(io.StringIO()),  # warnings
            ):
                prepare.prepare(paths, config)
            open_dataset(folder / "out")
            outcomes["dataset"] += 1
        except DataError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000, str(e)
            outcomes["error"] += 1
            if report is not None:
                report[str(e).rsplit(": ", 1)[-1][:60]] += 1
        except BaseException as e:
            signal.setitimer(signal.ITIMER_REAL, 0)
            kept = folder / f"failed{suffix}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(
                f"case {case} of seed {seed} ended in {e!r}; it is kept as {kept}"
            ) from e
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert (grown := peak() - start) < megabytes, f"case {case} of seed {seed} took {grown} MB"
    return outcomes


# ---------------------------------------------------------------- checkpoints


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))


def odd_tensors(x):
    """{what it is: a tensor in place of the matrix x} that no checkpoint should hold."""
    row, column = torch.arange(x.shape[0] + 1), torch.arange(x.shape[0]) % x.shape[1]
    with torch.sparse.check_sparse_tensor_invariants(False):
        far = torch.sparse_csr_tensor(row, column + 10**9, x[:, 0].clone(), x.shape)
        bad_rows = torch.sparse_csr_tensor(row * 10**6, column, x[:, 0].clone(), x.shape)
        indices = torch.stack([row[:-1] + 10**9, column])
        far_coo = torch.sparse_coo_tensor(indices, x[:, 0].clone(), x.shape, is_coalesced=True)
    return {
        "sparse": x.to_sparse(),
        "csr": x.to_sparse_csr(),
        "csc": x.to_sparse_csc(),
        "bsr": x.to_sparse_bsr((2, 2)),
        "csr with far columns": far,
        "csr with far rows": bad_rows,
        "coo with far indices": far_coo,
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "quantized by channel": torch.quantize_per_channel(
            x, torch.ones(len(x)), torch.zeros(len(x)), 0, torch.qint8
        ),
        "nested": torch.nested.nested_tensor([x, x[:1]]),
        "meta": x.to("meta"),
        "int8": x.to(torch.int8),
        "bool": x > 0,
        "complex": x.to(torch.complex64),
        "float8": x.to(torch.float8_e4m3fn),
        "negated": torch.complex(x, -x).conj().imag,
        "one of another shape": x[:, :-1].clone(),
        "transposed shape": x.T.clone(),
        "a number": 1.0,
        "a list": x.tolist(),
        "None": None,
        "a parameter": torch.nn.Parameter(x),
        "float64": x.double(),
        "float16": x.half(),
    }


def checkpoint_seeds(folder, truth):
    """Files as train.py writes them: [(what is odd about it, bytes)], the first few without."""
    found = []

    def add(name, weights, **options):
        state = dict(model_args={"dim": 8}, config={"seed": 0}, iter=5, stats={}, scaler={})
        torch.save(state | dict(ema=weights, model=weights), folder / "seed.pt", **options)
        found.append((name, (folder / "seed.pt").read_bytes()))

    for _ in range(8):  # most of the mutations are of plain files
        add("plain", truth)
    add("legacy", truth, _use_new_zipfile_serialization=False)
    for name, odd in odd_tensors(truth["0.weight"]).items():
        add(name, truth | {"0.weight": odd})
    return found


def corrupt(data, rng):
    """Like mutate(), or hits what is special in a zip file: the values, and the directory."""
    kind = rng.randrange(3)
    if kind == 0:
        return mutate(data, rng)
    data = bytearray(data)
    if kind == 1:  # many bytes amid the values
        start = rng.randrange(len(data))
        for at in range(start, min(start + 400, len(data))):
            data[at] ^= rng.randrange(256)
        return bytes(data)
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x05\x06", data)]
    for _ in range(rng.choice([1, 2, 4])):
        at = rng.choice(entries or [0]) + rng.randrange(46)
        layout = rng.choice(["<B", "<H", "<I"])
        number = rng.choice([*EXTREMES, rng.randrange(len(data))]) % 256 ** struct.calcsize(layout)
        packed = struct.pack(layout, number)
        data[at : at + len(packed)] = packed
    return bytes(data)


def reseal(data, rng):
    """A zip file whose pickle is mutated, with CRCs that fit it: a forgery, not damage."""
    if not data.startswith(b"PK"):
        return data
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutate(part, rng) if name.endswith("data.pkl") else part)
    return forged.getvalue()


def read_in_a_process(path, truth, seconds):
    """How reading a checkpoint ended, in words, in a process of its own that may crash."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.write(writer, read_weights_of(path, truth).encode()[:4000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as f:
        words = f.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"escape: ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return words


def read_weights_of(path, truth):
    from plumbing import checkpoint

    try:
        with torch.device("meta"):
            model = make_model()
        _, parameters = checkpoint.read_weights(path, "ema")
        checkpoint.load_weights(model, parameters, torch.Tensor.float)
        out = model(torch.ones(2, 8))
        loaded = model.state_dict()
        for name, x in truth.items():
            if "float16" in path.name and name == "0.weight":
                x = x.half().float()
            same = "forged" in path.name or torch.equal(loaded[name], x)
            if not (loaded[name].layout == torch.strided and same):
                return f"escape: other weights, {out.dtype}"
        return "weights"
    except ValueError as e:
        one_line = "\n" not in str(e) and len(str(e)) < 2000
        return f"refused: {str(e).rsplit(': ', 1)[-1][:60]}" if one_line else "escape: many lines"
    except Exception as e:
        return f"escape: {type(e).__name__}: {' '.join(str(e).split())[:80]}"


def fuzz_checkpoints(folder, cases, seed, seconds=5.0):
    """Counter of (what was odd, how it ended)."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")
    folder = Path(folder)
    truth = {name: x.clone() for name, x in make_model().state_dict().items()}
    valid, outcomes = checkpoint_seeds(folder, truth), collections.Counter()
    for case in range(cases):
        rng = random.Random(f"{seed}.{case}")
        name, data = valid[case % len(valid)]
        if case >= len(valid):
            forge = rng.randrange(2)
            data = reseal(data, rng) if forge else corrupt(data, rng)
            name += ", forged" if forge else ", mutated"
        path = folder / f"case-{name.replace(' ', '-')}.pt"
        path.write_bytes(data)
        ended = read_in_a_process(path, truth, seconds)
        if ended.startswith("escape"):
            path.rename(folder / f"failed-{case}.pt")
        path.unlink(missing_ok=True)
        outcomes[name, ended] += 1
    return outcomes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["data", "checkpoint"], default="data")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    args = parser.parse_args()
    if args.kind == "checkpoint":
        outcomes = fuzz_checkpoints(args.folder, args.cases, args.seed, args.seconds)
        escapes = sum(n for (_, end), n in outcomes.items() if end.startswith("escape"))
        read = sum(n for (_, end), n in outcomes.items() if end == "weights")
        print(f"{args.cases} cases: {read} read, {escapes} escapes")
        totals = collections.Counter()
        for (name, end), count in outcomes.items():
            totals[f"{name}: {end}" if end.startswith("escape") else end] += count
        for words, count in totals.most_common():
            print(f"{count:7}  {words}")
        sys.exit(escapes > 0)
    messages = collections.Counter()
    outcomes = fuzz(args.folder, args.cases, args.seed, args.seconds, args.megabytes, messages)
    ends = f"{outcomes['dataset']} datasets, {outcomes['error']} errors"
    print(f"{args.cases} cases: {ends}, at most {peak()} MB")
    for message, count in messages.most_common(25):
        print(f"{count:7}  {message}")


if __name__ == "__main__":
    main()
