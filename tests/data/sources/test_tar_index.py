"""The header parser against Python's tarfile, on generated archives, cuts and damage."""

import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from selfsight.data.sources import tar_index
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.tar_index import SIDE_FILES, NotATar, TarIndex, scan
from tests.data.tars import shard, tar_of, write


def scanned(data: bytes) -> list[tuple[str, int, int, int]]:
    return rows(scan(lambda offset, size: data[offset : offset + size]))


def rows(index: TarIndex) -> list[tuple[str, int, int, int]]:
    return [
        (index.names[i], int(index.offsets[i]), int(index.sizes[i]), int(index.labels[i]))
        for i in range(len(index))
    ]


def by_tarfile(data: bytes) -> list[tuple[str, int, int, int]]:
    """The same index by the standard library."""
    images, labels = [], {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:
                break
            if member is None:
                break
            folder, _, base = member.name.rpartition("/")
            if not member.isreg() or member.issparse() or not base or base.startswith("."):
                continue
            stem, _, extension = base.partition(".")
            extension = extension.lower().rpartition(".")[2]
            begin = member.offset_data
            if extension == "cls":
                text = data[begin : begin + min(member.size, 32)].strip()
                if text.isdigit():
                    labels[folder, stem] = int(text)
            elif extension not in SIDE_FILES:
                images.append((folder, stem, member.name, begin, member.size))
    return [(name, o, size, labels.get((f, s), -1)) for f, s, name, o, size in images]


_KINDS = [tarfile.REGTYPE] * 12 + [
    tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V",
]  # fmt: skip


def archive(seed: int) -> bytes:
    """Random members: names short, long, foreign and odd, all kinds of entries, all formats."""
    dice = random.Random(seed)
    form = dice.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    file = io.BytesIO()
    everywhere = {"comment": "of all"} if seed % 5 == 0 else None
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers=everywhere) as tar:
        for n in range(dice.randint(0, 12)):
            folder = dice.choice(["", "a/", "../../", "/abs/", "b" * 60 + "/", "é/", "a b/"])
            stem = dice.choice([f"{n:06d}", f"ü{n}", "x" * dice.choice([30, 90]) + str(n), "."])
            end = dice.choice([".jpg", ".cls", ".json", ".JPG", "", ".seg.png", ".pyd", ".tar.gz"])
            if form != tarfile.USTAR_FORMAT and dice.random() < 0.2:
                folder += "long" * 40 + "/"
            if dice.random() < 0.05:
                stem += "\udcff"  # a byte that is no UTF-8
            member = tarfile.TarInfo(folder + stem + end)
            member.type = dice.choice(_KINDS)
            member.linkname = "/etc/passwd" if member.type in (b"1", b"2") else ""
            content = str(dice.randint(0, 99)).encode() if end == ".cls" else dice.randbytes(
                dice.choice([0, 1, 511, 512, 513, 3000])
            )  # fmt: skip
            if member.type in (b"1", b"2", b"3", b"5", b"6"):
                content = b""
            member.size = len(content)
            if form == tarfile.PAX_FORMAT and dice.random() < 0.2:
                member.mtime = 1.5  # a pax record that is none of ours
            tar.addfile(member, io.BytesIO(content) if content else None)
    return file.getvalue()


def test_generated_archives_as_tarfile_reads_them():
    images = 0
    for seed in range(300):
        data = archive(seed)
        found = scanned(data)
        try:
            assert found == by_tarfile(data), seed
        except tarfile.ReadError:  # pax records of all members, and no member
            assert not found, seed
        images += len(found)
    assert images > 500


def test_cut_at_every_block_and_anywhere():
    dice = random.Random(1)
    for seed in range(12):
        data = archive(seed).rstrip(b"\0") + bytes(1024)
        ends = [*range(512, len(data), 512), *(dice.randint(513, len(data)) for _ in range(20))]
        for end in ends:
            part = data[:end]
            try:
                expected = by_tarfile(part)
            except tarfile.ReadError:  # cut within the first header or its long name
                assert not scanned_or_nothing(part), (seed, end)
                continue
            assert scanned(part) == expected, (seed, end)


def scanned_or_nothing(data: bytes) -> list:
    try:
        return scanned(data)
    except NotATar:
        return []


def test_damage_never_escapes():
    """Flipped bytes anywhere: an index, or NotATar; never another error, nor a negative place."""
    dice = random.Random(2)
    whole = archive(7)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            index = scan(lambda offset, size, data=data: bytes(data[offset : offset + size]))
        except NotATar:
            continue
        assert (index.offsets >= 0).all() and (index.sizes >= 0).all()


