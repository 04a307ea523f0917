"""Small methods, and a few updates of one as the loop does them, on any layout over ranks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.data.batch import Batch
from selfsight.distributed import collectives
from selfsight.distributed.env import World
from selfsight.distributed.parallelize import no_sync, parallelize, unwrap
from selfsight.distributed.shards import whole
from selfsight.heads.dino_head import DinoHead
from selfsight.heads.projection import ProjectionHead
from selfsight.methods.dino import DINO
from selfsight.methods.ibot import IBOT
from selfsight.methods.method import Method, Now
from selfsight.methods.swav import SwAV
from selfsight.optim.adamw import AdamW
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.optim.lars import LARS
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer

IMAGES = 12


def regnet(queue: int = 0) -> SwAV:
    """SwAV on a RegNetY of five blocks; the same weights in every process."""
    torch.manual_seed(0)
    trunk = RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)
    return SwAV(
        trunk=trunk,
        head=ProjectionHead(widths=[trunk.width, 24, 16]),
        prototypes=[20],
        freeze_prototypes_steps=1,
        queue_length=queue,
    )


def vit(queue: int = 0) -> SwAV:
    """SwAV on a ViT of four blocks, whose class token and positions have one row to be sharded."""
    torch.manual_seed(0)
    trunk = VisionTransformer(width=16, depth=4, heads=2, image_size=32, patch_size=8)
    return SwAV(
        trunk=trunk,
        head=ProjectionHead(widths=[16, 24, 16], batch_norm=False),
        prototypes=[20],
        freeze_prototypes_steps=1,
        queue_length=queue,
    )


def dino(trunk: str = "vit", **options: Any) -> DINO:
    """DINO on the same trunks."""
    torch.manual_seed(0)
    made = (regnet if trunk == "regnet" else vit)().trunk
    return DINO(trunk=made, head=HEAD, teacher_momentum=0.8, freeze_last_layer_steps=1, **options)


def ibot(centring: str, koleo: float = 0.1) -> IBOT:
    """iBOT with a head for patches."""
    torch.manual_seed(0)
    trunk = VisionTransformer(
        width=16, depth=4, heads=2, image_size=32, patch_size=8, mask_token=True
    )
    return IBOT(
        trunk=trunk,
        head=HEAD,
        patch_head=partial(HEAD, prototypes=18),
        centring=centring,
        koleo_weight=koleo,
        teacher_momentum=0.8,
        mask_ratio=(0.2, 0.6),
        freeze_last_layer_steps=1,
    )


HEAD = partial(DinoHead, hidden=24, bottleneck=8, prototypes=20)
METHODS: dict[str, Callable[[], Method]] = {
    "regnet": regnet,
    "vit": vit,
    "dino": dino,
    "dino_regnet": partial(dino, "regnet"),
    "dino_sinkhorn": partial(dino, centring="sinkhorn"),
    "dino_koleo": partial(dino, koleo_weight=0.1),
    "ibot": partial(ibot, "centre"),
    "ibot_sinkhorn": partial(ibot, "sinkhorn"),
    "ibot_plain": partial(ibot, "sinkhorn", koleo=0.0),
}


def share(step: int, world: World, sizes: tuple[int, ...] = (32, 16)) -> Batch:
    """This rank's lanes of the global batch of `step`: two views a crop size."""
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randint(0, 256, (2, IMAGES, 3, s, s), generator=generator, dtype=torch.uint8)
        for s in sizes
    ]
    own = slice(world.rank * IMAGES // world.size, (world.rank + 1) * IMAGES // world.size)
    positions = (IMAGES * step + torch.arange(IMAGES))[own]
    return Batch([v[:, own] for v in views], positions, torch.zeros_like(positions))


def train(
    world: World,
    kind: str,
    layout: Mapping[str, Any],
    *,
    steps: int = 3,
    micro: int = 1,
    optimizer: str = "lars",
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    sizes: tuple[int, ...] = (32, 16),
) -> dict[str, Tensor]:
    """Some updates of a method laid out with `layout`; losses, norms, and all of its state.

    Tensors are whole, also those that ranks share. `layout` holds arguments of
    `parallelize`, and may hold `compile: True`.
    """
    method = METHODS[kind]()
    options: dict[str, Any] = dict(layout)
    if options.pop("compile", False):
        options["compile_units"] = method.compile_units()
        options["compile_backend"] = "aot_eager"
    module = parallelize(
        method,
        units=method.units(),
        world=world,
        **{"syncbn_group_size": world.size, **options},
    )
    assert unwrap(module) is method
    assert list(method.state_dict()) == list(METHODS[kind]().state_dict())
    opt = make_optimizer(method, optimizer)
    losses, gradient_norms = [], []
    for step in range(steps):
        loss, norm = update(module, opt, world, step, micro, clip, autocast, sizes)
        losses.append(loss)
        gradient_norms.append(norm)
    found = {f"method.{name}": whole(t) for name, t in method.state_dict().items()}
    for group in opt.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in opt.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = whole(value)
    found |= {"losses": torch.stack(losses), "norms": torch.stack(gradient_norms)}
    return {name: value.detach().clone() for name, value in found.items()}


def make_optimizer(method: nn.Module, kind: str) -> torch.optim.Optimizer:
    """LARS as SEER has it, or AdamW without decay of vectors."""
    adam = kind == "adamw"
    groups = parameter_groups(
        method.named_parameters(), weight_decay=0.01, exclude_bias_and_norm=adam
    )
    return AdamW(groups) if adam else LARS(groups, trust_coefficient=0.02)


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    step: int,
    micro: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    sizes: tuple[int, ...] = (32, 16),
) -> tuple[Tensor, Tensor]:
    """One update as in the loop; the loss over all ranks and the norm of the gradient."""
    method = unwrap(module)
    assert isinstance(method, Method)
    now = Now(step, 10)
    batches = share(step, world, sizes).micro(micro)
    enabled = {"dtype": autocast or torch.bfloat16, "enabled": autocast is not None}
    with torch.autocast("cpu", **enabled):
        plan = method.plan(batches, now) if micro > 1 else [None]
    loss = torch.zeros(())
    for index, batch in enumerate(batches):
        with no_sync(module, index < micro - 1):
            with torch.autocast("cpu", **enabled):
                part, _ = module(batch, now, plan[index])
            (part / micro).backward()
        loss += part.detach() / micro
    method.after_backward(now)
    norm = gradient_norm(optimizer, clip=clip)
    bad = collectives.all_reduce_max((~(norm.isfinite() & loss.isfinite())).float())
    set_hyperparameters(optimizer, lr=0.05, weight_decay=0.01)
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(now, ok=bad == 0)
    return collectives.all_reduce_sum(loss) / world.size, norm
