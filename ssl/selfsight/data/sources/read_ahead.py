"""Opening shards in the background, before a lane comes to them."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from typing import Protocol

THREADS = 2  # in a process; each fetches one shard at a time
WAITING = 64  # hints that are kept; more are dropped, since a hint is only that


class _Opens(Protocol):
    def _opened(self, shard: int) -> object: ...


class ReadAhead:
    """Threads that open the shards of a source. They start with the first hint, and end with it."""

    def __init__(self, source: _Opens) -> None:
        self._source = weakref.ref(source)
        self._queue: queue.Queue[int | None] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._started = False

    def hint(self, shard: int) -> None:
        """Open that shard soon, unless that is already meant to be done."""
        with self._lock:
            if shard in self._asked:
                return
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(shard)
                self._asked.add(shard)
            if not self._started:
                self._started = True
                for _ in range(THREADS):
                    work = (self._source, self._queue, self._lock, self._asked)
                    threading.Thread(target=_work, args=work, daemon=True, name="shards").start()

    def __del__(self) -> None:
        try:
            for _ in range(THREADS):
                self._queue.put_nowait(None)
        except Exception:  # (full; or the interpreter is ending, and modules are gone)
            pass


def _work(source, waiting, lock, asked) -> None:
    while True:
        shard = waiting.get()
        owner = source()
        if shard is None or owner is None:
            return
        with contextlib.suppress(Exception):  # whoever reads the shard meets the error itself
            owner._opened(shard)
        del owner
        with lock:
            asked.discard(shard)
