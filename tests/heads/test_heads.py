import pytest
import torch

from selfsight.heads.projection import ProjectionHead
from selfsight.heads.prototypes import Prototypes


@pytest.mark.parametrize(
    ("batch_norm", "linear", "norms"), [(False, (0, 2, 4), ()), (True, (0, 3, 6), (1, 4))]
)
def test_layers_are_numbered_like_the_released_heads(batch_norm, linear, norms):
    head = ProjectionHead(widths=[12, 8, 8, 4], batch_norm=batch_norm)
    keys = set(head.state_dict())
    for index in (*linear, *norms):
        assert f"projection_head.{index}.weight" in keys
        assert f"projection_head.{index}.bias" in keys
    assert len([k for k in keys if k.endswith("weight")]) == len(linear) + len(norms)
    assert head(torch.randn(5, 12)).shape == (5, 4)


def test_seer_256gf_head_and_prototypes_have_the_published_size():
    with torch.device("meta"):
        head = ProjectionHead(widths=[10444, 8192, 8192, 256], batch_norm=False)
    assert sum(p.numel() for p in head.parameters()) == 154_779_904


def test_a_head_needs_two_widths():
    with pytest.raises(ValueError, match="at least two widths"):
        ProjectionHead(widths=[12])


def test_prototypes_are_unit_vectors_and_scores_cosines():
    prototypes = Prototypes(width=16, count=30)
    features = torch.nn.functional.normalize(torch.randn(2, 5, 16), dim=-1)
    assert torch.allclose(prototypes.weight.norm(dim=1), torch.ones(30), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(
        features[:, :, None].double(), prototypes.weight.double(), dim=-1
    )
    assert torch.allclose(prototypes(features).double(), cosines, atol=1e-6)
    with torch.no_grad():
        prototypes.weight.mul_(3)
    prototypes.normalize()
    assert torch.allclose(prototypes.weight.norm(dim=1), torch.ones(30), atol=1e-6)


def test_scores_stay_fp32_under_autocast():
    prototypes = Prototypes(width=16, count=30)
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototypes(features), prototypes(features.clone()))
        scores = prototypes(features)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, prototypes(features))
