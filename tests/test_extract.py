"""data/images/extract.py, with tiny encoders of random weights."""

import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import sys
import tarfile

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image

from conftest import ROOT, TINY, refused, run

SCRIPT = "data/images/extract.py"
COND, TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"

spec = importlib.util.spec_from_file_location("extract", ROOT / SCRIPT)
extract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extract)


# ---------------------------------------------------------------- encoders and pictures


def vision(patch_size, hidden_size=16, image_size=32):
    sizes = dict(patch_size=patch_size, hidden_size=hidden_size, image_size=image_size)
    return dict(num_hidden_layers=3, num_attention_heads=2, intermediate_size=24) | sizes


TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
TEXT |= dict(vocab_size=10, bos_token_id=0, eos_token_id=1)
DINO = {k: v for k, v in vision(4, 24).items() if k != "intermediate_size"} | dict(mlp_ratio=2)


def dinov3():
    return T.DINOv3ViTModel(T.DINOv3ViTConfig(**vision(8), num_register_tokens=2))


# name: how it is made, its class, tokens before the grid
MODELS = {
    "clip": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**vision(8))), 1),
    "dino": (lambda: T.Dinov2Model(T.Dinov2Config(**DINO)), 1),
    "registers": (
        lambda: T.Dinov2WithRegistersModel(
            T.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
        ),
        4,
    ),
    "dinov3": (dinov3, 3),
    "siglip": (lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**vision(8))), 0),
    "two towers": (
        lambda: T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=vision(8))),
        1,
    ),
    "three by three": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**vision(8, 16, 24))), 1),
    "distilled": (lambda: T.DeiTModel(T.DeiTConfig(**vision(8))), 2),
}


def make_processor(name):
    size = 24 if name == "three by three" else 32
    if name == "siglip":
        return T.SiglipImageProcessorPil(size=dict(height=size, width=size))
    if name in ("dino", "registers"):
        options = dict(size=dict(shortest_edge=40), image_mean=[0.4] * 3, image_std=[0.3] * 3)
        return T.BitImageProcessorPil(**options, crop_size=dict(height=size, width=size))
    crop = dict(height=size, width=size)
    return T.CLIPImageProcessorPil(size=dict(shortest_edge=size), crop_size=crop)


def save_encoder(folder, name):
    torch.manual_seed(len(name))
    model = MODELS[name][0]()
    for p in model.parameters():  # registers and CLS are zero at first
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    if name != "dinov3":  # whose image processor needs torchvision
        make_processor(name).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """{name: folder}"""
    folders = {name: tmp_path_factory.mktemp("encoders") / name for name in MODELS}
    for name, folder in folders.items():
        save_encoder(folder, name)
    return folders


def draw(seed, size=(50, 40)):
    """A smooth random picture, so that a JPEG file holds it well."""
    x = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(x).resize(size)


