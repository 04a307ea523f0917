"""Small notes between the ranks' background threads, through the store by which the ranks met.

No process group takes part: its collectives belong to the training thread. The notes have a
connection to the store of their own, so that neither thread waits for the other.
"""

import json
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

POLL = (0.005, 0.25)  # seconds between two looks, the first and the longest


class Abandoned(Exception):
    """Nobody wants the result any more."""


class Board:
    """Notes under `topic`, JSON by name. In a world of one they stay in this process.

    One thread at a time uses it.

    Args:
        topic: the same on all ranks, and new for each board.
        abandoned: once set, `read` ends with `Abandoned`.
    """

    def __init__(self, topic: str, abandoned: threading.Event) -> None:
        self.topic, self.abandoned = topic, abandoned
        self._own: dict[str, str] = {}
        self._store = None
        if dist.is_initialized():
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=60))

    def post(self, name: str, value: Any) -> None:
        """Put up a note; it is there for all ranks at once."""
        text = json.dumps(value)
        if self._store is None:
            self._own[name] = text
        else:
            self._store.set(self._key(name), text)

    def read(self, names: Sequence[str], seconds: float, *, any_of: bool = False) -> dict[str, Any]:
        """The notes `names`, or those that are there after `seconds`.

        Args:
            names: what to wait for.
            seconds: how long.
            any_of: one of them is enough.

        Raises:
            Abandoned: see the class.
            RuntimeError: the store is gone, and with it the first rank.
        """
        deadline = time.monotonic() + seconds
        pause, found, missing = POLL[0], {}, list(names)
        while missing:
            late = time.monotonic() > deadline
            if self._there(missing):
                there = missing
            elif any_of or late:
                there = [name for name in missing if self._there([name])]
            else:
                there = []  # one question for all of them, as long as there is time
            found |= {name: self._get(name) for name in there}
            missing = [name for name in missing if name not in found]
            if late or (any_of and found):
                break
            if missing and self.abandoned.wait(pause):
                raise Abandoned
            pause = min(2 * pause, POLL[1])
        return found

    def clear(self, names: Sequence[str]) -> None:
        """Take notes down."""
        for name in names:
            if self._store is None:
                self._own.pop(name, None)
            else:
                self._store.delete_key(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.topic}/{name}"

    def _there(self, names: list[str]) -> bool:
        if self._store is None:
            return all(name in self._own for name in names)
        return self._store.check([self._key(name) for name in names])

    def _get(self, name: str) -> Any:
        return json.loads(
            self._own[name] if self._store is None else self._store.get(self._key(name))
        )
