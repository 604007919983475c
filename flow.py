"""
Flow matching (Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003).

Time runs from noise to data: t = 0 is noise, t = 1 is data.

    x_t = alpha(t) * x_1 + sigma(t) * x_0        x_0 noise, x_1 data
    v   = dx_t/dt = alpha'(t) * x_1 + sigma'(t) * x_0

Training: `loss(model, x_1, cond, cfg)`, the whole objective in one function.
Sampling: `integrate(velocity, x, steps, method)` with `velocity = guided_velocity(model, cond, cfg)`.

A model here is any callable model(x_t, t, cond, cond_mask, drop) -> (B, T, D); guided_velocity
further needs model.context(...), see model.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class FlowConfig:
    path: str = "linear"  # linear: alpha = t | cosine: alpha = sin(pi t / 2)
    sigma_min: float = 0.0  # noise left at t = 1
    sigma_max: float = 1.0  # noise at t = 0
    prediction: str = "v"  # what the model outputs: v | epsilon (x_0) | x (x_1)
    loss_space: str = (
        "native"  # where the error is measured: native (of the prediction) | v (of the velocity)
    )
    t_sampling: str = (
        "uniform"  # uniform | logit_normal (Esser et al. 2024, arXiv 2403.03206, section 3.1)
    )
    t_mean: float = 0.0  # of logit(t), for logit_normal
    t_std: float = 1.0
    t_shift: float = 1.0  # > 1 moves training times towards noise
    cond_dropout: float = 0.1  # share of samples that train the null condition, for guidance
    l2_weight: float = 0.0  # weight of mean(output^2) in the loss

    @classmethod
    def of(cls, settings, tokens, channels):
        """From train.py's settings and the size of the data: the larger, the more noise hides it, and a t_shift of
        None becomes sqrt(tokens * channels / 4096), at least 1 (Zheng et al. 2025, arXiv 2510.11690)."""
        chosen = {name: settings[name] for name in cls.__dataclass_fields__}
        if chosen["t_shift"] is None:
            chosen["t_shift"] = max(1.0, math.sqrt(tokens * channels / 4096))
        return cls(**chosen)

    def __post_init__(self):
        choices = {
            "path": PATHS,
            "prediction": ("v", "epsilon", "x"),
            "loss_space": ("native", "v"),
        }
        for name, known in (choices | {"t_sampling": ("uniform", "logit_normal")}).items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; it is one of {', '.join(known)}"
                )
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max}: need 0 <= sigma_min < sigma_max"
            )
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout={self.cond_dropout} must be in [0, 1)")
        if not (
            0 < self.t_shift < math.inf and 0 < self.t_std < math.inf and math.isfinite(self.t_mean)
        ):
            raise ValueError(
                f"t_shift={self.t_shift} and t_std={self.t_std} must be positive, t_mean={self.t_mean} finite"
            )


PATHS = {  # name: alpha, its derivative, the fall of the noise from 1 to 0, its derivative
    "linear": lambda t: (t, torch.ones_like(t), 1 - t, -torch.ones_like(t)),
    "cosine": lambda t: (
        torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t),
        torch.cos(math.pi / 2 * t), -math.pi / 2 * torch.sin(math.pi / 2 * t),
    ),
}  # fmt: skip


def coefficients(t, cfg):
    """alpha, sigma, alpha', sigma' at t, each of shape (B, 1, 1) for t (B,)."""
    alpha, d_alpha, fall, d_fall = PATHS[cfg.path](t.view(-1, 1, 1))
    span = cfg.sigma_max - cfg.sigma_min
    return alpha, cfg.sigma_min + span * fall, d_alpha, span * d_fall


def shift_time(t, shift):
    """t / (t + shift * (1 - t)): Esser et al. 2024, equation 23, in our direction of time."""
    return t / (t + shift * (1 - t))


def sample_t(n, cfg, generator=None, device=None):
    """(n,) training times in (0, 1)."""
    if cfg.t_sampling == "logit_normal":
        t = torch.sigmoid(
            cfg.t_mean + cfg.t_std * torch.randn(n, generator=generator, device=device)
        )
    else:
        t = torch.rand(n, generator=generator, device=device)
    return shift_time(t, cfg.t_shift)


def loss(model, x_1, cond, cfg, cond_mask=None, generator=None, x_0=None, t=None):
    """The training objective: the mean squared error of the model's prediction, per sample.

    With loss_space "v" prediction and truth are first taken to the velocity, which weights x by
    1 / (1 - t)^2 (Li and He 2025, arXiv 2511.13720) and epsilon by 1 / t^2 on the linear path.

    x_1: (B, T, D) data; cond: (B, S, C); cond_mask: (B, S) or None
    generator: torch.Generator on x_1's device; x_0 (B, T, D), t (B,): fixed instead of drawn
    Returns (B,) losses and the model's output (B, T, D), in float32.
    """
    B, device = x_1.shape[0], x_1.device
    if x_0 is None:
        x_0 = torch.randn(x_1.shape, generator=generator, device=device, dtype=x_1.dtype)
    if t is None:
        t = sample_t(B, cfg, generator, device)
    drop = (
        torch.rand(B, generator=generator, device=device) < cfg.cond_dropout
        if cfg.cond_dropout
        else None
    )

    alpha, sigma, d_alpha, d_sigma = coefficients(t, cfg)
    x_t = alpha * x_1 + sigma * x_0
    target = {"v": d_alpha * x_1 + d_sigma * x_0, "epsilon": x_0, "x": x_1}[cfg.prediction]
    out = model(x_t, t, cond, cond_mask, drop).float()
    error = out - target
    if cfg.loss_space == "v":
        error = convert(out, x_t, t, cfg)[0] - convert(target, x_t, t, cfg)[0]
    return (error**2).mean((1, 2)) + cfg.l2_weight * (out**2).mean((1, 2)), out


def convert(out, x_t, t, cfg):
    """What a model's output means: (v, x_0, x_1), each (B, T, D).

    Solves the two equations at the top of this file for the two unknowns. Divisors are kept
    at 0.05 or more, where epsilon determines no data (t -> 0) and x no noise (t -> 1): Li and He
    2025 (arXiv 2511.13720) clip at the same value.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(t, cfg)
    if cfg.prediction == "v":
        det = alpha * d_sigma - d_alpha * sigma
        return out, (alpha * out - d_alpha * x_t) / det, (d_sigma * x_t - sigma * out) / det
    if cfg.prediction == "epsilon":
        x_0, x_1 = out, (x_t - sigma * out) / alpha.clamp(min=0.05)
    else:
        x_0, x_1 = (x_t - alpha * out) / sigma.clamp(min=0.05), out
    return d_alpha * x_1 + d_sigma * x_0, x_0, x_1


