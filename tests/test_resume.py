"""A run that is ended, by whatever, goes on as if it had not been."""

import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from conftest import (
    ROOT,
    RUN_SCRIPT,
    TINY,
    checkpoint,
    log,
    make_pickle,
    measured,
    refused,
    run,
    same,
    start,
    train,
    wait_for,
)
from plumbing.checkpoint import Saver, read_checkpoint, replace_file, restore_optimizer


def test_killed_at_random_moments(tmp_path):
    """By SIGKILL, SIGTERM and SIGINT, bit for bit; bench/resume.py by default does so twenty times,
    and by the time limit as well."""
    done = run("bench/resume.py", tmp_path, "--kills=3", "--iters=60", "--seed=9")
    kinds = [line.split()[1] for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert sorted(kinds) == ["SIGINT", "SIGKILL", "SIGTERM"]
    assert "ckpt_last.pt: optimizer      equal" in done.stdout
    assert "DIFFERS" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_during_evaluation_breaks_it_off(dataset, tmp_path, number):
    out = tmp_path / "out"
    # the evaluation would take a minute; it asks after each of its batches
    flags = ["--eval_batch_size=1", "--max_iters=4", "--eval_interval=4", "--save_interval=99"]
    slow = [*flags, "--eval_sample_steps=2000"]
    process = start("train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", *slow)
    wait_for(process, "iterations (")
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert f"stopped before iteration 0 by {number.name}" in output
    assert checkpoint(out)["iter"] == 0
    assert log(out) == []
    fast = [*flags, "--eval_sample_steps=2"]
    train(dataset, out, *fast, "--init_from=resume")
    train(dataset, tmp_path / "whole", *fast)
    assert measured(out) == measured(tmp_path / "whole")
    assert same(checkpoint(out)["optimizer"], checkpoint(tmp_path / "whole")["optimizer"])


def test_time_limit(dataset, tmp_path, trained):
    out = tmp_path / "out"
    done = train(dataset, out, "--time_limit=0", "--eval_interval=100")
    assert "stopped before iteration 0 by the time limit" in done.stdout
    train(dataset, out, "--init_from=resume")  # the limit was the first job's, not the run's
    assert measured(out) == measured(trained)
    assert "time_limit=-1" in refused("train.py", "--time_limit=-1")


FULL_DISK = """
import json, resource
dumps = json.dumps
def spy(record, **kwargs):
    if record.get("iter") in (4, 5):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if record["iter"] == 4 else -1, -1))
    return dumps(record, **kwargs)
json.dumps = spy
"""


def test_a_full_disk_stops_no_run(dataset, tmp_path, trained):
    """From the log line of iteration 4 to that of 5 nothing can be written: what was there stays,
    training goes on."""
    out = tmp_path / "out"
    done = train(dataset, out, "--save_interval=5", patch=FULL_DISK, fork=False)
    for words in ("log.jsonl not written", "ckpt_last.pt not written", "done: 6 iterations"):
        assert words in done.stdout
    assert not list(out.glob("*.partial"))
    assert measured(out) == [line for line in measured(trained) if line["iter"] != 4]
    assert same(checkpoint(out)["model"], checkpoint(trained)["model"])


BACKGROUND = """
import time
from plumbing import checkpoint
class Saver(checkpoint.Saver):  # as on a GPU
    in_background = property(lambda self: True, lambda self, value: None)
checkpoint.Saver, write = Saver, checkpoint.replace_file
def slow(path, function):
    time.sleep(SECONDS if str(path).endswith(".pt") else 0)
    write(path, function)
checkpoint.replace_file = slow
"""


@pytest.mark.parametrize("patch", ["", BACKGROUND.replace("SECONDS", "0")])
def test_a_failed_write_keeps_the_checkpoint(dataset, tmp_path, patch):
    out = tmp_path / "out"
    train(dataset, out, "--max_iters=3")
    before = (out / "ckpt_last.pt").read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = train(dataset, out, "--init_from=resume", check=False, patch=patch + limit, fork=False)
    assert "ckpt_last.pt not written: [Errno 27] File too large" in done.stdout
    assert "done: 6 iterations" in done.stdout
    assert done.returncode == 1
    assert "could not be written at the end" in done.stderr
    assert (out / "ckpt_last.pt").read_bytes() == before
    assert not list(out.glob("*.partial"))


SPOILED = """
import flow, math
loss, calls = flow.loss, []
def spoiled(*args, generator=None, **kwargs):
    losses, out = loss(*args, generator=generator, **kwargs)
    calls.extend([generator] if generator else [])
    return losses * math.nan if generator and len(calls) == 9 else losses, out
flow.loss = spoiled
"""


def test_a_bad_step_is_skipped(dataset, tmp_path):
    """The ninth micro-batch, of iteration 2, has a loss that is not a number."""
    out = tmp_path / "out"
    done = train(dataset, out, "--save_interval=2", "--eval_interval=100", patch=SPOILED)
    assert "WARNING: iter 2 skipped: loss nan, gradient norm nan" in done.stdout
    lines = log(out)
    assert [line["bad_steps"] for line in lines[:-1]] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    ckpt = checkpoint(out)
    assert ckpt["bad_steps"] == 1
    assert ckpt["optimizer"]["state"][1]["step"] == 5  # of 6
    assert all(v.isfinite().all() for v in ckpt["ema"].values())
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]


