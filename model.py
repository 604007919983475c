"""
NextDiT: the diffusion transformer of Lumina-Next (Zhuo et al. 2024, arXiv 2406.18583), as
BLIP3-o (Chen et al. 2025, arXiv 2505.09568) uses it on grids of image-token embeddings.

    config = NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280, dim=512, n_layer=6, n_head=8)
    model = NextDiT(config)
    out = model(x_t, t, cond)    # (B, T, D), (B,), (B, S, C) -> (B, T, D)

A block is self-attention with 2D RoPE and QK-norm, plus gated cross-attention to the condition,
then a SwiGLU feed-forward. RMSNorm stands before and after each (sandwich); time and pooled
condition set a scale and a tanh gate for each (adaLN). Structure and initialization are those of
diffusers' LuminaNextDiT2DModel, with cond_projection those of BLIP3-o's model of that name.
train.py's defaults differ (conditioning="aligned", conv, rope="grid", prior): RECORDS.md says why.

Shapes: B batch, T = H * W target tokens, D their channels, S condition tokens, C their channels.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

LinearNoBias = partial(nn.Linear, bias=False)  # of attention and feed-forward
ROPE = {  # highest frequency, in radians per token, and theta
    "lumina": (1.0, 10000.0),  # as in texts
    "grid": (3.0, 10.0),  # for few rows and columns
}


@dataclass
class NextDiTConfig:
    grid: tuple[int, int]  # (H, W) of the target tokens
    target_dim: int  # D
    cond_dim: int  # C
    dim: int = 1792
    n_layer: int = 24
    n_head: int = 28
    n_kv_head: int | None = None  # None: as many as n_head; fewer: grouped-query attention
    ffn_dim: int | None = None  # the feed-forward's width; None: 8/3 dim, by the next two
    multiple_of: int = 256  # rounds it up to a multiple
    ffn_dim_multiplier: float | None = None  # scales it
    norm_eps: float = 1e-5
    qk_norm: bool = True
    # cross: attention to the condition | aligned: condition token i is added to target token i
    conditioning: str = "cross"
    cond_projection: bool = False  # two layers make dim channels of each condition token first
    conv: bool = False  # a depthwise 3x3 convolution on the grid, at the start of each block
    rope: str = "lumina"  # frequencies of RoPE, see ROPE: lumina | grid
    prior: bool = False  # add the velocity of a linear-Gaussian model, see Prior
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
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
        self.emb_dim = min(self.dim, 1024)  # of the embedding of time and pooled condition
        self.cond_width = self.dim if self.cond_projection else self.cond_dim  # in the model
        if self.ffn_dim is None:  # SwiGLU has three matrices: 2/3 of the usual 4 * dim
            scale = self.ffn_dim_multiplier or 1
            hidden = max(1, int(scale * (8 * self.dim // 3)))
            self.ffn_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)


def rope_2d(config, device):
    """Cosines and sines of a 2D rotary embedding, each (T, 1, head_dim), for rotate().
    Channels (2j, 2j + 1) turn with the row for even j, with the column for odd j, at frequency
    highest * theta^(-4k / head_dim), k = j // 2: Su et al. 2021 (arXiv 2104.09864), per axis."""
    highest, theta = ROPE[config.rope]
    half = config.head_dim // 2
    exponents = torch.arange(0, half, 2, device=device) / half  # (head_dim / 4,)
    freqs = highest / theta**exponents
    axes = [torch.arange(n, device=device) for n in config.grid]  # rows and columns
    positions = torch.cartesian_prod(*axes)  # (T, 2)
    angles = positions[:, None, None] * freqs[:, None]  # (T, 1, head_dim / 4, 2)
    angles = angles.flatten(2).repeat_interleave(2, -1)  # (T, 1, head_dim)
    sin = angles.sin()
    sin[..., ::2] *= -1  # the first channel of a pair turns away from the second
    return angles.cos(), sin


