"""Attention, masks, components and neighbours against independent forms."""

import numpy as np
import pytest
import torch

from selfsight.pictures.attention import attends, class_attention, mass_mask, patch_features
from selfsight.pictures.colours import heat, sprite, stretched
from selfsight.pictures.components import as_colours, principal
from selfsight.pictures.neighbours import nearest
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return VisionTransformer(width=32, depth=4, heads=2, image_size=32, patch_size=8).eval()


def test_attention_is_that_of_the_last_block(vit):
    """From the inputs of the last block's qkv, by hand, for a size with interpolated positions."""
    images = torch.randn(2, 3, 40, 24)
    caught = []
    hook = vit.blocks[-1].attn.qkv.register_forward_hook(lambda *a: caught.append(a[2]))
    with torch.no_grad():
        vit(images)
    hook.remove()
    qkv = caught[0].double().reshape(2, -1, 3, 2, 16)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    whole = (q @ k.transpose(-2, -1) / 4).softmax(-1)[:, :, 0, 1:].reshape(2, 2, 5, 3)
    found = class_attention(vit, images)
    torch.testing.assert_close(found.double(), whole, atol=1e-6, rtol=1e-5)


def test_a_mask_is_the_fewest_patches_with_the_mass():
    torch.manual_seed(1)
    maps = torch.rand(3, 4, 5) ** 4
    masks = mass_mask(maps, 0.6)
    for values, mask in zip(maps.flatten(1), masks.flatten(1), strict=True):
        share = values[mask].sum() / values.sum()
        assert share >= 0.6
        assert (values[mask].sum() - values[mask].min()) / values.sum() < 0.6
        assert values[mask].min() >= values[~mask].max()
    assert not mass_mask(torch.zeros(1, 2, 2)).any()


def test_patch_features_are_places_of_the_image(vit):
    images = torch.randn(1, 3, 32, 16)
    found = patch_features(vit, images)
    assert found.shape == (1, 4, 2, 32)
    torch.testing.assert_close(found[0, 1, 1], vit.tokens(images)[0, 1 + 1 * 2 + 1])
    regnet = RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8).eval()
    assert attends(vit) and not attends(regnet)
    assert patch_features(regnet, images).shape[:3] == (1, 1, 1)


@pytest.mark.parametrize("shape", [(50, 6), (6, 50)])
def test_components_are_those_of_an_svd(shape):
    features = np.random.default_rng(0).normal(size=shape) @ np.diag(np.linspace(3, 1, shape[1]))
    left, singular, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    found = principal(torch.from_numpy(features), 3).numpy()
    expected = (left * singular)[:, :3]
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=1e-6)
    assert (found[np.abs(found).argmax(0), range(3)] > 0).all()


def test_equal_places_of_two_images_have_one_colour():
    torch.manual_seed(2)
    kinds = torch.randn(4, 16)
    one, two = torch.randint(4, (5, 6)), torch.randint(4, (3, 4))
    first, second = as_colours([kinds[one], kinds[two]])
    assert first.shape == (5, 6, 3) and second.shape == (3, 4, 3)
    for kind in range(4):
        same = torch.cat([first[one == kind], second[two == kind]])
        torch.testing.assert_close(same, same[:1].expand_as(same))


def test_few_components_leave_the_rest_black():
    assert principal(torch.randn(2, 5), 3)[:, 2].eq(0).all()


def test_neighbours_are_the_nearest_and_not_oneself():
    torch.manual_seed(3)
    bank = torch.randn(20, 7)
    own = torch.tensor([3, 11])
    cosines, indices = nearest(bank[own], bank, 4, own)
    unit = (bank / bank.norm(dim=1, keepdim=True)).double()
    for row, place in enumerate(own.tolist()):
        similar = unit @ unit[place]
        similar[place] = -2
        assert indices[row].tolist() == similar.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(cosines[row].double(), similar[indices[row]])
    assert nearest(bank[:1], bank[:3], 9, torch.tensor([0]))[1].shape == (1, 2)


def test_heat_grows_lighter():
    light = heat(np.linspace(0, 1, 30)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    assert stretched(np.full(3, 2.0)).tolist() == [0, 0, 0]


def test_a_sprite_holds_every_image_in_its_cell():
    from PIL import Image

    images = [Image.new("RGB", (8, 8), (n * 20, 0, 0)) for n in range(7)]
    sheet, columns, rows = sprite(images, 8)
    assert (columns, rows) == (3, 3)
    assert [sheet.getpixel((n % 3 * 8 + 4, n // 3 * 8 + 4))[0] for n in range(7)] == [  # type: ignore[index]
        n * 20 for n in range(7)
    ]