IN_BACKWARD = ["--optimizer_in_backward=True", "--grad_clip=0", "--gradient_accumulation_steps=1"]


@pytest.mark.parametrize("lean", [[], IN_BACKWARD])
def test_a_run_that_diverges_ends(dataset, tmp_path, lean):
    out = tmp_path / "out"
    train(dataset, out, "--max_iters=2", *lean)
    before = (out / "ckpt_last.pt").read_bytes()
    args = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", *lean]
    args += ["--init_from=resume", "--max_iters=50", "--max_bad_steps=3", "--save_interval=4"]
    words = refused(*args, "--learning_rate=1e10")
    reason = "no finite loss and gradient in 3 iterations in a row"
    assert f"{reason}; lower learning_rate=10000000000.0" in words
    assert (out / "ckpt_last.pt").read_bytes() == before
    assert log(out)[-1]["bad_steps"] == 3
    assert log(out)[-1]["loss"] is None


def test_wandb_goes_on_with_its_run(dataset, tmp_path):
    out = tmp_path / "out"
    flags = ["--wandb_log=True", "--wandb_run_name=test"]
    train(dataset, out, *flags, "--max_iters=3", WANDB_MODE="offline")
    train(dataset, out, *flags, "--init_from=resume", WANDB_MODE="offline")
    files = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # the name is the id
    assert checkpoint(out)["wandb_id"] in files[0].name
    for file in files:
        content = file.read_bytes()
        assert b"val_frechet" in content
        assert b"mfu" in content
    assert [line["iter"] for line in log(out)] == list(range(7))


def test_restoring_holds_one_copy_of_the_optimizer(tmp_path):
    """The peak of memory after a change of all of the restored state is little more than it takes,
    though the checkpoint holds weights as well."""
    n, size = 40, 1 << 20
    params = [torch.nn.Parameter(torch.zeros(1024, 1024)) for _ in range(n)]
    opt = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    state = {"optimizer": opt.state_dict(), "model": dict(enumerate(params)), "model_args": {}}
    Saver(math.inf, "cpu").start([tmp_path / "ckpt.pt"], state)
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from plumbing.checkpoint import read_checkpoint, restore_optimizer
from torch.distributed.tensor import distribute_tensor
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
params = [torch.nn.Parameter(torch.empty(1024, 1024)) for _ in range({n})]
opt, before = torch.optim.AdamW(params, fused=True), peak()
restore_optimizer(read_checkpoint({str(tmp_path / "ckpt.pt")!r}), opt)
for state in opt.state.values():
    for x in state.values():
        x += 1
