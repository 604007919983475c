"""
A run's folder, and what is in it: checkpoints, tensors and plain Python values, written whole or not at all, read
through a memory map; and samples, written as they come.

    save_checkpoint("out/ckpt_last.pt", state)
    state = read_checkpoint("out/ckpt_last.pt")    # no tensor is in memory before it is used
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch


def save_checkpoint(path, state):
    """Write state to `path`; see replace_file."""
    replace_file(path, lambda f: torch.save(state, f))


def replace_file(path, write):
    """Have write(f) fill a temporary file in the folder of `path` that is flushed to the disk and then takes its place.

    Raises OSError where that fails, a full disk above all; what was at `path` is then untouched.
    """
    partial = Path(path).with_suffix(".partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        folder = os.open(partial.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)
    except (OSError, RuntimeError) as e:
        partial.unlink(missing_ok=True)
        reason = (
            e.__context__ if isinstance(e.__context__, OSError) else e
        )  # torch's writer hides the first by another
        raise OSError(str(reason).partition("\n")[0]) from e


class Output:
    """.npy files that several processes write together, a batch of rows at a time, and that an
    interrupted run goes on with.

    They lie in the folder <first file>.partial until publish() gives them their names. Beside them
    each process keeps a note: a line that says what the files are made with, then a mark per batch
    that it has written. The same command finds the notes and goes on; anything else that they are
    made with, another number of processes included, starts anew.

    files: {path: shape}; made_with: all that decides the content, plain values
    barrier: function that waits until all processes have come to it

    Rows are written, not memory-mapped: a full disk is then an OSError, not a SIGBUS.
    """

    def __init__(self, files, made_with, rank, world_size, barrier):
        self.files = files
        self.barrier = barrier
        self.is_main = rank == 0
        first = next(iter(files))
        self.folder = first.with_name(f"{first.name}.partial")
        notes = [self.folder / f"process_{i}" for i in range(world_size)]
        heading = json.dumps([made_with, world_size, *files.values()]).encode() + b"\n"
        if self.is_main:
            found = all(path.is_file() for path in (*notes, *map(self.locate, files)))
            if not found or not all(note.read_bytes().startswith(heading) for note in notes):
                if self.folder.exists():
                    print(f"{self.folder} was made with something else: starting anew")
                    shutil.rmtree(self.folder)
                self.folder.mkdir()
                for path, shape in files.items():  # a header, then a hole
                    np.lib.format.open_memmap(self.folder / path.name, "w+", np.float32, shape)
                for note in notes:
                    note.write_bytes(heading)
        barrier()
        self.note = notes[rank]
        self.done = self.note.stat().st_size - len(heading)  # batches of this process

    def locate(self, path):
        """Where the file is now."""
        partial = self.folder / path.name
        return partial if partial.exists() else path

    def write(self, first, arrays):
        """Write rows from `first` on of each file, {path: rows}; then note that a batch is done."""
        for path, rows in arrays.items():
            with open(self.folder / path.name, "r+b") as f:
                f.seek((first - self.files[path][0]) * rows[0].nbytes, os.SEEK_END)
                f.write(np.ascontiguousarray(rows))
        with open(self.note, "ab") as f:
            f.write(b".")

    def publish(self, paths):
        """Once all processes have written everything, give these files their names."""
        self.barrier()
        if self.is_main:
            for path in paths:
                os.replace(self.locate(path), path)

    def finish(self):
        """All that was to be done with the files is done: forget how they were made."""
        shutil.rmtree(self.folder)


def open_folder(out_dir, config, step, resume):
    """Make out_dir that of a run which begins with iteration `step`: config.json and a log.jsonl without later
    iterations. Without `resume`, a run that is there is moved to out_dir/previous. Raises ValueError with one line."""
    folder = Path(out_dir)
    log, previous = folder / "log.jsonl", folder / "previous"
    try:
        os.makedirs(folder, exist_ok=True)
        if (folder / "ckpt_last.pt").exists() and not resume:
            previous.mkdir(exist_ok=True)
            for path in (folder / "ckpt_last.pt", folder / "ckpt_best.pt", log):
                if path.exists():
                    os.replace(path, previous / path.name)
            print(f"the run that was in {folder} is now in {previous}")
        replace_file(
            folder / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode())
        )
        lines = log.read_text().splitlines(keepends=True) if step and log.exists() else []
        whole = [
            line for line in lines if line.endswith("}\n")
        ]  # a kill may have cut the last one short
        kept = [line for line in whole if json.loads(line)["iter"] < step]
        replace_file(log, lambda f: f.write("".join(kept).encode()))
    except OSError as e:
        raise ValueError(f"out_dir={out_dir!r} cannot be written: {e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{log} is not the log of a run: {type(e).__name__}: {e}; move it away"
        ) from e


def read_checkpoint(path):
    """What save_checkpoint wrote, its tensors on the CPU as views of a memory map. Raises ValueError with one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a truncated or foreign file can raise anything
        raise ValueError(unreadable(path, e)) from e
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it holds a {type(state).__name__}"
        )
    return state


