"""
How soon does train.py's default recipe reach the loss at which BLIP3-o's DiT, trained as BLIP3-o
trains it, ends?

    python bench/speedrun.py FOLDER data/digits --budget 100     # FOLDER gets the results
    python bench/speedrun.py FOLDER data/real --config config/train_real.py --budget 120
    python bench/speedrun.py FOLDER data/digits --budget 40 --goal 0.35 \
        --rates --ours "" conv=False prior=True                  # variants of our recipe
    python bench/speedrun.py FOLDER --picture                    # curves of all races in FOLDER

Reference: BLIP3-o's model of the same dim, layers and heads, made of diffusers' parts; velocity,
uniform t, AdamW with cosine decay. The first seed tries all learning rates of --rates; the best one
races with the other seeds too. Ours: the defaults of train.py with what --config sets, for the
whole budget, a fifth and a tenth of it. Or, for the whole budget, each of --ours: settings that
differ from those.

All get the same samples, normalized by channel, warmup over a twentieth of their budget, averaged
weights, threads and precision of products. They train in one process, in turn, a twelfth of the
budget at a time. The clock of a run counts its iterations and the fitting of the prior, not
imports, construction and evaluations.

"loss" is that of the velocity on all validation samples, with noise and t that are the same for all
runs; of the weights or of their average, whichever is lower. Samples take 10 steps of ab2.
"shuffled" is the token cosine of samples and the truth of other conditions, which a model that uses
its condition must beat. "numbers" counts parameters and buffers.
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
METRICS = ("token_cosine", "frechet")
COLUMNS = ("seed", "budget", "loss", "to goal", "cosine", "shuffled", "Frechet")
COLUMNS += ("samples/s", "numbers")
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
            count = min(self.loader.n_train, math.ceil(65536 / T))
            rows = np.linspace(0, self.loader.n_train - 1, count).astype(int)
            target, _ = self.encode(*self.loader.read("train", rows))
            self.model.prior.fit(target.flatten(0, 1))
        self.seconds = time.perf_counter() - start
        self.iterations = 0
        self.curve = []  # [seconds, loss]
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

    def val_batches(self):
        """(rows, x_1, cond) of all validation samples."""
        n = self.loader.n_val
        for rows in np.array_split(np.arange(n), math.ceil(n / 64)):
            yield rows, *self.encode(*self.loader.read("val", rows))

    @torch.no_grad()
    def val_loss(self, model):
        parts = []
        for rows, x_1, cond in self.val_batches():
            x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0)
            t = torch.from_numpy((rows + 0.5) * 0.6180339887498949 % 1).float()  # as in train.py
            losses, _ = flow.loss(model, x_1, cond, self.eval_flow, x_0=x_0, t=t)
            parts.append(losses)
        return torch.cat(parts).mean().item()

    def evaluate(self):
        losses = {model: self.val_loss(model) for model in (self.model, self.ema_model)}
        self.best_model = min(losses, key=losses.get)
        self.curve.append([self.seconds, losses[self.best_model]])

    @torch.no_grad()
    def result(self):
        samples, truth = [], []
        for rows, x_1, cond in self.val_batches():
            velocity = flow.guided_velocity(self.best_model, cond, self.eval_flow)
            x_0 = flow.sample_noise(rows, x_1.shape[1:], seed=0, draw=1)
            samples.append(flow.integrate(velocity, self.flow.sigma_max * x_0, steps=10))
            truth.append(x_1)
        samples = torch.cat(samples)
        truth = torch.cat(truth)
        scores = score.metrics(samples, truth, self.grid)
        return {
            "name": self.name,
            "seed": self.seed,
            "budget": self.budget,
            "loss": self.curve[-1][1],
            **{name: scores[name] for name in METRICS},
            "shuffled": score.cosine(samples, truth.roll(1, 0)).mean().item(),
            "numbers": self.numbers,
            "rate": self.rate,
            "iterations": self.iterations,
            "samples_per_s": self.iterations * self.batch_size / self.seconds,
            "curve": self.curve,
        }


def race(runs, slice_seconds, goal=None):
    """Train the runs in turn until all budgets are spent; returns their results."""
    for run in runs:
        run.evaluate()
    waiting = runs
    while waiting:
        for run in waiting:
            run.train(min(slice_seconds, run.budget / 5))
            run.evaluate()
        waiting = [run for run in waiting if run.seconds < run.budget]
    results = [run.result() for run in runs]
    for result in results:
        print(line(result, goal), flush=True)
    return results


def line(r, goal=None):
    """A row of the table."""
    figures = [str(r["seed"]), f"{r['budget']:g} s", f"{r['loss']:.4f}"]
    if goal is not None:
        seconds = reached(r["curve"], goal)
        figures.append("-" if seconds is None else f"{seconds:.1f} s")
    figures += [f"{r['token_cosine']:.4f}", f"{r['shuffled']:.4f}", f"{r['frechet']:.3f}"]
    figures += [f"{r['samples_per_s']:.1f}", f"{r['numbers'] / 1e6:.2f}M"]
    return f"{r['name']:40}" + "".join(f"{figure:>10}" for figure in figures)


def reached(curve, loss):
    """Seconds at which a curve first is at or below a loss, interpolated; None if never."""
    s0, l0 = curve[0]
    for s1, l1 in curve:
        if l1 <= loss:
            if l0 <= loss:  # the first point
                return s1
            return s0 + (s1 - s0) * (l0 - loss) / (l0 - l1)
        s0, l0 = s1, l1
    return None


def is_reference(result):
    return result["name"].startswith("reference")


def best_reference(results):
    return min(filter(is_reference, results), key=lambda r: r["loss"])


def is_better(name, ours, theirs):
    """Whether a metric is better in one result than in another."""
    if name == "frechet":
        return ours[name] < theirs[name]
    return ours[name] > theirs[name]


def verdict(results):
    """Lines that compare ours with the best reference, seed by seed: the seconds of the run of ours
    that first has the reference's final loss."""
    lines, ratios = [], []
    for seed in sorted({r["seed"] for r in results}):
        of_seed = [r for r in results if r["seed"] == seed]
        theirs = best_reference(of_seed)
        ours = [r for r in of_seed if not is_reference(r)]
        reference = f"{theirs['loss']:.4f}, the loss of {theirs['name']}"
        times = []
        for r in ours:
            seconds = reached(r["curve"], theirs["loss"])
            if seconds is not None:
                times.append((seconds, r["budget"]))
        if not times:
            lines.append(f"seed {seed}: ours never reaches {reference}")
            ratios.append(0.0)
            continue
        seconds, budget = min(times)
        ratio = theirs["budget"] / max(seconds, 1e-9)
        ratios.append(ratio)
        longest = max(ours, key=lambda r: r["budget"])
        better = [name for name in METRICS if is_better(name, longest, theirs)]
        lines.append(
            f"seed {seed}: {reference} at {theirs['budget']:g} s, after {seconds:.1f} s of a run "
            f"of {budget:g} s: 1/{ratio:.1f}. "
            f"At equal time better in {', '.join(better) or 'nothing'}"
        )
    if ratios:
        lines.append(f"ratio, median of {len(ratios)} seeds: 1/{statistics.median(ratios):.1f}")
    return lines


