"""What DINOv2 adds to the ViT, several crop sizes in one pass, tokens, masks and attention maps."""

import math
from typing import Any

import pytest
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch.utils.flop_counter import FlopCounterMode

from selfsight.distributed.activation import checkpoint_activations
from selfsight.distributed.compilation import compile_units
from selfsight.trunks.geometry import vit_macs, vit_parameters
from selfsight.trunks.vit import VisionTransformer

SMALL: dict[str, Any] = {"width": 48, "depth": 4, "heads": 3, "image_size": 56, "patch_size": 14}
V2: dict[str, Any] = {**SMALL, "mlp": "swiglu", "layer_scale": 0.5, "register_tokens": 4}


def scattered(**options: Any) -> VisionTransformer:
    """A trunk whose parameters are all away from their initial values."""
    torch.manual_seed(0)
    trunk = VisionTransformer(**options).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    return trunk


def views(*counts_and_sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(count, 3, size, size) for count, size in counts_and_sizes]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_equals_timm_with_layer_scale_registers_and_gated_mlp(mlp, registers):
    ours = scattered(**{**V2, "mlp": mlp, "register_tokens": registers}, position_offset=0.0)
    gated = {
        "mlp_layer": SwiGLUPacked,
        "act_layer": torch.nn.SiLU,
        "mlp_ratio": 2.0 * 128 / 48,
    }
    theirs = TimmViT(
        img_size=56,
        patch_size=14,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
        init_values=1e-5,
        reg_tokens=registers,
        **(gated if mlp == "swiglu" else {}),
    ).eval()
    state = {
        name.replace("register_tokens", "reg_token")
        .replace("mlp.w12", "mlp.fc1")
        .replace("mlp.w3", "mlp.fc2"): value
        for name, value in ours.state_dict().items()
    }
    if registers:  # timm counts positions of registers with the class token's: none of ours
        positions = state["pos_embed"]
        zeros = torch.zeros(1, registers, 48)
        state["pos_embed"] = torch.cat((positions[:, :1], zeros, positions[:, 1:]), dim=1)
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.tokens(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(42, 70), (28, 28)])
def test_antialiased_positions_are_timms(size):
    ours = scattered(**SMALL, position_offset=0.0, position_antialias=True)
    expected = resample_abs_pos_embed(
        ours.pos_embed, [size[0] // 14, size[1] // 14], num_prefix_tokens=1
    )
    got = ours._positions(size[0] // 14, size[1] // 14)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [SMALL, V2], ids=["plain", "v2"])
def test_several_sizes_in_one_pass_equal_separate_passes(options):
    trunk = scattered(**options)
    batches = views((2, 56), (3, 28), (1, 42))
    with torch.no_grad():
        for got, images in zip(trunk.forward_views(batches), batches, strict=True):
            torch.testing.assert_close(got, trunk(images), rtol=1e-5, atol=1e-5)
        for got, images in zip(trunk.tokens_views(batches), batches, strict=True):
            torch.testing.assert_close(got, trunk.tokens(images), rtol=1e-5, atol=1e-5)
    (alone,) = trunk.forward_views(batches[:1])
    assert torch.equal(alone, trunk(batches[0]))


def test_several_sizes_in_one_pass_have_the_gradients_of_separate_passes():
    trunk = scattered(**V2)
    batches = views((2, 56), (3, 28))
    sum(x.square().sum() for x in trunk.forward_views(batches)).backward()  # type: ignore[union-attr]
    together = {name: p.grad for name, p in trunk.named_parameters()}
    trunk.zero_grad()
    for images in batches:
        trunk(images).square().sum().backward()
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own
def test_several_sizes_work_checkpointed_and_compiled():
    batches = views((2, 56), (3, 28))
    expected = [x.detach() for x in scattered(**V2).train().forward_views(batches)]
    for change in (checkpoint_activations, lambda units: compile_units(units, "aot_eager")):
        trunk = scattered(**V2).train()
        change(trunk.units())
        outputs = trunk.forward_views(batches)
        torch.testing.assert_close([x.detach() for x in outputs], expected, rtol=1e-5, atol=1e-5)
        sum(x.sum() for x in outputs).backward()  # type: ignore[union-attr]
        assert trunk.pos_embed.grad is not None


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropped_branches_leave_whole_images_and_the_mean_alone(subset, packed):
    """A branch that adds ones: an image gets 0, or all / kept (1 / (1 - p) if drawn alone)."""
    p, count = 0.3, 400
    trunk = VisionTransformer(
        **SMALL, drop_path=p, drop_path_uniform=True, drop_path_subset=subset
    ).train()
    block: Any = trunk.blocks[0]
    torch.manual_seed(1)
    if packed:
        shapes = ((count, 3), (2 * count, 2))
        out = block._add(torch.zeros(7 * count, 5), shapes, lambda x, _: torch.ones_like(x))
        groups = [out[: 3 * count].view(count, 3, 5), out[3 * count :].view(2 * count, 2, 5)]
    else:
        groups = [block._add(torch.zeros(count, 3, 5), None, lambda x, _: torch.ones_like(x))]
    for group in groups:
        flat = group.flatten(1)
        assert (flat == flat[:, :1]).all()
        kept = flat[:, 0] != 0
        if subset:
            number = int(len(group) * (1 - p))
            assert kept.sum() == number
            assert torch.allclose(flat[kept], torch.tensor(len(group) / number))
        else:
            torch.testing.assert_close(flat[kept], torch.full_like(flat[kept], 1 / (1 - p)))
            assert abs(kept.float().mean() - 1 + p) < 5 * math.sqrt(p * (1 - p) / len(group))


def test_a_subset_of_one_size_draws_other_images_than_the_next():
    trunk = VisionTransformer(**SMALL, drop_path=0.5, drop_path_subset=True).train()
    block: Any = trunk.blocks[-1]
    torch.manual_seed(0)
    kept = [
        block._add(torch.zeros(8, 1, 1), None, lambda x, _: torch.ones_like(x)).flatten() > 0
        for _ in range(20)
    ]
    assert len({tuple(k.tolist()) for k in kept}) > 10 and all(k.sum() == 4 for k in kept)


def test_branches_are_computed_for_the_subset_only():
    images = torch.randn(8, 3, 56, 56)
    flops = []
    for chance in (0.0, 0.5):
        trunk = VisionTransformer(
            **SMALL, drop_path=chance, drop_path_uniform=True, drop_path_subset=True
        ).train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk(images)
        flops.append(counter.get_total_flops())
    embedding = 2 * 8 * 16 * 3 * 14 * 14 * 48
    assert (flops[1] - embedding) * 2 == flops[0] - embedding


def test_masked_patches_do_not_reach_the_output():
    trunk = scattered(**V2, mask_token=True)
    images, masks = torch.randn(2, 3, 56, 56), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = masks[1, 0] = True
    changed = images.clone()
    changed[0, :, 14:28, 14:28] = 7.0  # patch 5 of a 4x4 grid
    with torch.no_grad():
        expected = trunk.tokens(images, masks)
        assert torch.equal(trunk.tokens(changed, masks), expected)
        assert not torch.equal(trunk.tokens(changed), trunk.tokens(images))
        got, other = trunk.tokens_views([images, images[:1, :, :28, :28]], masks)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            other, trunk.tokens(images[:1, :, :28, :28]), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="mask_token"):
        scattered(**V2).tokens(images, masks)


@pytest.mark.parametrize("block", [-1, 0, 2])
def test_attention_weights_give_the_output_of_the_fused_kernel(block):
    trunk = scattered(**V2)
    images = torch.randn(2, 3, 28, 42)
    inputs: list[torch.Tensor] = []
    at: Any = trunk.blocks[block]
    at.attn.register_forward_hook(lambda _, args, out: inputs.extend((args[0], out)))
    with torch.no_grad():
        weights = trunk.attention(images, block)
        trunk(images)
        x, expected = inputs
        assert weights.shape == (2, 3, 5 + 6, 5 + 6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 11))
        values = at.attn.qkv(x)[..., 96:].unflatten(-1, (3, 16)).transpose(1, 2)
        out = at.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no block 4"):
        trunk.attention(images, 4)


