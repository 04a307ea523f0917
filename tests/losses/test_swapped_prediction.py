"""Swapped prediction against the double loop it stands for: value, gradient, work, memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight.losses.swapped_prediction import swapped_prediction_loss


def double_loop(
    scores_by_view: list[Tensor], codes: Tensor, temperature: float, assign: tuple[int, ...]
) -> Tensor:
    """The definition, pair by pair, differentiated by autograd."""
    crops = [crop for scores in scores_by_view for crop in scores]
    terms = []
    for code, own in zip(codes, assign, strict=True):
        others = [
            -(code * torch.log_softmax(crop / temperature, dim=-1)).sum(-1).mean()
            for number, crop in enumerate(crops)
            if number != own
        ]
        terms.append(sum(others) / len(others))
    return torch.stack(terms).mean()


def problem(
    counts: tuple[int, ...], assigned: int, samples: int = 6, prototypes: int = 11
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + assigned)
    shape = (samples, prototypes)
    scores = [torch.rand(count, *shape, generator=generator) * 2 - 1 for count in counts]
    codes = torch.softmax(torch.randn(assigned, *shape, generator=generator).double() * 3, dim=-1)
    return [item.double().requires_grad_() for item in scores], codes


CASES = [
    ((2, 4), (0, 1)),
    ((2,), (0, 1)),
    ((2,), (1, 0)),
    ((4, 3, 2), (0, 2)),
    ((3, 2), (2, 0, 1)),
    ((2, 1), (0,)),
    ((1, 5), (0,)),
]


@pytest.mark.parametrize(("counts", "assign"), CASES)
def test_equals_the_double_loop(counts: tuple[int, ...], assign: tuple[int, ...]):
    scores, codes = problem(counts, len(assign))
    expected = double_loop(scores, codes, 0.1, assign)
    expected_gradients = torch.autograd.grad(expected * 3.0, scores, materialize_grads=True)
    loss = swapped_prediction_loss(scores, codes, temperature=0.1, assign=assign)
    gradients = torch.autograd.grad(loss * 3.0, scores)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("counts", "assign"), CASES)
def test_gradient_by_finite_differences(counts: tuple[int, ...], assign: tuple[int, ...]):
    scores, codes = problem(counts, len(assign), samples=2, prototypes=3)

    def loss(*scores: Tensor) -> Tensor:
        return swapped_prediction_loss(scores, codes, temperature=0.4, assign=assign)

    assert torch.autograd.gradcheck(loss, scores)


def test_float32_is_as_good_as_float32_gets():
    scores, codes = problem((2, 4), 2, samples=16, prototypes=3000)
    expected = double_loop(scores, codes, 0.1, (0, 1))
    expected_gradients = torch.autograd.grad(expected, scores)
    single = [item.detach().float().requires_grad_() for item in scores]
    loss = swapped_prediction_loss(single, codes.float(), temperature=0.1)
    gradients = torch.autograd.grad(loss, single)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= 2e-6 * expected.item()
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


def test_uniform_codes_and_scores_cost_the_logarithm_of_k():
    scores = [torch.zeros(2, 5, 16000), torch.zeros(4, 5, 16000)]
    codes = torch.full((2, 5, 16000), 1 / 16000)
    loss = swapped_prediction_loss(scores, codes, temperature=0.1)
    torch.testing.assert_close(loss, torch.tensor(16000.0).log(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_used_in_float32(dtype: torch.dtype):
    scores, codes = problem((2, 2), 2)
    half = [item.detach().to(dtype).requires_grad_() for item in scores]
    single = [item.detach().float().requires_grad_() for item in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = swapped_prediction_loss(half, codes.float(), temperature=0.1)
    expected = swapped_prediction_loss(single, codes.float(), temperature=0.1)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, half)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, single), strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, wanted.to(dtype))


def test_inputs_stay_as_they_are_and_backward_can_be_repeated():
    scores, codes = problem((2, 4), 2)
    before = [item.detach().clone() for item in [*scores, codes]]
    loss = swapped_prediction_loss(scores, codes, temperature=0.1)
    first = torch.autograd.grad(loss, scores, retain_graph=True)
    second = torch.autograd.grad(loss, scores)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(before, [*scores, codes], strict=True):
        assert torch.equal(one, other)


def test_gradients_only_where_they_are_needed():
    scores, codes = problem((2, 4), 2)
    frozen = [scores[0].detach(), scores[1]]
    loss = swapped_prediction_loss(frozen, codes.requires_grad_(), temperature=0.1)
    loss.backward()
    expected = torch.autograd.grad(double_loop(scores, codes.detach(), 0.1, (0, 1)), scores)[1]
    torch.testing.assert_close(scores[1].grad, expected)
    assert frozen[0].grad is None
    assert codes.grad is None


def test_one_crop_is_a_mistake():
    scores, codes = problem((1,), 1)
    with pytest.raises(ValueError, match="at least two crops"):
        swapped_prediction_loss(scores, codes, temperature=0.1, assign=(0,))


class Work(TorchDispatchMode):
    """Lists the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_softmax_a_group_and_no_reading_by_the_host():
    scores, codes = problem((2, 4), 2)
    with Work() as work:
        swapped_prediction_loss(scores, codes, temperature=0.1).backward()
    assert sum("softmax" in name for name in work.names) == 2
    assert not any("exp" in name.split(".")[1] for name in work.names)
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in work.names)


def test_what_waits_for_backward_is_one_buffer_a_group():
    scores, codes = problem((2, 4), 2)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swapped_prediction_loss(scores, codes, temperature=0.1)
    views = sum(item.numel() for item in scores)
    assert sum(saved) == views + codes.numel() + codes[0].numel()
