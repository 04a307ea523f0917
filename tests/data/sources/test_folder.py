import pickle
from pathlib import Path

import pytest

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
