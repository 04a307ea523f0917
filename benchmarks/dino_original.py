"""DINO's released classes and ours on the same weights and images, update by update.

    python benchmarks/dino_original.py FOLDER [--updates 6] [--out figures.json]

FOLDER is a checkout of facebookresearch/dino; its own ViT, head, multi-crop wrapper, loss,
schedules, clipping and teacher update run beside ours, in float32, on the CPU. Nothing of it is
copied here. What is printed: the largest difference of each quantity over all updates, relative to
the largest value of its tensor.
"""

import argparse
import importlib
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfsight.data.batch import Batch
from selfsight.heads.dino_head import DinoHead
from selfsight.methods.dino import DINO
from selfsight.methods.method import Now
from selfsight.optim.adamw import AdamW
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.schedules import cosine, warmup_cosine
from selfsight.trunks.vit import VisionTransformer

IMAGES, SIZES = 6, ((2, 64), (4, 32))
VIT = {"patch_size": 8, "depth": 4}
WIDTH, HEADS, PROTOTYPES, HIDDEN = 48, 3, 128, 96
LR, END, DECAY, DECAY_END, MOMENTUM, CLIP, WARM = 2e-3, 1e-5, 0.04, 0.4, 0.9, 0.05, 2
TEMPERATURES = (0.04, 0.07)


def batches(updates: int) -> list[list[Tensor]]:
    """Views as uint8, (V, b, 3, s, s) a size, for each update."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randint(0, 256, (v, IMAGES, 3, s, s), generator=generator, dtype=torch.uint8)
            for v, s in SIZES
        ]
        for _ in range(updates)
    ]


class Original:
    """The released code's parts, in the order of its training loop."""

    def __init__(self, folder: Path, updates: int) -> None:
        sys.path.insert(0, str(folder))
        warnings.filterwarnings("ignore")  # weight_norm is deprecated
        self.utils: Any = importlib.import_module("utils")
        vits: Any = importlib.import_module("vision_transformer")
        main: Any = importlib.import_module("main_dino")
        torch.manual_seed(0)

        def network(drop: float) -> nn.Module:
            size = {"img_size": [SIZES[0][1]], "embed_dim": WIDTH, "num_heads": HEADS, **VIT}
            norm = partial(nn.LayerNorm, eps=1e-6)
            backbone = vits.VisionTransformer(
                **size, mlp_ratio=4, qkv_bias=True, norm_layer=norm, drop_path_rate=drop
            )
            head = vits.DINOHead(WIDTH, PROTOTYPES, hidden_dim=HIDDEN, bottleneck_dim=32)
            return self.utils.MultiCropWrapper(backbone, head)

        self.student, self.teacher = network(0.0), network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False
        crops = sum(count for count, _ in SIZES)
        # its temperature changes by the epoch: here an epoch is one update
        self.loss = main.DINOLoss(PROTOTYPES, crops, *TEMPERATURES, updates, updates)
        self.optimizer = torch.optim.AdamW(self.utils.get_params_groups(self.student))
        plan = self.utils.cosine_scheduler
        self.lr = plan(LR, END, updates, 1, warmup_epochs=WARM)
        self.decay = plan(DECAY, DECAY_END, updates, 1)
        self.momentum = plan(MOMENTUM, 1, updates, 1)

    def update(self, step: int, views: list[Tensor]) -> dict[str, Tensor]:
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr[step]
            if number == 0:
                group["weight_decay"] = self.decay[step]
        images = [crop for size in views for crop in size]
        taught = self.teacher(images[: SIZES[0][0]])
        loss = self.loss(self.student(images), taught, step)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = gradients_of(self.student, ("backbone.", "head."))
        self.utils.clip_gradients(self.student, CLIP)
        self.utils.cancel_gradients_last_layer(step, self.student, 1)
        self.optimizer.step()
        with torch.no_grad():
            m = self.momentum[step]
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.data.mul_(m).add_((1 - m) * q.detach().data)
        found = {"loss": loss.detach(), "centre": self.loss.center[0].clone(), "scores": taught}
        return found | gradients | states(self.student, self.teacher, ("backbone.", "head."))


