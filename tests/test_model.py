import dataclasses
import math

import pytest
import torch

import flow
from model import NextDiT, NextDiTConfig, attend, flops_per_sample, rope_2d, rotate
from plumbing import exchange

CONFIG = NextDiTConfig(
    grid=(2, 3), target_dim=5, cond_dim=7, dim=32, n_layer=2, n_head=4, multiple_of=8
)


def build(seed=0, **changes):
    """A model whose every parameter, gates included, is random."""
    torch.manual_seed(seed)
    model = NextDiT(dataclasses.replace(CONFIG, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


OURS = dict(conditioning="aligned", conv=True, prior=True, rope="grid")


def inputs(B=3, S=6):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 6, 5, generator=g),
        torch.rand(B, generator=g),
        torch.randn(B, S, 7, generator=g),
    )


def reference(folder, config, shards=False, random=True):
    """diffusers' model of these sizes, every parameter random or as it starts, saved to folder."""
    from diffusers import LuminaNextDiT2DModel

    torch.manual_seed(0)
    model = LuminaNextDiT2DModel(
        sample_size=config.grid[0], patch_size=1, in_channels=config.target_dim,
        hidden_size=config.dim, num_layers=config.n_layer, num_attention_heads=config.n_head,
        num_kv_heads=config.n_kv_head, multiple_of=config.multiple_of,
        ffn_dim_multiplier=config.ffn_dim_multiplier, norm_eps=config.norm_eps, learn_sigma=False,
        qk_norm=config.qk_norm, cross_attention_dim=config.cond_dim,
    )  # fmt: skip
    torch.nn.init.zeros_(model.pad_token)
    for name, p in model.named_parameters() if random else ():
        torch.nn.init.normal_(
            p,
            1 if "norm" in name and p.ndim == 1 else 0,
            0.3 if p.ndim == 1 else p.shape[-1] ** -0.5,
        )
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "10GB")
    return model


def from_diffusers(folder, *args):
    """The model in a folder, built without parameters before those of the files."""
    sizes, state = exchange.from_diffusers(folder, *args)
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(**sizes))
    model.load_state_dict(state, assign=True)
    return model


