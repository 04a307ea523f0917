import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from selfsight.data.sources import file_list, folder
from selfsight.data.sources.folder import ImageFolder


def test_order_keys_labels_and_bytes(photos: Path):
    source = ImageFolder(str(photos), labels="folders")
    keys = [source.key(i) for i in range(len(source))]
    assert keys == sorted(keys) and keys[0] == "13.PNG" and "b/deep/07.PNG" in keys
    assert len(keys) == 18 and not any("hidden" in key or "notes" in key for key in keys)
    assert source.classes == ["a", "b"]
    for i, key in enumerate(keys):
        record = source.read(i)
        assert record.key == key and record.data == (photos / key).read_bytes()
        assert record.label == {"a": 0, "b": 1, "1": None}[key[0]]


def test_labels_need_two_folders_or_are_off(photos: Path):
    assert ImageFolder(str(photos)).read(3).label is None
    below = ImageFolder(str(photos / "b"), labels="folders")
    assert below.classes is None and below.read(0).label is None


def test_keys_do_not_depend_on_the_place(photos: Path, tmp_path: Path):
    link = tmp_path / "elsewhere"
    link.symlink_to(photos)
    a, b = ImageFolder(str(photos)), ImageFolder(str(link))
    assert [a.key(i) for i in range(len(a))] == [b.key(i) for i in range(len(b))]


def test_links_in_a_circle_end(tmp_path: Path, encode, picture):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(encode(picture(0, 20, 20)))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(ImageFolder(str(tmp_path))) == 1


def test_a_source_can_be_pickled(photos: Path):
    source = ImageFolder(str(photos), labels="folders")
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(18)] == [source.read(i) for i in range(18)]


def test_a_file_that_vanished_is_an_os_error(tmp_path: Path, encode, picture):
    (tmp_path / "x.jpg").write_bytes(encode(picture(0, 20, 20)))
    source = ImageFolder(str(tmp_path))
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(OSError):
        source.read(0)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path):
    with (tmp_path / "disk.jpg").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room
    source = ImageFolder(str(tmp_path))
    with pytest.raises(OSError, match=r"disk\.jpg cannot be read: its 1099511627776 bytes are no"):
        source.read(0)