class Ours:
    """Our method, driven as the loop does."""

    def __init__(self, original: Original, updates: int) -> None:
        trunk = VisionTransformer(width=WIDTH, heads=HEADS, image_size=SIZES[0][1], **VIT)
        self.updates = updates
        self.method = DINO(
            trunk=trunk,
            head=partial(DinoHead, hidden=HIDDEN, bottleneck=32, prototypes=PROTOTYPES),
            teacher_temperature_start=TEMPERATURES[0],
            teacher_temperature=TEMPERATURES[1],
            teacher_temperature_warmup_steps=updates - 1,
            teacher_momentum=MOMENTUM,
            freeze_last_layer_steps=1,
        )
        for side in (
            (self.method.student_trunk, self.method.student_heads["image"]),
            (self.method.trunk, self.method.heads["image"]),
        ):
            for module, name in zip(side, ("backbone.", "head."), strict=True):
                module.load_state_dict(strip(original.student.state_dict(), name))
        self.optimizer = AdamW(
            parameter_groups(
                self.method.named_parameters(), weight_decay=DECAY, exclude_bias_and_norm=True
            )
        )

    def update(self, step: int, views: list[Tensor]) -> dict[str, Tensor]:
        now = Now(step, self.updates)
        places = torch.arange(IMAGES)
        method = self.method
        scores, _ = method.teach(method.normalize_pixels(views[0]))
        loss, _ = method(Batch(views, places, places), now)
        loss.backward()
        student = nn.ModuleList([method.student_trunk, method.student_heads["image"]])
        gradients = gradients_of(student, ("0.", "1."))
        method.after_backward(now)
        gradient_norm(self.optimizer, clip=CLIP, per_tensor=True)
        # the original's warm-up is a line that reaches its peak one update earlier
        lr = LR * min(1.0, step / (WARM - 1)) if step < WARM else self._rate(step)
        decay = cosine(step, start=DECAY, end=DECAY_END, steps=self.updates)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=decay)
        self.optimizer.found_inf = torch.zeros(())
        self.optimizer.step()
        self.optimizer.zero_grad()
        method.after_step(now, ok=torch.tensor(True))
        found = {"loss": loss.detach(), "centre": method.targets.centre.clone(), "scores": scores}
        teacher = nn.ModuleList([method.trunk, method.heads["image"]])
        return found | gradients | states(student, teacher, ("0.", "1."))

    def _rate(self, step: int) -> float:
        return warmup_cosine(
            step, start=0.0, peak=LR, end=END, warmup_steps=WARM, steps=self.updates
        )


def strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def gradients_of(module: nn.Module, prefixes: tuple[str, str]) -> dict[str, Tensor]:
    """Gradients of trunk and head by name, before clipping."""
    found: dict[str, Tensor] = {}
    named = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    for prefix, part in zip(prefixes, ("trunk", "head"), strict=True):
        for name, value in strip(named, prefix).items():
            found[f"gradient {part}/{name}"] = value.clone()
    return found


def states(student: nn.Module, teacher: nn.Module, prefixes: tuple[str, str]) -> dict[str, Tensor]:
    """Weights of both by the same names."""
    found: dict[str, Tensor] = {}
    for side, module in (("student", student), ("teacher", teacher)):
        for prefix, part in zip(prefixes, ("trunk", "head"), strict=True):
            for name, value in strip(module.state_dict(), prefix).items():
                found[f"{side} {part}/{name}"] = value.clone()
    return found


def compare(folder: Path, updates: int) -> dict[str, float]:
    """Largest relative difference of each quantity over all updates."""
    if not dist.is_initialized():  # its loss adds the centre up over ranks
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    original = Original(folder, updates)
    ours = Ours(original, updates)
    worst: dict[str, float] = {}
    for step, views in enumerate(batches(updates)):
        pixels = [ours.method.normalize_pixels(v).unflatten(0, v.shape[:2]) for v in views]
        theirs, mine = original.update(step, pixels), ours.update(step, views)
        assert theirs.keys() == mine.keys()
        for name, value in theirs.items():
            scale = value.abs().max().clamp(min=1e-3)
            error = ((mine[name] - value).abs().max() / scale).item()
            key = name.split("/")[0]
            worst[key] = max(worst.get(key, 0.0), error)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkout of facebookresearch/dino")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = compare(options.folder, options.updates)
    for name, error in worst.items():
        print(f"{name:16s} {error:.1e}")
    if options.out:
        options.out.write_text(json.dumps({"updates": options.updates, **worst}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
