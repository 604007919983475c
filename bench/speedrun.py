"""
How soon has train.py's default recipe the loss at which diffusers' NextDiT, trained as BLIP3-o trains it, ends?

    python bench/speedrun.py FOLDER data/digits --budget 100        # FOLDER gets the results
    python bench/speedrun.py FOLDER data/real --config config/train_real.py --budget 120
    python bench/speedrun.py FOLDER data/digits --budget 40 --rates --ours "" conv=False prior=True --goal 0.35
    python bench/speedrun.py FOLDER --picture                       # the curves of all results in FOLDER

Reference: diffusers' LuminaNextDiT2DModel of the same dim, layers and heads, velocity, uniform t, AdamW with cosine
decay, with every learning rate of --rates for the first seed; the best goes on with the others. Ours: the defaults of
train.py with what --config sets, for the whole budget, a fifth and a tenth of it; or, whole, each of --ours, settings
that differ from those. All get the same samples, normalized by channel, warmup over a twentieth of their budget,
averaged weights, threads and precision of products; in one process, in turn, a slice of a twelfth of the budget at a
time. The clock of a run counts its training steps and fitting the prior, not imports, construction and evaluations.

The loss is that of velocity on all validation samples, with one noise and t for each, the same for all runs; of the
weights or of their average, whichever is lower. Samples take 10 steps of ab2. "shuffled" is the token cosine of samples
and the truth of other conditions, which a model that uses its condition must beat. "numbers": parameters and buffers.
"""

import argparse
import contextlib
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
from measure import Evaluator

import flow
from model import NextDiT, NextDiTConfig
from plumbing.configurator import convert, read_defaults, read_file
from plumbing.dataset import Loader, open_dataset
from plumbing.optim import make_optimizer
from report import score

