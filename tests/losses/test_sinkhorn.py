"""Sinkhorn against a float64 log-domain form, over split ranks, and what it costs."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight.distributed import collectives
from selfsight.distributed.env import World
from selfsight.losses.sinkhorn import sinkhorn
from selfsight.precision import full_precision
from tests.parallel.ranks import on_ranks


def reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The released algorithm on one crop in float64 and log domain, the whole matrix each time."""
    samples, prototypes = scores.shape
    log_q = scores.double() / epsilon
    log_q = log_q - torch.logsumexp(log_q.flatten(), dim=0)
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True) - math.log(prototypes)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True) - math.log(samples)
    return (log_q + math.log(samples)).exp()


def cosines(samples: int, prototypes: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, samples, width, generator=generator)
    weights = torch.randn(prototypes, width, generator=generator)
    normalize = torch.nn.functional.normalize
    return normalize(features, dim=-1) @ normalize(weights, dim=-1).T


def opposed() -> Tensor:
    """A sample at -1 everywhere beside one at +1, and a prototype that nobody likes."""
    scores = cosines(32, 24, 8)
    scores[:, 0] = -1.0
    scores[:, 1] = 1.0
    scores[:, :, 5] = -1.0
    scores[:, 2, 7] = 1.0
    return scores


def extreme() -> Tensor:
    """Every score at one of the two bounds."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 2, (2, 32, 24), generator=generator).float() * 2 - 1


def collapsed() -> Tensor:
    """All samples are the same sample."""
    return cosines(1, 64, 16).expand(2, 48, 64).contiguous()


CASES: dict[str, Callable[[], Tensor]] = {
    "spread": lambda: cosines(96, 192, 64),
    "low width": lambda: cosines(96, 40, 3),
    "more samples": lambda: cosines(150, 10, 16),
    "opposed": opposed,
    "extreme": extreme,
    "collapsed": collapsed,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.025, 0.01, 0.005])
def test_equals_float64_log_domain(name: str, epsilon: float, iterations: int):
    scores = CASES[name]()
    expected = torch.stack([reference(crop, epsilon, iterations) for crop in scores])
    methods = ["auto", "log"] if epsilon >= 0.025 else ["auto"]
    for method in methods:
        codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations, method=method)
        assert codes.dtype == torch.float32
        assert (codes - expected).abs().max() <= 1e-5
        torch.testing.assert_close(codes.sum(-1), torch.ones(scores.shape[:2]))


def test_large_problem_at_usual_sizes():
    scores = cosines(32, 16000, 256)
    for epsilon in (0.03, 0.01):
        expected = torch.stack([reference(crop, epsilon, 10) for crop in scores])
        codes = sinkhorn(scores, epsilon=epsilon, iterations=10)
        assert (codes - expected).abs().max() <= 1e-5


def test_prototypes_are_used_equally():
    codes = sinkhorn(cosines(512, 64, 32), epsilon=0.05, iterations=50)
    torch.testing.assert_close(codes.sum(1), torch.full((2, 64), 8.0), rtol=1e-4, atol=0)


def test_many_iterations_do_not_drift():
    """The factors stay in range although there are 400 times as many prototypes as samples."""
    scores = cosines(5, 2000, 64)
    expected = torch.stack([reference(crop, 0.03, 200) for crop in scores])
    codes = sinkhorn(scores, epsilon=0.03, iterations=200)
    assert (codes - expected).abs().max() <= 1e-5


def test_float64_scores_are_solved_in_float64():
    scores = cosines(64, 32, 16).double()
    for epsilon in (0.05, 0.005):
        expected = torch.stack([reference(crop, epsilon, 5) for crop in scores])
        codes = sinkhorn(scores, epsilon=epsilon, iterations=5)
        assert codes.dtype == torch.float64
        assert (codes - expected).abs().max() <= 1e-12


def test_scores_are_left_alone_and_carry_no_gradient():
    for epsilon in (0.05, 0.01):
        scores = cosines(16, 8, 4).requires_grad_()
        before = scores.detach().clone()
        codes = sinkhorn(scores, epsilon=epsilon, iterations=3)
        assert torch.equal(scores, before)
        assert not codes.requires_grad


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_autocast_does_not_lower_it(epsilon: float):
    scores = cosines(64, 32, 16)
    plain = sinkhorn(scores, epsilon=epsilon, iterations=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(scores, epsilon=epsilon, iterations=3), plain)
        assert torch.is_autocast_enabled("cpu")


def test_full_precision_puts_everything_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_not_finite_scores_show_in_the_codes():
    """They must not be hidden: the step is skipped because its loss is not finite."""
    for epsilon in (0.05, 0.01):
        scores = cosines(16, 8, 4)
        scores[0, 3, 2] = float("nan")
        assert sinkhorn(scores, epsilon=epsilon, iterations=3).isnan().any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"iterations": 0}, "at least one iteration"),
        ({"epsilon": 0.01, "method": "scaling"}, "epsilon of at least 0.025"),
        ({"epsilon": 0.0}, "epsilon of at least 0.002"),
        ({"method": "fast"}, "unknown Sinkhorn method 'fast'"),
    ],
)
def test_mistakes_are_named(change: dict, sentence: str):
    options = {"epsilon": 0.05, "iterations": 3} | change
    with pytest.raises(ValueError, match=sentence):
        sinkhorn(cosines(4, 4, 4), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match="computed in float32"):
        sinkhorn(cosines(4, 4, 4).to(dtype), epsilon=0.05, iterations=3)


class Lockstep:
    """Ranks as threads: a sum waits until every rank has handed in its part."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.calls: list[tuple[int, ...]] = []

    def sum_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(tensor: Tensor) -> Tensor:
            self.parts[rank] = tensor.clone()
            if rank == 0:
                self.calls.append(tuple(tensor.shape))
            self.barrier.wait()
            total = torch.stack([part for part in self.parts if part is not None]).sum(0)
            self.barrier.wait()
            return total

        return add


