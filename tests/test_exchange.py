"""Models of others, and exchange with them: plumbing/exchange.py, and model.py beside diffusers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flow
from conftest import TINY, checkpoint, log, make_pickle, refused, run, same
from model import NextDiT, NextDiTConfig
from plumbing import exchange
from plumbing.checkpoint import load_weights

SMALL = dict(grid=(2, 3), target_dim=5, cond_dim=7, dim=32, n_layer=2, n_head=4, multiple_of=8)
OURS = dict(conditioning="aligned", conv=True, prior=True, rope="grid")


def configuration(**changes):
    return NextDiTConfig(**SMALL | changes)


def inputs(T=6, B=3, S=6):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, T, 5, generator=g),
        torch.rand(B, generator=g),
        torch.randn(B, S, 7, generator=g),
    )


def reference(folder, config, shards=False, random=True):
    """diffusers' model of these sizes, every parameter random or as it starts, saved to folder.

    With cond_projection it is the one that BLIP3-o trains, from the same parts: the model of
    diffusers, and a PixArtAlphaTextProjection before it."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import PixArtAlphaTextProjection

    torch.manual_seed(0)
    model = LuminaNextDiT2DModel(
        sample_size=config.grid[0], patch_size=1, in_channels=config.target_dim,
        hidden_size=config.dim, num_layers=config.n_layer, num_attention_heads=config.n_head,
        num_kv_heads=config.n_kv_head, multiple_of=config.ffn_dim, ffn_dim_multiplier=0.1,
        norm_eps=config.norm_eps, learn_sigma=False, qk_norm=config.qk_norm,
        cross_attention_dim=config.cond_width,
    )  # fmt: skip
    if config.cond_projection:
        model.caption_projection = PixArtAlphaTextProjection(config.cond_dim, config.dim)
    torch.nn.init.zeros_(model.pad_token)
    for name, p in model.named_parameters() if random else ():
        torch.nn.init.normal_(
            p,
            1 if "norm" in name and p.ndim == 1 else 0,
            0.3 if p.ndim == 1 else p.shape[-1] ** -0.5,
        )
    model.grid = config.grid
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "10GB")
    return model


def read_model(folder, grid=None, prefix="", cast=lambda p: p):
    """The model in a folder, built without parameters before those of the files."""
    ckpt, parameters = exchange.open_model(folder, grid=grid, prefix=prefix)
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(**ckpt["model_args"]))
    load_weights(model, parameters, cast)
    return model


