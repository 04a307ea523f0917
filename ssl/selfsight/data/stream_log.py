"""What is settled about the stream while a run goes on: `stream.jsonl` in the run folder.

The order of the data is a function of the configuration, the seed and this log. It holds the list
of shards that each pass of a growing source has, settled once, when the first lane of any rank
comes to that pass; for other sources a fingerprint, so that a resume with other data is noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsight.data.sources.source import Source
from selfsight.distributed import collectives


class ForeignData(ValueError):
    """The data are not those that the run was started with."""


class StreamLog:
    """The log of the sources of a run. Building it is a collective: all ranks do it together.

    The lists of growing sources are put back to what is recorded, and are the same on all ranks.

    Args:
        path: the file.
        sources: in the order of the mixture.
        fresh: whether to begin a new log, whatever is recorded.
        strict: whether other data than recorded are refused.

    Attributes:
        passes: for each source, the number of shards in each settled pass.

    Raises:
        ForeignData: a source lists something else than the log, and `strict` is set.
    """

    def __init__(
        self, path: Path, sources: Sequence[Source], *, fresh: bool = False, strict: bool = True
    ) -> None:
        self.path, self._sources = path, sources
        own = [_first(n, source) for n, source in enumerate(sources)]
        lines: list[dict[str, Any]] = []
        if collectives.rank() == 0:
            lines = (not fresh and _read(path)) or own
        lines = collectives.broadcast_json(lines)
        self._names: list[list[list[str]]] = [[] for _ in sources]
        for line in lines:
            if line["source"] >= len(sources):
                continue
            names = self._names[line["source"]]
            if line["pass"] == len(names):
                names.append(line.get("added", []))
        recorded = {line["source"]: line for line in lines if line["pass"] == 0}
        problem = None
        self.passes: list[list[int]] = []
        for n, source in enumerate(sources):
            first = recorded.get(n)
            if first is None or first["name"] != source.name:
                was = "is not among those" if first is None else f"was {first['name']}"
                problem = f"the source {source.name} {was} when this run was started"
                self._names[n] = []
            elif source.grows and self._names[n]:
                counts = []
                for names in self._names[n]:
                    counts.append((counts[-1] if counts else 0) + len(names))
                source.adopt([name for names in self._names[n] for name in names])
                source.founders = counts[0]
                self.passes.append(counts)
                continue
            elif first["fingerprint"] != own[n]["fingerprint"]:
                problem = (
                    f"the source {source.name} has changed: it listed {first['fingerprint']} when "
                    f"this run was started, and now {own[n]['fingerprint']}"
                )
            self.passes.append([source.shards()])
        if problem is not None and strict:
            raise ForeignData(
                f"{problem}: the order of the data would not go on; put the data back, choose "
                "another name=, or resume=anyway"
            )
        if collectives.rank() == 0:  # anew, since its last line may have been cut by a kill
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            kept = lines if problem is None else own
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(path)
        collectives.barrier()

    def settle(self, number: int, epoch: int) -> list[str]:
        """Names of the shards that join a source with pass `epoch`; the same on every rank.

        The rank that asks first looks at the source and writes the log; the others are told.
        """
        known = self._names[number]
        assert epoch <= len(known), (number, epoch, len(known))
        if epoch == len(known):
            key = f"stream/{number}/{epoch}"
            known.append(collectives.first_json(key, lambda: self._poll(number, epoch)))
        return known[epoch]

    def _poll(self, number: int, epoch: int) -> list[str]:
        source = self._sources[number]
        names = source.poll()
        line = {"source": number, "name": source.name, "pass": epoch, "added": names}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return names


def _first(number: int, source: Source) -> dict[str, Any]:
    """What is recorded of a source when a run starts."""
    line: dict[str, Any] = {"source": number, "name": source.name, "pass": 0}
    if source.grows:
        return line | {"fingerprint": "grows", "added": source.listing()}
    return line | {"fingerprint": source.fingerprint()}


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last may have been cut by a kill."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "source" in line and "pass" in line:
            lines.append(line)
    return lines
