"""
NextDiT: the diffusion transformer of Lumina-Next (Zhuo et al. 2024, arXiv 2406.18583), as
BLIP3-o (Chen et al. 2025, arXiv 2505.09568) uses it on grids of image-token embeddings.

    config = NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280, dim=512, n_layer=6, n_head=8)
    model = NextDiT(config)
    out = model(x_t, t, cond)    # (B, T, D), (B,), (B, S, C) -> (B, T, D)

A block has self-attention with 2D RoPE and QK-norm, whose output is summed with that of a gated
cross-attention to the condition, then a SwiGLU feed-forward. RMSNorm stands before and after each
of the two (sandwich), and time and pooled condition set a scale and a tanh gate for each (adaLN).
Structure and initialization are those of diffusers' LuminaNextDiT2DModel, but projections of the
same input are fused into one matrix. What train.py adds by default (`conditioning="aligned"`,
`conv`, `rope="grid"`, `prior`) earned its place in RECORDS.md.

Shapes: B batch, T = H * W target tokens, D target channels, S condition tokens, C condition channels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# highest frequency, in radians per token, and theta
ROPE = {"lumina": (1.0, 10000.0), "grid": (3.0, 10.0)}
SIZES = ("target_dim", "cond_dim", "dim", "n_layer", "n_head", "n_kv_head", "multiple_of")


@dataclass
class NextDiTConfig:
    grid: tuple[int, int]  # (H, W) of the target tokens
    target_dim: int  # D
    cond_dim: int  # C
    dim: int = 1792
    n_layer: int = 24
    n_head: int = 28
    n_kv_head: int | None = None  # None: as many as n_head; fewer: grouped-query attention
    multiple_of: int = 256  # the feed-forward's width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    # cross: attention to the condition | aligned: condition token i is added to target token i
    conditioning: str = "cross"
    conv: bool = False  # a depthwise 3x3 convolution on the grid, at the start of each block
    rope: str = "lumina"  # frequencies of RoPE: lumina, as in texts | grid, for few rows and columns
    prior: bool = False  # see Prior; the output is then the velocity on the linear path
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        if self.conditioning not in ("cross", "aligned"):
            raise ValueError(
                f"conditioning={self.conditioning!r} is unknown; it is one of cross, aligned"
            )
        if self.rope not in ROPE:
            raise ValueError(f"rope={self.rope!r} is unknown; it is one of {', '.join(ROPE)}")
        if self.dim % (4 * self.n_head):
            raise ValueError(
                f"dim={self.dim} / n_head={self.n_head} must be a multiple of 4: "
                "2D RoPE rotates pairs per axis"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )
        self.grid = tuple(self.grid)
        self.n_tokens = math.prod(self.grid)  # T
        self.head_dim = self.dim // self.n_head
        self.kv_dim = self.n_kv_head * self.head_dim
        self.emb_dim = min(self.dim, 1024)  # of the embedding of time and pooled condition
        hidden = int(8 * self.dim / 3)  # SwiGLU has three matrices: 2/3 of the usual 4 * dim
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        self.ffn_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)

    @classmethod
    def of(cls, settings, data):
        S, T = (data[f"train_{name}"].shape[1] for name in ("cond", "target"))
        chosen = {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}
        chosen |= {f"{name}_dim": data[f"train_{name}"].shape[2] for name in ("cond", "target")}
        if chosen["conditioning"] == "auto":
            chosen["conditioning"] = "aligned" if S == T else "cross"
        if chosen["conditioning"] == "aligned" and S not in (1, T):
            raise ValueError(
                f"--conditioning=aligned: {S} condition tokens are not on the grid of {T} target tokens"
            )
        linear = [settings[name] for name in ("path", "prediction", "sigma_min", "sigma_max")] == [
            "linear",
            "v",
            0,
            1,
        ]
        if chosen["prior"] is None:  # narrower models cannot pass on the noise that v and x_t hold
            chosen["prior"] = linear and chosen["target_dim"] > chosen["dim"]
        elif chosen["prior"] and not linear:
            raise ValueError(
                "prior=True needs path=linear, prediction=v, sigma_min=0 and sigma_max=1"
            )
        return cls(**chosen, grid=tuple(data["meta"]["grid"]))



def rope_2d(config, device=None):
    """Cosines and sines of a 2D rotary embedding, each (T, 1, head_dim / 2).

    The pair of channels (2j, 2j + 1) turns with the row for even j and with the column for odd j,
    both at frequency highest * theta^(-4k / head_dim), k = j // 2: Su et al. 2021 (arXiv
    2104.09864), per axis as in Lumina-Next.
    """
    H, W = config.grid
    highest, theta = ROPE[config.rope]
    half = config.head_dim // 2
    freqs = highest / theta ** (torch.arange(0, half, 2, device=device) / half)  # (head_dim / 4,)
    rows, cols = torch.arange(H, device=device), torch.arange(W, device=device)
    positions = torch.cartesian_prod(rows, cols)  # (T, 2)
    angles = positions[:, None] * freqs[:, None]  # (T, head_dim / 4, 2)
    angles = angles.flatten(1)[:, None]  # (T, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn the channel pairs of each head of x (B, T, n * head_dim) by the angles of `rope`."""
    cos, sin = rope  # each (T, 1, head_dim / 2)
    pairs = x.float().unflatten(-1, (-1, cos.shape[-1], 2))  # (B, T, n, head_dim / 2, 2)
    a, b = pairs.unbind(-1)
    y = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return y.flatten(2).type_as(x)  # (B, T, n * head_dim)


