"""The command on files, folders and videos, of a vision transformer and of a RegNetY."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.distributed.payload import write_tensors
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer
from selfsight.visualize.command import fitted, main, visualize
from tests.pages.test_pages import Structure
from tests.runs import pictures

VIT = {"width": 32, "depth": 4, "heads": 2, "image_size": 32, "patch_size": 8}
REGNET = {"depth": 5, "w_0": 8, "w_a": 12.0, "w_m": 2.0, "group_width": 8, "stem_width": 8}


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunks")
    torch.manual_seed(0)
    for name, kind, arguments in (
        ("vit", VisionTransformer, VIT),
        ("regnet", RegNetY, REGNET),
    ):
        module = "vit" if name == "vit" else "regnet"
        node = {"_target_": f"selfsight.trunks.{module}.{kind.__name__}", **arguments}
        pixels = {"channels": 3, "bits": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
        metadata = {"format": "pt", "trunk": json.dumps(node), "pixels": json.dumps(pixels)}
        metadata |= {"run": name, "step": "3"}
        weights = kind(**arguments).state_dict()  # type: ignore[arg-type]
        write_tensors(folder / f"{name}.safetensors", weights, metadata)
    return folder


def test_a_folder_seen_by_a_vision_transformer(trunks, tmp_path):
    images = pictures(tmp_path / "in", classes=2, each=4)
    (images / "class0" / "bad.png").write_text("nothing")
    path = visualize(
        [f"trunk={trunks / 'vit.safetensors'}", f"image={images}", f"out={tmp_path / 'out'}",
         "size=32", "images=3", "neighbours=2", "device=cpu"]
    )  # fmt: skip
    text = path.read_text()
    Structure(text)
    assert not re.search(r"https?://", text)
    folders = sorted(p for p in path.parent.iterdir() if p.is_dir())
    assert 2 <= len(folders) <= 3
    made = {p.stem for p in folders[0].glob("*.png")}
    heads = {f"{kind}_head_{n}" for kind in ("attention", "mask") for n in range(2)}
    assert made == {"image", "patches", "attention_mean", "mask_mean"} | heads
    with Image.open(folders[0] / "patches.png") as patches:
        assert patches.size == (48, 32)
        assert len(np.unique(np.asarray(patches).reshape(-1, 3), axis=0)) <= 24
    assert text.count('class="look small"') == len(folders)


def test_a_regnet_has_no_attention_and_says_so(trunks, tmp_path, capsys):
    images = pictures(tmp_path / "in", classes=1, each=2)
    arguments = [f"trunk={trunks / 'regnet.safetensors'}", f"image={images / 'class0' / '00.png'}"]
    assert main([*arguments, f"out={tmp_path / 'out'}", "size=64", "device=cpu"]) == 0
    said = capsys.readouterr()
    assert "has no attention to show" in said.err and "One image has no neighbours" in said.err
    assert {p.name for p in (tmp_path / "out" / "00.png").iterdir()} == {"image.png", "patches.png"}


def test_frames_of_a_video(trunks, tmp_path):
    av = pytest.importorskip("av", reason="needs the extra `video`")
    with av.open(str(tmp_path / "walk.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            pixels = np.full((48, 64, 3), 10 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    path = visualize(
        [f"trunk={trunks / 'vit.safetensors'}", f"image={tmp_path / 'walk.mp4'}", "seconds=0.5",
         f"out={tmp_path / 'out'}", "size=32", "neighbours=1", "device=cpu"]
    )  # fmt: skip
    assert len([p for p in path.parent.iterdir() if p.is_dir()]) == 4
    assert "walk_0001.50s" in path.read_text()


def test_mistakes_are_one_sentence(trunks, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    trunk = f"trunk={trunks / 'vit.safetensors'}"
    for arguments, words in (
        ([], "give one of run="),
        ([trunk], "give image=PATH"),
        ([trunk, "image=/nowhere"], "image=/nowhere does not exist"),
        ([trunk, f"image={tmp_path / 'empty'}"], "holds no images"),
        ([trunk, f"image={tmp_path}", "mass=2"], "mass=2"),
        ([trunk, f"image={tmp_path}", "sise=3"], "did you mean 'size'"),
        ([trunk, f"image={tmp_path}", "size"], "'size' is not understood"),
        ([trunk, f"image={tmp_path}", "size=large"], "size='large' must be a whole number"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("shape", [(30, 50), (200, 90), (10, 600)])
def test_images_are_fitted_to_patches(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = fitted(pixels, 64, 16)
    assert min(found.shape[:2]) == 64 and found.shape[0] % 16 == found.shape[1] % 16 == 0
    assert max(found.shape[:2]) <= 256 and found.dtype == np.uint8
