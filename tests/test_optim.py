import copy

import pytest
import torch

from model import NextDiT, NextDiTConfig
from optim import Muon, make_optimizer, orthogonalize


def tiny():
    torch.manual_seed(0)
    return NextDiT(
        NextDiTConfig(
            grid=(2, 2),
            target_dim=5,
            cond_dim=6,
            dim=32,
            n_layer=2,
            n_head=2,
            multiple_of=16,
            conv=True,
        )
    )


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 200)])
def test_orthogonalize(shape):
    """Singular vectors stay, singular values, a thousandfold apart, come near 1; in float32, where bfloat16 is slow."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u @ torch.diag(torch.logspace(0, -3, len(s))) @ v
    y = orthogonalize(x)
    assert y.dtype == torch.float32
    rotated = u.T @ y @ v.T
    values = rotated.diagonal()
    assert (rotated - torch.diag(values)).abs().max() < 1e-4
    assert (values[: len(s) // 2] > 0.65).all() and (
        values < 1.25
    ).all()  # the smallest need more than five steps
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("exact", [False, True])
def test_muon_is_torchs(monkeypatch, exact):
    """torch's step with torch's bfloat16 to within its rounding, and with our orthogonalization to that of float32."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(48, 96))
    q = copy.deepcopy(p)
    if exact:
        monkeypatch.setattr(
            torch.optim._muon, "_zeropower_via_newtonschulz", lambda x, *_: orthogonalize(x)
        )
    group = {"params": [p], "weight_decay": 0.1, "muon": True}
    ours = Muon([group], lr=0.02, fused=True)
    torchs = torch.optim.Muon(
        [q], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    start = p.detach().clone()
    for _ in range(5):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    difference = (p - q).norm() / (q - start).norm()
    assert difference < (1e-6 if exact else 0.03)
    assert exact or difference > 1e-6  # torch's was in bfloat16


def test_muon_leaves_the_rest_to_adamw():
    model, both = tiny(), tiny()
    opt = make_optimizer(model, "muon", 1e-2, 0.1, (0.9, 0.95))
    adamw = make_optimizer(both, "adamw", 1e-2, 0.1, (0.9, 0.95))
    torch.manual_seed(1)
    for p, q in zip(model.parameters(), both.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    opt.step()
    adamw.step()
    for (name, p), q in zip(model.named_parameters(), both.parameters()):
        hidden = name.startswith("layers.") and p.dim() == 2
        assert torch.equal(p, q) != hidden, name
        assert set(opt.state[p]) == (
            {"momentum_buffer"} if hidden else {"step", "exp_avg", "exp_avg_sq"}
        )
    assert (
        sum(p.numel() for group in opt.param_groups if group["muon"] for p in group["params"]) > 0
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_every_parameter_is_in_one_group(name):
    model = tiny()
    opt = make_optimizer(model, name, 1e-2, 0.1, (0.9, 0.95))
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {
        id(p) for group in opt.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {id(p) for p in model.parameters() if p.dim() >= 2}
    model.layers[0].gate = model.layers[1].gate  # shared: named once, and must be stepped once
    opt = make_optimizer(model, name, 1e-2, 0.1, (0.9, 0.95))
    assert (
        sum(p is model.layers[0].gate for group in opt.param_groups for p in group["params"]) == 1
    )
