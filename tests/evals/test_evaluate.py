"""The evaluation job from configuration to results, on a small run and embedded pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.build import compose
from selfsight.config import ConfigError
from selfsight.evals.settings import check_evaluation, evaluator_names, expand
from selfsight.evals.table import collect, render
from tests.evals.small import SCENES, export, run_evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("runs") / "small")


FEATURES = "knn,linear_probe,logistic,low_shot,health,retrieval,copy_detection,multilabel"
QUICK = [
    "eval.knn.neighbours=[5,20]",
    "eval.linear_probe.steps=20",
    "eval.linear_probe.rates=[0.01,0.1]",
    "eval.linear_probe.inputs=[[feature],[c4_2x2,gem]]",
    "eval.logistic.powers=[-2,0,2]",
    "eval.low_shot.images=['5 a class','20 %']",
    "eval.low_shot.main='20 %'",
    "eval.low_shot.subset_seeds=2",
    "eval.low_shot.powers=[-1,-1,1]",
    "eval.copy_detection.originals=20",
    "eval.multilabel.costs=[1]",
    "eval.multilabel.shots=[2]",
    "eval.multilabel.shot_seeds=2",
    "eval.multilabel.iterations=20",
    "eval.health.pairs=32",
]


def test_every_evaluation_of_features(run, capsys):
    found = run_evaluation(f"eval={FEATURES}", f"run={run}", *SCENES, *QUICK)
    assert set(found) == {f"{name}.scenes" for name in FEATURES.split(",")}
    for result in found.values():
        figure = result["figures"][result["main"]]
        assert math.isfinite(figure["value"]) and result["protocol"]
        assert result["data"]["test"] == "synthetic/val"
        assert result["subject"]["run"] == "small"
    assert len(list((run / "evals" / "subsets").glob("*.json"))) == 4
    assert found["linear_probe.scenes"]["details"]["chosen"][0]["held_out"] > 0
    assert found["copy_detection.scenes"]["figures"]["map_weak"]["value"] > 50
    assert "features of 240 images in" in capsys.readouterr().out
    again = run_evaluation("eval=knn", f"run={run}", *SCENES, *QUICK[:1])
    assert "from the cache" in capsys.readouterr().out
    assert again["knn.scenes"]["figures"] == found["knn.scenes"]["figures"]
    random = run_evaluation("eval=knn", f"run={run}", "random_init=true", *SCENES, *QUICK[:1])
    assert "knn.scenes.random_init" in random
    table = collect([run])
    assert set(table.rows) == {"small", "small, random initialisation"}
    for form in ("md", "csv", "html"):
        text = render(table, form)
        assert "random initialisation" in text and "scenes" in text and "k-NN of 120" in text


def test_unknown_names_and_keys_name_the_nearest(run):
    with pytest.raises(ConfigError, match=r"eval=linear does not exist; did you mean 'linear_"):
        expand(["eval=linear"])
    with pytest.raises(ConfigError, match=r"eval.knn.neigbours.*did you mean"):
        wrong = ["eval=knn", f"run={run}", "data=scenes", "eval.knn.neigbours=3"]
        compose("evaluate", expand(wrong))
    with pytest.raises(ConfigError, match=r"eval.knn.temperature='hot' must be a number"):
        wrong = ["eval=knn", f"run={run}", "data=scenes", "eval.knn.temperature=hot"]
        check_evaluation(compose("evaluate", expand(wrong)))
    with pytest.raises(ConfigError, match=r"say what to measure"):
        check_evaluation(compose("evaluate", [f"run={run}", "data=scenes"]))
    with pytest.raises(ConfigError, match=r"run=runs/NAME, or trunk=FILE"):
        check_evaluation(compose("evaluate", expand(["eval=knn", "data=scenes"])))
    assert {"knn", "linear_probe", "finetune"} <= set(evaluator_names())


def pictures(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Small pictures, one folder a class."""
    dice = np.random.default_rng(seed)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = dice.integers(0, 90, (20, 24, 3)) + 50 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder


