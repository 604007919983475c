"""
How the parameters are stepped: torch's AdamW, or Adafactor in a few lines around torch's.

    opt = make_optimizer(model, "adamw", lr=3e-4, weight_decay=0.05, betas=(0.9, 0.95))
    gradient_norm = step_in_backward(opt)    # then loss.backward() is a whole step
"""

import functools
import math

import torch


class Adafactor(torch.optim.Adafactor):
    """AdamW's quality and learning rates in a quarter of its memory: 2 bytes per parameter, not 8.

    torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) keeps the second moments of a
    matrix as one row and one column. It has no momentum, and this model trains far worse without.
    So here it steps along the average of the gradients, which is kept in bfloat16. A step has the
    size of lr, or of lr times the root mean square of the weight where that is above 1 (the paper's
    epsilon_2 is 1). Its epsilon_1, 1e-18, lies below the small gradients of large models.
    Raises ValueError for beta1 above 0.95: bfloat16 would lose what one gradient adds.
    """

    def __init__(self, groups, lr, beta1):
        if beta1 > 0.95:
            raise ValueError(f"{beta1=} must be at most 0.95: adafactor's average is bfloat16")
        super().__init__(groups, lr, eps=(1e-18, 1.0))
        self.beta1 = beta1

    @torch.no_grad()
    def step(self):
        averages = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].get("average")
                if average is None:
                    average = torch.zeros_like(p)
                average = average.bfloat16()  # one that is restored has the parameter's dtype
                average.lerp_(p.grad.bfloat16(), 1 - self.beta1)
                averages[p] = average
                p.grad = average.to(p.dtype)
        super().step()
        # stored only now: torch's step initializes its state only where there is none at all
        for p, average in averages.items():
            self.state[p]["average"] = average


def make_optimizer(model, name, lr, weight_decay, betas):
    """An optimizer over all of the model's parameters; norms, biases and gates are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas, fused=True)
    if name == "adafactor":
        return Adafactor(groups, lr, betas[0])
    raise ValueError(f"optimizer={name!r} is unknown; it is one of adamw, adafactor")


def step_in_backward(opt):
    """Make the backward pass step each parameter as soon as its gradient is there, then free that.

    So the gradients never all exist at once. This needs one backward pass per step and a single
    process. A gradient that is not finite steps nothing.
    Returns a function that gives the norm of the last backward pass's gradients, 0 if there was
    none.
    """
    norms = []
    groups = opt.param_groups

    def step(group, p):
        norm = p.grad.norm().item()
        norms.append(norm)
        if math.isfinite(norm):
            opt.param_groups = [group | {"params": [p]}]  # to look at no other parameter
            opt.step()
            opt.param_groups = groups
        p.grad = None

    for group in groups:
        for p in group["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(functools.partial(step, group))

    def gradient_norm():
        norm = torch.tensor(norms).norm()
        norms.clear()
        return norm

    return gradient_norm
