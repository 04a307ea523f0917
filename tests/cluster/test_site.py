"""The site file, and what may enter a job script."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from selfsight.build import compose
from selfsight.cluster import site
from selfsight.config import ConfigError, check

EXAMPLE = Path(__file__).parents[2] / "conf" / "site.example.yaml"


@pytest.fixture
def site_file(tmp_path, monkeypatch):
    def write(content: object) -> Path:
        path = tmp_path / "site.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("SELFSIGHT_SITE", str(path))
        return path

    write("")
    return write


WHOLE = compose("pretrain", ["cluster=slurm"])


def fields(*overrides: str) -> dict:
    """The fields with more set, as the command line does; composed once, as that takes a while."""
    changed = OmegaConf.merge(WHOLE, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(changed, DictConfig)
    return site.fields(changed.cluster)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        fields(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_example_is_valid_and_every_key_arrives(site_file):
    site_file(EXAMPLE.read_text())
    found = fields()
    assert found["partition"] == "gpu" and found["account"] == "my-account"
    assert found["time"] == "2-00:00:00" and found["memory"] == "0" and found["exclusive"] is True
    assert found["setup"] == ["module load cuda"] and found["env"] == {"NCCL_DEBUG": "WARN"}
    shards = check(compose("pretrain", ["data=uncurated_stream"])).data.shards
    assert shards == "/data/web-{000000..009999}.tar"


def test_its_commented_keys_are_known():
    lines = EXAMPLE.read_text().splitlines()
    open_up = [line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in lines]
    example = OmegaConf.create({"all": OmegaConf.create("\n".join(open_up))})
    assert set(example.all.slurm) == set(site.KEYS["slurm"])


def test_the_command_line_wins(site_file):
    site_file({"slurm": {"partition": "a", "env": {"A": "1", "B": "2"}, "setup": ["one"]}})
    found = fields("cluster.partition=b", "cluster.env={B: 3}", "cluster.setup=[two, three]")
    assert found["partition"] == "b" and found["env"] == {"A": "1", "B": "3"}
    assert found["setup"] == ["two", "three"]
    assert fields()["partition"] == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"slurm": {"partion": "x"}}, "'slurm.partion' is not a key of the site file"),
        ({"slurm": {"partion": "x"}}, "did you mean 'partition'?"),
        ({"slrum": {}}, "did you mean 'slurm'?"),
        ({"slurm": "gpu"}, "must hold keys"),
        ([1], "must hold sections"),
        ("slurm: {partition: [", "cannot be read"),
    ],
)
def test_mistakes_in_the_site_file(site_file, content, words):
    path = site_file(content)
    with pytest.raises(ConfigError) as error:
        site.read_site()
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


NEWLINE = "x\n#SBATCH --uid=0\ntouch /tmp/owned"


@pytest.mark.parametrize("bad", [NEWLINE, "x\ry", "x\x00y", "x\x1b[2J", "x\x85y", "x\u2028y"])
@pytest.mark.parametrize(
    "key",
    [
        "partition", "account", "qos", "constraint", "reservation", "gpu_type", "time", "memory",
        "container",
    ],
)  # fmt: skip
def test_no_control_character_reaches_the_script(site_file, key, bad):
    site_file({"slurm": {key: bad}})
    assert f"cluster.{key}" in refused()


@pytest.mark.parametrize(
    "section",
    [
        {"setup": [NEWLINE]}, {"srun": [NEWLINE]}, {"container_mounts": [NEWLINE]},
        {"env": {"A": NEWLINE}}, {"env": {NEWLINE: "a"}}, {"sbatch": {"comment": NEWLINE}},
        {"sbatch": {NEWLINE: "a"}}, {"env": {"A B": "1"}}, {"sbatch": {"--comment": "a"}},
        {"setup": "module load"}, {"env": ["A"]}, {"setup": [["a"]]}, {"sbatch": {"nodes": 3}},
        {"sbatch": {"output": "/etc/passwd"}}, {"sbatch": {"wrap": "true"}},
    ],
)  # fmt: skip
def test_nor_through_lists_and_names(site_file, section):
    site_file({"slurm": section})
    assert f"cluster.{next(iter(section))}" in refused()


@pytest.mark.parametrize("time", ["90", "1:30", "2:00:00", "1-12", "1-12:30", "1-12:30:00"])
def test_times(time):
    assert fields(f"cluster.time={time!r}")["time"] == time


@pytest.mark.parametrize("time", ["soon", "1h", "-3", "1-", "1 2"])
def test_times_that_sbatch_would_not_understand(time):
    assert "cluster.time" in refused(f"cluster.time={time!r}")


def test_a_key_of_cluster_that_is_not_known():
    with pytest.raises(ConfigError, match="partition"):
        check(compose("pretrain", ["cluster=slurm", "cluster.partitoin=a"]))