def guided_velocity(model, cond, cfg, guidance=1.0, interval=(0.0, 1.0), cond_mask=None):
    """velocity(x, t) for `integrate`, with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    v = v_null + guidance * (v_cond - v_null) where interval[0] <= t <= interval[1], v_cond elsewhere (Kynkaanniemi et
    al. 2024, arXiv 2404.07724); the null branch is evaluated only there, and at guidance 1 never.
    What depends on the condition alone is computed here, once for the trajectory.
    Raises ValueError if guidance is asked of a model trained without condition dropout.
    """
    if len(interval) != 2:
        raise ValueError(
            f"guidance_interval={interval!r}: two times, from which and to which guidance acts"
        )
    low, high = interval
    if not (math.isfinite(guidance) and 0 <= low < high <= 1):
        raise ValueError(
            f"guidance={guidance} must be finite, and its interval {low} to {high} lie within 0 to 1"
        )
    if guidance != 1 and not cfg.cond_dropout:
        raise ValueError(
            f"guidance={guidance} needs a model trained with cond_dropout > 0; this one has no null condition"
        )
    context = model.context(cond, cond_mask)
    if guidance != 1:
        null = model.context(model.null_cond.expand(len(cond), 1, -1))  # one token for all

    def velocity(x, t):
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)

        def v(context):
            return convert(model(x, times, context=context).float(), x, times, cfg)[0]

        if guidance == 1 or not low <= t <= high:
            return v(context)
        v_null = v(null)
        return v_null + guidance * (v(context) - v_null)

    return velocity


