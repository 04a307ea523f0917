"""The batch operations against those on one crop (OpenCV), and against torchvision on Pillow."""

import io
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from selfsight.data import photometric, photometric_batch
from selfsight.data.crops import Box
from selfsight.data.multicrop import CropGroup, MultiCrop, View

tv: Any = functional  # its annotations name tensors only; it takes Pillow images too

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def view(*jitter: tuple[int, float], gray=False, blur=0.0, solarize=False) -> View:
    return View(Box(0, 0, 1, 1), False, list(jitter), gray, blur, solarize)


def one_by_one(crops: np.ndarray, views: list[View]) -> np.ndarray:
    """What a worker does with OpenCV."""
    out = crops.copy()
    for crop, plan in zip(out, views, strict=True):
        for operation, factor in plan.jitter:
            photometric.JITTER[operation](crop, factor)
        if plan.gray:
            photometric.gray(crop)
        if plan.blur:
            photometric.blur(crop, plan.blur)
        if plan.solarize:
            photometric.solarize(crop)
    return out


def together(crops: np.ndarray, views: list[View], **options) -> np.ndarray:
    batch = torch.from_numpy(crops.copy()).permute(0, 3, 1, 2)
    result = photometric_batch.apply(batch, photometric_batch.pack(views), **options)
    assert result.data_ptr() == batch.data_ptr() and result.dtype == torch.uint8
    return result.permute(0, 2, 3, 1).numpy()


def draw(count: int, seed: int, **options) -> list[View]:
    """Views of a recipe in which everything happens."""
    group = CropGroup(size=32, count=1, scale=(0.2, 1.0), solarize=0.2, **options)
    recipe = MultiCrop({"all": group})
    return [recipe.plan(seed, 0, str(n), 100, 80)[0] for n in range(count)]


@pytest.fixture(scope="module")
def crops(picture):
    def make(count: int, size: int) -> np.ndarray:
        return np.stack([picture(n, size, size) for n in range(count)])

    return make


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int64) - b)


RNG = np.random.default_rng(0)
EXACT = {
    "brightness": [view((BRIGHTNESS, f)) for f in (0.0, 1.0, *RNG.uniform(0.2, 1.8, 30))],
    "gray": [view(gray=True)],
    "solarize": [view(solarize=True)],
    "blur": [view(blur=s) for s in (0.1, 1 / 3, *RNG.uniform(0.1, 4.0, 30))],
}
CLOSE = {
    "contrast": [view((CONTRAST, f)) for f in (0.0, 1.0, *RNG.uniform(0.2, 1.8, 30))],
    "saturation": [view((SATURATION, f)) for f in (0.0, 1.0, *RNG.uniform(0.2, 1.8, 30))],
    "hue": [view((HUE, f)) for f in (-0.5, 0.0, 0.5, *RNG.uniform(-0.5, 0.5, 30))],
}


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
@pytest.mark.parametrize("size", [96, 31])
def test_each_operation_is_that_of_opencv(name, size, crops):
    views = EXACT.get(name) or CLOSE[name]
    images = crops(len(views), size)
    error = difference(together(images, views), one_by_one(images, views))
    if name in EXACT:
        assert error.max() == 0
    else:  # OpenCV fuses a product and a sum where the processor can
        assert error.max() <= 1 and (error > 0).mean() < 1e-4


def test_hue_of_every_colour():
    """All 2^24 / 64 colours with every fourth level, turned by several steps and by none."""
    levels = np.arange(0, 256, 4, dtype=np.uint8)
    levels[-1] = 255
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, 512, 512, 3)
    for shift in (0.0, 0.2, -0.37):
        views = [view((HUE, shift))]
        error = difference(together(cube, views), one_by_one(cube, views))
        assert error.max() <= 1 and (error > 0).mean() < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_blur_of_crops_smaller_than_the_kernel(size, crops):
    views = [view(blur=s) for s in (0.4, 1.0, 2.0, 3.0)]
    images = crops(4, size)
    assert (together(images, views) == one_by_one(images, views)).all()


@pytest.mark.parametrize("size", [32, 96])
def test_whole_recipes_are_those_of_opencv(size, crops):
    views = draw(150, seed=1)
    assert {len(v.jitter) for v in views} == {0, 4} and any(v.solarize for v in views)
    images = crops(len(views), size)
    error = difference(together(images, views), one_by_one(images, views))
    # One level at an early step may become several by a later one, in a few pixels in a million.
    assert error.mean() < 1e-4 and (error > 1).mean() < 1e-5 and (error > 0).mean() < 1e-4


def test_jitter_in_any_order_is_close_to_torchvision(crops):
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    factors = [1.4, 0.6, 1.5, -0.12]
    rng = np.random.default_rng(0)
    views = [view(*((int(n), factors[n]) for n in rng.permutation(4))) for _ in range(8)]
    images = crops(8, 64)
    ours = together(images, views)
    for image, plan, result in zip(images, views, ours, strict=True):
        pil = Image.fromarray(image)
        for n, factor in plan.jitter:
            pil = operations[n](pil, factor)
        assert difference(result, np.asarray(pil)).mean() < 1.5


