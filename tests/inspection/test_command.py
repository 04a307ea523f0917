"""The command: its mistakes, its console, its folder; and the uncurated set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfsight.build import compose
from selfsight.config import ConfigError, check
from selfsight.inspection.settings import Inspect
from tests.inspection.small import QUICK, ROOT, SMALL, encoded, inspected, noise


def test_mistakes_are_sentences(tmp_path, folder):
    (tmp_path / "letter.txt").write_text("dear")
    for overrides, words in (
        (["inspect.sample=3"], "did you mean 'inspect.samples'?"),
        (["+inspect.sise=3"], "'inspect.sise' is not a key of Inspect"),
        (["inspect.samples=many"], "inspect.samples='many' must be a whole number"),
        (["inspect.samples=0"], "inspect.samples=0 must be at least 1"),
        (["inspect.seconds=0"], "inspect.seconds=0 must be above 0"),
        (["inspect=3"], "inspect=3 must hold the keys of Inspect"),
        ([f"inspect.out={tmp_path}"], "holds other files and no report"),
        ([f"inspect.out={tmp_path / 'letter.txt'}"], "is a file"),
        (["batchsize=3"], "did you mean 'batch_size'?"),
        (["data=folder"], "data.path"),
        (["views.global.gray=0.5", "pixels.channels=1", "pixels.mean=[0.5]", "pixels.std=[0.2]"],
         "views.global: gray must be 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            inspected("data=synthetic", *SMALL, *overrides)
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_section_belongs_to_its_command():
    with pytest.raises(ConfigError, match="'inspect' is not a key of the configuration"):
        check(compose("pretrain", ["+inspect.samples=3"]))
    config = compose("inspect_data", [])
    assert config.inspect == vars(Inspect())


def test_libraries_are_quiet_and_python_is_not(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    form = encoded(noise(0, 30, 30), "TIFF", compression="tiff_lzw")
    (tmp_path / "in" / "good.tif").write_bytes(form)
    (tmp_path / "in" / "torn.tif").write_bytes(form[:200] + bytes(100) + form[300:])
    inspected(
        *QUICK, "data=folder", f"data.path={tmp_path / 'in'}", f"inspect.out={tmp_path / 'out'}"
    )
    os.write(2, b"still here\n")
    out, err = capfd.readouterr()
    assert err == "still here\n"
    assert "cannot be used" in out


def test_the_command(tmp_path, folder):
    """With loader processes, into the folder it names by itself; a mistake exits with 2."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "launch" / "inspect_data.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "ssl"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = command(
        *SMALL,
        "data=folder",
        f"data.path='{folder}'",
        "loader.workers=2",
        "inspect.loader_seconds=0.2",
    )
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "inspections").iterdir()
    assert made.name.startswith("folder-") and f"{made.name}/report.html" in done.stdout
    found = json.loads((made / "report.json").read_text())
    assert found["speed"]["loader"]["workers"] == 2
    assert found["speed"]["loader"]["images_per_second"] > 0
    bad = command("data=folder", "inspect.sample=3")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("selfsight: there is no key 'inspect.sample'")
    assert "inspect:" in command("--cfg", "job").stdout


def test_the_uncurated_set(tmp_path):
    """Pillow's outcome of each file is in the description of the set."""
    if "SELFSIGHT_DATA" not in os.environ:
        pytest.skip("needs the image sets: set SELFSIGHT_DATA to their folder")
    sets = Path(os.environ["SELFSIGHT_DATA"]) / "uncurated"
    described = json.loads((sets / "dataset.json").read_text())
    found = inspected(
        *QUICK,
        "data=uncurated_stream",
        f"data.shards={sets / 'uncurated-000000.tar'}",
        f"inspect.out={tmp_path / 'out'}",
        "inspect.seconds=300",
    )
    samples = {sample["key"]: sample for sample in described["samples"]}
    assert found["sample"]["read"] == described["counts"]["all"]
    assert found["sample"]["used"] == described["counts"]["ok"]
    listed = [key for row in found["bad"]["reasons"] for key in row["examples"]]
    names = [key.partition(":")[2].partition(".")[0] for key in listed]
    assert names and all(samples[name]["outcome"] != "ok" for name in names)
    good = [s for s in samples.values() if s["outcome"] == "ok"]
    modes = found["images"]["modes"]
    assert sum(modes.values()) == len(good)
    assert modes["CMYK"] == sum(s["mode"] == "CMYK" for s in good)
    largest = max(s["size"][0] * s["size"][1] for s in good)
    assert found["images"]["sizes"]["megapixels"]["max"] == pytest.approx(largest / 1e6)