print(peak() - before, len(opt.state))
"""
    done = run("-c", script, MALLOC_MMAP_THRESHOLD_="1048576")
    grown, count = map(float, done.stdout.split())
    megabytes = 2 * n * size * 4 / 2**20  # of the state
    assert count == n
    assert megabytes < grown < 1.2 * megabytes
    ckpt = read_checkpoint(tmp_path / "ckpt.pt")
    params = [torch.nn.Parameter(torch.empty(1024, 1024)) for _ in range(n)]
    other = torch.optim.AdamW(params, lr=0.5, fused=True)
    restore_optimizer(ckpt, other)
    assert same(opt.state_dict()["state"], other.state_dict()["state"])
    assert other.param_groups[0]["lr"] == 0.5


def test_what_is_in_the_folder_is_not_lost(dataset, tmp_path, trained):
    """A new run does not replace an old one unasked; a full disk leaves all as it is."""
    out = shutil.copytree(trained, tmp_path / "out")
    words = refused("train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}")
    assert "already holds a run: --init_from=auto" in words
    assert "--overwrite=True" in words
    for path in trained.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    overwrite = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", "--overwrite=True"]
    missing = "import sys; sys.modules['wandb'] = None\n"
    assert "wandb" in refused(*overwrite, "--wandb_log=True", patch=missing)  # first of all
    assert same(checkpoint(out), checkpoint(trained)) and log(out) == log(trained)
    train(dataset, out, "--max_iters=2", "--overwrite=True")
    assert checkpoint(out)["iter"] == 2
    assert log(out)[-1]["iter"] == 2
    assert "overwrite = False" in (out / "config.py").read_text()
    before = (out / "log.jsonl").read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    done = train(dataset, out, "--init_from=resume", check=False, patch=limit, fork=False)
    assert done.returncode == 1
    assert "config.py not written: [Errno 27]" in done.stderr
    assert (out / "log.jsonl").read_bytes() == before


def test_a_run_that_has_only_its_best_checkpoint_goes_on(dataset, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "ckpt_last.pt").unlink()
    train(dataset, out, "--init_from=auto")
    assert same(checkpoint(out)["optimizer"], checkpoint(trained)["optimizer"])
    assert measured(out) == measured(trained)


def test_a_new_run_takes_nothing_from_one_without_a_checkpoint(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.py").write_text("n_kv_head = 1\n")
    train(dataset, out, "--init_from=auto", "--max_iters=1")
    assert checkpoint(out)["model_args"]["n_kv_head"] == 2  # as many as heads


def test_a_copy_of_a_run_goes_on_where_it_lies(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "out")  # the default out_dir
    before = (trained / "ckpt_last.pt").read_bytes()
    run(ROOT / "train.py", "--init_from=resume", "--max_iters=7", cwd=tmp_path)
    assert checkpoint(tmp_path / "out")["iter"] == 7
    assert (trained / "ckpt_last.pt").read_bytes() == before


def test_without_averages_a_run_goes_on_from_its_raw_weights(dataset, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    train(dataset, out, "--init_from=resume", "--ema_decay=0")  # it was done: it only saves
    assert same(checkpoint(out)["model"], checkpoint(trained)["model"])
    assert same(checkpoint(out)["ema"], checkpoint(trained)["model"])


def test_dry_run_and_evaluation_alone_write_nothing(dataset, tmp_path, trained):
    out = shutil.copytree(trained, tmp_path / "out")
    done = train(dataset, out, "--init_from=resume", "--dry_run=True")
    assert "dry run: peak memory" in done.stdout
    assert "done" not in done.stdout
    args = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", "--init_from=resume"]
    words = refused(*args, "--eval_only=True", "--time_limit=0")
    assert "the evaluation was broken off" in words
    for path in trained.iterdir():
        if path.is_file():
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_checkpoints_written_in_the_background_are_the_same(dataset, tmp_path, trained):
    """Though each is written while the iterations after it change the weights."""
    out = tmp_path / "out"
    train(dataset, out, patch=BACKGROUND.replace("SECONDS", "0.5"), fork=False)
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        ours, theirs = checkpoint(out, name), checkpoint(trained, name)
        assert ours.pop("config") != theirs.pop("config")  # out_dir
        assert same(ours, theirs)
    assert measured(out) == measured(trained)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_written(dataset, tmp_path, trained, number):
    """SIGKILL leaves the previous one, SIGTERM waits; both runs go on."""
    out = tmp_path / "out"
    train(dataset, out, "--max_iters=2", "--eval_interval=2")
    first = checkpoint(out)["iter"]
    flags = [*TINY, f"--data_dir={dataset}", f"--out_dir={out}", "--init_from=resume"]
    patch = BACKGROUND.replace("SECONDS", "3") + RUN_SCRIPT
    process = start("-c", patch, "train.py", *flags, "--save_interval=3", "--max_iters=6")
    wait_for(process, "iter 4 ")  # while that of iteration 3 is being written
    process.send_signal(number)
    process.communicate(timeout=100)
    left = checkpoint(out)["iter"]
    assert left == first if number == signal.SIGKILL else left >= 5
    train(dataset, out, "--init_from=auto")
    assert same(checkpoint(out)["model"], checkpoint(trained)["model"])


def test_the_best_loss_is_that_on_the_disk(tmp_path, monkeypatch, capsys):
    """Whichever of the files cannot be written."""
    best, last = tmp_path / "ckpt_best.pt", tmp_path / "ckpt_last.pt"
    saver, write = Saver(3.0, "cpu"), replace_file
    full = set()

    def replace(path, function):
        if path in full:
            raise OSError(f"{path} not written: the disk is full")
        write(path, function)

    monkeypatch.setattr("plumbing.checkpoint.replace_file", replace)
    for full, loss, expected in (({best}, 2.0, 3.0), ({last}, 2.0, 2.0), (set(), 1.0, 1.0)):
        saver.start([best, last], {"model_args": {}}, loss)
        assert saver.wait() == (not full)
        assert saver.best_val_loss == expected
        assert capsys.readouterr().out.count("WARNING") == len(full)
        if expected == loss:
            assert read_checkpoint(best)["best_val_loss"] == expected
    saver.start([last], {"model_args": {}})
    assert read_checkpoint(last)["best_val_loss"] == saver.best_val_loss == 1.0


def test_file_systems_without_a_feature(dataset, tmp_path, trained):
    """Where folders cannot be flushed to the disk, and locks do not exist."""
    patch = """