def test_a_size_in_base_256_and_one_beyond_the_end():
    data = bytearray(tar_of({"a.jpg": b"abc", "b.jpg": b"def"}, tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    _sum(data)
    assert scanned(bytes(data)) == [("a.jpg", 512, 3, -1), ("b.jpg", 1536, 3, -1)]
    data[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    _sum(data)
    assert scanned(bytes(data)) == [("a.jpg", 512, 1 << 40, -1)]
    for size in (b"\xff" + bytes(11), b"\x80" + b"\xff" * 11, b"00000000009\0"):
        data[124:136] = size
        _sum(data)
        with pytest.raises(NotATar):
            scanned(bytes(data))


def _sum(data: bytearray) -> None:
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])


def _records(**records: str) -> dict[str, bytes]:
    text = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        text += str(length).encode() + body
    return {"records": text}


def test_pax_sizes_and_raw_names():
    """A size in a pax record wins over that of the header; names may be raw bytes."""
    records = _records(hdrcharset="BINARY", path="dir/\udce9.jpg", size="700")["records"]
    member = tarfile.TarInfo("PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, len(records)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(records))
        tar.addfile(tarfile.TarInfo("short.jpg"))  # its header states 0 bytes
        file.write(b"x" * 700 + bytes(1024 - 700))
        tar.offset += 1024
        tar.addfile(tarfile.TarInfo("next.jpg"))
    data = file.getvalue()
    assert scanned(data) == by_tarfile(data)
    assert [row[::2] for row in scanned(data)] == [("dir/\udce9.jpg", 700), ("next.jpg", 0)]


def test_sparse_files_are_passed_over(tmp_path: Path):
    sparse = _records(GNU__sparse__major="1", GNU__sparse__minor="0")["records"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        head = tarfile.TarInfo("PaxHeader")
        head.type, head.size = tarfile.XHDTYPE, len(sparse)
        tar.addfile(head, io.BytesIO(sparse))
        member = tarfile.TarInfo("sparse.jpg")
        member.size = 512
        tar.addfile(member, io.BytesIO(b"0\n".ljust(512, b"\0")))
        old = tarfile.TarInfo("old.jpg")
        old.type, old.size = tarfile.GNUTYPE_SPARSE, 0
        tar.addfile(old)
        last = tarfile.TarInfo("last.jpg")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"abc"))
    assert [row[0] for row in scanned(file.getvalue())] == ["last.jpg"]


def test_what_is_no_tar():
    for data in (b"", b"not a tar file" * 100, b"\x1f\x8b" + bytes(600), bytes(100)):
        with pytest.raises(NotATar, match="not an uncompressed tar"):
            scanned(data)
    assert scanned(bytes(1024)) == []


def test_a_pickle_is_never_opened():
    class Trap:
        def __reduce__(self):
            return (os._exit, (3,))

    bomb = pickle.dumps(Trap())
    data = tar_of({"0.pyd": bomb, "0.jpg": b"abc", "0.cls": bomb, "1.pickle": bomb})
    assert scanned(data) == [("0.jpg", scanned(data)[0][1], 3, -1)]


def test_saved_and_read_again(tmp_path: Path):
    data = tar_of(shard(3))
    index = scan(lambda offset, size: data[offset : offset + size])
    saved = tar_index.dump(index, 1000, "v")
    again = tar_index.parse(saved, 1000, "v")
    assert again is not None and rows(again) == rows(index) and len(again) == 20
    assert tar_index.parse(saved, 1001, "v") is None and tar_index.parse(saved, 1000, "w") is None
    dice = random.Random(0)
    for _ in range(300):
        damaged = bytearray(saved)
        damaged[dice.randrange(len(saved))] ^= 1 << dice.randrange(8)
        assert tar_index.parse(bytes(damaged), 1000, "v") is None
        assert tar_index.parse(saved[: dice.randrange(len(saved))], 1000, "v") is None
    empty = TarIndex(index.names.__class__([]), *(np.zeros(0, np.int64) for _ in range(3)))
    none = tar_index.parse(tar_index.dump(empty, 5, ""), 5, "")
    assert none is not None and len(none) == 0


def test_a_forged_index_reaches_nothing_else(tmp_path: Path):
    """Columns of any values under a valid checksum: refused, or images that fail by name."""
    path = write(tmp_path / "x.tar", shard(1))
    size = path.stat().st_size
    rng = np.random.default_rng(0)
    outcomes = set()
    for n in range(200):
        wide = 10 ** rng.integers(1, 19, (3, 20))
        offsets, sizes, labels = rng.integers(-1 if n % 4 == 0 else 0, wide)
        names = tar_index.StringTable([f"{i}.jpg" for i in range(20)])
        data = tar_index.dump(TarIndex(names, offsets, sizes, labels), size, "")
        tar_index.save(tar_index.beside(path), data)
        if tar_index.parse(data, size, None) is None:
            outcomes.add("refused")
            continue
        for flat in (True, False):
            source = TarShards(str(path), whole_index=flat, pieces=1)
            for i in range(20):
                try:
                    record = source.fetch(*((i, 0, 0) if flat else (0, 0, i)))
                    assert len(record.data) == sizes[i] <= size
                    outcomes.add("read")
                except OSError:
                    outcomes.add("failed")
    assert outcomes == {"refused", "read", "failed"}


def test_an_index_beside_its_shard(tmp_path: Path):
    path = write(tmp_path / "x.tar", shard(1))
    beside = tar_index.write_index(path)
    assert beside == tmp_path / "x.tar.index"
    expected = rows(tar_index.scan_file(path)[0])
    found = tar_index.read_beside(path, path.stat())
    assert found is not None and rows(found) == expected
    os.utime(beside, ns=(0, 0))  # older than the shard: perhaps of another one
    assert tar_index.read_beside(path, path.stat()) is None
    beside.write_bytes(b"damaged")
    assert tar_index.read_beside(path, path.stat()) is None
    part = write(tmp_path / "y.tar.part", shard(2))  # as a writer does it
    assert tar_index.write_index(part, tmp_path / "y.tar").name == "y.tar.index"
    part.rename(tmp_path / "y.tar")
    assert tar_index.read_beside(tmp_path / "y.tar", (tmp_path / "y.tar").stat()) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "x.tar", "x.tar.index", "y.tar", "y.tar.index",
    ]  # fmt: skip


def test_real_shards_as_tarfile_reads_them(sets: Path):
    for path in [*sets.glob("caltech101/val-*.tar"), *sets.glob("uncurated/*.tar")]:
        assert rows(tar_index.scan_file(path)[0]) == by_tarfile(path.read_bytes())
