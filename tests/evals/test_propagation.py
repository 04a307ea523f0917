"""Label propagation against loops in float64, and DAVIS's measures on shapes with known answers."""

import math

import numpy as np
import pytest
import torch

from selfsight.evals.propagation import (
    one_hot,
    outline_match,
    propagate,
    region_overlap,
    sharpened,
)


def by_loops(query, context, labels, radius, topk, temperature):
    h, w, _ = query.shape
    out = np.zeros((labels[0].shape[0], h, w))
    for r in range(h):
        for c in range(w):
            found = []
            for frame, label in zip(context, labels, strict=True):
                for y in range(h):
                    for x in range(w):
                        if (r - y) ** 2 + (c - x) ** 2 <= radius**2:
                            a, b = query[r, c].double(), frame[y, x].double()
                            cosine = float(a @ b / a.norm() / b.norm())
                            found.append((cosine, label[:, y, x].double().numpy()))
            found.sort(key=lambda item: -item[0])
            weights = np.array([math.exp(cosine / temperature) for cosine, _ in found[:topk]])
            out[:, r, c] = sum(
                w_ * label for w_, (_, label) in zip(weights / weights.sum(), found, strict=False)
            )
    return out


def test_propagation_is_that_of_plain_loops():
    torch.manual_seed(0)
    query, context = torch.randn(5, 4, 6), [torch.randn(5, 4, 6) for _ in range(2)]
    labels = [torch.rand(3, 5, 4).softmax(0) for _ in range(2)]
    found = propagate(query, context, labels, radius=2, topk=3, temperature=0.1)
    expected = by_loops(query, context, labels, 2, 3, 0.1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(0).numpy(), 1, atol=1e-5)


def test_a_moved_object_is_followed():
    torch.manual_seed(1)
    background, thing = torch.randn(8), torch.randn(8)
    first, second = (background.repeat(12, 12, 1) for _ in range(2))
    mask = torch.zeros(12, 12, dtype=torch.int64)
    mask[2:6, 2:6] = 1
    first[2:6, 2:6] = thing
    second[4:8, 3:7] = thing
    shares = propagate(second, [first], [one_hot(mask, 2, (12, 12))], radius=6)
    truth = torch.zeros(12, 12, dtype=torch.int64)
    truth[4:8, 3:7] = 1
    assert torch.equal(sharpened(shares, (12, 12)), truth)


def test_overlap_of_shifted_squares():
    one, two = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    one[10:20, 10:20] = True
    two[10:20, 15:25] = True
    assert region_overlap(one, two) == pytest.approx(50 / 150)
    assert region_overlap(one, one) == 1
    assert region_overlap(one & ~one, one & ~one) == 1
    assert region_overlap(one & ~one, one) == 0


def test_outlines_meet_within_their_bound_only():
    one, two = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    one[20:60, 20:60] = True
    two[22:62, 20:60] = True
    assert outline_match(one, one) == 1
    assert outline_match(one, two, bound=2) == 1
    assert 0.4 < outline_match(one, two, bound=1) < 0.8  # the sides along the shift still meet
    assert outline_match(one & ~one, one) == 0
    assert outline_match(one & ~one, one & ~one) == 1
