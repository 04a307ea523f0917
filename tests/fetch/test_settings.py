"""A user's mistakes are one sentence, also from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from selfsight.fetch.job import FetchJob
from selfsight.fetch.rules import Rules
from selfsight.fetch.settings import Settings, settings_from

ROOT = Path(__file__).parents[2]
GIVEN = {"urls": "a.txt", "out": "b"}


def test_the_yaml_holds_every_key_and_its_default():
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "fetch.yaml"))
    assert isinstance(written, dict)
    written.pop("defaults")
    defaults = {**vars(Settings()), **vars(Rules())}
    defaults.pop("rules")
    assert written == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    assert settings_from(GIVEN).rules == Rules()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"urls": None}, "urls="),
        ({"out": None}, "out="),
        ({"shard_sise": 3}, "no key 'shard_sise': did you mean 'shard_size'"),
        ({"shard_size": 0}, "shard_size=0 must be at least 1"),
        ({"shard_size": "many"}, "shard_size='many' must be a whole number"),
        ({"robots": "no"}, "robots='no' must be true or false"),
        ({"allow_addresses": ["home"]}, "'home', which is not a network"),
        ({"allow_addresses": "127.0.0.1"}, "allow_addresses='127.0.0.1' must be a list"),
        ({"max_seconds": 0}, "max_seconds=0 must be more than 0"),
        ({"retries": -1}, "retries=-1 must not be negative"),
        ({"at_once": 0}, "at_once=0 must be at least 1"),
        ({"contact": "a\nb"}, "contact="),
        ({"opt_out": ["no ai"]}, "opt_out has 'no ai'"),
    ],
)
def test_mistakes_are_sentences(change, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        settings_from({**GIVEN, **change})
    assert "\n" not in str(error.value)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/fetch.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_answers_mistakes_and_help(tmp_path):
    for arguments, words in (
        ([], "urls="),
        (["urls=nowhere.txt", f"out={tmp_path / 'x'}"], "nowhere.txt"),
        (["--urls", "a.txt"], "write key=value"),
        (["url=a.txt", f"out={tmp_path / 'x'}"], "did you mean 'urls'"),
    ):
        found = command(*arguments)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr and found.stderr.startswith("selfsight: ")
        assert found.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert "allow_addresses" in command("--help").stdout


@pytest.mark.parametrize("package", ["aiohttp", "protego", "pyarrow"])
def test_a_missing_package_is_a_sentence(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark of what cannot be imported
    (tmp_path / "a.txt").write_text("http://a.org/1\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    kind = "parquet" if package == "pyarrow" else "txt"
    with pytest.raises(ValueError, match=rf"needs the package {package}.*--extra fetch"):
        FetchJob(settings_from({"urls": str(tmp_path / f"a.{kind}"), "out": str(tmp_path)}))
    if package == "pyarrow":
        FetchJob(settings_from({"urls": str(tmp_path / "a.txt"), "out": str(tmp_path)}))
    if package == "protego":
        values = {"urls": str(tmp_path / "a.txt"), "out": str(tmp_path), "robots": False}
        FetchJob(settings_from(values))
