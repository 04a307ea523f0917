"""Parameter groups: which parameters decay, and what the loop sets in each group at each step.

SEER and SwAV decay everything (one group). AdamW recipes exclude biases and every parameter of one
dimension, the weights of normalisation layers among them, as DINO's released code does.
"""

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    weight_decay: float,
    exclude_bias_and_norm: bool,
) -> list[dict[str, Any]]:
    """Sort parameters into groups for an optimiser.

    Args:
        named_parameters: pairs of name and parameter; those that need no gradient are left out.
        weight_decay: of the decayed group.
        exclude_bias_and_norm: put biases, and all parameters of at most one dimension, into a
            second group without decay.

    Returns:
        One or two groups, none empty, each with `params`, their `names` in the same order,
        `weight_decay`, and `decayed`, which says whether a schedule of the decay applies to it.

    Raises:
        ValueError: no parameter needs a gradient.
    """
    decayed: dict[str, Parameter] = {}
    excluded: dict[str, Parameter] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or name.endswith(".bias")
            (excluded if exclude_bias_and_norm and small else decayed)[name] = parameter
    if not decayed and not excluded:
        raise ValueError("there is nothing to optimise: no parameter needs a gradient")
    return [
        {
            "params": list(members.values()),
            "names": list(members),
            "weight_decay": weight_decay if decays else 0.0,
            "decayed": decays,
        }
        for members, decays in ((decayed, True), (excluded, False))
        if members
    ]


def set_hyperparameters(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate in all groups, and its weight decay in those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = weight_decay
