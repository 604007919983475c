"""
Turn pictures into shards of paired token embeddings, by two vision encoders of transformers.

    pip install -r requirements-images.txt
    python data/images/extract.py PICTURES --out=data/shards --cond=NAME --target=NAME
    torchrun --standalone --nproc_per_node=8 data/images/extract.py PICTURES ...    # on 8 GPUs
    python prepare.py data/shards --out=data/mine

PICTURES are folders, read to any depth in natural order, and webdataset tars. The caption of a.jpg
is in a.txt, or in a line {"file_name": "a.jpg", "caption": ...} of the folder's captions.jsonl.
NAME is a model on the Hugging Face Hub, or a local folder that holds one: CLIP, SigLIP, DINOv2, ...
Tokens are averaged to the smaller of the two encoders' grids; CLS and registers are dropped.

The same command continues an interrupted run: complete shards are kept. Pictures that cannot be
read are skipped; the output and embeddings_manifest.json list them.
"""

import functools
import json
import pickle
import sys
import tarfile
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from plumbing.checkpoint import replace_file  # noqa: E402
from plumbing.configurator import (  # noqa: E402
    check_numbers,
    configure_paths,
    set_up_console,
)  # fmt: skip
from plumbing.distributed import (  # noqa: E402
    LAUNCHED,
    RANK,
    WORLD_SIZE,
    all_reduce_sum,
    exit_process,
    init_distributed,
    pick_device,
    pick_dtype,
)  # fmt: skip
from plumbing.sources import load_pickle, natural_order  # noqa: E402

try:
    from PIL import Image, ImageOps
    from transformers import AutoImageProcessor, AutoModel
except ImportError as e:
    sys.exit(f"error: {e}: pip install -r requirements-images.txt")

SUFFIXES = "jpg jpeg png webp gif bmp tif tiff".split()
KEYS = ("eva_blip3o_embeddings", "clip_blip3o_embeddings")  # conditions, targets

# ---- the shards
out = ""  # DIR, their folder
shard_size = 1000  # pictures per shard
dtype = "float16"  # of the arrays: float16 | float32
# ---- the encoders
cond = ""  # NAME of the encoder of the conditions
target = ""  # NAME of the encoder of the targets
cond_processor = ""  # NAME of an image processor, if the encoder comes without one
target_processor = ""
trust_remote_code = False  # run the code that comes with an encoder, as EVA-CLIP needs
layer = -1  # which hidden state: -1 is the model's output, -2 that of the last layer but one
pool = 1  # then average squares of pool x pool tokens
# ---- the machine
device = "auto"  # auto | cpu | cuda | ...
precision = "auto"  # of the encoders: float32 | bfloat16 | float16 (auto: bfloat16 on cuda)
batch_size = 64
workers = 8  # processes that decode ahead, on a GPU; on a CPU encoding takes nearly all the time
# ----


def list_files(source):
    """{name: (path, offset, size)} of the files in a folder, in natural order, or in a tar."""
    if source.is_dir():
        paths = sorted(source.rglob("[!.]*"), key=natural_order)
        return {str(path.relative_to(source)): (path, 0, -1) for path in paths}
    with tarfile.open(source, "r:") as tar:
        return {file.name: (source, file.offset_data, file.size) for file in tar}


def read(path, offset, size):
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


def find_samples(source):
    """Yield (key, picture, file of the caption or None, caption or None), files as for read()."""
    files = list_files(source)
    captions = {}
    if "captions.jsonl" in files:
        for row in map(json.loads, read(*files["captions.jsonl"]).splitlines()):
            captions[row["file_name"]] = row["caption"]
    for name, picture in files.items():
        key, _, suffix = name.rpartition(".")
        if suffix.lower() in SUFFIXES:
            yield key, picture, files.get(f"{key}.txt"), captions.get(name)


def decode(processors, samples):
    """{key: caption} of the pictures that can be read; pixels (B, 3, H, W) for each encoder."""
    captions, pictures = {}, []
    for key, picture, text, caption in samples:
        try:
            image = Image.open(BytesIO(read(*picture)))
            image = ImageOps.exif_transpose(image).convert("RGB")
            captions[key] = read(*text).decode().strip() if text else caption
            pictures.append(image)
        except Exception as e:  # a damaged file can raise anything
            print(f"skipped {key}: {e}")
    return captions, [p(pictures, return_tensors="pt").pixel_values for p in processors if captions]


