"""From what was seen of each image to the figures of a report."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfsight.data.multicrop import CropGroup
from selfsight.inspection.content import KINDS
from selfsight.inspection.examine import Seen

BINS = 24
EXAMPLES = 5  # names of images that stand for each finding


def image_figures(seen: Sequence[Seen]) -> dict[str, Any]:
    """What is in the images that can be used: sizes, modes, empty and repeated ones.

    Formats are of everything that was fetched, by content, the rest of what can be used.
    """
    used = [image for image in seen if not image.reason]
    fetched = [image for image in seen if image.digest]
    columns = {
        "width": [image.width for image in used],
        "height": [image.height for image in used],
        "megapixels": [image.width * image.height / 1e6 for image in used],
        "aspect_ratio": [image.width / image.height for image in used],
        "bytes": [image.bytes for image in used if image.bytes],
    }
    kinds = Counter(kind for image in used for kind in image.content.kinds)
    return {
        "sizes": {name: distribution(values) for name, values in columns.items()},
        "formats": dict(Counter(image.content.format for image in fetched).most_common()),
        "modes": dict(Counter(image.content.mode for image in used).most_common()),
        "kinds": {kind: _found(kinds[kind], used) for kind in KINDS},
        "black": _found([image for image in used if image.black], used),
        "plain": _found([image for image in used if image.plain and not image.black], used),
        "duplicates": _duplicates(used),
    }


def distribution(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, 5 and 95 %, ends, and a histogram over bins of equal ratio; None of nothing."""
    if not values:
        return None
    array = np.asarray(values, np.float64)
    low, high = float(array.min()), float(array.max())
    edges = np.geomspace(low, high, BINS + 1) if high > low else np.array([low, high])
    edges[0], edges[-1] = low, high
    counts = np.histogram(array, edges)[0] if high > low else np.array([len(array)])
    p05, median, p95 = np.percentile(array, [5, 50, 95]).tolist()
    return {
        "count": len(array),
        "min": low,
        "p05": p05,
        "median": median,
        "p95": p95,
        "max": high,
        "mean": float(array.mean()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def bad_figures(seen: Sequence[Seen], most: float) -> dict[str, Any]:
    """What a run with these settings would not use, by reason, beside the share it allows."""
    bad = [image for image in seen if image.reason]
    by_pattern: dict[str, list[Seen]] = defaultdict(list)
    for image in bad:
        by_pattern[_pattern(image)].append(image)
    reasons = [
        {
            "reason": same[0].reason if len({i.reason for i in same}) == 1 else pattern,
            **_found(same, seen),
            "what": dict(Counter(i.content.format for i in same if i.digest).most_common()),
        }
        for pattern, same in sorted(by_pattern.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    share = len(bad) / len(seen) if seen else 0.0
    return {"count": len(bad), "share": share, "most_allowed": most, "reasons": reasons}


def label_figures(seen: Sequence[Seen], classes: Sequence[str] | None) -> dict[str, Any] | None:
    """Images of each class among those that can be used; None without labels."""
    counts = Counter(i.label for i in seen if not i.reason and i.label is not None)
    if not counts:
        return None
    names = classes or []
    named = {
        (names[label] if 0 <= label < len(names) else str(label)): count
        for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    }
    return {"labelled": counts.total(), "classes": len(counts), "counts": named}


def crop_figures(seen: Sequence[Seen], groups: Mapping[str, CropGroup]) -> dict[str, Any]:
    """Of each group the crops that are enlarged: smaller than their view in height or width.

    `magnification` is the side of the view over the shorter side of the crop.
    """
    found, first = {}, 0
    for name, group in groups.items():
        shorter = [
            min(box)
            for image in seen
            if not image.reason
            for box in image.boxes[first : first + group.count]
        ]
        first += group.count
        enlarged = sum(side < group.size for side in shorter)
        magnification = [group.size / side for side in shorter]
        found[name] = {
            "size": group.size,
            "views": group.count,
            "crops": len(shorter),
            "enlarged": enlarged,
            "enlarged_share": enlarged / len(shorter) if shorter else 0.0,
            "magnification": distribution(magnification),
        }
    return found


def source_figures(seen: Sequence[Seen], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each source of a mixture its share of the sample and of bad images."""
    rows = []
    for number, name in enumerate(names):
        own = [image for image in seen if image.source == number]
        good = [image.width * image.height / 1e6 for image in own if not image.reason]
        rows.append(
            {
                "name": name,
                "read": len(own),
                "share": len(own) / len(seen) if seen else 0.0,
                "bad": len(own) - len(good),
                "bad_share": (len(own) - len(good)) / len(own) if own else 0.0,
                "median_megapixels": float(np.median(good)) if good else None,
            }
        )
    return rows


def _found(images: Sequence[Seen] | int, of: Sequence[Seen]) -> dict[str, Any]:
    """A count, its share, and some keys where the images are given."""
    count = images if isinstance(images, int) else len(images)
    found: dict[str, Any] = {"count": count, "share": count / len(of) if of else 0.0}
    if not isinstance(images, int):
        found["examples"] = [image.key for image in images[:EXAMPLES]]
    return found


def _duplicates(images: Sequence[Seen]) -> dict[str, Any]:
    """Images that are a copy, byte by byte, of one that came before; the largest sets of them."""
    same: dict[bytes, list[Seen]] = defaultdict(list)
    for image in images:
        same[image.digest].append(image)
    sets = sorted((s for s in same.values() if len(s) > 1), key=len, reverse=True)
    count = sum(len(s) - 1 for s in sets)
    return {
        "count": count,
        "share": count / len(images) if images else 0.0,
        "sets": [
            {"images": len(s), "keys": [i.key for i in s[:EXAMPLES]]} for s in sets[:EXAMPLES]
        ],
    }


def _pattern(image: Seen) -> str:
    """The reason without what differs from image to image: its name, and numbers."""
    text = image.reason
    for name in {image.key, image.key.rpartition("/")[2], image.key.rpartition(":")[2]} - {""}:
        text = text.replace(name, "…")
    return re.sub(r"\d(?:[\d,.]*\d)?", "#", text)