def unreadable(path, e):
    return f"{path} cannot be read as a checkpoint: {type(e).__name__}: {' '.join(str(e).split())}"


def restore_checkpoint(path, settings, stats, nets, scaler):
    """Put the weights that `path` holds into a run's models, and the rest of its state into the scaler.

    settings: {name: value} that must be as in the checkpoint; stats: {name: tensor}, of the data, likewise
    nets: {"model": module, "ema": module}
    Returns what else it holds, but for the optimizer's state: restore_optimizer. Raises ValueError with one line.
    """
    if not Path(path).exists():
        raise ValueError(f"init_from=resume, but there is no {path}")
    ckpt = read_checkpoint(path)
    try:
        then = ckpt["config"] | ckpt["model_args"]
        if differ := [
            f"{k} is {then[k]}, here {v}" for k, v in settings.items() if then.get(k, v) != v
        ]:
            raise ValueError(f"{path} is of another shape: {', '.join(differ)}")
        if not all(torch.equal(value, ckpt["stats"][name]) for name, value in stats.items()):
            raise ValueError(f"{path} was trained on other data: its statistics differ")
        for key, net in nets.items():
            if missing := net.state_dict().keys() ^ ckpt[key].keys():
                raise KeyError(
                    f"{key} has not the model's parameters: {', '.join(sorted(missing))}"
                )
            for block in weights_by_block(path, key):
                net.load_state_dict(block, strict=False)
        if ckpt["scaler"]:  # empty unless it was float16
            scaler.load_state_dict(ckpt["scaler"])
        counters = {"iter": int(ckpt["iter"]), "best_val_loss": float(ckpt["best_val_loss"])}
        return counters | {
            "bad_steps": int(ckpt["bad_steps"]),
            "wandb_id": ckpt["wandb_id"],
            "config": ckpt["config"],
        }
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(unreadable(path, e)) from e


def restore_optimizer(path, opt):
    """Put what `path` holds of an optimizer's state into it, a few parameters at a time, so that never two copies are
    in memory; of a tensor that is sharded, this process's part. Learning rate and the like stay as they are."""
    from torch.distributed.tensor import (
        distribute_tensor,
    )  # half a second, which sample.py need not spend

    def own(name, value, p):
        if value.shape == p.shape and hasattr(p, "full_tensor"):
            return distribute_tensor(
                value.to(p.device_mesh.device_type), p.device_mesh, p.placements, src_data_rank=None
            )
        if value.shape != p.shape and name not in ("step", "row_var", "col_var"):
            raise ValueError(
                f"{path}: {name} of the optimizer has shape {tuple(value.shape)}, not {tuple(p.shape)}"
            )
        return value.to(p.device, copy=True)

    params = [p for group in opt.param_groups for p in group["params"]]
    try:
        for first in range(0, len(params), 16):
            ckpt = read_checkpoint(path)
            held = ckpt["optimizer"]["state"]
            if ckpt["iter"] and not held:
                raise KeyError("it has no state of the optimizer")
            for i, p in enumerate(params[first : first + 16], first):
                if i in held:  # a frozen parameter has no state
                    opt.state[p] = {name: own(name, value, p) for name, value in held[i].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(unreadable(path, e)) from e


def weights_by_block(path, key):
    """The state dict at `key` as one dict for each block of layers and one for the rest.

    The pages of a map stay in memory while it is open, so every block is read through a map of its own.
    """

    def identity():
        stat = os.stat(path)
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    blocks, first = {}, identity()
    for name in read_checkpoint(path)[key]:
        blocks.setdefault(name.split(".")[1] if name.startswith("layers.") else "", []).append(name)
    for names in blocks.values():
        held = read_checkpoint(path)[key]
        if identity() != first:  # a run has written a new one meanwhile
            raise ValueError(f"{path} was replaced while it was read; try again")
        yield {name: held[name] for name in names}
