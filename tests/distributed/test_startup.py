"""Ranks that do not come, or come with something else, are named before the first step."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from selfsight.distributed import env
from selfsight.distributed.startup import (
    RanksDiffer,
    check_ranks,
    code_version,
    meet,
    package_versions,
)
from tests.parallel.ranks import on_ranks


def test_what_a_rank_is_told_by():
    assert len(code_version()) == 64
    assert {"Python", "torch", "numpy"} <= package_versions().keys()
    check_ranks(env.World(), "hash")


def _check(world: env.World, odd: list[int], key: str) -> str | None:
    mine = world.rank in odd
    versions = {"torch": "9.9" if mine and key == "torch" else "2.0"}
    try:
        check_ranks(
            world,
            "another" if mine and key == "configuration" else "same",
            "another" if mine and key == "code" else "same",
            versions,
        )
    except RanksDiffer as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("odd", "key", "said"),
    [
        ([], "", None),
        ([2], "configuration", "rank 2 (on"),
        ([0], "code", "rank 0 (on"),
        ([1], "torch", "rank 1 (on"),
    ],
)
def test_the_odd_rank_of_three_is_named_on_all(odd, key, said):
    found = on_ranks(3, _check, odd, key)
    assert len(set(found)) == 1
    if said is None:
        assert found[0] is None
    else:
        assert said in found[0] and key in found[0]


def test_of_two_that_differ_rank_0_is_the_measure():
    found = on_ranks(2, _check, [1], "configuration")
    assert "rank 1" in found[0] and "another there and same elsewhere" in found[0]


def _store(port: int, server: bool) -> TCPStore:
    return TCPStore(
        "127.0.0.1", port, None, server, timedelta(seconds=20), wait_for_workers=False
    )  # fmt: skip


def test_ranks_that_never_come_are_named():
    port = env.free_port()
    store = _store(port, True)
    for rank in (1, 2):
        store.set(f"selfsight/joined/{rank}", "node7")
    with pytest.raises(ConnectionError, match=r"ranks 3, 4 of 5 did not come in 1 s") as error:
        meet(store, 0, 5, timeout=1.0)
    assert "2 on node7" in str(error.value)
    assert socket.gethostname() in str(error.value)
    for rank in (3, 4):
        store.set(f"selfsight/joined/{rank}", "node8")
    meet(store, 0, 5, timeout=1.0)
