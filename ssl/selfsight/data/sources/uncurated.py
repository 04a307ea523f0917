"""The uncurated stream: tar shards from one place, or from several in fixed proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Source


def uncurated_stream(
    shards: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
    weights: Mapping[str, float] | None = None,
    cache: str | None = None,
    cache_gb: float = 50.0,
    index: str | None = None,
    pieces: int = 16,
    whole_index: bool | None = None,
    grows: bool | None = None,
    retry_seconds: float = 120.0,
) -> Source:
    """Tar shards, or a mixture where `shards` gives several sets by name.

    Args:
        shards: as `TarShards` takes them, or {name: shards, ...}.
        weights: {name: weight, ...} of several sets, in any unit; null: their numbers of images,
            where those are known without reading all shards.
        cache, cache_gb, index, pieces, whole_index, grows, retry_seconds: as for `TarShards`. Sets
            share one cache.

    Raises:
        ValueError: as `TarShards` and `Mixture`; weights for a single set.
    """

    def one(place: str | Sequence[str] | None) -> TarShards:
        return TarShards(
            place,
            cache=cache,
            cache_gb=cache_gb,
            index=index,
            pieces=pieces,
            whole_index=whole_index,
            grows=grows,
            retry_seconds=retry_seconds,
        )

    if not isinstance(shards, Mapping):
        if weights is not None:
            raise ValueError(
                "weights are for several sets of shards: set data.shards={a: ..., b: ...} with "
                "their names, or data.weights=null."
            )
        return one(shards)
    try:
        return Mixture({name: one(place) for name, place in shards.items()}, weights)
    except ValueError as error:
        if weights is None and "is not known before" in str(error):
            raise ValueError(
                "how large the sets of shards are is not known before all of them are read: give "
                f"their proportions, as data.weights={{{', '.join(f'{n}: 1' for n in shards)}}}."
            ) from None
        raise