def ask(model, x, t, cond, sign=-1):
    """The reference at our time and in our shapes: x (B, T, D), t 0 at noise."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

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
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_reference(tmp_path, name, dtype, tolerance):
    """Output and the gradients of parameters and inputs are diffusers' LuminaNextDiT2DModel's."""
    from diffusers.models.normalization import RMSNorm

    config = dataclasses.replace(CONFIG, **{"grid": (2, 3), **SIZES[name]})
    theirs = reference(tmp_path, config).to(dtype)
    for norm in theirs.modules():
        if isinstance(norm, RMSNorm) and dtype == torch.float64:  # it takes variances in float32
            shape = (norm.dim, norm.weight, norm.eps)
            norm.forward = lambda x, shape=shape: torch.nn.functional.rms_norm(x, *shape)
    theirs.grid = config.grid
    ours = from_diffusers(tmp_path, config.grid).to(dtype)
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
    stacks = exchange.reference_parameters(vars(config))
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

    config = dataclasses.replace(CONFIG, grid=(2, 3))
    theirs = reference(tmp_path, config).double()
    theirs.grid = config.grid
    ours = from_diffusers(tmp_path, config.grid).double()
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


def test_exchange_with_diffusers(tmp_path):
    """Shards, BLIP3-o's prefixes, from_pretrained of what we write, and errors with the names."""
    from diffusers import LuminaNextDiT2DModel
    from safetensors.torch import load_file, save_file

    config = dataclasses.replace(CONFIG, grid=(2, 2), n_kv_head=2)
    theirs = reference(tmp_path / "a", config, shards=True)
    theirs.grid = config.grid
    x, t, cond = inputs()
    x = x[:, :4]
    expected = ask(theirs, x, t, cond)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    ours = from_diffusers(tmp_path / "a")
    assert ours.config == config and torch.allclose(ours(x, t, cond), expected, atol=1e-5)
    exchange.to_diffusers(ours, tmp_path / "b")
    again = LuminaNextDiT2DModel.from_pretrained(tmp_path / "b")
    again.grid = config.grid
    assert torch.equal(ask(again, x, t, cond), expected)
    back = from_diffusers(tmp_path / "b").state_dict()
    assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())

    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    plain = load_file(file)
    for prefix in ("model.", "dit.model.", "model.dit.model."):
        save_file({prefix + name: value for name, value in plain.items()}, file)
        assert torch.equal(from_diffusers(tmp_path / "b")(x, t, cond), ours(x, t, cond))
    del plain["layers.1.norm2.weight"]
    save_file(plain | {"extra": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"missing parameters \['layers.1.norm2.weight'\], surplus \['extra'\]"
    ):
        from_diffusers(tmp_path / "b")
    save_file(plain | {"layers.1.norm2.weight": torch.zeros(9)}, file)
    with pytest.raises(ValueError, match="size mismatch for layers.1.norm2.weight"):
        from_diffusers(tmp_path / "b")
    given = tmp_path / "b" / "config.json"
    config_text = given.read_text()
    given.write_text(config_text.replace('"in_channels": 5', '"in_channels": 6'))
    with pytest.raises(ValueError, match=r"proj.weight: \[32, 5\], but \[32, 6\] by config.json"):
        from_diffusers(tmp_path / "b")
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="header"):
        from_diffusers(tmp_path / "b")
    with pytest.raises(ValueError, match="diffusers has no NextDiT of conv=True"):
        exchange.to_diffusers(build(conv=True), "nowhere")
    for change, words in (
        (("patch_size", "patch"), "not a LuminaNextDiT2DModel's, without patch_size"),
        (('"patch_size": 1', '"patch_size": 2'), "patch_size 1"),
        (('"num_layers": 2', '"num_layers": null'), "n_layer=None"),
        (('"sample_size": 2', '"sample_size": null'), "grid=None"),
        (('"norm_eps": 1e-05', '"norm_eps": "small"'), "norm_eps"),
    ):
        given.write_text(config_text.replace(*change))
        with pytest.raises(ValueError, match=words):
            from_diffusers(tmp_path / "b")
    with pytest.raises(ValueError, match="no folder of a diffusers model"):
        from_diffusers(tmp_path / "c")
    with pytest.raises(ValueError, match="holds another model: diffusion_pytorch_model-00001-of"):
        exchange.to_diffusers(ours, tmp_path / "a")
    wide = build(grid=(2, 3))
    exchange.to_diffusers(wide, tmp_path / "wide")
    assert from_diffusers(tmp_path / "wide").config == wide.config
    moved = from_diffusers(tmp_path / "wide", None, lambda p: p.to("meta", torch.float16))
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", torch.float16)}


def test_initialization_is_the_references(tmp_path):
    """Every parameter has the spread and the bounds of diffusers' own: uniform, one or zero."""
    config = dataclasses.replace(
        CONFIG, dim=128, target_dim=96, cond_dim=160, grid=(2, 2), n_kv_head=2
    )
    reference(tmp_path, config, random=False)
    theirs, ours = from_diffusers(tmp_path).state_dict(), NextDiT(config).state_dict()
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


@pytest.mark.parametrize("changes", [{}, OURS])
def test_every_parameter_is_initialized(changes):
    """init_weights sets every parameter, and to zero what must start silent."""
    model = NextDiT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    silent = [model.null_cond]
    if model.prior is not None:
        silent += model.final.parameters()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if name.endswith(("conv.weight", "gate")):
            silent.append(p)
        elif p.dim() == 2 and p is not model.final.weight:
            assert p.std() > 0.5 * p.shape[1] ** -0.5, name
    assert all((p == 0).all() for p in silent) and len(silent) >= 3


def test_paper_size_has_the_reference_number_of_parameters():
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280))
    # diffusers' model of this size has 1,307,125,920, of which pad_token (1792) is unused;
    # ours adds null_cond (1280)
    assert sum(p.numel() for p in model.parameters()) == 1_307_125_920 - 1792 + 1280


