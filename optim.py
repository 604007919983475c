"""
How the parameters are stepped: the optimizers of train.py, torch's own or a few lines around them.

    opt = make_optimizer(model, "adamw", lr=3e-4, weight_decay=0.05, betas=(0.9, 0.95))
    norms = step_in_backward(opt)    # then loss.backward() is all of a step
"""

import torch


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
            raise ValueError(f"{beta1=} must be at most 0.95 with adafactor: its average of the gradients is bfloat16")
        super().__init__(groups, lr=lr, eps=(1e-18, 1.0))
        self.beta1 = beta1

    @torch.no_grad()
    def step(self, closure=None):
        averages = {}
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            average = self.state[p]["average"] if self.state[p] else torch.zeros_like(p, dtype=torch.bfloat16)
            averages[p] = average.lerp_(p.grad.bfloat16(), 1 - self.beta1)
            p.grad = average.to(p.dtype)
        super().step(closure)
        for p, average in averages.items():
            self.state[p]["average"] = average  # only now: torch's takes a state with anything in it as complete

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has cast it to the parameter's dtype
            state["average"] = state["average"].bfloat16()


def make_optimizer(model, name, lr, weight_decay, betas):
    """An optimizer over all of the model's parameters; norms, biases and gates are not decayed."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=params[0].device.type != "mps")
    if name == "adafactor":
        return Adafactor(groups, lr=lr, beta1=betas[0])
    raise ValueError(f"optimizer={name!r} is unknown; it is one of adamw, adafactor")


def step_in_backward(opt):
    """Make the backward pass step each parameter as soon as it has its gradient, which is then freed.

    So the gradients never all exist. There must be one backward pass a step, in one process. Returns a list that
    each pass fills with the norms of the gradients.
    """
    norms = []

    def step(p):
        norms.append(p.grad.norm())
        opt.step()  # of p alone: the others have no gradient
        p.grad = None

    for group in opt.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(step)
    return norms
