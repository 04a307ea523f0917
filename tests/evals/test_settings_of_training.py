"""Schedules and the optimiser that supervised recipes bring."""

import math

import torch

from selfsight.optim.rmsprop import RMSprop
from selfsight.schedules import warmup_exponential, warmup_steps_down


def test_steps_and_exponential():
    seer = [
        warmup_steps_down(
            s, start=0.1, peak=1.0, factor=0.1, milestones=[30 / 35], warmup_steps=0, steps=350
        )
        for s in range(351)
    ]
    assert seer[299] == 1.0 and math.isclose(seer[300], 0.1) and math.isclose(seer[350], 0.1)
    options = {"start": 0.01, "peak": 0.16, "factor": 0.9875, "every": 100, "warmup_steps": 500}
    assert warmup_exponential(0, **options) == 0.01
    assert warmup_exponential(500, **options) == 0.16
    assert math.isclose(warmup_exponential(1500, **options), 0.16 * 0.9875**10)


def test_rmsprop_is_its_formula():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    solver = RMSprop([weight], lr=0.1, alpha=0.9, momentum=0.5, eps=1e-3, weight_decay=0.01)
    w, s, m = weight.detach().double(), torch.ones(2).double(), torch.zeros(2).double()
    for step in range(5):
        gradient = torch.tensor([0.3, -0.7]) * (step + 1)
        weight.grad = gradient
        solver.step()
        g = gradient.double() + 0.01 * w
        s = 0.9 * s + 0.1 * g**2
        m = 0.5 * m + 0.1 * g / (s + 1e-3).sqrt()
        w = w - m
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)
