import json
import shutil

import numpy as np
import pytest
import torch

from conftest import (
    CLOCK,
    ROOT,
    TINY,
    checkpoint,
    free_port,
    log,
    make_pickle,
    measured,
    refused,
    run,
    same,
    train,
)
from model import Prior


def test_a_run_learns_logs_and_saves(trained, dataset):
    lines = log(trained)
    assert [line["iter"] for line in lines] == list(range(7))
    names = ("token_cosine", "frechet", "frechet_patch", "neighbours")
    sampled = {f"val_{name}" for name in names}
    by_t = {f"{kind}_t{i}" for kind in ("val_loss", "val_loss_raw") for i in range(4)}
    assert {"iter", "val_loss", "val_loss_raw"} | sampled | by_t == lines[-1].keys()
    each = {"loss", "output_norm", "grad_norm", "lr", "bad_steps", *CLOCK}
    assert lines[1].keys() == {"iter"} | each
    assert lines[0].keys() == (lines[-1].keys() | each) - set(CLOCK)  # the first one compiles
    for line in lines[:-1]:
        assert line["output_norm"] > 0
    for line in lines[1:-1]:
        assert 0 < line["mfu"] < 1
    iterations_left = [1000 * line["seconds_left"] / line["ms"] for line in lines[1:-1]]
    assert iterations_left == pytest.approx([4, 3, 2, 1, 0])
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    rates = [line["lr"] for line in lines[:-1]]
    assert rates[:2] == pytest.approx([5e-3, 1e-2])  # warmup
    assert rates[2:] == sorted(rates[2:], reverse=True)  # cosine
    ckpt = checkpoint(trained)
    assert ckpt["iter"] == 6
    assert ckpt["model_args"]["dim"] == 32
    assert ckpt["config"]["learning_rate"] == 1e-2
    names = [*ckpt["model"], *ckpt["ema"]]
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in names)
    val_losses = [line["val_loss"] for line in lines[1:] if "val_loss" in line]
    assert ckpt["best_val_loss"] == min(val_losses)
    config = (trained / "config.py").read_text()
    assert config.startswith(f"# The settings of this run, for the code at {ckpt['code']}.\n")
    settings = {}
    exec(config, settings)
    assert {key: settings[key] for key in ckpt["config"]} == ckpt["config"]
    decayed = sum(len(g["params"]) for g in ckpt["optimizer"]["param_groups"] if g["weight_decay"])
    assert decayed == sum(p.dim() >= 2 for p in ckpt["model"].values())


def test_float16_resumes_bit_for_bit(dataset, tmp_path):
    """The scaler too. (Other settings and other ends: tests/test_resume.py.)"""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small = ["--dtype=float16", "--batch_size=1", "--gradient_accumulation_steps=2"]
    small += ["--eval_size=4", "--eval_samples=0"]
    train(dataset, whole, *small, "--save_interval=4")
    # killed in iteration 5: the checkpoint is of iteration 4, the log has run ahead
    kill = "import json, os; dumps = json.dumps"
    kill += "; json.dumps = lambda r, **k: os._exit(9) if r.get('iter') == 5 else dumps(r, **k)"
    killed = train(dataset, parts, *small, "--save_interval=4", patch=kill, check=False)
    assert killed.returncode == 9
    assert checkpoint(parts)["iter"] == 4
    assert log(parts)[-1]["iter"] == 4
    done = train(dataset, parts, *small, "--save_interval=2", "--init_from=resume")
    assert "changed since the checkpoint: save_interval 4 -> 2" in done.stdout
    for key in ("model", "ema", "optimizer", "scaler", "iter", "best_val_loss"):
        assert same(checkpoint(whole)[key], checkpoint(parts)[key]), key
    assert measured(whole) == measured(parts)
    assert checkpoint(whole)["scaler"]["scale"] > 1


LEAN = ["--optimizer=adafactor", "--optimizer_in_backward=True", "--gradient_checkpointing=True"]
LEAN += ["--ema_decay=0", "--grad_clip=0", "--gradient_accumulation_steps=1", "--batch_size=8"]


