"""Whole jobs: what lands in the shards, and that stops and kills at any moment cost nothing."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.tar_index import write_index
from selfsight.fetch.job import FetchJob
from selfsight.fetch.settings import settings_from
from selfsight.fetch.shard_writer import ShardWriter, shard_name
from tests.fetch import servers
from tests.fetch.servers import Server, jpeg, numbered, reply, serve

ROOT = Path(__file__).parents[2]


def job(urls: Path | list[str], out: Path, **values: Any) -> FetchJob:
    base = {"allow_addresses": ["127.0.0.1"], "progress": False, "shard_size": 20, "retries": 0}
    base |= {"urls": urls if isinstance(urls, list) else str(urls), "out": str(out)}
    return FetchJob(settings_from({**base, **values}), on_shard=write_index)


def listed(server: Server, path: Path, numbers: Any) -> Path:
    path.write_text("".join(server.url(f"/{n}.jpg") + "\n" for n in numbers))
    return path


def contents(out: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Key to (image, JSON) over all complete shards; each key once, image before JSON."""
    found: dict[str, tuple[bytes, dict[str, Any]]] = {}
    for path in sorted(out.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for image, side in zip(names[::2], names[1::2], strict=True):
                key = image.partition(".")[0]
                assert side == f"{key}.json" and key not in found
                data, text = (tar.extractfile(n) for n in (image, side))
                assert data is not None and text is not None
                found[key] = data.read(), json.loads(text.read())
    return found


def failures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def key(number: int) -> str:
    return f"{number:010d}"


def test_what_lands_in_the_shards(tmp_path):
    out = tmp_path / "out"
    with serve(fallback=numbered) as server:
        png = io.BytesIO()
        Image.new("RGB", (9, 7)).save(png, "PNG")
        server.pages["/picture"] = reply(200, png.getvalue(), Content_Type="image/jpeg")
        server.pages["/moved"] = servers.redirect("/3.jpg")
        server.pages["/robots.txt"] = reply(200, b"User-agent: *\nDisallow: /closed\n")
        urls = [server.url(f"/{n}.jpg") for n in range(50)]
        urls += [server.url(p) for p in ("/picture", "/moved", "/none", "/closed/1", "/3.jpg")]
        urls += ["http://10.1.2.3/a.jpg", "ftp://a.org/b", "", None]
        table = {"url": urls, "caption": [f"n° {n}" for n in range(len(urls))]}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "l.parquet")
        report = job(tmp_path / "l.parquet", out, keep_columns=["caption"]).run()
        asked = Counter(server.paths())
    assert asked["/3.jpg"] == 2 and asked["/robots.txt"] == 1  # once listed, once moved to
    assert "/closed/1" not in asked
    found = contents(out)
    assert sorted(found) == [key(n) for n in range(52)]
    data, side = found[key(7)]
    assert data == jpeg(7)
    assert side["url"] == urls[7] and side["caption"] == "n° 7" and side["status"] == 200
    assert (side["width"], side["height"], side["bytes"]) == (40, 30, len(data))
    assert found[key(51)][1]["final_url"] == urls[3]
    with tarfile.open(out / "shard-000002.tar") as tar:
        assert f"{key(50)}.png" in tar.getnames()  # named by its content
    reasons = {line["key"]: line["reason"] for line in failures(out)}
    assert reasons == {
        key(52): "status 404", key(53): "robots.txt", key(55): "forbidden address",
        key(56): "bad URL", key(57): "no URL", key(58): "no URL",
    }  # fmt: skip
    assert report == json.loads((out / "report.json").read_text())
    assert report["status"] == "complete" and report["urls"] == 59 and report["saved"] == 52
    assert report["repeated"]["repeated URL"] == 1 and report["failed"] == 6
    assert report["hosts_with_most_failures"]["127.0.0.1"] == 2
    assert report["bytes"] == sum(len(data) for data, _ in found.values())
    source = TarShards(str(out))
    keys = {source.fetch_key(s, p, m).rpartition(":")[2].partition(".")[0]
            for s in range(source.shards()) for p in range(source.pieces)
            for m in range(source.length(s, p))}  # fmt: skip
    assert keys == set(found)
    assert all((out / f"shard-{n:06d}.tar.index").is_file() for n in range(3))


