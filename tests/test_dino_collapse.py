"""DINO's two deliberate collapses (section 5.3 of the paper) are named, and told apart."""

import pytest

from tests.runs import run_here
from tests.test_dino_runs import DINO_

SCENES = ["data=scenes", "cluster=local", "cluster.threads=1", "loader.workers=0", "device=cpu"]
SCENES += ["data.eval_limit=[40,20]", "data.eval_size=32", "tracking.log_every=5"]
SCENES += ["tracking.wandb=off", "batch_size=16", "epochs=null", "schedule=constant"]
SCENES += ["optim.weight_decay=0.04"]


@pytest.mark.parametrize(
    ("state", "broken"),
    [
        # no centring: one prototype wins for all images
        ("one-point collapse", ["method.centring=none", "steps=200"]),
        # no sharpening: a teacher as soft as that agrees to everything
        (
            "uniform collapse",
            ["method.teacher_temperature=1.0", "method.teacher_temperature_start=1.0", "steps=60"],
        ),
    ],
)
def test_a_deliberate_collapse_is_named(tmp_path, capsys, state, broken):
    rate = ["schedule.base_lr=0.02"]
    more = [m for m in DINO_ if "freeze" not in m]
    summary = run_here([*more, *SCENES, *rate, *broken, f"runs_dir={tmp_path}", "name=broken"])
    assert summary["verdict"] == state, summary["verdict_text"]
    assert "since step" in summary["verdict_text"]
    assert state in capsys.readouterr().err  # with a remedy, while it runs


def test_a_run_in_order_is_not_accused(tmp_path):
    fine = ["steps=60", "schedule.base_lr=0.002", f"runs_dir={tmp_path}", "name=fine"]
    more = [m for m in DINO_ if "freeze" not in m]
    summary = run_here([*more, *SCENES, *fine])
    assert "collapse" not in summary["verdict"], summary["verdict_text"]