def test_the_memory_saving_settings_change_no_bit(dataset, tmp_path):
    """Stepping in the backward pass and recomputing blocks give the same run, over a resume too."""
    plain, lean = tmp_path / "plain", tmp_path / "lean"
    train(dataset, plain, *LEAN, "--optimizer_in_backward=False", "--gradient_checkpointing=False")
    train(dataset, lean, *LEAN, "--max_iters=3")  # the learning rate falls from iteration 3 on
    train(dataset, lean, *LEAN, "--init_from=resume")
    assert [line["iter"] for line in log(lean)] == list(range(7))
    expected = checkpoint(plain)
    ckpt = checkpoint(lean)
    assert same(ckpt["ema"], expected["ema"])
    assert same(expected["model"], expected["ema"])
    states = ckpt["optimizer"]["state"].values()
    assert states and all(state["average"].dtype == torch.bfloat16 for state in states)
    size = sum(value.numel() * value.element_size() for s in states for value in s.values())
    # in this tiny model; AdamW's states take 8 bytes per parameter
    assert size < 3.5 * sum(p.numel() for p in ckpt["model"].values())
    assert "val_loss_raw" not in log(lean)[-1]
    compiled = tmp_path / "compiled"  # block by block
    train(dataset, compiled, *LEAN, "--compile=True", "--max_iters=2")
    assert log(compiled)[1]["loss"] == pytest.approx(log(lean)[1]["loss"], rel=1e-3)


def test_averaging_keeps_no_graph(dataset, tmp_path):
    """Memory stays flat over 1,000 iterations, and no average knows how it was made."""
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import json, resource, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
dumps, peaks = json.dumps, []
def spy(record, **kwargs):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return dumps(record, **kwargs)
json.dumps = spy
run = runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
assert all(p.grad_fn is None and not p.requires_grad for p in run["ema_params"])
print("resident", *peaks[::2])  # each record goes through json twice
""")
    flags = "--dim=16 --n_layer=4 --multiple_of=8 --batch_size=1 --gradient_accumulation_steps=1"
    flags += " --eval_interval=5000 --eval_size=4 --eval_samples=0 --save_interval=5000"
    args = [*TINY, *flags.split(), f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}"]
    done = run(probe, *args, "--max_iters=1101", "--log_interval=100")
    peaks = list(map(int, done.stdout.split("resident ")[1].split()))  # MB
    assert len(peaks) == 13
    assert peaks[11] - peaks[1] < 10  # iterations 100 and 1,100


def test_the_prior_is_fitted_once(dataset, tmp_path):
    """From the training targets as they are normalized. Then it is the checkpoint's, and nothing
    trains it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prior = "--prior=True"
    train(dataset, whole, prior)
    train(dataset, parts, prior, "--max_iters=3")  # the learning rate falls from iteration 3 on
    train(dataset, parts, prior, "--init_from=resume")
    a, b = checkpoint(whole), checkpoint(parts)
    assert same(a["model"], b["model"])
    assert same(a["ema"], b["ema"])
    assert measured(whole) == measured(parts)
    arrays = []
    for kind in ("target", "cond"):
        x = torch.from_numpy(np.load(dataset / f"train_{kind}.npy")).float()
        arrays.append((x - a["stats"][f"{kind}_mean"]) / a["stats"][f"{kind}_std"])
    fitted = Prior(a["model_args"]["grid"], arrays[0].shape[2], arrays[1].shape[2])
    fitted.fit(lambda rows: [x[rows] for x in arrays], len(arrays[0]))
    for name, value in fitted.state_dict().items():
        assert torch.allclose(a["ema"][f"prior.{name}"].abs(), value.abs(), atol=1e-3), name
    assert fitted.weight.any() and not (fitted.variance == 1).all()
    train(dataset, tmp_path / "two", prior, processes=2)
    two = checkpoint(tmp_path / "two")["ema"]
    assert all(torch.allclose(value, two[name], atol=1e-4) for name, value in a["ema"].items())
    done = run("sample.py", f"--out_dir={whole}", "--steps=3", "--draws=1")
    assert "token_cosine" in done.stdout
    assert np.isfinite(np.load(whole / "generated.npy")).all()


