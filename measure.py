"""
What train.py measures beside the training loss: how good the model is, and how well it uses the machine.

    evaluator = Evaluator(loader, flow_config, autocast, size=2048)
    record = evaluator(ema_model, generate=True)    # on all processes alike
    utilization = samples_per_s * flops_per_sample(model_config, cond_tokens) / product_rate("cuda", "bfloat16")
"""

import math
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flow
import score
from model import NextDiT

T_BINS = 4
SAMPLED = ("token_cosine", "retrieval_r1", "frechet")  # of score.metrics


class Evaluator:
    """The loss on validation samples and samples of the model's own. Noise and t are functions of a sample's row, so
    that figures compare between iterations, runs, batch sizes and numbers of processes.

    size: how many validation samples the loss is taken of, the first ones; samples: of how many conditions, the first
    ones, targets are generated too, in so many steps
    autocast: context of the arithmetic; stopping: function that says, on all processes alike, whether to break off
    """

    def __init__(
        self,
        loader,
        flow_config,
        autocast,
        size,
        batch_size=64,
        samples=64,
        steps=10,
        stopping=None,
    ):
        self.loader, self.autocast, self.steps, self.stopping = (
            loader,
            autocast,
            steps,
            stopping or (lambda: False),
        )
        self.flow, self.plain = flow_config, replace(flow_config, cond_dropout=0.0, l2_weight=0.0)
        self.size, self.samples, self.batch_size = (
            min(size, loader.n_val),
            min(samples, loader.n_val),
            batch_size,
        )
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.standardize = score.standardizer(
            loader.stats["target_mean"], loader.stats["target_std"]
        )
        self.baseline = None

    def batches(self, n):
        """(rows, counted) of rows 0..n-1, dealt out: each process gets as many batches, which fully_shard needs, of
        the same size, filled up with rows that do not count."""
        size = min(self.batch_size, math.ceil(n / self.world))
        for first in range(0, n, self.world * size):
            rows = first + self.rank * size + np.arange(size)
            yield rows % n, rows < n

    def sum(self, x):
        if dist.is_initialized():
            x = x.to(self.loader.device)
            dist.all_reduce(x)
        return x.cpu()

    @torch.no_grad()
    def __call__(self, net, generate):
        """{name: value}: val_loss, val_loss_t0.. by bins of t from noise to data and, with generate, the metrics
        SAMPLED of one sample a condition, val_*, and of ridge regression, ridge_*. None if broken off."""
        sums = torch.zeros(2, T_BINS)
        for rows, counted in self.batches(self.size):
            if self.stopping():
                return None
            x_1, cond = self.loader.batch("val", rows)
            t = torch.from_numpy(
                (rows + 0.5) * 0.6180339887498949 % 1
            ).float()  # golden ratio: any rows cover [0, 1]
            x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0).to(x_1.device)
            with self.autocast:
                losses, _ = flow.loss(net, x_1, cond, self.plain, x_0=x_0, t=t.to(x_1.device))
            values = torch.stack([losses.cpu(), torch.ones(len(t))]) * torch.from_numpy(counted)
            sums.index_add_(1, (t * T_BINS).long(), values)
        total, count = self.sum(sums)
        result = {"val_loss": (total.sum() / count.sum()).item()}
        result |= {
            f"val_loss_t{i}": (total[i] / count[i]).item() for i in range(T_BINS) if count[i]
        }
        if not (generate and self.samples):
            return result

        truth = self.standardize(self.loader.arrays["val_target"][: self.samples])
        generated = torch.zeros_like(truth)
        for rows, counted in self.batches(self.samples):
            if self.stopping():
                return None
            _, cond = self.loader.batch("val", rows)
            x = self.flow.sigma_max * flow.sample_noise(rows, truth.shape[1:], seed=0, draw=1).to(
                cond.device
            )
            with self.autocast:
                x = flow.integrate(flow.guided_velocity(net, cond, self.flow), x, self.steps)
            samples = self.standardize(self.loader.target.decode(x).cpu())
            generated[rows[counted]] = samples[torch.from_numpy(counted)]
        generated = self.sum(generated)  # a row is some process's, and zero at the others
        if self.baseline is None and self.rank == 0:
            self.baseline = self.regress(truth)
        sampled = (
            score.metrics(generated, truth)
            if generated.isfinite().all()
            else dict.fromkeys(SAMPLED, math.nan)
        )
        return result | {f"val_{name}": sampled[name] for name in SAMPLED} | (self.baseline or {})

    def regress(self, truth):
        """What ridge regression, fitted on a thousand training samples or so, makes of the same conditions."""
        arrays, stats = self.loader.arrays, self.loader.stats
        to_cond = score.standardizer(stats["cond_mean"], stats["cond_std"])
        train = (arrays[f"train_{name}"][: self.loader.n_train] for name in ("cond", "target"))
        ridge = score.Ridge(*train, to_cond, self.standardize, max_tokens=65536)
        values = score.metrics(ridge(arrays["val_cond"][: self.samples]), truth)
        self.loader.forget(arrays.values())
        return {f"ridge_{name}": values[name] for name in SAMPLED}


def summary(results):
    """What Evaluator returns, and train.py adds of the raw weights, as one line."""

    def of(*names):
        return " ".join(f"{results[name]:.4g}" for name in names if name in results)

    keys = [key for key in ("val_loss", "val_loss_raw") if key in results]
    losses = [
        f"{key} {of(key)} (by t {of(*(f'{key}_t{i}' for i in range(T_BINS)))})" for key in keys
    ]
    sampled = [
        f"{name} {of(f'val_{name}')} (ridge {of(f'ridge_{name}')})"
        for name in SAMPLED
        if f"val_{name}" in results
    ]
    return " | ".join(losses + sampled)


def flops_per_sample(config, cond_tokens):
    """Floating point operations of the matrix products of a training step, forward and backward, for one sample.

    Those of the model: what gradient_checkpointing computes again does not count, nor does the depthwise convolution,
    9 / dim of a projection, whose backward pass torch would count as a dense one's.
    """
    T = config.grid[0] * config.grid[1]
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = NextDiT(replace(config, gradient_checkpointing=False, conv=False))
        x, t, cond = (
            torch.empty(1, T, config.target_dim),
            torch.empty(1),
            torch.empty(1, cond_tokens, config.cond_dim),
        )
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, t, cond).sum().backward()
    return counter.get_total_flops()


def product_rate(device, dtype):
    """Floating point operations a second of a product of two large square matrices: what the device can do at best."""
    on_cuda = torch.device(device).type == "cuda"
    n = 4096 if on_cuda else 512
    x, best = torch.ones(n, n, device=device, dtype=getattr(torch, dtype)), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
