import io
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data import photometric
from selfsight.data.decode import DecodeError, DecodeLimits
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.pixels import RGB, PixelFormat

tv: Any = functional  # its annotations name tensors only; it takes Pillow images too


def render(multicrop: MultiCrop, data, *, seed=0, epoch=0, key="k", **options) -> list[np.ndarray]:
    views = [np.zeros(shape, multicrop.dtype) for shape in multicrop.shapes(1)]
    multicrop(data, [view[:, 0] for view in views], seed=seed, epoch=epoch, key=key, **options)
    return [view[:, 0] for view in views]


def plans(multicrop: MultiCrop, samples: int) -> list:
    return [multicrop.plan(0, 0, f"{n}.jpg", 320, 240) for n in range(samples)]


def test_defaults_are_swavs():
    group = CropGroup(224, 2, (0.14, 1.0))
    assert group.flip == 0.5 and group.gray == 0.2 and group.blur == 0.5
    assert group.jitter_strengths == (0.8, 0.8, 0.8, 0.2) and group.jitter_probability == 0.8
    assert group.blur_sigma == (0.1, 2.0) and group.solarize == 0.0


def test_views_are_what_was_planned(picture, encode):
    """Rendered by torchvision on Pillow from the same plan."""
    multicrop = MultiCrop(
        {
            "global": CropGroup(64, 2, (0.14, 1.0), solarize=[0.0, 0.5]),
            "local": CropGroup(32, 4, (0.05, 0.14)),
        }
    )
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    errors = []
    for n in range(12):
        pixels = picture(n, 200, 150)
        rendered = [view for group in render(multicrop, pixels, key=str(n)) for view in group]
        planned = multicrop.plan(0, 0, str(n), 200, 150)
        assert len(rendered) == len(planned) == 6
        for view, plan in zip(rendered, planned, strict=True):
            top, left, h, w = plan.box
            pil = Image.fromarray(pixels).crop((left, top, left + w, top + h))
            pil = pil.resize(view.shape[:2], Image.Resampling.BILINEAR)
            pil = tv.hflip(pil) if plan.flip else pil
            for operation, factor in plan.jitter:
                pil = operations[operation](pil, factor)
            pil = tv.rgb_to_grayscale(pil, 3) if plan.gray else pil
            if plan.blur:
                width = 2 * int(np.ceil(4 * plan.blur)) + 1
                image = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
                image = tv.gaussian_blur(image, [width, width], [plan.blur, plan.blur])
                pil = Image.fromarray(image.permute(1, 2, 0).numpy())
            pil = tv.solarize(pil, 128) if plan.solarize else pil
            errors.append(np.abs(view.astype(float) - np.asarray(pil).astype(float)).mean())
    assert np.median(errors) < 1.0 and max(errors) < 3.5, (np.median(errors), max(errors))


def test_a_view_is_a_function_of_seed_epoch_and_key(picture, encode):
    multicrop = MultiCrop({"global": CropGroup(32, 2, (0.14, 1.0))})
    data = encode(picture(1, 90, 70))
    first = render(multicrop, data)[0]
    assert np.array_equal(first, render(multicrop, data)[0])
    assert not np.array_equal(first[0], first[1])
    for other in (
        render(multicrop, data, seed=1),
        render(multicrop, data, epoch=1),
        render(multicrop, data, key="other"),
    ):
        assert not np.array_equal(first, other[0])


def test_groups_do_not_depend_on_each_other(picture):
    pixels = picture(2, 90, 70)
    small = {"local": CropGroup(16, 3, (0.05, 0.14))}
    alone = render(MultiCrop(small), pixels)[0]
    beside = render(MultiCrop({"global": CropGroup(32, 2, (0.14, 1.0)), **small}), pixels)[1]
    more = render(MultiCrop({"local": CropGroup(16, 5, (0.05, 0.14))}), pixels)[0]
    assert np.array_equal(alone, beside) and np.array_equal(alone, more[:3])