def test_conditions_of_another_grid(tmp_path):
    """Nine condition tokens for four target tokens are attended to, from the pickle to samples."""
    make_pickle(tmp_path / "a.pkl", n=24, eva_blip3o_embeddings=torch.randn(24, 9, 6))
    data, out = tmp_path / "data", tmp_path / "out"
    done = run("prepare.py", tmp_path / "a.pkl", f"--out={data}", "--val_fraction=0.25")
    assert "cross-attention" in done.stdout
    train(data, out, "--learning_rate=None")
    config = checkpoint(out)["config"]
    assert config["conditioning"] == "cross"
    assert config["t_shift"] == 1.0
    assert config["learning_rate"] == 1.6 / 32
    run("sample.py", f"--out_dir={out}", "--steps=3", "--guidance=2")
    assert np.load(out / "generated.npy").shape == (6, 4, 5)
    words = refused("train.py", *TINY, f"--data_dir={data}", "--conditioning=aligned")
    assert "conditioning=aligned needs 4 condition tokens, as in the target, not 9" in words


@pytest.mark.parametrize(
    "setting", ["--grad_clip=1", "--gradient_accumulation_steps=2", "--dtype=float16"]
)
def test_stepping_in_backward_needs_one_pass_a_step(dataset, tmp_path, setting):
    args = [*TINY, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}", *LEAN, setting]
    assert "optimizer_in_backward=True needs" in refused("train.py", *args)


