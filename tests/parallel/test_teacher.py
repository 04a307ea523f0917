"""Student and teacher on every layout over ranks, against one process that sees the whole batch.

Drop path is 0 here: its draws depend on the rank. Masks and KoLeo need no exception.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from selfsight.distributed.env import World
from tests.parallel.ranks import on_ranks
from tests.parallel.test_forms import close
from tests.parallel.training import train

Found = dict[str, Tensor]
HOW = {"clip": 0.5}
TEACHER = ("method.trunk.", "method.heads.", "method.targets.", "method.patch_targets.")


def _on_rank(world: World, kind: str, options: dict, how: dict) -> Found:
    return train(world, kind, options, **{**HOW, **how})


@cache
def _alone(kind: str) -> Found:
    torch.set_num_threads(1)
    return train(World(), kind, {}, **HOW)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "kind", ["dino", "dino_regnet", "dino_sinkhorn", "dino_koleo", "ibot", "ibot_sinkhorn"]
)
def test_two_ranks_equal_one_process(kind, strategy):
    options = {"strategy": strategy, "activation_checkpointing": kind == "dino"}
    for found in on_ranks(2, _on_rank, kind, options, {}):
        assert any(name.startswith(TEACHER) for name in found)
        close(found, _alone(kind))


@pytest.mark.parametrize("kind", ["dino", "dino_sinkhorn"])
def test_accumulation_on_two_ranks_equals_one_process(kind):
    for found in on_ranks(2, _on_rank, kind, {"strategy": "ddp"}, {"micro": 3}):
        close(found, _alone(kind))


def test_three_ranks_with_uneven_shards_and_counts_of_masked_patches():
    for found in on_ranks(3, _on_rank, "ibot_sinkhorn", {"strategy": "fsdp"}, {}):
        close(found, _alone("ibot_sinkhorn"))


def test_accumulated_ibot_equals_the_whole_batch():
    """Without KoLeo, whose neighbours are looked for within a micro-batch."""
    whole = train(World(), "ibot_plain", {}, **HOW)
    close(train(World(), "ibot_plain", {}, **HOW, micro=3), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own
def test_a_compiled_teacher_gives_the_same():
    close(train(World(), "dino", {"compile": True}, **HOW), _alone("dino"))
