"""Reading URLs live: the contract of a source over real requests."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from selfsight.data.sources.urls import UrlList
from tests.fetch import servers
from tests.fetch.servers import jpeg, numbered, reply, serve


def source(path: Path, **values: Any) -> UrlList:
    return UrlList(str(path), allow_addresses=["127.0.0.1"], **{"retries": 0, **values})


def test_images_and_reasons_from_many_threads(tmp_path):
    with serve(fallback=servers.slow(0.01, numbered)) as server:
        urls = [server.url(f"/{n}.jpg") for n in range(30)]
        urls += [server.url("/none"), "http://169.254.169.254/latest/", urls[3]]
        path = tmp_path / "list.txt"
        path.write_text("\n".join(urls))
        found = source(path, at_once_per_host=6)
        assert len(found) == found.shards() == 32  # the repeated one counts once
        assert found.threads > 0 and found.name == "list"
        assert found.key(31) == "http://169.254.169.254/latest/"
        with ThreadPoolExecutor(found.threads) as pool:
            records = list(pool.map(found.read, range(30)))
        assert [r.data for r in records] == [jpeg(n) for n in range(30)]
        assert [r.key for r in records] == urls[:30]
        assert 1 < server.most_at_once <= 6
        with pytest.raises(OSError, match="status 404"):
            found.read(30)
        with pytest.raises(OSError, match="forbidden address"):
            found.read(31)
        assert found.fetch(5, 0, 0).data == jpeg(5) and found.length(5, 0) == 1
        found.close()
        assert found.read(2).data == jpeg(2)  # begins anew
        found.close()
    assert not [t for t in threading.enumerate() if t.name == "selfsight-fetch"]


def test_another_process_begins_its_own(tmp_path):
    """Pickled, and forked while downloads of this process are open."""
    with serve(fallback=numbered) as server:
        path = tmp_path / "list.txt"
        path.write_text("\n".join(server.url(f"/{n}.jpg") for n in range(8)))
        found = source(path)
        assert found.read(0).data == jpeg(0)
        copy = pickle.loads(pickle.dumps(found))
        assert copy.fingerprint() == found.fingerprint()
        assert copy.read(1).data == jpeg(1)
        copy.close()
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)

        def read() -> None:
            send.send([found.read(n).data for n in range(8)])

        process = context.Process(target=read)
        process.start()
        assert receive.poll(20)
        assert receive.recv() == [jpeg(n) for n in range(8)]
        process.join(20)
        assert process.exitcode == 0
        assert found.read(7).data == jpeg(7)  # the child did not touch this process's downloads
        found.close()


def test_time_limits_hold(tmp_path):
    pages = {"/drip": servers.drip(jpeg(1), 0.2), "/robots.txt": reply(404)}
    with serve(pages) as server:
        path = tmp_path / "list.txt"
        path.write_text(server.url("/drip"))
        found = source(path, max_seconds=0.5)
        with pytest.raises(OSError, match="timeout"):
            found.read(0)
        found.close()


def test_fingerprint_is_of_the_urls(tmp_path):
    (tmp_path / "a.txt").write_text("http://a.org/1\nhttp://a.org/2\n")
    (tmp_path / "b.csv").write_text("n,url\n1,http://a.org/1\n2,http://a.org/2\n")
    (tmp_path / "c.txt").write_text("http://a.org/1\nhttp://a.org/3\n")
    a, b, c = (UrlList(str(tmp_path / n)).fingerprint() for n in ("a.txt", "b.csv", "c.txt"))
    assert a == b != c


def test_mistakes_are_sentences(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    cases: list[tuple[Path | None, dict[str, Any], str]] = [
        (None, {}, r"data\.urls="),
        (tmp_path / "no.txt", {}, "no list of URLs at"),
        (tmp_path / "empty.txt", {}, "hold no URL"),
        (tmp_path / "empty.txt", {"max_seconds": -1.0}, "max_seconds"),
    ]
    for urls, values, words in cases:
        with pytest.raises(ValueError, match=words):
            UrlList(None if urls is None else str(urls), **values)
