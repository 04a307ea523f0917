"""URL lists into tar shards: many downloads at a time, resumable at any moment.

Rows k * shard_size to (k + 1) * shard_size of the lists make shard k, so what belongs where depends
on the lists alone; a shard holds fewer images, as URLs fail. Two shards are open at a time, so that
the slow ends of one do not hold up the next. A shard is complete when each of its rows is settled:
it is written out, recorded with its failures, named, and handed to `on_shard` (an index beside it).
A kill between any two of these steps is made good by the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from selfsight.fetch.download import Downloader, Image
from selfsight.fetch.errors import FetchError
from selfsight.fetch.images import image_size
from selfsight.fetch.lists import Row, UrlLists, batches
from selfsight.fetch.report import Progress, make_report, table, write_report
from selfsight.fetch.settings import Settings
from selfsight.fetch.shard_writer import ShardWriter, publish, shard_name
from selfsight.fetch.state import Lock, State

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

OPEN_SHARDS = 2
WAITING = 4  # URLs that wait for their host's turn or a retry, for each request in flight
NAME_THREADS = 64  # names resolved at a time
OPEN_FILES = 65536  # connections and files that a process may hold, where the system allows it
UNREACHABLE = ("no such host", "no connection")

T = TypeVar("T")


class _Shard:
    """An open shard and what happened to its rows."""

    def __init__(self, writer: ShardWriter, repeated: set[int]) -> None:
        self.writer = writer
        self.repeated = repeated
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []


class FetchJob:
    """One job: `FetchJob(settings).run()`.

    `on_shard` gets the path of each shard when it has its final name; `resolver` replaces the
    system's.
    """

    def __init__(
        self,
        settings: Settings,
        on_shard: Callable[[Path], object] | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._settings, self._rules = settings, settings.rules
        self._rules.check_packages()
        self._on_shard, self._resolver = on_shard, resolver
        self._lists = UrlLists(settings.urls, settings.url_column, settings.keep_columns)
        self._folder = Path(str(settings.out)).expanduser()

    def run(self) -> dict[str, Any]:
        """Fetch until the lists end, or until SIGINT or SIGTERM; returns the report.

        Raises:
            ValueError: a mistake of the user, another job in the same folder, or a disk that
                cannot be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self._folder)
        except OSError as error:
            raise ValueError(
                f"out={self._folder} cannot be written to: {error.strerror}."
            ) from None
        self._progress = Progress(self._settings.progress)
        self._unreachable = 0  # in a row
        self._writers: set[ShardWriter] = set()
        _allow_open_files()
        # One thread does all writing, so that shards and state need no locks.
        self._disk = ThreadPoolExecutor(1, "selfsight-disk")
        self._reader = ThreadPoolExecutor(1, "selfsight-lists")
        try:
            report = asyncio.run(self._run())
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{self._folder} cannot be written to ({reason}): nothing is lost, so make room "
                "and start the same command again."
            ) from None
        finally:
            self._disk.shutdown()
            self._reader.shutdown()
            for writer in self._writers:  # opened for a task that was ended meanwhile
                with contextlib.suppress(OSError):
                    writer.suspend()
            self._progress.close()
            lock.close()
        print(table(report), flush=True)
        return report

    async def _run(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(NAME_THREADS, "selfsight-names"))
        stop = asyncio.Event()
        handled = _on_signals(loop, stop.set)
        start = time.monotonic()
        facts = {"lists": self._lists.fingerprint(), "shard_size": self._settings.shard_size}
        facts["drop_repeated_images"] = self._settings.drop_repeated_images
        self._state = await self._write(lambda: State(self._folder, facts))
        self._waiting = asyncio.Semaphore(WAITING * self._rules.at_once)
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(stop.wait())
        status = "stopped"
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            work.cancel()
            result = (await asyncio.gather(work, return_exceptions=True))[0]
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                status = "failed"
                raise _first(result)
            status = "stopped" if stop.is_set() and result is not True else "complete"
        finally:
            watch.cancel()
            for number in handled:
                loop.remove_signal_handler(number)
            report = await self._write(lambda: self._end(time.monotonic() - start, status))
        return report

    def _end(self, seconds: float, status: str) -> dict[str, Any]:
        try:
            self._state.add_seconds(seconds)
            report = make_report(self._state.totals(), status)
            write_report(self._folder, report)
            return report
        finally:
            self._state.close()

    async def _work(self) -> bool:
        """Settle every row of the lists; True when all is done."""
        done = await self._write(self._state.done)
        for number in await self._write(self._state.unpublished):
            await self._write(lambda n=number: self._publish(n))
        size = self._settings.shard_size
        first = next(n for n in range(len(done) + 1) if n not in done)
        reader = batches(self._lists.rows(first * size), size)
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(OPEN_SHARDS)
        async with (
            Downloader(self._rules, self._resolver) as downloader,
            asyncio.TaskGroup() as all_,
        ):
            while True:
                await places.acquire()
                rows = await loop.run_in_executor(self._reader, _next, reader)
                if rows is None:
                    break
                if rows[0].number // size in done:
                    places.release()
                    continue
                task = all_.create_task(self._fill(downloader, rows))
                task.add_done_callback(lambda _: places.release())
        return True

    async def _fill(self, downloader: Downloader, rows: list[Row]) -> None:
        """Settle the rows of one shard."""
        number = rows[0].number // self._settings.shard_size
        repeated = await self._write(lambda: self._state.repeated(rows))
        writer = await self._write(lambda: self._open(number))
        shard = _Shard(writer, repeated)
        try:
            async with asyncio.TaskGroup() as group:
                for row in rows:
                    if row.number in writer.entries:  # saved before a kill
                        await self._write(lambda r=row: self._known(writer, r.number))
                        self._progress.count(
                            "saved", int(writer.entries[row.number].get("bytes", 0))
                        )
                    elif row.number in repeated:
                        self._settle(shard, row, "repeated URL")
                    else:
                        await self._waiting.acquire()
                        task = group.create_task(self._one(downloader, shard, row))
                        task.add_done_callback(lambda _: self._waiting.release())
        except BaseException:
            await self._write(writer.suspend)
            raise
        await self._write(lambda: self._complete(number, len(rows), shard))
        self._writers.discard(writer)

    def _open(self, number: int) -> ShardWriter:
        writer = ShardWriter(self._folder, number)
        self._writers.add(writer)
        return writer

    async def _one(self, downloader: Downloader, shard: _Shard, row: Row) -> None:
        if not row.url:
            self._settle(shard, row, "no URL", listed=True)
            return
        try:
            image = await downloader.get(row.url)
        except FetchError as error:
            self._settle(shard, row, error.reason, error.detail, listed=True)
            self._watch_network(error.reason in UNREACHABLE)
            return
        self._watch_network(False)
        saved = await self._write(lambda: self._save(shard.writer, row, image))
        if saved:
            self._progress.count("saved", len(image.data))
        else:
            self._settle(shard, row, "repeated image")

    def _watch_network(self, unreachable: bool) -> None:
        """Stop the job when nothing is reached any more, before all the list counts as dead."""
        self._unreachable = self._unreachable + 1 if unreachable else 0
        limit = self._settings.max_unreachable
        if limit is not None and self._unreachable >= limit:
            raise ValueError(
                f"the last {limit:,} URLs reached no server, so the network seems to be gone: "
                "start the same command again when it is back, or set max_unreachable=null."
            )

    def _settle(
        self, shard: _Shard, row: Row, reason: str, detail: str = "", listed: bool = False
    ) -> None:
        """Note a row that gives no image; `listed` ones are failures."""
        shard.counts[reason] += 1
        self._progress.count(reason)
        if listed:
            line = {"key": f"{row.number:010d}", "url": row.url, "reason": reason}
            line |= {"detail": detail} if detail else {}
            shard.failures.append(line | {"host": _host(row.url)})

    # ------------------------------------------------- in the thread that writes

    async def _write(self, action: Callable[[], T]) -> T:
        # Shielded, so that a stop never leaves an action half known.
        future = asyncio.get_running_loop().run_in_executor(self._disk, action)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.gather(future, return_exceptions=True)
            raise

    def _known(self, writer: ShardWriter, row: int) -> None:
        if self._settings.drop_repeated_images:
            self._state.same_image(writer.entries[row]["sha256"], row)

    def _save(self, writer: ShardWriter, row: Row, image: Image) -> bool:
        """Whether the image was added; it is not where another row has it."""
        entry: dict[str, Any] = {**row.columns, "url": row.url, "status": 200}
        if image.url != row.url:
            entry["final_url"] = image.url
        entry["sha256"] = digest = hashlib.sha256(image.data).hexdigest()
        entry["bytes"] = len(image.data)
        if size := image_size(image.data):
            entry["width"], entry["height"] = size
        if (
            self._settings.drop_repeated_images
            and self._state.same_image(digest, row.number) is not None
        ):
            return False
        writer.add(row.number, image.data, image.extension, entry)
        return True

    def _complete(self, number: int, rows: int, shard: _Shard) -> None:
        writer = shard.writer
        writer.complete()
        shard.failures.sort(key=lambda line: line["key"])
        self._state.complete(
            number, rows, len(writer.entries), writer.image_bytes, shard.counts, shard.failures
        )
        if writer.entries:
            self._publish(number)
        else:
            writer.part.unlink()
        write_report(self._folder, make_report(self._state.totals(), "running"))

    def _publish(self, number: int) -> None:
        path = self._folder / shard_name(number)
        part = path.with_name(path.name + ".part")
        if part.exists():
            publish(part)
        if self._on_shard is not None and path.exists():
            self._on_shard(path)
        self._state.published(number)


def _next(reader: Iterator[list[Row]]) -> list[Row] | None:
    try:
        return next(reader, None)
    except Exception as error:  # a damaged list: each format has errors of its own
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"the lists of URLs cannot be read further: {reason}.") from None


def _allow_open_files() -> None:
    """Raise the soft limit of open files as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _first(error: BaseException) -> BaseException:
    """The error inside groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _on_signals(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> list[int]:
    """Call `action` at SIGINT and SIGTERM; a second one of a kind ends the process at once."""
    handled: list[int] = []

    def handle(number: int) -> None:
        loop.remove_signal_handler(number)
        handled.remove(number)
        action()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, handle, number)
        except (ValueError, RuntimeError):  # not in the main thread: the caller has the signals
            continue
        handled.append(number)
    return handled