def ask(model, x, t, cond, sign=-1):
    """The reference at our time and in our shapes: x (B, T, D), t 0 at noise."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    if hasattr(model, "caption_projection"):
        cond = model.caption_projection(cond)
    H, W = model.grid
    rope = get_2d_rotary_pos_embed_lumina(model.head_dim, H, W)
    mask = torch.ones(cond.shape[:2])
    image = x.transpose(1, 2).unflatten(2, (H, W))
    out = model(image, 1000 * (1 - t), cond, mask, rope, cross_attention_kwargs={}).sample
    return sign * out.flatten(2).transpose(1, 2)


SIZES = {
    "narrow": dict(dim=48, n_head=4),
    "wide": dict(dim=1056, n_head=4, n_layer=1),
    "12 heads": dict(dim=96, n_head=12),
    "28 heads": dict(dim=112, n_head=28, n_kv_head=7),
    "grouped queries": dict(n_kv_head=2),
    "no qk_norm": dict(qk_norm=False),
    "ffn": dict(ffn_dim_multiplier=1.3, multiple_of=32),
    "4x4": dict(grid=(4, 4)),
    "8x8": dict(grid=(8, 8)),
    "16x16": dict(grid=(16, 16), n_layer=1),
    "eps": dict(norm_eps=1e-3),
    "projection": dict(cond_projection=True),
    "projection, 4 dim": dict(cond_projection=True, ffn_dim=4 * 32, n_kv_head=2),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_reference(tmp_path, name, dtype, tolerance):
    """Output and the gradients of parameters and inputs are those of diffusers'
    LuminaNextDiT2DModel or, with a projection, of BLIP3-o's."""
    from diffusers.models.normalization import RMSNorm

    config = configuration(**SIZES[name])
    theirs = reference(tmp_path, config).to(dtype)
    for norm in theirs.modules():
        if isinstance(norm, RMSNorm) and dtype == torch.float64:  # it takes variances in float32
            shape = (norm.dim, norm.weight, norm.eps)
            norm.forward = lambda x, shape=shape: torch.nn.functional.rms_norm(x, *shape)
    ours = read_model(tmp_path, config.grid).to(dtype)
    T = config.grid[0] * config.grid[1]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, T, 5, generator=g, dtype=dtype)
    cond = torch.randn(3, T + 3, 7, generator=g, dtype=dtype)
    weight = torch.randn(3, T, 5, generator=g, dtype=dtype)
    t = torch.tensor([0.0, 0.37, 1.0], dtype=dtype)
    results = []
    for model in (lambda *args: ask(theirs, *args), ours):
        args = [v.clone().requires_grad_() for v in (x, cond)]
        out = model(args[0], t, args[1])
        (out * weight).sum().backward()
        results.append([out.detach(), *(v.grad for v in args)])
    expected, got = results
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert their_grads.pop("pad_token") is None
    stacks = exchange.stack_names(their_grads)
    for n, p in ours.named_parameters():
        if n != "null_cond":
            stacked = torch.cat([their_grads.pop(part) for part in stacks[n]])
            expected.append(-stacked if n.startswith("final.") else stacked)
            got.append(p.grad)
    assert not their_grads and ours.null_cond.grad is None
    # a bias of all keys changes nothing: its gradient is only rounding
    floor = 1e-2 * max(v.norm() for v in expected)
    for a, b in zip(expected, got):
        assert (b - a).norm() <= tolerance * max(a.norm(), floor)


