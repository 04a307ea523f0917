"""A run that collapses is named in words, with the step it began, and one that learns is not."""

from tests.runs import REGNET, run_here

DEMO = [*REGNET, "cluster.threads=1", "loader.workers=0", "data.eval_limit=[40,20]", "device=cpu"]
DEMO += ["tracking.log_every=4", "tracking.wandb=off", "images=null", "batch_size=32"]


def test_a_deliberate_collapse_is_caught(tmp_path, capsys):
    """Assignments that a large epsilon smears, and a learning rate far too high."""
    broken = ["schedule=constant", "schedule.base_lr=0.8", "method.epsilon=0.2", "steps=40"]
    summary = run_here([*DEMO, *broken, f"runs_dir={tmp_path}", "name=broken"])
    assert "collapse" in summary["verdict"], summary["verdict_text"]
    assert "since step" in summary["verdict_text"]
    said = capsys.readouterr().err
    assert "collapse" in said and "epsilon" in said  # with a remedy, while it runs


def test_a_run_in_order_is_not_accused(tmp_path):
    fine = ["steps=40", "schedule.base_lr=0.012"]
    summary = run_here([*DEMO, *fine, f"runs_dir={tmp_path}", "name=fine"])
    assert "collapse" not in summary["verdict"], summary["verdict_text"]
