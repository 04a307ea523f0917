"""iBOT against its equations in float64, its masks, and Sinkhorn over masked patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight.data.block_masks import block_masks
from selfsight.methods.method import Now
from tests.methods.selfdistillation import (
    HEAD,
    NOW,
    a_batch,
    head_in_float64,
    ibot,
    loss_in_float64,
    regnet,
    trainable,
    vit,
)

ALL = {"mask_share": 1.0, "mask_ratio": (0.3, 0.6), "koleo_weight": 0.0}
OK, BAD = torch.tensor(True), torch.tensor(False)


def written_out(model, batch, tau=0.07):
    """Image loss and patch loss of the papers, one crop at a time, with a centred teacher."""
    masks = model.mask(batch).masks.view(*batch.views[0].shape[:2], -1)
    student, teacher, patch_losses = [], [], []
    name = model.patch_head
    for number, views in enumerate(batch.views):
        for crop, view in enumerate(views):
            pixels = model.normalize_pixels(view)
            seen = masks[crop] if number == 0 else None
            tokens = model.student_trunk.tokens(pixels, seen)
            student.append(head_in_float64(model.student_heads["image"], tokens[:, 0]))
            if seen is None:
                continue
            truth = model.trunk.tokens(pixels)
            teacher.append(head_in_float64(model.heads["image"], truth[:, 0]).detach())
            for image in range(view.shape[0]):
                places = seen[image].nonzero()[:, 0] + 1
                if not len(places):
                    patch_losses.append(torch.zeros((), dtype=torch.float64))
                    continue
                s = head_in_float64(model.student_heads[name], tokens[image, places])
                t = head_in_float64(model.heads[name], truth[image, places]).detach()
                p = ((t - model.patch_targets.centre.double()) / tau).softmax(1)
                patch_losses.append(-(p * F.log_softmax(s / 0.1, dim=1)).sum(1).mean())
    targets = [((t - model.targets.centre.double()) / tau).softmax(1) for t in teacher]
    return loss_in_float64(student, targets), torch.stack(patch_losses).mean()


@pytest.mark.parametrize("own_head", [False, True])
def test_loss_and_gradients_are_those_written_out(own_head):
    options = {"patch_head": lambda in_width: HEAD(in_width=in_width, prototypes=24)}
    model = ibot(
        **(options if own_head else {}),
        centring="centre",
        koleo_weight=0.0,
        patch_weight=0.7,
        mask_share=0.6,
        mask_ratio=(0.3, 0.6),
    )
    batch = a_batch(6)
    model.patch_targets.centre.uniform_(-0.1, 0.1)
    masks = model.mask(batch).masks
    assert masks.any() and not masks.any(1).all()
    image, patch = written_out(model, batch)
    want = torch.autograd.grad(image + 0.7 * patch, trainable(model))
    loss, metrics = model(batch, NOW)
    found = torch.autograd.grad(loss, trainable(model))
    assert metrics["image_loss"].item() == pytest.approx(image.item(), abs=1e-5)
    assert metrics["patch_loss"].item() == pytest.approx(patch.item(), abs=1e-5)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b.to(a.dtype), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_accumulation_is_the_whole_batch(centring):
    model, batch = ibot(centring=centring, **ALL), a_batch(12)
    model.train()
    whole, _ = model(batch, NOW)
    want = torch.autograd.grad(whole, trainable(model))
    model.after_step(NOW, OK)
    kept = model.patch_targets.centre.clone()
    model = ibot(centring=centring, **ALL)
    parts = batch.micro(3)
    plan = model.plan(parts, NOW)
    losses = [model(one, NOW, share)[0] for one, share in zip(parts, plan, strict=True)]
    mean = torch.stack(losses).mean()
    found = torch.autograd.grad(mean, trainable(model))
    assert abs(mean.item() - whole.item()) < 1e-5
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)
    model.after_step(NOW, OK)
    assert torch.allclose(model.patch_targets.centre, kept, atol=1e-6)
    assert kept.any() == (centring == "centre")


def test_sinkhorn_is_solved_over_the_masked_patches_of_all_crops():
    model, batch = ibot(centring="sinkhorn", **ALL), a_batch(8)
    images = model.normalize_pixels(batch.views[0])
    masked = model.mask(batch)
    taught = model.teach(batch, images, masked)
    q = torch.exp(taught.patches.double() / 0.07).T
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    model._sharpen(taught, NOW)
    assert torch.allclose(taught.patches.double(), (q * q.shape[1]).T, atol=1e-5)
    assert len(taught.patches) == masked.masks.sum()


def test_a_batch_without_masked_patches_gives_finite_gradients_of_zero():
    model, batch = ibot(**{**ALL, "mask_share": 0.0}), a_batch(4)
    loss, metrics = model(batch, NOW)
    loss.backward()
    assert metrics["patch_loss"] == 0 and metrics["patch_entropy"] == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable(model))
    model.after_step(NOW, OK)
    assert torch.isfinite(model.patch_targets.centre).all()


def test_the_patch_centre_is_the_mean_over_masked_patches_and_kept_from_bad_updates():
    model, batch = ibot(centring="centre", **ALL), a_batch(8)
    images = model.normalize_pixels(batch.views[0])
    mean = model.teach(batch, images, model.mask(batch)).patches.mean(0)
    model(batch, NOW)
    model.after_step(NOW, BAD)
    assert not model.patch_targets.centre.any()
    model(batch, NOW)
    model.after_step(NOW, OK)
    assert torch.allclose(model.patch_targets.centre, 0.1 * mean, atol=1e-6)


def test_masks_depend_on_seed_sample_and_crop_alone():
    options = {"seed": 3, "share": 0.5, "ratio": (0.1, 0.5)}
    whole = block_masks(range(100), 2, (14, 14), **options)
    assert whole.shape == (2, 100, 196) and whole.dtype == bool
    part = block_masks([70, 5], 2, (14, 14), **options)
    assert np.array_equal(part, whole[:, [70, 5]])
    other = block_masks(range(100), 2, (14, 14), **{**options, "seed": 4})
    assert not np.array_equal(other, whole)
    assert not np.array_equal(whole[0], whole[1])


def test_masks_cover_the_drawn_share_in_blocks():
    masks = block_masks(range(2000), 1, (14, 14), seed=0, share=0.5, ratio=(0.1, 0.5))[0]
    covered = masks.sum(1)
    assert 0.46 < (covered > 0).mean() < 0.54
    shares = covered[covered > 0] / 196
    assert shares.max() <= 0.5 and shares.min() > 0.05
    assert 0.28 < shares.mean() < 0.31  # the mean of 0.1 to 0.5, nearly always filled up
    grid = masks[covered > 0].reshape(-1, 14, 14)
    beside = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid.sum()
    assert beside > 0.6  # single patches drawn at random: 0.3


def test_masked_patches_are_not_seen_by_the_student():
    """Other pixels in masked patches: student and image loss stay, the teacher's targets move."""
    model, batch = ibot(centring="centre", **ALL), a_batch(4, ((2, 32),))
    masked = model.mask(batch)
    grid = masked.masks.view(2, 4, 1, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = a_batch(4, ((2, 32),))
    other.views[0] = torch.where(grid, 255 - batch.views[0], batch.views[0])
    tokens = [
        model.student_trunk.tokens(model.normalize_pixels(b.views[0]), masked.masks)
        for b in (batch, other)
    ]
    assert torch.equal(*tokens)
    assert not torch.equal(model(batch, NOW)[0], model(other, NOW)[0])


def test_learnt_state_follows_the_schedule_of_the_teacher():
    model, batch = ibot(), a_batch(4)
    model(batch, Now(0, 10))
    before = model.trunk.mask_token.clone()
    with torch.no_grad():
        model.student_trunk.mask_token.add_(1.0)
    model.after_step(Now(0, 10), OK)
    expected = 0.992 * before + 0.008 * model.student_trunk.mask_token
    assert torch.allclose(model.trunk.mask_token, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("trunk", "options", "said"),
    [
        (regnet, {}, "needs a ViT with a mask token"),
        (vit, {}, "model.trunk.mask_token=true"),
        (lambda: vit(mask_token=True), {"mask_ratio": (0.5, 0.1)}, "two increasing numbers"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(trunk, options, said):
    with pytest.raises(ValueError, match=said):
        ibot(trunk(), **options)
