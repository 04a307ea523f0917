"""How many machines a job needs."""

import pytest

from selfsight.build import compose
from selfsight.cluster.plan import plan
from selfsight.config import ConfigError, check


def planned(*overrides: str) -> str:
    return str(plan(check(compose("pretrain", ["cluster=slurm", *overrides]))))


def test_seer_needs_64_nodes_of_8_gpus():
    seer = ["model=regnety_256gf", "data=uncurated_stream", "data.shards=/nowhere"]
    assert planned(*seer) == "64 nodes x 8 GPUs"
    assert planned(*seer, "cluster.gpus_per_node=4") == "128 nodes x 4 GPUs"
    assert planned(*seer, "batch_size=1024") == "8 nodes x 8 GPUs"
    assert planned(*seer, "cluster.nodes=16") == "16 nodes x 8 GPUs"  # the rest is accumulated
    assert planned(*seer, "cluster.processes=64") == "8 nodes x 8 GPUs"


def test_small_jobs():
    assert planned() == "1 node x 1 GPU"
    assert planned("batch_size=64", "images_per_device=16") == "1 node x 4 GPUs"
    assert planned("device=cpu") == "1 node x 1 process"
    assert (
        planned("device=cpu", "cluster.nodes=2", "cluster.processes=4") == "2 nodes x 2 processes"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.processes=13"], "13 GPUs do not spread evenly over 2 nodes: set cluster.proc"),
        (["cluster.processes=24", "cluster.nodes=2"], "12 a node, and one has 8: set cluster.nod"),
        (["cluster.nodes=3", "batch_size=256"], "256 does not divide over 24 processes; 256 is"),
        (["device=cpu", "cluster.nodes=2", "cluster.processes=3"], "3 processes do not spread"),
        (["cluster.processes=0"], "cluster.processes=0 must be at least 1"),
        (["cluster.gpus_per_node=0"], "cluster.gpus_per_node=0 must be at least 1"),
        (
            ["images_per_device=32", "cluster.processes=2", "batch_size=96"],
            "48 images of a process",
        ),
    ],
)
def test_what_does_not_come_out_even_is_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        planned(*overrides)
    assert words in str(error.value)
