"""Supervised training: its loss against torch's, what is frozen, what is averaged; a whole run."""

import json

import pytest
import torch
import torch.nn.functional as F

from selfsight.data.batch import Batch
from selfsight.losses.mixing import cutmix, mixup, soft_labels
from selfsight.methods.method import Now
from selfsight.methods.supervised import Supervised
from selfsight.trunks.regnet import RegNetY
from tests.evals.small import MODEL, export
from tests.runs import pictures, run_here

NOW = Now(0, 10)


def trunk() -> RegNetY:
    torch.manual_seed(0)
    return RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)


def batch(images: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (1, images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (images,), generator=generator)
    return Batch([views], torch.arange(images), labels)


def test_the_loss_is_cross_entropy_with_label_smoothing():
    method = Supervised(trunk=trunk(), classes=4, label_smoothing=0.1)
    method.eval()
    data = batch()
    loss, metrics = method(data, NOW)
    scores = method.classify(data.views[0][0])["feature"]
    expected = F.cross_entropy(scores, data.labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert metrics["batch_accuracy"] == (scores.argmax(1) == data.labels).float().mean()


def test_mixtures_keep_the_sum_of_labels_and_the_share_of_pixels():
    torch.manual_seed(0)
    images = torch.stack([torch.full((3, 20, 20), float(i)) for i in range(4)])
    targets = soft_labels(torch.arange(4), 4, 0.0)
    mixed, soft = mixup(images, targets, 0.8)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed[0].mean(), 3 * (1 - soft[0, 0]))
    for _ in range(5):
        mixed, soft = cutmix(images, targets, 1.0)
        torch.testing.assert_close(
            mixed[0].mean(), 3 * soft[0, 3]
        )  # image 0 is black, 3 its partner


def test_a_frozen_trunk_changes_in_nothing():
    method = Supervised(
        trunk=trunk(),
        classes=4,
        freeze=[r"^trunk\."],
        inputs=["c4", "c5_2x2", "feature"],
        batch_norm=True,
    )
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.train()
    loss, _ = method(batch(), NOW)
    loss.backward()
    trained = [p for p in method.parameters() if p.grad is not None]
    assert trained and all(p is not q for p in trained for q in method.trunk.parameters())
    for name, value in method.trunk.state_dict().items():
        assert torch.equal(value, before[f"trunk.{name}"]), name  # running statistics too
    assert set(method.classify(batch().views[0][0])) == {"c4", "c5_2x2", "feature"}
    partly = Supervised(trunk=trunk(), classes=4, freeze=[r"trunk\.stem"]).train()
    modes = {name: partly.trunk.get_submodule(name).training for name in ("stem", "trunk_output")}
    assert modes == {"stem": False, "trunk_output": True}


def test_the_average_follows_the_trained_weights():
    method = Supervised(trunk=trunk(), classes=4, average=0.9)
    assert method.trainable_trunk is not method.trunk
    with torch.no_grad():
        for parameter in method.trainable_trunk.parameters():
            parameter.add_(1.0)
    name, own = next(iter(method.trunk.named_parameters()))
    start, target = own.clone(), method.trainable_trunk.get_parameter(name)
    late = Now(10_000, None)
    method.after_step(late, torch.tensor(False))
    assert torch.equal(own, start)
    method.after_step(late, torch.tensor(True))
    torch.testing.assert_close(own, start + 0.1 * (target - start))


def test_wrong_arguments_are_sentences(tmp_path):
    run = export(tmp_path / "run")
    with pytest.raises(ValueError, match=r"does not fit this trunk: .* have another shape"):
        wide = RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=16)
        Supervised(trunk=wide, classes=4, weights=str(run / "trunk.safetensors"))
    with pytest.raises(ValueError, match="matches no parameter; their names are like trunk"):
        Supervised(trunk=trunk(), classes=4, freeze=["backbone"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        Supervised(trunk=trunk(), classes=4, freeze=["."])
    with pytest.raises(ValueError, match="has no vector 'c6'"):
        Supervised(trunk=trunk(), classes=4, inputs=["c6"])
    with pytest.raises(ValueError, match="has no checkpoint"):
        Supervised(trunk=trunk(), classes=4, head_checkpoint=str(run))


RUN = [
    "method=supervised", "optim=sgd", "schedule=constant", "data=scenes", "data.train.length=200",
    "data.eval_train=null", "data.eval_val=null", "data.eval_size=32", "batch_size=16",
    "epochs=null", "steps=6", "eval.every=3", "device=cpu", "cluster=local", "cluster.threads=1",
    "loader.workers=0",
    "tracking.wandb=off", "tracking.log_every=2", "checkpoint.every=100",
]  # fmt: skip


def test_a_run_chooses_on_val_and_reports_on_test(tmp_path, capsys):
    summary = run_here([*RUN, *MODEL, f"runs_dir={tmp_path}", "name=a"])
    run = tmp_path / "a"
    assert summary["status"] == "complete" and 0 <= summary["test_top1"] <= 100
    split = json.loads((run / "split.json").read_text())
    assert abs(len(split["val"]) - 20) <= 6 and not set(split["val"]) & set(split["test"])
    naming = json.loads((run / "labels.json").read_text())
    assert naming["label2id"][naming["id2label"]["3"]] == 3
    confusion = json.loads((run / "confusion.json").read_text())
    assert sum(map(sum, confusion["matrix"])) == len(split["test"])
    rows = (run / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + len(split["test"])
    result = json.loads((run / "evals" / "supervised.scenes.json").read_text())
    diagonal = sum(confusion["matrix"][n][n] for n in range(12))
    assert result["figures"]["top1"]["value"] == pytest.approx(100 * diagonal / len(split["test"]))
    assert "accuracy on test" in capsys.readouterr().err


def test_labels_that_are_missing_are_refused(tmp_path):
    pictures(tmp_path / "p", classes=1)
    rest = [a for a in RUN if not a.startswith(("data=", "data.train"))]
    place = f"data.path={tmp_path / 'p' / 'class0'}"
    with pytest.raises(ValueError, match="9 of 9 images have no label"):
        run_here([*rest, *MODEL, "data=folder", place, f"runs_dir={tmp_path}", "name=a"])