@pytest.mark.parametrize(
    "option",
    [
        {"jitter_probability": 0.0},
        {"jitter_strengths": (0.4, 0.0, 0.2, 0.0)},
        {"gray": 0.9},
        {"flip": 0.0},
        {"blur": 1.0},
        {"blur_sigma": (0.1, 0.5)},
        {"solarize": 0.7},
        {"scale": (0.5, 0.6)},
    ],
)
def test_an_option_shifts_no_other_draw(option):
    options = {"size": 32, "count": 1, "scale": (0.14, 1.0), "solarize": 0.2}
    plain = [p[0] for p in plans(MultiCrop({"g": CropGroup(**options)}), 200)]
    changed = [p[0] for p in plans(MultiCrop({"g": CropGroup(**(options | option))}), 200)]
    (name,) = option
    affects = {
        "jitter_probability": "jitter",
        "jitter_strengths": "jitter",
        "blur_sigma": "blur",
        "scale": "box",
    }.get(name, name)
    different = {
        name
        for name in ("box", "flip", "jitter", "gray", "blur", "solarize")
        if any(getattr(a, name) != getattr(b, name) for a, b in zip(plain, changed, strict=True))
    }
    assert different == {affects}


def test_probabilities_and_ranges():
    group = CropGroup(32, 2, (0.14, 1.0), blur=[1.0, 0.1], solarize=[0.0, 0.2])
    n = 4000
    views = plans(MultiCrop({"g": group}), n)
    tolerance = 4 * 0.5 / np.sqrt(n)
    for v in range(2):
        chosen = [views_[v] for views_ in views]
        assert abs(np.mean([c.flip for c in chosen]) - 0.5) < tolerance
        assert abs(np.mean([c.gray for c in chosen]) - 0.2) < tolerance
        assert abs(np.mean([bool(c.jitter) for c in chosen]) - 0.8) < tolerance
        assert abs(np.mean([c.blur > 0 for c in chosen]) - (1.0, 0.1)[v]) < tolerance
        assert abs(np.mean([c.solarize for c in chosen]) - (0.0, 0.2)[v]) < tolerance
        sigmas = np.array([c.blur for c in chosen if c.blur])
        assert sigmas.min() >= 0.1 and sigmas.max() < 2 and abs(sigmas.mean() - 1.05) < 0.15
        jitters = [dict(c.jitter) for c in chosen if c.jitter]
        for operation, (low, high) in enumerate([(0.2, 1.8)] * 3 + [(-0.2, 0.2)]):
            factors = np.array([j[operation] for j in jitters])
            assert low <= factors.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < factors.max() <= high
        first = [c.jitter[0][0] for c in chosen if c.jitter]
        assert np.abs(np.bincount(first, minlength=4) / len(first) - 0.25).max() < tolerance


# ------------------------------------------------------------------------- reduced decoding

SMALL = {"global": CropGroup(32, 2, (0.14, 1.0)), "local": CropGroup(16, 3, (0.05, 0.14))}


