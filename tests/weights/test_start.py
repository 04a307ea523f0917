"""Runs that start from weights: what is loaded and said, the frozen trunk, and the guard."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from selfsight.distributed.preempt import Answer
from selfsight.evals.online import OnlineEvaluation
from selfsight.heads.projection import ProjectionHead
from selfsight.methods.swav import SwAV
from selfsight.sections import TrunkStart
from selfsight.trunks.resnet import ResNet
from selfsight.weights.files import WeightsError
from selfsight.weights.heads import load_heads
from selfsight.weights.start import Start
from tests.runs import arguments, pictures, run_here
from tests.weights import published

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def swav(hidden: int = 32) -> SwAV:
    trunk = ResNet(block="basic", depths=[1, 1, 1, 1])
    return SwAV(trunk=trunk, head=ProjectionHead(widths=[512, hidden, 8]), prototypes=[30])


def file_of(trunk: nn.Module, folder: Path) -> str:
    torch.save(published.swav_file(trunk.state_dict(), 512), folder / "swav.pth")
    return str(folder / "swav.pth")


def begin(method: SwAV, **settings: Any) -> tuple[Start, list[str]]:
    said: list[str] = []
    pixels = settings.pop("pixels", IMAGENET)
    return Start(method, TrunkStart(**settings), pixels, said.append), said


def answer(step: int, loss: float, bad: bool = False) -> Answer:
    return Answer(step, bad, bad, loss, None, False, None)


def test_trunk_and_heads_of_a_swav_file(tmp_path):
    torch.manual_seed(0)
    source, method = swav(), swav()
    path = file_of(source.trunk, tmp_path)
    start, said = begin(method, init=path)
    for name, value in method.trunk.state_dict().items():
        assert torch.equal(value, source.trunk.state_dict()[name])
    content = torch.load(path)
    head = method.head.state_dict()["projection_head.0.weight"]
    assert torch.equal(head, content["module.projection_head.0.weight"])
    given = nn.functional.normalize(content["module.prototypes.weight"])
    torch.testing.assert_close(method.prototypes[0].get_parameter("weight").detach(), given)
    assert not start.frozen and "2 of 2 heads loaded" in "\n".join(said)
    assert "60 of 60 tensors of the trunk loaded (SwAV ResNet)" in said[0]


def test_a_head_that_differs_is_said_and_warmed_up(tmp_path):
    method = swav(hidden=48)
    start, said = begin(method, init=file_of(swav().trunk, tmp_path), warmup_window=2)
    text = "\n".join(said)
    assert "1 of 2 heads loaded (head differs: projection_head.0.weight is (32, 512) in" in text
    assert "head warm-up" in text and start.frozen
    other, said = begin(swav(), init=file_of(swav().trunk, tmp_path), head_warmup=False)
    assert not other.frozen
    pixels = ([0.5] * 3, [0.5] * 3)
    _, said = begin(swav(), init=file_of(swav().trunk, tmp_path), heads=False, pixels=pixels)
    assert any("expect pixels.mean=[0.485,0.456,0.406]" in line for line in said)


def test_dino_heads_go_to_their_side():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 16)
            )
            self.last_layer = nn.Module()
            self.last_layer.weight_g = nn.Parameter(torch.zeros(50, 1))
            self.last_layer.weight_v = nn.Parameter(torch.zeros(50, 16))

    method = nn.Module()
    method.student_heads = nn.ModuleDict({"image": Head()})
    method.heads = nn.ModuleDict({"image": Head(), "patch": Head()})
    sides = {side: published.dino_head(64) for side in ("teacher.head", "student.head")}
    others = {f"{side}.{n}": t for side, head in sides.items() for n, t in head.items()}
    report = load_heads(method, others)
    assert (report.loaded, report.of) == (2, 3)
    assert report.notes == ("heads.patch has none in the file",)
    for side, path in (("teacher.head", "heads"), ("student.head", "student_heads")):
        got = method.get_submodule(f"{path}.image").state_dict()["last_layer.weight_v"]
        assert torch.equal(got, sides[side]["last_layer.weight_v"])


def test_the_trunk_is_let_go_when_the_head_has_settled(tmp_path):
    method = swav(hidden=48).train()
    start, said = begin(method, init=file_of(swav().trunk, tmp_path), warmup_window=3)
    start.hold()
    assert not method.trunk.training and method.head.training
    before = {k: v.clone() for k, v in method.trunk.state_dict().items()}
    method.head(method.trunk(torch.randn(4, 3, 32, 32))).sum().backward()
    start.drop_gradients()
    assert all(p.grad is None for p in method.trunk.parameters())
    assert all(p.grad is not None for p in method.head.parameters())
    assert all(torch.equal(v, before[k]) for k, v in method.trunk.state_dict().items())
    losses = [5.0, 4.0, 3.0, 2.0, 1.9, 1.8, 1.85, 1.9, 1.95]
    for step, loss in enumerate(losses[:-1]):
        start.observe(answer(step, loss))
        start.observe(answer(step, float("nan"), bad=True))
        assert start.frozen
    kept, (again, _) = start.state_dict(), begin(swav())
    again.settings = start.settings
    again.load_state_dict(json.loads(json.dumps(kept)))
    for one in (start, again):
        one.observe(answer(8, losses[-1]))
        assert not one.frozen and one.left_at == 8
    assert method.trunk.training and said[-1].startswith("step 8: the head has settled")


def test_the_longest_warm_up_ends_it(tmp_path):
    start, said = begin(
        swav(48), init=file_of(swav().trunk, tmp_path), warmup_window=2, warmup_steps=5
    )
    for step in range(5):
        assert start.frozen
        start.observe(answer(step, 10.0 / (step + 1)))
    assert not start.frozen and "the longest head warm-up is over" in said[-1]


def test_the_guard_ends_a_run_whose_quality_falls(tmp_path):
    start, said = begin(swav(), init=file_of(swav().trunk, tmp_path), guard=0.1)
    assert not start.judge({"knn_top1": 60.0}, 0).stops
    assert not start.judge({"knn_top1": 54.1}, 10).stops
    decision = start.judge({"knn_top1": 53.9}, 20)
    assert decision.stops and decision.state == "quality fell"
    assert "k-NN fell from 60.0 %" in decision.text and "53.9 % after step 20" in decision.text
    start, said = begin(swav(), init=file_of(swav().trunk, tmp_path))
    assert not start.judge({"rank": 3.0}, 0).stops and "no labels" in said[-1]
    start, _ = begin(swav())
    assert not start.judge({"knn_top1": 60.0}, 0).stops
    assert not start.judge({"knn_top1": 0.0}, 9).stops and start.small == {}


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(WeightsError, match=r"trunk\.init: there is no file of weights"):
        begin(swav(), init=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="head_warmup=maybe"):
        begin(swav(), head_warmup="maybe")
    torch.save({"layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "part")
    with pytest.raises(WeightsError, match=r"trunk\.init"):
        begin(swav(), init=str(tmp_path / "part"))


def test_a_run_starts_from_another_runs_trunk_and_goes_on(tmp_path):
    """Its k-NN at the start is that of the other at its end; its head is new, so that the trunk is
    frozen for the first updates; then it is trained, in a run that was continued too."""
    data, runs = pictures(tmp_path / "data"), tmp_path / "runs"
    first = run_here(arguments(data, runs, "first", "steps=2"))
    more = [f"trunk.init={runs / 'first'}", "trunk.warmup_steps=4", "trunk.guard=null"]
    second = run_here(arguments(data, runs, "second", "steps=3", *more))
    assert second["status"] == "complete" and "knn_top1_random_init" not in second
    assert second["knn_top1_start"] == second["knn_top1"] == pytest.approx(first["knn_top1"])
    before, frozen = (load_file(runs / n / "trunk.safetensors") for n in ("first", "second"))
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())
    third = run_here(arguments(data, runs, "second", "steps=8", *more))
    assert third["status"] == "complete" and third["step"] == 8
    after = load_file(runs / "second" / "trunk.safetensors")
    assert not torch.equal(after["stem.0.weight"], before["stem.0.weight"])


def test_a_run_whose_quality_falls_ends_with_its_verdict(tmp_path, monkeypatch):
    data, runs = pictures(tmp_path / "data"), tmp_path / "runs"
    run_here(arguments(data, runs, "first", "steps=2"))
    figures = iter([90.0, 89.0, 50.0, 90.0])
    monkeypatch.setattr(
        OnlineEvaluation, "run", lambda *_, **__: {"knn_top1": next(figures), "rank": 3.0}
    )
    more = [f"trunk.init={runs / 'first'}", "eval.every=2", "trunk.head_warmup=false"]
    ended = run_here(arguments(data, runs, "second", *more))
    assert ended["status"] == "failed" and ended["verdict"] == "quality fell"
    assert ended["step"] == 4 and "k-NN fell from 90.0 %" in ended["verdict_text"]
