"""
The files of a run: checkpoints, written whole or not at all and read through a memory map; its
config.py and its log; and samples, written as they come.

    save("out/ckpt_last.pt", state)     # tensors and plain Python values
    state = read_checkpoint("out/ckpt_last.pt")    # no tensor is in memory before it is used
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from plumbing.distributed import RANK, WORLD_SIZE, print0

ROOT = Path(__file__).parents[1]


def save(path, state):
    """Write a checkpoint; returns whether that worked. If not, the previous one is untouched."""
    try:
        replace_file(path, lambda f: torch.save(state, f))
        return True
    except OSError as e:
        print(f"WARNING: {path} not written ({e}); the previous one is untouched", flush=True)
        return False


def replace_file(path, write):
    """Let write(f) fill a temporary file beside `path`, flush it to the disk and rename it.

    Raises OSError where that fails, as on a full disk; what was at `path` is then untouched.
    """
    partial = Path(path).with_suffix(".partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        partial.unlink(missing_ok=True)
        # torch.save raises a RuntimeError while it handles the OSError that says what happened
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise OSError(str(cause).partition("\n")[0]) from e


class Output:
    """.npy files that several processes write together, a batch of rows at a time, and that an
    interrupted run goes on with.

    They lie in a folder until publish() gives them their names. A line in the folder says what they
    are made with, and a note per process has a mark for every batch that it has written. The same
    command finds them and goes on; anything else that the files are made with, another number of
    processes included, starts anew.

    files: {path: shape}, a path in the folder for a file that goes with it
    made_with: all that decides the content, plain values

    Rows are written, not memory-mapped: a full disk is then an OSError, not a SIGBUS.
    """

    def __init__(self, folder, files, made_with):
        self.folder = folder
        self.files = files
        heading = folder / "made_with.json"
        line = json.dumps([made_with, WORLD_SIZE, *files.values()])
        if RANK == 0 and not (heading.exists() and heading.read_text() == line):
            if folder.exists():
                print(f"{folder} was made with something else: starting anew")
                shutil.rmtree(folder)
            folder.mkdir()
            for path, shape in files.items():  # a header, then a hole
                np.lib.format.open_memmap(folder / path.name, "w+", np.float32, shape)
            heading.write_text(line)
        self.wait_for_all()
        self.note = open(folder / f"process_{RANK}", "ab", buffering=0)
        self.done = self.note.tell()  # batches of this process

    def wait_for_all(self):
        if WORLD_SIZE > 1:
            torch.distributed.barrier()

    def write(self, first, arrays):
        """Write {path: rows}, from row `first` on, to those that are among the files, as far as
        they reach; then note that a batch is done."""
        for path, shape in self.files.items():
            rows = arrays[path]
            with open(self.folder / path.name, "r+b") as f:
                f.seek((first - shape[0]) * rows[0].nbytes, os.SEEK_END)
                f.write(np.ascontiguousarray(rows[: max(shape[0] - first, 0)]))
        self.note.write(b".")

    def publish(self):
        """Once all processes have written everything, give the files their names."""
        self.wait_for_all()
        for path in self.files:
            made = self.folder / path.name
            if RANK == 0 and made.exists():  # not yet done
                os.replace(made, path)

    def finish(self):
        """All that was to be done with the files is done: forget how they were made."""
        shutil.rmtree(self.folder)


def read_checkpoint(path):
    """What save() wrote, its tensors on the CPU as views of a memory map. Raises ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as e:
        raise ValueError(f"there is no checkpoint {path}") from e
    except Exception as e:  # a truncated or foreign file can raise anything
        raise ValueError(unreadable(path, e)) from e
    if not isinstance(state, dict):
        words = f"it holds a {type(state).__name__}"
        raise ValueError(f"{path} cannot be read as a checkpoint: {words}")
    return state


def unreadable(path, e):
    reason = " ".join(str(e).split())
    return f"{path} cannot be read as a checkpoint: {type(e).__name__}: {reason}"


def read_in_parts(path, items):
    """Yield (sixteen of the items, the checkpoint), each time through a new memory map: the pages
    that were read stay in memory for as long as their map is open."""
    first = read_checkpoint(path)["iter"]
    for i in range(0, len(items), 16):
        ckpt = read_checkpoint(path)
        if ckpt["iter"] != first:
            raise ValueError(f"{path} was replaced while it was read; try again")
        yield items[i : i + 16], ckpt


def read_weights(path, key):
    """Yield the state dict at `key` in parts, so that there are never two copies in memory."""
    for names, ckpt in read_in_parts(path, list(read_checkpoint(path)[key])):
        yield {name: ckpt[key][name] for name in names}


# what a run cannot change
FIXED = "optimizer normalize path prediction sigma_min sigma_max n_layer n_head n_kv_head dim"
FIXED += " norm_eps qk_norm conditioning conv rope prior"


