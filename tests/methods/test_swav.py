import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from selfsight.data.batch import Batch
from selfsight.heads.projection import ProjectionHead
from selfsight.methods.method import Now
from selfsight.methods.swav import SwAV
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer

NOW = Now(step=0, steps=10)


def regnet():
    return RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)


def vit():
    return VisionTransformer(
        image_size=32, patch_size=8, width=32, depth=4, heads=2, mlp_ratio=2.0, drop_path=0.0
    )


def swav(trunk=None, **options: Any) -> SwAV:
    torch.manual_seed(0)
    trunk = trunk or regnet()
    head = ProjectionHead(widths=[trunk.width, 32, 16], batch_norm=False)
    options = {"prototypes": [24], **options}
    return SwAV(trunk=trunk, head=head, **options)


def a_batch(n=8, sizes=((2, 32), (3, 16)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [
        torch.randint(0, 256, (count, n, 3, s, s), generator=generator, dtype=torch.uint8)
        for count, s in sizes
    ]
    return Batch(views, torch.arange(n), torch.full((n,), -1))


def written_out(model: SwAV, batch: Batch, epsilon=0.05, iterations=3, temperature=0.1):
    """SwAV's loss as the paper writes it, in float64, one pair of crops at a time."""
    scores = []
    for views in batch.views:
        z = torch.stack([model.embed(views)[i] for i in range(len(views))])
        scores += list(z.double() @ model.prototypes[0].get_parameter("weight").double().T)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for a in range(2):
        q = torch.exp(scores[a].detach().T / epsilon)
        q = q / q.sum()
        for _ in range(iterations):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = (q * q.shape[1]).T
        for v, s in enumerate(scores):
            if v != a:
                total = total - (q * F.log_softmax(s / temperature, dim=1)).sum(1).mean()
                pairs += 1
    return total / pairs


def test_loss_and_gradients_are_those_written_out():
    model, batch = swav(), a_batch()
    expected = written_out(model, batch)
    want = torch.autograd.grad(expected, list(model.parameters()))
    loss, metrics = model(batch, NOW)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert abs(loss.item() - expected.item()) < 1e-5
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b.to(a.dtype), atol=1e-5, rtol=1e-3)
    assert metrics["prototype_counts"].sum() == 16  # two assign crops of eight images


def test_accumulation_solves_the_whole_batch():
    """Codes of micro-batches are those of the whole batch; with a trunk without BatchNorm, the
    mean of their losses and gradients too."""
    model, batch = swav(vit()), a_batch(12)
    model.train()
    whole, _ = model(batch, NOW)
    want = torch.autograd.grad(whole, list(model.parameters()))
    parts = batch.micro(3)
    plan = model.plan(parts, NOW)
    losses = [model(part, NOW, codes)[0] for part, codes in zip(parts, plan, strict=True)]
    mean = torch.stack(losses).mean()
    found = torch.autograd.grad(mean, list(model.parameters()))
    assert abs(mean.item() - whole.item()) < 1e-5
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)
    alone = torch.stack([model(part, NOW)[0] for part in parts]).mean()
    assert abs(alone.item() - whole.item()) > 1e-3  # what accumulation alone would have solved


def test_first_pass_leaves_running_statistics_alone():
    model, batch = swav(), a_batch(8)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.plan(batch.micro(2), NOW)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(batch, NOW)
    after = model.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in after.items() if "running_mean" in k)


def test_first_pass_draws_the_dropout_masks_of_the_second():
    trunk = VisionTransformer(
        image_size=32, patch_size=8, width=32, depth=4, heads=2, mlp_ratio=2.0, drop_path=0.5
    )
    model = swav(trunk)
    model.train()
    now = Now(0, 10, reseed=lambda index: torch.manual_seed(100 + index) and None)
    part = a_batch(8)
    planned = model.plan([part], now)
    now.reseed(0)
    features = model.embed(part.views[0])
    again = model.assign([p(features).detach() for p in model.prototypes], now)
    assert torch.equal(planned[0][0], again[0])


def test_several_heads_are_averaged():
    model, batch = swav(prototypes=[24, 40]), a_batch()
    loss, _ = model(batch, NOW)
    singles = []
    for index in range(2):
        single = swav(prototypes=[[24, 40][index]])
        single.load_state_dict(
            {
                k.replace(f"prototypes.{index}", "prototypes.0"): v
                for k, v in model.state_dict().items()
                if not k.startswith(f"prototypes.{1 - index}")
            }
        )
        singles.append(single(batch, NOW)[0].item())
    assert abs(loss.item() - sum(singles) / 2) < 1e-6