def test_samples_as_blip3o_does(tmp_path):
    """Its scheduler, 30 steps, guidance 3 with a zero condition, against our Euler steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = configuration(cond_projection=True)
    theirs = reference(tmp_path, config).double()
    ours = read_model(tmp_path, config.grid).double()
    noise, _, cond = (v.double() for v in inputs())
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(30, sigmas=[1 - i / 30 for i in range(30)])
    with torch.no_grad():
        x = noise
        for timestep in scheduler.timesteps:
            t = (1 - timestep.double() / 1000).expand(3)
            null, given = (ask(theirs, x, t, c, sign=1) for c in (0 * cond, cond))
            x = scheduler.step(null + 3 * (given - null), timestep, x).prev_sample.double()
        velocity = flow.guided_velocity(ours, cond, flow.FlowConfig(cond_dropout=0.1), guidance=3.0)
        mine = flow.integrate(velocity, noise, 30, "euler")
    assert (mine - x).norm() < 1e-5 * x.norm() and (mine - noise).norm() > 0.1 * noise.norm()


def facts(config, **changes):
    """What a checkpoint says of a model that was trained on normalized data."""
    widths = dict(cond_mean=7, cond_std=7, target_mean=5, target_std=5)
    stats = {name: torch.rand(n) for name, n in widths.items()}
    ckpt = dict(model_args=dataclasses.asdict(config), flow=dataclasses.asdict(flow.FlowConfig()))
    ckpt |= dict(normalize="channel", stats=stats, cond_tokens=6, code="abc")
    return ckpt | changes


def write_model(folder, **changes):
    """A model whose every parameter, gates included, is random, and its files."""
    torch.manual_seed(0)
    model = NextDiT(configuration(**changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    ckpt = facts(model.config)
    exchange.save_model(folder, ckpt, model.state_dict())
    return model, ckpt


@pytest.mark.parametrize("cond_projection", [False, True])
def test_diffusers_and_we_read_each_other(tmp_path, cond_projection):
    """The sizes come from the weights, of any width; from_pretrained reads what we write."""
    from diffusers import LuminaNextDiT2DModel

    config = configuration(grid=(2, 2), n_kv_head=2, ffn_dim=40, cond_projection=cond_projection)
    theirs = reference(tmp_path / "a", config, shards=True)
    x, t, cond = inputs(T=4)
    expected = ask(theirs, x, t, cond)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    ours = read_model(tmp_path / "a")
    assert dataclasses.replace(ours.config, multiple_of=8) == config
    assert torch.allclose(ours(x, t, cond), expected, atol=1e-5)
    ckpt = facts(ours.config)
    exchange.save_model(tmp_path / "b", ckpt, ours.state_dict())
    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    if cond_projection:  # what the class of BLIP3-o adds to that of diffusers
        again = reference(tmp_path / "c", config)
        del again.pad_token
        again.load_state_dict(load_file(file))
        again.pad_token = None
    else:
        again = LuminaNextDiT2DModel.from_pretrained(tmp_path / "b")
    again.grid = config.grid
    assert torch.equal(ask(again, x, t, cond), expected)
    given = json.loads((tmp_path / "b" / "config.json").read_text())
    for base in (int(8 * 32 / 3), 4 * 32):  # of diffusers' width, now and in older versions
        hidden = int(given["ffn_dim_multiplier"] * base)
        assert -(-hidden // given["multiple_of"]) * given["multiple_of"] == 40
    assert given["cross_attention_dim"] == 7


@pytest.mark.parametrize("changes", [{}, dict(cond_projection=True), OURS])
def test_what_we_write_we_read(tmp_path, changes):
    """Weights, null condition, statistics and settings, in diffusers' layout and in ours."""
    model, ckpt = write_model(tmp_path, **changes)
    found, parameters = exchange.open_model(tmp_path)
    parameters = dict(parameters)
    assert parameters.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name]), name
    for name, value in ckpt["stats"].items():
        assert torch.equal(value, found["stats"][name])
    for name in ("flow", "normalize", "cond_tokens", "code"):
        assert found[name] == ckpt[name]
    assert NextDiTConfig(**found["model_args"]) == model.config
    in_ours = changes is OURS
    assert (tmp_path / "model.safetensors").exists() == in_ours
    moved = read_model(tmp_path, cast=lambda p: p.to("meta", torch.float16))
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", torch.float16)}
    with pytest.raises(ValueError, match="is not empty"):
        exchange.save_model(tmp_path, ckpt, model.state_dict())


def test_a_model_within_a_larger_one(tmp_path):
    """BLIP3-o's prefixes are found, or chosen; parameters without it are left out."""
    config = configuration(grid=(8, 8), cond_projection=True)
    theirs = reference(tmp_path / "a", config)
    expected = ask(theirs, *inputs(T=64))
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    plain = load_file(file)
    for prefix in ("model.", "dit.model.", "model.dit.model."):
        prefixed = {prefix + name: value for name, value in plain.items()}
        save_file(prefixed, file)
        assert torch.allclose(read_model(tmp_path / "a")(*inputs(T=64)), expected, atol=1e-5)
    other = {"ema." + name: torch.zeros(2) for name in plain}
    save_file(prefixed | other | {"lm_head.weight": torch.zeros(3)}, file)
    (tmp_path / "a" / "config.json").write_text('{"model_type": "qwen"}')  # of the larger model
    whole = ["-m", "plumbing.exchange", tmp_path / "a", f"--out={tmp_path / 'b'}"]
    assert "2 parameters, not one, end in patch_embedder.proj.weight: see --prefix" in refused(
        *whole
    )
    run(*whole, "--prefix=model.dit.model.")
    assert torch.allclose(read_model(tmp_path / "b")(*inputs(T=64)), expected, atol=1e-5)
    save_file(prefixed | {"lm_head.weight": torch.zeros(3)}, file)
    assert torch.allclose(read_model(tmp_path / "a")(*inputs(T=64)), expected, atol=1e-5)


