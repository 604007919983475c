"""
How the parameters are stepped: the optimizers of train.py, torch's own or a few lines around them.

    opt = make_optimizer(model, "adamw", lr=3e-4, weight_decay=0.05, betas=(0.9, 0.95))
    norms = step_in_backward(opt)    # then loss.backward() is all of a step
"""

import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


class Adafactor(torch.optim.Adafactor):
    """AdamW's quality and learning rates for a quarter of its memory: 2 bytes a parameter instead of 8.

    torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) keeps the second moments of a matrix as one row and
    one column. It has no momentum, without which this model trains far worse, so it is given the average of the
    gradients, kept in bfloat16, in place of the gradient. Steps have the size of lr, or that times the root mean
    square of a weight that is above 1 (the paper's epsilon_2 is 1), and no floor lies under the small gradients of
    large models (its epsilon_1 is 1e-18). Raises ValueError for beta1 above 0.95, whose steps bfloat16 would lose.
    """

    def __init__(self, groups, lr, beta1):
        if beta1 > 0.95:
            raise ValueError(
                f"{beta1=} must be at most 0.95 with adafactor: its average of the gradients is bfloat16"
            )
        super().__init__(groups, lr=lr, eps=(1e-18, 1.0))
        self.beta1 = beta1

    @torch.no_grad()
    def step(self, closure=None):
        averages = {}
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            average = (
                self.state[p]["average"]
                if self.state[p]
                else torch.zeros_like(p, dtype=torch.bfloat16)
            )
            averages[p] = average.lerp_(p.grad.bfloat16(), 1 - self.beta1)
            p.grad = average.to(p.dtype)
        super().step(closure)
        for p, average in averages.items():
            self.state[p]["average"] = (
                average  # only now: torch's takes a state with anything in it as complete
            )

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has cast it to the parameter's dtype
            state["average"] = state["average"].bfloat16()


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with "muon": True, AdamW for the others.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, arXiv 2502.16982), so that AdamW's learning
    rate and weight decay serve both. But torch's orthogonalizes in bfloat16 everywhere, which a CPU may have to
    emulate, and cannot where fully_shard has left a process with a part of each matrix.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in (group for group in groups if group["muon"]):
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                average.lerp_(p.grad, 1 - self.momentum)
                update = p.grad.lerp(average, self.momentum)  # Nesterov
                if isinstance(
                    update, DTensor
                ):  # every process makes the whole of it and keeps its part
                    whole = orthogonalize(update.full_tensor())
                    update = distribute_tensor(
                        whole, p.device_mesh, p.placements, src_data_rank=None
                    )
                else:
                    update = orthogonalize(update)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step(closure)
        self.param_groups = groups


def orthogonalize(x):
    """x (n, m) with all its singular values taken to about 1, by Newton-Schulz iteration with Jordan's coefficients,
    which leave them between 0.7 and 1.2. In bfloat16 on cuda, in float32 elsewhere."""
    wide = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    wide = (
        wide.T if x.shape[0] > x.shape[1] else wide
    )  # so the products are of the smaller side's size
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(
            wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return (wide.T if x.shape[0] > x.shape[1] else wide).to(x.dtype)


def make_optimizer(model, name, lr, weight_decay, betas):
    """An optimizer over all of the model's parameters; norms, biases and gates are not decayed.

    Muon steps the matrices of the blocks; those at input and output, like all vectors, are AdamW's.
    """
    named = dict(model.named_parameters())
    hidden = [
        p for n, p in named.items() if name == "muon" and n.startswith("layers.") and p.dim() == 2
    ]
    others = [p for p in named.values() if all(p is not q for q in hidden)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "muon":
        groups = [g | {"muon": False} for g in groups] + [
            {"params": hidden, "weight_decay": weight_decay, "muon": True}
        ]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, named.values())), (
        "every parameter belongs to exactly one group"
    )
    if name in ("adamw", "muon"):
        kind = torch.optim.AdamW if name == "adamw" else Muon
        return kind(groups, lr=lr, betas=betas, fused=others[0].device.type != "mps")
    if name == "adafactor":
        return Adafactor(groups, lr=lr, beta1=betas[0])
    raise ValueError(f"optimizer={name!r} is unknown; it is one of adamw, muon, adafactor")


def step_in_backward(opt):
    """Make the backward pass step each parameter as soon as it has its gradient, which is then freed.

    So the gradients never all exist. There must be one backward pass a step, in one process. A gradient that is not
    finite steps nothing. Returns a list that each pass fills with the norms of the gradients.
    """
    norms = []

    def step(p):
        norms.append(p.grad.norm())
        if norms[-1].isfinite():
            opt.step()  # of p alone: the others have no gradient
        p.grad = None

    for group in opt.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(step)
    return norms
