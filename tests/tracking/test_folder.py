import json

from selfsight.tracking.console import duration
from selfsight.tracking.folder import RunFolder, environment


def test_metrics_after_a_step_and_torn_lines_are_dropped(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for step in (2, 4, 6):
        folder.append_metrics({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    folder.truncate_metrics(4)
    assert [line["step"] for line in folder.read_metrics()] == [2, 4]
    folder.append_metrics({"step": 6})
    assert [line["step"] for line in folder.read_metrics()] == [2, 4, 6]


def test_summaries_are_merged_and_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.update_summary(step=1, status="running")
    folder.update_summary(step=2)
    assert folder.summary() == {"step": 2, "status": "running"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 2
    assert [p.name for p in (tmp_path / "run").glob(".*")] == []


def test_environment_names_what_a_result_depends_on():
    found = environment()
    assert found["versions"]["torch"] and found["cpu"] and found["python"]


def test_durations_read_well():
    assert [duration(s) for s in (42.4, 200, 18_720, 273_600)] == [
        "42 s", "3 min 20 s", "5 h 12 min", "3 d 4 h",
    ]  # fmt: skip
