"""The list of samples that could not be used: `ledger.jsonl` in the run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple


class Failure(NamedTuple):
    """One sample that could not be used, and why."""

    source: str
    key: str
    reason: str
    position: int


class Ledger:
    """Append-only JSON lines {time, source, key, reason, position}.

    Apart from `time`, what is written is a function of the stream: after a kill, a run resumes from
    an older checkpoint and meets the same samples again, and those already listed are not listed
    twice. Several ranks of a node may share the file: each call appends whole lines in one write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[int] = set()
        self._torn = False

    def resume(self, position: int) -> None:
        """Read which positions from `position` on are already listed (older ones never recur)."""
        self._known = set()
        if not self.path.exists():
            return
        line = b"\n"
        with self.path.open("rb") as file:
            for line in file:
                try:
                    listed = int(json.loads(line)["position"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a kill
                if listed >= position:
                    self._known.add(listed)
        self._torn = not line.endswith(b"\n")

    def write(self, failures: Iterable[Failure]) -> None:
        """Append the failures that are not listed yet."""
        new = [failure for failure in failures if failure.position not in self._known]
        if not new:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        text = "".join(json.dumps({"time": time, **f._asdict()}) + "\n" for f in new)
        if self._torn:
            text, self._torn = "\n" + text, False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        self._known.update(failure.position for failure in new)
