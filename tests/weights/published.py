"""Files in the layouts of published weights, made for tests from the code that defines them, or by
the name tables of `reference`: nothing here uses the translations that are tested."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.trunks.regnet import RegNetY

TINY = {"depth": 5, "w_0": 32, "w_a": 48.0, "w_m": 2.0, "group_width": 32, "stem_width": 16}
"""The numbers of conf/model/regnety_tiny.yaml."""


def scatter(module: nn.Module, amount: float = 0.1) -> None:
    """Move all parameters and averages away from where they begin."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-amount, amount))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-amount, amount)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)


def tiny_regnet() -> RegNetY:
    torch.manual_seed(0)
    trunk = RegNetY(**TINY).eval()  # type: ignore[arg-type]
    scatter(trunk)
    return trunk


def vissl_name(ours: str, parts: bool = False) -> str:
    """VISSL's name of a RegNet tensor; with `parts`, of its FSDP trunks (two blocks a part)."""
    if match := re.fullmatch(r"stem\.(.+)", ours):
        return f"_feature_blocks.conv1.stem.{match[1]}"
    match = re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)\.(.+)", ours)
    assert match
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    for ours_part, theirs in (
        ("f.se.fc1", "f.se.excitation.0"),
        ("f.se.fc2", "f.se.excitation.2"),
        ("f.c.0", "f.c"),
        ("f.c.1", "f.final_bn"),
        ("proj.0", "proj"),
        ("proj.1", "bn"),
    ):
        if rest.startswith(ours_part + "."):
            rest = theirs + rest.removeprefix(ours_part)
            break
    middle = f"block{stage}-part{block // 2}." if parts else ""
    return f"_feature_blocks.res{stage + 1}.{middle}block{stage}-{block}.{rest}"


def vissl_file(tensors: Mapping[str, Tensor], parts: bool = False) -> dict[str, Any]:
    """A file of VISSL's pretraining: trunk, SwAV head of SEER's shape, and what is around them."""
    width = max(t.shape[0] for n, t in tensors.items() if n.endswith("f.c.0.weight"))
    heads = {
        "0.projection_head.0.weight": torch.randn(24, width),
        "0.projection_head.0.bias": torch.randn(24),
        "0.projection_head.2.weight": torch.randn(24, 24),
        "0.projection_head.2.bias": torch.randn(24),
        "0.projection_head.4.weight": torch.randn(8, 24),
        "0.projection_head.4.bias": torch.randn(8),
        "0.prototypes0.weight": torch.randn(30, 8),
    }
    trunk = {vissl_name(name, parts): tensor for name, tensor in tensors.items()}
    model = {"model": {"trunk": trunk, "heads": heads}}
    return {
        "phase_idx": 3,
        "iteration": 122070,
        "type": "consolidated",
        "loss": {},
        "classy_state_dict": {"train": True, "base_model": model},
    }


def swav_file(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """facebookresearch/swav's ResNet-50 file."""
    head = {
        "projection_head.0.weight": torch.randn(32, width),
        "projection_head.0.bias": torch.randn(32),
        "projection_head.1.weight": torch.rand(32),
        "projection_head.1.bias": torch.randn(32),
        "projection_head.1.running_mean": torch.randn(32),
        "projection_head.1.running_var": torch.rand(32),
        "projection_head.1.num_batches_tracked": torch.tensor(7),
        "projection_head.3.weight": torch.randn(8, 32),
        "projection_head.3.bias": torch.randn(8),
        "prototypes.weight": torch.randn(30, 8),
    }
    return {f"module.{name}": tensor for name, tensor in {**tensors, **head}.items()}


def dino_head(width: int) -> dict[str, Tensor]:
    return {
        "mlp.0.weight": torch.randn(40, width),
        "mlp.0.bias": torch.randn(40),
        "mlp.2.weight": torch.randn(40, 40),
        "mlp.2.bias": torch.randn(40),
        "mlp.4.weight": torch.randn(16, 40),
        "mlp.4.bias": torch.randn(16),
        "last_layer.weight_g": torch.ones(50, 1),
        "last_layer.weight_v": torch.randn(50, 16),
    }


def dino_file(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], width: int
) -> dict[str, Any]:
    """facebookresearch/dino's full file."""
    return {
        "student": {
            **{f"module.backbone.{n}": t for n, t in student.items()},
            **{f"module.head.{n}": t for n, t in dino_head(width).items()},
        },
        "teacher": {
            **{f"backbone.{n}": t for n, t in teacher.items()},
            **{f"head.{n}": t for n, t in dino_head(width).items()},
        },
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 50)},
        "fp16_scaler": {"scale": 65536.0},
    }