def test_a_crop_does_not_depend_on_its_batch(crops):
    views = draw(40, seed=2)
    images = crops(40, 48)
    whole = together(images, views)
    alone = np.concatenate([together(images[n : n + 1], [views[n]]) for n in range(40)])
    assert (whole == alone).all()
    order = np.random.default_rng(3).permutation(40)
    assert (together(images[order], [views[n] for n in order]) == whole[order]).all()
    for chunk_bytes in (1, 100_000):
        assert (together(images, views, chunk_bytes=chunk_bytes) == whole).all()


def layouts(images: np.ndarray, table: np.ndarray) -> list[tuple[Tensor, np.ndarray]]:
    """Two views of each image: channels last, channels first, and a part of a larger batch."""
    two = images.reshape(2, -1, *images.shape[1:])
    rows = table.reshape(2, -1, photometric_batch.COLUMNS)
    last = torch.from_numpy(two.copy()).permute(0, 1, 4, 2, 3)
    first = last.contiguous()
    larger = torch.zeros(2, two.shape[1] + 3, *two.shape[2:], dtype=torch.uint8)
    part = larger.permute(0, 1, 4, 2, 3)[:, 1:-2]
    part.copy_(last)
    return [(last, rows), (first, rows), (part, rows)]


def test_batches_of_several_views_in_any_layout(crops):
    views = draw(12, seed=4)
    images = crops(12, 40)
    expected = torch.from_numpy(together(images, views)).permute(0, 3, 1, 2).unflatten(0, (2, 6))
    for batch, table in layouts(images, photometric_batch.pack(views)):
        strides = batch.stride()
        photometric_batch.apply(batch, torch.from_numpy(table))
        assert batch.stride() == strides and torch.equal(batch, expected)


def test_nothing_to_do_leaves_everything(crops):
    images = crops(3, 20)
    assert (together(images, [view(), view(), view()]) == images).all()


def test_rows_are_compact_and_plain():
    views = draw(50, seed=5, jitter_strengths=(0.4, 0.0, 0.4, 0.1))
    table = photometric_batch.pack(views)
    assert table.shape == (50, photometric_batch.COLUMNS) and table.dtype == photometric_batch.DTYPE
    assert photometric_batch.COLUMNS * table.itemsize <= 64
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    # A strength of 0 leaves an operation out, and the others keep their order.
    error = difference(together(images, views), one_by_one(images, views))
    assert error.mean() < 1e-3


def test_kernels_are_those_of_opencv():
    """The response to one bright pixel on black, at full scale, is the kernel times itself."""
    impulse = np.zeros((1, 41, 41, 3), np.uint8)
    impulse[:, 20, 20] = 255
    for sigma in np.linspace(0.05, 5.0, 60):
        views = [view(blur=float(np.float32(sigma)))]
        assert (together(impulse, views) == one_by_one(impulse, views)).all()


def test_mistakes_are_one_sentence():
    table = np.zeros((4, photometric_batch.COLUMNS), np.float32)
    with pytest.raises(ValueError, match=r"needs uint8 crops .* not torch.float32"):
        photometric_batch.apply(torch.zeros(4, 3, 8, 8), table)
    with pytest.raises(ValueError, match=r"need a table of shape \(5, 7\), not \(4, 7\)"):
        photometric_batch.apply(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), table)
    with pytest.raises(ValueError, match=r"needs uint8 crops"):
        photometric_batch.apply(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), table)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_levels(crops):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    views = draw(60, seed=6)
    images = crops(60, 96)
    table = photometric_batch.pack(views)
    on_gpu = torch.from_numpy(images).permute(0, 3, 1, 2).cuda()
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        photometric_batch.apply(on_gpu, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = difference(on_gpu.permute(0, 2, 3, 1).cpu().numpy(), together(images, views))
    assert (error > 0).mean() < 1e-5


def test_photographs(sets):
    """Whole recipes on crops of real photographs, in both sizes of SwAV."""
    with tarfile.open(sets / "imagenet_sample" / "all-000000.tar") as tar:
        members = [m for m in tar if m.name.endswith((".jpg", ".JPEG", ".jpeg"))][:48]
        photographs = [file.read() for m in members if (file := tar.extractfile(m)) is not None]
    for size in (224, 96):
        crops = np.stack(
            [
                np.asarray(Image.open(io.BytesIO(p)).convert("RGB").resize((size, size)))
                for p in photographs
            ]
        )
        views = draw(len(crops), seed=size)
        error = difference(together(crops, views), one_by_one(crops, views))
        # A factor of nearly 1/2 puts many values of one crop next to a rounding border.
        assert (error > 0).mean() < 1e-3 and (error > 1).mean() < 1e-5