RUNGE_KUTTA = {  # explicit: nodes, rows of the matrix, weights (Hairer, Norsett, Wanner 1993, chapter II.1)
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": (
        [0, 1 / 2, 1 / 2, 1],
        [[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}
ADAMS_BASHFORTH = {
    "ab2": (2, "euler"),
    "ab3": (3, "midpoint"),
}  # order, and the first step, of one order less
METHODS = (*RUNGE_KUTTA, *ADAMS_BASHFORTH)


def adams_bashforth(times, t, t_next):
    """Weights of the velocities at `times` in the step from t to t_next: exact if the velocity is a polynomial of
    degree len(times) - 1 in t (Hairer, Norsett, Wanner 1993, chapter III.5: steps need not be equal)."""
    nodes = (np.array(times) - t) / (t_next - t)
    return (t_next - t) * np.linalg.solve(
        np.vander(nodes, increasing=True).T, 1 / np.arange(1, len(nodes) + 1)
    )


@torch.no_grad()
def integrate(velocity, x, steps, method="ab2", shift=1.0, trajectory=False):
    """Solve dx/dt = velocity(x, t) from t = 0 to t = 1.

    velocity: function of x (B, T, D) and of t, a float; x: state at t = 0, sigma_max * noise
    steps: of the solver, uniform in t or, with shift > 1, finer near noise
    method: evaluations of the velocity a step: euler 1, midpoint and heun 2, rk4 4; ab2 and ab3, which go on from the
        evaluations of the steps before, 1 (and ab3 one more in the first)
    Returns x at t = 1, in float32 (float64 if x is); with trajectory the states at all
    steps + 1 times, stacked.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; it is one of {', '.join(METHODS)}")
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps={steps} must be a whole number, at least 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive")
    order, first = ADAMS_BASHFORTH.get(method, (0, method))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    times, states, past = [shift_time(i / steps, shift) for i in range(int(steps) + 1)], [x], []
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        h, k = t_next - t, []
        nodes, matrix, weights = RUNGE_KUTTA["euler" if order and i else first]
        for node, row in zip(nodes, matrix):
            stage = x + h * sum(a * k_i for a, k_i in zip(row, k) if a)
            k.append(velocity(stage, t + node * h).to(x.dtype))
        weights = [h * b for b in weights]
        if order:
            past = [*past, *((t + node * h, k_i) for node, k_i in zip(nodes, k))][-order:]
            if i:
                k, weights = (
                    [k_i for _, k_i in past],
                    adams_bashforth([time for time, _ in past], t, t_next),
                )
        x = x + sum(b * k_i for b, k_i in zip(weights, k) if b)
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


TRAINING, SAMPLING = 0, 1  # streams of noise that never meet, whatever the seeds


def mix(stream, *numbers):
    """One seed out of a stream and several non-negative integers, such as (seed, step, micro-batch)."""
    return int(
        np.random.SeedSequence([stream, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def sample_noise(indices, shape, seed, draw=0):
    """(B, *shape) standard normal noise; row i is a function of (seed, indices[i], draw) alone."""
    try:
        seeds = [mix(SAMPLING, seed, i, draw) for i in indices]
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"seed={seed}, draw={draw} and a sample's number must be integers of 0 or more"
        ) from e
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


class Normalizer:
    """To and from the space that the flow lives in, (..., channels) to the same shape.

    mode: 'channel': zero mean, unit variance per channel; 'none': the raw values; 'l2': every
        token scaled to norm sqrt(channels). l2 forgets the norms: decode gives each token the
        root mean square norm of the training set at norm sqrt(channels).
    mean, std: (channels,) statistics of the training set
    """

    def __init__(self, mode, mean, std, device=None):
        if mode not in ("channel", "l2", "none"):
            raise ValueError(f"normalize={mode!r} is unknown; it is one of channel, l2, none")
        self.mode = mode
        mean, std = (torch.as_tensor(s, dtype=torch.float32, device=device) for s in (mean, std))
        self.mean, self.std = mean, std.where(std > 1e-6, 1.0)  # a constant channel stays as it is
        self.rms = (mean**2 + std**2).mean().sqrt()

    def encode(self, x):
        x = x.float()
        if self.mode == "channel":
            return (x - self.mean) / self.std
        return (
            x * x.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            if self.mode == "l2"
            else x
        )

    def decode(self, x):
        if self.mode == "channel":
            return x * self.std + self.mean
        return x * self.rms if self.mode == "l2" else x
