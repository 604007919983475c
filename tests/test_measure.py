import contextlib

import numpy as np
import pytest
import torch

import score
from flow import FlowConfig, Normalizer
from loader import Loader, open_dataset
from measure import Evaluator, flops_per_sample, summary
from model import NextDiT, NextDiTConfig


@pytest.mark.parametrize("n_kv_head, cond_tokens", [(4, 9), (2, 5)])
def test_flops_per_sample(n_kv_head, cond_tokens):
    """By hand: 2 operations a weight and token forward, 4 backward, or 2 where the input needs no gradient."""
    config = NextDiTConfig(
        (3, 3), 10, 12, dim=32, n_layer=2, n_head=4, n_kv_head=n_kv_head, multiple_of=16
    )
    model, T = NextDiT(config), 9
    by_hand = 4 * T * model.x_embed.weight.numel() + 6 * T * model.final.weight.numel()
    by_hand += 4 * model.t_embed[0].weight.numel()
    by_hand += 6 * sum(
        m.weight.numel() for m in (model.t_embed[2], model.cond_embed[1], model.final_ada)
    )
    for block in model.layers:
        by_hand += (
            6 * T * sum(m.weight.numel() for m in (block.qkvq, block.out, block.w13, block.w2))
        )
        by_hand += 6 * block.ada.weight.numel() + 4 * cond_tokens * block.cond_kv.weight.numel()
        by_hand += 3 * (4 * T * T + 4 * T * cond_tokens) * config.dim
    assert flops_per_sample(config, cond_tokens) == by_hand
    config.gradient_checkpointing = config.conv = True
    assert flops_per_sample(config, cond_tokens) == by_hand


class Oracle(torch.nn.Module):
    """Knows the data: velocity x_1 - x_0 from x_t and t alone, and so has no loss and makes the truth."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.at = targets, None

    def context(self, cond, cond_mask=None):
        return cond

    def forward(self, x_t, t, cond=None, cond_mask=None, drop=None, context=None):
        cond = cond if context is None else context
        x_1 = torch.stack([self.targets[tuple(c.flatten()[:3].tolist())] for c in cond])
        return (x_1 - x_t) / (1 - t.view(-1, 1, 1))


def test_evaluation_of_an_oracle_and_of_the_mean(dataset):
    """No loss and perfect samples for one that knows; the variance of velocity for one that predicts nothing."""
    data = open_dataset(dataset)
    loader = Loader(data, "channel", "cpu", batch_size=4)
    target, cond = loader.batch("val", np.arange(10))
    oracle = Oracle({tuple(c.flatten()[:3].tolist()): x for x, c in zip(target, cond)})
    evaluate = Evaluator(
        loader, FlowConfig(), contextlib.nullcontext(), size=10, batch_size=3, samples=7, steps=4
    )
    result = evaluate(oracle, generate=True)
    assert (
        result["val_loss"] < 1e-8
        and result["val_token_cosine"] > 0.9999
        and result["val_retrieval_r1"] == 1
    )
    assert result["val_frechet"] < 1e-3 < result["ridge_frechet"]
    assert {f"val_loss_t{i}" for i in range(4)} <= result.keys()
    silent = evaluate(lambda x, t, *rest: torch.zeros_like(x), generate=False)
    assert 1.5 < silent["val_loss"] < 2.5 and not any(
        "ridge" in key or "cosine" in key for key in silent
    )
    by_bin = [silent[f"val_loss_t{i}"] for i in range(4)]
    counts = np.bincount(((np.arange(10) + 0.5) * 0.6180339887498949 % 1 * 4).astype(int))
    assert np.average(by_bin, weights=counts) == pytest.approx(silent["val_loss"], rel=1e-5)
    # the baseline is score.py's
    to = {
        n: score.standardizer(data["stats"][f"{n}_mean"], data["stats"][f"{n}_std"])
        for n in ("cond", "target")
    }
    ridge = score.Ridge(data["train_cond"], data["train_target"], to["cond"], to["target"])
    expected = score.metrics(ridge(data["val_cond"][:7]), to["target"](data["val_target"][:7]))
    assert result["ridge_token_cosine"] == pytest.approx(expected["token_cosine"], rel=1e-5)
    assert "token_cosine 1 (ridge 0.9" in summary(result)


def test_batch_size_and_breaking_off_change_nothing_else(dataset):
    torch.manual_seed(0)
    loader = Loader(open_dataset(dataset), "l2", "cpu", batch_size=4)
    assert isinstance(loader.target, Normalizer)
    model = NextDiT(NextDiTConfig((2, 2), 5, 6, dim=32, n_layer=1, n_head=2, multiple_of=16))
    settings = loader, FlowConfig(), contextlib.nullcontext()
    a, b = (
        Evaluator(*settings, size=10, batch_size=n, samples=5, steps=2)(model, True)
        for n in (10, 3)
    )
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    asked = []
    stopping = Evaluator(
        *settings, 10, 3, 5, 2, stopping=lambda: bool(asked.append(1)) or len(asked) == 6
    )
    assert (
        stopping(model, True) is None and len(asked) == 6
    )  # four batches of losses, and at the second of samples
