"""Tar archives for the tests."""

import io
import tarfile
from pathlib import Path

from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Record

IMAGES = 20


def tar_of(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of an archive of those members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def shard(number: int, images: int = IMAGES, size: int = 700) -> dict[str, bytes]:
    """Members of a shard: images (bytes that tell which one), labels and side files."""
    members: dict[str, bytes] = {}
    for n in range(images):
        head = f"image {number} {n} ".encode()
        members[f"{number}{n:03d}.jpg"] = head + bytes(
            (number * 7 + n + i) % 251 for i in range(size)
        )
        members[f"{number}{n:03d}.json"] = b'{"a": 1}'
        members[f"{number}{n:03d}.cls"] = f"{n}\n".encode()
    return members


def everything(source: TarShards) -> list[Record]:
    """All images, by way of the pieces that the stream reads, in order."""
    return [
        source.fetch(shard, piece, member)
        for shard in range(source.shards())
        for piece in range(source.pieces)
        for member in range(source.length(shard, piece))
    ]


def expected(count: int = 3) -> list[Record]:
    """The records of the shards `web-000000.tar` and so on, of `shard`."""
    return [
        Record(f"web-{s:06d}.tar:{s}{n:03d}.jpg", shard(s)[f"{s}{n:03d}.jpg"], n)
        for s in range(count)
        for n in range(IMAGES)
    ]
