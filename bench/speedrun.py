"""
How soon are the samples of train.py's default recipe as good as those of BLIP3-o's DiT, trained as
BLIP3-o trains it, at the end of its training?

    python bench/speedrun.py FOLDER data/digits --budget 100     # FOLDER gets the results
    python bench/speedrun.py FOLDER data/real --config config/train_real.py --budget 120
    python bench/speedrun.py FOLDER data/digits --budget 40 \
        --rates --ours "" conv=False prior=True                  # variants of our recipe
    python bench/speedrun.py FOLDER --picture                    # of all races in FOLDER

Reference: BLIP3-o's model of the same dim, layers and heads, made of diffusers' parts; velocity,
uniform t, AdamW with cosine decay. The first seed tries all of --rates with all of --batches; the
one with the lowest validation loss races with the other seeds too. Ours: the defaults of train.py
with what --config sets, in several runs, each complete: for the whole budget, a half, a third, a
fifth, a tenth and a twentieth of it. Or, for the whole budget, each of --ours: settings that differ
from those.

All get the same samples, normalized by channel, warmup over a twentieth of their budget, averaged
weights, threads and precision of products. They train in one process, in turn, a twelfth of the
budget at a time (short runs a fifth of their own). The clock of a run counts its iterations and the
fitting of the prior, not imports, construction and evaluations.

Judged are two draws of 10 steps of ab2 for each of --samples validation conditions, by the metrics
of report/score.py, and the loss of the velocity on all of them, of the weights or of their average,
whichever has the lower one.
"""

import argparse
import copy
import json
import logging
import math
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow
from bench.plan import default_settings, model_config
from flow import FlowConfig, Normalizer
from model import NextDiT, NextDiTConfig
from plumbing.configurator import check, read_defaults, read_file
from plumbing.dataset import Loader, open_dataset
from plumbing.optim import make_optimizer
from report import score

