"""Choosing on the test images makes noise look like knowledge; choosing on a held-out part does not."""

import torch

from selfsight.data.sources.part import split_indices
from selfsight.evals.heads_sweep import predict_heads, train_heads

RATES = [10.0**p for p in torch.linspace(-3, 1, 24).tolist()]


def heads(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return train_heads(
        x,
        y,
        classes=2,
        rates=RATES,
        steps=40,
        batch_size=32,
        generator=torch.Generator().manual_seed(seed),
    )


def test_noise_labels():
    """Two classes without any relation to the features: chance is 50 %."""
    best_of_test, ours = [], []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 16, generator=generator)
        y = torch.randint(0, 2, (300,), generator=generator)
        train, test = torch.arange(200), torch.arange(200, 300)
        weight, bias = heads(x[train], y[train], seed)
        on_test = (predict_heads(x[test], weight, bias) == y[test]).double().mean(1)
        best_of_test.append(100 * on_test.max().item())
        fit, held = map(torch.from_numpy, split_indices(200, (0.9, 0.1), seed, y[train].numpy()))
        weight, bias = heads(x[fit], y[fit], seed)
        chosen = (predict_heads(x[held], weight, bias) == y[held]).double().mean(1).argmax()
        guess = predict_heads(x[test], weight[chosen : chosen + 1], bias[chosen : chosen + 1])[0]
        ours.append(100 * (guess == y[test]).double().mean().item())
    optimistic, honest = sum(best_of_test) / 12, sum(ours) / 12
    assert optimistic > 53  # "knowledge" of nothing
    assert abs(honest - 50) < 3  # a standard error of 12 x 100 coins is 1.4 points
    assert optimistic - honest > 2
