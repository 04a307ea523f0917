import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data.decode import DecodeError
from selfsight.data.multicrop import CropGroup, MultiCrop

tv: Any = functional  # its annotations name tensors only; it takes Pillow images too


def render(multicrop: MultiCrop, data, *, seed=0, epoch=0, key="k") -> list[np.ndarray]:
    views = [np.zeros(shape, np.uint8) for shape in multicrop.shapes(1)]
    multicrop(data, [view[:, 0] for view in views], seed=seed, epoch=epoch, key=key)
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
