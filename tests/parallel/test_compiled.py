"""Compiled trunks on ranks against one process that computes as it is written."""

import warnings

import pytest
import torch
from torch import Tensor

from selfsight.distributed.env import World
from tests.parallel.ranks import on_ranks
from tests.parallel.test_forms import close
from tests.parallel.training import train

pytestmark = pytest.mark.slow  # minutes


def _on_rank(
    world: World, kind: str, options: dict, how: dict
) -> tuple[dict[str, Tensor], int, int]:
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # torch's own
    found = train(world, kind, {"compile": True, **options}, **how)
    counters = torch._dynamo.utils.counters
    return found, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# Graphs: a RegNet is one for each crop size, and under FSDP2 one for each of its five blocks too;
# the blocks of a ViT share theirs, unless they are repeated in the backward pass.
@pytest.mark.parametrize(
    ("kind", "strategy", "checkpointing", "sizes", "graphs"),
    [
        pytest.param("regnet", "ddp", "none", (32,), 1, marks=pytest.mark.slow),
        pytest.param("regnet", "ddp", "all", (32, 16), 2, marks=pytest.mark.slow),
        ("regnet", "fsdp", "none", (32,), 5),
        ("vit", "ddp", "none", (32, 16), 2),
        ("vit", "ddp", "selective", (32,), 4),
        ("vit", "fsdp", "all", (32,), 4),
    ],
)
def test_two_compiled_ranks_equal_one_process(kind, strategy, checkpointing, sizes, graphs):
    options = {"strategy": strategy, "activation_checkpointing": checkpointing}
    how = {"steps": 2, "sizes": sizes}
    expected = train(World(), kind, {}, **how)
    for found, captured, breaks in on_ranks(2, _on_rank, kind, options, how, seconds=200):
        assert (captured, breaks) == (graphs, 0)
        close(found, expected)