NAMES = ["a1.jpg", "a2.PNG", "a10.jpg", "sub2/b.webp", "sub2/deep/c.jpeg", "sub10/b.jpg"]
KEYS = [name.split(".")[0] for name in NAMES]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with NAMES, which is their natural order."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(i, (40 + 7 * i, 50)).save(folder / name)
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def one_process(one_thread, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def call(*args):
    """Run the script's main() here."""
    argv = [SCRIPT, "--device=cpu", *map(str, args)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", argv)
        extract.main()
    assert not end.value.code, end.value.code


def flags(out, cond, target, *more):
    return [f"--out={out}", f"--cond={cond}", f"--target={target}", *more]


def shards(out):
    return [pickle.loads(path.read_bytes()) for path in sorted(out.glob("*.pkl"))]


def manifest(out):
    return json.loads((out / "embeddings_manifest.json").read_text())


@torch.no_grad()
def tokens_of(folder, name, picture, layer=-1):
    """A (H, W, C) map, by the model's own class."""
    model = MODELS[name][0]()
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    pixels = make_processor(name)(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    tower = model.vision_model if name == "two towers" else model
    output = tower(pixel_values=pixels, output_hidden_states=True)
    x = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    x = x[0, MODELS[name][1] :]
    side = round(len(x) ** 0.5)
    return x.reshape(side, side, -1).numpy()


def pooled(x, n):
    """(H, W, C) -> (H / n * W / n, C)"""
    H, W, C = x.shape
    rows = [x[i : i + n, j : j + n].mean((0, 1)) for i in range(0, H, n) for j in range(0, W, n)]
    return np.stack(rows)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what the pickles hold


@pytest.mark.parametrize(
    "cond, target, layer, pool",
    [
        ("dino", "clip", -1, 1),  # 8x8 and 4x4
        ("registers", "siglip", -2, 1),
        ("two towers", "registers", -1, 2),
        ("dinov3", "clip", 1, 4),
    ],
)
def test_the_encoders_own_outputs_picture_by_picture(
    tmp_path, encoders, pictures, cond, target, layer, pool
):
    more = ["--dtype=float32", f"--layer={layer}", f"--pool={pool}", "--batch_size=4"]
    more.append("--shard_size=5")
    if cond == "dinov3":
        more.append(f"--cond_processor={encoders['clip']}")
    call(pictures, *flags(tmp_path / "out", encoders[cond], encoders[target], *more))
    found = shards(tmp_path / "out")
    assert [shard["keys"] for shard in found] == [KEYS[:5], KEYS[5:]]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "embeddings_manifest.json",
        "embeddings_shard_00000.pkl",
        "embeddings_shard_00001.pkl",
    ]
    side = 4 // pool
    for name, kind in ((cond, COND), (target, TARGET)):
        rows = np.concatenate([shard[kind] for shard in found])
        assert rows.dtype == np.float32 and rows.shape[:2] == (6, side**2)
        for row, file in zip(rows, NAMES):
            x = tokens_of(encoders[name], name, Image.open(pictures / file), layer)
            close(row, pooled(x, len(x) // side))
    config = found[0]["config"]
    assert config["grid"] == [side, side]
    assert (config["cond"], config["target"]) == (str(encoders[cond]), str(encoders[target]))
    assert (config["layer"], config["pool"], config["precision"]) == (layer, pool, "float32")
    assert manifest(tmp_path / "out") == dict(total_samples=6, skipped=[], config=config)


def test_float16_is_the_default_and_processes_may_decode(tmp_path, encoders, pictures):
    more = flags(tmp_path / "a", encoders["dino"], encoders["clip"])
    call(pictures, *more, "--dtype=float32")
    call(pictures, *more, f"--out={tmp_path / 'b'}", "--workers=2", "--batch_size=2")
    (a,), (b,) = shards(tmp_path / "a"), shards(tmp_path / "b")
    assert a["keys"] == b["keys"]
    for kind in (COND, TARGET):
        assert b[kind].dtype == np.float16
        np.testing.assert_allclose(a[kind], b[kind], atol=5e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(tmp_path, encoders, pictures, precision):
    more = flags(tmp_path / "a", encoders["registers"], encoders["clip"])
    call(pictures, *more)
    call(pictures, *more, f"--out={tmp_path / 'b'}", f"--precision={precision}")
    (a,), (b,) = shards(tmp_path / "a"), shards(tmp_path / "b")
    for kind in (COND, TARGET):
        error = a[kind].astype(float) - b[kind]
        assert 0 < np.abs(error).mean() < 0.05 * np.abs(a[kind]).mean()


def test_pictures_are_upright_and_rgb(tmp_path, encoders):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = draw(0, (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    picture.save(folder / "turned.png", exif=exif)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("P").save(folder / "palette.gif")
    call(folder, *flags(tmp_path / "out", encoders["dino"], encoders["clip"], "--dtype=float32"))
    (found,) = shards(tmp_path / "out")
    assert found["keys"] == ["grey", "palette", "turned"]
    shown = [
        picture.convert("L"),
        Image.open(folder / "palette.gif"),
        picture.rotate(-90, expand=True),
    ]
    for row, image in zip(found[TARGET], shown):
        close(row, pooled(tokens_of(encoders["clip"], "clip", image), 1))


# ---------------------------------------------------------------- where pictures are found


def test_captions_of_a_folder(tmp_path, encoders):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.jpg", "b.c.jpg", "sub/d.jpg", "sub/e.jpg", ".hidden.jpg"]):
        draw(i).save(folder / name)
    (folder / "a.txt").write_text("a caf\u00e9\n")
    (folder / "b.c.txt").write_text("two dots")
    rows = [("sub/d.jpg", "from the list"), ("a.jpg", "the text file is preferred")]
    lines = [json.dumps(dict(file_name=name, caption=text)) + "\n" for name, text in rows]
    (folder / "captions.jsonl").write_text("".join(lines))
    call(folder, *flags(tmp_path / "out", encoders["dino"], encoders["clip"]))
    (found,) = shards(tmp_path / "out")
    captions = dict(zip(found["keys"], found["captions"]))
    assert captions == {
        "a": "a caf\u00e9",
        "b.c": "two dots",
        "sub/d": "from the list",
        "sub/e": None,
    }


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def jpeg(i):
    data = io.BytesIO()
    draw(i).save(data, "JPEG")
    return data.getvalue()


def make_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            add(tar, f"{i:03d}.jpg", jpeg(i))
            add(tar, f"{i:03d}.json", b"{}")
            add(tar, f"{i:03d}.txt", f"number {i}".encode())


def test_webdataset_tars(tmp_path, encoders):
    tars = tmp_path / "tars"
    tars.mkdir()
    make_tar(tars / "x-2.tar", [3, 1, 2])  # a tar keeps its own order
    make_tar(tars / "x-10.tar", [4])
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        add(tar, "./v1.0/z.left.jpg", jpeg(9))
        add(tar, "./v1.0/z.left.txt", b"z")
    more = flags(tmp_path / "out", encoders["dino"], encoders["clip"], "--dtype=float32")
    call(tars, tmp_path / "more.tar", *more)
    (found,) = shards(tmp_path / "out")
    assert found["keys"] == ["003", "001", "002", "004", "./v1.0/z.left"]
    assert found["captions"] == ["number 3", "number 1", "number 2", "number 4", "z"]
    for row, i in zip(found[COND], [3, 1, 2, 4, 9]):
        picture = Image.open(io.BytesIO(jpeg(i)))
        close(row, pooled(tokens_of(encoders["dino"], "dino", picture), 2))


def test_unreadable_pictures_are_skipped_and_listed(tmp_path, encoders, capfd):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "0.jpg").write_bytes(jpeg(0)[:300])
    (folder / "3.jpg").write_text("no picture")
    (folder / "4.png").symlink_to("nowhere")
    (folder / "4.jpg").unlink()
    (folder / "5.jpg").write_bytes(b"")
    (folder / "6.jpg").write_bytes(jpeg(6))
    (folder / "6.txt").write_bytes(b"\xff")  # no UTF-8
    more = flags(tmp_path / "out", encoders["dino"], encoders["clip"], "--batch_size=2")
    for _ in range(2):  # of a whole shard they are known, the others are tried again
        call(folder, *more, "--shard_size=3", "--dtype=float32")
        (found,) = shards(tmp_path / "out")
        assert found["keys"] == ["1", "2"]
        assert manifest(tmp_path / "out")["total_samples"] == 2
        assert manifest(tmp_path / "out")["skipped"] == ["0", "3", "4", "5", "6"]
        for row, key in zip(found[TARGET], found["keys"]):
            picture = Image.open(folder / f"{key}.jpg")
            close(row, pooled(tokens_of(encoders["clip"], "clip", picture), 1))
    output = capfd.readouterr().out
    assert "skipped 0: " in output
    assert "2 pictures, 5 skipped" in output
    run("prepare.py", tmp_path / "out", f"--out={tmp_path / 'data'}", "--val_fraction=0.5")


# ---------------------------------------------------------------- going on


def test_complete_shards_are_kept(tmp_path, encoders, pictures):
    out = tmp_path / "out"
    more = flags(out, encoders["dino"], encoders["clip"], "--shard_size=2")
    call(pictures, *more)
    before = {path: path.read_bytes() for path in out.iterdir()}
    first, second, third = sorted(out.glob("*.pkl"))
    second.unlink()
    (out / f"{third.name}.partial").write_text("of a killed run")
    os.utime(first, (1, 1))
    call(pictures, *more, "--batch_size=1")
    assert first.stat().st_mtime == 1 and third.read_bytes() == before[third]
    a, b = pickle.loads(before[second]), pickle.loads(second.read_bytes())
    assert a["keys"] == b["keys"] and a["config"] == b["config"]
    np.testing.assert_allclose(a[COND], b[COND], atol=5e-3)
    assert manifest(out)["total_samples"] == 6


def test_other_settings_or_pictures_are_not_mixed(tmp_path, encoders, pictures):
    out = tmp_path / "out"
    more = flags(out, encoders["dino"], encoders["clip"])
    make_tar(tmp_path / "x.tar", [1, 2])
    call(tmp_path / "x.tar", *more)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for change in ("--layer=-2", "--pool=2", "--dtype=float32", f"--cond={encoders['registers']}"):
        with pytest.raises(ValueError, match="other pictures or settings"):
            call(tmp_path / "x.tar", *more, change)
    make_tar(tmp_path / "x.tar", [1, 3])
    with pytest.raises(ValueError, match="other pictures or settings"):
        call(tmp_path / "x.tar", *more)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.pkl").write_bytes(pickle.dumps({"keys": []}))
    with pytest.raises(ValueError, match="other pictures or settings"):
        call(tmp_path / "x.tar", *more, f"--out={tmp_path / 'foreign'}")
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_two_processes_make_what_one_makes(tmp_path, encoders, pictures):
    (pictures / "sub10" / "broken.jpg").write_text("no picture")
    try:
        for n in (1, 2):
            more = flags(tmp_path / f"{n}", encoders["dino"], encoders["clip"])
            more += ["--shard_size=2", "--device=cpu", "--workers=0"]
            done = run(SCRIPT, pictures, *more, processes=n)
            assert f"{tmp_path / str(n)}: 6 pictures, 1 skipped" in done.stdout
            assert "shard_00000.pkl: 100%" in done.stderr and "2/2" in done.stderr
            assert "pictures/s" in done.stderr
    finally:
        (pictures / "sub10" / "broken.jpg").unlink()
    one, two = (sorted((tmp_path / f"{n}").iterdir()) for n in (1, 2))
    assert len(one) == 4 and [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "cond, more, words",
    [
        ("three by three", [], r"grids of \[3, 4\]"),  # 3 does not divide 4
        ("dino", ["--pool=3"], "pool=3"),
        ("distilled", [], "18 tokens are not a grid of 4x4, 0 registers"),
    ],
)
def test_refused_grids(tmp_path, encoders, pictures, cond, more, words):
    with pytest.raises(ValueError, match=words):
        call(pictures, *flags(tmp_path / "out", encoders[cond], encoders["clip"], *more))
    assert not list(tmp_path.glob("out/*"))


def test_refused_sources(tmp_path, encoders, pictures):
    more = flags(tmp_path / "out", encoders["dino"], encoders["clip"])
    make_tar(tmp_path / "x.tar", [1, 2])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(data[:1000])
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg"}')
    for source, words in {
        "short.tar": "short.tar or its captions cannot be read: ReadError",
        "missing": "No such file",
        "": "KeyError",
    }.items():
        with pytest.raises((ValueError, OSError), match=words):
            call(tmp_path / source, *more)
    with pytest.raises(ValueError, match="2 pictures have the key 001"):
        call(tmp_path / "x.tar", tmp_path / "x.tar", *more)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in"):
        call(tmp_path / "empty", *more)
    assert "pool=0 must be above 0" in refused(SCRIPT, pictures, *more, "--pool=0")


def test_errors_are_one_line(tmp_path, encoders):
    assert "name pictures" in refused(SCRIPT, "pictures")
    more = flags(tmp_path / "out", encoders["dino"], tmp_path / "nowhere")
    make_tar(tmp_path / "x.tar", [1, 2])
    offline = dict(HF_HUB_OFFLINE="1")
    assert "nowhere" in refused(SCRIPT, tmp_path / "x.tar", *more, **offline)
    missing = "import sys; sys.modules['transformers'] = None\n"
    line = refused(SCRIPT, "pictures", patch=missing)
    assert "transformers" in line and "requirements-images.txt" in line


REMOTE = """
import torch
from transformers import CLIPVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class RemoteConfig(CLIPVisionConfig):
    model_type = "remote"

class Tower(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patches = torch.nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.positions = torch.nn.Embedding(17, width)
        self.register_buffer("position_ids", torch.arange(17).expand(1, -1), persistent=False)

    def forward(self, pixel_values, output_hidden_states):
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions(self.position_ids)
        return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))

class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = Tower(config)
        self.post_init()
"""


def test_remote_code_runs_only_where_the_flag_says_so(tmp_path, encoders, pictures, monkeypatch):
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    folder.mkdir()
    code = REMOTE.replace(
        "import torch", "import torch\nfrom transformers.modeling_outputs import BaseModelOutput", 1
    )
    (folder / "remote.py").write_text(code)
    config = T.CLIPVisionConfig(**vision(8)).to_dict()
    config |= dict(model_type="remote", architectures=["RemoteModel"])
    config["auto_map"] = dict(AutoConfig="remote.RemoteConfig", AutoModel="remote.RemoteModel")
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(weight=torch.randn(16, 3, 8, 8), bias=torch.randn(16))
    positions = torch.randn(17, 16)
    state = {f"patches.{k}": v for k, v in weights.items()} | {"positions.weight": positions}
    state = {f"vision_model.{k}": v for k, v in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    processor = f"--cond_processor={encoders['clip']}"
    more = flags(tmp_path / "out", folder, encoders["clip"], processor, "--dtype=float32")
    with pytest.raises(ValueError, match="trust_remote_code"):
        call(pictures, *more)
    call(pictures, *more, "--trust_remote_code=True")
    (found,) = shards(tmp_path / "out")
    for row, name in zip(found[COND], NAMES):
        image = Image.open(pictures / name).convert("RGB")
        pixels = make_processor("clip")(image, return_tensors="pt")["pixel_values"]
        x = torch.nn.functional.conv2d(pixels, **weights, stride=8).flatten(2).mT
        close(row, (x[0] + positions[1:]).numpy())
    more += ["--trust_remote_code=True", "--precision=bfloat16", f"--out={tmp_path / 'half'}"]
    call(pictures, *more)
    np.testing.assert_allclose(shards(tmp_path / "half")[0][COND], found[COND], rtol=0.1, atol=0.2)


# ---------------------------------------------------------------- README


def test_readme_from_pictures_to_samples(tmp_path):
    section = (ROOT / "README.md").read_text().split("## Your own pictures")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line.startswith("python ")]
    assert len(lines) == 3
    for name in (
        "prepare.py",
        "train.py",
        "sample.py",
        "model.py",
        "flow.py",
        "plumbing",
        "report",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / SCRIPT).symlink_to(ROOT / SCRIPT)
    save_encoder(tmp_path / "facebook/dinov2-large", "dino")
    save_encoder(tmp_path / "openai/clip-vit-large-patch14", "clip")
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        draw(i).save(tmp_path / "pictures" / f"{i}.jpg")
    for line in lines:
        for command in line.split("&&"):
            python, *words = shlex.split(command)
            run(*words, *(TINY if words[0] == "train.py" else []), cwd=tmp_path)
    generated = np.load(tmp_path / "out-mine" / "generated.npy")
    assert generated.shape == (4, 4, 16) and np.isfinite(generated).all()