def test_intermediate_tokens_are_those_after_each_of_the_last_blocks():
    trunk = scattered(**V2)
    images = torch.randn(2, 3, 28, 28)
    after: list[Any] = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda _, __, out: after.append(out))
    with torch.no_grad():
        outputs = trunk.intermediate(images, 3)
        expected = [trunk.norm(x) for x in after[1:]]
    assert len(outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.equal(outputs[-1], trunk.tokens(images))
    with pytest.raises(ValueError, match="no last 5 blocks"):
        trunk.intermediate(images, 5)


@pytest.mark.parametrize("options", [V2, {**V2, "mlp": "gelu", "mask_token": True}])
def test_sizes_are_counted_with_all_options(options):
    trunk = VisionTransformer(**options)
    assert vit_parameters(**options) == sum(p.numel() for p in trunk.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(torch.zeros(2, 3, 56, 56))
    assert counter.get_total_flops() == 2 * 2 * vit_macs(56, 56, **options)


def test_init_weights_fills_everything_after_meta():
    with torch.device("meta"):
        trunk = VisionTransformer(**V2, mask_token=True)
    trunk.to_empty(device="cpu")
    for tensor in trunk.state_dict().values():
        tensor.fill_(float("nan"))
    trunk.init_weights()
    assert all(tensor.isfinite().all() for tensor in trunk.state_dict().values())


@pytest.mark.parametrize(
    ("change", "message"), [({"mlp": "relu"}, "mlp of a ViT"), ({"register_tokens": -1}, "-1")]
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **change})