@pytest.mark.parametrize("epsilon", [0.05, 0.025, 0.01, 0.005])
@pytest.mark.parametrize("name", ["spread", "opposed", "extreme"])
def test_split_over_ranks_equals_the_whole(name: str, epsilon: float):
    """Uneven parts, one rank without samples, and no more exchanged than promised."""
    scores = CASES[name]()
    samples = scores.shape[1]
    cuts = [0, 1, samples // 3, samples // 3, samples]
    lockstep = Lockstep(len(cuts) - 1)
    results: dict[int, Tensor] = {}

    def solve(rank: int) -> None:
        results[rank] = sinkhorn(
            scores[:, cuts[rank] : cuts[rank + 1]],
            epsilon=epsilon,
            iterations=4,
            global_samples=samples,
            sum_over_ranks=lockstep.sum_of(rank),
        )

    threads = [threading.Thread(target=solve, args=(rank,)) for rank in range(len(cuts) - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = torch.cat([results[rank] for rank in range(len(cuts) - 1)], dim=1)
    expected = torch.stack([reference(crop, epsilon, 4) for crop in scores])
    assert (codes - expected).abs().max() <= 1e-5
    sums = 4 if epsilon >= 0.025 else 5
    assert lockstep.calls == [(2, 1, scores.shape[2])] * sums


def _codes_of_a_rank(world: World) -> list[Tensor]:
    return [
        sinkhorn(
            cosines(64, 48, 16).chunk(world.size, dim=1)[world.rank],
            epsilon=epsilon,
            iterations=5,
            global_samples=64,
            sum_over_ranks=collectives.all_reduce_sum,
        )
        for epsilon in (0.05, 0.005)
    ]


def test_two_processes_equal_one():
    ranks = on_ranks(2, _codes_of_a_rank)
    for epsilon, parts in zip((0.05, 0.005), zip(*ranks, strict=True), strict=True):
        whole = sinkhorn(cosines(64, 48, 16), epsilon=epsilon, iterations=5)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


class Operations(TorchDispatchMode):
    """Counts operations, and refuses those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select")
        assert not any(word in name for word in waits), name
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_six_operations_an_iteration_and_none_waits_for_the_host(epsilon: float):
    scores = cosines(16, 8, 4)
    counts = []
    for iterations in (2, 12):
        with Operations() as operations:
            sinkhorn(scores, epsilon=epsilon, iterations=iterations)
        counts.append(operations.count)
    assert (counts[1] - counts[0]) / 10 <= 6
