"""One URL at a time against a server that does everything wrong."""

from __future__ import annotations

import asyncio
import gzip
import random
import resource
import shutil
import ssl
import subprocess
import threading
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from selfsight.fetch.download import Downloader, Image
from selfsight.fetch.errors import FetchError
from selfsight.fetch.hosts import Hosts
from selfsight.fetch.images import image_extension, image_size
from selfsight.fetch.retry import retry_after
from selfsight.fetch.rules import Rules
from tests.fetch import servers
from tests.fetch.servers import jpeg, raw, redirect, reply, serve, times

PICTURE = jpeg(1)
OK = reply(200, PICTURE)


def rules(**values: Any) -> Rules:
    base: dict[str, Any] = {"allow_addresses": ("127.0.0.1",), "robots": False, "retries": 0}
    return Rules(**{**base, "max_seconds": 20.0, "first_byte_seconds": 15.0, **values})


def get(url: str, **values: Any) -> Image:
    async def run() -> Image:
        async with Downloader(rules(**values), servers.NoNames()) as downloader:
            return await downloader.get(url)

    return asyncio.run(run())


def refused(url: str, **values: Any) -> FetchError:
    with pytest.raises(FetchError) as error:
        get(url, **values)
    return error.value


def test_a_picture_arrives_as_it_was_sent_with_honest_headers():
    with serve({"/a.jpg": reply(200, PICTURE, Set_Cookie="a=b")}) as server:
        found = get(server.url("/a.jpg"), contact="https://example.org/why")
        assert (found.data, found.extension) == (PICTURE, "jpg")
        headers = server.requests[0].headers
        assert headers["user-agent"].startswith("selfsight/")
        assert headers["user-agent"].endswith("(+https://example.org/why)")
        assert headers["accept-encoding"] == "identity"
        assert "cookie" not in headers and "authorization" not in headers


