"""
Models from and to files: runs of this project, and safetensors, in our names or in diffusers'.

    python -m plumbing.exchange out-mine --out=FOLDER      # a run -> safetensors and config.json
    python -m plumbing.exchange BLIP3O --prefix=model.dit.model. --out=FOLDER    # its DiT alone

    ckpt, parameters = open_model("out-mine")    # a run, a checkpoint, a folder of safetensors
    model = NextDiT(NextDiTConfig(**ckpt["model_args"]))
    checkpoint.load_weights(model, parameters, cast=torch.Tensor.float)
    save_model(Path("folder"), ckpt, model.state_dict())

diffusers' names are those of its LuminaNextDiT2DModel, and of the class of the same name that
BLIP3-o trains, which has a caption_projection. Their velocity runs from data to noise, ours from
noise to data, such that for every input ours(x, t, cond) = -reference(x, 1000 * (1 - t), cond): the
sign goes into the last layer, the time into model.timestep_embedding.
"""

import json
from pathlib import Path

import torch

from plumbing.checkpoint import check_tensors, read_weights
from plumbing.configurator import configure_paths, set_up_console
from plumbing.distributed import print0

# ---- settings
out = ""  # the folder to write
weights = "ema"  # of a run: ema | model (the raw ones)
prefix = ""  # of the parameters' names; needed if the files hold several models of diffusers
# ----

# Our parameters and the reference's. Where ours has several, they are stacked in it.
PARAMETERS = """\
x_embed.weight                    patch_embedder.proj.weight
x_embed.bias                      patch_embedder.proj.bias
t_embed.0.weight                  time_caption_embed.timestep_embedder.linear_1.weight
t_embed.0.bias                    time_caption_embed.timestep_embedder.linear_1.bias
t_embed.2.weight                  time_caption_embed.timestep_embedder.linear_2.weight
t_embed.2.bias                    time_caption_embed.timestep_embedder.linear_2.bias
cond_projection.0.weight          caption_projection.linear_1.weight
cond_projection.0.bias            caption_projection.linear_1.bias
cond_projection.2.weight          caption_projection.linear_2.weight
cond_projection.2.bias            caption_projection.linear_2.bias
cond_embed.0.weight               time_caption_embed.caption_embedder.0.weight
cond_embed.0.bias                 time_caption_embed.caption_embedder.0.bias
cond_embed.1.weight               time_caption_embed.caption_embedder.1.weight
cond_embed.1.bias                 time_caption_embed.caption_embedder.1.bias
layers.N.ada.weight               layers.N.norm1.linear.weight
layers.N.ada.bias                 layers.N.norm1.linear.bias
layers.N.norm1.weight             layers.N.norm1.norm.weight
layers.N.norm2.weight             layers.N.norm2.weight
layers.N.ffn_norm1.weight         layers.N.ffn_norm1.weight
layers.N.ffn_norm2.weight         layers.N.ffn_norm2.weight
layers.N.attn.qkvq.weight         layers.N.attn1.to_q.weight
layers.N.attn.qkvq.weight         layers.N.attn1.to_k.weight
layers.N.attn.qkvq.weight         layers.N.attn1.to_v.weight
layers.N.attn.qkvq.weight         layers.N.attn2.to_q.weight
layers.N.attn.q_norm.weight       layers.N.attn1.norm_q.weight
layers.N.attn.q_norm.bias         layers.N.attn1.norm_q.bias
layers.N.attn.k_norm.weight       layers.N.attn1.norm_k.weight
layers.N.attn.k_norm.bias         layers.N.attn1.norm_k.bias
layers.N.attn.cond_norm.weight    layers.N.norm1_context.weight
layers.N.attn.cond_kv.weight      layers.N.attn2.to_k.weight
layers.N.attn.cond_kv.weight      layers.N.attn2.to_v.weight
layers.N.attn.cond_q_norm.weight  layers.N.attn2.norm_q.weight
layers.N.attn.cond_q_norm.bias    layers.N.attn2.norm_q.bias
layers.N.attn.cond_k_norm.weight  layers.N.attn2.norm_k.weight
layers.N.attn.cond_k_norm.bias    layers.N.attn2.norm_k.bias
layers.N.attn.gate                layers.N.gate
layers.N.attn.out.weight          layers.N.attn2.to_out.0.weight
layers.N.ffn.w13.weight           layers.N.feed_forward.linear_1.weight
layers.N.ffn.w13.weight           layers.N.feed_forward.linear_3.weight
layers.N.ffn.w2.weight            layers.N.feed_forward.linear_2.weight
final_ada.weight                  norm_out.linear_1.weight
final_ada.bias                    norm_out.linear_1.bias
final.weight                      norm_out.linear_2.weight
final.bias                        norm_out.linear_2.bias
"""
# NextDiTConfig's arguments and the reference's; of ffn_dim see reference_config.
CONFIG = """\
target_dim  in_channels
cond_dim    cross_attention_dim
dim         hidden_size
n_layer     num_layers
n_head      num_attention_heads
n_kv_head   num_kv_heads
ffn_dim     multiple_of
norm_eps    norm_eps
qk_norm     qk_norm
"""
FIRST = "patch_embedder.proj.weight"
# what the reference is, and how BLIP3-o trains it
PLAIN = dict(conditioning="cross", conv=False, prior=False, rope="lumina")
VELOCITY = dict(path="linear", prediction="v", sigma_min=0.0, sigma_max=1.0)
META = "model_args flow normalize stats cond_tokens code".split()


