"""DINO's recipes hold the published values, and follow the user's batch and length."""

import math

import pytest
import torch

from selfsight.build import build, compose
from selfsight.config import check, flat
from selfsight.methods.method import Method


def values(*overrides: str) -> dict:
    return flat(check(compose("pretrain", [*overrides, "data=folder", "data.path=/none"])))


# main_dino.py's defaults, and the README's command for the longer run
SHORT = {
    "batch_size": 512,
    "epochs": 100,
    "clip_gradients": 3.0,
    "clip_per_tensor": True,
    "model.trunk.width": 384,
    "model.trunk.patch_size": 16,
    "model.trunk.drop_path": 0.1,
    "method.head.hidden": 2048,
    "method.head.bottleneck": 256,
    "method.head.prototypes": 65536,
    "method.head.frozen_norm": True,
    "method.student_temperature": 0.1,
    "method.teacher_temperature": 0.04,
    "method.teacher_temperature_start": 0.04,
    "method.teacher_momentum": 0.996,
    "method.centring": "centre",
    "method.centre_momentum": 0.9,
    "method.koleo_weight": 0.0,
    "optim.weight_decay": 0.04,
    "optim.exclude_bias_and_norm": True,
    "optim.optimizer.betas": [0.9, 0.999],
    "schedule.lr.start": 0.0,
    "schedule.lr.peak": 1e-3,
    "schedule.lr.end": 1e-6,
    "schedule.weight_decay.start": 0.04,
    "schedule.weight_decay.end": 0.4,
    "views.global.size": 224,
    "views.global.count": 2,
    "views.global.scale": [0.4, 1.0],
    "views.global.blur": [1.0, 0.1],
    "views.global.solarize": [0.0, 0.2],
    "views.local.size": 96,
    "views.local.count": 8,
    "views.local.scale": [0.05, 0.4],
    "views.local.blur": 0.5,
    "views.local.solarize": 0.0,
    **{f"views.{g}.jitter_strengths": [0.4, 0.4, 0.2, 0.1] for g in ("global", "local")},
    **{f"views.{g}.interpolation": "bicubic" for g in ("global", "local")},
}
LONG = {
    **SHORT,
    "batch_size": 1024,
    "epochs": 300,
    "schedule.lr.peak": 2e-3,
    "method.head.frozen_norm": False,
    "method.teacher_temperature": 0.07,
}
REGNETY = {
    "optim.optimizer._target_": "selfsight.optim.sgd.SGD",
    "schedule.lr.peak": 0.06,
    "optim.weight_decay": 1e-4,
    "schedule.weight_decay.end": 1e-4,
    "views.global.scale": [0.14, 1.0],
    "views.local.scale": [0.05, 0.14],
}
DINOV2 = {
    "clip_gradients": 3.0,
    "clip_per_tensor": False,
    "model.trunk.patch_size": 14,
    "model.trunk.layer_scale": 1e-5,
    "optim.layer_decay": 0.9,
    "optim.patch_embed_lr_factor": 0.2,
    "schedule.lr.peak": 4e-3,
    "method.centring": "sinkhorn",
    "method.koleo_weight": 0.1,
    "method.mask_share": 0.5,
    "method.mask_ratio": [0.1, 0.5],
    "method.teacher_temperature": 0.07,
    "views.global.scale": [0.32, 1.0],
    "views.local.scale": [0.05, 0.32],
    "views.local.size": 98,
}


@pytest.mark.parametrize(
    ("recipe", "promised"),
    [
        ("dino_vits16_100ep", SHORT),
        ("dino_vits16_300ep", LONG),
        ("dino_regnety", REGNETY),
        ("dinov2_vits14_one_node", DINOV2),
        ("dinov2_vitb14_one_node", {**DINOV2, "model.trunk.width": 768}),
    ],
)
def test_recipes_hold_the_published_values(recipe, promised):
    found = values(f"recipe={recipe}")
    assert {key: found[key] for key in promised} == promised


def test_lengths_in_epochs_become_updates():
    """300 epochs of 10,000 updates in all: warm-ups of 10 and 30 epochs, one of a frozen layer."""
    config = compose("pretrain", ["recipe=dino_vits16_300ep", "data=folder", "data.path=/none"])
    config.steps = 9000  # as the loop sets it once the images are counted
    found = flat(check(config))
    assert found["schedule.lr.warmup_steps"] == 300
    assert found["method.teacher_temperature_warmup_steps"] == 900
    assert found["method.freeze_last_layer_steps"] == 30
    config.epochs = 20  # ten epochs of warm-up would be half of it
    found = flat(check(config))
    assert found["schedule.lr.warmup_steps"] == 900
    assert found["method.teacher_temperature_warmup_steps"] == 2700


@pytest.mark.parametrize("batch", [64, 256, 2048])
def test_another_batch_scales_the_rate_and_the_teachers_memory(batch):
    found = values("recipe=dino_vits16_100ep", f"batch_size={batch}", "images_per_device=64")
    assert found["schedule.lr.peak"] == pytest.approx(5e-4 * batch / 256)
    # the same memory in images: log(momentum) is proportional to the batch
    assert math.log(found["method.teacher_momentum"]) / math.log(0.996) == pytest.approx(
        batch / 512
    )
    found = values("recipe=dinov2_vits14_one_node", f"batch_size={batch}", "images_per_device=64")
    assert found["schedule.lr.peak"] == pytest.approx(4e-3 * math.sqrt(batch / 1024))


@pytest.mark.parametrize("recipe", ["dino_small_data", "dino_cifar10_small", "dino_regnety"])
def test_recipes_build_a_method_that_tells_its_scaling(recipe):
    config = check(
        compose(
            "pretrain",
            [f"recipe={recipe}", "data=folder", "data.path=/none", "images=null", "epochs=null",
             "steps=100"],
        )
    )  # fmt: skip

    with torch.device("meta"):
        method = build(config.method)
    assert isinstance(method, Method)
    said = method.scaling(config.batch_size)
    assert f"at {config.batch_size} images an update: momentum" in said


def test_ibot_of_a_trunk_without_mask_token_says_what_to_set():
    config = check(
        compose("pretrain", ["method=ibot", "model=vit_micro", "data=folder", "data.path=/none"])
    )
    config.steps = 10
    with pytest.raises(ValueError, match=r"model\.trunk\.mask_token=true"):
        build(config.method)