def draw_race(axes, race):
    """The curves of a race, a line per run."""
    results = race["results"]
    best = best_reference(results)
    shades = {1.0: "#1d4e89", 0.2: "#4a90d9"}  # of ours, by the share of the budget
    losses = []
    for r in results:
        style = dict(color="#b3541e", alpha=1.0, label=f"BLIP3-o's, AdamW {best['rate']:g}")
        if not is_reference(r):
            share = round(r["budget"] / best["budget"], 2)
            style.update(color=shades.get(share, "#9cc9ee"), label=f"ours, {r['budget']:g} s")
        elif r["rate"] != best["rate"]:
            style.update(alpha=0.25, label="BLIP3-o's, other rates")
        seconds, curve = zip(*r["curve"])
        axes.plot(seconds, curve, lw=1.4, **style)
        if style["alpha"] == 1:
            losses += curve
    axes.axhline(best["loss"], color="#b3541e", lw=0.8, ls=":")
    axes.set(title=race["data"], xlabel="training seconds", ylabel="validation loss", yscale="log")
    axes.set_ylim(min(losses) * 0.97, min(max(losses), 2.1))
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles))  # each once
    legend = dict(fontsize=8, framealpha=0.8, edgecolor="none")
    axes.legend(by_label.values(), by_label.keys(), **legend)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.spines[["top", "right"]].set_visible(False)


def picture(folder):
    """speedrun.png, the curves of all races in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    races = [json.loads(path.read_text()) for path in sorted(folder.glob("race-*.json"))]
    if not races:
        raise ValueError(f"{folder} has no race-*.json")
    size = (6.4 * len(races), 4.2)
    figure, axes = plt.subplots(1, len(races), figsize=size, squeeze=False, layout="constrained")
    for ax, race in zip(axes[0], races):
        draw_race(ax, race)
    figure.savefig(folder / "speedrun.png", dpi=110)
    print(f"wrote {folder / 'speedrun.png'}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    variants = 'each a text of settings KEY=VALUE, "" for none'
    option("folder", type=Path, help="for results and picture")
    option("data", nargs="?", help="a dataset that prepare.py made")
    option("--config", default="config/train_digits.py", help="of train.py: sizes of both models")
    option("--budget", type=float, default=100, help="training seconds per run")
    option("--seeds", type=int, default=3)
    option("--rates", type=float, nargs="*", default=rates, help="of the reference")
    option("--batch", type=int, default=32, help="of the reference")
    option("--ours", nargs="*", metavar="SETTINGS", help=variants)
    option("--goal", type=float, metavar="LOSS", help="print when each run first had it")
    option("--threads", type=int, default=torch.get_num_threads())
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
    theirs = ours | PLAIN | dict(batch_size=args.batch, gradient_accumulation_steps=1)
    if args.ours is None:
        variants = [("ours", ours, args.budget / part) for part in (1, 5, 10)]
    else:
        variants = [(f"ours {s}".strip(), override(ours, s), args.budget) for s in args.ours]

    print(f"{args.data}, {args.config}, {args.threads} threads, torch {torch.__version__}")
    columns = [column for column in COLUMNS if column != "to goal" or args.goal is not None]
    print(" " * 40 + "".join(f"{column:>10}" for column in columns), flush=True)
    results = []
    rates = args.rates
    for seed in range(args.seeds):
        runs = []
        for rate in rates:
            settings = theirs | {"learning_rate": rate}
            name = f"reference {rate:g}"
            runs.append(Run(name, data, settings, args.budget, seed, reference=True))
        for name, settings, budget in variants:
            runs.append(Run(name, data, settings, budget, seed))
        results += race(runs, args.budget / SLICES, args.goal)
        if rates:
            rates = [best_reference(results)["rate"]]
        data_name = Path(args.data).name
        # a race of one recipe against the reference, or trials of variants
        kind = "race" if args.ours is None else "trials"
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
