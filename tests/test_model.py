import math

import numpy as np
import pytest
import torch

import flow
from model import NextDiT, NextDiTConfig, Prior, attend, flops_per_sample, rope_2d, rotate

SMALL = dict(grid=(2, 3), target_dim=5, cond_dim=7, dim=32, n_layer=2, n_head=4, multiple_of=8)


def configuration(**changes):
    return NextDiTConfig(**SMALL | changes)


CONFIG = configuration()


def build(seed=0, **changes):
    """A model whose every parameter, gates included, is random."""
    torch.manual_seed(seed)
    model = NextDiT(configuration(**changes))
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


@pytest.mark.parametrize("changes", [{}, OURS])
def test_every_parameter_is_initialized(changes):
    """init_weights sets every parameter, and to zero what must start silent."""
    model = NextDiT(configuration(**changes))
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
    rope = rope_2d(configuration(grid=(3, 4)), "cpu")
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


def linear_gaussian(grid=(2, 3), D=5, C=7):
    """A prior whose every part matters, in float64."""
    g = torch.Generator().manual_seed(2)
    prior = Prior(grid, D, C).double()
    T = grid[0] * grid[1]
    prior.weight.copy_(torch.randn(1 + 2 * C, D, generator=g, dtype=torch.float64))
    prior.places.copy_(torch.linalg.qr(torch.randn(T, T, generator=g, dtype=torch.float64))[0])
    prior.channels.copy_(torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0])
    prior.variance.copy_(4 * torch.rand(T, D, generator=g, dtype=torch.float64) ** 2 + 0.05)
    return prior


def draw(prior, mean, noise):
    return prior.add(mean, prior.variance.sqrt() * noise)


def covariance_of(prior):
    """Of the noise on the whole grid, (T * D, T * D)."""
    basis = torch.kron(prior.places, prior.channels)
    return basis @ prior.variance.flatten().diag() @ basis.T


def test_the_prior_is_the_best_linear_denoiser():
    """A new model's velocity is E[v | x_t] of Gaussian grids; its flow yields their covariance."""
    torch.manual_seed(0)
    model = NextDiT(configuration(**OURS)).double()
    model.prior.load_state_dict(linear_gaussian().state_dict())
    x, _, cond = (v.double() for v in inputs())
    image = cond.mT.unflatten(2, (2, 3))
    around = [image[:, :, :, :2], image, image[:, :, :, 1:]]  # of columns 0, 1, 2: both rows
    features = torch.stack([part.mean((2, 3)) for part in around], 1).repeat(1, 2, 1)
    features = torch.cat([cond, features], 2)
    mean = features @ model.prior.weight[1:] + model.prior.weight[0]
    assert torch.allclose(model.prior.mean(cond), mean)
    covariance, one = covariance_of(model.prior), torch.eye(30, dtype=torch.float64)
    for t in (0.0, 0.3, 0.9, 1.0):
        gain = (t * covariance - (1 - t) * one) @ torch.linalg.inv(
            t**2 * covariance + (1 - t) ** 2 * one
        )
        expected = mean + ((x - t * mean).flatten(1) @ gain.T).view_as(x)
        assert torch.allclose(model(x, torch.full((3,), t), cond), expected, atol=1e-5)
    noise = torch.randn(4000, 6, 5, dtype=torch.float64)
    velocity = flow.guided_velocity(model, cond[:1].expand(4000, 6, 7), flow.FlowConfig())
    made = flow.integrate(velocity, noise, 20)
    drawn = draw(model.prior, mean[:1], noise)
    for grids in (made, drawn):
        error = grids.flatten(1).T.cov() - covariance
        assert error.norm() < 0.12 * covariance.norm()
        assert (grids.mean(0) - mean[0]).abs().max() < 0.1


