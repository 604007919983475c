"""
Checkpoints: written whole or not at all, read through a memory map.

    saver.start([Path("out/ckpt_last.pt")], state)    # tensors and plain Python values
    state = read_checkpoint("out/ckpt_last.pt")    # no tensor is in memory before it is used
"""

import os
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from plumbing.distributed import RANK, all_reduce_sum, print0


class Saver:
    """Writes the checkpoints of a run, all processes together; the first one gathers what is
    sharded. From a GPU they are copied first and written by a thread, while training goes on.

    best_val_loss: that of the ckpt_best.pt on the disk
    """

    def __init__(self, best_val_loss, device):
        self.best_val_loss = best_val_loss
        self.device = device
        self.in_background = "cuda" in device
        self.writing = None

    def start(self, paths, state, best_val_loss=None):
        """Write `state` to each path. best_val_loss: given if the first is ckpt_best.pt."""
        self.wait()
        self.count = len(paths)
        self.new_best = self.best_val_loss if best_val_loss is None else best_val_loss
        state = gather(state | {"best_val_loss": self.new_best}, self.in_background)
        if "cuda" in self.device:
            torch.cuda.synchronize()  # until the copies are complete
        self.writing = ThreadPoolExecutor(1).submit(self.write, paths if RANK == 0 else [], state)
        if not self.in_background:
            self.wait()

    def write(self, paths, state):
        """How many of the files were written, in their order, until one could not be."""
        written = 0
        try:
            for path in paths:
                replace_file(path, lambda f: torch.save(state, f))
                written += 1
        except OSError as e:
            print0(f"WARNING: {e}; the previous one is untouched")
        return written

    def wait(self):
        """Until the last checkpoint is written. Returns, in all processes, whether that worked: if
        not, training goes on without."""
        if not self.writing:
            return True
        # that of the first process, since the others write none
        written = all_reduce_sum(torch.tensor(self.writing.result(), device=self.device)).item()
        if written:
            self.best_val_loss = self.new_best
        return written == self.count


def gather(state, copy):
    """A state dict on the CPU of the first process, its sharded tensors gathered."""
    if isinstance(state, dict):
        return {name: gather(value, copy) for name, value in state.items()}
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
    if RANK > 0:
        return None
    if torch.is_tensor(state):
        try:  # a non-blocking copy goes to pinned memory, which torch keeps for the next checkpoint
            return state.to("cpu", non_blocking=copy, copy=copy)
        except RuntimeError:  # there is not enough of it
            return state.to("cpu", copy=copy)
    return state


def replace_file(path, write):
    """Let write(f) fill a temporary file beside `path`, flush it to the disk and rename it.

    Raises OSError where that fails, as on a full disk; what was at `path` is then untouched.
    """
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as e:
        partial.unlink(missing_ok=True)
        # torch.save raises a RuntimeError while it handles the OSError that says what happened
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise OSError(f"{path} not written: {cause}") from e