def test_files_that_are_no_model(tmp_path):
    reference(tmp_path, configuration(grid=(2, 2)))
    file, given = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    plain = load_file(file)

    def refuse(words, parameters):
        save_file(parameters, file)
        with pytest.raises(ValueError, match=words) as error:
            read_model(tmp_path)
        assert "\n" not in str(error.value)

    name = "layers.1.norm2.weight"
    fewer = {key: value for key, value in plain.items() if key != name}
    refuse("Missing key.*layers.1.norm2.weight", fewer)
    refuse("1 surplus parameters, such as extra", plain | {"extra": torch.zeros(1)})
    refuse("size mismatch for layers.1.norm2.weight", plain | {name: torch.zeros(9)})
    refuse("0 parameters, not one, end in patch_embedder.proj.weight", {"a": torch.zeros(1)})
    refuse(
        "50 surplus parameters", {key: value for key, value in plain.items() if "gate" not in key}
    )
    for kind in (torch.int8, torch.bool, torch.float8_e4m3fn):
        odd = plain | {name: plain[name].to(kind)}
        refuse(f"{name}: torch.strided, {kind}, not a dense tensor of floats", odd)
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="header"):
        read_model(tmp_path)
    ours = tmp_path / "ours"
    write_model(ours, **OURS)
    text = (ours / "config.json").read_text()
    for name in ("model_args", "flow", "normalize", "stats"):
        (ours / "config.json").write_text(text.replace(f'"{name}"', '"other"'))
        with pytest.raises(ValueError, match="no safetensors model"):
            read_model(ours)
    given.write_text("{")
    with pytest.raises(ValueError, match="Expecting property name"):
        read_model(tmp_path)
    given.unlink()
    with pytest.raises(ValueError, match="config.json"):
        read_model(tmp_path)
    with pytest.raises(ValueError, match="there is no .*nowhere: no run, checkpoint"):
        read_model(tmp_path / "nowhere")


def test_initialization_is_the_references(tmp_path):
    """Every parameter has the spread and the bounds of diffusers' own: uniform, one or zero."""
    sizes = dict(dim=128, target_dim=96, cond_dim=160, grid=(2, 2), n_kv_head=2)
    config = configuration(**sizes, cond_projection=True)
    reference(tmp_path, config, random=False)
    theirs, ours = read_model(tmp_path).state_dict(), NextDiT(config).state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        expected, noise = (
            theirs[name],
            4 / value.numel() ** 0.5,
        )  # of an estimated standard deviation, at 6 sigma or so
        if expected.std() == 0:
            assert torch.equal(value, expected), name
        else:
            assert abs(value.std() / expected.std() - 1) < noise and not torch.equal(
                value, expected
            ), name
            assert abs(value.abs().max() / expected.abs().max() - 1) < noise, name


def test_blip3o_has_the_parameters_of_the_paper():
    """1.4 billion in the DiT, between the hidden states of Qwen2.5-VL-7B and EVA-CLIP's tokens."""
    sizes = dict(grid=(8, 8), target_dim=1792, cond_dim=3584, cond_projection=True)
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(**sizes))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 1.4


SIZES_OF_TINY = ("--dim", "--n_layer", "--n_head", "--multiple_of")
REST = [flag for flag in TINY if flag.split("=")[0] not in SIZES_OF_TINY]
STILL = ["--learning_rate=0", "--max_iters=2"]


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """A dataset of the same shape as `dataset`, but its targets are moved by 10."""
    folder = tmp_path_factory.mktemp("other")
    content = make_pickle(folder / "a.pkl", n=24, seed=5)
    moved = content["clip_blip3o_embeddings"] + 10
    make_pickle(folder / "a.pkl", n=24, seed=5, clip_blip3o_embeddings=moved)
    run("prepare.py", folder / "a.pkl", f"--out={folder / 'data'}")
    return folder / "data"


