"""The evaluation job from configuration to results, on a small run and embedded pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from selfsight.build import compose
from selfsight.cluster import slurm
from selfsight.cluster.local import launch
from selfsight.cluster.plan import plan
from selfsight.config import ConfigError
from selfsight.evals.job import evaluate
from selfsight.evals.plans import plan_jobs
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
    few = pictures(tmp_path / "few", {"cat": 40, "dog": 15})
    said = refused(
        "eval=low_shot", "data=folder", f"data.path={few}",
        "eval.low_shot.images=['20 a class']", "eval.low_shot.main='20 a class'",
    )  # fmt: skip
    assert "the class dog has" in said and "20 a class are asked for" in said
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


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, tmp_path):
    """Each extracts its shards; one of them writes."""
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes) / "evals"
        arguments = ["eval=knn", f"run={run}", f"out={out}", *SCENES, "data.eval_train.length=600"]
        arguments += ["device=cpu", "cluster=local", f"cluster.processes={processes}"]
        arguments += ["cluster.threads=1", f"features.folder={out.parent / 'features'}"]
        config = check_evaluation(compose("evaluate", expand(arguments)))
        ((_, ((own, name),)),) = plan_jobs(config)
        try:
            assert launch(own, name, evaluate)["status"] == "complete"
        finally:
            torch.use_deterministic_algorithms(False)
        found.append(json.loads((out / "knn.scenes.json").read_text())["figures"])
    assert found[0] == found[1]


def test_an_evaluation_can_be_a_job_of_a_cluster(run):
    config = check_evaluation(
        compose("evaluate", expand(["eval=knn", f"run={run}", "data=scenes", "cluster=slurm"]))
    )
    ((function, ((own, name),)),) = plan_jobs(config)
    assert function.endswith("job.evaluate") and name.startswith("knn-")
    assert plan(own).processes == 1
    content = slurm._content(own)
    assert Path(content["runs_dir"]).is_absolute() and content["out"] == own.out
    assert check_evaluation(OmegaConf.create(content)).eval.knn.main == 20


def test_fine_tuning_is_planned_as_runs_of_the_loop(run, tmp_path):
    arguments = ["eval=low_shot_finetune", f"run={run}", f"out={tmp_path}", *SCENES]
    arguments += ["eval.low_shot_finetune.set=['epochs=2','batch_size=16']", "cluster=local"]
    config = check_evaluation(compose("evaluate", expand(arguments)))
    ((function, runs),) = plan_jobs(config)
    assert function == "selfsight.train.pretrain" and len(runs) == 3
    for own, _ in runs:
        assert own.method.weights == str(run / "trunk.safetensors") and own.epochs == 2
        assert own.data.train.file.endswith(".json") and own.optim.trunk_lr_factor == 0.05
    one = json.loads(Path(runs[0][0].data.train.file).read_text())
    assert one["images"] >= 24 and len(set(one["keys"])) == one["images"]