FAULTS: dict[str, tuple[servers.Page, str]] = {
    "not there": (reply(404, b"<html>" * 50), "status 404"),
    "gone": (reply(410), "status 410"),
    "error": (reply(500), "status 500"),
    "no content": (reply(204), "status 204"),
    "teapot that is none": (raw(b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"), "status 999"),
    "page": (reply(200, b"<html>not here</html>" * 9, Content_Type="image/jpeg"), "not an image"),
    "vector": (reply(200, b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 3), "not an image"),
    "empty": (reply(200, b""), "not an image"),
    "no http": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), "bad answer"),
    "cut in the headers": (raw(b"HTTP/1.1 200 OK\r\nContent-"), "connection cut"),
    "closed at once": (raw(b""), "connection cut"),
    "cut in the body": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + PICTURE),
        "connection cut",
    ),
    "cut in a chunk": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + PICTURE[:500]),
        "connection cut",
    ),
    "drip": (servers.drip(PICTURE, 0.1), "timeout"),
    "silent": (servers.silent(), "timeout"),
    "endless": (servers.endless(PICTURE[:60]), "too large"),
    "endless headers": (servers.endless_headers(), "bad answer"),
    "huge length": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n" + PICTURE, close=False),
        "too large",
    ),
    "negative length": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"), "bad answer"),
    "packed bomb": (reply(200, servers.bomb(PICTURE, 64), Content_Encoding="gzip"), "too large"),
    "packed twice": (reply(200, PICTURE, Content_Encoding="gzip, gzip"), "bad answer"),
    "packed by what": (reply(200, PICTURE, Content_Encoding="zstd"), "bad answer"),
    "not packed at all": (reply(200, PICTURE, Content_Encoding="gzip"), "bad answer"),
    "loop": (redirect("/loop"), "redirects"),
    "to a file": (redirect("file:///etc/passwd"), "bad URL"),
    "to ftp": (redirect("ftp://127.0.0.1/a.jpg"), "bad URL"),
    "to nothing": (redirect("http://[::1"), "bad URL"),
    "to a mail server": (redirect("http://127.0.0.1:25/a.jpg"), "bad URL"),
    "redirect without a place": (reply(302), "status 302"),
    "noai": (reply(200, PICTURE, X_Robots_Tag="noai"), "opted out"),
    "noimageai": (reply(200, PICTURE, X_Robots_Tag="all, NoImageAI"), "opted out"),
    "reserved": (reply(200, PICTURE, TDM_Reservation="1"), "opted out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_reason(fault):
    page, reason = FAULTS[fault]
    start = time.monotonic()
    with serve({"/loop": page}) as server:
        short = {"max_seconds": 1.5, "first_byte_seconds": 0.7} if reason == "timeout" else {}
        error = refused(server.url("/loop"), max_bytes=200_000, **short)
        assert error.reason == reason, error
        assert isinstance(error, OSError) and str(error).startswith(reason)
        assert len(str(error)) < 400
    assert time.monotonic() - start < 15  # stopped by its own limit


@pytest.mark.parametrize(
    "url",
    ["", "a.jpg", "file:///etc/passwd", "ftp://example.org/a", "data:image/png;base64,AAAA",
     "http://", "http:///a", "http://[::1", "http://a b/", "javascript:1", "http://a:99999/",
     "http://127.0.0.1:22/", "http://" + "a" * 9000, "http://" + "a" * 300 + ".org/",
     "unix:///run/x", "\x00", "http://127.0.0.1:6/\r\nHost: x"],
)  # fmt: skip
def test_no_url_at_all(url):
    assert refused(url).reason in ("bad URL", "no such host", "bad answer")


def test_an_endless_body_and_a_bomb_are_dropped_early():
    sent = [0]
    pages = {"/endless": servers.endless(PICTURE[:60], sent)}
    pages["/bomb"] = reply(200, servers.bomb(PICTURE, 512), Content_Encoding="gzip")
    pages["/page"] = servers.endless(b"<html>" * 20, sent)
    with serve(pages) as server:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert refused(server.url("/endless"), max_bytes=1_000_000).reason == "too large"
        assert sent[0] < 20_000_000  # what is in flight in buffers is not read
        assert refused(server.url("/bomb"), max_bytes=1_000_000).reason == "too large"
        sent[0] = 0
        assert refused(server.url("/page"), max_bytes=1 << 40).reason == "not an image"
        assert sent[0] < 20_000_000
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100_000  # KiB; the bomb holds 512 MiB


def test_packed_answers_are_unpacked():
    pages = {
        "/gzip": reply(200, gzip.compress(PICTURE), Content_Encoding="gzip"),
        "/zlib": reply(200, zlib.compress(PICTURE), Content_Encoding="deflate"),
        "/plain": reply(200, PICTURE, Content_Encoding="identity"),
    }
    with serve(pages) as server:
        assert all(get(server.url(path)).data == PICTURE for path in pages)


def test_a_picture_of_just_the_limit_passes():
    with serve({"/a": OK}) as server:
        assert get(server.url("/a"), max_bytes=len(PICTURE)).data == PICTURE
        assert refused(server.url("/a"), max_bytes=len(PICTURE) - 1).reason == "too large"


def test_redirects_are_followed_up_to_the_limit():
    pages = {f"/{n}": redirect(f"{n + 1}", (301, 302, 303, 307, 308)[n]) for n in range(5)}
    with serve({**pages, "/5": OK}) as server:
        found = get(server.url("/0"), max_redirects=5)
        assert found.data == PICTURE and found.url == server.url("/5")
        assert refused(server.url("/0"), max_redirects=4).reason == "redirects"


def test_no_credentials_are_sent_on():
    with serve({"/b": OK}) as server:
        inner = server.url("/b").replace("http://", "http://user:secret@")
        server.pages["/a"] = redirect(inner)
        found = get(server.url("/a").replace("http://", "http://me:password@"))
        assert "secret" not in found.url
        sent = str([(r.path, r.headers) for r in server.requests])
        assert len(server.requests) == 2
        for word in ("authorization", "password", "secret", "referer"):
            assert word not in sent


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with serve({"/a": OK}) as server, serve(fallback=OK) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url("/"))
        assert get(server.url("/a")).data == PICTURE
        assert proxy.connections == 0