def rotate(x, rope):
    """Turn the channel pairs of each head of x (B, T, n * head_dim) by the angles of `rope`."""
    cos, sin = rope  # each (T, 1, head_dim)
    heads = x.float().unflatten(-1, (-1, cos.shape[-1]))  # (B, T, n, head_dim)
    # pairs exchanged by roll: of slices, inductor would make a backward pass several times slower
    pairs = heads.unflatten(-1, (-1, 2))
    other = pairs.roll(1, -1).flatten(3)
    turned = heads * cos + other * sin
    return turned.flatten(2).type_as(x)


def timestep_embedding(t):
    """(B,) -> (B, 256): sinusoids of the reference's time, which is 1000 * (1 - t)."""
    exponents = torch.arange(128, device=t.device) / 128
    freqs = torch.exp(-math.log(10000) * exponents)  # (128,)
    angles = (1000 * (1 - t)).float()[:, None] * freqs  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


def attend(q, k, v, head_dim):
    """(B, T, n_head * head_dim), (B, S, n_kv_head * head_dim) twice -> (B, T, n_head, head_dim)."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))  # (B, n, ., h)
    grouped = q.shape[1] > k.shape[1]  # several heads share keys and values
    if q.is_cpu and not grouped:  # where SDPA is up to ten times slower
        scores = (q * head_dim**-0.5) @ k.mT  # (B, n_head, T, S)
        y = scores.softmax(-1) @ v  # (B, n_head, T, head_dim)
    else:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    # self-attention, plus gated cross-attention to the condition if conditioning is "cross"
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        kv_dim = config.n_kv_head * config.head_dim
        norm = nn.LayerNorm if config.qk_norm else nn.Identity  # spans all heads, as in Lumina-Next
        self.head_dim = config.head_dim
        self.cross = config.conditioning == "cross"
        self.sizes = [dim, kv_dim, kv_dim, dim if self.cross else 0]
        self.qkvq = LinearNoBias(dim, sum(self.sizes))
        if self.cross:
            self.gate = nn.Parameter(torch.empty(config.n_head))
            self.cond_norm = nn.RMSNorm(config.cond_width)  # keys_values uses its weight alone
            self.cond_kv = LinearNoBias(config.cond_width, 2 * kv_dim)
            self.cond_q_norm = norm(dim)
            self.cond_k_norm = norm(kv_dim)
        self.out = LinearNoBias(dim, dim)
        self.q_norm = norm(dim)
        self.k_norm = norm(kv_dim)

    def keys_values(self, cond):
        """Of normalized condition tokens (B, S, C or dim). The norm's weight is in the matrix."""
        weight = self.cond_kv.weight * self.cond_norm.weight  # (2 * kv_dim, C)
        k, v = F.linear(cond, weight).chunk(2, -1)  # each (B, S, kv_dim)
        return self.cond_k_norm(k), v

    def forward(self, x, rope, condition):
        q, k, v, cond_q = self.qkvq(x).split(self.sizes, -1)  # (B, T, dim or kv_dim)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        y = attend(q, k, v, self.head_dim)  # (B, T, n_head, head_dim)
        if self.cross:
            if torch.is_tensor(condition):  # else they were computed before
                condition = self.keys_values(condition)
            k, v = condition
            q = rotate(self.cond_q_norm(cond_q), rope)  # the reference turns it here too
            gate = self.gate.tanh()[:, None]  # (n_head, 1)
            y = y + gate * attend(q, k, v, self.head_dim)
        return self.out(y.flatten(2))  # (B, T, dim)


