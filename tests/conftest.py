import atexit
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# with pytest -n 2 two processes of tests compete for two cores
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
# which `make test &` and nohup may have ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = """
    --dim=32 --n_layer=2 --n_head=2 --multiple_of=16
    --batch_size=2 --gradient_accumulation_steps=4 --max_iters=6
    --warmup_iters=2 --learning_rate=1e-2 --ema_decay=0.5
    --eval_interval=3 --save_interval=3 --log_interval=1
    --eval_batch_size=4 --eval_samples=4 --eval_sample_steps=2
""".split()
CLOCK = ("ms", "samples_per_s", "mfu", "seconds_left")  # what the log says of time
RUN_SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*args, cwd=ROOT, check=True, processes=1, patch="", fork=True, **env):
    """Run a script as a user would; returns the finished process with its text output.

    processes: how many, each with the variables that torchrun would set
    patch: lines of python to run in the script's process first
    fork: whether it may be a fork of a process that has torch, with files for its output
    """
    args = list(map(str, args))
    # not without torch, nor where it counts what is in memory at first
    fork = fork and args[0] not in ("-c", "prepare.py") and not env
    if patch:
        args = ["-c", patch + RUN_SCRIPT, *args]
    if fork:
        done = fork_server().run(args, cwd, processes)
    else:
        assert processes == 1
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        options = dict(capture_output=True, text=True, timeout=300)
        done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


class ForkServer:
    """A process of fork_server.py. Takes one command at a time."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        command = [sys.executable, ROOT / "tests" / "fork_server.py"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def run(self, args, cwd, processes):
        files = [self.folder / "stdout", self.folder / "stderr"]
        for file in files:
            file.write_text("")
        environments = [{}]
        if processes > 1:
            shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
            shared["MASTER_PORT"] = str(free_port())
            ranks = map(str, range(processes))
            environments = [shared | dict(RANK=rank, LOCAL_RANK=rank) for rank in ranks]
        command = [args, str(cwd), list(map(str, files)), environments]
        print(json.dumps(command), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(args, code, *(file.read_text() for file in files))


fork_server = functools.cache(ForkServer)  # started when it is first needed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def refused(*args, **kwargs):
    """Run something that must be refused, with a non-zero exit and no traceback; returns its one
    line of stderr."""
    done = run(*args, check=False, **kwargs)
    assert done.returncode in (1, 2), (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def train(dataset, out, *args, **kwargs):
    return run("train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", *args, **kwargs)


TORCHRUN = ["-m", "torch.distributed.run"]


def start(*args, stdout=subprocess.PIPE, cwd=ROOT, **env):
    """A process that goes on while the test does, its text output in one pipe."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
    command = [sys.executable, *map(str, args)]
    pipes = dict(stdout=stdout, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def wait_for(process, words):
    """Read a started process's output until a line has `words`; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def measured(out):
    """The log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in log(out)]


def checkpoint(out, name="ckpt_last.pt"):
    return torch.load(out / name, weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def make_pickle(path, n=40, seed=0, grid=(2, 2), C=6, D=5, **changes):
    """A pickle in the users' layout whose target is a linear map of the condition plus noise."""
    g = torch.Generator().manual_seed(seed)
    T = grid[0] * grid[1]
    weight = torch.randn(C, D, generator=torch.Generator().manual_seed(99))
    cond = torch.randn(n, T, C, generator=g)
    noise = torch.randn(n, T, D, generator=g)
    content = {
        "eva_blip3o_embeddings": cond,
        "clip_blip3o_embeddings": cond @ weight + 0.5 * noise + 3,
        "captions": [f"caption {seed}.{i}" for i in range(n)],
        "keys": [f"key {seed}.{i}" for i in range(n)],
        "total_samples": n,
        "config": {"eva_model": "test"},
    } | changes
    path.write_bytes(pickle.dumps({k: v for k, v in content.items() if v is not None}))
    return content


@pytest.fixture
def one_thread():
    """For models so small that a second thread only costs."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_pickle(folder / "embeddings.pkl")
    run("prepare.py", folder / "embeddings.pkl", f"--out={folder / 'tiny'}", "--val_fraction=0.25")
    return folder / "tiny"


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """out_dir of a tiny finished run."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run("train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}")
    return out
