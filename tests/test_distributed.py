"""Several processes: the same run as one, however many, however they end."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from conftest import (
    ROOT,
    TINY,
    TORCHRUN,
    checkpoint,
    free_port,
    log,
    measured,
    refused,
    run,
    same,
    start,
    train,
    wait_for,
)

EVEN = "--max_iters=20 --learning_rate=2e-3 --min_lr=2e-3 --eval_interval=10 --eval_samples=3"
EVEN = EVEN.split()


def assert_close(a, b):
    """The same log to within the order of float additions."""
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for x, y in zip(a, b):
        for key in x:
            tolerance = dict(rel=0, abs=1e-5)
            if "frechet" in key:  # a square root of 0
                tolerance = dict(rel=1e-3, abs=1e-4)
            if key == "grad_norm":
                tolerance = dict(rel=1e-4, abs=0)
            assert x[key] == pytest.approx(y[key], **tolerance), (x["iter"], key)


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    train(dataset, out, *EVEN)
    return out


@pytest.mark.parametrize("n, flags", [(2, []), (4, []), (2, ["--fsdp=True"])])
def test_as_many_processes_as_you_like(dataset, tmp_path, one, n, flags):
    train(dataset, tmp_path / "out", *EVEN, *flags, processes=n)
    assert_close(measured(one), measured(tmp_path / "out"))
    assert log(one)[-1]["val_loss"] < log(one)[0]["val_loss"]


def test_resumes_on_another_number_of_processes(dataset, tmp_path, one):
    """fully_shard, one process, DDP: each goes on from the other's checkpoint."""
    out = tmp_path / "out"
    train(dataset, out, *EVEN, "--fsdp=True", "--max_iters=8", processes=2)
    train(dataset, out, *EVEN, "--fsdp=False", "--max_iters=13", "--init_from=resume")
    train(dataset, out, *EVEN, "--max_iters=17", "--init_from=resume", processes=4)
    train(dataset, out, *EVEN, "--fsdp=True", "--init_from=resume", processes=2)
    losses = [[line["loss"] for line in log(o) if "loss" in line] for o in (one, out)]
    assert len(losses[1]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    a, b = (checkpoint(o)["optimizer"]["state"] for o in (one, out))
    assert a.keys() == b.keys()
    assert a[1].keys() == b[1].keys()
    for i in a:
        assert all(torch.allclose(a[i][name], b[i][name], atol=1e-4) for name in a[i])


def test_fully_shard_halves_what_a_process_holds(dataset, tmp_path):
    """Parameters, averaged parameters and optimizer state; the log is DDP's."""
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import json, os, pathlib, runpy, sys, torch
sys.exit = lambda *code: None
sys.path.insert(0, {str(ROOT)!r})
run = runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
size = lambda tensors: sum(getattr(x, "to_local", lambda: x)().numel() for x in tensors)
states = [x for state in run["opt"].state.values() for name, x in state.items() if name != "step"]
held = size(run["params"]), size(run["ema_params"]), size(states)
name = os.environ["RANK"] + run["out_dir"][-1]
pathlib.Path({str(tmp_path)!r}, name).write_text(json.dumps(held))
""")
    flags = ["--max_iters=4", "--learning_rate=2e-3"]
    for name, fsdp in (("a", False), ("b", True)):
        args = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / name}", *flags]
        run(probe, *args, f"--fsdp={fsdp}", processes=2)
    held = {name: json.loads((tmp_path / name).read_text()) for name in ("0a", "1a", "0b", "1b")}
    assert held["0a"] == held["1a"]
    assert all(held["0a"])
    for rank in "01":
        for part, full in zip(held[f"{rank}b"], held[f"{rank}a"]):
            assert 0.45 < part / full < 0.55
    assert [a + b for a, b in zip(held["0b"], held["1b"])] == held["0a"]
    assert_close(measured(tmp_path / "a"), measured(tmp_path / "b"))


def test_fully_shard_in_bfloat16_and_compiled(dataset, tmp_path):
    flags = ["--dtype=bfloat16", "--max_iters=2", "--n_layer=1"]
    train(dataset, tmp_path / "b", *flags, "--fsdp=True", "--compile=True", processes=2)
    train(dataset, tmp_path / "a", *flags)
    for a, b in zip(measured(tmp_path / "a"), measured(tmp_path / "b")):
        if "val_loss" in a:
            assert a["val_loss"] == pytest.approx(b["val_loss"], rel=2e-2)
    assert all(v.dtype == torch.float32 for v in checkpoint(tmp_path / "b")["model"].values())
    words = refused("train.py", *TINY, f"--data_dir={dataset}", "--fsdp=True")
    assert "fsdp=True needs torchrun" in words


def workers(job):
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


LONG = ["--max_iters=60", "--save_interval=5", "--eval_interval=30"]


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    train(dataset, out, *LONG, processes=2)
    return out


def test_a_signal_to_one_process_ends_all_of_them(dataset, tmp_path, two):
    args = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}", *LONG]
    job = start(*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", *args)
    wait_for(job, "iter 12 |")
    os.kill(workers(job)[1], signal.SIGTERM)
    output = wait_for(job, "stopped before iteration")
    assert job.wait(60) == 0, output
    assert 12 < checkpoint(tmp_path / "out")["iter"] < 60
    train(dataset, tmp_path / "out", *LONG, "--init_from=resume", processes=2)
    assert measured(tmp_path / "out") == measured(two)
    assert same(checkpoint(tmp_path / "out")["ema"], checkpoint(two)["ema"])


def test_processes_stop_and_save_when_torchrun_is_killed(dataset, tmp_path):
    args = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}", *LONG]
    job = start(*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", *args)
    wait_for(job, "iter 12 |")
    job.kill()
    assert "by SIGTERM" in wait_for(job, "stopped before iteration")
    job.stdout.read()  # until both have ended
    job.wait()
    assert 12 < checkpoint(tmp_path / "out")["iter"] < 60


def test_a_dead_process_ends_the_job_and_torchrun_restarts_it(dataset, tmp_path, two):
    args = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}"]
    args += [*LONG, "--init_from=auto"]
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    job = start(*launch, *args)
    wait_for(job, "iter 12 |")
    os.kill(workers(job)[1], signal.SIGKILL)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 1
    assert "Signal 9 (SIGKILL)" in output
    assert checkpoint(tmp_path / "out")["iter"] in (10, 15)

    # docs/cluster.md: else the processes started anew would look for the dead ones' addresses
    job = start(*launch, "--max_restarts=1", *args, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(job, "iter 25 |")
    os.kill(workers(job)[0], signal.SIGKILL)
    output = wait_for(job, "done: 60 iterations")
    assert job.wait(60) == 0, output
    assert measured(tmp_path / "out") == measured(two)
    assert same(checkpoint(tmp_path / "out")["model"], checkpoint(two)["model"])


def test_a_process_that_hangs_ends_the_job(dataset, tmp_path):
    args = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}"]
    args += ["--max_iters=500", "--dist_timeout=0.05"]
    job = start(*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", *args)
    wait_for(job, "iter 12 |")
    hung = workers(job)[1]
    os.kill(hung, signal.SIGSTOP)
    wait_for(job, "RuntimeError")
    os.kill(hung, signal.SIGKILL)  # as torchrun does half a minute later
    job.communicate(timeout=60)
    assert job.returncode == 1


def two_nodes(*outs, flags):
    """Two torchruns of one process each that meet at an endpoint, as on two machines: (output,
    return code) of both."""
    launch = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    launch += ["train.py", *TINY, *flags]
    nodes = [start(*launch, f"--out_dir={out}") for out in outs]
    return [(node.communicate(timeout=120)[0], node.returncode) for node in nodes]


def test_two_torchruns_are_one_job(dataset, tmp_path, one):
    out = tmp_path / "out"
    flags = [f"--data_dir={dataset}", *EVEN]
    outputs, codes = zip(*two_nodes(out, out, flags=flags))
    assert codes == (0, 0), outputs
    assert sum("on 2 x cpu" in output for output in outputs) == 1, outputs
    assert_close(measured(one), measured(out))
    # each with a disk of its own, only one of which has a checkpoint
    nodes = two_nodes(out, tmp_path / "elsewhere", flags=[*flags, "--init_from=auto"])
    outputs, codes = zip(*nodes)
    assert codes == (1, 1), outputs
    assert any("out_dir must be shared by them" in output for output in outputs), outputs


def test_processes_must_divide_the_accumulation(dataset, tmp_path):
    done = train(dataset, tmp_path / "out", check=False, processes=3)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()
    assert "gradient_accumulation_steps=4 is no multiple of 3 processes" in done.stderr


def test_a_closed_terminal_ends_torchrun_with_a_checkpoint(dataset, tmp_path):
    """torchrun passes SIGHUP on."""
    out = tmp_path / "out"
    command = [*TORCHRUN, "--nproc_per_node=1", "--standalone", "train.py"]
    flags = [*TINY, f"--data_dir={dataset}", f"--out_dir={out}", "--max_iters=100000"]
    job = start(*command, *flags)
    wait_for(job, "iter 3 ")
    job.send_signal(signal.SIGHUP)
    assert "by SIGHUP" in job.communicate(timeout=100)[0]
    assert checkpoint(out)["iter"] >= 4
