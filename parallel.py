"""
What the processes of a run do together: start, add up, agree to stop, notice that one is gone, share a model.

    device = init_distributed("cuda", timeout=10)    # under torchrun: cuda:3, say
    loss, stop = all_reduce_sum(device, loss, interrupts.should_stop())
"""

import datetime
import os
import re
import signal
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


def pick_device(name):
    """'auto' as cuda, else mps, else cpu; any other name if this machine has it, else ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, there in has.items() if there)
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name) or not has[name.split(":")[0]]:
        raise ValueError(
            f"device={name!r}: this machine has {', '.join(kind for kind, there in has.items() if there)}"
        )
    return name


def init_distributed(device, timeout):
    """Join the other processes that torchrun has started; returns this one's device.

    timeout: minutes after which a process that waits for another gives up
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    sys.excepthook = lost
    meeting = (
        dict(store=meet(rank), rank=rank, world_size=world_size)
        if "TORCHELASTIC_RUN_ID" in os.environ
        else {}
    )
    limit = datetime.timedelta(minutes=timeout)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=limit, **meeting)
    dist.barrier()  # nobody leaves, on an error of its own, before all have come
    return device


def meet(rank):
    """A store of addresses of this start's own, at process 0. The one of torchrun outlives restarts and may still have
    the addresses of the dead, where those who come after them would wait for ever (pytorch issue 135712)."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchruns = dist.TCPStore(host, port, is_master=False)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchruns.set("port of process 0", str(store.port))
        return store
    while True:
        port = int(torchruns.get("port of process 0"))
        try:
            socket.create_connection((host, port), timeout=3).close()
            return dist.TCPStore(host, port, is_master=False)
        except OSError:  # it was of one who is gone
            time.sleep(0.1)


def lost(kind, e, trace):
    """For an error that comes of another process's end, one line, and the end of this one at once: torchrun, which
    says which was the first, may then start all of them anew."""
    if issubclass(kind, RuntimeError) and re.search(
        "gloo|nccl|peer|connection", str(e), re.IGNORECASE
    ):
        reason = str(e).splitlines()[0]
        message = f"error: process {os.environ['RANK']} lost another one: {reason}"
        print(
            message, file=sys.__stderr__, flush=True
        )  # sys.stderr is torch's, who prefixes what it gets to the end
        os._exit(1)
    sys.__excepthook__(kind, e, trace)


def exit_process(code):
    """End this one of several processes, without what torch cleans up at the end: it joins the threads of gloo while it
    holds Python's lock, for which they may be waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def all_reduce_sum(device, *values):
    """Numbers, or tensors of one element, summed over the processes, as floats; waits for the device."""
    sums = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values]
    )
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


class Interrupts:
    """Notes SIGINT and SIGTERM, and the end of `time_limit` minutes (or None) from now, instead of ending at once."""

    def __init__(self, time_limit):
        self.end = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.reason, self.parent = None, os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT and not dist.is_initialized():
            signal.signal(
                number, signal.SIG_DFL
            )  # a second Ctrl-C does not wait; torchrun would repeat the first

    def should_stop(self):
        if self.end is not None and time.monotonic() > self.end:
            self.reason = self.reason or "the time limit"
        if (
            dist.is_initialized() and os.getppid() != self.parent
        ):  # else two runs would write one folder
            self.reason = self.reason or "the end of torchrun"
        return self.reason is not None


def shard_model(model, dtype):
    """torch's fully_shard, one block after the other: a process holds a part of every parameter, gathers those of a
    block when their turn comes, in the dtype of the arithmetic, and gets its part of the mean gradients, in float32."""
    half = None if dtype == "float32" else getattr(torch, dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(
        model, reshard_after_forward=True
    )  # else what evaluation has gathered would stay, and grow old
    for module in (model, *model.layers):
        register_fsdp_forward_method(module, "context")


def gather_state_dict(state):
    """A state dict with its sharded tensors gathered, on the CPU, for the first process; all must call this."""
    if isinstance(state, dict):
        return {name: gather_state_dict(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None
