import copy

import pytest
import torch

from model import NextDiT, NextDiTConfig
from plumbing.optim import make_optimizer, step_in_backward

BETAS = (0.9, 0.95)


def tiny():
    torch.manual_seed(0)
    sizes = dict(grid=(2, 2), target_dim=5, cond_dim=6, dim=32, n_layer=2, n_head=2)
    return NextDiT(NextDiTConfig(**sizes, multiple_of=16, conv=True))


def backward(model):
    """One backward pass of a made-up loss, the same for every model."""
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 5, generator=g), torch.rand(3, generator=g)
    cond = torch.randn(3, 4, 6, generator=g)
    (model(x, t, cond) - 1).square().mean().backward()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_parameter_is_in_one_group(name):
    model = tiny()
    opt = make_optimizer(model, name, 1e-2, 0.1, BETAS)
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decaying = [group for group in opt.param_groups if group["weight_decay"]]
    decayed = {id(p) for group in decaying for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() >= 2}
    # a shared parameter is named once, and must be stepped once
    model.layers[0].attn.gate = model.layers[1].attn.gate
    opt = make_optimizer(model, name, 1e-2, 0.1, BETAS)
    grouped = [p for group in opt.param_groups for p in group["params"]]
    assert sum(p is model.layers[0].attn.gate for p in grouped) == 1


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_steps_in_the_backward_pass_are_the_same_steps(name):
    model = tiny()
    other = copy.deepcopy(model)
    opt = make_optimizer(model, name, 1e-2, 0.1, BETAS)
    gradient_norm = step_in_backward(make_optimizer(other, name, 1e-2, 0.1, BETAS))
    for _ in range(3):
        backward(other)
        backward(model)
        total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        opt.step()
        opt.zero_grad()
        assert torch.allclose(gradient_norm(), total.norm())
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert q.grad is None


def test_a_gradient_that_is_not_finite_steps_nothing():
    model = tiny()
    start = copy.deepcopy(model)
    gradient_norm = step_in_backward(make_optimizer(model, "adamw", 1e-2, 0.1, BETAS))
    (sum(p.sum() for p in model.parameters()) * float("nan")).backward()
    assert not gradient_norm().isfinite()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters()))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown; it is one of adamw"):
        make_optimizer(tiny(), "sgd", 1e-2, 0.1, BETAS)
