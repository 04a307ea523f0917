"""DINO against its equations in float64, and what the loop relies on."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.ops import StochasticDepth

from selfsight.heads.dino_head import DinoHead
from selfsight.methods.dino import DINO
from selfsight.methods.method import Now
from selfsight.optim.groups import parameter_groups
from selfsight.trunks.vit import VisionTransformer
from tests.methods.selfdistillation import (
    HEAD,
    NOW,
    a_batch,
    dino,
    loss_in_float64,
    regnet,
    scores_in_float64,
    trainable,
    vit,
)

LEARNT = partial(HEAD, frozen_norm=False)
ONE = partial(HEAD, prototypes=1)
OK, BAD = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("sizes", [((2, 32), (3, 16)), ((2, 32),), ((3, 32), (1, 24), (2, 16))])
def test_loss_and_gradients_are_those_written_out(sizes):
    model, batch = dino(), a_batch(sizes=sizes)
    generator = torch.Generator().manual_seed(3)
    model.targets.centre.copy_(0.1 * torch.randn(40, generator=generator))
    student, teacher = scores_in_float64(model, batch)
    centre = model.targets.centre.double()
    expected = loss_in_float64(student, [((t - centre) / 0.04).softmax(1) for t in teacher])
    want = torch.autograd.grad(expected, trainable(model))
    loss, metrics = model(batch, NOW)
    found = torch.autograd.grad(loss, trainable(model))
    assert abs(loss.item() - expected.item()) < 1e-5
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b.to(a.dtype), atol=1e-5, rtol=1e-3)
    p = torch.stack([((t - centre) / 0.04).softmax(1) for t in teacher])
    entropy = -(p * p.log()).sum(-1).mean()
    assert metrics["teacher_entropy"].item() == pytest.approx(entropy.item(), abs=1e-4)
    assert metrics["kl"].item() == pytest.approx((expected - entropy).item(), abs=1e-4)


def test_a_trunk_with_batchnorm_trains_and_its_teacher_keeps_its_own_statistics():
    model, batch = dino(regnet()), a_batch()
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    loss, _ = model(batch, NOW)
    loss.backward()
    assert torch.isfinite(loss)
    key = next(k for k in weights if k.startswith("trunk.") and k.endswith("running_mean"))
    seen = model.state_dict()[key].clone()
    assert not torch.equal(seen, weights[key])  # of the teacher's own batches
    model.after_step(NOW, OK)
    assert torch.equal(model.state_dict()[key], seen)  # which the average leaves alone
    model.after_step(NOW, OK)


def test_the_centre_moves_after_it_was_used_by_the_mean_of_the_whole_batch():
    model, batch = dino(centre_momentum=0.8), a_batch(6)
    _, teacher = scores_in_float64(model, batch)
    mean = torch.cat(teacher).mean(0)
    for micro in batch.micro(3):
        model(micro, NOW)
        assert not model.targets.centre.any()
    model.after_step(NOW, BAD)
    assert not model.targets.centre.any()
    model(batch, NOW)
    model.after_step(NOW, OK)
    assert torch.allclose(model.targets.centre.double(), 0.2 * mean, atol=1e-6)
    second = dino(centre_momentum=0.8)
    for micro in batch.micro(3):
        second(micro, NOW)
    second.after_step(NOW, OK)
    assert torch.allclose(second.targets.centre, model.targets.centre, atol=1e-6)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_accumulation_is_the_whole_batch(centring):
    model, batch = dino(centring=centring), a_batch(12)
    model.train()
    whole, _ = model(batch, NOW)
    want = torch.autograd.grad(whole, trainable(model))
    parts = batch.micro(3)
    plan = model.plan(parts, NOW)
    losses = [model(one, NOW, share)[0] for one, share in zip(parts, plan, strict=True)]
    mean = torch.stack(losses).mean()
    found = torch.autograd.grad(mean, trainable(model))
    assert abs(mean.item() - whole.item()) < 1e-5
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)
    alone = torch.stack([model(one, NOW)[0] for one in parts]).mean()
    assert (abs(alone.item() - whole.item()) > 1e-3) == (centring == "sinkhorn")


def test_a_sinkhorn_teacher_uses_all_prototypes_over_both_crops():
    model, batch = dino(centring="sinkhorn", sinkhorn_iterations=200), a_batch(64, ((2, 32),))
    scores, _ = model.teach(model.normalize_pixels(batch.views[0]))
    _, teacher = scores_in_float64(model, batch)
    q = torch.exp(torch.cat(teacher) / 0.04).T
    for _ in range(200):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    targets = model.targets(scores.unflatten(0, (2, 64)), 0.04)
    assert torch.allclose(targets.flatten(0, 1).double(), (q * q.shape[1]).T, atol=1e-4)
    assert torch.allclose(targets.sum((0, 1)), torch.full((40,), 128 / 40), rtol=1e-3)


def test_the_teacher_is_the_average_and_stands_still_where_an_update_is_left_out():
    model = dino(teacher_momentum=0.9)
    before = {k: v.clone() for k, v in model.trunk.state_dict().items()}
    model.after_step(Now(0, 10), BAD)
    assert all(torch.equal(v, before[k]) for k, v in model.trunk.state_dict().items())
    for step in (0, 5):
        m = 1 + 0.5 * (0.9 - 1) * (1 + math.cos(math.pi * step / 10))  # DINO's cosine_scheduler
        before = {k: v.clone() for k, v in model.trunk.state_dict().items()}
        model.after_step(Now(step, 10), OK)
        student = model.student_trunk.state_dict()
        for name, value in model.trunk.state_dict().items():
            expected = m * before[name].double() + (1 - m) * student[name].double()
            assert torch.allclose(value.double(), expected, atol=1e-6)
    assert model.momentum(Now(3, None)) == 0.9  # a run without end


def test_the_temperature_rises_in_a_line():
    model = dino(
        teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup_steps=9
    )
    expected = np.append(np.linspace(0.04, 0.07, 10), [0.07] * 5)
    found = [model.temperature(Now(step, 15)) for step in range(15)]
    assert np.allclose(found, expected)


def test_only_the_student_is_trained():
    model = dino(vit(drop_path=0.2, mask_token=True))
    named = list(model.named_parameters())
    groups = parameter_groups(named, weight_decay=0.04, exclude_bias_and_norm=True)
    names = {name for group in groups for name in group["names"]}
    assert names and all(name.startswith("student_") for name in names)
    assert "student_trunk.mask_token" not in names  # nothing is masked
    assert not any("weight_g" in name for name in names)
    learnt = dino(head=LEARNT)
    assert learnt.student_heads["image"].last_layer.weight_g.requires_grad
    chances = {
        side: [m.p for m in trunk.modules() if isinstance(m, StochasticDepth)]
        for side, trunk in (("teacher", model.trunk), ("student", model.student_trunk))
    }
    assert not any(chances["teacher"]) and max(chances["student"]) == 0.2
    assert model.trainable_trunk is model.student_trunk
    assert len(model.units()) == len(model.compile_units()) == 8
    model(a_batch(), NOW)[0].backward()
    assert all(p.grad is None for p in [*model.trunk.parameters(), *model.heads.parameters()])


def test_the_last_layer_is_frozen_at_first():
    model, batch = dino(freeze_last_layer_steps=2), a_batch()
    last = model.student_heads["image"].last_layer
    for step, frozen in ((0, True), (1, True), (2, False)):
        model(batch, Now(step, 10))[0].backward()
        model.after_backward(Now(step, 10))
        assert (last.weight_v.grad is None) == frozen
        model.zero_grad()


def test_all_that_a_resume_needs_is_there_from_the_start():
    model, batch = dino(), a_batch()
    names = list(model.state_dict())
    model(batch, NOW)
    model.after_step(NOW, OK)
    assert list(model.state_dict()) == names
    assert {"targets.centre", "trunk.cls_token", "student_trunk.cls_token"} <= set(names)
    assert not model.targets._sums


def test_koleo_is_added_for_each_global_crop():
    plain, model, batch = dino(), dino(koleo_weight=0.3), a_batch()
    loss, metrics = model(batch, NOW)
    expected = plain(batch, NOW)[0].double()
    for view in batch.views[0]:
        z = model.student_trunk(model.normalize_pixels(view)).double()
        z = z / z.norm(dim=1, keepdim=True)
        distance = torch.cdist(z, z).fill_diagonal_(torch.inf).amin(1)
        expected = expected - 0.3 * distance.log().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    rest = plain(batch, NOW)[0].item()
    assert metrics["koleo"].item() * 2 * 0.3 + rest == pytest.approx(loss.item(), abs=1e-5)


def test_teacher_and_student_see_each_crop_once():
    model, batch = dino(), a_batch(4, ((2, 32), (3, 16)))
    counts = {"trunk": 0, "student_trunk": 0}
    for name in counts:
        embed = getattr(model, name).patch_embed

        def count(module, inputs, name=name):
            counts[name] += len(inputs[0])

        embed.register_forward_pre_hook(count)
    model(batch, NOW)
    assert counts == {"trunk": 8, "student_trunk": 20}


HEALTHY = {
    "teacher_entropy": 2.0, "kl": 1.0, "mean_target_entropy": 3.3, "prototypes_used": 27.0,
    "feature_rank": 12.0, "feature_spread": 0.6, "loss": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "state", "remedy"),
    [
        ({}, "healthy", ""),
        ({"teacher_entropy": math.log(40) * 0.999, "kl": 0.001}, "uniform collapse", "temperature"),
        ({"teacher_entropy": 0.01, "kl": 0.0, "mean_target_entropy": 0.02}, "one-point", "centr"),
        ({"feature_spread": 0.001}, "one-point", "base_lr"),
    ],
)
def test_states_are_named(figures, state, remedy):
    verdict = dino().diagnose({**HEALTHY, **figures}, NOW)
    assert verdict.state.startswith(state)
    assert remedy in verdict.remedy


def test_targets_that_are_all_alike_are_counted_as_one_prototype():
    figures = dino().figures({"loss": 1.0}, {"target_mass": torch.tensor([0.0, 9.0, 0.0])})
    assert figures["prototypes_used"] == pytest.approx(1.0)
    even = dino().figures({"loss": 1.0}, {"target_mass": torch.full((40,), 3.0)})
    assert even["mean_target_entropy"] == pytest.approx(math.log(40))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"centring": "mean"}, "method.centring=mean is not one of centre, sinkhorn, none"),
        ({"teacher_momentum": 1.2}, "method.teacher_momentum=1.2 must be"),
        ({"teacher_temperature": 0.0}, "temperatures under method must be above 0"),
        ({"centring": "sinkhorn", "head": LEARNT}, "method.head.frozen_norm=true"),
        ({"head": ONE}, "method.head.prototypes"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        dino(**options)


def test_koleo_of_one_image_is_refused():
    with pytest.raises(ValueError, match=r"method\.koleo_weight=0"):
        dino(koleo_weight=0.1)(a_batch(1), NOW)


def test_the_recipe_sizes_on_meta():
    """ViT-S/16 with the released head: 21.7M and 22.5M parameters, twice."""
    with torch.device("meta"):
        trunk = VisionTransformer(width=384, depth=12, heads=6)
        model = DINO(trunk=trunk, head=DinoHead)
    head = 384 * 2048 + 2048 + 2048**2 + 2048 + 2048 * 256 + 256 + 65536 * 256 + 65536
    assert sum(p.numel() for p in model.parameters()) == 2 * (21_665_664 + head)
