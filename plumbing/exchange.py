"""
BLIP3-o's weights: the NextDiT of conditioning "cross" from and to the files of diffusers'
LuminaNextDiT2DModel, config.json and safetensors, sharded or not.

    sizes, state = from_diffusers("folder")
    model = NextDiT(NextDiTConfig(**sizes))
    model.load_state_dict(state, assign=True)
    to_diffusers(model, "folder")

Its velocity runs from data to noise, ours from noise to data, such that for every input
ours(x, t, cond) = -reference(x, 1000 * (1 - t), cond): the sign goes into the last layer, the time
into model.timestep_embedding.
"""

import json
import math
from pathlib import Path

import torch

INTEGERS = dict(
    target_dim="in_channels",
    cond_dim="cross_attention_dim",
    dim="hidden_size",
    n_layer="num_layers",
    n_head="num_attention_heads",
    n_kv_head="num_kv_heads",
    multiple_of="multiple_of",
)
CONFIG = INTEGERS | dict(
    ffn_dim_multiplier="ffn_dim_multiplier",
    norm_eps="norm_eps",
    qk_norm="qk_norm",
)
PLAIN = dict(conditioning="cross", conv=False, prior=False, rope="lumina")
# Our parameter, the reference's and its shape; where ours has several, they are stacked in it.
PARAMETERS = """
x_embed.weight                   patch_embedder.proj.weight                           dim D
x_embed.bias                     patch_embedder.proj.bias                             dim
t_embed.0.weight                 time_caption_embed.timestep_embedder.linear_1.weight emb 256
t_embed.0.bias                   time_caption_embed.timestep_embedder.linear_1.bias   emb
t_embed.2.weight                 time_caption_embed.timestep_embedder.linear_2.weight emb emb
t_embed.2.bias                   time_caption_embed.timestep_embedder.linear_2.bias   emb
cond_embed.0.weight              time_caption_embed.caption_embedder.0.weight         C
cond_embed.0.bias                time_caption_embed.caption_embedder.0.bias           C
cond_embed.1.weight              time_caption_embed.caption_embedder.1.weight         emb C
cond_embed.1.bias                time_caption_embed.caption_embedder.1.bias           emb
layers.N.ada.weight              layers.N.norm1.linear.weight                         4*dim emb
layers.N.ada.bias                layers.N.norm1.linear.bias                           4*dim
layers.N.norm1.weight            layers.N.norm1.norm.weight                           dim
layers.N.norm2.weight            layers.N.norm2.weight                                dim
layers.N.ffn_norm1.weight        layers.N.ffn_norm1.weight                            dim
layers.N.ffn_norm2.weight        layers.N.ffn_norm2.weight                            dim
layers.N.attn.qkvq.weight        layers.N.attn1.to_q.weight                           dim dim
layers.N.attn.qkvq.weight        layers.N.attn1.to_k.weight                           kv_dim dim
layers.N.attn.qkvq.weight        layers.N.attn1.to_v.weight                           kv_dim dim
layers.N.attn.qkvq.weight        layers.N.attn2.to_q.weight                           dim dim
layers.N.attn.q_norm.weight      layers.N.attn1.norm_q.weight                         dim
layers.N.attn.q_norm.bias        layers.N.attn1.norm_q.bias                           dim
layers.N.attn.k_norm.weight      layers.N.attn1.norm_k.weight                         kv_dim
layers.N.attn.k_norm.bias        layers.N.attn1.norm_k.bias                           kv_dim
layers.N.attn.cond_norm.weight   layers.N.norm1_context.weight                        C
layers.N.attn.cond_kv.weight     layers.N.attn2.to_k.weight                           kv_dim C
layers.N.attn.cond_kv.weight     layers.N.attn2.to_v.weight                           kv_dim C
layers.N.attn.cond_q_norm.weight layers.N.attn2.norm_q.weight                         dim
layers.N.attn.cond_q_norm.bias   layers.N.attn2.norm_q.bias                           dim
layers.N.attn.cond_k_norm.weight layers.N.attn2.norm_k.weight                         kv_dim
layers.N.attn.cond_k_norm.bias   layers.N.attn2.norm_k.bias                           kv_dim
layers.N.attn.gate               layers.N.gate                                        n_head
layers.N.attn.out.weight         layers.N.attn2.to_out.0.weight                       dim dim
layers.N.ffn.w13.weight          layers.N.feed_forward.linear_1.weight                ffn_dim dim
layers.N.ffn.w13.weight          layers.N.feed_forward.linear_3.weight                ffn_dim dim
layers.N.ffn.w2.weight           layers.N.feed_forward.linear_2.weight                dim ffn_dim
final_ada.weight                 norm_out.linear_1.weight                             dim emb
final_ada.bias                   norm_out.linear_1.bias                               dim
final.weight                     norm_out.linear_2.weight                             D dim
final.bias                       norm_out.linear_2.bias                               D
"""
UNUSED = "pad_token"  # a parameter that the reference never uses


def reference_parameters(sizes):
    """{our parameter: {the reference's parameter: its shape, ...}} for a model of these sizes."""
    dim, multiple_of = sizes["dim"], sizes["multiple_of"]
    kv_dim = dim // sizes["n_head"] * sizes["n_kv_head"]
    hidden = int((sizes["ffn_dim_multiplier"] or 1) * int(8 * dim / 3))
    widths = {"D": sizes["target_dim"], "C": sizes["cond_dim"], "n_head": sizes["n_head"]}
    widths |= {"dim": dim, "4*dim": 4 * dim, "kv_dim": kv_dim, "emb": min(dim, 1024)}
    widths |= {"ffn_dim": multiple_of * math.ceil(hidden / multiple_of), "256": 256}
    stacks = {}
    for line in PARAMETERS.strip().splitlines():
        ours, theirs, *shape = line.split()
        if ".norm_" in theirs and not sizes["qk_norm"]:
            continue
        for i in range(sizes["n_layer"] if "N" in ours else 1):
            stack = stacks.setdefault(ours.replace("N", str(i)), {})
            stack[theirs.replace("N", str(i))] = [widths[name] for name in shape]
    return stacks


