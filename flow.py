"""
Flow matching (Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003).

Time runs from noise to data: t = 0 is noise, t = 1 is data.

    x_t = alpha(t) * x_1 + sigma(t) * x_0        x_0 noise, x_1 data
    v   = dx_t/dt = alpha'(t) * x_1 + sigma'(t) * x_0

    losses, out = loss(model, x_1, cond, cfg)           # the whole training objective
    velocity = guided_velocity(model, cond, cfg)        # what is integrated to sample
    x_1 = integrate(velocity, cfg.sigma_max * x_0, steps=30)

A model here is any callable model(x_t, t, cond, drop) -> (B, T, D); guided_velocity also needs
model.context(cond) and model.null_cond, see model.py. Shapes: B batch, T target tokens, D target
channels, S condition tokens, C condition channels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

CHOICES = {
    "path": ("linear", "cosine"),
    "prediction": ("v", "epsilon", "x"),
    "loss_space": ("native", "v"),
    "t_sampling": ("uniform", "logit_normal"),
}


@dataclass
class FlowConfig:
    path: str = "linear"  # linear: alpha = t | cosine: alpha = sin(pi t / 2)
    sigma_min: float = 0.0  # noise left at t = 1
    sigma_max: float = 1.0  # noise at t = 0
    prediction: str = "v"  # what the model predicts: v | epsilon (x_0) | x (x_1)
    # where the error is measured: native (of the prediction itself) | v (of the velocity)
    loss_space: str = "native"
    # uniform | logit_normal (Esser et al. 2024, arXiv 2403.03206, section 3.1)
    t_sampling: str = "uniform"
    t_mean: float = 0.0  # of logit(t), for logit_normal
    t_std: float = 1.0
    t_shift: float = 1.0  # > 1 moves training times towards noise
    cond_dropout: float = 0.1  # share of samples that train the null condition, for guidance
    l2_weight: float = 0.0  # weight of mean(output^2) in the loss

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(choices)}")
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 <= sigma_min={self.sigma_min} < sigma_max={self.sigma_max}")
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout={self.cond_dropout} must be in [0, 1)")


# ---------------------------------------------------------------- noise, times and the path


def draw_noise(shape, generator=None, device=None):
    """x_0 of shape (..., T, D), T the rows of the grid one after the other: the one place that
    decides what noise is, in training, validation and sampling. Give each value mean 0, variance 1.
    The grid is not known here; where it is a square, math.isqrt(T) is its side. model.Prior takes
    the values to be independent.
    """
    return torch.randn(shape, generator=generator, device=device)


def sample_t(n, cfg, generator=None, device=None):
    """(n,) training times in (0, 1)."""
    if cfg.t_sampling == "logit_normal":
        logits = cfg.t_mean + cfg.t_std * torch.randn(n, generator=generator, device=device)
        t = logits.sigmoid()
    else:
        t = torch.rand(n, generator=generator, device=device)
    return shift_time(t, cfg.t_shift)


def shift_time(t, shift):
    """Esser et al. 2024 (arXiv 2403.03206), equation 23, in our direction of time."""
    return t / (t + shift * (1 - t))


def coefficients(t, cfg):
    """alpha, sigma, alpha', sigma' at t, each of shape (B, 1, 1) for t (B,)."""
    t = t[:, None, None]  # (B, 1, 1)
    # fall: how the noise falls from 1 at t = 0 to 0 at t = 1
    if cfg.path == "linear":
        alpha, d_alpha = t, torch.ones_like(t)
        fall, d_fall = 1 - t, -torch.ones_like(t)
    else:
        rate = math.pi / 2
        angle = rate * t
        alpha, d_alpha = angle.sin(), rate * angle.cos()
        fall, d_fall = angle.cos(), -rate * angle.sin()
    span = cfg.sigma_max - cfg.sigma_min
    return alpha, cfg.sigma_min + span * fall, d_alpha, span * d_fall


# ---------------------------------------------------------------- training


def loss(model, x_1, cond, cfg, generator=None, x_0=None, t=None):
    """The training objective: the mean squared error of the model's prediction, per sample.

    With loss_space "v" prediction and target are first converted to velocities. On the linear path
    that weights the error of x by 1 / (1 - t)^2 (Li and He 2025, arXiv 2511.13720) and that of
    epsilon by 1 / t^2.

    x_1: (B, T, D) data; cond: (B, S, C)
    generator: torch.Generator on x_1's device, or None: torch's own
    x_0 (B, T, D), t (B,): given instead of drawn, for validation
    Returns (B,) losses and the model's output (B, T, D), in float32.
    """
    B, device = len(x_1), x_1.device
    if x_0 is None:
        x_0 = draw_noise(x_1.shape, generator, device)  # (B, T, D)
    if t is None:
        t = sample_t(B, cfg, generator, device)  # (B,)
    drop = None  # (B,), True where the model sees the null condition
    if cfg.cond_dropout:
        drop = torch.rand(B, generator=generator, device=device) < cfg.cond_dropout

    alpha, sigma, d_alpha, d_sigma = coefficients(t, cfg)  # each (B, 1, 1)
    x_t = alpha * x_1 + sigma * x_0  # (B, T, D)
    targets = {"v": d_alpha * x_1 + d_sigma * x_0, "epsilon": x_0, "x": x_1}
    target = targets[cfg.prediction]
    out = model(x_t, t, cond, drop).float()  # (B, T, D)
    error = out - target
    if cfg.loss_space == "v":
        error = to_velocity(out, x_t, t, cfg) - to_velocity(target, x_t, t, cfg)
    losses = (error**2).mean((1, 2)) + cfg.l2_weight * (out**2).mean((1, 2))  # (B,)
    return losses, out


def to_velocity(out, x_t, t, cfg):
    """The velocity (B, T, D) that follows from a model's output, by the equations at the top.

    No divisor falls below 0.05: near t = 0 epsilon says nothing about the data, near t = 1 x
    nothing about the noise. Li and He 2025 (arXiv 2511.13720) clip at the same value.
    """
    if cfg.prediction == "v":
        return out
    alpha, sigma, d_alpha, d_sigma = coefficients(t, cfg)  # each (B, 1, 1)
    if cfg.prediction == "epsilon":
        x_0 = out
        x_1 = (x_t - sigma * out) / alpha.clamp(min=0.05)
    else:
        x_0 = (x_t - alpha * out) / sigma.clamp(min=0.05)
        x_1 = out
    return d_alpha * x_1 + d_sigma * x_0


# ---------------------------------------------------------------- sampling


def guided_velocity(model, cond, cfg, guidance=1.0, interval=(0.0, 1.0)):
    """velocity(x, t) for `integrate`, with classifier-free guidance.

    v = v_null + guidance * (v_cond - v_null) where interval[0] <= t <= interval[1], v_cond
    elsewhere (Ho and Salimans 2022, arXiv 2207.12598; Kynkaanniemi et al. 2024, arXiv 2404.07724).
    The model runs on the null condition only within the interval, and at guidance 1 never. What
    depends on the condition alone is computed here, once per trajectory. Raises ValueError if
    guidance is asked of a model trained without condition dropout.
    """
    if len(interval) != 2:
        raise ValueError(
            f"guidance_interval={interval!r}: two times, from which and to which guidance acts"
        )
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance's interval {low} to {high} must lie within 0 to 1")
    context = model.context(cond)
    if guidance != 1:
        if not cfg.cond_dropout:
            raise ValueError(
                f"guidance={guidance} needs a model trained with cond_dropout > 0, unlike this one"
            )
        null = model.null_cond.expand(len(cond), 1, -1)  # (B, 1, C): one token stands for all
        null_context = model.context(null)

    def predict(x, t, context):
        times = x.new_full((len(x),), t)  # (B,)
        out = model(x, times, context=context).float()
        return to_velocity(out, x, times, cfg)

    def velocity(x, t):
        v = predict(x, t, context)
        if guidance == 1 or not low <= t <= high:
            return v
        v_null = predict(x, t, null_context)
        return v_null + guidance * (v - v_null)

    return velocity


@torch.no_grad()
def integrate(velocity, x, steps, method="ab2", shift=1.0, trajectory=False):
    """Solve dx/dt = velocity(x, t) from t = 0 to t = 1.

    velocity: function of x (B, T, D) and of t, a float; in the dtype of x
    x: (B, T, D) state at t = 0, sigma_max * noise
    steps: uniform in t or, with shift > 1, finer near noise
    method: euler, of order 1; heun, of order 2 with two evaluations of the velocity per step; ab2,
        two-step Adams-Bashforth, of order 2 with one, since it uses that of the step before
        (Hairer, Norsett, Wanner 1993, chapters II.1 and III.5)
    Returns x at t = 1, in float32 (float64 if x is); with trajectory the states at all
    steps + 1 times, stacked.
    """
    if method not in ("euler", "heun", "ab2"):
        raise ValueError(f"method={method!r} is unknown; it is one of euler, heun, ab2")
    if steps < 1 or steps % 1:
        raise ValueError(f"steps={steps} must be a whole number, at least 1")
    times = [shift_time(i / steps, shift) for i in range(int(steps) + 1)]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    states = [x]
    v_before = h_before = None
    for t, t_next in pairwise(times):
        h = t_next - t
        v = velocity(x, t)
        slope = v  # Euler's, which is also the first of ab2
        if method == "heun":
            v_end = velocity(x + h * v, t_next)
            slope = (v + v_end) / 2
        if method == "ab2" and v_before is not None:
            slope = v + h / (2 * h_before) * (v - v_before)
        x = x + h * slope
        v_before, h_before = v, h
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


TRAINING, SAMPLING = 0, 1  # streams of random numbers that never meet, whatever the seeds


def derive_seed(stream, *numbers):
    """One seed from a stream and non-negative integers, such as (seed, iteration, micro-batch).
    Others are a ValueError or a TypeError."""
    sequence = np.random.SeedSequence([stream, *numbers])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def sample_noise(indices, shape, seed, draw=0):
    """x_0 of shape (B, *shape): row i is a function of (seed, indices[i], draw) alone."""
    noise = []
    for index in indices:
        generator = torch.Generator().manual_seed(derive_seed(SAMPLING, seed, index, draw))
        noise.append(draw_noise(shape, generator))
    return torch.stack(noise)


# ---------------------------------------------------------------- normalization


class Normalizer:
    """Takes embeddings (..., channels) into the space that the flow lives in, and back.

    mode: 'channel': zero mean and unit variance per channel; 'none': as they are; 'l2': every
        token scaled to norm sqrt(channels). l2 forgets the norms: decode scales tokens such that
        norm sqrt(channels) becomes the root mean square norm of the training set.
    mean, std: (channels,) statistics of the training set. A channel whose std is below a millionth
        of the largest is constant: encode gives 0 there, decode the mean.
    """

    def __init__(self, mode, mean, std, device=None):
        if mode not in ("channel", "l2", "none"):
            raise ValueError(f"normalize={mode!r} is unknown; it is one of channel, l2, none")
        self.mode = mode
        if mode == "none":  # takes them as they are
            mean, std = 0.0, 1.0
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
        std = torch.as_tensor(std, dtype=torch.float32, device=device)
        varies = std > 1e-6 * std.max()
        self.std = std.where(varies, 0.0)
        self.scale = std.where(varies, math.inf)  # what encode divides by
        self.rms = (self.mean**2 + std**2).mean().sqrt()

    def encode(self, x):
        x = x.to(self.mean.device, non_blocking=True).float()  # as it is stored: fewer bytes move
        if self.mode == "l2":
            return torch.rms_norm(x, x.shape[-1:], eps=1e-37)  # a zero token stays zero
        return (x - self.mean) / self.scale

    def decode(self, x):
        if self.mode == "l2":
            return x * self.rms
        return x * self.std + self.mean