import errno, fcntl, os, stat
fsync = os.fsync
def flush(number):
    if stat.S_ISDIR(os.fstat(number).st_mode):
        raise OSError(errno.EINVAL, "no folders")
    fsync(number)
def flock(file, how):
    raise OSError(errno.ENOLCK, "no locks")
os.fsync, fcntl.flock = flush, flock
"""
    make_pickle(tmp_path / "a.pkl")
    run("prepare.py", tmp_path / "a.pkl", f"--out={tmp_path / 'data'}", patch=patch)
    assert not list((tmp_path / "data").glob(".*"))
    done = train(dataset, tmp_path / "out", patch=patch)
    assert "not written" not in done.stdout and "cannot be locked" in done.stdout
    assert same(checkpoint(tmp_path / "out")["model"], checkpoint(trained)["model"])
    best, before = checkpoint(tmp_path / "out", "ckpt_best.pt"), checkpoint(trained, "ckpt_best.pt")
    assert best["best_val_loss"] == before["best_val_loss"]


def test_a_ruined_model_is_not_saved(dataset, tmp_path, trained):
    """One iteration at a rate of 1e10, and the run's last ones have no finite loss."""
    out = shutil.copytree(trained, tmp_path / "out")
    for iterations in (7, 11):
        flags = ["--init_from=resume", f"--max_iters={iterations}", "--learning_rate=1e10"]
        done = train(dataset, out, *flags, "--min_lr=1e10", "--grad_clip=0", check=False)
        assert done.returncode == 1
        assert "the last iterations were not finite" in done.stderr
        assert same(checkpoint(out)["model"], checkpoint(trained)["model"])


def test_fewer_iterations_than_there_were(dataset, tmp_path, trained):
    """The last line says what is in the checkpoint."""
    out = shutil.copytree(trained, tmp_path / "out")
    done = train(dataset, out, "--init_from=resume", "--max_iters=2")
    assert "done: 6 iterations" in done.stdout and checkpoint(out)["iter"] == 6


def test_a_replaced_run_leaves_nothing_behind(dataset, tmp_path, trained):
    """That would look like the new one's; what is not of its making stays."""
    out = shutil.copytree(trained, tmp_path / "out")
    run("sample.py", f"--out_dir={out}", "--steps=1", "--draws=1", "--plot=True")
    (out / "notes.txt").write_text("mine")
    train(dataset, out, "--overwrite=True", "--max_iters=1", "--eval_interval=9")
    names = {path.name for path in out.iterdir()}
    kept = {".lock", "ckpt_best.pt", "ckpt_last.pt", "config.py", "log.jsonl", "notes.txt"}
    assert names == kept


def test_signals_are_those_of_before_after_a_run(dataset, tmp_path):
    """As for %run in a notebook, whose next Ctrl-C is its own."""
    code = RUN_SCRIPT + "import signal; print(signal.getsignal(signal.SIGINT))"
    flags = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}"]
    done = run("-c", code, "train.py", *flags)
    assert "default_int_handler" in done.stdout.splitlines()[-1]


def test_nohup_is_respected(dataset, tmp_path):
    out = tmp_path / "out"
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + RUN_SCRIPT
    flags = [*TINY, f"--data_dir={dataset}", f"--out_dir={out}"]
    process = start("-c", ignore, "train.py", *flags)
    wait_for(process, "iter 0 ")
    process.send_signal(signal.SIGHUP)
    assert "done: 6 iterations" in process.communicate(timeout=100)[0]


