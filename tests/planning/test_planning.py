"""What is planned, against closed forms and real updates."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from selfsight.build import compose
from selfsight.config import ConfigError, check
from selfsight.planning.estimate import estimate, rescaled, ring, share_of_peak, smallest
from selfsight.planning.hardware import KNOWN, hardware
from selfsight.planning.measure import measured_peak
from selfsight.planning.meter import Meter
from selfsight.planning.rehearsal import Rehearsal, rehearse
from selfsight.planning.warnings import warnings
from selfsight.trunks.geometry import regnety_macs, vit_macs
from tests.runs import REGNET, SMALL, VIT

COMMON = [*SMALL, "data.path=nowhere"]


def configured(*more: str):
    return check(compose("pretrain", [*COMMON, *more]))


@pytest.mark.parametrize(
    ("model", "macs"), [(REGNET, regnety_macs), ([*VIT, "optim=adamw"], vit_macs)]
)
def test_work_is_three_times_the_closed_form(model, macs):
    """Forward, and twice that backward; but not for the images, which need no gradient. The
    closed form is of the trunk alone; heads are small here."""
    config = configured(*model)
    found = rehearse(config, 1, 1)
    trunk = {k: v for k, v in config.model.trunk.items() if k != "_target_"}
    expected = sum(
        3 * g["count"] * macs(g["size"], g["size"], **trunk) for g in config.views.values()
    )
    assert found.macs_per_image == pytest.approx(expected, rel=0.12)


def test_the_backward_pass_of_grouped_convolutions_is_twice_the_forward():
    layer, images = nn.Conv2d(8, 16, 3, padding=1, groups=4), torch.randn(2, 8, 6, 6)
    once = 2 * 16 * 36 * 9 * 2
    with Meter() as meter:
        layer(images.requires_grad_()).sum().backward()
    assert meter.macs["convolutions"] == 3 * once
    with Meter() as meter:
        layer(images.detach()).sum().backward()
    assert meter.macs["convolutions"] == 2 * once


@pytest.mark.parametrize(
    "more",
    [[*REGNET, "method.queue_length=16"], [*REGNET, "activation_checkpointing=true"], VIT],
    ids=["queue", "checkpointing", "vit"],
)
def test_memory_is_that_of_a_real_update(more):
    config = configured(*more)
    found = rehearse(config, 1, 1)
    assert found.peak == pytest.approx(measured_peak(config, 8), rel=0.02)
    assert found.weights == 4 * sum(found.parameters.values())
    assert found.gradients == 4 * found.trained


@pytest.mark.slow
def test_sharding_divides_the_states():
    whole = rehearse(configured(*REGNET), 4, 4)
    shared = rehearse(configured(*REGNET, "strategy=fsdp"), 4, 4)
    assert shared.weights < 0.4 * whole.weights
    assert shared.calls["reduce-scatter"] > 0 and whole.traffic["all-reduce"] >= whole.gradients
    assert not torch.distributed.is_initialized() and float(torch.ones(2).sum()) == 2


def a_rehearsal(**more) -> Rehearsal:
    plain: dict[str, Any] = {"weights": 4, "gradients": 4, "optimizer": 4, "peak": 28}
    plain |= {"ranks": 8, "images": 16, "parts": 1, "macs": {"convolutions": 500}, **more}
    return Rehearsal(**plain)


def test_time_follows_from_work_and_share():
    config = configured(*REGNET, "batch_size=128", "gpus=8")
    device = KNOWN["v100_32gb"]
    found = a_rehearsal(macs={"convolutions": 10**12}, traffic={"all-reduce": 3 * 10**9})
    made = estimate(
        config, found, device, share=0.1, network=1e9, per_node=4, disk=1e9, image_bytes=1e5,
        images_per_core=2.0, steps=1800,
    )  # fmt: skip
    assert made.step_seconds == pytest.approx(2e12 / 12.5e12)
    assert made.rate == pytest.approx(128 / 0.16)
    assert made.hours == pytest.approx(1800 * 0.16 / 3600)
    assert made.network == pytest.approx(2 * 7 / 8 * 3)
    assert made.loader_cores == math.ceil(100 / 2)
    assert ring("all-gather", 4) == 0.75
    assert share_of_peak(found, device) == pytest.approx(device.conv)


def test_the_smallest_cluster():
    one = a_rehearsal()  # 12 of states and gradients, 16 for 16 images
    assert smallest(one, one, False, 100.0) is not None
    fit = smallest(one, one, False, 22.0)  # room for 20.24: 8 images
    assert (fit.gpus, fit.images, fit.strategy) == (1, 8, "ddp")  # type: ignore[union-attr]
    fit = smallest(one, a_rehearsal(peak=16), False, 14.5)  # only with checkpointing
    assert (fit.gpus, fit.checkpointing) == (1, True)  # type: ignore[union-attr]
    fit = smallest(one, one, False, 9.5)
    assert fit.strategy == "fsdp" and fit.gpus > 1  # type: ignore[union-attr]
    assert smallest(one, one, False, 0.5) is None


def test_what_a_scale_makes_of_a_recipe():
    config = configured(
        *REGNET, "batch_size=256", "images_per_device=32", "steps=1000", "method.queue_length=512",
        "method.freeze_prototypes_steps=100", "schedule.base_lr=0.3",
    )  # fmt: skip
    values = rescaled(config, 2)
    assert values is not None and values["batch_size"] == 64
    assert values["learning rate (by the batch)"] == pytest.approx(0.075)
    assert values["updates"] == 4000
    assert values["method.freeze_prototypes_steps"] == 400
    assert values["method.queue_length"] == 512


def test_warnings_name_the_key():
    config = configured(*REGNET, "method.prototypes=[3000]", "method.freeze_prototypes_steps=5")
    found = a_rehearsal(peak=10**12, traffic={"all-reduce": 10**9})
    made = estimate(
        config, found, KNOWN["v100_16gb"], share=0.1, network=1.0, per_node=4, disk=1e9,
        image_bytes=1e5, images_per_core=2.0, steps=8,
    )  # fmt: skip
    told = " ".join(warnings(config, found, made, KNOWN["v100_16gb"], 8))
    for key in (
        "images_per_device",
        "method.prototypes",
        "frozen for 5 of 8",
        "compress_gradients",
    ):
        assert key in told


def test_an_unknown_device_is_one_sentence():
    with pytest.raises(ConfigError, match="did you mean 'h100_80gb'"):
        hardware("h100_80", 2, None)
