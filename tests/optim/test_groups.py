"""Which parameters decay."""

import pytest
import torch
from torch import nn

from selfsight.optim.adamw import AdamW
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.optim.lars import LARS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)


NAMES = ["token", "scale", "conv.weight", "conv.bias", "bn.weight", "bn.bias", "fc.weight"]


def test_seer_excludes_nothing():
    net = Net()
    groups = parameter_groups(
        net.named_parameters(), weight_decay=1e-5, exclude_bias_and_norm=False
    )
    assert len(groups) == 1
    assert groups[0]["names"] == [*NAMES, "fc.bias"]
    assert groups[0]["weight_decay"] == 1e-5
    assert groups[0]["decayed"]
    by_name = dict(net.named_parameters())
    for name, parameter in zip(groups[0]["names"], groups[0]["params"], strict=True):
        assert parameter is by_name[name]


def test_adamw_excludes_biases_and_norms():
    groups = parameter_groups(
        Net().named_parameters(), weight_decay=0.05, exclude_bias_and_norm=True
    )
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [group["decayed"] for group in groups] == [True, False]
    assert groups[0]["names"] == ["token", "conv.weight", "fc.weight"]
    assert groups[1]["names"] == ["scale", "conv.bias", "bn.weight", "bn.bias", "fc.bias"]


def test_no_group_is_empty():
    linear = nn.Linear(2, 2, bias=False)
    groups = parameter_groups(
        linear.named_parameters(), weight_decay=0.05, exclude_bias_and_norm=True
    )
    assert [group["names"] for group in groups] == [["weight"]]
    with pytest.raises(ValueError, match="nothing to optimise"):
        parameter_groups(
            linear.requires_grad_(False).named_parameters(),
            weight_decay=0.05,
            exclude_bias_and_norm=True,
        )


@pytest.mark.parametrize("kind", [AdamW, LARS])
def test_scheduled_values_reach_the_groups_they_apply_to(kind: type):
    groups = parameter_groups(
        Net().named_parameters(), weight_decay=0.0, exclude_bias_and_norm=True
    )
    optimizer = kind(groups)
    set_hyperparameters(optimizer, lr=0.3, weight_decay=0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]
    assert optimizer.param_groups[0]["names"] == ["token", "conv.weight", "fc.weight"]
