import dataclasses

import pytest
import torch

from model import NextDiT, NextDiTConfig, rope_2d, rotate

CONFIG = NextDiTConfig(grid=(2, 3), target_dim=5, cond_dim=7, dim=32, n_layer=2, n_head=4, multiple_of=8)


def build(seed=0, **changes):
    """A model whose every parameter, gates included, is random."""
    torch.manual_seed(seed)
    model = NextDiT(dataclasses.replace(CONFIG, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


def inputs(B=3, S=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 6, 5, generator=g), torch.rand(B, generator=g), torch.randn(B, S, 7, generator=g)


def test_equals_the_reference_block_for_block():
    """diffusers' LuminaNextDiT2DModel with the same weights: ours(x, t) = reference(x, 1000 (1 - t))."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    ours = build(n_kv_head=2)
    reference = LuminaNextDiT2DModel(
        sample_size=3, patch_size=1, in_channels=5, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2,
        multiple_of=8, learn_sigma=False, qk_norm=True, cross_attention_dim=7,
    )  # fmt: skip
    theirs, state = reference.state_dict(), ours.state_dict()
    time_cond = "time_caption_embed"
    plain = {
        "x_embed": "patch_embedder.proj",
        "t_embed.0": f"{time_cond}.timestep_embedder.linear_1",
        "t_embed.2": f"{time_cond}.timestep_embedder.linear_2",
        "cond_embed.0": f"{time_cond}.caption_embedder.0",
        "cond_embed.1": f"{time_cond}.caption_embedder.1",
        "final_ada": "norm_out.linear_1",
        "final": "norm_out.linear_2",
    }
    renamed = "gate gate ada norm1.linear norm1 norm1.norm norm2 norm2 ffn_norm1 ffn_norm1 ffn_norm2 ffn_norm2"
    renamed += " cond_norm norm1_context out attn2.to_out.0 q_norm attn1.norm_q k_norm attn1.norm_k"
    renamed = (renamed + " cond_q_norm attn2.norm_q cond_k_norm attn2.norm_k w2 feed_forward.linear_2").split()
    fused = {}
    for layer in ("layers.0.", "layers.1."):
        plain |= {layer + a: layer + b for a, b in zip(renamed[::2], renamed[1::2])}
        fused[f"{layer}qkvq.weight"] = [
            f"{layer}{p}.weight" for p in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")
        ]
        fused[f"{layer}cond_kv.weight"] = [f"{layer}attn2.to_{x}.weight" for x in "kv"]
        fused[f"{layer}w13.weight"] = [f"{layer}feed_forward.linear_{n}.weight" for n in (1, 3)]
    copied = {"pad_token"}  # which the reference never uses
    for name, value in state.items():
        if name in fused:
            parts = value.split([len(theirs[part]) for part in fused[name]])
            targets = dict(zip(fused[name], parts))
        elif name != "null_cond":
            stem, _, leaf = name.rpartition(".")
            targets = {plain[name] if name in plain else f"{plain[stem]}.{leaf}": value}
        else:
            continue
        for target, part in targets.items():
            assert theirs[target].shape == part.shape, target
            theirs[target].copy_(part)
            copied.add(target)
    assert copied == set(theirs)
    x, t, cond = inputs(S=4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rope = get_2d_rotary_pos_embed_lumina(8, 2, 3)
    with torch.no_grad():
        image = x.transpose(1, 2).unflatten(2, (2, 3))
        expected = (
            reference(image, 1000 * (1 - t), cond, mask, rope, cross_attention_kwargs={})
            .sample.flatten(2)
            .transpose(1, 2)
        )
        assert torch.allclose(ours(x, t, cond, mask), expected, atol=1e-4)


def test_initialization_is_the_references():
    torch.manual_seed(0)
    model = NextDiT(dataclasses.replace(CONFIG, dim=128))
    assert model.layers[0].gate.abs().max() == 0 and model.null_cond.abs().max() == 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        if isinstance(module, (torch.nn.RMSNorm, torch.nn.LayerNorm)) and module.weight is not None:
            assert (module.weight == 1).all()


def test_paper_size_has_the_reference_number_of_parameters():
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(grid=(8, 8), target_dim=768, cond_dim=1280))
    # diffusers' model of this size has 1,307,125,920, of which pad_token (1792) is unused; ours adds null_cond (1280)
    assert sum(p.numel() for p in model.parameters()) == 1_307_125_920 - 1792 + 1280


def test_rope_turns_by_relative_position():
    cos, sin = rope_2d(8, (3, 4))
    q, k = torch.randn(2, 8)
    turned_q, turned_k = (rotate(v.expand(1, 12, 1, 8), (cos, sin))[0, :, 0] for v in (q, k))
    scores = turned_q @ turned_k.T  # (12, 12) over positions (row, column)
    assert torch.allclose(scores[0, 5], scores[6, 11], atol=1e-5)  # both one row and one column apart
    assert not torch.allclose(scores[0, 1], scores[0, 4], atol=1e-3)  # a column is not a row


def test_masked_condition_tokens_do_not_count():
    model = build()
    x, t, cond = inputs(S=6)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    assert torch.allclose(model(x, t, cond, mask), model(x, t, cond[:, :4]), atol=1e-5)
    assert torch.allclose(model(x, t, cond, torch.ones_like(mask)), model(x, t, cond), atol=1e-5)


def test_context_and_drop():
    model = build(n_kv_head=2)
    x, t, cond = inputs()
    assert torch.equal(model(x, t, context=model.context(cond)), model(x, t, cond))
    drop = torch.tensor([True, False, True])
    expected = torch.stack([model.null_cond.expand(6, 7), cond[1], model.null_cond.expand(6, 7)])
    assert torch.allclose(model(x, t, cond, drop=drop), model(x, t, expected), atol=1e-6)


def test_gradient_checkpointing_changes_no_bit():
    x, t, cond = inputs()
    grads = []
    for on in (False, True):
        model = build(gradient_checkpointing=on)
        model(x, t, cond).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_compiles_without_a_graph_break():
    model = build()
    x, t, cond = inputs()
    drop = torch.tensor([True, False, False])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, t, cond, None, drop), model(x, t, cond, None, drop), atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dim=30), "dim=30"),
        (dict(n_head=16), "multiple of 4"),
        (dict(n_kv_head=3), "n_kv_head=3"),
        (dict(n_layer=0), "n_layer=0"),
    ],
)
def test_bad_sizes_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_bad_inputs_are_named():
    model = build()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="5 tokens of 5 channels; the model is for 2x3 of 5"):
        model(x[:, :5], t, cond)
    with pytest.raises(ValueError, match=r"\(3, 6, 6\)"):
        model(x, t, cond[..., :6])
