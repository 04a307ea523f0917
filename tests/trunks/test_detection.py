"""torchvision's feature pyramid and Mask R-CNN on our trunks, for one training step."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.visual_transformer import VisualTransformer
from selfsight.trunks.vit import VisionTransformer


class Pyramid(nn.Module):
    """A trunk under a feature pyramid, as torchvision's detectors want their backbone."""

    def __init__(self, trunk: Trunk, out_channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.out_channels = out_channels
        channels = [info.channels for info in trunk.feature_info.values()]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.fpn(OrderedDict(self.trunk.features(images)))
        return {str(level): x for level, x in enumerate(maps.values())}  # as MaskRCNN names them


TRUNKS = {
    "regnety": lambda: RegNetY(depth=5, w_0=16, w_a=24.0, w_m=2.0, group_width=8),
    "vit": lambda: VisionTransformer(width=32, depth=4, heads=2, image_size=64),
    "vt_resnet": lambda: VisualTransformer(
        block="basic",
        depths=[1, 1, 1, 1],
        tokens=4,
        token_width=64,
        map_width=64,
        last_projector=True,
    ),
}


@pytest.mark.parametrize("kind", TRUNKS)
def test_mask_rcnn_makes_a_step(kind):
    torch.manual_seed(0)
    trunk = TRUNKS[kind]()
    trunk.freeze_batch_norm()
    model = MaskRCNN(
        Pyramid(trunk, 32),
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5),
        rpn_post_nms_top_n_train=20,
        rpn_pre_nms_top_n_train=50,
    )
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": masks,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = model([torch.rand(3, 64, 64)] * 2, [target] * 2)
    total = sum(losses.values(), torch.zeros(()))
    assert set(losses) >= {"loss_mask", "loss_box_reg", "loss_objectness"} and total.isfinite()
    total.backward()
    assert all(p.grad is not None for p in trunk.units()[0].parameters() if p.requires_grad)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    optimizer.step()
    changed = {k for k, v in trunk.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any("running" in name for name in changed)