def test_repeated_images_are_dropped_when_asked(tmp_path):
    with serve(fallback=reply(200, jpeg(5))) as server:
        urls = listed(server, tmp_path / "l.txt", range(30))
        report = job(urls, tmp_path / "out", drop_repeated_images=True).run()
        assert report["saved"] == 1 and report["repeated"]["repeated image"] == 29
        report = job(urls, tmp_path / "all").run()
        assert report["saved"] == 30


def test_again_and_with_another_list(tmp_path):
    out = tmp_path / "out"
    with serve(fallback=numbered) as server:
        urls = listed(server, tmp_path / "l.txt", range(25))
        job(urls, out).run()
        asked = len(server.requests)
        report = job(urls, out).run()
        assert report["status"] == "complete" and report["saved"] == 25
        assert len(server.requests) == asked  # nothing is fetched again
        with pytest.raises(ValueError, match=r"another shard_size \(20, now 10\)"):
            job(urls, out, shard_size=10).run()
        listed(server, urls, range(26))
        with pytest.raises(ValueError, match="another list of URLs"):
            job(urls, out).run()


def test_a_shard_without_any_image_leaves_no_file(tmp_path):
    with serve() as server:
        report = job(listed(server, tmp_path / "l.txt", range(30)), tmp_path / "out").run()
    assert report["status"] == "complete" and report["failed"] == 30 and report["shards"] == 0
    assert not list((tmp_path / "out").glob("shard-*"))


def test_shards_are_read_while_the_job_runs(tmp_path):
    """A reader finds whole shards only, and new ones join."""
    out = tmp_path / "out"
    gate = threading.Event()

    async def page(request: servers.Request, writer: Any) -> None:
        while int(request.path.strip("/").removesuffix(".jpg") or 0) >= 40 and not gate.is_set():
            await servers.asyncio.sleep(0.02)
        await numbered(request, writer)

    with serve({"/robots.txt": reply(404)}, fallback=page) as server:
        urls = listed(server, tmp_path / "l.txt", range(80))
        running = job(urls, out, at_once_per_host=60)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            wait_for(lambda: (out / "shard-000001.tar.index").exists())
            wait_for(lambda: (out / "shard-000002.tar.part").exists())
            source = TarShards(str(out), grows=True)
            assert source.shards() == 2
            first = source.fetch(0, 0, 0).data
            assert json.loads((out / "report.json").read_text())["status"] == "running"
            assert source.poll() == []
        finally:
            gate.set()
            thread.join(30)
        new = source.poll()
        assert len(new) == 2
        source.extend(new)
        assert source.shards() == 4 and source.fetch(0, 0, 0).data == first


