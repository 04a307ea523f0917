"""Collectives against what one process computes, and as identities in a world of one."""

import pytest
import torch

from selfsight.distributed import collectives, env
from tests.parallel.ranks import on_ranks

VALUE = {"step": 3, "name": "größe", "loss": 0.1, "list": [1, None, True]}


def test_world_of_one_is_identity():
    tensor = torch.arange(6.0).view(2, 3)
    assert collectives.rank() == 0
    assert collectives.size() == 1
    assert collectives.all_reduce_sum(tensor) is tensor
    assert collectives.all_reduce_max(tensor) is tensor
    assert collectives.all_gather_rows(tensor) is tensor
    assert collectives.all_gather_ragged_rows(tensor) is tensor
    assert collectives.broadcast(tensor) is tensor
    assert collectives.broadcast_json(VALUE) == VALUE
    assert collectives.all_gather_json(VALUE) == [VALUE]
    collectives.barrier()


def _exchange(world: env.World) -> dict:
    mine = torch.arange(6.0).view(2, 3).t() * (world.rank + 1)  # not contiguous
    before = mine.clone()
    leaf = mine.clone().requires_grad_()
    result = {
        "sum": collectives.all_reduce_sum(leaf),
        "max": collectives.all_reduce_max(-mine),
        "rows": collectives.all_gather_rows(mine),
        "bfloat16": collectives.all_gather_rows(mine.bfloat16()),
        "bool": collectives.all_gather_rows(torch.tensor([world.main])),
        "ragged": collectives.all_gather_ragged_rows(torch.full((world.rank, 2), world.rank)),
        "empty": collectives.all_gather_ragged_rows(torch.zeros(0, 4)),
        "broadcast": collectives.broadcast(mine, src=1),
        "json": collectives.broadcast_json({**VALUE, "step": world.rank}, src=2),
        "all_json": collectives.all_gather_json("x" * world.rank),
        "place": [collectives.rank(), collectives.size(), world.local_rank, world.local_size],
    }
    collectives.barrier()
    assert torch.equal(mine, before)
    assert not result["sum"].requires_grad
    return result


def test_exchanges_of_three_ranks():
    base = torch.arange(6.0).view(2, 3).t()
    results = on_ranks(3, _exchange)
    for rank, result in enumerate(results):
        assert torch.equal(result["sum"], base * 6)
        assert torch.equal(result["max"], -base)
        assert torch.equal(result["rows"], torch.cat([base, base * 2, base * 3]))
        assert torch.equal(result["bfloat16"].float(), result["rows"])
        assert result["bool"].tolist() == [True, False, False]
        assert result["ragged"].tolist() == [[1, 1], [2, 2], [2, 2]]
        assert result["empty"].shape == (0, 4)
        assert torch.equal(result["broadcast"], base * 2)
        assert result["json"] == {**VALUE, "step": 2}
        assert result["all_json"] == ["", "x", "xx"]
        assert result["place"] == [rank, 3, rank, 3]


def test_json_refuses_what_json_cannot_carry():
    with pytest.raises(TypeError):
        collectives.broadcast_json({"tensor": torch.zeros(1)})
