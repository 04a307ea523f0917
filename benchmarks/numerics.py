"""How much faster are Sinkhorn, the swapped loss and LARS than plain code for the same numbers?

    python benchmarks/numerics.py

The references below are written here, in the style of the released algorithms: the whole matrix
rewritten in each Sinkhorn iteration, one log-softmax a pair of crops, a Python loop over tensors
with two reads of the device each. Ours and the reference take turns in one process on one thread,
after one warm-up each; figures are medians of the process's CPU time. Each pair is compared
in value before it is timed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.nn import Parameter

from selfsight.losses.sinkhorn import sinkhorn
from selfsight.losses.swapped_prediction import swapped_prediction_loss
from selfsight.optim.lars import LARS

TRUST, DECAY, EPS, MOMENTUM, RATE = 0.001, 1e-5, 1e-8, 0.9, 0.1


def reference_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's order of operations on one crop, prototypes by samples."""
    q = torch.exp(scores / epsilon).t()
    prototypes, samples = q.shape
    q /= torch.sum(q)
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= samples
    q *= samples
    return q.t()


def reference_loss(scores_by_view: list[Tensor], codes: Tensor, temperature: float) -> Tensor:
    """The mean over pairs of crops, each with a log-softmax of its own."""
    crops = [crop for scores in scores_by_view for crop in scores]
    loss = torch.zeros(())
    for own, code in enumerate(codes):
        part = torch.zeros(())
        for number, crop in enumerate(crops):
            if number != own:
                log_p = torch.nn.functional.log_softmax(crop / temperature, dim=1)
                part = part - torch.mean(torch.sum(code * log_p, dim=1))
        loss = loss + part / (len(crops) - 1)
    return loss / len(codes)


class ReferenceLARS:
    """Apex LARC's rule, tensor by tensor, around PyTorch's SGD."""

    def __init__(self, params: list[Parameter]) -> None:
        self.params = params
        self.inner = torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            assert p.grad is not None
            weight_norm, gradient_norm = torch.norm(p), torch.norm(p.grad)
            if weight_norm != 0 and gradient_norm != 0:
                scale = TRUST * weight_norm / (gradient_norm + weight_norm * DECAY + EPS)
                p.grad += DECAY * p
                p.grad *= scale
        self.inner.step()


def alternate(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict:
    """Median CPU milliseconds of both, taking turns, and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for function, kept in zip((ours, theirs), times, strict=True):
            begin = time.process_time()
            function()
            if repeat:
                kept.append((time.process_time() - begin) * 1e3)
    mine, other = (statistics.median(kept) for kept in times)
    return {
        "ours_ms": round(mine, 1),
        "reference_ms": round(other, 1),
        "ratio": round(other / mine, 2),
    }


def cosines(crops: int, samples: int, prototypes: int) -> Tensor:
    features = torch.nn.functional.normalize(torch.randn(crops, samples, 256), dim=-1)
    weights = torch.nn.functional.normalize(torch.randn(prototypes, 256), dim=-1)
    return features @ weights.T


def measure_sinkhorn(
    samples: int, prototypes: int, iterations: int, epsilon: float, repeats: int
) -> dict:
    scores = cosines(2, samples, prototypes)

    def ours() -> Tensor:
        return sinkhorn(scores, epsilon=epsilon, iterations=iterations)

    def theirs() -> Tensor:
        return torch.stack([reference_sinkhorn(crop, epsilon, iterations) for crop in scores])

    difference = (ours() - theirs()).abs().max().item()
    return alternate(ours, theirs, repeats) | {"largest_difference": difference}


def measure_loss(samples: int, prototypes: int, repeats: int) -> dict:
    all_scores = cosines(6, samples, prototypes)
    codes = sinkhorn(all_scores[:2], epsilon=0.05, iterations=3)
    views = [all_scores[:2].clone().requires_grad_(), all_scores[2:].clone().requires_grad_()]

    def ours() -> tuple[Tensor, ...]:
        loss = swapped_prediction_loss(views, codes, temperature=0.1)
        return torch.autograd.grad(loss, views)

    def theirs() -> tuple[Tensor, ...]:
        return torch.autograd.grad(reference_loss(views, codes, 0.1), views)

    mine, other = torch.cat(ours()), torch.cat(theirs())
    difference = ((mine - other).norm() / other.norm()).item()
    return alternate(ours, theirs, repeats) | {"relative_gradient_difference": difference}


def measure_lars(repeats: int) -> dict:
    shapes = [p.shape for p in torchvision.models.regnet_y_16gf().parameters()]
    weights = [torch.randn(shape) * 0.02 for shape in shapes]
    gradients = [torch.randn(shape) * 1e-3 for shape in shapes]
    first = [Parameter(weight.clone()) for weight in weights]
    second = [Parameter(weight) for weight in weights]
    for params in (first, second):
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient.clone()
    lars = LARS(first, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
    larc = ReferenceLARS(second)
    start = [weight.clone() for weight in weights]
    lars.step()
    larc.step()
    moved = [(p - w, q - w) for p, q, w in zip(first, second, start, strict=True)]
    difference = max(((a - b).norm() / b.norm()).item() for a, b in moved)
    return alternate(lars.step, larc.step, repeats) | {"relative_update_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter([platform.processor()])
    )
    repeats = options.repeats
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": 1,
        "repeats": repeats,
        "sinkhorn 2x256x16000, 10 iterations, epsilon 0.05": measure_sinkhorn(
            256, 16000, 10, 0.05, repeats
        ),
        "sinkhorn 2x512x16000, 10 iterations, epsilon 0.05": measure_sinkhorn(
            512, 16000, 10, 0.05, repeats
        ),
        "sinkhorn 2x512x3000, 3 iterations, epsilon 0.05": measure_sinkhorn(
            512, 3000, 3, 0.05, repeats
        ),
        "sinkhorn 2x256x16000, 10 iterations, epsilon 0.02 (log form)": measure_sinkhorn(
            256, 16000, 10, 0.02, repeats
        ),
        "swapped prediction, 2+4 crops, B 64, K 16000, forward and backward": measure_loss(
            64, 16000, repeats
        ),
        "LARS step, tensors of torchvision's regnet_y_16gf": measure_lars(repeats),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
