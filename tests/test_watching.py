"""The view of a run from its folder."""

import json

import pytest

from selfsight.config import ConfigError
from selfsight.watching import Metrics, main, settings, sparkline, view


def test_mistakes_are_sentences(tmp_path):
    for arguments, words in (
        ([], "give run="),
        (["run=/nowhere"], "is no folder"),
        ([f"run={tmp_path}", "every=0"], "every=0 must be"),
        ([f"run={tmp_path}", "once=maybe"], "once=maybe"),
        (["name=3"], "'name=3' is not understood"),
    ):
        with pytest.raises(ConfigError, match=words):
            settings(arguments)


def test_a_growing_file_is_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.refresh()
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    metrics.refresh()
    assert metrics.column("loss") == [3.0]
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    metrics.refresh()
    assert metrics.column("loss") == [3.0, 2.0]
    path.write_text('{"step": 1, "loss": 5.0}\n')  # the run went back
    metrics.refresh()
    assert metrics.column("loss") == [5.0]


def test_a_sparkline_goes_from_low_to_high():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) == 32
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""


def test_the_view_tells_state_and_silence(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(
        json.dumps({"status": "running", "step": 5, "steps": 10, "verdict": "uniform collapse",
                    "verdict_text": "uniform collapse (since step 3)\x1b[2J"})
    )  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 2.5}\n')
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.refresh()
    now = (tmp_path / "metrics.jsonl").stat().st_mtime + 600
    lines = list(view(tmp_path, metrics, now))
    text = "\n".join(text for _, text in lines)
    assert "60%  6 of 10 updates" in text and "nothing was written for 10 min" in text
    assert ("bad", "uniform collapse (since step 3)?[2J") in lines
    assert main([f"run={tmp_path}", "once=true"]) == 0
    assert "2.5000" in capsys.readouterr().out
