"""Worlds that others have made."""

import pytest

from selfsight.cluster.launch import choose
from selfsight.cluster.places import Place, first_node, from_environment, from_slurm
from selfsight.config import ConfigError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}  # fmt: skip


def test_the_place_that_torchrun_gives():
    assert from_environment(TORCHRUN) == Place(5, 8, 1, 4, "env://")
    pods = {k: v for k, v in TORCHRUN.items() if not k.startswith("LOCAL")}
    assert from_environment(pods) == Place(5, 8, 0, 1, "env://")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "8"}, "RANK=8 does not exist among 8"),
        ({"RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be a whole number, at least 1"),
        ({"WORLD_SIZE": "6"}, "WORLD_SIZE=6 does not consist of machines"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 does not exist among 4"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' must be"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not"),
    ],
)
def test_places_that_cannot_be(change, words):
    environ = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(ConfigError) as error:
        from_environment(environ)
    assert words in str(error.value)


def test_the_place_that_srun_gives():
    place = from_slurm(SRUN)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (9, 16, 1, 8)
    assert place.meet == "tcp://gpu003:16311"
    assert from_slurm(SRUN, meet="tcp://a:1").meet == "tcp://a:1"
    alone = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "16"}
    assert from_slurm(alone).meet.startswith("tcp://127.0.0.1:")
    with pytest.raises(ConfigError, match="different numbers"):
        from_slurm({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8,4(x2)"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node1,node7", "node1"), ("gpu[003-010,12],big1", "gpu003"),
        ("rack1-gpu[7]", "rack1-gpu7"), ("a[1-2]-ib", "a1-ib"), ("n7,n[1-2]", "n7"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_auto_chooses_and_says_why(tmp_path):
    empty = {"PATH": str(tmp_path)}
    assert choose("local", TORCHRUN) == ("local", None)
    assert choose("auto", empty) == ("local", "there is no sbatch here")
    assert choose("auto", {**empty, **TORCHRUN})[0] == "env"
    assert choose("auto", {**empty, **SRUN})[0] == "srun"
    kind, why = choose("auto", {**empty, "SLURM_JOB_ID": "12"})
    assert kind == "local" and why is not None and "12" in why
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert choose("auto", empty) == ("slurm", "sbatch is here")
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2\nexit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert choose("auto", empty) == ("local", "sbatch is here and knows no cluster")
    inside = {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}
    assert choose("auto", {**empty, **inside})[0] == "local"
