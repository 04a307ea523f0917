"""The list of samples that could not be used: `ledger.jsonl` in the run folder.

It is also the log by which the stream repeats itself. What could not be used once is passed over
when a resumed run comes to the same place, whatever it would do now: a URL that failed, a shard
that had vanished, an image over which a process died.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple


class Failure(NamedTuple):
    """One sample that could not be used, or a whole piece of a shard, and why.

    Attributes:
        source: name of the source.
        key: name of the sample, or of the shard.
        reason: one line.
        position: place in the stream: number of the entry in its lane * lanes + lane.
        turn: of the lane, where its whole piece was passed over; otherwise None.
    """

    source: str
    key: str
    reason: str
    position: int
    turn: int | None = None


class Ledger:
    """Append-only JSON lines {time, source, key, reason, position}, and turn for a whole piece.

    Apart from `time`, what is written is a function of the stream: after a kill, a run resumes from
    an older checkpoint and meets the same samples again, and those already listed are not listed
    twice. Several ranks of a node may share the file: each call appends whole lines in one write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[int] = set()
        self._torn = False

    def resume(self, position: int) -> dict[int, Failure]:
        """What is already listed from `position` on, by position (older ones never recur)."""
        listed: dict[int, Failure] = {}
        if self.path.exists():
            line = b"\n"
            with self.path.open("rb") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                        fields = {k: v for k, v in entry.items() if k in Failure._fields}
                        failure = Failure(**fields)
                        if failure.position >= position:
                            listed[failure.position] = failure
                    except (ValueError, TypeError, AttributeError):
                        continue  # a line cut short by a kill
            self._torn = not line.endswith(b"\n")
        self._known = set(listed)
        return listed

    def clear(self) -> None:
        """Begin anew: what a run listed that ended before it saved binds nobody."""
        self.path.unlink(missing_ok=True)

    def write(self, failures: Iterable[Failure]) -> None:
        """Append the failures that are not listed yet."""
        new = [failure for failure in failures if failure.position not in self._known]
        if not new:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        text = ""
        for failure in new:
            fields = {k: v for k, v in failure._asdict().items() if v is not None}
            text += json.dumps({"time": time, **fields}) + "\n"
        if self._torn:
            text, self._torn = "\n" + text, False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        self._known.update(failure.position for failure in new)