ROOT = Path(__file__).parents[1]
SLICES = 12  # of the budget
SHARES = (1, 2, 3, 5, 10, 20)  # our runs take the whole budget, half of it, a third ...
METRICS = ("frechet_patch", "frechet", "variogram_score", "mean_token_cosine")  # of the race
COLUMNS = (*METRICS, "neighbours", "spread_ratio", "loss", "seconds", "iterations")
# what --ours may set; train.py's other settings have no part in a race, or are the same for all
OURS = {*NextDiTConfig.__dataclass_fields__, *FlowConfig.__dataclass_fields__}
OURS -= {"path", "sigma_min", "sigma_max"}
OURS |= {"optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "ema_decay"}
OURS |= {"batch_size", "gradient_accumulation_steps"}
# the reference trains as BLIP3-o does: what ours has besides is not its own
PLAIN = dict(optimizer="adamw", t_sampling="uniform", t_shift=1.0, path="linear", prediction="v")
PLAIN |= dict(conditioning="cross", cond_projection=True)


class Reference(torch.nn.Module):
    """diffusers' LuminaNextDiT2DModel with the arguments of ours; with cond_projection BLIP3-o's,
    which puts a PixArtAlphaTextProjection before it. A dropped condition is zero, as in BLIP3-o."""

    def __init__(self, config):
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import (
            PixArtAlphaTextProjection,
            get_2d_rotary_pos_embed_lumina,
        )

        super().__init__()
        self.grid = config.grid
        self.net = LuminaNextDiT2DModel(
            sample_size=self.grid[0],
            patch_size=1,
            in_channels=config.target_dim,
            hidden_size=config.dim,
            num_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_kv_heads=config.n_kv_head,
            multiple_of=config.multiple_of,
            norm_eps=config.norm_eps,
            learn_sigma=False,
            qk_norm=True,
            cross_attention_dim=config.cond_width,
        )
        del self.net.pad_token  # is never used
        self.net.caption_projection = torch.nn.Identity()
        if config.cond_projection:
            self.net.caption_projection = PixArtAlphaTextProjection(config.cond_dim, config.dim)
        self.rope = get_2d_rotary_pos_embed_lumina(config.dim // config.n_head, *self.grid)

    def context(self, cond):
        return cond

    def forward(self, x_t, t, cond=None, drop=None, context=None):
        if context is not None:
            cond = context
        if drop is not None:
            cond = cond * ~drop[:, None, None]
        # the reference counts time from data to noise, and its velocity runs that way
        return -self.velocity(x_t, 1000 * (1 - t), cond)

    def velocity(self, x_t, timestep, cond):
        """Noise minus data at the reference's time, in our shapes."""
        cond = self.net.caption_projection(cond)
        image = x_t.transpose(1, 2).unflatten(2, self.grid)  # (B, D, H, W)
        mask = torch.ones(cond.shape[:2], device=cond.device)
        rope = self.rope.to(cond.device)
        out = self.net(image, timestep, cond, mask, rope, cross_attention_kwargs={}).sample
        return out.flatten(2).transpose(1, 2)  # (B, T, D)


class Run:
    """One model in training, which stops and goes on."""

    def __init__(self, name, data, settings, budget, seed, reference=False):
        self.name = name
        self.settings = settings
        self.budget = budget
        self.seed = seed
        self.batch_size = settings["batch_size"] * settings["gradient_accumulation_steps"]
        self.loader = Loader(data, self.batch_size, seed=seed)
        self.batches = self.loader.stream(0, range(1))
        self.generator = torch.Generator()
        stats = data["stats"]
        self.cond_space = Normalizer("channel", stats["cond_mean"], stats["cond_std"])
        self.target_space = Normalizer("channel", stats["target_mean"], stats["target_std"])
        S, C = data["train_cond"].shape[1:]
        T, D = data["train_target"].shape[1:]

        chosen = {name: settings[name] for name in FlowConfig.__dataclass_fields__}
        if chosen["t_shift"] is None:
            chosen["t_shift"] = max(1.0, math.sqrt(T * D / 4096))
        self.flow = FlowConfig(**chosen)
        # all are judged by their velocity
        self.eval_flow = replace(self.flow, loss_space="v", cond_dropout=0.0, l2_weight=0.0)
        torch.manual_seed(seed)
        self.grid = tuple(data["meta"]["grid"])
        config = model_config(settings, self.grid, S, C, D)
        self.model = Reference(config) if reference else NextDiT(config)
        start = time.perf_counter()
        if not reference and config.prior:
            self.model.prior.fit(
                lambda rows: self.encode(*self.loader.read("train", rows)), self.loader.n_train
            )
        self.seconds = time.perf_counter() - start
        self.iterations = 0
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False)
        self.params = list(self.model.parameters())
        self.ema_params = list(self.ema_model.parameters())
        # with what the prior holds
        self.numbers = sum(value.numel() for value in self.model.state_dict().values())
        self.rate = settings["learning_rate"] or 1.6 / config.dim
        betas = settings["beta1"], settings["beta2"]
        decay = settings["weight_decay"]
        self.opt = make_optimizer(self.model, settings["optimizer"], self.rate, decay, betas)

    def encode(self, target, cond):
        return self.target_space.encode(target), self.cond_space.encode(cond)

    def get_lr(self):
        done = self.seconds / self.budget
        if done < 0.05:
            share = 20 * done
        else:
            share = 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))
        return self.rate * max(share, 0.01)

    def train(self, seconds):
        until = min(self.seconds + seconds, self.budget)
        while self.seconds < until:
            start = time.perf_counter()
            for group in self.opt.param_groups:
                group["lr"] = self.get_lr()
            seed = flow.derive_seed(flow.TRAINING, self.seed, self.iterations, 0)
            self.generator.manual_seed(seed)
            x_1, cond = self.encode(*next(self.batches))
            losses, _ = flow.loss(self.model, x_1, cond, self.flow, generator=self.generator)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(self.params, self.settings["grad_clip"] or math.inf)
            self.opt.step()
            self.opt.zero_grad()
            ramp = (1 + self.iterations) / (10 + self.iterations)
            with torch.no_grad():
                weight = 1 - min(self.settings["ema_decay"], ramp)
                torch._foreach_lerp_(self.ema_params, self.params, weight)
            self.iterations += 1
            self.seconds += time.perf_counter() - start

    def val_batches(self, n):
        """(rows, x_1, cond) of the first n validation samples."""
        for rows in np.array_split(np.arange(n), math.ceil(n / 64)):
            yield rows, *self.encode(*self.loader.read("val", rows))

    @torch.no_grad()
    def val_loss(self, model):
        parts = []
        for rows, x_1, cond in self.val_batches(self.loader.n_val):
            x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0)
            t = torch.from_numpy((rows + 0.5) * 0.6180339887498949 % 1).float()  # as in train.py
            losses, _ = flow.loss(model, x_1, cond, self.eval_flow, x_0=x_0, t=t)
            parts.append(losses)
        return torch.cat(parts).mean().item()

    @torch.no_grad()
    def result(self, n):
        """What the run has come to, judged by n validation samples."""
        losses = {model: self.val_loss(model) for model in (self.model, self.ema_model)}
        model = min(losses, key=losses.get)
        n = min(n, self.loader.n_val)
        samples, truth = [], []
        for rows, x_1, cond in self.val_batches(n):
            velocity = flow.guided_velocity(model, cond, self.eval_flow)
            draws = []
            for draw in (1, 2):
                x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0, draw=draw)
                draws.append(flow.integrate(velocity, self.flow.sigma_max * x_0, steps=10))
            samples.append(torch.stack(draws, 1))
            truth.append(x_1[:, None])
        predicted = {"generated": torch.cat(samples), "truth": torch.cat(truth)}
        readers = {name: x.__getitem__ for name, x in predicted.items()}
        sums = score.add_up(n, readers, self.grid)
        return score.figures(sums["generated"], sums["truth"]) | {
            "name": self.name,
            "is_reference": isinstance(self.model, Reference),
            "seed": self.seed,
            "budget": self.budget,
            "loss": losses[model],
            "numbers": self.numbers,
            "rate": self.rate,
            "iterations": self.iterations,
            "seconds": self.seconds,
        }


