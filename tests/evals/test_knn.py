import math

import pytest
import torch

from selfsight.evals.knn import knn_predict, knn_top1


def reference(bank, labels, query, k, temperature):
    """One query at a time, in float64, as the formula reads."""
    bank = bank.double() / bank.double().norm(dim=1, keepdim=True)
    query = query.double() / query.double().norm()
    cosines = bank @ query
    votes: dict[int, float] = {}
    for index in cosines.argsort(descending=True)[:k].tolist():
        label = int(labels[index])
        votes[label] = votes.get(label, 0) + math.exp(cosines[index].item() / temperature)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_the_formula(k):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (300,), generator=generator)
    centres = torch.randn(7, 16, generator=generator)
    bank = centres[labels] + 1.5 * torch.randn(300, 16, generator=generator)
    queries = centres.repeat(6, 1) + 1.5 * torch.randn(42, 16, generator=generator)
    found = knn_predict(bank, labels, queries, neighbours=k, block=10)
    expected = [reference(bank, labels, q, k, 0.07) for q in queries]
    assert found.tolist() == expected


def test_weights_decide_against_the_majority():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.05]])
    assert knn_predict(bank, labels, query, neighbours=3).item() == 0
    assert knn_predict(bank, labels, query, neighbours=3, temperature=100.0).item() == 1


def test_a_low_temperature_does_not_overflow():
    bank, labels = torch.eye(4), torch.arange(4)
    assert knn_top1(bank, labels, bank, labels, neighbours=4, temperature=1e-3) == 100.0


def test_scale_of_features_does_not_matter_and_small_banks_are_used_whole():
    bank, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])
    assert knn_top1(bank, labels, bank * 37, labels, neighbours=20, temperature=0.01) == 100.0