def timestep_embedding(t):
    """(B,) -> (B, 256) sinusoids of the noise level 1000 * (1 - t).

    That is the reference's timestep, which runs from data (0) to noise (1000): so its weights
    work unchanged with our time, which runs from noise to data.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)  # (128,)
    angles = (1000 * (1 - t)).float()[:, None] * freqs  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q, k, v, head_dim):
    """q (B, T, n_head * head_dim), k and v (B, S, n_kv_head * head_dim) -> (B, T, n_head, head_dim)"""
    # each (B, n, T or S, head_dim)
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] > k.shape[1]
    # on a CPU SDPA is up to ten times slower for a few hundred tokens
    if q.device.type == "cpu" and not grouped:
        scores = (q * head_dim**-0.5) @ k.transpose(2, 3)  # (B, n_head, T, S)
        y = scores.softmax(dim=-1) @ v  # (B, n_head, T, head_dim)
    else:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention, plus gated cross-attention to the condition if conditioning is "cross"."""

    def __init__(self, config):
        super().__init__()
        dim, kv_dim = config.dim, config.kv_dim
        norm = nn.LayerNorm if config.qk_norm else nn.Identity  # spans all heads, as in Lumina-Next
        self.head_dim = config.head_dim
        self.cross = config.conditioning == "cross"
        # queries, keys and values, and the queries of cross-attention
        self.sizes = [dim, kv_dim, kv_dim, dim if self.cross else 0]
        self.qkvq = nn.Linear(dim, sum(self.sizes), bias=False)
        if self.cross:
            self.gate = nn.Parameter(torch.empty(config.n_head))
            self.cond_norm = nn.RMSNorm(config.cond_dim, config.norm_eps)
            self.cond_kv = nn.Linear(config.cond_dim, 2 * kv_dim, bias=False)
            self.cond_q_norm = norm(dim)
            self.cond_k_norm = norm(kv_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = norm(dim)
        self.k_norm = norm(kv_dim)

    def keys_values(self, cond, drop=None, null=None):
        """Keys and values of the condition (B, S, C), or of null (C,) where drop (B,) is True.

        The norm's weight goes into the matrix, so that in training, where the condition needs no
        gradient, nothing of its size is computed in the backward pass.
        """
        weight = self.cond_kv.weight * self.cond_norm.weight  # (2 * kv_dim, C)

        def project(c):
            return F.linear(F.rms_norm(c, c.shape[-1:], eps=self.cond_norm.eps), weight)

        kv = project(cond)  # (B, S, 2 * kv_dim)
        if drop is not None:
            kv = torch.where(drop[:, None, None], project(null), kv)
        k, v = kv.chunk(2, dim=-1)  # each (B, S, kv_dim)
        return self.cond_k_norm(k), v

    def forward(self, x, rope, condition, keys_values):
        q, k, v, cond_q = self.qkvq(x).split(self.sizes, dim=-1)  # (B, T, dim or kv_dim)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        y = attend(q, k, v, self.head_dim)  # (B, T, n_head, head_dim)
        if self.cross:
            k, v = keys_values or self.keys_values(*condition)
            q = rotate(self.cond_q_norm(cond_q), rope)  # the reference turns it here too
            y = y + self.gate.tanh()[:, None] * attend(q, k, v, self.head_dim)
        return self.out(y.flatten(2))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        a, b = self.w13(x).chunk(2, dim=-1)  # each (B, T, ffn_dim)
        return self.w2(F.silu(a) * b)  # (B, T, dim)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.grid = config.grid
        self.ada = nn.Linear(config.emb_dim, 4 * dim)
        self.norm1 = nn.RMSNorm(dim, eps)
        self.norm2 = nn.RMSNorm(dim, eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps)
        self.attn = Attention(config)
        self.conv = None
        if config.conv:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.ffn = FeedForward(config)

    def context(self, cond):
        return self.attn.keys_values(cond)

    def forward(self, x, emb, rope, condition, keys_values):
        """x: (B, T, dim); emb: (B, emb_dim) of time and pooled condition
        condition: what Attention.keys_values takes; keys_values: what it returned, or None"""
        scale1, gate1, scale2, gate2 = self.ada(emb)[:, None].chunk(4, dim=-1)  # each (B, 1, dim)
        if self.conv is not None:
            image = self.norm1(x).transpose(1, 2).unflatten(2, self.grid)  # (B, dim, H, W)
            x = x + self.conv(image).flatten(2).transpose(1, 2)  # (B, T, dim)
        h = self.attn(self.norm1(x) * (1 + scale1), rope, condition, keys_values)
        x = x + gate1.tanh() * self.norm2(h)
        h = self.ffn(self.ffn_norm1(x) * (1 + scale2))
        return x + gate2.tanh() * self.ffn_norm2(h)


class Prior(nn.Module):
    """The exact velocity for Gaussian tokens of covariance basis @ diag(variance) @ basis.T.

    The model adds what more there is, in units of that Gaussian's standard deviation. On the linear
    path, forward() without it is the best linear estimate of the velocity (Bishop 2006, equation
    2.116; with unit variance the preconditioning of Karras et al. 2022, arXiv 2206.00364, table 1).
    Most of what a denoiser learns is this linear part (Wang and Vastola 2024, arXiv 2412.09726), and
    tokens with more channels than the model is wide pass through it whole. Until fit() it stands for
    channels of zero mean and unit variance.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(channels))
        self.register_buffer("variance", torch.ones(channels))

    @torch.no_grad()
    def fit(self, tokens):
        """To tokens (n, D) as the model will be given them."""
        mean = tokens.mean(0)  # (D,)
        covariance = (tokens - mean).T @ (tokens - mean) / len(tokens)  # (D, D)
        variance, basis = torch.linalg.eigh(covariance.double())  # (D,), (D, D)
        variance = variance.clamp(min=1e-4 * variance.mean())
        self.load_state_dict({"mean": mean, "basis": basis, "variance": variance})

    def project(self, x_t, t):
        """The state (B, T, D) at t (B,), less its mean, in the coordinates of the basis."""
        return (x_t - t.view(-1, 1, 1) * self.mean) @ self.basis

    def forward(self, z, t, out):
        """z: from project(); out: what the model adds, (B, T, D) like z -> velocity (B, T, D)."""
        t = t.view(-1, 1, 1)
        power = self.variance * t**2 + (1 - t) ** 2  # the mean square of z, (B, 1, D)
        linear = (self.variance * t - (1 - t)) / power * z
        v = linear + (self.variance / power).sqrt() * out
        return self.mean + v @ self.basis.T


class NextDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, emb_dim, C = config.dim, config.emb_dim, config.cond_dim
        self.x_embed = nn.Linear(config.target_dim, dim)
        self.t_embed = nn.Sequential(
            nn.Linear(256, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.cond_embed = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, emb_dim))
        self.cond_in = nn.Linear(C, dim) if config.conditioning == "aligned" else None
        self.null_cond = nn.Parameter(torch.empty(C))  # stands for "no condition"
        self.prior = Prior(config.target_dim) if config.prior else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_ada = nn.Linear(emb_dim, dim)
        self.final_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.final = nn.Linear(dim, config.target_dim)
        self.init_weights()

    def init_weights(self):
        """The reference's initialization, and zero for what must start silent.

        Linear                weights and biases uniform in +-1 / sqrt(fan_in)
        RMSNorm, LayerNorm    weights 1, biases 0
        gate                  0: cross-attention starts closed
        conv                  0: each block starts without it
        null_cond             0, as BLIP3-o's; training moves ours
        final, with a prior   0: the model starts as the prior
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for p in module.parameters():
                    nn.init.uniform_(p, -bound, bound)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, Attention) and module.cross:
                nn.init.zeros_(module.gate)
            elif isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.null_cond)
        if self.prior is not None:
            for p in self.final.parameters():
                nn.init.zeros_(p)

    def embed_condition(self, cond, drop=None):
        """cond (B, S, C) -> its part of adaLN's embedding (B, emb_dim), and what is added to the
        input's tokens: (B, S, dim) if they are aligned, else None."""
        if drop is not None:
            cond = torch.where(drop[:, None, None], self.null_cond, cond)
        added = None
        if self.cond_in is not None:
            if cond.shape[1] not in (1, self.config.n_tokens):
                raise ValueError(
                    f"{cond.shape[1]} tokens of condition are not on the grid {self.config.grid}: "
                    'train with conditioning="cross"'
                )
            added = self.cond_in(cond)
        return self.cond_embed(cond.mean(1)), added

    def context(self, cond):
        """All that depends on the condition (B, S, C) alone, computed once for a whole trajectory.

        One token stands for the learned null condition: `null_cond.expand(B, 1, -1)`.
        Returns what forward() takes as `context`.
        """
        keys_values = None
        if self.cond_in is None:
            keys_values = [block.context(cond) for block in self.layers]
        return *self.embed_condition(cond), keys_values

    def forward(self, x_t, t, cond=None, drop=None, context=None):
        """
        x_t: (B, T, D) state; t: (B,) in [0, 1], 0 noise and 1 data; cond: (B, S, C)
        drop: (B,), True where the learned null condition replaces cond; None: nowhere
        context: from self.context(cond), instead of cond and drop
        Returns (B, T, D): the prediction (velocity, noise or data: flow.py decides).
        Raises ValueError where the shapes do not fit the config.
        """
        B, T, D = x_t.shape
        config = self.config
        if (T, D) != (config.n_tokens, config.target_dim):
            raise ValueError(
                f"x_t has {T} tokens of {D} channels; "
                f"the model is for a grid of {config.grid} tokens of {config.target_dim} channels"
            )
        if context is None:
            if (cond.shape[0], cond.shape[2]) != (B, config.cond_dim):
                raise ValueError(
                    f"cond has shape {tuple(cond.shape)}; expected ({B}, S, {config.cond_dim})"
                )
            context = *self.embed_condition(cond, drop), None
        cond_emb, added, keys_values = context

        z = x_t if self.prior is None else self.prior.project(x_t, t)
        # under autocast the residual stream stays in float32
        x = self.x_embed(z).to(x_t.dtype)  # (B, T, dim)
        if added is not None:
            x = x + added
        emb = self.t_embed(timestep_embedding(t).to(x.dtype)) + cond_emb  # (B, emb_dim)
        emb = F.silu(emb)
        rope = rope_2d(config, x.device)
        condition = (cond, drop, self.null_cond)
        for i, block in enumerate(self.layers):
            args = (x, emb, rope, condition, keys_values and keys_values[i])
            if config.gradient_checkpointing:
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        x = self.final_norm(x) * (1 + self.final_ada(emb))[:, None]
        out = self.final(x)  # (B, T, D)
        return out if self.prior is None else self.prior(z, t, out)


def flops_per_sample(config, cond_tokens):
    """Floating point operations of the matrix products of a training step for one sample.

    Those of forward and backward pass that the model needs: what gradient_checkpointing computes
    again does not count. Nor does the depthwise convolution, 9 / dim of a projection, whose backward
    pass torch would count as a dense one's.
    """
    config = replace(config, gradient_checkpointing=False, conv=False)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # computes nothing
        x_t = torch.empty(1, config.n_tokens, config.target_dim)
        cond = torch.empty(1, cond_tokens, config.cond_dim)
        NextDiT(config)(x_t, torch.empty(1), cond).sum().backward()
    return counter.get_total_flops()