def test_the_prior_is_fitted():
    """To conditions and targets of a known linear-Gaussian model, also where a single token or
    another number of them is the condition."""
    world = linear_gaussian()
    g = torch.Generator().manual_seed(0)
    for S in (6, 1, 4):
        cond = torch.randn(3000, S, 7, generator=g, dtype=torch.float64)
        noise = torch.randn(3000, 6, 5, generator=g, dtype=torch.float64)
        target = draw(world, world.mean(cond), noise)
        prior = Prior((2, 3), 5, 7).double()
        prior.fit(lambda rows: (target[rows], cond[rows]), 3000)
        error = prior.mean(cond) - world.mean(cond)
        assert error.square().mean() < 0.01 * world.variance.mean()
        # which has no basis of places and channels in common with other variances
        for axis, ours in ((1, prior), (0, prior)):
            a, b = (p.variance.mean(axis).sort().values for p in (ours, world))
            assert torch.allclose(a, b, rtol=0.25)
    prior = Prior((2, 3), 5, 7)
    prior.fit(lambda rows: (target[rows].float(), cond[rows].float()), 1)  # nothing to learn from
    assert all(value.isfinite().all() for value in prior.state_dict().values())


def test_the_prior_starts_at_its_known_loss():
    """The velocity's mean squared error for variances s^2, over uniform t, is pi / 2 mean(s)."""
    model = NextDiT(configuration(**OURS)).double()
    prior = linear_gaussian()
    model.prior.load_state_dict(prior.state_dict())
    g, config = torch.Generator().manual_seed(0), flow.FlowConfig(cond_dropout=0)
    cond = torch.randn(4000, 6, 7, generator=g, dtype=torch.float64)
    noise = torch.randn(4000, 6, 5, generator=g, dtype=torch.float64)
    x_1 = draw(prior, prior.mean(cond), noise)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    with torch.no_grad():
        losses, _ = flow.loss(model, x_1, cond, config, generator=g, t=t)
    expected = math.pi / 2 * prior.variance.sqrt().mean()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("tokens,limit", [(4, 240), (3, 240), (4, 120)])
def test_the_priors_mean_equals_scikit_learns_ridge(tokens, limit):
    """On all 240 tokens, and on every second one, which in other batches is the other one."""
    from sklearn.linear_model import Ridge

    g = np.random.default_rng(0)
    cond = g.standard_normal((60, tokens, 8))
    target = g.standard_normal((60, 4, 5)) + (cond @ g.standard_normal((8, 5)))[:, :1]
    data = [torch.from_numpy(x).float() for x in (target, cond)]
    prior = Prior((4, 1), 5, 8)
    prior.fit(lambda rows: [x[rows] for x in data], 60, limit)
    features = around = cond.mean(1, keepdims=True).repeat(4, 1)
    if tokens == 4:  # in a column: those above and below
        windows = cond[:, :2], cond[:, :3], cond[:, 1:], cond[:, 2:]
        features, around = cond, np.stack([window.mean(1) for window in windows], 1)
    x = np.concatenate([np.ones((60, 4, 1)), features, around], -1)
    batch = np.arange(60)[:, None] // 6
    is_held_out = batch % 5 == 0  # every fifth of ten batches
    stride = 240 // limit
    rest = ~is_held_out & ((np.arange(4) - batch) % stride == 0)  # (60, 4)
    held_out = np.flatnonzero(is_held_out)
    power = np.square(x[rest]).sum()
    fits = [
        Ridge(alpha=penalty).fit(x[rest][:, 1:], target[rest])
        for penalty in np.logspace(-8, 0, 9) * power
    ]
    predictions = [fit.predict(x[:, :, 1:].reshape(-1, 16)).reshape(60, 4, 5) for fit in fits]
    best = min(predictions, key=lambda y: np.square(y - target)[held_out].mean())
    assert np.allclose(prior.mean(data[1]).numpy(), best, atol=1e-4)


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
    ],
)
def test_bad_sizes_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        configuration(**changes)


def test_bad_inputs_are_named():
    model = build()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"5 tokens; .* a grid of \(2, 3\)"):
        model(x[:, :5], t, cond)


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
