"""Sizes of trunks in closed form: against the published tables and against what torch counts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfsight.trunks.geometry import (
    regnet_geometry,
    regnety_macs,
    regnety_parameters,
    vit_macs,
    vit_parameters,
)
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer

SSL = Path(__file__).parents[2] / "ssl"


def rule(depth, w_0, w_a, w_m, group_width):
    return {"depth": depth, "w_0": w_0, "w_a": w_a, "w_m": w_m, "group_width": group_width}


# name: numbers of the rule, depths, widths, trunk parameters
TABLE = {
    "8GF": (rule(17, 192, 76.82, 2.19, 56), (2, 4, 10, 1), (168, 448, 896, 2016), 37_163_068),
    "16GF": (rule(18, 200, 106.23, 2.48, 112), (2, 4, 11, 1), (224, 448, 1232, 3024), 80_565_140),
    "32GF": (rule(20, 232, 115.89, 2.53, 232), (2, 5, 12, 1), (232, 696, 1392, 3712), 141_333_770),
    "64GF": (rule(20, 352, 147.48, 2.4, 328), (2, 5, 12, 1), (328, 984, 1968, 4920), 276_457_786),
    "128GF": (
        rule(27, 456, 160.83, 2.52, 264),
        (2, 7, 17, 1),
        (528, 1056, 2904, 7392),
        637_419_894,
    ),
    "256GF": (
        rule(27, 640, 230.83, 2.53, 373),
        (2, 7, 17, 1),
        (746, 1492, 4103, 10444),
        1_272_156_138,
    ),
    "256GF of ClassyVision": (
        rule(27, 640, 124.47, 2.04, 848),
        (3, 7, 16, 1),
        (640, 1696, 2544, 5088),
        821_051_008,
    ),
    "10B": (
        rule(27, 1744, 620.83, 2.52, 1010),
        (2, 7, 17, 1),
        (2020, 4040, 11110, 28280),
        9_323_934_872,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_widths_and_parameters_equal_the_table(name):
    numbers, depths, widths, parameters = TABLE[name]
    geometry = regnet_geometry(**numbers)
    assert geometry.depths == depths
    assert geometry.widths == widths
    assert all(w % g == 0 for w, g in zip(widths, geometry.group_widths, strict=True))
    assert regnety_parameters(**numbers) == parameters


def test_a_stage_narrower_than_a_group_is_one_group():
    numbers = TABLE["256GF of ClassyVision"][0]
    assert regnet_geometry(**numbers).group_widths == (640, 848, 848, 848)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("regnety_002", rule(13, 24, 36.44, 2.49, 8)),
        ("regnety_004", rule(16, 48, 27.89, 2.09, 8)),
        ("regnety_008", rule(14, 56, 38.84, 2.4, 16)),
        ("regnety_016", rule(27, 48, 20.71, 2.65, 24)),
        ("regnety_032", rule(21, 80, 42.63, 2.66, 24)),
        ("regnety_040", rule(22, 96, 31.41, 2.24, 64)),
        ("regnety_080", TABLE["8GF"][0]),
        ("regnety_160", TABLE["16GF"][0]),
        ("regnety_320", TABLE["32GF"][0]),
        ("regnety_640", TABLE["64GF"][0]),
        ("regnety_1280", TABLE["128GF"][0]),
        ("regnety_2560", TABLE["256GF"][0]),
    ],
)
def test_parameters_equal_timm(name, numbers):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
    assert regnety_parameters(**numbers) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("strides", [(2, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(224, 224), (97, 45)])
def test_regnet_macs_equal_what_torch_counts(strides, size):
    stem_stride, first_stage_stride = strides
    numbers = {
        **rule(5, 32, 48.0, 2.0, 16),
        "stem_width": 40,
        "stem_stride": stem_stride,
        "first_stage_stride": first_stage_stride,
        "se_ratio": 0.3,
    }
    with torch.device("meta"):
        trunk = RegNetY(**numbers)
        images = torch.empty(2, 3, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(images)
    assert counter.get_total_flops() == 2 * 2 * regnety_macs(*size, **numbers)
    assert regnety_parameters(**numbers) == sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_vit_macs_equal_what_torch_counts(size):
    numbers: dict[str, Any] = {
        "width": 48,
        "depth": 5,
        "heads": 3,
        "image_size": 64,
        "patch_size": 8,
    }
    trunk = VisionTransformer(**numbers, mlp_ratio=3.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(torch.zeros(2, 3, *size))
    # Two tiny products interpolate the positions where the size differs; they are not counted.
    interpolation = 0 if size == (64, 64) else 2 * 48 * (6 * 8 * 8 + 10 * 6 * 8)
    expected = 2 * 2 * vit_macs(*size, **numbers, mlp_ratio=3.0) + interpolation
    assert counter.get_total_flops() == expected
    parameters = sum(p.numel() for p in trunk.parameters())
    assert vit_parameters(**numbers, mlp_ratio=3.0) == parameters


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("tiny", 192, 12), ("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)],
)
def test_vit_parameters_equal_timm(name, width, depth):
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{name}_patch16_224", num_classes=0)
    expected = sum(p.numel() for p in theirs.parameters())
    assert vit_parameters(width=width, depth=depth) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"group_width": 0}, "group_width=0"),
        ({"w_0": 25}, "multiple of 8"),
        ({"w_m": 1.0}, "w_m > 1"),
        ({"w_a": -1.0}, "w_a >= 0"),
        ({"w_a": 0.0}, "1 stages"),
    ],
)
def test_numbers_outside_the_rule_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        regnet_geometry(**{**TABLE["16GF"][0], **change})


def test_counting_imports_neither_torch_nor_numpy():
    code = (
        "import sys; import selfsight.trunks.geometry; "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SSL)}, check=True)
