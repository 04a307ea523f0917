"""Images fetched from a URL list while a run goes on.

For one machine and lists that fit in memory. What a URL gives depends on the web and the day, so
the promise that a run can be repeated exactly ends here: an image that cannot be had is replaced by
the next of its lane, with its reason in the ledger. The way to repeatable runs is to fetch into
shards first (`launch/fetch.py`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence

from selfsight.data.sources.source import Record, Source, StringTable
from selfsight.fetch.lists import UrlLists
from selfsight.fetch.live import LiveClient
from selfsight.fetch.rules import OPT_OUT, Rules


class UrlList(Source):
    """The distinct URLs of one or several lists, in their order; the key of a sample is its URL.

    `urls` is a file (txt, csv, tsv, parquet), a glob, a folder, or a list of these. The other
    arguments are those of `selfsight.fetch.rules.Rules`; they hold for each process that reads, so
    a host may meet `at_once_per_host` requests from each loader worker.

    Raises:
        ValueError: no list given or found, no URL in it, or a limit that makes no sense.
    """

    threads = 16
    per_process = ("_lock", "_client", "_process", "_inherited")

    def __init__(
        self,
        urls: str | Sequence[str] | None,
        url_column: str | None = None,
        contact: str | None = None,
        allow_addresses: Sequence[str] = (),
        at_once_per_host: int = 4,
        delay_per_host: float = 0.0,
        retries: int = 1,
        max_wait: float = 10.0,
        max_bytes: int = 20_000_000,
        max_seconds: float = 20.0,
        first_byte_seconds: float = 10.0,
        max_redirects: int = 5,
        robots: bool = True,
        opt_out: Sequence[str] = OPT_OUT,
        tdm_reservation: bool = True,
    ) -> None:
        if not urls:
            raise ValueError("a list of URLs is needed: set data.urls=/path/to/list.parquet.")
        self._rules = Rules(
            max_bytes=max_bytes,
            max_seconds=max_seconds,
            first_byte_seconds=first_byte_seconds,
            max_redirects=max_redirects,
            retries=retries,
            max_wait=max_wait,
            at_once_per_host=at_once_per_host,
            delay_per_host=delay_per_host,
            allow_addresses=tuple(allow_addresses),
            robots=robots,
            opt_out=tuple(opt_out),
            tdm_reservation=tdm_reservation,
            contact=contact,
        )
        self._rules.check_packages()
        lists = UrlLists(urls, url_column)
        distinct = list(dict.fromkeys(row.url for row in lists.rows() if row.url))
        if not distinct:
            raise ValueError(f"{', '.join(map(str, lists.files))} hold no URL.")
        self.name = lists.files[0].stem
        self._urls = StringTable(distinct)
        text = "\n".join(distinct).encode("utf-8", "surrogateescape")
        self._hash = hashlib.sha256(text).hexdigest()[:16]
        self.prepare()

    def prepare(self) -> None:
        self._lock = threading.Lock()
        self._client: LiveClient | None = None
        self._process = 0
        self._inherited: LiveClient | None = None

    def __len__(self) -> int:
        return len(self._urls)

    def key(self, index: int) -> str:
        return self._urls[index]

    def read(self, index: int) -> Record:
        """Download image `index`. OSError says why it cannot be had."""
        url = self._urls[index]
        return Record(url, self._connect().get(url).data)

    def fingerprint(self) -> str:
        return self._hash

    def close(self) -> None:
        """End the downloads of this process."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None and self._process == os.getpid():
                client.close()

    def _connect(self) -> LiveClient:
        with self._lock:
            if self._client is None or self._process != os.getpid():
                # A forked process inherits a client without the thread that serves it. It is kept,
                # since what its destructor did would reach into the other process's event loop.
                self._inherited = self._client
                self._client, self._process = LiveClient(self._rules), os.getpid()
            return self._client
