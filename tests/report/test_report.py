"""The report of real runs: one that its verdict ends, and one with a vision transformer."""

import json
import re

import pytest
import torch

from selfsight.build import compose
from selfsight.config import check
from selfsight.report.compare import comparison
from selfsight.report.difference import Change, changes
from selfsight.report.page import page
from selfsight.report.record import read
from selfsight.report.reporter import Reporter, write
from selfsight.tracking.folder import RunFolder
from tests.pages.test_pages import Structure
from tests.runs import VIT, arguments, pictures, run_here


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """Codes so soft that all assignments are alike: `uniform collapse`, on which the run ends."""
    root = tmp_path_factory.mktemp("collapsed")
    data = pictures(root / "data")
    (data / "class0" / "bad.jpg").write_text("<b>no image</b>")
    more = ["steps=40", "method.epsilon=50", "schedule.base_lr=0", "recovery.verdict=stop"]
    more += ["eval.every=8", "method.temperature=5"]
    return run_here(arguments(data, root / "runs", "soft", *more)), root / "runs" / "soft"


def test_a_run_ends_on_its_verdict(collapsed):
    summary, _ = collapsed
    assert summary["status"] == "failed" and summary["verdict"] == "uniform collapse"
    assert summary["step"] < 40
    (entry,) = summary["verdicts"]
    assert entry["state"] == "uniform collapse" and entry["since"] <= entry["declared"]
    assert "likely cause" in summary["verdict_text"]


def test_the_page_of_a_run(collapsed):
    _, folder = collapsed
    text = (folder / "report.html").read_text()
    found = Structure(text)
    assert all(source.startswith("data:image/") or source[0] == "#" for source in found.sources)
    assert not re.search(r"https?://", text)
    for words in ("Curves", "Nearest neighbours", "Prototypes", "Map of the images", "Crops",
                  "could not be used", "Environment", "uniform collapse", "ln 40"):  # fmt: skip
        assert words in text
    assert "<b>no image" not in text
    assert 'id="attention"' not in text, "a RegNetY has none"
    assert text.count('class="strip"') == 2 * 8


def test_what_was_seen_is_of_the_same_images(collapsed):
    _, folder = collapsed
    record = read(folder)
    assert record.images is not None and record.crops is not None
    first, last = record.seen
    assert first["step"] == 0 < last["step"]
    assert [row["image"] for row in first["neighbours"]] == [
        row["image"] for row in last["neighbours"]
    ]
    count = len(record.images["labels"])
    assert len(first["map"]) == count and all(0 <= x <= 1 for place in last["map"] for x in place)
    used = last["prototypes"]
    assert used["count"] == 40 and sum(row["used"] for row in used["rows"]) <= count
    assert len(record.crops["rows"][0][0]) == 2 and len(record.crops["rows"][0][1]) == 2


def test_attention_of_a_vision_transformer(tmp_path):
    data = pictures(tmp_path / "data")
    run_here(arguments(data, tmp_path / "runs", "vit", *VIT, "steps=2", "eval.every=2"))
    record = read(tmp_path / "runs" / "vit")
    found = record.seen[-1]["attention"]
    maps = torch.tensor(found["maps"])
    assert maps.shape[1:] == (2, 4, 4) and len(maps) == len(found["images"])
    assert (maps.sum((-1, -2)) <= 1.01).all() and (maps > 0).all()
    assert 'id="attention"' in page(record)


def test_a_run_goes_back_before_its_verdict_began(tmp_path):
    data = pictures(tmp_path / "data")
    more = ["steps=40", "method.epsilon=50", "schedule.base_lr=0", "method.temperature=5"]
    more += ["recovery.verdict=roll_back", "recovery.attempts=1", "checkpoint.every=4"]
    more += ["tracking.report=false", "eval.every=40"]
    summary = run_here(arguments(data, tmp_path / "runs", "back", *more))
    assert summary["status"] == "failed" and summary["verdict"] == "uniform collapse"
    assert len(summary["verdicts"]) == 2, "once before it went back, once after"
    assert not (tmp_path / "runs" / "back" / "report.html").exists()


def test_a_failure_is_told_once_and_ends_nothing(tmp_path):
    told: list[str] = []
    reporter = Reporter(tmp_path / "missing", active=True, notice=told.append)
    reporter.write()
    reporter.write()
    assert len(told) == 1 and "the run goes on" in told[0]
    Reporter(tmp_path, active=False, notice=told.append).write()
    assert len(told) == 1
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        write(tmp_path)


def test_what_differs_from_the_recipe():
    words = ["recipe=cifar10_small", "data=packed_npz", "method.epsilon=0.2", "name=x"]
    config = check(compose("pretrain", words))
    config.overrides = words
    assert changes(config) == [Change("method.epsilon", 0.01, 0.2)]
    config.overrides = None
    assert changes(config) is None


def test_what_is_seen_later_is_forgotten_when_a_run_goes_back(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for step in (0, 10, 20):
        (folder / f"step_{step:08d}.json").write_text(json.dumps({"step": step}))
    Reporter(tmp_path, active=True, notice=print).forget_after(10)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000000.json", "step_00000010.json"]
    assert RunFolder(tmp_path).config_text() is None


def test_evaluations_stand_in_the_page(collapsed):
    _, folder = collapsed
    (folder / "evals").mkdir(exist_ok=True)
    figures = {"top1": {"value": 61.25, "low": 58, "high": 64}}
    result = {"main": "top1", "protocol": "k 20 <of> 5", "subject": {}, "figures": figures}
    result["data"] = {"name": "birds"}
    (folder / "evals" / "knn.birds.json").write_text(json.dumps(result))
    (folder / "evals" / "other.json").write_text("[1]")
    text = write(folder).read_text()
    assert "61.25 [58, 64]" in text and "k 20 &lt;of&gt; 5" in text


def test_runs_beside_each_other(collapsed, tmp_path):
    _, folder = collapsed
    one = read(folder)
    other = read(folder)
    other.name, other.config = "<other>", {**one.config, "method.epsilon": 0.5}
    text = comparison([one, other])
    Structure(text)
    assert "method.epsilon" in text and "method.temperature" not in text
    assert "&lt;other&gt;" in text and text.count('class="curve"') >= 6
    assert "configurations are equal" in comparison([one, one])
