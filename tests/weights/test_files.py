"""Files that are not what they should be: one sentence each, and nothing in them is run."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from selfsight.distributed.payload import write_tensors
from selfsight.trunks.resnet import ResNet
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights.files import WeightsError, read_weights
from selfsight.weights.load import init_trunk, load_trunk
from tests.weights import published

VIT = {"width": 64, "depth": 4, "heads": 1, "image_size": 32}


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**VIT)  # type: ignore[arg-type]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_trunk(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text, text
    for word in words:
        assert word in text, text


def test_no_file_an_empty_one_and_a_folder_of_something_else(tmp_path):
    refused(tmp_path / "none.pth", "there is no file of weights")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", "is empty")
    refused(tmp_path, "holds no weights")
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "neither trunk.safetensors nor a whole checkpoint")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html><body>404 not found</body></html>", "web page (HTML)"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page (HTML)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
        (b'{"error": "Repository not found"}', "neither a safetensors file nor"),
        (b"GIF89a" + bytes(100), "neither a safetensors file nor"),
    ],
)
def test_what_downloads_leave_behind(tmp_path, content, words):
    path = tmp_path / "dino.pth"
    path.write_bytes(content)
    refused(path, words)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_that_are_cut_short(tmp_path, share, kind):
    whole, path = tmp_path / "whole", tmp_path / "cut"
    if kind == "safetensors":
        save_file(vit().state_dict(), whole)
    else:
        torch.save(vit().state_dict(), whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "cut short")


class Malicious:
    """What a pickle can do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_does_nothing(tmp_path, legacy):
    path, proof = tmp_path / "weights.pth", tmp_path / "proof"
    content = {"state_dict": vit().state_dict(), "args": Malicious(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "holds Python objects", "nothing of it was run")
    path.write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(WeightsError):
        load_trunk(path)
    assert not proof.exists()


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torchvision.models.resnet18(), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "torchvision.models.resnet.ResNet", "state_dict alone")


def test_plain_data_beside_the_tensors_is_read(tmp_path):
    """DINO's arguments and NumPy's numbers are in released files."""
    path = tmp_path / "full.pth"
    content = published.dino_file(vit().state_dict(), vit().state_dict(), 64)
    torch.save({**content, "best": np.float64(0.5), "step": np.int64(3)}, path)
    assert load_trunk(path).report.whole
    torch.save(torch.zeros(3), path)
    refused(path, "holds a Tensor, not weights by name")


def test_other_architectures_and_shapes(tmp_path):
    torch.save({"embed.weight": torch.zeros(3), "lstm.bias": torch.zeros(2)}, tmp_path / "a")
    refused(tmp_path / "a", "in no layout that is known here", "embed.weight")
    torch.save(torchvision.models.regnet_x_400mf().state_dict(), tmp_path / "b")
    refused(tmp_path / "b", "RegNetX")
    torch.save(torchvision.models.regnet_y_8gf().state_dict(), tmp_path / "c")
    refused(tmp_path / "c", "[224, 448, 896, 2016]", "model=torchvision")
    resnet = ResNet(block="basic", depths=[1, 1, 1, 1])
    torch.save(vit().state_dict(), tmp_path / "d")
    with pytest.raises(WeightsError, match=r"lacks 60 of 60 tensors.*has 54 that the trunk"):
        init_trunk(resnet, tmp_path / "d")
    wider = VisionTransformer(width=128, depth=4, heads=2, image_size=32)
    before = {k: v.clone() for k, v in wider.state_dict().items()}
    with pytest.raises(WeightsError, match="another architecture: cls_token is 1x1x64 in it and"):
        init_trunk(wider, tmp_path / "d")
    assert all(torch.equal(v, before[k]) for k, v in wider.state_dict().items())


def test_less_than_the_whole_trunk_is_refused_unless_told(tmp_path):
    tensors = vit().state_dict()
    less = {k: v for k, v in tensors.items() if not k.startswith("blocks.2.mlp")}
    torch.save(less, tmp_path / "less")
    refused(tmp_path / "less", "lacks 4 of", "blocks.2.mlp.fc1.weight", "allow_partial=true")
    report = load_trunk(tmp_path / "less", allow_partial=True).report
    assert len(report.missing) == 4 and report.loaded == report.wanted - 4
    assert "4 missing (blocks.2.mlp.fc1.weight" in report.text()
    deeper = VisionTransformer(**{**VIT, "depth": 5})  # type: ignore[arg-type]
    torch.save(deeper.state_dict(), tmp_path / "deeper")
    with pytest.raises(WeightsError, match=r"has 12 that the trunk lacks, such as blocks\.4"):
        init_trunk(vit(), tmp_path / "deeper")


def test_positions_are_resampled_to_the_trunks_grid(tmp_path):
    theirs = vit()
    published.scatter(theirs)
    torch.save(theirs.state_dict(), tmp_path / "w")
    ours = VisionTransformer(**{**VIT, "image_size": 64})  # type: ignore[arg-type]
    report, _ = init_trunk(ours, tmp_path / "w")
    assert report.resized == ("pos_embed",) and "1 resized (pos_embed)" in report.text()
    table = theirs.pos_embed[:, 1:].detach().reshape(1, 2, 2, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, (4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.pos_embed[:, 1:].detach(), expected.flatten(2).transpose(1, 2))
    assert torch.equal(ours.pos_embed[:, 0], theirs.pos_embed[:, 0])


def test_half_precision_and_old_files_without_counters(tmp_path):
    trunk = ResNet(block="basic", depths=[1, 1, 1, 1])
    half = {k: v.half() for k, v in trunk.state_dict().items() if "num_batches" not in k}
    torch.save(half, tmp_path / "half")
    loaded = load_trunk(tmp_path / "half")
    assert loaded.report.whole
    for name, value in loaded.trunk.state_dict().items():
        assert "num_batches" in name or torch.equal(value, half[name].float())


def test_a_run_folder_its_trunk_file_and_its_metadata(tmp_path):
    trunk = vit()
    node = {"_target_": "selfsight.trunks.vit.VisionTransformer", **VIT}
    pixels = {"channels": 3, "bits": 8, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    metadata = {"trunk": json.dumps(node), "pixels": json.dumps(pixels), "format": "pt"}
    write_tensors(tmp_path / "trunk.safetensors", trunk.state_dict(), metadata)
    for path in (tmp_path, tmp_path / "trunk.safetensors"):
        loaded = load_trunk(path)
        assert loaded.report.whole and loaded.mean == (0.1, 0.2, 0.3) and loaded.image_size == 32
        assert all(
            torch.equal(v, trunk.state_dict()[k]) for k, v in loaded.trunk.state_dict().items()
        )
    assert read_weights(tmp_path).path == tmp_path / "trunk.safetensors"
