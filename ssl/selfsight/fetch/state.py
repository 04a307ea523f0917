"""What a fetching job has done, in one small SQLite file beside its shards.

It holds a line for each complete shard, the hash of each URL with the row that has it first, the
hashes of images where duplicates are dropped, and failures by host. The open shards themselves hold
what belongs to them (see shard_writer), so whatever is not committed here is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfsight.fetch.lists import Row

DATABASE, LOCK = "fetch.sqlite", "fetch.lock"
FAILURES = "failures.jsonl"

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS shards (
    number INTEGER PRIMARY KEY, rows INTEGER, images INTEGER, bytes INTEGER, counts TEXT,
    failures_end INTEGER, published INTEGER);
CREATE TABLE IF NOT EXISTS urls (hash INTEGER PRIMARY KEY, row INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (hash BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, failures INTEGER);
"""


class Lock:
    """The right to write into a folder, until closed or the process ends.

    Raises:
        ValueError: another job has it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            who = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{who} is fetching into {folder}: wait for it, stop it, or use another out=."
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class State:
    """The state of the job in `folder`. All calls come from one thread.

    Raises:
        ValueError: the folder was begun with other `facts` (a list, a shard size, ...).
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self._base = sqlite3.connect(folder / DATABASE, isolation_level="DEFERRED")
        try:
            self._base.executescript(_TABLES)
            known = dict(self._base.execute("SELECT name, value FROM facts"))
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise ValueError(
                f"{folder / DATABASE} cannot be read ({error}): restore it, or use another out=."
            ) from None
        for name, value in facts.items():
            text = json.dumps(value)
            if known.setdefault(name, text) != text:
                self._base.close()
                change = "" if name == "lists" else f" ({known[name]}, now {text})"
                raise ValueError(
                    f"{folder} was begun with another {NAMES.get(name, name)}{change}: "
                    "use the same, or another out=."
                )
        with self._base:
            self._base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", known.items())
        failures = folder / FAILURES
        end = self._base.execute("SELECT max(failures_end) FROM shards").fetchone()[0] or 0
        if failures.exists() and failures.stat().st_size > end:
            os.truncate(failures, end)  # lines of a shard whose completion was not recorded

    def close(self) -> None:
        self._base.commit()
        self._base.close()

    def done(self) -> set[int]:
        """Numbers of the complete shards."""
        return {n for (n,) in self._base.execute("SELECT number FROM shards")}

    def unpublished(self) -> list[int]:
        """Complete shards with images that may not have their final name or index yet."""
        query = "SELECT number FROM shards WHERE published = 0 AND images > 0 ORDER BY number"
        return [n for (n,) in self._base.execute(query)]

    def published(self, number: int) -> None:
        with self._base:
            self._base.execute("UPDATE shards SET published = 1 WHERE number = ?", (number,))

    def repeated(self, rows: Iterable[Row]) -> set[int]:
        """Numbers of the rows whose URL an earlier row has; the others are remembered."""
        found = set()
        with self._base:
            for row in rows:
                if not row.url:
                    continue
                key = _hash(row.url)
                added = self._base.execute(
                    "INSERT OR IGNORE INTO urls VALUES (?, ?)", (key, row.number)
                )
                if added.rowcount == 0:
                    (first,) = self._base.execute(
                        "SELECT row FROM urls WHERE hash = ?", (key,)
                    ).fetchone()
                    if first != row.number:
                        found.add(row.number)
        return found

    def same_image(self, sha256: str, row: int) -> int | None:
        """The other row that has this image already; if there is none, this one is remembered."""
        key = bytes.fromhex(sha256)
        self._base.execute("INSERT OR IGNORE INTO images VALUES (?, ?)", (key, row))
        query = "SELECT row FROM images WHERE hash = ?"
        (first,) = self._base.execute(query, (key,)).fetchone()
        return None if first == row else first

    def complete(
        self,
        number: int,
        rows: int,
        images: int,
        image_bytes: int,
        counts: Mapping[str, int],
        failures: list[dict[str, Any]],
    ) -> None:
        """Record a shard: its failures go to the list, then all else in one transaction."""
        path = self._folder / FAILURES
        with path.open("ab") as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in failures)
            file.flush()
            os.fsync(file.fileno())
            end = file.tell()
        hosts = Counter(str(line["host"]) for line in failures if line.get("host"))
        with self._base:
            self._base.execute(
                "INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?, ?, 0)",
                (number, rows, images, image_bytes, json.dumps(counts), end),
            )
            self._base.executemany(
                "INSERT INTO hosts VALUES (?, ?) "
                "ON CONFLICT(host) DO UPDATE SET failures = failures + excluded.failures",
                hosts.items(),
            )

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on the job, over all its starts."""
        with self._base:
            self._base.execute(
                "INSERT INTO facts VALUES ('seconds', ?) ON CONFLICT(name) DO UPDATE SET "
                "value = CAST(value AS REAL) + excluded.value",
                (seconds,),
            )

    def totals(self) -> dict[str, Any]:
        """Counts over all complete shards, and the hosts with most failures."""
        counts: Counter[str] = Counter()
        rows = images = size = shards = 0
        query = "SELECT rows, images, bytes, counts FROM shards"
        for shard_rows, shard_images, shard_bytes, text in self._base.execute(query):
            counts.update(json.loads(text))
            rows, images, size = rows + shard_rows, images + shard_images, size + shard_bytes
            shards += shard_images > 0
        hosts = self._base.execute(
            "SELECT host, failures FROM hosts ORDER BY failures DESC, host LIMIT 20"
        )
        seconds = self._base.execute("SELECT value FROM facts WHERE name = 'seconds'").fetchone()
        return {
            "rows": rows,
            "saved": images,
            "bytes": size,
            "shards": shards,
            "reasons": dict(counts.most_common()),
            "hosts": dict(hosts.fetchall()),
            "seconds": round(float(seconds[0]), 1) if seconds else 0.0,
        }


NAMES = {"lists": "list of URLs"}


def _hash(url: str) -> int:
    """64 bits of the URL: among a billion URLs, a false repetition has a chance of 3 %."""
    digest = hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
