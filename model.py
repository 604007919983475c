"""
NextDiT: the diffusion transformer of Lumina-Next (Zhuo et al. 2024, arXiv 2406.18583), as
BLIP3-o (Chen et al. 2025, arXiv 2505.09568) uses it on grids of image-token embeddings.

    model = NextDiT(NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280, dim=512, n_layer=6, n_head=8))
    out = model(x_t, t, cond)    # (B, T, D), (B,), (B, S, C) -> (B, T, D)

Per block: RMSNorm before and after each sublayer (sandwich), scale and tanh gate from time
and pooled condition (adaLN), self-attention with 2D RoPE and QK-norm whose output is summed
with that of a gated cross-attention to the condition, and a SwiGLU feed-forward. Structure
and initialization are those of diffusers' LuminaNextDiT2DModel; projections that read the
same input are fused into one matrix. What train.py has by default besides (`conditioning="aligned"`,
`conv`, `prior`) each earned its place in RECORDS.md. Shapes: B batch, T target tokens, S condition tokens.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import exchange


def pick_device(name):
    """'auto' as cuda, else mps, else cpu; any other name if this machine has it, else ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, there in has.items() if there)
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name) or not has[name.split(":")[0]]:
        raise ValueError(
            f"device={name!r}: this machine has {', '.join(kind for kind, there in has.items() if there)}"
        )
    return name


ROPE = {
    "lumina": (1.0, 10000.0),
    "grid": (3.0, 10.0),
}  # highest frequency, radians a token, and theta


