"""Every published layout: all tensors found, and the outputs of the library's own model."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.resnet import ResNet
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights.files import WeightsError
from selfsight.weights.layouts import detect, flatten
from selfsight.weights.load import init_trunk, load_trunk
from tests.weights import published

WIDE: dict[str, Any] = {"width": 128, "depth": 4, "heads": 2, "image_size": 48, "patch_size": 16}


def saved(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def right(path: Path, expected: Tensor, images: Tensor, layout: str) -> Any:
    """Load, and compare with what the library's own model gives."""
    loaded = load_trunk(path)
    report = loaded.report
    assert report.loaded == report.wanted and not report.missing, report.text()
    assert report.layout == layout
    with torch.no_grad():
        torch.testing.assert_close(loaded.trunk(images), expected, rtol=1e-5, atol=1e-5)
    return loaded


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    trunk = VisionTransformer(**WIDE, **options).eval()
    published.scatter(trunk)
    return trunk


# ---------------------------------------------------------------------------------------- RegNet


@pytest.mark.parametrize("parts", [False, True])
def test_vissl_regnets_plain_and_in_parts(tmp_path, parts):
    trunk = published.tiny_regnet()
    content = published.vissl_file(trunk.state_dict(), parts)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = trunk(images)
    loaded = right(saved(content, tmp_path), expected, images, "VISSL RegNet")
    assert isinstance(loaded.trunk, RegNetY)
    assert loaded.report.renamed == loaded.report.wanted
    assert sum("projection_head" in name for name in loaded.report.unused) == 6
    assert "non-commercial" in loaded.found.licence
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.image_size == 224


@pytest.mark.parametrize("size", ["128gf", "10b"])
def test_vissls_names_of_the_large_trunks_are_all_known(size):
    """Names and shapes only, on the meta device, with the words that FSDP puts in."""
    from selfsight.build import build, compose
    from selfsight.weights.files import WeightFile

    config = compose("pretrain", [f"model=regnety_{size}"])
    with torch.device("meta"):
        trunk = build(config.model.trunk)
    names = {published.vissl_name(n, size == "10b"): t for n, t in trunk.state_dict().items()}
    if size == "10b":
        names = {
            n.replace(".f.", "._fsdp_wrapped_module._fpw_module.f."): t for n, t in names.items()
        }
    content = {"classy_state_dict": {"base_model": {"model": {"trunk": names, "heads": {}}}}}
    found = detect(WeightFile(Path("seer.torch"), content))
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: t.shape for n, t in trunk.state_dict().items()
    }
    assert not found.others
    assert {**found.node, "in_channels": 3} == {**dict(config.model.trunk), "in_channels": 3}