class FeedForward(nn.Module):
    # SwiGLU (Shazeer 2020, arXiv 2002.05202)
    def __init__(self, config):
        super().__init__()
        self.w13 = LinearNoBias(config.dim, 2 * config.ffn_dim)
        self.w2 = LinearNoBias(config.ffn_dim, config.dim)

    def forward(self, x):
        a, b = self.w13(x).chunk(2, -1)  # each (B, T, ffn_dim)
        return self.w2(F.silu(a) * b)  # (B, T, dim)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        norm = partial(nn.RMSNorm, dim, config.norm_eps)
        self.grid = config.grid
        self.ada = nn.Linear(config.emb_dim, 4 * dim)
        self.norm1 = norm()
        self.norm2 = norm()
        self.ffn_norm1 = norm()
        self.ffn_norm2 = norm()
        self.attn = Attention(config)
        self.conv = None
        if config.conv:
            self.conv = nn.Conv2d(
                dim,
                dim,
                kernel_size=3,
                padding=1,
                groups=dim,
                bias=False,
            )
        self.ffn = FeedForward(config)

    def context(self, cond):
        return self.attn.keys_values(cond)

    def forward(self, x, emb, rope, condition):
        """x: (B, T, dim); emb: (B, emb_dim); condition: what Attention.keys_values takes, or what
        it returned in an earlier call; None if the conditioning is aligned"""
        modulation = self.ada(emb)[:, None]  # (B, 1, 4 * dim)
        scale1, gate1, scale2, gate2 = modulation.chunk(4, -1)
        if self.conv:
            image = self.norm1(x).mT.unflatten(2, self.grid)  # (B, dim, H, W)
            x = x + self.conv(image).flatten(2).mT  # (B, T, dim)
        h = self.norm1(x) * (1 + scale1)
        h = self.attn(h, rope, condition)
        x = x + gate1.tanh() * self.norm2(h.type_as(x))
        h = self.ffn_norm1(x) * (1 + scale2)
        h = self.ffn(h)
        return x + gate2.tanh() * self.ffn_norm2(h.type_as(x))