def stack_names(names):
    """{our parameter: [the reference's, in the order in which ours stacks them]}, of those that are
    in `names`, ours or theirs."""
    n_layer = sum(name.endswith(".gate") for name in names)
    stacks = {}
    for line in PARAMETERS.splitlines():
        for i in range(n_layer if "N" in line else 1):
            ours, theirs = line.replace("N", str(i)).split()
            if ours in names or theirs in names:
                stacks.setdefault(ours, []).append(theirs)
    return stacks


def open_model(path, weights="ema", grid=None, prefix=""):
    """(ckpt, parameters): what a model is, and its parameters, read one at a time.

    path: a checkpoint, the folder of a run (for its ckpt_best.pt or, before the first evaluation,
        its ckpt_last.pt), or a folder of config.json and safetensors, sharded or not, in our names
        or in diffusers'
    weights: of a checkpoint, "ema" or "model", the raw ones
    grid: (H, W) of a model from elsewhere; by default the square that its config.json says
    prefix: what the names of the parameters begin with. By default it is found, and parameters
        without it are left out; needed where the files hold several models of diffusers
    Returns a dict(model_args, flow, normalize, stats, cond_tokens, config, files, ...), and an
    iterator of (name, tensor). Raises ValueError where there is no such model.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"there is no {path}: no run, checkpoint or folder of safetensors")
    if path.is_dir():
        checkpoints = sorted(path.glob("ckpt_*st.pt"))  # ckpt_best.pt before ckpt_last.pt
        if not checkpoints:
            try:
                return open_safetensors(path, grid, prefix)
            except Exception as e:  # a damaged file can raise anything
                raise ValueError(f"{path}: no ckpt_best.pt, and no safetensors model: {e}") from e
        path = checkpoints[0]
        if path.name == "ckpt_last.pt":
            print0(
                f"{path} is taken, since the run has no ckpt_best.pt before its first evaluation"
            )
    ckpt, parameters = read_weights(path, weights)
    return ckpt | {"files": [path]}, parameters


def open_safetensors(folder, grid, prefix):
    """open_model() for a folder of such files."""
    from safetensors import safe_open

    given = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    places = {}  # name -> file
    for path in files:
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def read(name):
        with safe_open(places[name], "pt") as file:  # what an open file has read stays in memory
            tensor = file.get_tensor(name)
        check_tensors(name, tensor)
        return tensor

    ckpt = dict.fromkeys(META) | {"files": files, "config": {"data_dir": None}}
    is_ours = "model_args" in given
    if is_ours:
        ckpt |= {name: given[name] for name in META}
        ckpt["stats"] = {name: torch.tensor(value) for name, value in given["stats"].items()}
        if "x_embed.weight" in places:
            return ckpt, ((name, read(name)) for name in places)
    starts = [name.removesuffix(FIRST) for name in places if name.endswith(prefix + FIRST)]
    if len(starts) != 1:
        raise ValueError(
            f"{len(starts)} parameters, not one, end in {prefix + FIRST}: see --prefix"
        )
    start = starts[0]
    names = {name.removeprefix(start) for name in places if name.startswith(start)}
    stacks = stack_names(names)
    surplus = names.difference(["pad_token"], *stacks.values())  # which it never uses
    if surplus:
        raise ValueError(f"{len(surplus)} surplus parameters, such as {min(surplus)}")
    if not is_ours:
        sizes = PLAIN | read_sizes(names, lambda name: read(start + name).shape)
        sizes["norm_eps"] = given.get("norm_eps", 1e-5)
        sizes["grid"] = grid or [given.get("sample_size", 8)] * 2  # BLIP3-o's is 8x8
        ckpt |= dict(model_args=sizes, flow=VELOCITY, normalize="none")
    null_cond = given.get("null_cond", [0.0] * ckpt["model_args"]["cond_dim"])

    def read_stacks():
        for ours, theirs in stacks.items():
            stack = torch.cat([read(start + name) for name in theirs])
            yield ours, -stack if ours.startswith("final.") else stack
        yield "null_cond", torch.tensor(null_cond)

    return ckpt, read_stacks()


def read_sizes(names, shape):
    """Arguments of NextDiTConfig, from diffusers' names and a function name -> shape."""
    dim, target_dim = shape(FIRST)
    kv_dim, cond_dim = shape("layers.0.attn2.to_k.weight")
    projection = "caption_projection.linear_1.weight"
    if projection in names:
        _, cond_dim = shape(projection)
    (n_head,) = shape("layers.0.gate")
    return dict(
        target_dim=target_dim,
        cond_dim=cond_dim,
        dim=dim,
        n_layer=sum(name.endswith(".gate") for name in names),
        n_head=n_head,
        n_kv_head=kv_dim * n_head // dim,
        ffn_dim=shape("layers.0.feed_forward.linear_1.weight")[0],
        qk_norm="layers.0.attn1.norm_q.weight" in names,
        cond_projection=projection in names,
    )


