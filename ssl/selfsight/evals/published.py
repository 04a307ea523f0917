"""Published numbers to stand beside ours, where protocol and data are the same.

Top-1 accuracy in percent unless said. `data` is the name a table calls it by (`data_name=`), and a
number is shown only where the evaluator is the same too: a k-NN figure never stands beside a probe.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number: of which model, by which evaluator, on what, and who says so."""

    model: str
    evaluator: str
    data: str
    value: float
    source: str


_DINO = "DINO, arXiv:2104.14294"
_V2 = "DINOv2, model card"
_SEER = "VISSL, SEER model zoo"
_SWAV = "SwAV, released code"

PUBLISHED = (
    Published("DINO ViT-S/16", "knn", "imagenet", 74.5, _DINO),
    Published("DINO ViT-S/8", "knn", "imagenet", 78.3, _DINO),
    Published("DINO ViT-B/16", "knn", "imagenet", 76.1, _DINO),
    Published("DINO ViT-B/8", "knn", "imagenet", 77.4, _DINO),
    Published("DINO ResNet-50", "knn", "imagenet", 67.5, _DINO),
    Published("DINOv2 ViT-S/14", "knn", "imagenet", 79.0, _V2),
    Published("DINOv2 ViT-B/14", "knn", "imagenet", 82.1, _V2),
    Published("DINOv2 ViT-L/14", "knn", "imagenet", 83.5, _V2),
    Published("DINOv2 ViT-g/14", "knn", "imagenet", 83.5, _V2),
    Published("DINOv2 ViT-S/14", "linear_probe", "imagenet", 81.1, f"{_V2}; head chosen on test"),
    Published("DINOv2 ViT-B/14", "linear_probe", "imagenet", 84.5, f"{_V2}; head chosen on test"),
    Published("DINOv2 ViT-L/14", "linear_probe", "imagenet", 86.3, f"{_V2}; head chosen on test"),
    Published("DINOv2 ViT-g/14", "linear_probe", "imagenet", 86.5, f"{_V2}; head chosen on test"),
    Published("SEER RegNetY-32GF", "linear_crops", "imagenet", 74.03, _SEER),
    Published("SEER RegNetY-64GF", "linear_crops", "imagenet", 75.25, _SEER),
    Published("SEER RegNetY-128GF", "linear_crops", "imagenet", 75.96, _SEER),
    Published("SEER RegNetY-256GF", "linear_crops", "imagenet", 77.51, _SEER),
    Published("SEER RegNetY-10B", "linear_crops", "imagenet", 79.8, _SEER),
    Published("SwAV ResNet-50, 800 epochs", "linear_crops", "imagenet", 75.3, _SWAV),
    Published("SwAV ResNet-50, 400 epochs", "linear_crops", "imagenet", 74.6, _SWAV),
    Published("SwAV RegNetY-16GF", "linear_crops", "imagenet", 76.15, _SEER),
    Published("SEER RegNetY-128GF, 384 px", "finetune", "imagenet", 83.8, "SEER, arXiv:2103.01988"),
    Published("SEER RegNetY-256GF, 384 px", "finetune", "imagenet", 84.2, "SEER, arXiv:2103.01988"),
    Published(
        "SEER RegNetY-256GF, 10 %", "low_shot_finetune", "imagenet", 77.9, "SEER, arXiv:2103.01988"
    ),
    Published(
        "SEER RegNetY-128GF, 10 %", "low_shot_finetune", "imagenet", 76.7, "SEER, arXiv:2103.01988"
    ),
)


def beside(evaluator: str, data: str) -> list[Published]:
    """What is published for this evaluator on this data."""
    return [p for p in PUBLISHED if p.evaluator == evaluator and p.data == data]