def fine_tune(data, out, path, *flags):
    """Start from a model, with no word on its sizes."""
    args = [*REST, f"--data_dir={data}", f"--out_dir={out}", f"--init_from={path}", *flags]
    return run("train.py", *args)


def test_starts_from_ones_own_weights(trained, dataset, other_data, tmp_path):
    """The averaged weights, sizes, flow and normalization are the checkpoint's, all else is new."""
    out = tmp_path / "out"
    done = fine_tune(other_data, out, trained, *STILL)
    old, new = checkpoint(trained, "ckpt_best.pt"), checkpoint(out)
    assert same(new["model"], old["ema"]) and not same(old["ema"], old["model"])
    for name in ("model_args", "flow", "normalize", "stats"):
        assert same(new[name], old[name]), name
    with np.load(other_data / "stats.npz") as stats:
        assert np.allclose(new["data_stats"]["target_mean"], stats["target_mean"])
        moved = (stats["target_mean"] - old["stats"]["target_mean"].numpy()) ** 2
        moved += (stats["target_std"] - old["stats"]["target_std"].numpy()) ** 2
    distance = (moved.sum() / (old["stats"]["target_std"] ** 2).sum().item()) ** 0.5
    assert 2 < distance < 8
    warning = f"WARNING: target is {distance:.2f} standard deviations from that of {trained}"
    assert warning in done.stdout and "WARNING: cond" not in done.stdout
    assert "--dim=32 --n_layer=2" in done.stdout
    assert [line["iter"] for line in log(out)] == [0, 1, 2]
    steps = {int(state["step"]) for state in new["optimizer"]["state"].values()}
    assert steps == {2} and new["config"]["init_from"] == str(trained)
    # it goes on as any other run, with the statistics that it began with
    done = run("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=3")
    assert "WARNING" not in done.stdout
    assert same(checkpoint(out)["stats"], old["stats"])
    words = refused("train.py", f"--out_dir={out}", "--init_from=resume", f"--data_dir={dataset}")
    assert "was trained on other data" in words
    # a file, and the raw weights
    raw = tmp_path / "raw"
    fine_tune(dataset, raw, trained / "ckpt_last.pt", *STILL, "--init_weights=model")
    assert same(checkpoint(raw)["model"], checkpoint(trained)["model"])


def test_what_a_fine_tuning_cannot_change(trained, dataset, tmp_path):
    args = [*REST, f"--data_dir={dataset}", f"--out_dir={tmp_path / 'out'}"]
    args += [f"--init_from={trained}"]
    for flag, words in (
        ("--dim=64", "was trained with dim=32, not 64"),
        ("--normalize=none", "was trained with normalize=channel, not none"),
        ("--prediction=x", "was trained with prediction=v, not x"),
        ("--init_weights=best", "has no weights 'best'; they are ema and model"),
    ):
        assert words in refused("train.py", *args, flag)
    run("train.py", *args, *STILL, "--t_shift=3")  # how it is trained from now on is free
    assert checkpoint(tmp_path / "out")["flow"]["t_shift"] == 3
    make_pickle(tmp_path / "wide.pkl", C=7)
    run("prepare.py", tmp_path / "wide.pkl", f"--out={tmp_path / 'wide'}")
    words = refused("train.py", *args, f"--data_dir={tmp_path / 'wide'}")
    assert "was trained with cond_dim=6, not 7" in words


