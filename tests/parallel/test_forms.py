"""Every way of laying SwAV out over ranks against one process that sees the whole batch."""

from functools import cache

import pytest
import torch
from torch import Tensor

from selfsight.distributed.env import World
from selfsight.distributed.parallelize import parallelize
from tests.parallel.ranks import on_ranks
from tests.parallel.training import train

Found = dict[str, Tensor]


def _on_rank(world: World, kind: str, options: dict, how: dict) -> Found:
    return train(world, kind, options, **how)


@cache
def _alone(kind: str, how: tuple = ()) -> Found:
    torch.set_num_threads(1)
    return train(World(), kind, {}, **dict(how))


def close(found: Found, expected: Found, tolerance: float = 1e-3) -> None:
    """Losses, norms, weights, momenta and statistics, by name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointing", ["none", "all", "selective", "every_2"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["regnet", "vit"])
def test_two_ranks_equal_one_process(kind, strategy, checkpointing):
    options = {"strategy": strategy, "activation_checkpointing": checkpointing}
    for found in on_ranks(2, _on_rank, kind, options, {}):
        close(found, _alone(kind))


@pytest.mark.parametrize("kind", ["regnet", "vit"])
def test_three_ranks_with_uneven_and_empty_shards(kind):
    """20 prototypes do not divide by 3; a ViT's class token has one row for three ranks."""
    how = {"clip": 0.5}
    for found in on_ranks(3, _on_rank, kind, {"strategy": "fsdp"}, how):
        close(found, _alone(kind, tuple(how.items())))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulation_and_adamw(strategy):
    how = {"micro": 3, "optimizer": "adamw", "clip": 0.1}
    for found in on_ranks(2, _on_rank, "vit", {"strategy": strategy}, how):
        close(found, _alone("vit", tuple(how.items())))


@pytest.mark.parametrize("group", [1, 2])
def test_half_precision_weights_give_the_losses_of_autocast(group):
    """FSDP2 gathers the blocks in bfloat16, BatchNorm's vectors too; DDP leaves it to autocast."""
    how = {"autocast": torch.bfloat16, "steps": 2}
    layout = {"precision": "bf16", "syncbn_group_size": group}
    ddp, fsdp = (
        on_ranks(2, _on_rank, "regnet", {"strategy": strategy, **layout}, how)[0]
        for strategy in ("ddp", "fsdp")
    )
    torch.testing.assert_close(fsdp["losses"], ddp["losses"], rtol=0.02, atol=0.02)
    weights = [fsdp[name] for name in fsdp if name.endswith("weight")]
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_gradients_compressed_to_bf16_stay_close():
    for strategy in ("ddp", "fsdp"):
        options = {"strategy": strategy, "compress_gradients": "bf16"}
        found = on_ranks(2, _on_rank, "vit", options, {})[0]
        torch.testing.assert_close(found["norms"], _alone("vit")["norms"], rtol=0.02, atol=0.02)
        close({"losses": found["losses"]}, {"losses": _alone("vit")["losses"]}, 5e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "zero"}, r"strategy=zero is not one of ddp, fsdp\."),
        ({"precision": "fp8"}, r"precision=fp8 is not one of fp32, bf16, fp16\."),
        ({"compress_gradients": "int8"}, "compress_gradients=int8 is not one of bf16"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing=some is not one of none"),
        ({"activation_checkpointing": "every_0"}, "every_0 is not one of"),
        ({"activation_checkpointing": "budget_0.5"}, r"set compile=true"),
        ({"activation_checkpointing": "budget_2"}, r"from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, said):
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=said):
        parallelize(module, units=[], world=World(), **options)
