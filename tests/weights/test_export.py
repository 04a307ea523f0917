"""Every export, loaded by the other library and used as its snippet says; and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from launch.convert import convert
from selfsight.build import build
from selfsight.weights import export as exports
from selfsight.weights.export import export
from selfsight.weights.files import WeightsError
from selfsight.weights.layouts import Found
from selfsight.weights.load import LoadedTrunk, load_trunk
from selfsight.weights.report import Report
from tests.weights import published

REGNET = {"_target_": "selfsight.trunks.regnet.RegNetY", **published.TINY}
RESNET = {
    "_target_": "selfsight.trunks.resnet.ResNet",
    "block": "bottleneck",
    "depths": [1, 1, 1, 1],
}
RESNEXT = {**RESNET, "groups": 8, "group_width": 4}
VIT = {
    "_target_": "selfsight.trunks.vit.VisionTransformer",
    "width": 128,
    "depth": 4,
    "heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
DINOV2 = {**VIT, "layer_scale": 1e-5, "mask_token": True, "mlp": "swiglu"}
REGISTERS = {**VIT, "layer_scale": 1e-5, "register_tokens": 4}
VT = {
    "_target_": "selfsight.trunks.visual_transformer.VisualTransformer",
    "block": "basic",
    "depths": [1, 1, 1, 2],
    "tokens": 4,
    "token_width": 64,
    "map_width": 64,
}
TIMM = {"_target_": "selfsight.trunks.libraries.TimmTrunk", "name": "convnext_atto"}
TORCHVISION = {
    "_target_": "selfsight.trunks.libraries.TorchvisionTrunk",
    "name": "mobilenet_v3_small",
}


def loaded(node: dict[str, Any], image_size: int = 32) -> LoadedTrunk:
    torch.manual_seed(0)
    trunk = build(node).eval()
    published.scatter(trunk, 0.02)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = Found("test", "own", {}, node, {}, mean=mean, std=std, licence="for tests only")
    report = Report("test", 0, 0, 0)
    return LoadedTrunk(trunk, mean, std, image_size, "test", report, found)


def used(snippet: str, images: Tensor) -> Tensor:
    """What the three lines give."""
    names: dict[str, Any] = {"images": images}
    assert len(snippet.splitlines()) == 3
    with torch.no_grad():
        exec(snippet, names)
    return torch.as_tensor(names["features"])


CASES = [
    *[(node, "selfsight") for node in (REGNET, RESNEXT, REGISTERS, VT, TIMM, TORCHVISION)],
    *[(node, "timm") for node in (REGNET, RESNET, RESNEXT, VIT, DINOV2, REGISTERS, TIMM)],
    ({**VIT, "norm_eps": 1e-12}, "timm"),
    *[(node, "torchvision") for node in (REGNET, RESNET, RESNEXT, VIT, TORCHVISION)],
    *[(node, "hf") for node in (REGNET, RESNET, VIT, DINOV2, REGISTERS)],
    *[(node, "export") for node in (REGNET, VIT)],
]


@pytest.mark.parametrize(("node", "to"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_the_other_library_gives_the_same_outputs(tmp_path, node, to):
    ours = loaded(node)
    out = tmp_path / "out"
    exported = export(ours, out, to)
    assert exported.difference <= 1e-5 and exported.path == out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ours.trunk(images)
    got = used(exported.snippet, images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if to in ("selfsight", "timm", "torchvision", "hf"):  # and back
        again = load_trunk(out)
        assert again.report.whole
        with torch.no_grad():
            torch.testing.assert_close(again.trunk(images), expected, rtol=1e-5, atol=1e-5)
    if to in ("selfsight", "hf"):
        assert (again.mean, again.std, again.image_size) == (ours.mean, ours.std, 32)
    if to == "selfsight":
        assert again.found.licence == "for tests only" and again.found.node == node


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("node", [REGNET, REGISTERS])
def test_onnx_for_any_number_of_images(tmp_path, node):
    ours = loaded(node)
    exported = export(ours, tmp_path / "out.onnx", "onnx")
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            expected = ours.trunk(images)
        torch.testing.assert_close(used(exported.snippet, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "to", "message"),
    [
        ({**RESNET, "widen": 2}, "torchvision", "not widened"),
        ({**RESNET, "widen": 2}, "timm", "not widened"),
        ({**REGNET, "stem_stride": 1}, "timm", "stride 2"),
        ({**REGNET, "stem_stride": 1}, "hf", "stride 2"),
        (RESNEXT, "hf", "no groups"),
        (REGISTERS, "torchvision", "lack registers and LayerScale: use to=timm"),
        ({**VIT, "register_tokens": 4}, "hf", "only with LayerScale"),
        (VT, "timm", "no network like VisualTransformer"),
        (VT, "hf", "no network like VisualTransformer"),
        (VT, "torchvision", "no network like VisualTransformer"),
        (VIT, "caffe", "to=caffe is not one of selfsight"),
    ],
)
def test_what_a_library_has_not_is_refused_and_leaves_nothing(tmp_path, node, to, message):
    with pytest.raises(WeightsError, match=message):
        export(loaded(node), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_a_difference_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    real = exports.timm_names.translated

    def wrong(node, trunk):
        model, tensors, built = real(node, trunk)
        tensors["norm.bias"] = tensors["norm.bias"] + 0.01
        return model, tensors, built

    monkeypatch.setattr(exports.timm_names, "translated", wrong)
    with pytest.raises(WeightsError, match="does not give the same outputs"):
        export(loaded(VIT), tmp_path / "out", "timm")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WeightsError, match="exists already"):
        export(loaded(VIT), tmp_path / "out", "selfsight")
    with pytest.raises(WeightsError, match="there is no folder"):
        export(loaded(VIT), tmp_path / "no" / "out", "selfsight")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_command_says_what_it_loaded_and_how_to_use_the_result(tmp_path, capsys):
    trunk = published.tiny_regnet()
    source = tmp_path / "seer.torch"
    torch.save(published.vissl_file(trunk.state_dict()), source)
    out = tmp_path / "trunk.safetensors"
    assert convert([f"in={source}", f"out={out}", "to=torchvision"]) == 0
    said = capsys.readouterr().out
    count = sum(not name.endswith("tracked") for name in trunk.state_dict())
    assert f"{count} of {count} tensors of the trunk loaded (VISSL RegNet)" in said
    assert "licence: SEER" in said and "torchvision.models.regnet.RegNet(" in said
    got = used("\n".join(said.splitlines()[-3:]), images := torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(got, trunk(images), rtol=1e-5, atol=1e-5)

    for arguments, message in (
        ([f"in={tmp_path / 'none'}", f"out={out}2"], "there is no file of weights"),
        ([f"inn={source}", f"out={out}"], "there is no key 'inn'; did you mean 'in'?"),
        ([f"in={source}"], "out= is not set"),
        (["convert"], "'convert' is not understood"),
    ):
        assert convert(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("selfsight: ") and error.count("\n") == 1 and message in error
