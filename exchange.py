"""
BLIP3-o's weights: the NextDiT of conditioning "cross" from and to the files of diffusers' LuminaNextDiT2DModel.

    model = NextDiT.from_diffusers("folder")    # config.json and safetensors, sharded or not
    model.to_diffusers("folder")
"""

import itertools
import json
import re
from pathlib import Path

import torch

# diffusers' names for our modules; several are stacked in one matrix of ours
REFERENCE = {
    "x_embed": ["patch_embedder.proj"],
    "t_embed.0": ["time_caption_embed.timestep_embedder.linear_1"],
    "t_embed.2": ["time_caption_embed.timestep_embedder.linear_2"],
    "cond_embed.0": ["time_caption_embed.caption_embedder.0"],
    "cond_embed.1": ["time_caption_embed.caption_embedder.1"],
    "final_ada": ["norm_out.linear_1"],
    "final": ["norm_out.linear_2"],
    "gate": ["gate"],
    "ada": ["norm1.linear"],
    "norm1": ["norm1.norm"],
    "cond_scale": ["norm1_context.weight"],
    "qkvq": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"],
    "cond_kv": ["attn2.to_k", "attn2.to_v"],
    "q_norm": ["attn1.norm_q"],
    "k_norm": ["attn1.norm_k"],
    "cond_q_norm": ["attn2.norm_q"],
    "cond_k_norm": ["attn2.norm_k"],
    "out": ["attn2.to_out.0"],
    "w13": ["feed_forward.linear_1", "feed_forward.linear_3"],
    "w2": ["feed_forward.linear_2"],
}
REFERENCE_CONFIG = dict(
    target_dim="in_channels", cond_dim="cross_attention_dim", dim="hidden_size", n_layer="num_layers",
    n_head="num_attention_heads", n_kv_head="num_kv_heads", multiple_of="multiple_of",
    ffn_dim_multiplier="ffn_dim_multiplier", norm_eps="norm_eps", qk_norm="qk_norm",
)  # fmt: skip


def reference_names(name):
    """The reference's parameters that make up ours, in the order in which they are stacked."""
    layer, module, leaf = re.fullmatch(r"(layers\.\d+\.)?(.+?)(\.weight|\.bias)?", name).groups("")
    return [f"{layer}{part}{leaf}" for part in REFERENCE.get(module, [module])]


def from_diffusers(build, folder, grid=None, cast=lambda parameter: parameter):
    """What build(grid=..., **sizes of NextDiTConfig) makes, with the weights of a folder of diffusers'
    LuminaNextDiT2DModel: config.json and safetensors, sharded or not.

    Its velocity runs from data to noise, ours from noise to data, so that ours(x, t, cond) =
    -reference(x, 1000 (1 - t), cond): the sign goes into the last layer, the time is timestep_embedding's.
    The null condition is BLIP3-o's, zero. `grid` (H, W) is by default the square of config.json's sample_size;
    `cast` makes of each parameter, which has the file's dtype, what is kept of it, so that never two copies of
    the model are in memory. Raises ValueError where the folder holds something else.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        given = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{str(folder)!r} is no folder of a diffusers model: {e}") from e
    due = {"patch_size", "learn_sigma", "sample_size", *REFERENCE_CONFIG.values()}
    if missing := sorted(due - set(given if isinstance(given, dict) else ())):
        raise ValueError(
            f"{folder}/config.json: not a LuminaNextDiT2DModel's, without {', '.join(missing)}"
        )
    if given["patch_size"] != 1 or given["learn_sigma"]:
        raise ValueError(
            f"{folder}/config.json: not a LuminaNextDiT2DModel of patch_size 1 without learn_sigma"
        )
    sizes = {ours: given[theirs] for ours, theirs in REFERENCE_CONFIG.items()}
    try:
        with torch.device("meta"):  # no parameters before those of the file
            model = build(grid=grid or given.get("grid") or (given["sample_size"],) * 2, **sizes)
    except TypeError as e:
        raise ValueError(f"{folder}/config.json: {e}") from e

    def read(name):
        with safe_open(held[name], "pt") as file:  # what an open file has read stays in memory
            return file.get_tensor(name)

    try:
        held = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                held |= dict.fromkeys(file.keys(), path)
        prefixes, first = (
            ("", "model.", "dit.model.", "model.dit.model."),
            "patch_embedder.proj.weight",
        )
        prefix = next((p for p in prefixes if p + first in held), "")
        due = {
            n: [prefix + part for part in reference_names(n)]
            for n in model.state_dict()
            if n != "null_cond"
        }
        names = set(itertools.chain(*due.values()))
        missing, surplus = (
            sorted(names - set(held)),
            sorted(set(held) - names - {prefix + "pad_token"}),
        )
        if missing or surplus:
            raise ValueError(
                f"{folder}: missing parameters {missing or 'none'}, surplus {surplus or 'none'}"
            )
        state = {name: cast(torch.cat([read(n) for n in parts])) for name, parts in due.items()}
        state |= {name: -state[name] for name in ("final.weight", "final.bias")}
        state["null_cond"] = cast(
            torch.zeros(model.config.cond_dim, dtype=read(prefix + first).dtype)
        )
        model.load_state_dict(state, assign=True)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"{folder}: {' '.join(str(e).split())}") from e
    return model


def to_diffusers(model, folder):
    """Write what diffusers' LuminaNextDiT2DModel.from_pretrained reads: the reverse of from_diffusers.

    The null condition has no place there: where guidance is used, it is to be given as the condition. For a
    velocity on the linear path. Raises ValueError where the folder holds another model's files, or where the model
    is one that diffusers has not.
    """
    from safetensors.torch import save_file

    for name, reference in dict(
        conditioning="cross", conv=False, prior=False, rope="lumina"
    ).items():
        if getattr(model.config, name) != reference:
            raise ValueError(f"diffusers has no NextDiT of {name}={getattr(model.config, name)!r}")
    file = Path(folder) / "diffusion_pytorch_model.safetensors"
    if others := [p.name for p in Path(folder).glob("*.safetensors*") if p.name != file.name]:
        raise ValueError(f"{str(folder)!r} holds another model: {', '.join(sorted(others))}")
    folder, state = (
        Path(folder),
        {"pad_token": torch.zeros(model.config.dim)},
    )  # never used by the reference
    for name, value in model.state_dict().items():
        if name != "null_cond":
            names = reference_names(name)
            value = -value if name.startswith("final.") else value
            sizes = (
                model.layers[0].split
                if len(names) == 4
                else [len(value) // len(names)] * len(names)
            )
            state |= {n: part.contiguous().cpu() for n, part in zip(names, value.split(sizes))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})
    H, W = model.config.grid
    config = dict(
        _class_name="LuminaNextDiT2DModel", sample_size=H, patch_size=1, learn_sigma=False
    )
    config |= dict(scaling_factor=1.0) | (
        {} if H == W else {"grid": [H, W]}
    )  # diffusers ignores the last
    config |= {theirs: getattr(model.config, ours) for ours, theirs in REFERENCE_CONFIG.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
