"""Visual Transformers: against the paper's equations written out, and the contract."""

import inspect
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from selfsight.trunks.geometry_resnet import vt_macs, vt_parameters
from selfsight.trunks.visual_transformer import VisualTransformer

MODELS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("vt_resnet*.yaml"))
SMALL: dict[str, Any] = {
    "block": "basic",
    "depths": [1, 1, 1, 2],
    "tokens": 4,
    "token_width": 32,
    "map_width": 16,
    "heads": 2,
    "map_groups": 4,
    "token_groups": 2,
}


def module(**change: Any) -> tuple[VisualTransformer, Any, Any]:
    torch.manual_seed(0)
    trunk = VisualTransformer(**{**SMALL, **change}).eval()
    first, second = trunk.vt
    return trunk, first, second


def test_the_filter_tokenizer_is_equation_1():
    """One head: softmax over pixels of a learned filter each, weighted means of the values."""
    _, first, _ = module()
    x = torch.randn(2, 16, 5, 7)
    tokenizer = first.tokenizer
    with torch.no_grad():
        got = tokenizer(x, None)
        filters, values = tokenizer.filters(x).flatten(2), tokenizer.value(x).flatten(2)
        expected = []
        for image in range(2):
            columns = []
            for token in range(4):
                weights = torch.softmax(filters[image, token] / math.sqrt(16), dim=0)
                columns.append((values[image] * weights).sum(1))
            expected.append(torch.stack(columns, dim=1))
        where = torch.softmax(filters / 4, dim=-1).unflatten(-1, (5, 7))
        both = torch.cat((torch.stack(expected), tokenizer.positions(where)), dim=1)
        torch.testing.assert_close(got, tokenizer.token(both), rtol=1e-5, atol=1e-6)


def test_the_recurrent_tokenizer_is_equation_2_per_head():
    _, _, second = module()
    tokenizer = second.tokenizer
    x, tokens = torch.randn(2, 16, 5, 7), torch.randn(2, 32, 4)
    with torch.no_grad():
        query, key = tokenizer.query(tokens), tokenizer.key(x).flatten(2)
        value = tokenizer.value(x).flatten(2)
        pooled, wheres = [], []
        for half in (slice(0, 8), slice(8, 16)):
            scores = torch.einsum("bcl,bcp->blp", query[:, half], key[:, half]) / math.sqrt(8)
            weights = scores.softmax(-1)
            pooled.append(torch.einsum("bcp,blp->bcl", value[:, half], weights))
            wheres.append(weights.unflatten(-1, (5, 7)))
        where = (wheres[0] + wheres[1]) / 2
        expected = tokenizer.token(torch.cat((*pooled, tokenizer.positions(where)), dim=1))
        torch.testing.assert_close(tokenizer(x, tokens), expected, rtol=1e-5, atol=1e-6)


def test_the_transformer_is_equations_3_and_4_and_the_projector_5():
    _, first, _ = module(heads=1)
    tokens, x = torch.randn(2, 32, 4), torch.randn(2, 16, 3, 3)
    t, p = first.transformer, first.projector
    with torch.no_grad():
        weights = torch.einsum("bcl,bcm->blm", t.query(tokens), t.key(tokens)) / 4
        mixed = tokens + torch.einsum("bcm,blm->bcl", t.value(tokens), weights.softmax(-1))
        expected = mixed + t.f2(F.relu(t.f1(mixed)))
        torch.testing.assert_close(t(tokens), expected, rtol=1e-5, atol=1e-6)
        scores = torch.einsum("bcp,bcl->bpl", p.query(x).flatten(2), p.key(tokens)) / 4
        back = torch.einsum("bcl,bpl->bcp", p.value(tokens), scores.softmax(-1))
        torch.testing.assert_close(
            p(x, tokens), x + back.unflatten(2, (3, 3)), rtol=1e-5, atol=1e-6
        )


def test_coefficients_are_resampled_bilinearly():
    _, first, _ = module()
    positions = first.tokenizer.positions
    maps = torch.rand(2, 4, 5, 7)
    rows, columns = positions._resampling(5, maps), positions._resampling(7, maps)
    expected = F.interpolate(maps, (14, 14), mode="bilinear", align_corners=False)
    torch.testing.assert_close(rows @ maps @ columns.T, expected)


def test_the_later_modules_follow_the_tokens_of_the_module_before():
    trunk, first, second = module()
    assert not first.tokenizer.recurrent and second.tokenizer.recurrent
    seen: list[Any] = []
    second.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    kept: list[Any] = []
    first.register_forward_hook(lambda _, __, out: kept.append(out[1]))
    with torch.no_grad():
        out = trunk(torch.randn(2, 3, 64, 64))
    assert seen[0] is kept[0] and seen[0].shape == (2, 32, 4) and out.shape == (2, 32)


@pytest.mark.parametrize("size", [(64, 64), (96, 33)])
def test_features_have_the_stated_channels_and_strides(size):
    trunk, _, _ = module()
    with torch.no_grad():
        maps = trunk.features(torch.randn(2, 3, *size))
    assert [info.stride for info in trunk.feature_info.values()] == [4, 8, 16, 32]
    for level, info in trunk.feature_info.items():
        side = [math.ceil(length / info.stride) for length in size]
        assert maps[level].shape == (2, info.channels, *side)


def test_gradients_reach_every_parameter():
    """The last module has no projector then: the feature vector is of the tokens alone."""
    trunk, _, last = module()
    assert last.projector is None
    trunk.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_maps_for_detectors_use_the_last_tokens_too():
    trunk, _, _ = module(last_projector=True)
    maps = trunk.train().features(torch.randn(4, 3, 64, 64))
    torch.stack([x.square().sum() for x in maps.values()]).sum().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_file_lists_every_argument_and_builds(path):
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    arguments = config["trunk"]
    assert arguments.pop("_target_") == "selfsight.trunks.visual_transformer.VisualTransformer"
    assert list(arguments) == list(inspect.signature(VisualTransformer).parameters)
    arguments["in_channels"] = 3
    with torch.device("meta"):
        trunk = VisualTransformer(**arguments)
    count = sum(p.numel() for p in trunk.parameters())
    assert count == vt_parameters(**arguments)
    assert f"{count:,} parameters" in path.read_text()
    assert f"{vt_macs(224, 224, **arguments) / 1e9:.2f}G multiply-adds" in path.read_text()
    assert config["head"]["widths"][0] == trunk.width


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (224, 224)])
def test_macs_equal_what_torch_counts(block, size, last):
    numbers = {**SMALL, "block": block, "depths": [1, 2, 1, 3], "last_projector": last}
    with torch.device("meta"):
        trunk, images = VisualTransformer(**numbers).eval(), torch.empty(2, 3, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(images)
    # three tiny products resample the coefficients
    side = size[0] // 16
    resampling = 3 * 4 * (14 * side * side + 14 * 14 * side)
    assert counter.get_total_flops() == 2 * 2 * (vt_macs(*size, **numbers) + resampling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "plain"}, "basic or bottleneck"),
        ({"depths": [1, 1, 1]}, "four numbers"),
        ({"tokens": 0}, "tokens=0"),
        ({"map_width": 18}, "map_width=18"),
        ({"token_width": 30}, "token_width=30"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VisualTransformer(**{**SMALL, **change})
