"""Parameter groups: which parameters decay, how fast each layer learns, and what the loop sets in
each group at each step.

SEER and SwAV decay everything (one group). AdamW recipes exclude biases and every parameter of one
dimension, the weights of normalisation layers among them, as DINO's released code does. DINOv2's
lets early layers learn more slowly: layer-wise decay (BEiT, arXiv:2106.08254, appendix).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

PATCH_EMBEDDING = "patch_embed."


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    weight_decay: float,
    exclude_bias_and_norm: bool,
    lr_factors: Mapping[Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters into groups for an optimiser.

    Args:
        named_parameters: pairs of name and parameter; those that need no gradient are left out.
        weight_decay: of the decayed groups.
        exclude_bias_and_norm: put biases, and all parameters of at most one dimension, into
            groups without decay.
        lr_factors: learning rate over the scheduled one; 1 for parameters that are not named.

    Returns:
        The groups, none empty, those with decay first, each with `params`, their `names` in the
        same order, `weight_decay`, `decayed`, which says whether a schedule of the decay applies to
        it, and `lr_factor`. Without `lr_factors` there are at most two.

    Raises:
        ValueError: no parameter needs a gradient.
    """
    factors = lr_factors or {}
    groups: dict[tuple[bool, float], dict[str, Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or name.endswith(".bias")
            key = (exclude_bias_and_norm and small, factors.get(parameter, 1.0))
            groups.setdefault(key, {})[name] = parameter
    if not groups:
        raise ValueError("there is nothing to optimise: no parameter needs a gradient")
    return [
        {
            "params": list(members.values()),
            "names": list(members),
            "weight_decay": 0.0 if excluded else weight_decay,
            "decayed": not excluded,
            "lr_factor": factor,
        }
        for (excluded, factor), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def lr_factors(
    trunk: nn.Module,
    units: Sequence[nn.Module],
    *,
    decay: float = 1.0,
    patch_embed: float = 1.0,
    whole: float = 1.0,
) -> dict[Parameter, float]:
    """Learning rate of each parameter of a trunk over the scheduled one.

    With n blocks, block i has decay ** (n - i), what comes before the blocks
    (embeddings, tokens, stem) decay ** (n + 1), what comes after them (the last norm) 1, as in BEiT
    and DINOv2. Heads are no part of a trunk: they learn at the scheduled rate.

    Args:
        trunk: whose parameters.
        units: its blocks, in the order in which they run.
        decay: ratio of the rates of neighbouring blocks; 1 for one rate.
        patch_embed: a factor more for the patch embedding of a ViT.
        whole: a factor more for the whole trunk: heads learn at the scheduled rate.

    Raises:
        ValueError: a value outside (0, 1], or a patch embedding is asked of a trunk without one.
    """
    if not (0 < decay <= 1 and patch_embed > 0 and whole > 0):
        raise ValueError(
            f"optim.layer_decay={decay} must be above 0 and at most 1, and "
            f"optim.patch_embed_lr_factor={patch_embed} and optim.trunk_lr_factor={whole} above 0"
        )
    if decay == patch_embed == whole == 1:
        return {}
    number = {p: i for i, unit in enumerate(units) for p in unit.parameters()}
    named = list(trunk.named_parameters())
    if patch_embed != 1 and not any(name.startswith(PATCH_EMBEDDING) for name, _ in named):
        raise ValueError(
            f"optim.patch_embed_lr_factor={patch_embed} needs a ViT: this trunk has no patch "
            "embedding, so leave it at 1"
        )
    last = max((i for i, (_, p) in enumerate(named) if p in number), default=-1)
    found: dict[Parameter, float] = {}
    for place, (name, parameter) in enumerate(named):
        outside = len(units) if place > last else -1
        layer = number.get(parameter, outside)
        factor = patch_embed if name.startswith(PATCH_EMBEDDING) else 1.0
        found[parameter] = whole * factor * decay ** (len(units) - layer)
    return found


def set_hyperparameters(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate in all groups, and its weight decay in those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        if group["decayed"]:
            group["weight_decay"] = weight_decay