def test_what_may_pass_is_tried_again_and_what_may_not_is_not():
    cut = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n\xff\xd8\xff")
    pages = {
        "/503": times(reply(503), OK),
        "/429": times(reply(429, Retry_After="0"), reply(429), OK),
        "/cut": times(cut, OK),
        "/silent": times(servers.silent(), OK),
        "/404": times(reply(404), OK),
        "/403": times(reply(403), OK),
        "/page": times(reply(200, b"<html>" * 20), OK),
        "/always": reply(500),
    }
    with serve(pages) as server:

        async def run() -> dict[str, str]:
            found = {}
            async with Downloader(
                rules(retries=2, max_wait=2.0, first_byte_seconds=2.0)
            ) as downloader:

                async def one(path: str) -> None:
                    try:
                        found[path] = (await downloader.get(server.url(path))).extension
                    except FetchError as error:
                        found[path] = error.reason

                await asyncio.gather(*(one(path) for path in pages))
            return found

        found = asyncio.run(run())
        asked = {path: server.paths().count(path) for path in pages}
    assert {p for p in pages if found[p] == "jpg"} == {"/503", "/429", "/cut", "/silent"}
    assert found["/always"] == "status 500" and asked["/always"] == 3
    assert asked["/429"] == 3 and asked["/404"] == asked["/403"] == asked["/page"] == 1


def test_retry_after_is_waited_for_by_all_urls_of_the_host():
    with serve({"/a": times(reply(429, Retry_After="1"), OK), "/b": OK}) as server:

        async def run() -> None:
            async with Downloader(rules(retries=1)) as downloader:
                first = asyncio.create_task(downloader.get(server.url("/a")))
                while not server.requests:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                await downloader.get(server.url("/b"))
                await first

        asyncio.run(run())
        assert min(server.times[1:]) - server.times[0] > 0.9


def test_a_server_that_asks_for_an_hour_is_left_alone():
    with serve({"/a": times(reply(429, Retry_After="3600"), OK)}) as server:
        error = refused(server.url("/a"), retries=2, max_wait=0.5)
        assert error.reason == "status 429" and "3600 s" in str(error)
        assert server.paths() == ["/a"]


def test_retry_after_is_a_number_or_a_date():
    now = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    assert retry_after("120") == 120
    assert retry_after("Sat, 21 Nov 2026 12:01:30 GMT", now) == 90
    assert retry_after("Sat, 21 Nov 2026 11:00:00 GMT", now) == 0
    for text in (None, "", "soon", "-5", "1e9", "Sat, 99 Nov 2026 11:00:00 GMT", "٣"):
        assert retry_after(text, now) is None
    assert retry_after("9" * 5000) == 999999999999


def test_hosts_are_forgotten_when_nobody_waits():
    async def run() -> int:
        hosts = Hosts(2, 0.0)
        for n in range(10_100):
            async with hosts.turn(f"host{n}.org"):
                pass
        return len(hosts._hosts)

    assert asyncio.run(run()) < 10_000


def test_limits_and_delay_per_host():
    with serve(fallback=servers.slow(0.05, OK)) as server:

        async def run(**values: Any) -> None:
            async with Downloader(rules(**values)) as d:
                await asyncio.gather(*(d.get(server.url(f"/{n}")) for n in range(8)))

        asyncio.run(run(at_once_per_host=2))
        assert server.most_at_once <= 2
        server.times.clear()
        asyncio.run(run(at_once_per_host=8, delay_per_host=0.1))
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
        assert len(gaps) == 7 and server.times[-1] - server.times[0] > 0.65
    with serve(fallback=servers.slow(0.05, OK)) as server:
        asyncio.run(run(at_once=3, at_once_per_host=8))
        assert server.most_at_once <= 3


