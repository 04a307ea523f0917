"""VisionTransformer against timm's models with the same weights, and its contract."""

import inspect
import math
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from selfsight.trunks.geometry import vit_parameters
from selfsight.trunks.vit import VisionTransformer

MODELS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("vit_*.yaml"))
OTHERS = {"vit_huge": "vit_huge_patch14_224", "vit_giant": "vit_giant_patch14_dinov2"}
SMALL: dict[str, Any] = {"width": 48, "depth": 8, "heads": 3, "image_size": 64, "patch_size": 8}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}


def pair(name) -> tuple[Any, VisionTransformer]:
    """timm's model and ours with the same weights, all of them away from their initial values."""
    torch.manual_seed(0)
    ours = VisionTransformer(**SIZES[name]).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.03, 0.03))
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{name}_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs, ours


def dino_positions(pos_embed, grid, rows, columns):
    """Position table of DINO's published code: bicubic, scale enlarged by 0.1 / grid."""
    table = pos_embed[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    table = F.interpolate(table, scale_factor=scale, mode="bicubic")
    assert table.shape[2:] == (rows, columns)
    return torch.cat((pos_embed[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def keys_cubic(x):
    """The kernel of bicubic interpolation (Keys 1981) with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("name", SIZES)
def test_equals_timm_at_the_trained_size(name):
    theirs, ours = pair(name)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (240, 240)])
def test_equals_timm_at_other_sizes_with_dinos_positions(size):
    theirs, ours = pair("tiny")
    rows, columns = (length // 16 for length in size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        # timm samples other points, so its blocks are run on positions computed here.
        x = theirs.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat((theirs.cls_token.expand(2, -1, -1), x), dim=1)
        x = x + dino_positions(theirs.pos_embed, 14, rows, columns)
        expected = theirs.norm(theirs.blocks(x))[:, 0]
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (4, 11), (20, 9)])
def test_positions_are_bicubic_sums_of_the_table(rows, columns):
    trunk = VisionTransformer(**SMALL)
    grid = trunk.grid
    positions = trunk._positions(rows, columns)
    table = trunk.pos_embed[0, 1:].double().reshape(grid, grid, -1)

    def weights(size):
        out = torch.zeros(size, grid, dtype=torch.float64)
        for i in range(size):
            source = (i + 0.5) * grid / (size + 0.1) - 0.5
            for j in range(math.floor(source) - 1, math.floor(source) + 3):
                out[i, min(max(j, 0), grid - 1)] += keys_cubic(source - j)
        return out

    expected = torch.einsum("ri,cj,ijd->rcd", weights(rows), weights(columns), table)
    torch.testing.assert_close(
        positions[0, 1:].double(), expected.reshape(rows * columns, -1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        positions, dino_positions(trunk.pos_embed, grid, rows, columns), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(positions[:, 0], trunk.pos_embed[:, 0])


def test_gradients_reach_every_parameter_at_every_size():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SMALL)
    for size in ((64, 64), (40, 24)):
        trunk.zero_grad()
        trunk(torch.randn(2, 3, *size)).square().sum().backward()
        for name, parameter in trunk.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_positions_stay_float32_under_autocast():
    trunk = VisionTransformer(**SMALL)
    expected = trunk._positions(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trunk._positions(5, 5), expected)


def test_drop_path_grows_linearly_and_drops_whole_samples():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SMALL, drop_path=0.35).train()
    branches: list[Any] = [block.drop_path for block in trunk.blocks]
    chances = [branch.p for branch in branches]
    assert chances == pytest.approx([0.05 * i for i in range(8)])

    count = 4000
    dropped = branches[-1](torch.ones(count, 3, 2))
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    kept = per_sample[:, 0] != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.65))
    error = math.sqrt(0.35 * 0.65 / count)
    assert abs(kept.float().mean() - 0.65) < 5 * error


def test_both_branches_of_a_block_drop_and_neither_in_evaluation():
    torch.manual_seed(0)
    block = VisionTransformer(**SMALL, drop_path=0.5).blocks[-1]
    x = torch.randn(1, 5, 48).expand(256, -1, -1)
    with torch.no_grad():
        outputs = block.train()(x)
        # Attention and MLP are dropped or kept: four different results, about equally often.
        _, counts = outputs[:, 0, :4].round(decimals=4).unique(dim=0, return_counts=True)
        assert len(counts) == 4 and counts.min() > 256 / 4 - 5 * math.sqrt(256 * 3 / 16)
        first, second = block.eval()(x[:1]), block(x[:1])
    assert torch.equal(first, second)


def test_initialisation_statistics():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SIZES["tiny"])
    for name, parameter in trunk.named_parameters():
        n = parameter.numel()
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.startswith("patch_embed"):
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(3 * 16 * 16), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.mean()) < 5 * 0.02 / math.sqrt(n), name
            assert abs(parameter.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * n), name


def test_init_weights_fills_everything_after_meta():
    with torch.device("meta"):
        trunk = VisionTransformer(**SMALL)
    trunk.to_empty(device="cpu")
    for tensor in trunk.state_dict().values():
        tensor.fill_(float("nan"))
    trunk.init_weights()
    assert all(tensor.isfinite().all() for tensor in trunk.state_dict().values())


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_features_have_the_stated_channels_and_strides(size, patch_size):
    trunk = VisionTransformer(**{**SMALL, "patch_size": patch_size}).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = trunk.features(images)
    assert list(maps) == list(trunk.feature_info) == ["c2", "c3", "c4", "c5"]
    assert [info.stride for info in trunk.feature_info.values()] == [4, 8, 16, 32]
    for level, info in trunk.feature_info.items():
        side = [math.ceil(length / info.stride) for length in size]
        assert maps[level].shape == (2, info.channels, *side) == (2, 48, *side)


def test_features_are_the_normalised_patches_of_each_quarter():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SMALL).eval()
    tokens = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        maps = trunk.features(torch.randn(2, 3, 32, 64))
        grids = [trunk.norm(tokens[i])[:, 1:].reshape(2, 4, 8, 48) for i in (1, 3, 5, 7)]
    grids = [grid.permute(0, 3, 1, 2) for grid in grids]
    torch.testing.assert_close(maps["c3"], grids[1])  # the patch size: not resampled
    torch.testing.assert_close(maps["c4"], F.avg_pool2d(grids[2], 2))  # half of it: means of four
    torch.testing.assert_close(maps["c2"].mean((2, 3)), grids[0].mean((2, 3)), atol=0.1, rtol=0.1)


def test_units_are_all_blocks_in_order():
    trunk = VisionTransformer(**SMALL)
    assert trunk.units() == list(trunk.blocks) == trunk.compile_units()
    order = []
    for i, block in enumerate(trunk.units()):
        wrapped = nn.Sequential(block)
        wrapped.register_forward_hook(lambda module, *_: order.append(module))
        trunk.blocks[i] = wrapped
    trunk(torch.randn(1, 3, 64, 64))
    assert order == trunk.units()


def test_channels_last_gives_the_same_output():
    trunk = VisionTransformer(**SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = trunk(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, trunk(images))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_file_lists_every_argument_and_builds(path):
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    assert config["trunk_parameters"] == "${vit_parameters:${.trunk}}"
    arguments = config["trunk"]
    assert arguments.pop("_target_") == "selfsight.trunks.vit.VisionTransformer"
    assert list(arguments) == list(inspect.signature(VisionTransformer).parameters)
    assert arguments["in_channels"] == "${pixels.channels}"
    arguments["in_channels"] = 3
    with torch.device("meta"):
        trunk = VisionTransformer(**arguments)
        name = OTHERS.get(path.stem, f"{path.stem}_patch16_224")
        sizes: dict[str, Any] = {"img_size": 224}
        if path.stem == "vit_micro":  # not a published size: timm's tiny with its numbers
            name = "vit_tiny_patch16_224"
            sizes = {"img_size": arguments["image_size"], "patch_size": arguments["patch_size"]}
            sizes |= {"embed_dim": arguments["width"], "depth": arguments["depth"]}
            sizes |= {"num_heads": arguments["heads"], "mlp_ratio": arguments["mlp_ratio"]}
        theirs = timm.create_model(name, num_classes=0, **sizes)
    count = sum(p.numel() for p in trunk.parameters())
    assert count == vit_parameters(**arguments)
    assert f"{count:,} parameters" in path.read_text()
    assert config["head"]["widths"][0] == trunk.width
    ours, shapes = trunk.state_dict(), theirs.state_dict()
    if arguments["mlp"] == "swiglu":  # timm has other names for the gated MLP
        ours = {k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): ours[k] for k in ours}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in shapes.items()}


def test_sizes_that_do_not_divide_into_patches_are_refused():
    trunk = VisionTransformer(**SMALL)
    for method in (trunk, trunk.features):
        with pytest.raises(ValueError, match="60x64 pixels do not divide into patches of 8"):
            method(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads=5"),
        ({"image_size": 60}, "patch_size=8"),
        ({"depth": 3}, "depth=3"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **change})