def load_encoder(name, processor):
    """(image processor, vision model)"""
    processor = AutoImageProcessor.from_pretrained(
        processor or name, backend="pil", trust_remote_code=trust_remote_code
    )
    model = AutoModel.from_pretrained(
        name, dtype=getattr(torch, precision), trust_remote_code=trust_remote_code
    )
    for key, buffer in model.named_buffers():
        if "position_ids" in key:  # transformers 5 leaves those of remote code uninitialized
            buffer.copy_(torch.arange(buffer.numel()))
    # CLIP and SigLIP have a text model too
    return processor, getattr(model, "vision_model", model).to(device).eval()


@torch.inference_mode()
def encode(model, pixels):
    """Pixels (B, 3, height, width) -> tokens (B, C, H, W), without CLS and registers."""
    pixels = pixels.to(device, getattr(torch, precision))
    output = model(pixel_values=pixels, output_hidden_states=True)
    x = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    side = pixels.shape[-1] // model.config.patch_size
    n_registers = getattr(model.config, "num_register_tokens", 0)
    n_cls = x.shape[1] - n_registers - side**2
    if n_cls not in (0, 1):
        raise ValueError(
            f"{x.shape[1]} tokens are not a grid of {side}x{side}, {n_registers} registers "
            "and at most one class token"
        )
    return x[:, -(side**2) :].float().mT.unflatten(2, (side, side))


def main():
    global device, precision
    config, sources = configure_paths(globals())
    set_up_console()
    check_numbers(config, "shard_size batch_size pool", "layer")
    if not (sources and out and cond and target) or dtype not in ("float16", "float32"):
        sys.exit("error: name pictures, --out, --cond and --target; --dtype is float16 or float32")
    device = pick_device(device)
    if LAUNCHED:
        device = init_distributed(device, timeout=10_000)
    precision = pick_dtype(precision, device)

    samples = []
    for source in map(Path, sources):
        for path in [source, *sorted(source.rglob("[!.]*.tar"), key=natural_order)]:
            try:
                samples += find_samples(path)
            except (tarfile.TarError, LookupError, ValueError) as e:  # no tar, or no captions
                raise ValueError(f"{path} or its captions cannot be read: {e!r}") from e
    if not samples:
        raise ValueError(f"no pictures in {sources}")
    key, count = Counter(key for key, *_ in samples).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} pictures have the key {key}: rename them, or make two folders")

    processors, models = zip(
        load_encoder(cond, cond_processor), load_encoder(target, target_processor)
    )
    sides = []
    for processor, model in zip(processors, models):
        pixels = processor(Image.new("RGB", (64, 64)), return_tensors="pt").pixel_values
        sides.append(encode(model, pixels).shape[-1])
    if min(sides) % pool or max(sides) % min(sides):
        raise ValueError(f"grids of {sides} tokens per side have no common one with {pool=}")
    side = min(sides) // pool

    for name in "out device batch_size workers".split():
        del config[name]
    config |= dict(precision=precision, grid=[side, side])
    config["pictures"] = zlib.crc32(repr(samples).encode())
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.pkl"):
        if load_pickle(path).get("config") != config:
            raise ValueError(f"{path} is of other pictures or settings: choose another --out")

    for i in range(RANK * shard_size, len(samples), WORLD_SIZE * shard_size):
        path = folder / f"embeddings_shard_{i // shard_size:05d}.pkl"
        if path.exists():
            continue
        part = samples[i : i + shard_size]
        loader = DataLoader(
            part,
            batch_size,
            collate_fn=functools.partial(decode, processors),
            num_workers=0 if device == "cpu" else workers,
        )
        bar = tqdm(desc=path.name, total=len(part), unit=" pictures", disable=RANK > 0)
        content = dict(keys=[], captions=[], config=config)
        arrays = [], []
        for captions, pixels in loader:
            bar.update(len(captions))
            content["keys"] += captions
            content["captions"] += captions.values()
            for blocks, model, x in zip(arrays, models, pixels):
                x = adaptive_avg_pool2d(encode(model, x), side).flatten(2).mT  # (B, T, C)
                blocks.append(x.cpu().numpy().astype(dtype))
        bar.close()
        if content["keys"]:
            content |= zip(KEYS, map(np.concatenate, arrays))
            replace_file(path, lambda f: pickle.dump(content, f))

    all_reduce_sum(torch.zeros(1, device=device))  # waits for the other processes
    if RANK == 0:
        keys = set().union(*(load_pickle(path)["keys"] for path in folder.glob("*.pkl")))
        skipped = [key for key, *_ in samples if key not in keys]
        manifest = dict(total_samples=len(keys), skipped=skipped, config=config)
        (folder / "embeddings_manifest.json").write_text(json.dumps(manifest, indent=1))
        print(f"{folder}: {len(keys)} pictures, {len(skipped)} skipped")
    exit_process()


if __name__ == "__main__":
    main()