def test_ddp_without_condition_dropout(dataset, tmp_path):
    """Nothing trains the null condition then, and nobody waits for its gradient. (With dropout:
    tests/test_distributed.py.)"""
    one, two = tmp_path / "one", tmp_path / "two"
    train(dataset, one, "--cond_dropout=0")
    train(dataset, two, "--cond_dropout=0", processes=2)
    for a, b in zip(measured(one), measured(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for name, value in checkpoint(one)["model"].items():
        assert torch.allclose(value, checkpoint(two)["model"][name], atol=1e-4), name


def test_epochs_subset_and_settings_of_the_flow(dataset, tmp_path):
    settings = "--num_epochs=2 --subset_size=12 --path=cosine --prediction=x --normalize=l2"
    settings += " --t_sampling=logit_normal --sigma_min=0.01 --l2_weight=0.1"
    settings += " --gradient_checkpointing=True --dtype=bfloat16"
    done = train(dataset, tmp_path / "out", *settings.split())
    assert "12 samples, 8 per iteration, 3 iterations (2.0 epochs)" in done.stdout
    assert log(tmp_path / "out")[-1]["iter"] == 3
    assert checkpoint(tmp_path / "out")["flow"]["prediction"] == "x"
    run("train.py", f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--max_iters=4")
    assert log(tmp_path / "out")[-1]["iter"] == 4


def test_eval_only_dry_run_and_debug(dataset, tmp_path, trained):
    last = log(trained)[-1]
    done = train(dataset, trained, "--init_from=resume", "--eval_only=True")
    for name in ("val_loss", "val_loss_raw_t3", "val_frechet"):
        assert f"{name}={last[name]:.4g}" in done.stdout
    assert log(trained)[-1] == last  # nothing was written
    assert "peak memory" in train(dataset, tmp_path / "dry", "--dry_run=True").stdout
    assert not (tmp_path / "dry").exists()
    train(dataset, tmp_path / "debug", "--debug=True", "--max_iters=1000", "--wandb_log=True")
    assert log(tmp_path / "debug")[-1]["iter"] == 10
    settings = (tmp_path / "debug" / "config.py").read_text()
    assert "debug = False" in settings and "max_iters = 1000" in settings  # for a run that goes on


def test_compile(dataset, tmp_path):
    """The same losses and gradients, over an update; a checkpoint with the same names."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    flags = ["--max_iters=2", "--n_layer=1"]
    train(dataset, plain, *flags)
    train(dataset, compiled, *flags, "--compile=True")
    for name in ("loss", "output_norm", "grad_norm"):
        a, b = ([line[name] for line in log(out)[:2]] for out in (plain, compiled))
        assert a == pytest.approx(b, rel=1e-4), name
    assert checkpoint(compiled)["model"].keys() == checkpoint(plain)["model"].keys()


GRAPHS = """
import atexit, torch
from torch._dynamo.utils import counters
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **kwargs: compile(self, backend="eager", **kwargs)
show = lambda: print("GRAPHS", counters["stats"]["unique_graphs"], len(counters["graph_break"]))
atexit.register(show)
"""


def test_a_block_is_one_graph(dataset, tmp_path):
    """In DDP as well, whose compiler would cut it at every bucket; and all blocks share it: one for
    training, one for each of the evaluated models, one for their samples."""
    flags = ["--max_iters=1", "--n_layer=3", "--conditioning=cross", "--compile=True"]
    torchrun = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    done = train(
        dataset, tmp_path / "out", *flags, patch=GRAPHS, MASTER_PORT=str(free_port()), **torchrun
    )
    _, graphs, breaks = done.stdout.splitlines()[-1].split()
    assert int(graphs) <= 4
    assert breaks == "0"


def test_the_first_iteration_is_not_part_of_the_pace(dataset, tmp_path):
    slow = """
import flow, time
loss = flow.loss
def first(*args, generator=None, **kwargs):
    if generator:
        time.sleep(4)
        flow.loss = loss
    return loss(*args, generator=generator, **kwargs)
flow.loss = first
"""
    train(dataset, tmp_path / "out", patch=slow, fork=False)
    assert log(tmp_path / "out")[1]["ms"] < 4000


def test_an_iteration_has_256_samples(dataset, tmp_path):
    flags = ["train.py", f"--data_dir={dataset}", "--dim=32", "--n_layer=1", "--n_head=2"]
    flags += ["--dry_run=True", f"--out_dir={tmp_path}"]
    cases = {"": (32, 8), "--batch_size=100": (100, 2), "--gradient_accumulation_steps=2": (128, 2)}
    for flag, (batch_size, steps) in cases.items():
        text = " ".join(run(*flags, *flag.split()).stdout.split())
        assert f"--batch_size={batch_size} --gradient_accumulation_steps={steps}" in text
        assert f"{batch_size * steps} per iteration" in text


NOWHERE = "dataset 'nowhere' does not exist; name it with --data_dir, or make it with: python prep"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--data_dir=nowhere"], NOWHERE),
        (["--bacth_size=3"], "did you mean 'batch_size'"),
        (["--init_from=resume"], "No such file"),
        (["--optimizer=adafactor", "--beta1=0.99"], "beta1=0.99 must be at most 0.95"),
        (["--init_from=gpt2"], "there is no gpt2: no run, checkpoint or folder of safetensors"),
        (["--path=cubic"], "path='cubic'"),
        (["--normalize=batch"], "normalize='batch'"),
        (["--dim=30"], "dim=30"),
        (["--subset_size=0"], "subset_size=0"),
        (["--batch_size=0"], "batch_size=0"),
        (["--beta1=1.5"], "Invalid beta parameter at index 0: 1.5"),
        (["--learning_rate=-1"], "learning_rate=-1.0 must be 0 or more"),
        (["--learning_rate=nan"], "learning_rate takes float or None, not 'nan'"),
        (["--num_epochs=-1"], "num_epochs=-1"),
        (["--n_kv_head=0"], "n_kv_head=0"),
        (["--n_layer=0"], "n_layer=0 must be above 0"),
        (["--t_std=0"], "t_std=0.0 must be above 0"),
        (["--dtype=int8"], "dtype='int8'"),
        (["--grad_clip=1e999"], "grad_clip=inf must be finite"),
        (
            ["--max_iters=10000000000000000"],
            "max_iters=10000000000000000 must be finite, and at most",
        ),
        (["--num_epochs=1e300"], "num_epochs=1e+300 must be finite, and at most"),
        (["--ffn_dim_multiplier=1e12"], "ffn_dim_multiplier=1000000000000.0 must be finite, and"),
        (["--device=tpu"], "device='tpu'"),
    ],
)
def test_bad_input(dataset, tmp_path, args, words):
    out = tmp_path / "out"
    args = [*TINY, f"--data_dir={dataset}", f"--out_dir={out}", *args]
    assert words in refused("train.py", *args)
    assert not out.exists()


ORACLE = """
import json, runpy, sys
sys.path.insert(0, {root!r})
import numpy as np, torch
run = runpy.run_path({root!r} + "/train.py", run_name="__main__")


class Oracle(torch.nn.Module):
    # knows the data, and so the velocity x_1 - x_0 from x_t and t: no loss, and true samples
    def context(self, cond):
        return cond

    def forward(self, x_t, t, cond=None, drop=None, context=None):
        cond = cond if context is None else context
        x_1 = torch.stack([truth[tuple(c.flatten()[:3].tolist())] for c in cond])
        return (x_1 - x_t) / (1 - t.view(-1, 1, 1))


target, cond = run["encode"](*run["loader"].read("val", np.arange(10)))
truth = {{tuple(c.flatten()[:3].tolist()): x for x, c in zip(target, cond)}}
settings = run["evaluate"].__globals__
settings.update(ema_model=Oracle(), evaluated={{"val_loss": Oracle()}})
oracle = run["evaluate"]()
settings.update(eval_samples=0, evaluated={{"val_loss": lambda x, t, *rest: torch.zeros_like(x)}})
silent = run["evaluate"]()
print("RESULT " + json.dumps([oracle, silent, run["eval_t"].tolist()]))
"""


def test_evaluation_of_an_oracle_and_of_silence(dataset, tmp_path):
    """A model that knows has no loss and perfect samples. The loss of one that predicts nothing is
    the variance of the velocity, of which the bins of t are parts. The size of batches changes
    nothing."""
    probe = tmp_path / "probe.py"
    probe.write_text(ORACLE.format(root=str(ROOT)))
    results = []
    for size in (3, 64):
        flags = ["--max_iters=1", f"--eval_batch_size={size}", "--eval_size=10", "--eval_samples=7"]
        out = f"--out_dir={tmp_path / str(size)}"
        done = run(probe, *TINY, f"--data_dir={dataset}", out, *flags)
        results.append(json.loads(done.stdout.split("RESULT ")[1]))
    oracle, silent, t = results[0]
    assert oracle["val_loss"] < 1e-8
    assert oracle["val_frechet"] < 1e-3
    assert oracle["val_token_cosine"] > 0.9999
    assert 1.5 < silent["val_loss"] < 2.5
    by_bin = [silent[f"val_loss_t{i}"] for i in range(4)]
    counts = np.bincount((np.array(t) * 4).astype(int))
    assert np.average(by_bin, weights=counts) == pytest.approx(silent["val_loss"], rel=1e-5)
    for a, b in zip(results[0], results[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_run_is_replayed_from_its_config(dataset, tmp_path, trained):
    """config.py repeats a run elsewhere and goes on with it, by itself or by its folder; flags
    win."""
    again = run("train.py", trained / "config.py", f"--out_dir={tmp_path / 'again'}")
    assert "done: 6 iterations" in again.stdout
    assert measured(tmp_path / "again") == measured(trained)
    out = shutil.copytree(trained, tmp_path / "out")
    run("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=7")
    more = ["--init_from=resume", f"--out_dir={out}", "--max_iters=8", "--weight_decay=0.5"]
    done = run("train.py", trained / "config.py", *more)
    assert "changed since the checkpoint: weight_decay 0.05 -> 0.5" in done.stdout
    config = checkpoint(out)["config"]
    assert (config["max_iters"], config["weight_decay"], config["dim"]) == (8, 0.5, 32)
    assert [line["iter"] for line in log(out)] == list(range(9))


def test_resume_takes_the_settings_asked_for(dataset, tmp_path, trained):
    """Optimizer settings change with the flags, another dtype is no obstacle, a torn log line is
    dropped."""
    out = shutil.copytree(trained, tmp_path / "out")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"iter": 5, "lo')
    flags = ["--max_iters=8", "--weight_decay=0.5", "--beta1=0.5", "--dtype=float16"]
    train(dataset, out, "--init_from=auto", *flags)
    groups = checkpoint(out)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all(tuple(group["betas"]) == (0.5, 0.95) for group in groups)
    assert [line["iter"] for line in log(out)] == list(range(9))


def test_bad_checkpoints_are_refused(dataset, tmp_path, trained):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ckpt_last.pt").write_bytes((trained / "ckpt_last.pt").read_bytes())
    args = ["train.py", *TINY, f"--data_dir={dataset}", f"--out_dir={out}", "--init_from=resume"]
    assert "was trained with n_layer=2, not 3" in refused(*args, "--n_layer=3")
    assert "was trained with prediction=v, not x" in refused(*args, "--prediction=x")
    torch.save({"a": 1}, out / "ckpt_last.pt")
    assert "is no checkpoint of train.py" in refused(*args)
    torch.save(torch.zeros(3), out / "ckpt_last.pt")
    assert "is no checkpoint of train.py" in refused(*args)
    (out / "ckpt_last.pt").write_bytes((trained / "ckpt_last.pt").read_bytes()[:5000])
    assert "cannot be read as a checkpoint" in refused(*args)
