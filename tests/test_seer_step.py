"""The whole of SEER's network learns for one update on a machine of 24 GiB (slow, 20 GB)."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "seer_step.py"


@pytest.mark.slow
def test_one_update_of_regnety_256gf_fits_24_gib(tmp_path):
    spec = importlib.util.spec_from_file_location("seer_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures = script.one_step(tmp_path)
    assert figures["peak_resident_gib"] < 24
    assert figures["summary"]["step"] == 1
    assert figures["summary"]["skipped_updates"] == 0
