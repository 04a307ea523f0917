"""Several sources at once, in fixed proportions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from selfsight.data.sources.source import Record, Source


class Mixture(Source):
    """A weighted mix: every global batch holds the sources in these proportions.

    The stream gives each source its share of the lanes of a batch (the nearest whole numbers, at
    least one), and each source goes through its own passes. So a small source is repeated more
    often than a large one, as its weight asks.

    Args:
        sources: the sources by name.
        weights: by the same names, in any unit; null: in proportion to the numbers of images.

    Raises:
        ValueError: no source, a weight that is missing or not above 0, or unknown names.
    """

    def __init__(
        self, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source under `sources`.")
        for name, source in sources.items():
            if isinstance(source, Mixture):
                raise ValueError(f"the source {name} of a mixture is a mixture: list its parts.")
        if weights is not None and set(weights) != set(sources):
            odd = sorted(set(weights) ^ set(sources))
            raise ValueError(
                f"the weights and sources of a mixture have to name the same: {', '.join(odd)} "
                "is on one side only."
            )
        self.sources = list(sources.values())
        for name, source in sources.items():
            source.name = f"{name}/{source.name}"
        given = {k: len(s) for k, s in sources.items()} if weights is None else dict(weights)
        for name, weight in given.items():
            if not weight > 0:
                raise ValueError(
                    f"the weight of the source {name} is {weight}: it must be above 0."
                )
        total = sum(given.values())
        self.weights = [given[name] / total for name in sources]
        self.name = "+".join(sources)
        classes = [source.classes for source in self.sources]
        self.classes = classes[0] if all(c == classes[0] for c in classes) else None
        self._ends = None

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def read(self, index: int) -> Record:
        source, inner = self._of(index)
        return source.read(inner)

    def key(self, index: int) -> str:
        source, inner = self._of(index)
        return source.key(inner)

    def excerpt(self, limit: int) -> Source:
        shares = [max(1, round(limit * weight)) for weight in self.weights]
        parts = [source.excerpt(n) for source, n in zip(self.sources, shares, strict=True)]
        return Mixture({str(n): part for n, part in enumerate(parts)})

    def _of(self, index: int) -> tuple[Source, int]:
        if self._ends is None:
            self._ends = list(accumulate(len(source) for source in self.sources))
        start = 0
        for source, end in zip(self.sources, self._ends, strict=True):
            if index < end:
                return source, index - start
            start = end
        raise IndexError(f"{self.name} has {start} images, there is no image {index}.")