def test_no_crop_is_enlarged_by_a_reduced_image(picture, encode):
    multicrop = MultiCrop(SMALL)
    sizes = [32, 32, 16, 16, 16]
    seen = set()
    for n in range(400):
        width, height = 60 + 11 * (n % 90), 80 + 7 * (n % 130)
        views = multicrop.plan(0, 0, str(n), width, height)
        reduction = multicrop.reduction(views)
        seen.add(reduction)
        sides = [min(v.box.height, v.box.width) for v in views]
        margins = [side // size for side, size in zip(sides, sizes, strict=True)]
        assert reduction == 1 or all(m >= reduction for m in margins)
        if reduction < 8:  # and the next would be too much
            assert any(m < 2 * reduction for m in margins)
    assert seen == {1, 2, 4, 8}


def test_views_of_a_reduced_image_are_nearly_those_of_the_whole(picture, encode):
    """Within the rounding of the boxes, half a pixel of the view; the plan is the same."""
    errors, reduced = [], 0
    for n in range(12):
        coarse = Image.fromarray(picture(n, 80, 60))
        data = encode(np.asarray(coarse.resize((800, 600), Image.Resampling.BICUBIC)), quality=92)
        a = MultiCrop(SMALL, colour=False)
        b = MultiCrop(SMALL, colour=False, reduced=False)
        plan = a.plan(0, 0, str(n), 800, 600)
        reduced += a.reduction(plan) > 1
        for x, y in zip(render(a, data, key=str(n)), render(b, data, key=str(n)), strict=True):
            errors += [np.abs(u.astype(float) - v).mean() for u, v in zip(x, y, strict=True)]
    assert reduced >= 6
    assert np.mean(errors) < 4 and max(errors) < 12, (np.mean(errors), max(errors))
    assert np.max(errors) > 0


def test_the_reduction_is_the_same_whoever_asks(picture, encode):
    data = encode(np.asarray(Image.fromarray(picture(1, 80, 60)).resize((800, 600))))
    first = render(MultiCrop(SMALL), data)
    for view, again in zip(first, render(MultiCrop(SMALL), data), strict=True):
        assert np.array_equal(view, again)


def test_plans_come_back_and_colour_can_be_left_to_others(picture):
    pixels = picture(2, 90, 70)
    with_colour, without = MultiCrop(SMALL), MultiCrop(SMALL, colour=False)
    outs = [np.zeros(shape, np.uint8)[:, 0] for shape in without.shapes(1)]
    views = without(pixels, outs, seed=3, epoch=1, key="k")
    assert views == with_colour.plan(3, 1, "k", 90, 70)
    operations = photometric.operations(RGB)
    crops = [crop for out in outs for crop in out]
    for crop, view in zip(crops, views, strict=True):
        for operation, factor in view.jitter:
            operations.jitter[operation](crop, factor)
        if view.gray:
            operations.gray(crop)
        if view.blur:
            operations.blur(crop, view.blur)
    expected = render(with_colour, pixels, seed=3, epoch=1)
    assert all(np.array_equal(a, b) for a, b in zip(outs, expected, strict=True))


# ------------------------------------------------------------------------- formats of pixels


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("bits", [8, 16])
def test_views_of_other_formats(channels, bits):
    form = PixelFormat(channels, bits)
    group = {"jitter_strengths": (0.4, 0.4, 0, 0), "gray": 0.0, "solarize": 0.3}
    groups = {"g": CropGroup(24, 6, (0.2, 1.0), **group)}
    multicrop = MultiCrop(groups, pixels=form)
    assert multicrop.shapes(4) == [(6, 4, 24, 24, channels)]
    assert multicrop.dtype == (np.uint8 if bits == 8 else np.uint16)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[:, :, c]).resize((80, 60)) for c in range(channels)]
    pixels = np.stack([np.asarray(plane) for plane in planes], 2)
    deep = pixels if bits == 8 else pixels.astype(np.uint16) * 257
    views = render(multicrop, deep)[0]
    # Each channel alone gives that channel of the views where nothing mixes them: geometry, blur.
    plain = CropGroup(24, 6, (0.2, 1.0), jitter_probability=0.0, gray=0.0, blur=1.0)
    alone = MultiCrop({"g": plain}, pixels=PixelFormat(1, bits))
    both = render(MultiCrop({"g": plain}, pixels=form), deep)[0]
    for c in range(channels):
        assert np.array_equal(render(alone, deep[:, :, c : c + 1])[0][..., 0], both[..., c])
    # 16 bits are those of 8, but finer.
    if bits == 16:
        coarse_views = render(MultiCrop(groups, pixels=PixelFormat(channels, 8)), pixels)[0]
        difference = np.abs(views / 257 - coarse_views)
        assert np.median(difference) < 1 and np.quantile(difference, 0.97) < 3
        assert len(np.unique(views)) > 256
    if channels == 1:
        file = io.BytesIO()
        Image.fromarray(deep[:, :, 0]).save(file, "PNG")
        assert np.array_equal(render(multicrop, file.getvalue())[0], views)