def race(runs, slice_seconds, n):
    """Train the runs in turn until all budgets are spent; returns their results."""
    results = []
    while runs:
        for run in runs:
            run.train(min(slice_seconds, run.budget / 5))
        for run in runs:
            if run.seconds >= run.budget:
                results.append(run.result(n))
                print(line(results[-1]), flush=True)
        runs = [run for run in runs if run.seconds < run.budget]
    return results


def line(r):
    """A row of the table."""
    text = f"{r['name']:40}  seed {r['seed']}"
    for name in COLUMNS:
        text += f"  {r[name]:{len(name)}.4g}"
    return text


def best_reference(results):
    return min((r for r in results if r["is_reference"]), key=lambda r: r["loss"])


def is_as_good(name, ours, theirs):
    """Whether a metric is at least as good in one result as in another."""
    if name == "mean_token_cosine":
        return ours[name] >= theirs[name]
    return ours[name] <= theirs[name]


def fraction(share):
    return "never" if math.isinf(share) else f"1/{1 / share:.1f}"


def verdict(results):
    """Lines that say for each metric which share of the reference's seconds our shortest run took
    that was as good, by seed; of the worst metric, and its median over the seeds."""
    lines, worst = [], []
    for seed in sorted({r["seed"] for r in results}):
        of_seed = [r for r in results if r["seed"] == seed]
        theirs = best_reference(of_seed)
        shares = {}
        for name in METRICS:
            good = [r["seconds"] for r in of_seed
                    if not r["is_reference"] and is_as_good(name, r, theirs)]  # fmt: skip
            shares[name] = min(good, default=math.inf) / theirs["seconds"]
        worst.append(max(shares.values()))
        text = ", ".join(f"{name} {fraction(share)}" for name, share in shares.items())
        lines.append(f"seed {seed}, as good as {theirs['name']}: {text}")
    median = fraction(statistics.median(worst))
    lines.append(f"of the worst metric, median of the seeds: {median}")
    return lines


def draw_race(axes, race):
    """A metric in each of the axes, over the seconds of training."""
    ours = [r for r in race["results"] if not r["is_reference"]]
    for ax, name in zip(axes, METRICS):
        for seed in sorted({r["seed"] for r in race["results"]}):
            of_seed = [r for r in race["results"] if r["seed"] == seed]
            points = sorted((r["seconds"], r[name]) for r in ours if r["seed"] == seed)
            ax.plot(*zip(*points), "o-", color="#1d4e89", lw=1, ms=4, label="ours")
            theirs = best_reference(of_seed)
            ax.plot(theirs["seconds"], theirs[name], "s", color="#b3541e", label="BLIP3-o's")
            ax.axhline(theirs[name], color="#b3541e", lw=0.8, ls=":")
        ax.set(title=f"{race['data']}: {name}", xlabel="training seconds")
        ax.set_xscale("log", subs=[2, 3, 5])
        handles, labels = ax.get_legend_handles_labels()
        by_label = dict(zip(labels, handles))  # each once
        ax.legend(by_label.values(), by_label.keys(), fontsize=8)
        ax.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        ax.spines[["top", "right"]].set_visible(False)