def test_frozen_prototypes_get_no_gradient():
    model, batch = swav(freeze_prototypes_steps=2), a_batch()
    for step, frozen in ((0, True), (1, True), (2, False)):
        model(batch, Now(step, 10))[0].backward()
        model.after_backward(Now(step, 10))
        assert (model.prototypes[0].weight.grad is None) == frozen
        model.zero_grad()


def test_queue_is_filled_newest_first_used_from_its_step_and_kept_from_bad_steps():
    model = swav(queue_length=16, queue_start_step=2)
    ok, bad = torch.tensor(True), torch.tensor(False)
    pushed = []
    for step in range(2):
        batch = a_batch(8, seed=step)
        with torch.no_grad():
            pushed.append(model.embed(batch.views[0]))
        model(batch, Now(step, 10))
        model.after_step(Now(step, 10), ok)
    assert torch.allclose(model.queue, torch.cat([pushed[1], pushed[0]], dim=1), atol=1e-6)
    kept = model.queue.clone()
    batch = a_batch(8, seed=2)
    model(batch, Now(2, 10))
    model.after_step(Now(2, 10), bad)
    assert torch.equal(model.queue, kept)
    assert not model._fresh

    features = model.embed(batch.views[0]).detach()
    own = [model.prototypes[0](features)]
    without = model.assign(own, Now(1, 10))[0]
    with_queue = model.assign(own, Now(2, 10))[0]
    joined = torch.cat([own[0], model.prototypes[0](kept)], dim=1)
    expected = swav().assign([joined], Now(0, 10))[0][:, :8]
    assert torch.allclose(with_queue, expected, atol=1e-6)
    assert not torch.allclose(with_queue, without, atol=1e-3)
    assert "queue" in model.state_dict()


def test_a_head_for_another_trunk_is_refused():
    head = ProjectionHead(widths=[77, 16])
    with pytest.raises(ValueError, match="begin with"):
        SwAV(trunk=regnet(), head=head)


@pytest.mark.parametrize(
    ("figures", "state"),
    [
        (
            {"loss": math.log(24) * 0.999, "assignment_entropy": math.log(24) * 0.999},
            "uniform collapse",
        ),
        ({"feature_spread": 0.001}, "one-point collapse"),
        ({"loss": math.log(24), "assignment_entropy": 1.0}, "not learning"),
        ({"prototypes_used": 0.05}, "dead prototypes"),
        ({}, "healthy"),
    ],
)
def test_states_are_named(figures, state):
    healthy = {
        "loss": 2.0, "assignment_entropy": 1.0, "feature_spread": 0.8, "prototypes_used": 0.9,
    }  # fmt: skip
    verdict = swav().diagnose({**healthy, **figures}, NOW)
    assert verdict.state == state
    assert state == "healthy" or verdict.remedy


def test_uniform_assignments_are_measured_as_ln_k():
    model = swav()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        list(model.head.parameters())[-1].fill_(1.0)  # every feature the same
    loss, metrics = model(a_batch(), NOW)
    assert math.isclose(metrics["assignment_entropy"].item(), math.log(24), rel_tol=1e-3)
    assert metrics["feature_spread"] < 1e-3
    figures = model.figures(
        {"loss": loss.item(), **{k: v.item() for k, v in metrics.items() if v.dim() == 0}},
        {"prototype_counts": metrics["prototype_counts"]},
    )
    assert figures["prototypes_used"] == pytest.approx(1 / 24)
    assert model.diagnose(figures, NOW).state == "one-point collapse"


def test_seer_sizes_on_meta():
    with torch.device("meta"):
        model = SwAV(
            trunk=RegNetY(depth=27, w_0=640, w_a=230.83, w_m=2.53, group_width=373),
            head=ProjectionHead(widths=[10444, 8192, 8192, 256], batch_norm=False),
            prototypes=[16000],
        )
    assert sum(p.numel() for p in model.parameters()) == 1_431_032_042
    assert SimpleNamespace(**dict(model.named_buffers())).queue.shape == (2, 0, 256)


def test_pixels_are_normalised_in_channels_last_memory():
    model = swav()
    model.set_pixels([0.5, 0.25, 0.125], [0.5, 1.0, 2.0])
    images = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    found = model.normalize_pixels(images)
    mean = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    std = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    expected = (images.flatten(0, 1).double() / 255 - mean) / std
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(model, nn.Module)