def test_wrong_data_is_one_sentence(run, tmp_path):
    def refused(*arguments: str) -> str:
        with pytest.raises(ValueError) as error:
            run_evaluation(f"run={run}", f"out={tmp_path / 'evals'}", "image_size=32", *arguments)
        text = str(error.value)
        assert "\n" not in text
        return text

    flat = tmp_path / "flat"
    pictures(flat, {"x": 20})
    assert "no image has label" in refused("eval=knn", "data=folder", f"data.path={flat / 'x'}")
    pictures(tmp_path / "split" / "train", {"cat": 6, "dog": 6})
    pictures(tmp_path / "split" / "val", {"cat": 3, "fox": 3})
    said = refused("eval=knn", "data=class_folders", f"data.path={tmp_path / 'split'}")
    assert "class 1 is 'dog' in one and 'fox' in the other" in said
    few = pictures(tmp_path / "few", {"cat": 20, "dog": 4})
    said = refused(
        "eval=low_shot", "data=folder", f"data.path={few}",
        "eval.low_shot.images=['10 a class']", "eval.low_shot.main='10 a class'",
    )  # fmt: skip
    assert "the class dog has" in said and "10 a class are asked for" in said
    assert "has no trunk of step 7: there are none" in refused(
        "eval=knn", "step=7", "data=folder", f"data.path={few}"
    )


def test_one_class_only(run, tmp_path):
    folder = pictures(tmp_path / "p", {"cat": 12})
    (folder / "dog").mkdir()
    table = tmp_path / "p" / "t.csv"
    table.write_text("path,label\n" + "".join(f"cat/{i:02d}.png,cat\n" for i in range(12)))
    with pytest.raises(ValueError, match=r"images are of one class \(cat\)"):
        run_evaluation(
            "eval=knn", f"run={run}", f"out={tmp_path / 'e'}", "data=table", f"data.table={table}"
        )


def test_corrupt_images_are_counted_and_left_out(run, tmp_path):
    folder = pictures(tmp_path / "p", {"cat": 20, "dog": 20})
    (folder / "cat" / "00.png").write_bytes(b"no picture")
    found = run_evaluation(
        "eval=knn", f"run={run}", f"out={tmp_path / 'e'}", "data=folder", f"data.path={folder}",
        "image_size=32", "eval.knn.leave_one_out=true", "eval.knn.neighbours=[20]",
    )  # fmt: skip
    assert found["knn.p"]["data"]["unusable"] == {"train": 1}
    assert "of 39 images leave-one-out" in found["knn.p"]["protocol"]
    for path in (folder / "cat").glob("*"):
        path.write_bytes(b"")
    for path in (folder / "dog").glob("*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 40 images can be read"):
        run_evaluation(
            "eval=knn", f"run={run}", f"out={tmp_path / 'e'}", "data=folder", f"data.path={folder}",
            "image_size=32",
        )  # fmt: skip


def test_several_labels_an_image_in_a_table(run, tmp_path):
    folder = pictures(tmp_path / "p", {"cat": 20, "dog": 20})
    rows = [f"cat/{i:02d}.png,cat|pet" for i in range(20)]
    rows += [f"dog/{i:02d}.png,dog" for i in range(20)]
    (folder / "t.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    arguments = [
        f"run={run}", f"out={tmp_path / 'e'}", "data=table", f"data.table={folder / 't.csv'}",
        "data.separator='|'", "image_size=32",
    ]  # fmt: skip
    found = run_evaluation("eval=multilabel", "eval.multilabel.shots=[2]", *arguments)
    result = found["multilabel.t"]
    assert set(result["details"]["classes"]) == {"cat", "dog", "pet"}
    assert result["figures"]["map_svm"]["value"] > 95  # dark cats, bright dogs
    with pytest.raises(ValueError, match="use eval=multilabel"):
        run_evaluation("eval=knn", *arguments)


def test_results_are_json_without_a_machine_in_the_features(run):
    """Features of one trunk are found again whatever the file is called."""
    about = json.loads(next((run / "features").glob("*/about.json")).read_text())
    assert about["images"] in (240, 120, 20) and about["trunk"]
    assert torch.load  # nothing here is ever unpickled: the store is .npy without pickles
    for path in (run / "features").glob("*/*.npy"):
        np.load(path, allow_pickle=False)