def restore(path, config, stats, models, scaler):
    """Load the weights at `path` into models and the gradient scaler's state into `scaler`.

    config: the run's settings and stats: the data's {name: tensor}, which must be those of the
    checkpoint; models: {"model": module, "ema": module}
    Prints the settings that have changed. Returns the checkpoint, whose optimizer state is left to
    restore_optimizer. Raises ValueError.
    """
    ckpt = read_checkpoint(path)
    try:
        old = ckpt["config"]
        for name in FIXED.split():
            if config[name] != old[name]:
                words = f"was trained with {name}={old[name]}, not {config[name]}"
                raise ValueError(f"{path} {words}")
        for name, value in stats.items():
            if not torch.equal(value, ckpt["stats"][name]):
                raise ValueError(f"{path} was trained on other data: its statistics differ")
        for key, model in models.items():
            model.load_state_dict(ckpt[key])
        if ckpt["scaler"]:  # empty unless it was float16
            scaler.load_state_dict(ckpt["scaler"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(unreadable(path, e)) from e
    changed = [name for name in config if config[name] != old.get(name) and name != "init_from"]
    for name in changed:
        print0(f"changed since the checkpoint: {name} {old.get(name)} -> {config[name]}")
    return ckpt


def restore_optimizer(path, opt):
    """Load the optimizer state at `path` in parts, so that there are never two copies in memory. A
    sharded parameter gets its process's part of it.

    Learning rate, weight decay and betas stay those of `opt`. Raises ValueError.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    try:
        for part, ckpt in read_in_parts(path, list(enumerate(params))):
            state = ckpt["optimizer"]["state"]
            if ckpt["iter"] and not state:
                raise KeyError("it has no state of the optimizer")
            for i, p in part:
                if i in state:  # a frozen parameter has none
                    opt.state[p] = {name: like(p, name, x) for name, x in state[i].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(unreadable(path, e)) from e


def like(p, name, value):
    """A tensor of the optimizer's state, on the device of its parameter and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    if name in ("step", "row_var", "col_var"):  # not of the parameter's shape, and never sharded
        return value.to(p.device, copy=True)
    if value.shape != p.shape:
        shapes = f"{tuple(value.shape)}, not {tuple(p.shape)}"
        raise RuntimeError(f"{name} of the optimizer has shape {shapes}")
    if isinstance(p, DTensor):
        value = value.to(p.device_mesh.device_type)
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value.to(p.device, copy=True)


def code_version():
    """The git commit of this code, "-dirty" if files differ from it; without git, their hash."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return hash_files(sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]))


def hash_files(paths):
    """sha256 of the contents of files, in hexadecimal."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def claim_folder(out_dir, replace):
    """Make out_dir if it is missing. Raises ValueError if it holds a run, unless that may be
    replaced or gone on with."""
    folder = Path(out_dir)
    checkpoints = [folder / "ckpt_last.pt", folder / "ckpt_best.pt"]
    if any(path.exists() for path in checkpoints) and not replace:
        ways = "--init_from=auto goes on with it, --overwrite=True replaces it"
        raise ValueError(f"{out_dir} already holds a run: {ways}, or choose another --out_dir")
    folder.mkdir(parents=True, exist_ok=True)


def open_run(out_dir, config, version, iteration, resume):
    """Begin a run at an iteration, or go on: write config.py, and keep of log.jsonl what came
    before. Raises ValueError."""
    folder = Path(out_dir)
    log = folder / "log.jsonl"
    settings = [f"{key} = {value!r}" for key, value in config.items()]
    text = "\n".join([f"# The settings of this run, for the code at {version}.", *settings, ""])
    try:
        lines = log.read_text().splitlines(keepends=True) if resume and log.exists() else []
        lines = [
            line for line in lines if line.endswith("}\n")
        ]  # a kill can cut the last one short
        kept = [line for line in lines if json.loads(line)["iter"] < iteration]
        replace_file(folder / "config.py", lambda f: f.write(text.encode()))
        replace_file(log, lambda f: f.write("".join(kept).encode()))
        if not resume:
            (folder / "ckpt_last.pt").unlink(missing_ok=True)  # of the run that is replaced
            (folder / "ckpt_best.pt").unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"out_dir={out_dir!r} cannot be written: {e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{log} is not the log of a run: {type(e).__name__}: {e}") from e


def append_log(out_dir, record):
    """Add a line to a run's log.jsonl, or a warning to the console where that fails."""
    log = Path(out_dir) / "log.jsonl"
    record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
    size = log.stat().st_size if log.exists() else 0
    try:
        with open(log, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        print(f"WARNING: {log} not written ({e})", flush=True)
        if log.exists():
            os.truncate(log, size)  # leave no half a line
