"""Downloads for code that is not asynchronous: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor

from selfsight.fetch.download import Downloader, Image
from selfsight.fetch.errors import FetchError
from selfsight.fetch.rules import Rules

NAME_THREADS = 16  # names resolved at a time


class LiveClient:
    """`get(url)` from any number of threads; `close()` ends it, at the latest with the process."""

    def __init__(self, rules: Rules) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        failure: list[Exception] = []
        self._downloader = Downloader(rules)
        thread = threading.Thread(
            target=_serve,
            args=(self._loop, self._downloader, self._stop, ready, failure),
            name="selfsight-fetch",
            daemon=True,
        )
        thread.start()
        ready.wait()
        if failure:
            thread.join()
            raise failure[0]
        self._close = weakref.finalize(self, _end, self._loop, self._stop, thread)

    def get(self, url: str) -> Image:
        """The image at `url`; FetchError says why there is none."""
        future = asyncio.run_coroutine_threadsafe(self._downloader.get(url), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise FetchError("stopped", "the downloads were ended") from None

    def close(self) -> None:
        self._close()


def _serve(
    loop: asyncio.AbstractEventLoop,
    downloader: Downloader,
    stop: asyncio.Event,
    ready: threading.Event,
    failure: list[Exception],
) -> None:
    asyncio.set_event_loop(loop)
    loop.set_default_executor(ThreadPoolExecutor(NAME_THREADS, "selfsight-names"))

    async def serve() -> None:
        try:
            await downloader.__aenter__()
        except Exception as error:  # raised where the client is made
            failure.append(error)
            return
        finally:
            ready.set()
        try:
            await stop.wait()
            this = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not this]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        finally:
            await downloader.__aexit__()

    try:
        loop.run_until_complete(serve())
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread) -> None:
    if thread.is_alive() and not loop.is_closed():
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=5)
