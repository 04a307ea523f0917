"""The evaluator on a video that it must follow, and its mistakes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.data.pixels import PixelFormat
from selfsight.evals.video_segmentation import VideoSegmentation, find_videos, read_mask
from selfsight.trunks.vit import VisionTransformer


@pytest.fixture
def video(tmp_path):
    """A bright square that moves over noise by 8 pixels a frame; every frame has its mask."""
    random = np.random.default_rng(0)
    ground = random.integers(0, 60, (64, 128, 3), np.uint8)
    for number in range(5):
        pixels, mask = ground.copy(), np.zeros((64, 128), np.uint8)
        place = slice(16, 48), slice(16 + 8 * number, 48 + 8 * number)
        pixels[place], mask[place] = (250, 200, 40), 1
        for kind, array, form in (("frames", pixels, "jpg"), ("masks", mask, "png")):
            folder = tmp_path / kind / "square"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(array)
            if kind == "masks":
                image.convert("P").save(folder / f"{number:05d}.{form}")
            else:
                image.save(folder / f"{number:05d}.{form}", quality=95)
    return tmp_path


def bench():
    torch.manual_seed(0)
    trunk = VisionTransformer(width=32, depth=4, heads=2, image_size=64, patch_size=8).eval()
    subject = SimpleNamespace(
        trunk=trunk, pixels=PixelFormat(), normalize=lambda images: images.float() / 255 - 0.3
    )
    from contextlib import nullcontext

    return SimpleNamespace(
        subject=subject, device=torch.device("cpu"), autocast=nullcontext, say=lambda text: None
    )


def test_a_square_is_followed(video):
    """Even an untrained trunk tells a bright square from dark noise."""
    evaluator = VideoSegmentation(path=str(video), size=64)
    answer = evaluator.evaluate(bench())  # type: ignore[arg-type]
    assert answer.figures["j"].value > 60
    assert answer.details["objects"][0]["video"] == "square"
    assert "radius 12, top 5, T 0.1" in answer.protocol
    nothing = VideoSegmentation(path=str(video), size=64, radius=1, previous=0)
    lost = nothing.evaluate(bench())  # type: ignore[arg-type]
    assert lost.figures["j"].value < answer.figures["j"].value


def test_layouts_and_mistakes(video, tmp_path):
    (found,) = find_videos(video)
    assert [m.stem for m in found.masks if m] == [f.stem for f in found.frames]
    davis = video / "davis"
    (davis / "JPEGImages").mkdir(parents=True)
    (davis / "Annotations").mkdir()
    (video / "frames" / "square").rename(davis / "JPEGImages" / "480p")
    (video / "masks" / "square").rename(davis / "Annotations" / "480p")
    with pytest.raises(ValueError, match="holds no videos"):
        find_videos(davis)
    with pytest.raises(ValueError, match="needs frames/NAME"):
        find_videos(video / "nowhere")
    colours = video / "colours.png"
    Image.new("RGB", (4, 4)).save(colours)
    with pytest.raises(ValueError, match="has colours"):
        read_mask(colours)
    with pytest.raises(ValueError, match="path=FOLDER"):
        VideoSegmentation().evaluate(bench())  # type: ignore[arg-type]


def test_the_first_mask_is_needed(video):
    (video / "masks" / "square" / "00000.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 00000\.png"):
        find_videos(video)