def test_mistakes_are_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.path="):
        ImageFolder(None)
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        ImageFolder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is empty"):
        ImageFolder(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no images \(1 other files\)"):
        ImageFolder(str(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="labels='names' is unknown"):
        ImageFolder(str(tmp_path), labels="names")  # type: ignore[arg-type]


def keys(source: ImageFolder) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def plain_order(root: Path, prefix: str = "") -> list[str]:
    """The order as it is defined, without links: by name, folders among the files."""
    found = []
    names = [path.name for path in (root / prefix).iterdir()]
    for name in sorted(names, key=os.fsencode):
        if (root / prefix / name).is_dir():
            found += plain_order(root, f"{prefix}{name}/")
        else:
            found.append(prefix + name)
    return found


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 files in 221 folders, whose names sort differently with and without a slash."""
    root = tmp_path_factory.mktemp("many")
    for n in range(20):
        for m in range(10):
            folder = root / f"c{n}" / ("x" if m == 0 else f"x.{m}")
            folder.mkdir(parents=True)
            for k in range(99):
                (folder / f"{k}.jpg").touch()
        for k in range(10):
            (root / f"c{n}" / f"x.{k}.jpg").touch()
    return root


@pytest.mark.parametrize("threads", [1, 8])
def test_twenty_thousand_files_in_order_and_little_memory(many: Path, threads: int):
    ImageFolder(str(many), threads=threads)  # what is imported on first use is not counted
    tracemalloc.start()
    try:
        source = ImageFolder(str(many), labels="folders", threads=threads)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    expected = plain_order(many)
    assert len(expected) == 20_000 and keys(source) == expected
    text = sum(map(len, expected))
    assert kept < 2 * text and peak < kept + (1 << 20)
    assert len(source.classes or []) == 20
    sorted_classes = sorted(f"c{n}" for n in range(20))
    for i in range(0, 20_000, 997):
        assert source.read(i).label == sorted_classes.index(expected[i].split("/")[0])


@pytest.mark.parametrize("name", ["images.list", "images.list.gz"])
def test_a_saved_list_is_the_same_and_the_folder_is_not_touched(
    photos: Path, tmp_path: Path, name: str
):
    root, file = tmp_path / "photos", tmp_path / name
    shutil.copytree(photos, root)
    scanned = ImageFolder(str(root), labels="folders")
    first = ImageFolder(str(root), labels="folders", list=str(file))
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "photos"]  # nothing is left over
    content = file.read_bytes()
    assert (content[:2] == b"\x1f\x8b") == name.endswith(".gz")
    (root / "new.jpg").write_bytes(b"")
    shutil.rmtree(root / "b")
    for source in (first, ImageFolder(str(root), labels="folders", list=str(file))):
        assert keys(source) == keys(scanned) and source.classes == scanned.classes
        assert source.fingerprint() == scanned.fingerprint()
        assert source.read(3).label == 0
        with pytest.raises(OSError, match=r"^b/page.jpg cannot be read: No such file"):
            source.read(keys(source).index("b/page.jpg"))
    root.rename(tmp_path / "away")
    gone = ImageFolder(str(root), labels="folders", list=str(file))
    copy = pickle.loads(pickle.dumps(gone))
    assert keys(copy) == keys(gone) == keys(scanned)
    assert file.read_bytes() == content


def test_a_saved_list_costs_a_process_nothing(many: Path, tmp_path: Path):
    source = ImageFolder(str(many), list=str(tmp_path / "list"))
    assert len(pickle.dumps(source)) < 20_000  # the text is 200 KB
    assert pickle.loads(pickle.dumps(source)).key(12_345) == source.key(12_345)


def test_fingerprints_tell_lists_apart(tmp_path: Path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    before = ImageFolder(str(tmp_path)).fingerprint()
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    after = ImageFolder(str(tmp_path)).fingerprint()
    assert before != after and before.startswith("2 images, ") and after.startswith("2 images, ")


def test_any_file_name_survives_a_list(tmp_path: Path):
    names = [b"plain.jpg", b"two\nlines.jpg", b"back\\slash.jpg", b"\\n.jpg", b"\\\n\\\\.jpg"]
    names += [b"\xff\xfe.jpg", "ä ö.jpg".encode(), b"tab\t\r.jpg", b"a\n/in.jpg", b"a\n/\\n\n.jpg"]
    root = tmp_path / "images"
    (root / "a\n").mkdir(parents=True)
    for name in names:
        Path(os.fsdecode(bytes(root) + b"/" + name)).write_bytes(name)
    for file in (None, str(tmp_path / "list"), str(tmp_path / "list")):
        source = ImageFolder(str(root), labels="folders", list=file)
        contents = [bytes(source.read(i).data) for i in range(len(source))]
        assert set(contents) == set(names) and len(contents) == len(names)
        assert [os.fsencode(key) for key in keys(source)] == contents


def test_lists_of_any_length(tmp_path: Path):
    """Only every 64th line is held: lengths around that, and lines longer than what is read."""
    root = tmp_path / "images"
    root.mkdir()
    made = 0
    for length in (1, 63, 64, 65, 128, 129):
        while made < length:
            (root / f"{made:05d}{'x' * (made % 200)}.png").touch()
            made += 1
        source = ImageFolder(str(root), list=str(tmp_path / f"{length}.list"))
        assert keys(source) == sorted(p.name for p in root.iterdir())
        for outside in (-1, length):
            with pytest.raises(IndexError):
                source.key(outside)


def test_long_lists_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = file_list.ListWriter("/images", None)
    for n in range(300):
        writer.add(f"{n:03d}/".encode(), [f"{m}.jpg".encode() for m in range(n)])
    whole = writer.in_memory()
    monkeypatch.setattr(file_list, "_CHUNK", 1000)
    parts = writer.in_memory()
    assert len(whole) == len(parts) == 300 * 299 // 2
    assert all(whole[i] == parts[i] for i in range(0, len(whole), 7))


PROCESS = """
import sys
from selfsight.data.sources import folder
scans = []
real = folder._scanned
folder._scanned = lambda *arguments: (scans.append(1), real(*arguments))[1]
print("ready", flush=True)
sys.stdin.readline()
source = folder.ImageFolder(sys.argv[1], list=sys.argv[2])
print(len(scans), source.fingerprint(), flush=True)
"""


def test_of_many_processes_one_scans(many: Path, tmp_path: Path):
    command = [sys.executable, "-c", PROCESS, str(many), str(tmp_path / "list")]
    environment = os.environ | {"PYTHONPATH": str(Path(folder.__file__).parents[3])}
    processes = [
        subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        results = []
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            results.append(process.communicate(timeout=60)[0].split(maxsplit=1))
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sum(int(scans) for scans, _ in results) == 1
    assert {fingerprint.strip() for _, fingerprint in results} == {
        ImageFolder(str(many)).fingerprint()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["list"]


def test_a_lock_left_by_a_kill_does_not_block(photos: Path, tmp_path: Path):
    (tmp_path / ".list.lock").touch()
    assert len(ImageFolder(str(photos), list=str(tmp_path / "list"))) == 18
    assert [p.name for p in tmp_path.iterdir()] == ["list"]


def test_lists_that_do_not_fit_are_refused(photos: Path, tmp_path: Path):
    file = tmp_path / "list"
    ImageFolder(str(photos), labels="folders", list=str(file))
    good = file.read_bytes()
    with pytest.raises(ValueError, match=r"is of the folder .*photos.*, not of .*/b: name another"):
        ImageFolder(str(photos / "b"), labels="folders", list=str(file))
    with pytest.raises(ValueError, match="was made with labels=folders, not null"):
        ImageFolder(str(photos), list=str(file))
    changed = bytearray(good)
    changed[-3] ^= 1
    for content in (good[:-30], good + b"more.jpg\n", bytes(changed)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or was changed after it was written"):
            ImageFolder(str(photos), labels="folders", list=str(file))
    for content in (b"", b"a.jpg\nb.jpg\n", good[:40], b"[1]\n", b"{}\n", b"\xff\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a list of images of this version"):
            ImageFolder(str(photos), labels="folders", list=str(file))
    packed = tmp_path / "list.gz"
    ImageFolder(str(photos), list=str(packed))
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a list of images of this version, or is damaged"):
        ImageFolder(str(photos), list=str(packed))
    with pytest.raises(ValueError, match=r"nowhere/list cannot be written: No such file"):
        ImageFolder(str(photos), list=str(tmp_path / "nowhere" / "list"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        ImageFolder(str(photos), list=str(tmp_path))


def test_a_failed_scan_leaves_nothing(tmp_path: Path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        ImageFolder(str(tmp_path / "images"), list=str(tmp_path / "list"))
    with pytest.raises(ValueError, match="at least 1 thread, not 0"):
        ImageFolder(str(tmp_path / "images"), threads=0)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_a_full_disk_is_one_sentence(photos: Path, tmp_path: Path):
    """/dev/full takes nothing: a list there fails as on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    part = tmp_path / f".list.{os.getpid()}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(ValueError, match="list cannot be written: No space left on device"):
        ImageFolder(str(photos), list=str(tmp_path / "list"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("everything can be read here")
    (tmp_path / "a.jpg").touch()
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match=r"closed cannot be read: Permission denied"):
        ImageFolder(str(tmp_path))