class Prior(nn.Module):
    """A linear-Gaussian model of the targets of a condition, and the velocity that follows from it.

    A target is mean(cond) plus Gaussian noise on the whole grid. A principal component of this
    noise is a pattern over places times one over channels, with a variance of its own. On the
    linear path the velocity is then known (Bishop 2006, equation 2.116), and it is most of what a
    denoiser learns (Wang and Vastola 2024, arXiv 2412.09726). NextDiT's blocks add the rest: so
    tokens wider than the model need not pass through it whole, and neighbours share noise from the
    start.
    """

    def __init__(self, grid, target_dim, cond_dim):
        super().__init__()
        self.grid = grid
        T = math.prod(grid)
        self.register_buffer("weight", torch.zeros(1 + 2 * cond_dim, target_dim))
        self.register_buffer("places", torch.eye(T))
        self.register_buffer("channels", torch.eye(target_dim))
        self.register_buffer("variance", torch.ones(T, target_dim))

    def inputs(self, cond):
        """(B, S, C) -> (B, T, 1 + 2 * C) of the linear regression: 1, the condition's token at a
        token's place, and the mean of the 3x3 tokens around that. Where the condition is on no such
        grid, the mean of all its tokens stands for each."""
        T = len(self.places)
        if cond.shape[1] != T:
            cond = cond.mean(1, keepdim=True).expand(-1, T, -1)
        image = cond.mT.unflatten(2, self.grid)  # (B, C, H, W)
        around = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
        x = torch.cat([cond, around.flatten(2).mT], -1)
        return F.pad(x, (1, 0), value=1.0)

    def mean(self, cond):
        """(B, S, C) -> (B, T, D)"""
        return self.inputs(cond) @ self.weight

    def add(self, mean, z):
        """mean (..., T, D) plus the deviation whose coordinates in the principal components are z
        (..., T, D). With z = variance.sqrt() * noise that draws a target."""
        return mean + self.places @ z @ self.channels.T

    def forward(self, x_t, t, mean):
        """The velocity (B, T, D) at the state x_t (B, T, D) and t (B, 1, 1)."""
        z = self.places.T @ (x_t - t * mean) @ self.channels
        power = self.variance * t**2 + (1 - t) ** 2  # the mean square of z
        linear = (self.variance * t - (1 - t)) / power * z
        return self.add(mean, linear)

    @torch.no_grad()
    def fit(self, read, n, tokens=262144):
        """To n training samples: read(rows) -> their targets (B, T, D) and conditions (B, S, C).

        The mean is a ridge regression. Every fifth batch, up to 16 of them, is held out to choose
        its penalty, and the noise is fitted to what the mean leaves of these. Sums over batches
        are in float64, on the CPU, since not every device has that.
        tokens: at most so many are used, of samples evenly spaced. With too few the mean, and then
            the model, is over-fitted to them. If there are more, every second token of a sample is
            left out first, since neighbours are alike
        """
        T, D = self.variance.shape
        K = len(self.weight)
        stride = 2 if n * T > tokens else 1
        rows = torch.arange(0, n, math.ceil(n * T / (stride * tokens)))
        xx = np.zeros((K, K))
        xy = np.zeros((K, D))
        held_out = []
        size = min(32, math.ceil(n / 10))
        for i, batch in enumerate(rows.split(size)):
            target, cond = read(batch.numpy())
            x = self.inputs(cond.cpu())  # (B, T, K)
            y = target.cpu()  # (B, T, D)
            if i % 5 == 0 and len(held_out) < 16:
                held_out.append((x, y))
            else:
                x, y = (v.flatten(0, 1)[i % stride :: stride].numpy() for v in (x, y))
                xx += x.T @ x  # which takes NumPy half as long as torch, since it is symmetric
                xy += x.T @ y
        xx, xy = map(torch.from_numpy, (xx, xy))
        penalty = (xx.trace() + 1e-6) * torch.eye(K)
        penalty[0, 0] *= 1e-9  # the constant is not shrunk

        x, y = map(torch.cat, zip(*held_out))  # (n, T, K), (n, T, D)
        least = math.inf
        for exponent in range(-8, 1):
            weight = torch.linalg.solve(xx + 10.0**exponent * penalty, xy).type_as(x)
            error = (y - x @ weight).square().sum()
            if error < least:
                least = error
                self.weight.copy_(weight)
        rest = y - x @ self.weight
        for components, equation in (
            (self.places, "ntd,nsd->ts"),
            (self.channels, "ntd,nte->de"),
        ):
            moments = torch.einsum(equation, rest, rest)
            _, vectors = torch.linalg.eigh(moments.double())
            components.copy_(vectors)
        z = self.places.T @ rest @ self.channels
        variance = z.square().mean(0)  # (T, D)
        least = 1e-4 * variance.mean()
        self.variance.copy_(variance.clamp(min=least))


class NextDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.dim
        emb_dim = config.emb_dim
        self.x_embed = nn.Linear(config.target_dim, dim)
        self.t_embed = nn.Sequential(
            nn.Linear(256, emb_dim),
            nn.SiLU(),
            nn.Linear(emb_dim, emb_dim),
        )
        self.cond_projection = nn.Identity()
        if config.cond_projection:  # as PixArt-alpha's (Chen et al. 2023, arXiv 2310.00426)
            self.cond_projection = nn.Sequential(
                nn.Linear(config.cond_dim, dim),
                nn.GELU("tanh"),
                nn.Linear(dim, dim),
            )
        self.cond_embed = nn.Sequential(
            nn.LayerNorm(config.cond_width),
            nn.Linear(config.cond_width, emb_dim),
        )
        self.cond_in = None
        if config.conditioning == "aligned":
            self.cond_in = nn.Linear(config.cond_width, dim)
        self.null_cond = nn.Parameter(torch.empty(config.cond_dim))  # stands for "no condition"
        self.prior = None
        if config.prior:
            self.prior = Prior(config.grid, config.target_dim, config.cond_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_ada = nn.Linear(emb_dim, dim)
        self.final = nn.Linear(dim, config.target_dim)
        self.init_weights()

    def init_weights(self):
        """The reference's initialization, which is torch's, and zero for what must start silent.

        Linear                weights and biases uniform in +-1 / sqrt(fan_in)
        RMSNorm, LayerNorm    weights 1, biases 0
        gate, conv            0: blocks start without cross-attention and convolution
        null_cond             0, as BLIP3-o's, which training does not move
        final, with a prior   0: the model starts as the prior
        anything else         torch's own: nn.Embedding, say, from N(0, 1)
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        silent = ("gate", "conv.weight", "null_cond")
        if self.prior:
            silent += ("final.weight", "final.bias")
        for name, p in self.named_parameters():
            if name.endswith(silent):
                nn.init.zeros_(p)

    def embed_condition(self, cond, keys_values=False):
        """cond (B, S, C) -> its part of adaLN's input (B, emb_dim); what is added to the target's
        tokens (B, S, dim) if aligned, else None; for each block its normalized tokens for
        attention or, with keys_values, its keys and values, None if aligned; and the prior's mean
        (B, T, D), if there is a prior."""
        mean = self.prior.mean(cond.detach()) if self.prior else None
        cond = self.cond_projection(cond)  # (B, S, C or dim)
        added = None
        conditions = [None] * len(self.layers)
        if self.cond_in is None:
            x = F.rms_norm(cond, cond.shape[-1:], eps=self.config.norm_eps)
            conditions = [block.context(x) if keys_values else x for block in self.layers]
        elif cond.shape[1] in (1, self.config.n_tokens):
            added = self.cond_in(cond)
        else:
            raise ValueError(
                f"{cond.shape[1]} tokens of condition are not on the grid {self.config.grid}: "
                'train with conditioning="cross"'
            )
        cond_emb = self.cond_embed(cond.mean(1))  # (B, emb_dim)
        return cond_emb, added, conditions, mean

    def context(self, cond):
        """What depends on cond (B, S, C) alone, for forward(): computed once per trajectory. The
        null condition is one token, `null_cond.expand(B, 1, -1)`."""
        return self.embed_condition(cond, keys_values=True)

    def forward(self, x_t, t, cond=None, drop=None, context=None):
        """
        x_t: (B, T, D) state; t: (B,) in [0, 1], 0 noise and 1 data; cond: (B, S, C)
        drop: (B,), True where null_cond replaces cond; None: nowhere
        context: from self.context(cond), instead of cond and drop
        Returns (B, T, D): the prediction (velocity, noise or data: flow.py decides).
        """
        config = self.config
        if x_t.shape[1] != config.n_tokens:
            raise ValueError(
                f"x_t has {x_t.shape[1]} tokens; the model is for a grid of {config.grid}"
            )
        if context is None:
            if drop is not None:
                cond = torch.where(drop[:, None, None], self.null_cond, cond)
            context = self.embed_condition(cond)
        cond_emb, added, conditions, mean = context
        t_emb = timestep_embedding(t).type_as(x_t)  # (B, 256)
        emb = F.silu(self.t_embed(t_emb) + cond_emb)  # (B, emb_dim)
        # under autocast the residual stream stays in float32
        x = self.x_embed(x_t).type_as(x_t)  # (B, T, dim)
        if added is not None:
            x = x + added
        rope = rope_2d(config, x.device)
        for block, condition in zip(self.layers, conditions):
            if config.gradient_checkpointing:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, emb, rope, condition)
        scale = self.final_ada(emb)[:, None]  # (B, 1, dim)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        out = self.final(x * (1 + scale))  # (B, T, D)
        if self.prior:
            out = out + self.prior(x_t, t[:, None, None], mean)
        return out


def flops_per_sample(config, cond_tokens):
    """Floating point operations of a training step's matrix products, forward and backward; not
    those that gradient_checkpointing repeats, nor the depthwise convolution's, which are few."""
    config = replace(config, gradient_checkpointing=False, conv=False)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # computes nothing
        x_t = torch.empty(1, config.n_tokens, config.target_dim)
        cond = torch.empty(1, cond_tokens, config.cond_dim)
        out = NextDiT(config)(x_t, torch.empty(1), cond)
        out.sum().backward()
    return counter.get_total_flops()