def test_rope_turns_by_relative_position():
    rope = rope_2d(dataclasses.replace(CONFIG, grid=(3, 4)), "cpu")
    q, k = torch.randn(2, 8)  # of head_dim
    turned_q, turned_k = (rotate(v.expand(1, 12, 8), rope)[0] for v in (q, k))
    scores = turned_q @ turned_k.T  # (12, 12) over positions (row, column)
    assert torch.allclose(
        scores[0, 5], scores[6, 11], atol=1e-5
    )  # both one row and one column apart
    assert not torch.allclose(scores[0, 1], scores[0, 4], atol=1e-3)  # a column is not a row


def test_attention_is_sdpa():
    """The products that a CPU computes are torch's attention, which other devices get."""
    q = torch.randn(2, 5, 6 * 8, requires_grad=True)
    k, v = (torch.randn(2, 7, 6 * 8, requires_grad=True) for _ in range(2))
    heads = [x.unflatten(-1, (6, 8)).transpose(1, 2) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    plain = attend(q, k, v, head_dim=8)
    assert plain.shape == (2, 5, 6, 8) and torch.allclose(plain, sdpa, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (plain, sdpa)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-5)
    assert attend(*(x.to("meta") for x in (q, k, v)), head_dim=8).shape == (2, 5, 6, 8)


def gaussian_tokens(n=4000, D=5):
    """Tokens (n, D) of the given mean and covariance, exactly."""
    g = torch.Generator().manual_seed(2)
    x, mix, mean = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, D), (D, D), (D,))
    )
    x -= x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n).T)
    return x @ mix + mean, mean, mix.T @ mix


def test_the_prior_is_the_best_linear_denoiser():
    """A new model's velocity is E[v | x_t] of Gaussian tokens; its flow yields their covariance."""
    tokens, mean, covariance = gaussian_tokens()
    torch.manual_seed(0)
    model = NextDiT(dataclasses.replace(CONFIG, **OURS)).double()
    model.prior.fit(tokens)
    x, _, cond = (v.double() for v in inputs())
    for t in (0.0, 0.3, 0.9, 1.0):
        gain = (t * covariance - (1 - t) * torch.eye(5)) @ torch.linalg.inv(
            t**2 * covariance + (1 - t) ** 2 * torch.eye(5)
        )
        expected = mean + (x - t * mean) @ gain.T
        assert torch.allclose(model(x, torch.full((3,), t), cond), expected, atol=1e-5)
    noise = torch.randn(2000, 6, 5, dtype=torch.float64)
    velocity = flow.guided_velocity(model, cond[:1].expand(2000, 6, 7), flow.FlowConfig())
    made = flow.integrate(velocity, noise, 20).flatten(0, 1)
    assert (made.T.cov() - covariance).norm() < 0.05 * covariance.norm() and (
        made.mean(0) - mean
    ).norm() < 0.1


def test_the_prior_starts_at_its_known_loss():
    """The velocity's mean squared error for variances s^2, over uniform t, is pi / 2 mean(s)."""
    tokens, mean, covariance = gaussian_tokens(24000)
    model = NextDiT(dataclasses.replace(CONFIG, **OURS))
    model.prior.fit(tokens.float())
    x_1, cond = tokens.float().view(-1, 6, 5), torch.zeros(4000, 6, 7)
    g, config = torch.Generator().manual_seed(0), flow.FlowConfig(cond_dropout=0)
    with torch.no_grad():
        losses, _ = flow.loss(
            model, x_1, cond, config, generator=g, t=(torch.arange(4000) + 0.5) / 4000
        )
    expected = math.pi / 2 * torch.linalg.eigvalsh(covariance).sqrt().mean()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_aligned_conditions():
    """A condition token belongs to the token at its place; one stands for all; else an error."""
    model = build(**OURS)
    for block in model.layers:  # without attention and convolution tokens do not see each other
        torch.nn.init.zeros_(block.attn.out.weight)
        torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(model.cond_embed[1].weight)  # and none sees the pooled condition
    x, t, cond = inputs()
    changed = cond.clone()
    changed[:, 4] += 1
    same = (model(x, t, cond) == model(x, t, changed)).all(-1).all(0)
    assert same.tolist() == [True, True, True, True, False, True]
    one = cond[:, :1]
    assert torch.allclose(model(x, t, one), model(x, t, one.expand(-1, 6, -1)), atol=1e-6)
    with pytest.raises(
        ValueError, match=r"5 tokens of condition are not on the grid \(2, 3\): .*cross"
    ):
        model(x, t, cond[:, :5])


