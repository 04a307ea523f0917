import math

import torch

from selfsight.evals.spread import rankme, uniformity


def test_rank_of_known_spectra():
    q, _ = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64))
    assert math.isclose(rankme(q), 8, rel_tol=1e-4)  # eight equal singular values
    one = torch.randn(64, 1) @ torch.randn(1, 8)
    assert 1 <= rankme(one) < 1.001
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = math.exp(-(shares * shares.log()).sum().item())
    assert math.isclose(rankme(q[:, :3] * shares), expected, rel_tol=1e-4)


def test_uniformity_of_known_sets():
    alike = torch.ones(10, 4)
    assert abs(uniformity(alike)) < 1e-9
    corners = torch.tensor([[1.0, 0], [-1, 0]])
    assert math.isclose(uniformity(corners), -8.0, rel_tol=1e-9)  # |x - y|^2 = 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    pairs = torch.pdist(unit).square().mul(-2).exp().mean().log().item()
    assert math.isclose(uniformity(x), pairs, rel_tol=1e-9)