def read_sizes(folder, grid):
    """The keyword arguments of NextDiTConfig that config.json amounts to."""
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{str(folder)!r} is no folder of a diffusers model: {e}") from e
    required = {"patch_size", "learn_sigma", "sample_size", *CONFIG.values()}
    missing = sorted(required - set(given if isinstance(given, dict) else ()))
    if missing:
        raise ValueError(f"{path}: not a LuminaNextDiT2DModel's, without {', '.join(missing)}")
    if given["patch_size"] != 1 or given["learn_sigma"]:
        raise ValueError(f"{path}: not a LuminaNextDiT2DModel of patch_size 1 without learn_sigma")
    sizes = {ours: given[theirs] for ours, theirs in CONFIG.items()}
    if sizes["n_kv_head"] is None:
        sizes["n_kv_head"] = sizes["n_head"]
    sizes["grid"] = tuple(grid or given.get("grid") or [given["sample_size"]] * 2)
    integers = [(name, sizes[name]) for name in INTEGERS]
    for name, size in integers + [("grid", size) for size in sizes["grid"]]:
        if type(size) is not int or size < 1:
            raise ValueError(f"{path}: {name}={size!r} must be a whole number of at least 1")
    numbers = [sizes["norm_eps"], sizes["ffn_dim_multiplier"] or 1.0]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"{path}: norm_eps and ffn_dim_multiplier must be numbers")
    return sizes


def from_diffusers(folder, grid=None, cast=lambda parameter: parameter, channels=None):
    """(sizes, state): keyword arguments of NextDiTConfig, and the model's state dict.

    grid: (H, W), by default the square of config.json's sample_size
    cast: what is kept of each parameter, which comes in the file's dtype; they are read one at a
        time, so that never two copies of the model are in memory
    channels: (C, D) that the model must have, if given
    The null condition is BLIP3-o's, zero. Raises ValueError where the folder holds something else.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    sizes = read_sizes(folder, grid)
    found = sizes["cond_dim"], sizes["target_dim"]
    if channels and found != channels:
        raise ValueError(f"{folder} is for (condition, target) channels {found}, not {channels}")
    stacks = reference_parameters(sizes)
    state, files = {}, {}

    def read(name, shape):
        path, full_name = files[name]
        with safe_open(path, "pt") as file:  # what an open file has read stays in memory
            tensor = file.get_tensor(full_name)
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{folder}: size mismatch for {name}: "
                f"{list(tensor.shape)}, but {shape} by config.json"
            )
        return tensor

    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for full_name in file.keys():
                    # BLIP3-o's names have model., dit.model. or model.dit.model. in front
                    files[full_name.split("model.")[-1]] = path, full_name
        names = {name for stack in stacks.values() for name in stack}
        missing = sorted(names - set(files))
        surplus = sorted(set(files) - names - {UNUSED})
        if missing or surplus:
            raise ValueError(
                f"{folder}: missing parameters {missing or 'none'}, surplus {surplus or 'none'}"
            )
        for ours, stack in stacks.items():
            stacked = torch.cat([read(name, shape) for name, shape in stack.items()])
            state[ours] = cast(-stacked if ours.startswith("final.") else stacked)
        null_cond = torch.zeros(sizes["cond_dim"], dtype=stacked.dtype)
        state["null_cond"] = cast(null_cond)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{folder}: {' '.join(str(e).split())}") from e
    return PLAIN | sizes, state


def to_diffusers(model, folder):
    """Write what diffusers' LuminaNextDiT2DModel.from_pretrained reads.

    For a velocity on the linear path. The null condition has no place there: where guidance is
    used, give it as the condition. Raises ValueError where the folder holds another model's files,
    or where diffusers has no such model.
    """
    from safetensors.torch import save_file

    config, folder = model.config, Path(folder)
    for name, expected in PLAIN.items():
        value = getattr(config, name)
        if value != expected:
            raise ValueError(f"diffusers has no NextDiT of {name}={value!r}")
    file = folder / "diffusion_pytorch_model.safetensors"
    others = sorted(p.name for p in folder.glob("*.safetensors*") if p.name != file.name)
    if others:
        raise ValueError(f"{str(folder)!r} holds another model: {', '.join(others)}")

    sizes = {name: getattr(config, name) for name in CONFIG}
    values, state = model.state_dict(), {UNUSED: torch.zeros(config.dim)}
    for ours, stack in reference_parameters(sizes).items():
        value = -values[ours] if ours.startswith("final.") else values[ours]
        parts = value.split([shape[0] for shape in stack.values()])
        state |= {name: part.contiguous().cpu() for name, part in zip(stack, parts)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})

    H, W = config.grid
    written = {theirs: sizes[ours] for ours, theirs in CONFIG.items()}
    written |= dict(sample_size=H, patch_size=1, learn_sigma=False, scaling_factor=1.0)
    written["_class_name"] = "LuminaNextDiT2DModel"
    if H != W:
        written["grid"] = [H, W]  # diffusers ignores it
    (folder / "config.json").write_text(json.dumps(written, indent=1))
