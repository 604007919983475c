"""
Devices, and what the processes of a run do together: start, add up, share rows, stop, shard, end.

    device = init_distributed(pick_device("auto"), timeout=10)    # under torchrun, "cuda:3" say
    total = all_reduce_sum(torch.stack([loss, interrupts.flag(device)]))
"""

import datetime
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args):
    """Print in the first process only."""
    if RANK == 0:
        print(*args, flush=True)


def pick_device(name):
    """'auto' as this machine's accelerator, else the CPU. Raises ValueError for what it lacks."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device={name!r}: {str(e).partition(chr(10))[0]}") from e
    return name


def pick_dtype(name, device):
    """'auto' as bfloat16 on cuda, or float16 where that is missing, else float32."""
    if name == "auto":
        if not device.startswith("cuda"):
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r} is unknown: auto, float32, bfloat16 or float16")
    return name


def init_distributed(device, timeout):
    """Join the other processes that torchrun has started; returns the device of this one.

    timeout: minutes after which a process that waits for another gives up
    """
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "nccl"
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
    dist.barrier()  # nobody ends because of an error of its own before all have come
    return device


def exit_process(error=None):
    """End this process: with a line and code 1 after an error, else together with the others."""
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit()


def all_reduce_sum(x):
    """The sum of a tensor over the processes, on the CPU; all must call this."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x.cpu()


@torch.no_grad()
def map_rows(function, n, batch_size, device, interrupts):
    """function(rows) -> (rows, ...) for rows 0 to n - 1, in batches dealt out to the processes.

    Each process gets as many batches of one size, as FSDP needs: repeated rows fill them.
    Returns (n, ...) on the CPU, in all processes. Raises Interrupted.
    """
    size = min(batch_size, math.ceil(n / WORLD_SIZE))
    results = None
    for first in range(0, n, WORLD_SIZE * size):
        interrupts.check(device)
        rows = first + RANK * size + np.arange(size)
        values = function(rows % n)
        if results is None:
            results = torch.zeros(n, *values.shape[1:], device=device)
        results[rows[rows < n]] = values[torch.from_numpy(rows < n)]
    return all_reduce_sum(results)  # a row is zero in all processes but one


class Interrupted(ValueError):
    """A signal or the time limit came during an evaluation."""


class Interrupts:
    """Notes SIGINT, SIGTERM and the end of `time_limit` minutes (or None), for the loop to stop."""

    def __init__(self, time_limit):
        self.end = math.inf if time_limit is None else time.monotonic() + 60 * time_limit
        self.reason = None
        self.parent = os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT and not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    def should_stop(self):
        if time.monotonic() > self.end:
            self.reason = self.reason or "the time limit"
        if dist.is_initialized() and os.getppid() != self.parent:
            self.reason = self.reason or "the end of torchrun"
        return self.reason is not None

    def flag(self, device):
        """1 if this process should stop, else 0, to be summed over the processes."""
        return torch.tensor(float(self.should_stop()), device=device)

    def check(self, device):
        """Raise Interrupted in all processes if one should stop."""
        if all_reduce_sum(self.flag(device)).item():
            raise Interrupted("the evaluation was broken off")


def shard_model(model, dtype):
    """Shard a model by torch's fully_shard, block by block.

    A process holds a part of every parameter, gathers those of a block when their turn comes, in
    the dtype of the arithmetic, and gets its part of the mean gradients, in float32.
    """
    from torch.distributed import fsdp  # slow to import

    param_dtype = None if dtype == "float32" else getattr(torch, dtype)
    policy = fsdp.MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fsdp.fully_shard(block, mp_policy=policy)
    # reshard also after evaluations: what they have gathered would stay, and grow old
    fsdp.fully_shard(model, reshard_after_forward=True)
    for module in (model, *model.layers):
        fsdp.register_fsdp_forward_method(module, "context")


def gather_state_dict(state):
    """A state dict with its sharded tensors gathered on the CPU of the first process; all processes
    must call this."""
    if isinstance(state, dict):
        return {name: gather_state_dict(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if RANK == 0 else None


def matmul_rate(device, dtype, repeats=10):
    """Floating point operations per second of a product of two large matrices on a device."""
    n = 4096 if device.startswith("cuda") else 512
    x = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
    (x @ x)[0, 0].item()  # warm up, and wait for the device
    start = time.perf_counter()
    for _ in range(repeats):
        y = x @ x
    y[0, 0].item()
    return repeats * 2 * n**3 / (time.perf_counter() - start)