def test_real_files_arrive_as_they_are(tmp_path, data_folder):
    """Every file that can be used is in the shards byte by byte, whatever its name and type say."""
    described = json.loads((data_folder / "uncurated" / "dataset.json").read_text())["samples"]
    usable = {
        sample["key"]
        for sample in described
        if sample["outcome"] == "ok" and sample["format"] != "TGA"  # which has no signature
    }
    files: dict[str, bytes] = {}
    for shard in sorted((data_folder / "uncurated").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _, end = member.name.partition(".")
                if end != "json":
                    file = tar.extractfile(member)
                    files[stem] = file.read() if file else b""
    pages = {
        f"/{name}": reply(200, data, Content_Type="text/plain") for name, data in files.items()
    }
    with serve(pages) as server:
        (tmp_path / "l.txt").write_text("".join(server.url(f"/{n}") + "\n" for n in files))
        report = job(tmp_path / "l.txt", tmp_path / "out", shard_size=200).run()
    found = {
        side["url"].rpartition("/")[2]: data for data, side in contents(tmp_path / "out").values()
    }
    assert all(found[name] == files[name] for name in found)
    assert usable - found.keys() == set()
    assert report["failed"] == len(files) - len(found) > 0
    assert set(report["reasons"]) == {"not an image"}


def twice(paths: list[str]) -> int:
    """Requests for pictures that were asked for before."""
    pictures = [path for path in paths if path.endswith(".jpg")]
    return len(pictures) - len(set(pictures))


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def start(urls: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/fetch.py", f"urls={urls}", f"out={out}", "shard_size=20",
               "allow_addresses=[127.0.0.1]", "at_once_per_host=8", "retries=0", *more]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_at_any_moment_the_same_command_goes_on(tmp_path):
    """Nothing is lost, nothing complete is fetched twice, and all ends as if it had not been."""
    out = tmp_path / "out"
    moments = random.Random(3)
    with serve(fallback=servers.slow(0.02, numbered)) as server:
        urls = listed(server, tmp_path / "l.txt", [*range(150), *range(150, 160), 5, 6])
        urls.write_text(urls.read_text() + server.url("/none") + "\n")
        saved_before: set[str] = set()
        for _ in range(4):
            asked = len(server.requests)
            process = start(urls, out)
            try:
                more = moments.randrange(3, 40)
                wait_for(lambda: len(server.requests) >= asked + more)  # noqa: B023
            finally:
                process.kill()
                process.communicate()
            assert process.returncode == -signal.SIGKILL
            # what is in complete shards, and in the whole images of open ones
            open_shards = {int(p.name[6:12]) for p in out.glob("*.part")}
            kept = {key(n) for s in open_shards for n in _peek(out, s)}
            assert saved_before <= kept | set(contents(out))
            saved_before = kept | set(contents(out))
        process = start(urls, out)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        paths = server.paths()
    assert "saved" in printed and "status 404" in printed
    found = contents(out)
    assert sorted(found) == [key(n) for n in range(160)]
    assert all(found[key(n)][0] == jpeg(n) for n in range(160))
    assert [line["key"] for line in failures(out)] == [key(162)]
    report = json.loads((out / "report.json").read_text())
    assert (report["saved"], report["repeated"]["repeated URL"], report["failed"]) == (160, 2, 1)
    # a kill costs what was in flight: 8 requests here, and what was not yet written
    assert twice(paths) <= 4 * (8 + 4)
    assert not list(out.glob("*.part"))


def _peek(out: Path, number: int) -> list[int]:
    """Rows of an open shard, read from a copy, as opening it cuts it."""
    part = out / (shard_name(number) + ".part")
    copy = out.parent / "copy"
    copy.mkdir(exist_ok=True)
    (copy / part.name).write_bytes(part.read_bytes())
    writer = ShardWriter(copy, number)
    writer.suspend()
    return list(writer.entries)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_in_order_and_goes_on(tmp_path, number):
    out = tmp_path / "out"
    with serve(fallback=servers.slow(0.02, numbered)) as server:
        urls = listed(server, tmp_path / "l.txt", range(100))
        process = start(urls, out)
        wait_for(lambda: len(server.requests) > 30)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert printed.startswith("stopped")
        assert json.loads((out / "report.json").read_text())["status"] == "stopped"
        process = start(urls, out)
        process.communicate(timeout=60)
        paths = server.paths()
    assert process.returncode == 0
    assert sorted(contents(out)) == [key(n) for n in range(100)]
    assert twice(paths) <= 8 + 4


def test_a_second_job_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    with serve({"/robots.txt": reply(404)}, fallback=servers.silent()) as server:
        urls = listed(server, tmp_path / "l.txt", range(5))
        process = start(urls, out)
        try:
            wait_for(lambda: len(server.requests) > 1)
            with pytest.raises(ValueError, match=rf"process {process.pid} on .* is fetching into"):
                job(urls, out).run()
        finally:
            process.kill()
            process.communicate()


def test_a_torn_open_shard_keeps_its_whole_images(tmp_path):
    """Cut or overwritten anywhere, what stands before it is kept and its hash is right."""
    images = {n: jpeg(n) for n in range(6)}

    def written() -> Path:
        import hashlib

        writer = ShardWriter(tmp_path, 0)
        for n, data in images.items():
            writer.add(n, data, "jpg", {"sha256": hashlib.sha256(data).hexdigest()})
        writer.suspend()
        return writer.part

    whole = written().read_bytes()
    each = len(whole) // 6
    for cut in (0, 1, 511, 512, 700, each - 1, each, each + 1, 3 * each + 900, len(whole) - 1):
        (tmp_path / "shard-000000.tar.part").write_bytes(whole[:cut])
        writer = ShardWriter(tmp_path, 0)
        assert sorted(writer.entries) == list(range(cut // each))
        writer.add(99, images[1], "jpg", {"sha256": "x"})
        writer.complete()
        with tarfile.open(writer.part) as tar:
            assert len(tar.getnames()) == 2 * (cut // each) + 2
        writer.part.unlink()
    for place in (100, 2 * each + 600, 4 * each + 10):
        (tmp_path / "shard-000000.tar.part").write_bytes(
            whole[:place] + b"\xaa" * 40 + whole[place + 40 :]
        )
        writer = ShardWriter(tmp_path, 0)
        assert sorted(writer.entries) == list(range(place // each))
        writer.suspend()


def test_a_kill_between_recording_and_naming_is_made_good(tmp_path):
    out = tmp_path / "out"
    with serve(fallback=numbered) as server:
        urls = listed(server, tmp_path / "l.txt", range(45))
        job(urls, out).run()
        asked = len(server.requests)
        import sqlite3

        base = sqlite3.connect(out / "fetch.sqlite")
        with base:
            base.execute("UPDATE shards SET published = 0 WHERE number = 1")
        base.close()
        before = contents(out)
        (out / "shard-000001.tar").rename(out / "shard-000001.tar.part")
        (out / "shard-000001.tar.index").unlink()
        with (out / "failures.jsonl").open("a") as file:
            file.write('{"key": "of a shard that was not recorded"}\n')
        assert job(urls, out).run()["status"] == "complete"
        assert len(server.requests) == asked
    assert contents(out) == before and (out / "shard-000001.tar.index").is_file()
    assert failures(out) == []


def test_a_network_that_is_gone_stops_the_job_and_the_list_is_not_lost(tmp_path):
    out = tmp_path / "out"
    with serve() as server:
        port = server.port
    urls = listed(server, tmp_path / "l.txt", range(60))
    with pytest.raises(ValueError, match="last 10 URLs reached no server"):
        job(urls, out, max_unreachable=10).run()
    assert json.loads((out / "report.json").read_text())["status"] == "failed"
    with serve(fallback=numbered, port=port) as server:
        report = job(urls, out, max_unreachable=10).run()
    assert report["status"] == "complete" and report["saved"] == 60
    assert failures(out) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "l.txt").write_text("http://a.org/1\n")
    with pytest.raises(ValueError, match="cannot be written to"):
        job(tmp_path / "l.txt", tmp_path / "file" / "out").run()


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the disk; the same command then goes on."""
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.path.insert(0, 'launch')\n"
        "import fetch\n"
        "sys.exit(fetch.fetch(sys.argv[1:]))\n"
    )
    with serve(fallback=numbered) as server:
        urls = listed(server, tmp_path / "l.txt", range(60))
        arguments = [f"urls={urls}", f"out={out}", "shard_size=60", "allow_addresses=[127.0.0.1]"]
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ},
        )  # fmt: skip
        assert process.returncode == 2, process.stderr
        assert "cannot be written to (File too large)" in process.stderr
        assert "Traceback" not in process.stderr
        report = job(urls, out, shard_size=60).run()
    assert report["status"] == "complete"
    assert sorted(contents(out)) == [key(n) for n in range(60)]
