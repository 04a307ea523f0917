"""What a report shows of the features: which images are alike, where they lie, which prototypes
they use, and where a vision transformer looks. Taken from an evaluation that has just been made;
indices are those of `pictured` images, the same in the whole run."""

from typing import Any

import torch
from torch import Tensor

from selfsight.distributed.shards import is_sharded
from selfsight.evals.online import OnlineEvaluation, evaluating
from selfsight.methods.method import Method
from selfsight.pictures.attention import attends, class_attention
from selfsight.pictures.components import principal
from selfsight.pictures.neighbours import nearest

PICTURED = 600  # images of the bank that a report may show
QUERIES, NEIGHBOURS = 8, 7
ATTENTIVE = 6  # images whose attention is shown
SHOWN_PROTOTYPES, THEIR_IMAGES = 4, 8  # of the most, the median and the least used each


def pictured(evaluation: OnlineEvaluation) -> Tensor:
    """Indices of the bank's images that may be shown, evenly spread."""
    count = min(PICTURED, len(evaluation.bank))
    return torch.arange(count) * len(evaluation.bank) // count


def images(evaluation: OnlineEvaluation) -> tuple[Tensor, list[int]]:
    """The pictured images, (n, c, s, s), and their labels, -1 for none."""
    chosen = pictured(evaluation)
    return evaluation.bank[chosen], evaluation.bank_labels[chosen].tolist()


@torch.no_grad()
def observe(method: Method, evaluation: OnlineEvaluation) -> dict[str, Any]:
    """What can be shown after `evaluation.run(method)`, as plain values. Of sharded weights nothing
    is asked but what the evaluation has gathered already."""
    chosen = pictured(evaluation)
    assert evaluation.features is not None
    features = evaluation.features[chosen]
    seen: dict[str, Any] = {"neighbours": _neighbours(features), "map": _map(features)}
    if any(is_sharded(p) for p in method.parameters()):
        return seen
    with evaluating(method):
        scores = method.scores(features.to(evaluation.device))
        if scores is not None:
            seen["prototypes"] = _prototypes(scores.float().cpu())
        if attends(method.trunk):
            few = torch.arange(min(ATTENTIVE, len(chosen))) * len(chosen) // ATTENTIVE
            inputs = method.normalize_pixels(evaluation.bank[chosen[few]].to(evaluation.device))
            with evaluation.autocast():
                maps = class_attention(method.trunk, inputs).cpu()
            seen["attention"] = {"images": few.tolist(), "maps": _rounded(maps)}
    return seen


def _neighbours(features: Tensor) -> list[dict[str, Any]]:
    count = min(QUERIES, len(features))
    queries = torch.arange(count) * len(features) // count
    cosines, indices = nearest(features[queries], features, NEIGHBOURS, own=queries)
    return [
        {"image": int(query), "alike": near.tolist(), "cosines": _rounded(cosine)}
        for query, near, cosine in zip(queries, indices, cosines, strict=True)
    ]


def _map(features: Tensor) -> list[list[float]]:
    """The first two principal components of unit features, within the middle 98 % of each."""
    scores = principal(torch.nn.functional.normalize(features, dim=1), 2)
    ordered = scores.sort(0).values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.01, 0.99))
    return _rounded(((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1))


def _prototypes(scores: Tensor) -> dict[str, Any]:
    """Images nearest to the most, the median and the least used prototypes, by scores (n, K)."""
    used = scores.argmax(1).bincount(minlength=scores.shape[1])
    order = used.argsort(descending=True, stable=True)
    some = int((used > 0).sum())
    each = min(SHOWN_PROTOTYPES, len(order))
    middle = max(0, min(some // 2, len(order)) - each // 2)
    kinds = {
        "most used": order[:each],
        "median of those used": order[middle : middle + each],
        "least used": order[-each:],
    }
    return {
        "count": scores.shape[1],
        "used": some,
        "images": len(scores),
        "rows": [
            {
                "kind": kind,
                "prototype": int(k),
                "used": int(used[k]),
                "images": scores[:, k].topk(min(THEIR_IMAGES, len(scores))).indices.tolist(),
            }
            for kind, chosen in kinds.items()
            for k in chosen
        ],
    }


def _rounded(values: Tensor) -> Any:
    """Nested lists with the digits that a picture needs."""
    significant = values.double().abs().clamp(min=1e-30).log10().floor()
    scale = 10 ** (3 - significant)
    return ((values.double() * scale).round() / scale).tolist()