def test_torchvision_and_timm_regnets(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    theirs: Any = torchvision.models.regnet_y_400mf().eval()
    published.scatter(theirs, 0.02)
    path = saved(theirs.state_dict(), tmp_path)
    theirs.fc = nn.Identity()
    with torch.no_grad():
        loaded = right(path, theirs(images), images, "torchvision RegNet")
    assert loaded.report.renamed == 0
    assert loaded.report.unused == ("fc.weight", "fc.bias")

    ours: Any = timm.create_model("regnety_002").eval()
    published.scatter(ours, 0.02)
    path = saved({"state_dict": ours.state_dict()}, tmp_path, "timm.pth")
    ours.reset_classifier(0)
    with torch.no_grad():
        right(path, ours(images), images, "timm RegNet")


# ---------------------------------------------------------------------------------------- ResNet


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), ("resnext50_32x4d", 2048), ("resnet50", 2048)]
)
def test_resnets_of_torchvision_swav_and_vissl(tmp_path, name, width):
    torch.manual_seed(0)
    theirs: Any = torchvision.models.get_model(name).eval()
    published.scatter(theirs, 0.01)
    theirs.fc = nn.Identity()
    tensors, images = theirs.state_dict(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
    loaded = right(saved(tensors, tmp_path), expected, images, "ResNet")
    assert isinstance(loaded.trunk, ResNet) and loaded.report.renamed == 0
    content = published.swav_file(tensors, width)
    right(saved(content, tmp_path), expected, images, "SwAV ResNet")
    trunk = {f"_feature_blocks.{n}": t for n, t in tensors.items()}
    content = {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}
    right(saved(content, tmp_path), expected, images, "ResNet")


def test_a_wide_resnet_of_swav(tmp_path):
    trunk = ResNet(block="bottleneck", depths=[1, 1, 1, 1], widen=2).eval()
    published.scatter(trunk, 0.01)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trunk(images)
    loaded = right(
        saved(published.swav_file(trunk.state_dict(), 4096), tmp_path),
        expected,
        images,
        "SwAV ResNet",
    )
    assert loaded.found.node["widen"] == 2 and loaded.trunk.width == 4096


# ------------------------------------------------------------------------------------------- ViT


def test_dino_backbone_and_full_file(tmp_path):
    teacher = vit()
    student = VisionTransformer(**WIDE).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected, other = teacher(images), student(images)
    loaded = right(saved(teacher.state_dict(), tmp_path), expected, images, "DINO ViT")
    assert loaded.found.node["position_offset"] == 0.1 and loaded.report.renamed == 0
    content = published.dino_file(teacher.state_dict(), student.state_dict(), 128)
    path = saved(content, tmp_path)
    loaded = right(path, expected, images, "DINO, with head")
    assert "of 2 trunks, teacher.backbone" in loaded.found.notes
    with torch.no_grad():
        assert torch.equal(load_trunk(path, prefer="student").trunk(images), other)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_dinov2_with_registers_gated_and_in_chunks(tmp_path, registers, mlp):
    trunk = vit(layer_scale=1e-5, mask_token=True, register_tokens=registers, mlp=mlp)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = trunk(images)
    loaded = right(saved(trunk.state_dict(), tmp_path), expected, images, "DINOv2")
    assert loaded.found.node["position_antialias"] == bool(registers)
    assert loaded.found.node["position_offset"] == (0.0 if registers else 0.1)
    chunked = {}
    for name, tensor in trunk.state_dict().items():
        words = name.split(".")
        if words[0] == "blocks":
            words.insert(1, str(int(words[1]) // 2))
        chunked["backbone." + ".".join(words)] = tensor
    chunked |= {f"dino_head.{n}": t for n, t in published.dino_head(128).items()}
    right(saved({"teacher": chunked}, tmp_path), expected, images, "DINO, with head")


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_vits(tmp_path, registers):
    torch.manual_seed(0)
    options = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5} if registers else {}
    theirs = TimmViT(img_size=48, embed_dim=128, depth=4, num_heads=2, num_classes=5, **options)
    published.scatter(theirs.eval())
    path = saved(theirs.state_dict(), tmp_path)
    theirs.reset_classifier(0)
    for size in (48, 80):
        images = torch.randn(2, 3, size, size)
        if size != 48:
            theirs.set_input_size((size, size))
        with torch.no_grad():
            loaded = right(path, theirs(images), images, "timm ViT")
    assert loaded.report.unused[:2] == ("head.weight", "head.bias")


def test_torchvision_vit(tmp_path):
    torch.manual_seed(0)
    theirs: Any = torchvision.models.VisionTransformer(48, 16, 4, 2, 128, 512).eval()
    published.scatter(theirs)
    path, images = saved(theirs.state_dict(), tmp_path), torch.randn(2, 3, 48, 48)
    theirs.heads = nn.Identity()
    with torch.no_grad():
        right(path, theirs(images), images, "torchvision ViT")


SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "image_size": 48, "patch_size": 16}
HUGGING_FACE = {
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SIZES, num_attention_heads=4, intermediate_size=512)
    ),
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SIZES, num_attention_heads=2, use_swiglu_ffn=True)
    ),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, num_attention_heads=2)
    ),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
@pytest.mark.parametrize("form", ["folder", "memory"])
def test_hugging_face_vits_from_their_folder_and_from_memory(tmp_path, kind, form):
    torch.manual_seed(0)
    theirs = HUGGING_FACE[kind]().eval()
    published.scatter(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if form == "memory":
        (tmp_path / "model.safetensors").unlink()
        path = saved(theirs.state_dict(), tmp_path, "pytorch_model.bin")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 0]
    loaded = right(path, expected, images, "Hugging Face ViT")
    assert loaded.mean == ((0.5,) * 3 if kind == "vit" else (0.485, 0.456, 0.406))
    assert loaded.found.node["heads"] == (4 if kind == "vit" else 2)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    again = load_trunk(path)
    assert again.mean == (0.1, 0.2, 0.3) and "preprocessor_config.json" in again.description