def save_model(folder, ckpt, state):
    """Write safetensors and config.json, in diffusers' layout where diffusers or BLIP3-o has such
    a model, else in our names.

    ckpt, state: from open_model(), the state as a dict. Raises ValueError where the folder holds
    anything.
    """
    from safetensors.torch import save_file

    if any(folder.glob("*")):
        raise ValueError(f"{folder} is not empty: choose another --out")
    args = ckpt["model_args"]
    given = {name: ckpt[name] for name in META if ckpt["stats"]}  # else nothing of it is known
    file = folder / "model.safetensors"
    if PLAIN.items() <= args.items() and VELOCITY.items() <= ckpt["flow"].items():
        file = folder / "diffusion_pytorch_model.safetensors"
        given |= reference_config(args) | {"null_cond": state["null_cond"]}
        state = reference_state(args, state)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(given, default=torch.Tensor.tolist))


def reference_config(args):
    """The config.json of diffusers' model for NextDiTConfig's arguments `args`."""
    given = {"_class_name": "LuminaNextDiT2DModel", "patch_size": 1, "learn_sigma": False}
    for ours, theirs in map(str.split, CONFIG.splitlines()):
        given[theirs] = args[ours]
    given["sample_size"] = args["grid"][0]
    # the feed-forward's width is 8/3 or 4 dim, times this, rounded up: both arrive at multiple_of
    given["ffn_dim_multiplier"] = args["ffn_dim"] / (16 / 3 * args["dim"])
    return given


def reference_state(args, state):
    """Our parameters in diffusers' names."""
    dim = args["dim"]
    theirs = {} if args["cond_projection"] else {"pad_token": torch.zeros(dim)}
    for ours, names in stack_names(state).items():
        value = -state[ours] if ours.startswith("final.") else state[ours]
        parts = value.chunk(len(names))
        if ours.endswith("qkvq.weight"):
            kv_dim = len(value) // 2 - dim
            parts = value.split([dim, kv_dim, kv_dim, dim])
        theirs |= zip(names, parts)
    return theirs


if __name__ == "__main__":
    set_up_console()
    _, paths = configure_paths(globals())
    if len(paths) != 1 or not out:
        raise ValueError("name a model and a folder: python -m plumbing.exchange RUN --out=FOLDER")
    ckpt, parameters = open_model(paths[0], weights, prefix=prefix)
    save_model(Path(out), ckpt, dict(parameters))
    print(f"wrote {out}")