ROOT, SLICES = Path(__file__).parents[1], 12
METRICS = ("token_cosine", "retrieval_r1", "frechet")
# what --ours may set; the rest of train.py's settings has no part in a race, or is the same for all
OURS = {*NextDiTConfig.__dataclass_fields__, *flow.FlowConfig.__dataclass_fields__} - {
    "path",
    "sigma_min",
    "sigma_max",
}
OURS |= {"optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "ema_decay"}
OURS |= {"batch_size", "gradient_accumulation_steps"}


class Reference(torch.nn.Module):
    """diffusers' model with the arguments of ours. A dropped condition is zero, as in BLIP3-o."""

    def __init__(self, config):
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        super().__init__()
        self.grid = config.grid
        self.net = LuminaNextDiT2DModel(
            sample_size=self.grid[0], patch_size=1, in_channels=config.target_dim, hidden_size=config.dim,
            num_layers=config.n_layer, num_attention_heads=config.n_head, num_kv_heads=config.n_kv_head,
            multiple_of=config.multiple_of, norm_eps=config.norm_eps, learn_sigma=False, qk_norm=True,
            cross_attention_dim=config.cond_dim,
        )  # fmt: skip
        del self.net.pad_token  # is never used
        self.rope = get_2d_rotary_pos_embed_lumina(config.dim // config.n_head, *self.grid)

    def context(self, cond, cond_mask=None):
        return cond

    def forward(self, x_t, t, cond=None, cond_mask=None, drop=None, context=None):
        cond = cond if context is None else context
        cond = cond if drop is None else cond * ~drop[:, None, None]
        image, mask = x_t.transpose(1, 2).unflatten(2, self.grid), torch.ones(cond.shape[:2])
        out = self.net(
            image, 1000 * (1 - t), cond, mask, self.rope, cross_attention_kwargs={}
        ).sample
        return -out.flatten(2).transpose(1, 2)


class Run:
    """One model in training, stopped and started."""

    def __init__(self, name, data, settings, budget, seed, reference=False):
        self.name, self.budget, self.s, self.seed = name, budget, settings, seed
        self.batch = settings["batch_size"] * settings["gradient_accumulation_steps"]
        self.loader = Loader(data, "channel", "cpu", self.batch, seed=seed, preload=True)
        self.flow = flow.FlowConfig.of(settings, *data["train_target"].shape[1:])
        # of the velocity, whatever is predicted, at uniform t
        self.plain = replace(self.flow, loss_space="v", t_sampling="uniform", t_shift=1.0)
        self.batches, self.generator = self.loader.stream(0, range(1)), torch.Generator()
        torch.manual_seed(seed)
        config = NextDiTConfig.of(settings, data)
        self.net = Reference(config) if reference else NextDiT(config)
        start = time.perf_counter()
        if not reference and config.prior:
            self.net.prior.fit(self.loader.target_tokens())
        self.seconds, self.steps, self.curve = time.perf_counter() - start, 0, []
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.params = [list(net.parameters()) for net in (self.net, self.average)]
        self.rate = settings["learning_rate"] or 1.6 / config.dim
        betas = settings["beta1"], settings["beta2"]
        self.opt = make_optimizer(
            self.net, settings["optimizer"], self.rate, settings["weight_decay"], betas
        )
        self.size = sum(
            v.numel() for v in self.net.state_dict().values()
        )  # with what the prior holds

    def train(self, seconds):
        until = min(self.seconds + seconds, self.budget)
        while self.seconds < until:
            start = time.perf_counter()
            done = self.seconds / self.budget
            rate = (
                min(20 * done, 1)
                if done < 0.05
                else 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))
            )
            for group in self.opt.param_groups:
                group["lr"] = self.rate * max(rate, 0.01)
            self.generator.manual_seed(flow.mix(flow.TRAINING, self.seed, self.steps, 0))
            x_1, cond = next(self.batches)
            losses, _ = flow.loss(self.net, x_1, cond, self.flow, generator=self.generator)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(self.params[0], self.s["grad_clip"] or math.inf)
            self.opt.step()
            self.opt.zero_grad()
            weight = 1 - min(self.s["ema_decay"], (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                torch._foreach_lerp_(self.params[1], self.params[0], weight)
            self.steps += 1
            self.seconds += time.perf_counter() - start

    def evaluate(self):
        n = self.loader.n_val
        evaluate = Evaluator(self.loader, self.plain, contextlib.nullcontext(), n, samples=0)
        self.losses = [
            evaluate(net, generate=False)["val_loss"] for net in (self.net, self.average)
        ]
        self.curve.append([self.seconds, min(self.losses)])

    @torch.no_grad()
    def result(self):
        truth = self.loader.place(
            [torch.from_numpy(np.array(self.loader.arrays[f"val_{k}"])) for k in ("target", "cond")]
        )
        net, parts = (self.net, self.average)[int(np.argmin(self.losses))], []
        for rows in np.array_split(np.arange(len(truth[0])), -(-len(truth[0]) // 64)):
            noise = flow.sample_noise(rows, truth[0].shape[1:], seed=0, draw=1)
            parts.append(
                flow.integrate(flow.guided_velocity(net, truth[1][rows], self.plain), noise, 10)
            )
        samples = torch.cat(parts)
        scores = (
            score.metrics(samples, truth[0])
            if samples.isfinite().all()
            else dict.fromkeys(METRICS, math.nan)
        )
        shuffled = score.cosine(samples, truth[0].roll(1, 0)).mean().item()
        return {
            "name": self.name, "seed": self.seed, "budget": self.budget, "loss": self.curve[-1][1],
            **{k: scores[k] for k in METRICS}, "shuffled": shuffled, "numbers": self.size, "rate": self.rate,
            "steps": self.steps, "samples_per_s": self.steps * self.batch / self.seconds, "curve": self.curve,
        }  # fmt: skip


def race(runs, slice_seconds, goal=None):
    """Train the runs in turn until all budgets are spent; returns their results."""
    for run in runs:
        run.evaluate()
    while waiting := [run for run in runs if run.seconds < run.budget]:
        for run in waiting:
            run.train(min(slice_seconds, run.budget / 5))
            run.evaluate()
    results = [run.result() for run in runs]
    for r in results:
        print(line(r, goal), flush=True)
    return results


COLUMNS = (
    "seed",
    "budget",
    "loss",
    "to goal",
    "cosine",
    "shuffled",
    "R@1",
    "Frechet",
    "samples/s",
    "numbers",
)


def line(r, goal=None):
    figures = [f"{r['loss']:.4f}"]
    if goal is not None:
        seconds = reached(r["curve"], goal)
        figures.append("-" if seconds is None else f"{seconds:.1f} s")
    figures += [f"{r[k]:.4f}" for k in ("token_cosine", "shuffled")] + [f"{r['retrieval_r1']:.3f}"]
    figures += [f"{r['frechet']:.3f}", f"{r['samples_per_s']:.1f}", f"{r['numbers'] / 1e6:.2f}M"]
    return f"{r['name']:40}" + "".join(
        f"{f:>10}" for f in (r["seed"], f"{r['budget']:g} s", *figures)
    )


def reached(curve, loss):
    """Seconds at which a curve first is at or below a loss, interpolated; None if never."""
    for (s0, l0), (s1, l1) in zip([curve[0], *curve], curve):
        if l1 <= loss:
            return s1 if l0 <= loss or l0 == l1 else s0 + (s1 - s0) * (l0 - loss) / (l0 - l1)
    return None


def verdict(results):
    """Ours against the best reference, seed by seed: the seconds of the run of ours that has its final loss first."""
    lines, ratios = [], []
    for seed in sorted({r["seed"] for r in results}):
        of_seed = [r for r in results if r["seed"] == seed]
        theirs = min(
            (r for r in of_seed if r["name"].startswith("reference")), key=lambda r: r["loss"]
        )
        ours = [r for r in of_seed if r["name"].startswith("ours")]
        times = [
            (s, r["budget"]) for r in ours if (s := reached(r["curve"], theirs["loss"])) is not None
        ]
        whole = max(ours, key=lambda r: r["budget"])
        better = [k for k in METRICS if (whole[k] - theirs[k]) * (-1 if k == "frechet" else 1) > 0]
        if not times:
            lines.append(
                f"seed {seed}: ours never has the loss {theirs['loss']:.4f} of {theirs['name']}"
            )
            ratios.append(0.0)
            continue
        seconds, budget = min(times)
        ratios.append(theirs["budget"] / max(seconds, 1e-9))
        goal = f"seed {seed}: {theirs['loss']:.4f}, the loss of {theirs['name']} at {theirs['budget']:g} s"
        time_of_ours = f"after {seconds:.1f} s of a run of {budget:g} s: 1/{ratios[-1]:.1f}"
        lines.append(
            f"{goal}, {time_of_ours}. At equal time better in {', '.join(better) or 'nothing'}"
        )
    if ratios:
        lines.append(f"ratio, median of {len(ratios)} seeds: 1/{statistics.median(ratios):.1f}")
    return lines


def picture(folder):
    """The curves of all races in a folder: seconds, loss; a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    races = [json.loads(path.read_text()) for path in sorted(folder.glob("race-*.json"))]
    if not races:
        raise ValueError(f"{folder} has no race-*.json")
    figure, all_axes = plt.subplots(
        1, len(races), figsize=(6.4 * len(races), 4.2), squeeze=False, layout="constrained"
    )
    for axes, race in zip(all_axes[0], races):
        results = race["results"]
        best = min((r for r in results if "reference" in r["name"]), key=lambda r: r["loss"])
        for r in results:
            theirs = "reference" in r["name"]
            blue = {1.0: "#1d4e89", 0.2: "#4a90d9"}.get(
                round(r["budget"] / best["budget"], 2), "#9cc9ee"
            )
            faint = theirs and r["rate"] != best["rate"]
            label = {
                True: "diffusers, other rates" if faint else f"diffusers, AdamW {best['rate']:g}"
            }.get(theirs, f"ours, {r['budget']:g} s")
            axes.plot(
                *zip(*r["curve"]),
                color="#b3541e" if theirs else blue,
                alpha=0.25 if faint else 1,
                lw=1.4,
                label=label,
            )
        losses = [
            loss
            for r in results
            if "ours" in r["name"] or r["rate"] == best["rate"]
            for _, loss in r["curve"]
        ]
        axes.axhline(best["loss"], color="#b3541e", lw=0.8, ls=":")
        axes.set(
            title=race["data"], xlabel="training seconds", ylabel="validation loss", yscale="log"
        )
        axes.set_ylim(min(losses) * 0.97, min(max(losses), 2.1))
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
        axes.legend(handles.values(), handles.keys(), fontsize=8, framealpha=0.8, edgecolor="none")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "speedrun.png", dpi=110)
    print(f"wrote {folder / 'speedrun.png'}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for results and picture")
    parser.add_argument("data", nargs="?", help="a dataset that prepare.py made")
    parser.add_argument(
        "--config", default="config/train_digits.py", help="of train.py: sizes of both models"
    )
    parser.add_argument("--budget", type=float, default=100, help="training seconds of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        help="of the reference",
    )
    parser.add_argument("--batch", type=int, default=32, help="of the reference")
    parser.add_argument(
        "--ours", nargs="*", metavar="SETTINGS", help='lines of KEY=VALUE, "" for none'
    )
    parser.add_argument(
        "--goal", type=float, metavar="LOSS", help="print when each run first had it"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.picture:
        return picture(args.folder)
    if args.data is None:
        parser.error("which dataset? One that prepare.py made")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")  # for all, as train.py does
    torch.empty(33_000_000, dtype=torch.uint8)  # so that glibc keeps freed memory, for all
    defaults = read_defaults((ROOT / "train.py").read_text())
    base = {name: default["value"] for name, default in defaults.items()} | read_file(
        args.config, ROOT
    )
    data = open_dataset(args.data)

    def settings(text=""):
        pairs = [pair.partition("=")[::2] for pair in text.split()]
        if wrong := [k for k, v in pairs if k not in OURS & defaults.keys() or not v]:
            raise ValueError(f"--ours {text}: {', '.join(wrong)} cannot be set here")
        return base | {k: convert(k, v, defaults, text, from_text=True) for k, v in pairs}

    # as BLIP3-o trains it: what ours has besides is not the reference's
    plain = dict(
        batch_size=args.batch,
        gradient_accumulation_steps=1,
        optimizer="adamw",
        t_sampling="uniform",
        t_shift=1.0,
        path="linear",
        prediction="v",
    )
    T, fractions = args.budget, (1, 5, 10)
    lines = [("", f) for f in fractions] if args.ours is None else [(text, 1) for text in args.ours]
    print(
        f"{args.data}, {args.config}, {args.threads} threads, torch {torch.__version__}", flush=True
    )
    columns = (c for c in COLUMNS if c != "to goal" or args.goal is not None)
    print(f"{'':40}" + "".join(f"{c:>10}" for c in columns), flush=True)
    results, rates = [], args.rates
    for seed in range(args.seeds):
        runs = []
        for rate in rates:
            runs.append(
                Run(
                    f"reference {rate:g}",
                    data,
                    base | plain | {"learning_rate": rate},
                    T,
                    seed,
                    reference=True,
                )
            )
        runs += [
            Run(f"ours {text}" if text else "ours", data, settings(text), T / f, seed)
            for text, f in lines
        ]
        results += race(runs, T / SLICES, args.goal)
        rates = (
            [min((r for r in results if "reference" in r["name"]), key=lambda r: r["loss"])["rate"]]
            if rates
            else []
        )
        name = Path(args.data).name
        record = {"data": name, "config": args.config, "threads": args.threads, "results": results}
        kind = (
            "race" if args.ours is None else "trials"
        )  # of one recipe against the reference, or of variants
        (args.folder / f"{kind}-{name}.json").write_text(json.dumps(record, indent=1))
    if args.rates and lines:
        print("\n".join(verdict(results)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