def check_tensors(name, value):
    """Raise ValueError unless every tensor in nested dicts is dense and of floats: torch trusts
    sparse indices and some kernels ignore strides, so that they would read foreign memory."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_tensors(f"{name}.{key}", item)
    elif torch.is_tensor(value):
        is_float = value.is_floating_point() and value.itemsize > 1
        is_odd = value.layout != torch.strided or value.is_nested or value.is_meta
        if is_odd or not is_float or not value.is_contiguous():
            raise ValueError(f"{name}: {value.layout}, {value.dtype}, not a dense tensor of floats")


def read_checkpoint(path):
    """What a Saver wrote, its tensors on the CPU as views of a memory map. Raises ValueError."""
    try:
        if RANK == 0:  # compare its CRCs with its bytes, which takes a third of a second per GB
            with zipfile.ZipFile(path) as file:
                is_compressed = any(entry.compress_type for entry in file.infolist())
                if is_compressed or file.testzip():  # torch would take compressed bytes for values
                    raise ValueError("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_tensors("checkpoint", state)
        if not isinstance(state, dict) or "model_args" not in state:
            raise ValueError("it is no checkpoint of train.py")
    except Exception as e:  # a truncated or foreign file can raise anything
        reason = textwrap.shorten(str(e), 1000)
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {reason}; another one of the run may be "
            "intact, ckpt_last.pt or ckpt_best.pt"
        ) from e
    return state


def read_weights(path, key):
    """What read_checkpoint() returns, and (name, tensor) pairs of its weights: `key` is ema or
    model. Raises ValueError."""
    ckpt = read_checkpoint(path)
    if not isinstance(ckpt.get(key), dict):
        raise ValueError(f"{path} has no weights {key!r}; they are ema and model")
    return ckpt, ckpt[key].items()


def load_weights(model, parameters, cast=torch.Tensor.float):
    """Put (name, tensor) pairs into a model, which keeps cast(tensor) of each, not a copy of that.

    Raises ValueError where they are not the model's.
    """
    # what is no tensor, torch refuses by its name
    weights = {name: cast(x) if torch.is_tensor(x) else x for name, x in parameters}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ValueError(textwrap.shorten(str(e), 1000)) from e


# what a run cannot change, nor one that starts from its weights
FIXED = """
optimizer normalize path prediction sigma_min sigma_max n_layer n_head n_kv_head dim ffn_dim
multiple_of ffn_dim_multiplier norm_eps qk_norm conditioning conv rope prior cond_projection
cond_dim target_dim
"""


def check_fixed(path, old, config):
    """Raise ValueError if a setting in FIXED is another now than in the model at `path`."""
    for name in FIXED.split():
        if name in old and config[name] != old[name]:
            raise ValueError(f"{path} was trained with {name}={old[name]}, not {config[name]}")


def same_statistics(old, stats):
    """Whether a dataset's statistics, {name: array}, are those in a checkpoint: with another split,
    or of other sources, they differ."""
    return all(np.array_equal(old[name], np.float32(x)) for name, x in stats.items())


def restore(path, ckpt, config, stats, models, scaler):
    """Load the weights of a checkpoint into models, and its gradient scaler's state into `scaler`.

    path, ckpt: its file and what read_checkpoint() returned
    config: the settings now, of which those in FIXED must equal the checkpoint's
    stats: the dataset's, which must equal the checkpoint's
    models: {"ema": module, "model": module}
    Prints the settings that have changed. Raises ValueError.
    """
    old = ckpt["config"]
    check_fixed(path, old, config)
    for name, value in config.items():
        if value != old.get(name) and name != "init_from":
            print0(f"changed since the checkpoint: {name} {old.get(name)} -> {value}")
    if not same_statistics(ckpt.get("data_stats", ckpt["stats"]), stats):
        raise ValueError(f"{path} was trained on other data: its statistics differ")
    for key, model in models.items():
        load_weights(model, ckpt[key].items())
    if ckpt["scaler"]:  # empty unless it was float16
        scaler.load_state_dict(ckpt["scaler"])


def warn_of_distance(path, old, new):
    """Warn where a dataset's statistics `new` are far from those that a model normalizes by, `old`.

    Both are {cond_mean, cond_std (C,), target_mean, target_std (D,)}. The figure is the Frechet
    distance of Gaussians with independent channels, in units of the old standard deviation.
    """
    for kind in ("cond", "target"):
        mean, std = f"{kind}_mean", f"{kind}_std"
        moved = torch.cat([new[mean] - old[mean], new[std] - old[std]])
        distance = moved.norm() / old[std].norm()
        if distance > 0.5:
            print0(f"WARNING: {kind} is {distance:.2f} standard deviations from that of {path}")


def restore_optimizer(ckpt, opt):
    """Load the state of a checkpoint's optimizer, sharded as its parameters are.

    On a CPU it stays a view of the checkpoint's memory map until it changes, so there are never
    two copies in memory. Learning rate, weight decay and betas stay those of `opt`.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    state = ckpt["optimizer"]["state"]
    params = [p for group in opt.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        for name, x in state.get(i, {}).items():
            expected = () if name == "step" else p.shape
            # fused kernels do not look at shapes; adafactor's row_var and col_var are not for them
            if x.shape != expected and not name.endswith("_var"):
                raise ValueError(f"{name} of parameter {i} has shape {tuple(x.shape)}")
            if isinstance(p, DTensor) and name != "step":
                state[i][name] = distribute_tensor(
                    x, p.device_mesh, p.placements, src_data_rank=None
                )
    opt.load_state_dict(opt.state_dict() | {"state": state})