def test_one_run_in_a_folder_at_a_time(dataset, tmp_path, trained):
    """The second is refused; one that was killed leaves nothing that refuses the next; where the
    file system has no locks there is a warning."""
    out = tmp_path / "out"
    flags = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}"]
    process = start(*flags, "--max_iters=100000")
    wait_for(process, "iter 4 ")  # by then there is a checkpoint
    again = [*flags, "--init_from=auto"]
    assert f"another run is writing to {out}" in refused(*again)
    process.kill()
    process.wait()
    no_locks = """
import errno, fcntl, os
def flock(file, how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""
    shutil.copytree(trained, tmp_path / "copy")
    for patch, words in (("", ""), (no_locks, "WARNING: {} cannot be locked")):
        done = run(*flags, "--overwrite=True", patch=patch, fork=False)
        assert words.format(out) in done.stdout
        assert same(checkpoint(out)["model"], checkpoint(trained)["model"])


def test_resumes_from_the_checkpoint_that_is_named(dataset, tmp_path, trained):
    """Of the run's own two; then it goes on as if the other did not exist."""
    out = shutil.copytree(trained, tmp_path / "out")
    train(dataset, out, "--overwrite=True", "--max_iters=3")
    (out / "ckpt_last.pt").write_bytes(b"")
    train(dataset, out, f"--init_from={out / 'ckpt_best.pt'}")
    assert same(checkpoint(out)["model"], checkpoint(trained)["model"])
    assert measured(out) == measured(trained)


def test_learning_rates_that_may_surprise(dataset, tmp_path, trained):
    assert "WARNING" not in train(dataset, tmp_path / "a").stdout
    done = train(dataset, tmp_path / "b", "--warmup_iters=6")
    assert "WARNING: the warmup, 6 iterations, takes the whole run of 6" in done.stdout
    out = shutil.copytree(trained, tmp_path / "out")
    done = train(dataset, out, "--init_from=resume", "--max_iters=12")
    rates = [line["lr"] for line in log(out) if "lr" in line]
    assert rates[6] > rates[5]
    assert f"WARNING: the learning rate rises from 0 to {rates[6]:.2g}" in done.stdout


def test_what_accompanies_a_run_cannot_end_it(dataset, tmp_path, trained):
    broken = """
import sys, types
def log(*args, **kwargs):
    raise ConnectionError("the service is gone")
wandb = types.ModuleType("wandb")
wandb.init, wandb.log = lambda **kwargs: types.SimpleNamespace(id="x"), log
sys.modules["wandb"] = wandb
"""
    done = train(dataset, tmp_path / "out", "--wandb_log=True", patch=broken, fork=False)
    assert "WARNING: wandb: the service is gone" in done.stdout
    assert same(checkpoint(tmp_path / "out")["model"], checkpoint(trained)["model"])


@pytest.mark.parametrize("mode", ["online", "nonsense"])
def test_goes_on_without_a_login(dataset, tmp_path, mode):
    """As without a network: what wandb would be sent stays here."""
    out = tmp_path / "out"
    patch = f"import os; os.environ.update(WANDB_MODE={mode!r}, WANDB_API_KEY='')\n"
    done = train(dataset, out, "--max_iters=1", "--wandb_log=True", patch=patch, fork=False)
    assert "WARNING: wandb: " in done.stdout and "offline" in done.stdout
    assert len(list(out.glob("wandb/offline-run-*"))) == 1
    assert checkpoint(out)["wandb_id"]


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_output_that_nobody_takes_ends_no_run(dataset, tmp_path, trained, kind):
    """train.py > /dev/full; train.py | head -2"""
    out = tmp_path / "out"
    flags = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}"]
    with open("/dev/full", "w") as full, open(tmp_path / "stderr", "w+") as stderr:
        stdout = full if kind == "full disk" else subprocess.PIPE
        pipes = dict(stdout=stdout, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        process = subprocess.Popen([sys.executable, *flags], cwd=ROOT, **pipes)
        if kind == "closed pipe":
            process.stdout.readline()
            process.stdout.close()
        assert process.wait(timeout=100) == 0
        stderr.seek(0)
        assert stderr.read().count("WARNING: cannot print: ") == 1
    assert same(checkpoint(out)["model"], checkpoint(trained)["model"])


def test_data_that_is_cut_off_under_a_run(tmp_path):
    """It ends at once, by a signal that a shell or torchrun names: Bus error."""
    make_pickle(tmp_path / "data.pkl", n=400, grid=(4, 4))
    run("prepare.py", tmp_path / "data.pkl", f"--out={tmp_path / 'data'}")
    flags = [*TINY, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    process = start("train.py", *flags, "--max_iters=100000", "--eval_interval=100000")
    wait_for(process, "iter 3 ")
    os.truncate(tmp_path / "data" / "train_cond.npy", 200)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGBUS
