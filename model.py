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
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# highest frequency, in radians per token, and theta
ROPE = {"lumina": (1.0, 10000.0), "grid": (3.0, 10.0)}
CHOICES = {"conditioning": ("cross", "aligned"), "rope": tuple(ROPE)}
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
        self.grid = tuple(self.grid)
        sizes = [(name, getattr(self, name)) for name in SIZES]
        sizes += [("grid", size) for size in self.grid]
        for name, size in sizes:
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(choices)}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps} must be between 0 and 1")
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier < math.inf:
            raise ValueError(f"ffn_dim_multiplier={self.ffn_dim_multiplier} must be positive")
        if self.dim % (4 * self.n_head):
            raise ValueError(
                f"dim={self.dim} / n_head={self.n_head} must be a multiple of 4: "
                "2D RoPE rotates pairs per axis"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )

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

    @property
    def n_tokens(self):
        return math.prod(self.grid)  # T

    @property
    def head_dim(self):
        return self.dim // self.n_head

    @property
    def kv_dim(self):
        return self.n_kv_head * self.head_dim

    @property
    def emb_dim(self):
        return min(self.dim, 1024)  # of the embedding of time and pooled condition

    @property
    def ffn_dim(self):
        hidden = int(8 * self.dim / 3)  # SwiGLU has three matrices: 2/3 of the usual 4 * dim
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


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
    i = torch.arange(H * W, device=device)  # (T,)
    positions = torch.stack([i // W, i % W], dim=-1)  # (T, 2), row and column
    angles = positions[:, None] * freqs[:, None]  # (T, head_dim / 4, 2)
    angles = angles.flatten(1)[:, None]  # (T, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn the channel pairs of x (B, T, n, head_dim) by the angles of `rope`, in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, T, n, head_dim / 2)
    y = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return y.flatten(-2).type_as(x)  # (B, T, n, head_dim)


def timestep_embedding(t, dim=256, max_period=10000):
    """(B,) -> (B, dim) sinusoids of the noise level 1000 * (1 - t).

    That is the reference's timestep, which runs from data (0) to noise (1000): so its weights
    work unchanged with our time, which runs from noise to data.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(max_period) * exponents / half)  # (dim / 2,)
    angles = (1000 * (1 - t)).float()[:, None] * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim))  # (B, T, n * head_dim) -> (B, T, n, head_dim)


def attention(q, k, v):
    """q: (B, T, n_head, head_dim), k and v: (B, S, n_kv_head, head_dim) -> q's shape."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n, T or S, head_dim)
    n_rep = q.shape[1] // k.shape[1]
    if n_rep > 1:
        k = k.repeat_interleave(n_rep, dim=1)  # (B, n_head, S, head_dim)
        v = v.repeat_interleave(n_rep, dim=1)
    if q.device.type == "cpu":  # SDPA's kernel for it is up to ten times slower at few tokens
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, n_head, T, S)
        y = scores.softmax(dim=-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2)  # (B, T, n_head, head_dim)


class RMSNorm(nn.RMSNorm):
    """x over the root of its channels' mean square (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def qk_norm(width, config):
    """It spans all heads, as in Lumina-Next."""
    return nn.LayerNorm(width, eps=1e-5) if config.qk_norm else nn.Identity()


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, kv_dim, C, self.eps = config.dim, config.kv_dim, config.cond_dim, config.norm_eps
        self.head_dim, self.grid = config.head_dim, config.grid
        self.cross = config.conditioning == "cross"
        self.split = (dim, kv_dim, kv_dim, dim)[: 4 if self.cross else 3]
        self.ada = nn.Linear(config.emb_dim, 4 * dim)
        self.norm1 = RMSNorm(dim, self.eps)
        self.norm2 = RMSNorm(dim, self.eps)
        self.ffn_norm1 = RMSNorm(dim, self.eps)
        self.ffn_norm2 = RMSNorm(dim, self.eps)
        # queries, keys and values of self-attention and, if there is any, queries of cross-attention
        self.qkvq = nn.Linear(dim, sum(self.split), bias=False)
        if self.cross:
            self.cond_scale = nn.Parameter(torch.empty(C))  # of the condition's RMSNorm
            self.cond_kv = nn.Linear(C, 2 * kv_dim, bias=False)
            self.gate = nn.Parameter(torch.empty(config.n_head))
            self.cond_q_norm = qk_norm(dim, config)
            self.cond_k_norm = qk_norm(kv_dim, config)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = qk_norm(dim, config)
        self.k_norm = qk_norm(kv_dim, config)
        self.conv = None
        if config.conv:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.w13 = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, dim, bias=False)

    def context(self, cond, drop=None, null=None):
        """Keys and values of the condition: they do not depend on x_t or t.

        The scale of the condition's RMSNorm goes into the matrix, so that in training, where the
        condition needs no gradient, nothing of its size is computed in the backward pass.
        """
        weight = self.cond_kv.weight * self.cond_scale  # (2 * kv_dim, C)
        kv = F.linear(F.rms_norm(cond, cond.shape[-1:], eps=self.eps), weight)  # (B, S, 2 * kv_dim)
        if drop is not None:
            null_kv = F.linear(F.rms_norm(null, null.shape, eps=self.eps), weight)  # (2 * kv_dim,)
            kv = torch.where(drop[:, None, None], null_kv, kv)
        k, v = kv.chunk(2, dim=-1)  # each (B, S, kv_dim)
        return split_heads(self.cond_k_norm(k), self.head_dim), split_heads(v, self.head_dim)

    def forward(self, x, emb, rope, condition, keys_values):
        scale1, gate1, scale2, gate2 = self.ada(emb)[:, None].chunk(4, dim=-1)  # each (B, 1, dim)

        if self.conv is not None:
            image = self.norm1(x).transpose(1, 2).unflatten(2, self.grid)  # (B, dim, H, W)
            x = x + self.conv(image).flatten(2).transpose(1, 2)  # (B, T, dim)
        h = self.norm1(x) * (1 + scale1)
        q, k, v, *cond_q = self.qkvq(h).split(self.split, dim=-1)
        q = rotate(split_heads(self.q_norm(q), self.head_dim), rope)
        k = rotate(split_heads(self.k_norm(k), self.head_dim), rope)
        y = attention(q, k, split_heads(v, self.head_dim))  # (B, T, n_head, head_dim)
        if self.cross:
            if keys_values is None:
                # not the method of this name that fully_shard wraps
                keys_values = Block.context(self, *condition)
            cond_k, cond_v = keys_values
            cond_q = split_heads(self.cond_q_norm(*cond_q), self.head_dim)
            cond_q = rotate(cond_q, rope)  # the reference turns the query here too
            y = y + self.gate.tanh()[:, None] * attention(cond_q, cond_k, cond_v)
        x = x + gate1.tanh() * self.norm2(self.out(y.flatten(2)))

        a, b = self.w13(self.ffn_norm1(x) * (1 + scale2)).chunk(2, dim=-1)
        h = F.silu(a.float()).to(a.dtype) * b
        return x + gate2.tanh() * self.ffn_norm2(self.w2(h))


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
        RMSNorm, LayerNorm    weights 1, biases 0; the condition's RMSNorm (cond_scale) 1
        gate                  0: cross-attention starts closed
        conv                  0: each block starts without it
        null_cond             0, as BLIP3-o's; training moves ours
        final, with a prior   0: the model starts as the prior
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
            if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        for block in self.layers:
            if block.cross:
                nn.init.ones_(block.cond_scale)
                nn.init.zeros_(block.gate)
        nn.init.zeros_(self.null_cond)
        if self.prior is not None:
            nn.init.zeros_(self.final.weight)
            nn.init.zeros_(self.final.bias)

    def embed_condition(self, cond, drop=None):
        """cond (B, S, C) -> its part of adaLN's embedding (B, emb_dim), and what is added to the
        input's tokens: (B, S, dim) if they are aligned, else None."""
        pooled = cond.mean(1)  # (B, C)
        if drop is not None:
            pooled = torch.where(drop[:, None], self.null_cond, pooled)
        cond_emb = self.cond_embed(pooled)  # (B, emb_dim)
        if self.cond_in is None:
            return cond_emb, None
        if cond.shape[1] not in (1, self.config.n_tokens):
            raise ValueError(
                f"{cond.shape[1]} tokens of condition are not on the grid {self.config.grid}: "
                'train with conditioning="cross"'
            )
        if drop is not None:
            cond = torch.where(drop[:, None, None], self.null_cond, cond)
        return cond_emb, self.cond_in(cond)

    def context(self, cond):
        """All that depends on the condition (B, S, C) alone, computed once for a whole trajectory.

        One token stands for the learned null condition: `null_cond.expand(B, 1, -1)`.
        Returns what forward() takes as `context`.
        """
        keys_values = [None] * len(self.layers)
        if self.config.conditioning == "cross":
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
            H, W = config.grid
            raise ValueError(
                f"x_t has {T} tokens of {D} channels; "
                f"the model is for {H}x{W} of {config.target_dim}"
            )
        if context is None:
            if cond.shape[0] != B or cond.shape[-1] != config.cond_dim:
                raise ValueError(
                    f"cond has shape {tuple(cond.shape)}; expected ({B}, S, {config.cond_dim})"
                )
            cond_emb, added = self.embed_condition(cond, drop)
            keys_values = [None] * len(self.layers)
        else:
            cond_emb, added, keys_values = context

        z = x_t if self.prior is None else self.prior.project(x_t, t)
        x = self.x_embed(z)  # (B, T, dim)
        x = x.to(self.null_cond.dtype)  # under autocast the residual stream stays in float32
        if added is not None:
            x = x + added
        t_emb = self.t_embed(timestep_embedding(t).to(x.dtype))  # (B, emb_dim)
        emb = F.silu(t_emb + cond_emb)
        rope = rope_2d(config, x.device)
        recompute = config.gradient_checkpointing and torch.is_grad_enabled()
        for block, block_keys_values in zip(self.layers, keys_values):
            args = (x, emb, rope, (cond, drop, self.null_cond), block_keys_values)
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
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
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = NextDiT(config)
        x_t = torch.empty(1, config.n_tokens, config.target_dim)
        t = torch.empty(1)
        cond = torch.empty(1, cond_tokens, config.cond_dim)
    with FlopCounterMode(display=False) as counter:
        model(x_t, t, cond).sum().backward()
    return counter.get_total_flops()