def test_16_bit_colour_is_that_of_8_bits(picture):
    pixels = picture(3, 90, 70)
    fine = render(MultiCrop(SMALL, pixels=PixelFormat(3, 16)), pixels.astype(np.uint16) * 257)
    for a, b in zip(render(MultiCrop(SMALL), pixels), fine, strict=True):
        difference = np.abs(b / 257 - a)
        # 8-bit operations cut to whole levels one after the other
        assert np.median(difference) < 2 and difference.mean() < 2, difference.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "views.g: gray must be 0 for images of 1 channels"),
        ({"gray": 0.0}, "views.g: jitter_strengths of saturation and hue must be 0"),
        ({"gray": 0.0, "jitter_strengths": (0.4, 0.4, 0.0, 0.1)}, "saturation and hue must be 0"),
    ],
)
def test_colour_without_colours_is_refused(options, message):
    groups = {"g": CropGroup(24, 1, (0.2, 1.0), **options)}
    with pytest.raises(ValueError, match=message):
        MultiCrop(groups, pixels=PixelFormat(1))
    assert MultiCrop(groups).shapes(1) == [(1, 1, 24, 24, 3)]


def test_arrays_of_the_wrong_kind_are_bad_samples():
    multicrop = MultiCrop({"g": CropGroup(16, 1, (0.14, 1.0))})
    for shape, dtype, message in (
        ((20, 20, 5), np.uint8, "5 channels, where 3 are wanted"),
        ((20, 20, 3), np.float32, "of float32, not"),
        ((20, 0, 3), np.uint8, r"an array \(20, 0, 3\)"),
        ((20,), np.uint8, "an array"),
    ):
        with pytest.raises(DecodeError, match=message):
            render(multicrop, np.zeros(shape, dtype))
    assert render(multicrop, np.zeros((20, 20), np.uint8))[0].shape == (1, 16, 16, 3)


def test_limits_reach_the_decoder(picture, encode):
    multicrop = MultiCrop({"g": CropGroup(16, 1, (0.14, 1.0))})
    data = encode(picture(0, 50, 40))
    with pytest.raises(DecodeError, match="50x40 pixels, more than the limit of 1,999"):
        render(multicrop, data, limits=DecodeLimits(max_pixels=1999))
    cut = data[: len(data) * 9 // 10]
    with pytest.raises(DecodeError):
        render(multicrop, cut)
    assert render(multicrop, cut, limits=DecodeLimits(truncated="use"))[0].any()


def test_bad_samples_raise_and_nothing_else(hostile):
    multicrop = MultiCrop({"g": CropGroup(16, 1, (0.14, 1.0))})
    for data in hostile.values():
        with pytest.raises(DecodeError):
            render(multicrop, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, but it is 0"),
        ({"scale": (0.5, 0.1)}, "scale must be two increasing numbers above 0 and up to 1"),
        ({"scale": (0.5, 1.5)}, "scale must be two increasing numbers"),
        ({"flip": 1.5}, "flip must be a probability from 0 to 1, but it is 1.5"),
        ({"blur": [1.0]}, "blur must be one probability or a list of 2"),
        ({"jitter_strengths": (0.8, 0.8, 0.8)}, "jitter_strengths must be four numbers"),
        ({"interpolation": "nearest"}, "interpolation must be bilinear or bicubic"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CropGroup(**({"size": 32, "count": 2, "scale": (0.14, 1.0)} | options))


def test_no_groups():
    with pytest.raises(ValueError, match="at least one group"):
        MultiCrop({})


def test_small_images_cost_little(picture, encode):
    """Six crops of at most 64 pixels in well under 4 ms of one core (about 1 ms is usual)."""
    multicrop = MultiCrop(
        {"global": CropGroup(64, 2, (0.14, 1.0)), "local": CropGroup(32, 4, (0.05, 0.14))}
    )
    data = [encode(picture(n, 64, 64)) for n in range(20)]
    times = []
    for _ in range(5):
        start = time.thread_time()
        for n, sample in enumerate(data):
            render(multicrop, sample, key=str(n))
        times.append((time.thread_time() - start) / len(data))
    assert min(times) < 4e-3
