"""
Devices, and what the processes of a run do together: start, add up, share rows, stop, shard, end.

    device = init_distributed(pick_device("auto"), timeout=10)    # under torchrun, "cuda:3" say
    total = all_reduce_sum(torch.stack([loss, interrupts.flag()]))
    losses = map_rows(loss_of_rows, 2048, 64, interrupts)    # rows are shared among the processes
"""

import datetime
import math
import os
import signal
import sys
import timeit
import warnings

import numpy as np
import torch
import torch.distributed as dist

RANK, WORLD_SIZE = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
# by torchrun, even if it is one process: then it takes the same way as many
LAUNCHED = "RANK" in os.environ or WORLD_SIZE > 1


def print0(text):
    """Print in the first process only."""
    if RANK == 0:
        print(text, flush=True)


def pick_device(name):
    """'auto' as this machine's accelerator, else the CPU. Raises ValueError for what it lacks."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    try:
        torch.empty(0, device=name)
        if ":" in name:  # else cuda:1 would not be what "cuda" stands for
            torch.accelerator.set_device_index(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device={name!r} is not there; --device=auto takes what is") from e
    return name


def pick_dtype(name, device):
    """'auto' as bfloat16 where cuda has it in hardware, else float32."""
    if name == "auto":
        fast = "cuda" in device and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r} is unknown: auto, float32, bfloat16 or float16")
    return name


def init_distributed(device, timeout):
    """Join the other processes that torchrun has started; returns the device of this one.

    timeout: minutes after which a process that waits for another gives up
    Raises ValueError where a variable of torchrun's is missing.
    """
    backend, device_id = "gloo", None
    if "cuda" in device:
        backend = "nccl"
        device = f"cuda:{os.getenv('LOCAL_RANK', 0)}"
        device_id = torch.device(device)  # else the first barrier would have to guess it
        torch.cuda.set_device(device_id)
    # of DDP, about the few values of a depthwise convolution; of FSDP, about a view as output
    warnings.filterwarnings("ignore", "Grad strides|FSDP2-wrapped")
    dist.init_process_group(
        backend, timeout=datetime.timedelta(minutes=timeout), device_id=device_id
    )
    # on Linux: SIGTERM for this process when torchrun dies, so that it stops and saves
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
    barrier()  # nobody ends because of an error of its own before all have come
    return device


def barrier():
    """Wait until all processes have come here."""
    if LAUNCHED:
        dist.barrier()


def exit_process():
    """End this process together with the others."""
    barrier()
    if LAUNCHED:
        dist.destroy_process_group()
    sys.exit()


def all_reduce_sum(x):
    """The sum of a tensor over the processes, on the CPU: waits for the device, and may overwrite
    the tensor. All processes must call this."""
    if LAUNCHED:
        dist.all_reduce(x)
    return x.cpu()


class Interrupts:
    """Notes signals and the end of `time_limit` minutes (or None), for the loop to stop.

    device: where flag() is, so that it can be added up with others that are there
    """

    def __init__(self, time_limit, device):
        self.device = device
        self.reason = None
        self.handlers = {}  # those before
        # what terminals and schedulers send before they kill, and the time limit
        for name in "SIGINT SIGTERM SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGXCPU SIGALRM".split():
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP is, under nohup
                self.handlers[number] = signal.signal(number, self.note)
        if time_limit is not None:
            seconds = min(60 * time_limit, 1e9)  # more than that the system does not take
            signal.setitimer(signal.ITIMER_REAL, seconds or 1e-6)  # 0 would be never

    def note(self, number, frame):
        self.reason = signal.Signals(number).name if number != signal.SIGALRM else "the time limit"
        if number == signal.SIGINT and WORLD_SIZE == 1:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    def restore(self):
        """Leave signals to those who handled them before, in a notebook say."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def flag(self):
        """1 if this process should stop, else 0, to be summed over the processes."""
        return torch.tensor(1.0 if self.reason else 0.0, device=self.device)


@torch.no_grad()
def map_rows(function, n, batch_size, interrupts):
    """function(rows) -> (rows, ...) for rows 0 to n - 1, in batches shared among the processes.

    Each process runs as many batches of one size, as FSDP needs: repeated rows fill them.
    Returns (n, ...) on the CPU, in all processes. Raises InterruptedError if one should stop.
    """
    count = math.ceil(n / WORLD_SIZE)  # rows of a process
    size = min(batch_size, count)
    batches = []
    for first in range(RANK * count, (RANK + 1) * count, size):
        if all_reduce_sum(interrupts.flag()):
            raise InterruptedError("the evaluation was broken off")
        rows = first + np.arange(size)
        batches.append(function(rows % n))
    values = torch.cat(batches)[:count]
    results = values.new_zeros(WORLD_SIZE, *values.shape)
    results[RANK] = values
    return all_reduce_sum(results).flatten(0, 1)[:n]


def shard_model(model, dtype):
    """Shard a model by torch's fully_shard, block by block.

    A process holds a part of every parameter, gathers those of a block when their turn comes, in
    the torch dtype of the arithmetic, and gets its part of the mean gradients, in float32.
    """
    from torch.distributed import fsdp  # slow to import

    policy = fsdp.MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fsdp.fully_shard(block, mp_policy=policy)
        fsdp.register_fsdp_forward_method(block, "context")
    # reshard the root too: after an evaluation its gathered weights would stay in memory, and
    # would miss later updates
    fsdp.fully_shard(model, reshard_after_forward=True)
    fsdp.register_fsdp_forward_method(model, "context")


def matmul_rate(device, dtype):
    """Floating point operations per second of a product of two large matrices on a device, in a
    torch dtype."""
    n = 16384 if "cuda" in device else 512
    x = torch.randn(n, n, device=device, dtype=dtype)  # zeros would be faster
    # item() waits for the device
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=10))
    return 2 * n**3 / seconds
