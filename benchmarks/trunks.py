"""Parameters and forward multiply-adds of every trunk, beside torchvision's, timm's or the paper's.

    python benchmarks/trunks.py

Ours are counted in closed form (`trunks/geometry*.py`) without the classifier; theirs are counted
on the meta device by torch's FlopCounterMode (which counts a multiply-add as two), also without
the classifier; papers give theirs with it. One image of 224x224 pixels.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfsight.trunks import geometry, geometry_resnet

CONF = Path(__file__).parents[1] / "conf" / "model"
COUNTS = {
    "RegNetY": (geometry.regnety_parameters, geometry.regnety_macs),
    "VisionTransformer": (geometry.vit_parameters, geometry.vit_macs),
    "ResNet": (geometry_resnet.resnet_parameters, geometry_resnet.resnet_macs),
    "VisualTransformer": (geometry_resnet.vt_parameters, geometry_resnet.vt_macs),
}
TIMM = {
    **{f"regnety_{ours}": f"regnety_{theirs}" for ours, theirs in (
        ("200mf", "002"), ("400mf", "004"), ("800mf", "008"), ("1.6gf", "016"), ("3.2gf", "032"),
        ("4gf", "040"), ("8gf", "080"), ("16gf", "160"), ("32gf", "320"), ("64gf", "640"),
        ("128gf", "1280"), ("256gf", "2560"),
    )},
    **{f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")},
    "vit_huge": "vit_huge_patch14_224",
    "vit_giant": "vit_giant_patch14_dinov2",
}  # fmt: skip
TORCHVISION = {
    **{name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
    "resnext50": "resnext50_32x4d",
    "resnext101": "resnext101_32x8d",
}
# Wu et al. 2020, with 16 tokens and the classifier of 1000 classes: parameters and multiply-adds.
PAPER = {
    "vt_resnet18": (11.7e6, 1.569e9),
    "vt_resnet34": (19.2e6, 3.236e9),
    "vt_resnet50": (21.4e6, 3.412e9),
    "vt_resnet101": (41.5e6, 7.129e9),
}


def ours(path: Path) -> tuple[int, int] | None:
    """Parameters and multiply-adds of a model file's trunk; None for models of other libraries."""
    node: Any = OmegaConf.to_container(OmegaConf.load(path).trunk, resolve=False)
    kind = node.pop("_target_").rpartition(".")[2]
    if kind not in COUNTS:
        return None
    parameters, macs = COUNTS[kind]
    arguments = {**node, "in_channels": 3}
    return parameters(**arguments), macs(224, 224, **arguments)


def counted(model: nn.Module) -> tuple[int, int]:
    """The same of any module, which lies on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model(torch.empty(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def theirs(name: str) -> tuple[str, int, int] | None:
    """Whose model it is beside, its parameters and multiply-adds."""
    with torch.device("meta"):
        if name in TIMM:
            options = {"img_size": 224} if name == "vit_giant" else {}
            model: Any = timm.create_model(TIMM[name], num_classes=0, **options)
            return f"timm {TIMM[name]}", *counted(model.eval())
        if name in TORCHVISION:
            model = torchvision.models.get_model(TORCHVISION[name])
            model.fc = nn.Identity()
            return f"torchvision {TORCHVISION[name]}", *counted(model.eval())
    if name in PAPER:
        parameters, macs = PAPER[name]
        return "Wu et al. 2020 (16 tokens)", int(parameters), int(macs)
    return None


def main() -> None:
    """Print the table, and the same as JSON lines."""
    print("| trunk | parameters | multiply-adds | beside | parameters | multiply-adds |")
    print("|---|---|---|---|---|---|")
    lines = []
    for path in sorted(CONF.glob("*.yaml")):
        if (own := ours(path)) is None:
            continue
        other = theirs(path.stem)
        shown = ("-", "-", "-") if other is None else (other[0], f"{other[1]:,}", _g(other[2]))
        print(f"| {path.stem} | {own[0]:,} | {_g(own[1])} | {' | '.join(shown)} |")
        lines.append({"trunk": path.stem, "parameters": own[0], "macs": own[1], "beside": other})
    for line in lines:
        print(json.dumps(line))


def _g(macs: int) -> str:
    return f"{macs / 1e9:.2f}G"


if __name__ == "__main__":
    main()
