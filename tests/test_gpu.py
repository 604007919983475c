"""What is particular to GPUs, as far as a CPU can show it."""

import json

import torch

from conftest import TINY, free_port, measured, refused, run, train
from model import Prior
from plumbing import distributed, optim


def test_the_benchmark_runs(tmp_path):
    """Every section, small; none finds a fault."""
    done = run("bench/gpu.py", "--device=cpu", f"--out={tmp_path}", fork=False)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    sections = "ceilings parity curves resume torchrun speed diffusers memory sampling checkpoint"
    assert {row["section"] for row in rows} == set(sections.split())
    assert all(row["right"] for row in rows)
    assert "failed" not in done.stdout and "skipped" not in done.stdout


def test_one_process_of_torchrun_takes_the_way_of_many(dataset, tmp_path):
    """DDP and fully_shard, with the results of a run without, and without warnings."""
    one = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    train(dataset, tmp_path / "plain", "--conv=True")
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp=True"])):
        out = tmp_path / name
        done = train(dataset, out, "--conv=True", *flags, MASTER_PORT=str(free_port()), **one)
        assert "Warning" not in done.stdout + done.stderr
        assert measured(out)[-1] == measured(tmp_path / "plain")[-1]


def test_half_of_torchruns_variables(dataset, tmp_path):
    for variable in (dict(RANK="1"), dict(WORLD_SIZE="2")):
        words = refused("train.py", *TINY, f"--data_dir={dataset}", **variable)
        assert "environment variable" in words and "expected, but not set" in words


def test_a_process_has_its_own_gpu(monkeypatch):
    """NCCL need not guess it."""
    given = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **kw: given.update(kw, name=backend)
    )
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    monkeypatch.setattr(
        torch.multiprocessing, "_prctl_pr_set_pdeathsig", lambda number: None, raising=False
    )
    assert distributed.init_distributed("cuda", 1) == "cuda:1"
    assert given["name"] == "nccl"
    assert given["device_id"] == given["current"] == torch.device("cuda:1")


def test_a_numbered_gpu_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *args, device: None)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert distributed.pick_device("cuda:1") == "cuda:1"
    assert distributed.pick_device("cuda") == "cuda"
    assert current == ["cuda:1"]


def test_bfloat16_only_where_it_is_in_hardware(monkeypatch):
    """A T4 emulates it, many times slower."""
    for in_hardware, dtype in ((True, "bfloat16"), (False, "float32")):

        def supported(including_emulation=True, answer=in_hardware):
            return including_emulation or answer

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert distributed.pick_dtype("auto", "cuda:0") == dtype
    assert distributed.pick_dtype("auto", "cpu") == "float32"


def test_the_prior_sees_small_variances():
    """Beside large means, where sums in float32 and TF32 would lose them."""
    torch.manual_seed(0)
    stds = torch.logspace(0, -1.9, 16).double()
    basis, _ = torch.linalg.qr(torch.randn(16, 16).double())
    tokens = ((torch.randn(4000, 16).double() * stds) @ basis.T + 100).float()[:, None]
    cond = torch.zeros(4000, 1, 3)
    prior = Prior((1, 1), 16, 3)
    prior.fit(lambda rows: (tokens[rows], cond[rows]), 4000)
    ratios = prior.variance[0].double().sort(descending=True).values / stds**2
    assert (ratios.log().abs() < 0.4).all()  # of 400 that were held out


def test_stepping_in_backward_looks_at_one_parameter_at_a_time(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    opt = optim.make_optimizer(model, "adafactor", 0.1, 0.0, (0.9, 0.95))
    groups = opt.param_groups
    norm = optim.step_in_backward(opt)
    step, seen = opt.step, []
    monkeypatch.setattr(
        opt, "step", lambda: (seen.append([len(g["params"]) for g in opt.param_groups]), step())
    )
    before = [p.clone() for p in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    assert seen == [[1]] * 4
    assert opt.param_groups is groups and norm() > 0
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
