import math

import numpy as np
import pytest
import torch
from torch import nn

from selfsight.evals import intervals
from selfsight.evals.average_precision import interpolated_precision, ranking_precision
from selfsight.evals.heads_sweep import predict_heads, train_heads
from selfsight.evals.retrieval import Whitening
from selfsight.trunks.vectors import gem


def test_wilson_and_student():
    stats = pytest.importorskip("scipy.stats")
    correct = torch.arange(400) < 130
    expected = stats.binomtest(130, 400).proportion_ci(0.95, "wilson")
    figure = intervals.accuracy(correct)
    assert figure.low is not None and figure.high is not None
    assert math.isclose(figure.low, 100 * expected.low, rel_tol=1e-6)
    assert math.isclose(figure.high, 100 * expected.high, rel_tol=1e-6)
    values = [70.0, 71.5, 69.0, 72.2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    figure = intervals.repeated(values, "seeds")
    assert figure.low is not None and figure.high is not None
    assert math.isclose(figure.low, low, rel_tol=1e-3)
    assert math.isclose(figure.high, high, rel_tol=1e-3)
    assert intervals.repeated([70.0], "seeds").low is None


def test_mean_per_class_weighs_classes_alike():
    labels = torch.tensor([0, 0, 0, 0, 2])
    correct = torch.tensor([True, True, False, False, True])
    assert intervals.mean_per_class(correct, labels).value == 75.0


def test_precisions_of_known_rankings():
    # relevant at ranks 1 and 3 of 4: trapezoids (1 + 1) / 2 and (1/2 + 2/3) / 2
    relevant = torch.tensor([True, False, True, False])
    assert math.isclose(ranking_precision(relevant), (1 + (1 / 2 + 2 / 3) / 2) / 2)
    junk = torch.tensor([False, True, False, False])
    assert ranking_precision(relevant, junk) == 1.0
    assert math.isnan(ranking_precision(torch.zeros(4, dtype=torch.bool)))
    scores = torch.tensor([4.0, 3, 2, 1])
    # recalls 0 to 0.5 have precision 1, those from 0.6 on 2/3
    expected = (6 + 5 * 2 / 3) / 11
    assert math.isclose(interpolated_precision(scores, relevant.int()), expected)


def test_heads_are_those_of_autograd():
    """Two heads of one sweep, and each trained by torch.optim.SGD on the same batches."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=generator), torch.randint(0, 4, (96,), generator=generator)
    rates = [0.05, 0.5]
    options = {"steps": 12, "batch_size": 32, "nesterov": True, "weight_decay": 0.01}
    weight, bias = train_heads(
        x, y, classes=4, rates=rates, generator=torch.Generator().manual_seed(3), **options
    )
    for index, rate in enumerate(rates):
        head = nn.Linear(6, 4)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        groups = [{"params": [head.weight], "weight_decay": 0.01}, {"params": [head.bias]}]
        solver = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
        drawn = torch.Generator().manual_seed(3)
        for step in range(12):
            if step % 3 == 0:
                order = torch.randperm(96, generator=drawn)
                if step == 0:
                    assert len(order) == 96
            rows = order[32 * (step % 3) : 32 * (step % 3) + 32]
            for group in solver.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / 12)) / 2
            solver.zero_grad()
            nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            solver.step()
        torch.testing.assert_close(weight[index].T, head.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bias[index], head.bias.detach(), atol=1e-5, rtol=1e-4)
    assert predict_heads(x, weight, bias).shape == (2, 96)


def test_whitening_makes_variances_equal_and_spares_what_is_flat():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 0.0])
    whitening = Whitening(x, power=1.0)
    assert whitening.basis.shape[1] <= 3 or x.shape[1] == 4
    unit = nn.functional.normalize(x.double(), dim=1)
    turned = (unit - whitening.mean) @ whitening.basis
    torch.testing.assert_close(
        turned.T @ turned / len(x), torch.eye(turned.shape[1], dtype=torch.float64)
    )
    assert torch.allclose(whitening(x).norm(dim=1), torch.ones(500))


def test_generalised_mean():
    positions = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert math.isclose(gem(positions, 3.0).item(), (36 / 3) ** (1 / 3), rel_tol=1e-6)
    assert math.isclose(gem(positions, 1.0).item(), 2.0, rel_tol=1e-6)