def test_a_hugging_face_classifier_has_its_head_listed_as_unused(tmp_path):
    config = transformers.ViTConfig(
        **SIZES, num_attention_heads=2, intermediate_size=512, num_labels=3
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = theirs.vit(images).last_hidden_state[:, 0]
    loaded = right(tmp_path, expected, images, "Hugging Face ViT")
    assert set(loaded.report.unused) == {"classifier.weight", "classifier.bias"}


def test_rotary_positions_are_refused_and_load_through_timm(tmp_path):
    config = transformers.DINOv3ViTConfig(**SIZES, num_attention_heads=2, intermediate_size=512)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"rotary positions.*model=timm"):
        load_trunk(tmp_path)
    metas = {
        "cls_token": torch.zeros(1, 1, 128),
        "storage_tokens": torch.zeros(1, 4, 128),
        "patch_embed.proj.weight": torch.zeros(128, 3, 16, 16),
        "rope_embed.periods": torch.zeros(16),
    }
    with pytest.raises(WeightsError, match="rotary positions"):
        load_trunk(saved(metas, tmp_path, "meta.pth"))


# ------------------------------------------------------------------------------------ any model


def test_other_models_of_timm_and_torchvision_load_by_name(tmp_path):
    from selfsight.trunks.libraries import TimmTrunk, TorchvisionTrunk

    images = torch.randn(1, 3, 64, 64)
    theirs: Any = timm.create_model("convnext_atto", num_classes=4).eval()
    path = saved(
        {"state_dict": {f"module.{n}": t for n, t in theirs.state_dict().items()}}, tmp_path
    )
    trunk = TimmTrunk(name="convnext_atto").eval()
    report, _ = init_trunk(trunk, path)
    assert report.loaded == report.wanted and len(report.unused) == 2
    theirs.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(trunk(images), theirs(images))
    (tmp_path / "config.json").write_text('{"architecture": "convnext_atto"}')
    with torch.no_grad():
        assert torch.equal(load_trunk(path).trunk(images), theirs(images))

    model: Any = torchvision.models.mobilenet_v3_small().eval()
    other = TorchvisionTrunk(name="mobilenet_v3_small").eval()
    report, _ = init_trunk(other, saved(model.state_dict(), tmp_path, "mobile.pth"))
    assert report.loaded == report.wanted


def test_a_dinov3_vit_of_meta_loads_into_timms_model(tmp_path):
    """Names of Meta's files, translated by timm's own filter."""
    from selfsight.trunks.libraries import TimmTrunk

    options = {"img_size": 64, "depth": 4, "embed_dim": 96, "num_heads": 3}
    name = "vit_small_patch16_dinov3"
    theirs: Any = timm.create_model(name, num_classes=0, **options).eval()
    published.scatter(theirs)
    metas: dict[str, Tensor] = {}
    for key, tensor in theirs.state_dict().items():
        key = key.replace("reg_token", "storage_tokens")
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        metas[key] = tensor
        if key.endswith("attn.qkv.weight"):
            metas[key.replace("weight", "bias")] = torch.zeros(tensor.shape[0])
            metas[key.replace("weight", "bias_mask")] = torch.zeros(tensor.shape[0])
    metas["rope_embed.periods"] = torch.ones(8)
    metas["mask_token"] = torch.zeros(1, 96)
    trunk = TimmTrunk(name=name, options=options).eval()
    report, _ = init_trunk(trunk, saved(metas, tmp_path))
    assert report.loaded == report.wanted, report.text()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trunk(images), theirs(images))


def test_containers_are_opened(tmp_path):
    tensor = torch.zeros(2)
    assert flatten({"state_dict": {"a.b": tensor}, "epoch": 3}) == {"a.b": tensor}
    assert flatten({"model": {"teacher": {"x": tensor}}}) == {"teacher.x": tensor}
    with pytest.raises(WeightsError, match="shards of a VISSL"):
        flatten({"type": "shard_list", "shard_list": []})
