"""SwAV trains with each kind of trunk: a few updates, and its trunk file loads again."""

import math

import pytest

from selfsight.weights.load import load_trunk
from tests.runs import arguments, pictures, run_here


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("vt_resnet18", ()),
        pytest.param("resnet50", (), marks=pytest.mark.slow),
        pytest.param("timm", ("model.name=regnety_002",), marks=pytest.mark.slow),
    ],
)
def test_swav_trains(tmp_path, model, more):
    data = pictures(tmp_path / "data")
    options = (f"model={model}", *more, "steps=3", "loader.reduced=false")
    summary = run_here(arguments(data, tmp_path / "runs", "smoke", *options))
    assert summary["status"] == "complete" and math.isfinite(summary["loss"])
    loaded = load_trunk(tmp_path / "runs" / "smoke")
    assert loaded.report.whole and loaded.report.layout == "selfsight"