def picture(folder):
    """speedrun.png, all races in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    races = [json.loads(path.read_text()) for path in sorted(folder.glob("race-*.json"))]
    if not races:
        raise ValueError(f"{folder} has no race-*.json")
    size = (14, 3.4 * len(races))
    figure, axes = plt.subplots(
        len(races), len(METRICS), figsize=size, squeeze=False, layout="constrained"
    )
    for row, race in zip(axes, races):
        draw_race(row, race)
    figure.savefig(folder / "speedrun.png", dpi=100)
    print(f"wrote {folder / 'speedrun.png'}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    rates = [3e-4, 1e-3, 3e-3, 1e-2]
    variants = 'each a text of settings KEY=VALUE, "" for none'
    option("folder", type=Path, help="for results and picture")
    option("data", nargs="?", help="a dataset that prepare.py made")
    option("--config", default="config/train_digits.py", help="of train.py: sizes of both models")
    option("--budget", type=float, default=100, help="training seconds per run")
    option("--seeds", type=int, default=3)
    option("--rates", type=float, nargs="*", default=rates, help="of the reference")
    option("--batches", type=int, nargs="*", default=[8, 32], help="of the reference")
    option("--samples", type=int, default=256, help="validation samples that judge")
    option("--ours", nargs="*", metavar="SETTINGS", help=variants)
    threads = "of torch; OMP_NUM_THREADS limits NumPy's too, with which the prior is fitted"
    option("--threads", type=int, default=torch.get_num_threads(), help=threads)
    option("--picture", action="store_true")
    args = parser.parse_args()
    if args.data is None and not args.picture:
        parser.error("which dataset? One that prepare.py made")
    return args


def override(settings, text):
    """The settings with those of `text`, "KEY=VALUE KEY=VALUE", in place of theirs."""
    defaults = read_defaults((ROOT / "train.py").read_text())
    settings = settings.copy()
    for pair in text.split():
        key, _, value = pair.partition("=")
        if key not in OURS or key not in defaults or not value:
            raise ValueError(f"--ours {text!r}: {pair} cannot be set here")
        settings[key] = check(key, value, defaults, text, from_text=True)
    return settings


def main():
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.picture:
        return picture(args.folder)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")  # for all, as train.py does
    torch.empty(33_000_000, dtype=torch.uint8)  # so that glibc keeps freed memory, for all
    data = open_dataset(args.data)
    ours = default_settings() | read_file(args.config)
    theirs = ours | PLAIN | dict(gradient_accumulation_steps=1)
    if args.ours is None:
        variants = [("ours", ours, args.budget / share) for share in SHARES]
    else:
        variants = [(f"ours {s}".strip(), override(ours, s), args.budget) for s in args.ours]

    print(f"{args.data}, {args.config}, {args.threads} threads, torch {torch.__version__}")
    print(" " * 48 + "".join(f"  {name}" for name in COLUMNS), flush=True)
    results = []
    tried = [(rate, batch) for rate in args.rates for batch in args.batches]
    for seed in range(args.seeds):
        runs = []
        for rate, batch in tried:
            settings = theirs | {"learning_rate": rate, "batch_size": batch}
            name = f"reference, {rate:g}, batch {batch}"
            runs.append(Run(name, data, settings, args.budget, seed, reference=True))
        for name, settings, budget in variants:
            runs.append(Run(name, data, settings, budget, seed))
        results += race(runs, args.budget / SLICES, args.samples)
        if tried:
            best = best_reference(results)["name"]
            tried = [pair for pair in tried if best == f"reference, {pair[0]:g}, batch {pair[1]}"]
        data_name = Path(args.data).name
        # a race of one recipe against the reference, or trials of variants
        kind = "race" if args.ours is None and args.rates else "trials"
        names = {"data": data_name, "config": args.config, "threads": args.threads}
        text = json.dumps(names | {"results": results}, indent=1)
        (args.folder / f"{kind}-{data_name}.json").write_text(text)
    if args.rates and variants:
        print("\n".join(verdict(results)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