@pytest.mark.parametrize("changes", [{}, OURS])
def test_context_and_drop(changes):
    model = build(n_kv_head=2, **changes)
    x, t, cond = inputs()
    assert torch.equal(model(x, t, context=model.context(cond)), model(x, t, cond))
    drop = torch.tensor([True, False, True])
    expected = torch.stack([model.null_cond.expand(6, 7), cond[1], model.null_cond.expand(6, 7)])
    out = model(x, t, cond, drop=drop)
    assert torch.allclose(out, model(x, t, expected), atol=1e-5)
    null = model.context(model.null_cond.expand(3, 1, -1))
    assert torch.allclose(out[drop], model(x, t, context=null)[drop], atol=1e-5)
    grads = [
        torch.autograd.grad(y.square().sum(), model.null_cond)[0]
        for y in (out, model(x, t, expected))
    ]
    assert torch.allclose(*grads, rtol=1e-4) and grads[0].norm() > 1e-3


@pytest.mark.parametrize("changes", [{}, OURS])
def test_gradient_checkpointing_changes_no_bit(changes):
    x, t, cond = inputs()
    grads = []
    for on in (False, True):
        model = build(gradient_checkpointing=on, **changes)
        model(x, t, cond).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("changes", [dict(n_kv_head=2), OURS])
def test_compiles_without_a_graph_break(changes):
    """fullgraph raises at a graph break: in training, with dropped conditions, and in sampling.
    (Compiled to machine code: tests/test_train.py.)"""
    model, config = build(**changes), flow.FlowConfig()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, cond = inputs()
    drop = torch.tensor([True, False, False])
    grads = []
    for net in (model, compiled):
        net(x, t, cond, drop).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert (
        all((a - b).norm() < 1e-4 * max(a.norm(), 1e-3) for a, b in zip(*grads))
        and grads[0][0].norm() > 1e-3
    )
    with torch.no_grad():
        a, b = (
            flow.integrate(flow.guided_velocity(net, cond, config, guidance=2.0), x, 3)
            for net in (model, compiled)
        )
    assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dim=30), "dim=30"),
        (dict(n_head=16), "multiple of 4"),
        (dict(n_kv_head=3), "n_kv_head=3"),
        (dict(n_layer=0), "n_layer=0"),
    ],
)
def test_bad_sizes_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_bad_inputs_are_named():
    model = build()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"5 tokens of 5 channels; .* a grid of \(2, 3\)"):
        model(x[:, :5], t, cond)
    with pytest.raises(ValueError, match=r"\(3, 6, 6\)"):
        model(x, t, cond[..., :6])


@pytest.mark.parametrize("n_kv_head, cond_tokens", [(4, 9), (2, 5)])
def test_flops_per_sample(n_kv_head, cond_tokens):
    """By hand: 2 operations per weight and token forward, and backward 4, or 2 where the input
    needs no gradient."""
    config = NextDiTConfig(
        (3, 3), 10, 12, dim=32, n_layer=2, n_head=4, n_kv_head=n_kv_head, multiple_of=16
    )
    model, T = NextDiT(config), 9

    def weights(*modules):
        return sum(module.weight.numel() for module in modules)

    by_hand = 4 * T * weights(model.x_embed) + 6 * T * weights(model.final)
    by_hand += 4 * weights(model.t_embed[0])
    by_hand += 6 * weights(model.t_embed[2], model.cond_embed[1], model.final_ada)
    for block in model.layers:
        attn, ffn = block.attn, block.ffn
        by_hand += 6 * T * weights(attn.qkvq, attn.out, ffn.w13, ffn.w2)
        by_hand += 6 * weights(block.ada) + 4 * cond_tokens * weights(attn.cond_kv)
        by_hand += 3 * (4 * T * T + 4 * T * cond_tokens) * config.dim
    assert flops_per_sample(config, cond_tokens) == by_hand
    config.gradient_checkpointing = config.conv = True
    assert flops_per_sample(config, cond_tokens) == by_hand