def test_opt_outs_for_others_and_switched_off():
    for value in ("googlebot: noai, noindex", "unavailable_after: 25 Jun 2030 15:00:00 PST", "all",
                  "noarchive", "max-snippet: 5"):  # fmt: skip
        with serve({"/a": reply(200, PICTURE, X_Robots_Tag=value)}) as server:
            assert get(server.url("/a")).data == PICTURE
    for value in ("selfsight: noindex", "otherbot: all, selfsight: noai", "noarchive,noimageindex"):
        with serve({"/a": reply(200, PICTURE, X_Robots_Tag=value)}) as server:
            assert refused(server.url("/a")).reason == "opted out"
            assert get(server.url("/a"), opt_out=()).data == PICTURE
    with serve({"/a": reply(200, PICTURE, tdm_reservation="1")}) as server:
        assert get(server.url("/a"), tdm_reservation=False).data == PICTURE
    with serve({"/a": reply(404, b"", X_Robots_Tag="noindex")}) as server:
        assert refused(server.url("/a")).reason == "status 404"


def test_random_answers_end_in_a_reason():
    """Mutated answers: each ends in a picture or a reason, and soon."""
    dice = random.Random(7)
    sound = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Robots-Tag: all\r\n\r\n" % len(PICTURE)
    moved = b"HTTP/1.1 302 Found\r\nLocation: /0\r\nContent-Length: 0\r\n\r\n"
    with serve() as server:
        for n in range(300):
            data = bytearray(dice.choice((sound + PICTURE, moved)))
            for _ in range(dice.randrange(1, 12)):
                place = dice.randrange(min(len(data), 120))
                kind = dice.randrange(3)
                if kind == 0:
                    data[place] = dice.randrange(256)
                elif kind == 1:
                    del data[place : place + dice.randrange(1, 9)]
                else:
                    data[place:place] = dice.randbytes(dice.randrange(1, 9))
            server.pages[f"/{n}"] = raw(bytes(data))

        async def run() -> Counter[str]:
            found: Counter[str] = Counter()
            async with Downloader(
                rules(max_seconds=3.0, at_once_per_host=16), servers.NoNames()
            ) as downloader:

                async def one(n: int) -> None:
                    try:
                        found[(await downloader.get(server.url(f"/{n}"))).extension] += 1
                    except FetchError as error:
                        found[error.reason] += 1

                await asyncio.gather(*(one(n) for n in range(300)))
            return found

        found = asyncio.run(run())
    assert found.total() == 300 and found["bad answer"] > 30 and found["jpg"] > 5, found
    known = {"jpg", "bad answer", "connection cut", "not an image", "timeout", "redirects"}
    known |= {"bad URL", "too large", "no such host", "forbidden address", "no connection"}
    assert all(reason in known or reason.startswith("status ") for reason in found), found


def test_nobody_listens_and_no_such_name():
    with serve() as server:
        gone = server.url("/a")
    assert refused(gone).reason == "no connection"
    assert refused("http://nothing.invalid/a").reason == "no such host"


def test_a_certificate_that_nobody_signed_is_refused(tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    asked: list[bytes] = []
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(100))
        writer.transport.abort()

    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = server.sockets[0].getsockname()[1]
        assert refused(f"https://127.0.0.1:{port}/a").reason == "TLS"
        assert asked == []
    finally:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(5)  # let it see the end
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def test_formats_are_told_by_their_first_bytes():
    import io

    import numpy as np
    from PIL import Image as Pillow
    from PIL import features

    pixels = Pillow.fromarray(np.full((21, 34, 3), 90, np.uint8))
    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
    kinds |= {"ICO": "ico", "PPM": "ppm", "JPEG2000": "jp2"}
    kinds |= {"AVIF": "avif"} if features.check("avif") else {}
    for form, extension in kinds.items():
        file = io.BytesIO()
        pixels.save(file, form)
        assert image_extension(file.getvalue()[:64]) == extension
        if form not in ("TIFF", "AVIF", "ICO", "PPM", "JPEG2000"):
            assert image_size(file.getvalue()) == (34, 21), form
    file = io.BytesIO()
    pixels.save(file, "WEBP", lossless=True)
    assert image_size(file.getvalue()) == (34, 21)
    for text in (b"Plain text", b"P5 of five", b"\0\0\x01\0\0", b"%PDF-1.7", b"<!DOCTYPE html>"):
        assert image_extension(text) is None
    for data in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBPVP8X", b"BM of text",
                 PICTURE[:20], b"GIF89a"):  # fmt: skip
        assert image_size(data) is None