def test_a_run_as_safetensors(trained, dataset, tmp_path):
    """sample.py and --init_from take what the exchange writes for the run itself."""
    folder, samples = tmp_path / "folder", tmp_path / "samples.npy"
    run("-m", "plumbing.exchange", trained, f"--out={folder}")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    args = ["--steps=2", "--draws=1", f"--data_dir={dataset}", f"--save={samples}"]
    made = []
    for path in (trained, folder):
        run("sample.py", f"--out_dir={path}", *args)
        made.append((samples.read_bytes(), (tmp_path / "samples_metrics.json").read_bytes()))
    assert made[0] == made[1]
    fine_tune(dataset, tmp_path / "out", folder, *STILL)
    assert same(checkpoint(tmp_path / "out")["model"], checkpoint(trained, "ckpt_best.pt")["ema"])
    for path in (folder, trained):  # of which the new run has maps: it must not write into them
        files = [file for file in path.iterdir() if file.is_file()]
        before = [file.read_bytes() for file in files]
        fine_tune(dataset, tmp_path / "moved", path, "--overwrite=True")
        assert not same(
            checkpoint(tmp_path / "moved")["model"], checkpoint(tmp_path / "out")["model"]
        )
        assert [file.read_bytes() for file in files] == before
    assert same(checkpoint(tmp_path / "out")["stats"], checkpoint(trained)["stats"])
    assert "add --cond=FILE.npy" in refused("sample.py", f"--out_dir={folder}")
    run("-m", "plumbing.exchange", trained, f"--out={tmp_path / 'raw'}", "--weights=model")
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    assert same(raw, checkpoint(trained, "ckpt_best.pt")["model"])


def test_fine_tunes_a_model_of_blip3o(dataset, tmp_path):
    """Its recipe leaves the null condition zero. sample.py takes the folder as well as the run."""
    sizes = dict(grid=(2, 2), cond_dim=6, dim=48, n_head=2, n_kv_head=1, norm_eps=1e-6)
    folder, out = tmp_path / "blip3o", tmp_path / "out"
    theirs = reference(folder, configuration(**sizes, cond_projection=True))
    fine_tune(dataset, out, folder, "config/train_blip3o.py", *STILL, "--weight_decay=0")
    ckpt = checkpoint(out)
    assert ckpt["model_args"].items() >= sizes.items()
    assert ckpt["normalize"] == "none" and ckpt["flow"]["t_shift"] == 1
    assert same(ckpt["model"], read_model(folder).state_dict())
    args = ["--steps=2", "--draws=1", f"--data_dir={dataset}", "--guidance=2"]
    run("sample.py", f"--out_dir={folder}", *args)
    run("sample.py", f"--out_dir={out}", "--checkpoint=ckpt_last.pt", *args)
    a, b = (np.load(path / "generated.npy") for path in (folder, out))
    assert np.array_equal(a, b)
    # by hand: two steps of Euler and of ab2 with the reference, from the same noise
    cond = torch.from_numpy(np.load(dataset / "val_cond.npy"))
    x = flow.sample_noise(range(len(cond)), (4, 5), seed=0)

    def v(x, t):
        null, given = (ask(theirs, x, torch.full((len(x),), t), c) for c in (0 * cond, cond))
        return null + 2 * (given - null)

    with torch.no_grad():
        v_0 = v(x, 0.0)
        v_1 = v(x + v_0 / 2, 0.5)
        x = x + v_0 / 2 + (1.5 * v_1 - 0.5 * v_0) / 2
    assert (torch.from_numpy(a) - x).norm() < 1e-4 * x.norm()
    run(
        "train.py",
        f"--out_dir={out}",
        "--init_from=resume",
        "--max_iters=4",
        "--learning_rate=1e-3",
    )
    trained = checkpoint(out)["model"]
    assert (trained["null_cond"] == 0).all() and not same(trained, ckpt["model"])
    reference(tmp_path / "few", configuration(grid=(2, 2), target_dim=3, cond_dim=6))
    few = refused("sample.py", f"--out_dir={tmp_path / 'few'}", f"--data_dir={dataset}")
    assert "has targets of shape (4, 5); the model makes (4, 3)" in few