@dataclass
class NextDiTConfig:
    grid: tuple[int, int]  # (H, W) of the target tokens, T = H * W
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
    conditioning: str = (
        "cross"  # cross: attention to the condition | aligned: its token i is added to token i
    )
    conv: bool = False  # a depthwise 3x3 convolution of the grid before each block
    rope: str = (
        "lumina"  # RoPE's frequencies: lumina, as in texts | grid, for a few rows and columns
    )
    prior: bool = False  # see Prior; the output is then the velocity on the linear path
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        names = ("target_dim", "cond_dim", "dim", "n_layer", "n_head", "n_kv_head", "multiple_of")
        for name, size in [
            *((name, getattr(self, name)) for name in names),
            *(("grid", n) for n in self.grid),
        ]:
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        self.grid = tuple(self.grid)
        for name, known in dict(conditioning=("cross", "aligned"), rope=ROPE).items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; it is one of {', '.join(known)}"
                )
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps} must be between 0 and 1")
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier < math.inf:
            raise ValueError(f"ffn_dim_multiplier={self.ffn_dim_multiplier} must be positive")
        if self.dim % self.n_head or (self.dim // self.n_head) % 4:
            raise ValueError(
                f"dim={self.dim} / n_head={self.n_head} must be a multiple of 4: 2D RoPE rotates pairs per axis"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
            )

    @classmethod
    def of(cls, settings, data):
        """From train.py's settings and the arrays of a dataset (prepare.open_dataset), which decide what is open."""
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
    def ffn_dim(self):
        hidden = int(8 * self.dim / 3)  # SwiGLU has three matrices: 2/3 of the usual 4 * dim
        hidden = int((1 if self.ffn_dim_multiplier is None else self.ffn_dim_multiplier) * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


def rope_2d(head_dim, grid, device=None, kind="lumina"):
    """2D rotary embedding (Su et al. 2021, per axis as in Lumina-Next): (T, head_dim / 2, 2) cosines and sines.

    The pair of channels (2j, 2j + 1) turns with the row for even j and with the column for odd j, both at
    frequency highest * theta^(-4k / head_dim), k = j // 2.
    """
    (H, W), (highest, theta) = grid, ROPE[kind]
    freqs = highest / theta ** (
        torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    )
    rows = torch.arange(H, device=device).repeat_interleave(W)
    cols = torch.arange(W, device=device).repeat(H)
    angles = torch.stack([rows[:, None] * freqs, cols[:, None] * freqs], dim=-1).flatten(1)
    if torch.compiler.is_compiling():  # inductor has no complex numbers
        return torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.view_as_real(
        torch.polar(torch.ones_like(angles), angles)
    )  # the reference's to the last bit


def rotate(x, rope):
    """x: (B, T, n, head_dim), its channel pairs turned by the angles of `rope`, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rope[:, None].unbind(-1)
        y = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        y = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None])
    return y.flatten(-2).type_as(x)


def attention(q, k, v, mask=None, plain=None):
    """q: (B, n, T, h), k and v: (B, n_kv, S, h), mask: (B, 1, 1, S) or None -> (B, n, T, h).

    plain: two products and a softmax instead of SDPA; None: on a CPU, where SDPA's kernel, made for long sequences,
    is up to ten times slower at a few hundred tokens; but not in float64, which is for exact comparisons.
    """
    n_rep = q.shape[1] // k.shape[1]
    if not (q.device.type == "cpu" and q.dtype != torch.float64 if plain is None else plain):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=n_rep > 1)
    if n_rep > 1:
        k, v = k.repeat_interleave(n_rep, 1), v.repeat_interleave(n_rep, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v


def timestep_embedding(t, dim=256, max_period=10000):
    """(B,) -> (B, dim) sinusoids of the noise level 1000 * (1 - t).

    The argument is the reference's timestep, which runs from data (0) to noise (1000): with
    it, its weights need no change to be used under our time, which runs from noise to data.
    """
    freqs = torch.exp(
        -math.log(max_period)
        * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
        / (dim // 2)
    )
    angles = (1000 * (1 - t)).float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rms_norm(x, eps, weight=None):
    """x over the root of its channels' mean square (Zhang and Sennrich 2019), times weight, in x's dtype."""
    if x.dtype == torch.float64:  # as the reference does, which knows no variance but in float32
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.eps, self.weight)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, C, self.eps = config.dim, config.cond_dim, config.norm_eps
        self.n_head, self.n_kv_head, self.head_dim = (
            config.n_head,
            config.n_kv_head,
            dim // config.n_head,
        )
        kv_dim, self.grid = self.n_kv_head * self.head_dim, config.grid
        self.cross = config.conditioning == "cross"
        self.split = (dim, kv_dim, kv_dim, dim)[: 4 if self.cross else 3]
        self.ada = nn.Linear(min(dim, 1024), 4 * dim)
        self.norm1, self.norm2 = RMSNorm(dim, self.eps), RMSNorm(dim, self.eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, self.eps), RMSNorm(dim, self.eps)
        # QK-norm spans all heads, as in Lumina-Next
        norm = (
            (lambda width: nn.LayerNorm(width, 1e-5))
            if config.qk_norm
            else (lambda width: nn.Identity())
        )
        # queries, keys and values of self-attention and, if there is any, the queries of cross-attention
        self.qkvq = nn.Linear(dim, sum(self.split), bias=False)
        if self.cross:
            self.cond_scale = nn.Parameter(torch.empty(C))  # of the condition's RMSNorm
            self.cond_kv = nn.Linear(C, 2 * kv_dim, bias=False)
            self.gate = nn.Parameter(torch.empty(config.n_head))
            self.cond_q_norm, self.cond_k_norm = norm(dim), norm(kv_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = norm(dim), norm(kv_dim)
        self.conv = (
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False) if config.conv else None
        )
        self.w13 = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, dim, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, n * head_dim) -> (B, T, n, head_dim)

    def attend(self, q, k, v, mask=None):
        return attention(*(z.transpose(1, 2) for z in (q, k, v)), mask).transpose(
            1, 2
        )  # (B, T, n_head, head_dim)

    def context(self, cond, drop=None, null=None):
        """Keys and values of the condition: they do not depend on x_t or t.

        The scale of the condition's RMSNorm goes into the matrix, so that in training, where the condition needs
        no gradient, nothing of its size is computed in the backward pass. One null token stands for all.
        """
        weight = self.cond_kv.weight * self.cond_scale
        kv = F.linear(rms_norm(cond, self.eps), weight)
        if drop is not None:
            kv = torch.where(drop[:, None, None], F.linear(rms_norm(null, self.eps), weight), kv)
        k, v = kv.chunk(2, dim=-1)
        return self.heads(self.cond_k_norm(k)), self.heads(v)

    def forward(self, x, emb, rope, mask, condition, context):
        scale1, gate1, scale2, gate2 = self.ada(emb)[:, None].chunk(4, dim=-1)  # each (B, 1, dim)

        if self.conv is not None:
            x = x + self.conv(self.norm1(x).transpose(1, 2).unflatten(2, self.grid)).flatten(
                2
            ).transpose(1, 2)
        h = self.norm1(x) * (1 + scale1)
        q, k, v, *cond_q = self.qkvq(h).split(self.split, dim=-1)
        q, k = rotate(self.heads(self.q_norm(q)), rope), rotate(self.heads(self.k_norm(k)), rope)
        y = self.attend(q, k, self.heads(v))
        if self.cross:
            cond_k, cond_v = context or Block.context(
                self, *condition
            )  # not the method that fully_shard wraps
            cond_q = rotate(
                self.heads(self.cond_q_norm(*cond_q)), rope
            )  # the reference turns the query here too
            y = y + self.gate.tanh()[:, None] * self.attend(cond_q, cond_k, cond_v, mask)
        x = x + gate1.tanh() * self.norm2(self.out(y.flatten(2)))

        a, b = self.w13(self.ffn_norm1(x) * (1 + scale2)).chunk(2, dim=-1)
        return x + gate2.tanh() * self.ffn_norm2(self.w2(F.silu(a.float()).to(a.dtype) * b))


class Prior(nn.Module):
    """The velocity that is exact for Gaussian tokens of covariance basis @ diag(variance) @ basis.T; the model adds
    what more there is, in units of that Gaussian's standard deviation.

    On the linear path the best linear estimate of the velocity is forward() (Bishop 2006, equation 2.116; with unit
    variance the preconditioning of Karras et al. 2022, arXiv 2206.00364, table 1). Most of what a denoiser learns is
    this linear part (Wang and Vastola 2024, arXiv 2412.09726), and tokens of more channels than the model is wide
    pass through it whole. Until fit() it stands for channels of zero mean and unit variance.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(channels))
        self.register_buffer("variance", torch.ones(channels))

    @torch.no_grad()
    def fit(self, tokens):
        """From tokens (n, D) as the model will be given them."""
        mean = tokens.mean(0)
        covariance = (tokens - mean).T @ (tokens - mean) / len(tokens)
        variance, basis = torch.linalg.eigh(covariance.double())
        self.load_state_dict(
            {"mean": mean, "basis": basis, "variance": variance.clamp(min=1e-4 * variance.mean())}
        )

    def rotate(self, x_t, t):
        """(B, T, D) state at t (B,) -> (B, T, D) less its mean, in the coordinates of the basis."""
        return (x_t - t.view(-1, 1, 1) * self.mean) @ self.basis

    def forward(self, z, t, out):
        """z: of rotate(); out: what the model adds, in the same coordinates -> velocity (B, T, D)."""
        t = t.view(-1, 1, 1)
        power = self.variance * t**2 + (1 - t) ** 2  # of z
        v = (self.variance * t - (1 - t)) / power * z + (self.variance / power).sqrt() * out
        return self.mean + v @ self.basis.T


class NextDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, C, width = config.dim, config.cond_dim, min(config.dim, 1024)  # width of adaLN's input
        self.x_embed = nn.Linear(config.target_dim, dim)
        self.t_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.cond_embed = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, width))
        self.cond_in = nn.Linear(C, dim) if config.conditioning == "aligned" else None
        self.null_cond = nn.Parameter(torch.empty(C))  # stands for "no condition" at every token
        self.prior = Prior(config.target_dim) if config.prior else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_ada = nn.Linear(width, dim)
        self.final_norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.final = nn.Linear(dim, config.target_dim)
        self.init_weights()

    def init_weights(self):
        """The reference's initialization: all Linear layers uniform in +-1/sqrt(fan_in),
        norms 1, and what must start silent at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
        for block in self.layers:
            if block.cross:
                nn.init.zeros_(block.gate)  # cross-attention starts closed
                nn.init.ones_(block.cond_scale)
            if block.conv is not None:
                nn.init.zeros_(block.conv.weight)
        if self.prior is not None:  # where the model starts
            nn.init.zeros_(self.final.weight)
            nn.init.zeros_(self.final.bias)
        nn.init.zeros_(self.null_cond)  # BLIP3-o's null condition is zero; training moves ours

    def context(self, cond, cond_mask=None):
        """All that depends on the condition alone, computed once for a whole trajectory.

        cond (B, S, C), cond_mask (B, S) True where a token counts. The learned null condition is
        `null_cond.expand(B, 1, -1)`. Returns what forward() takes as `context`.
        """
        whole, condition = self._condition(cond, cond_mask, None)
        return whole, [block.context(*condition) if block.cross else None for block in self.layers]

    def _condition(self, cond, cond_mask, drop):
        """(embedding of the pooled condition, mask of its tokens, what is added to the input's tokens), and what
        Block.context makes keys and values of."""
        if self.cond_in is not None and cond.shape[1] not in (1, math.prod(self.config.grid)):
            raise ValueError(f"{cond.shape[1]} tokens of condition are not on the grid {self.config.grid}: "
                             'train with conditioning="cross"')  # fmt: skip
        null = None if drop is None else self.null_cond.to(cond.dtype)
        if cond_mask is None:
            pooled, mask = cond.mean(1), None
        else:
            weight = cond_mask.to(cond.dtype)[..., None]
            pooled, mask = (cond * weight).sum(1) / weight.sum(1), cond_mask.bool()[:, None, None]
        if drop is not None:
            pooled = torch.where(drop[:, None], null, pooled)
            mask = None if mask is None else mask | drop[:, None, None, None]
        added = None
        if self.cond_in is not None:  # tokens that do not count are as if there were no condition
            added = cond if drop is None else torch.where(drop[:, None, None], null, cond)
            added = (
                added
                if cond_mask is None
                else torch.where(cond_mask.bool()[..., None], added, self.null_cond)
            )
            added = self.cond_in(added)
        return (self.cond_embed(pooled), mask, added), (cond, drop, null)

    def forward(self, x_t, t, cond=None, cond_mask=None, drop=None, context=None):
        """
        x_t: (B, T, D) state; t: (B,) in [0, 1], 0 noise and 1 data; cond: (B, S, C)
        cond_mask: (B, S), True where a condition token counts; None: all do
        drop: (B,), True where the learned null condition replaces cond; None: nowhere
        context: from self.context(...), instead of the three above
        Returns (B, T, D): the prediction (velocity, noise or data: flow.py decides).
        Raises ValueError where the shapes do not fit the config.
        """
        (B, T, D), config = x_t.shape, self.config
        if (T, D) != (math.prod(config.grid), config.target_dim):
            H, W = config.grid
            raise ValueError(
                f"x_t has {T} tokens of {D} channels; the model is for {H}x{W} of {config.target_dim}"
            )
        if context is None:
            if cond.shape[0] != B or cond.shape[-1] != config.cond_dim:
                raise ValueError(
                    f"cond has shape {tuple(cond.shape)}; expected ({B}, S, {self.config.cond_dim})"
                )
            whole, condition = self._condition(cond, cond_mask, drop)
            contexts = [None] * len(self.layers)
        else:
            (whole, contexts), condition = context, None
        pooled, mask, added = whole

        z = x_t if self.prior is None else self.prior.rotate(x_t, t)
        x = self.x_embed(z).to(
            self.null_cond.dtype
        )  # under autocast the residual stream stays in float32
        x = x if added is None else x + added
        emb = F.silu(self.t_embed(timestep_embedding(t).to(x.dtype)) + pooled)
        rope = rope_2d(config.dim // config.n_head, config.grid, x.device, config.rope)
        for block, block_context in zip(self.layers, contexts):
            args = (x, emb, rope, mask, condition, block_context)
            recompute = config.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        out = self.final(self.final_norm(x) * (1 + self.final_ada(emb))[:, None])
        return out if self.prior is None else self.prior(z, t, out)

    @classmethod
    def from_diffusers(cls, folder, grid=None, cast=lambda parameter: parameter):
        """The model in a folder of diffusers' LuminaNextDiT2DModel: see exchange.py."""
        return exchange.from_diffusers(
            lambda **sizes: cls(NextDiTConfig(**sizes)), folder, grid, cast
        )

    def to_diffusers(self, folder):
        """Write what diffusers' LuminaNextDiT2DModel.from_pretrained reads: see exchange.py."""
        exchange.to_diffusers(self, folder)
