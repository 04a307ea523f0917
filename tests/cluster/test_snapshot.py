"""The copy of the code that a job runs."""

import shutil
from pathlib import Path

import pytest

from selfsight.cluster import snapshot


@pytest.fixture
def checkout(tmp_path) -> Path:
    root = tmp_path / "checkout"
    for name in ("ssl/selfsight/a.py", "conf/a.yaml", "launch/a.py", "conf/site.yaml"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "ssl" / "selfsight" / "__pycache__").mkdir()
    (root / "ssl" / "selfsight" / "__pycache__" / "a.pyc").write_text("compiled")
    (root / "ssl" / "selfsight.egg-info").mkdir()
    (root / "ssl" / "selfsight.egg-info" / "PKG-INFO").write_text("installed")
    (root / "runs").mkdir()
    return root


def test_code_without_what_is_of_this_place(checkout, tmp_path):
    place, name = snapshot.take(tmp_path / "code", checkout)
    found = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert found == ["conf/a.yaml", "launch/a.py", "ssl/selfsight/a.py"]
    assert place == tmp_path / "code" / name and name == snapshot.code_hash(checkout)


def test_the_same_code_is_kept_once_and_other_code_beside_it(checkout, tmp_path):
    first = snapshot.take(tmp_path / "code", checkout)
    assert snapshot.take(tmp_path / "code", checkout) == first
    (checkout / "conf" / "a.yaml").write_text("edited")
    second = snapshot.take(tmp_path / "code", checkout)
    assert second != first
    assert (first[0] / "conf" / "a.yaml").read_text() == "conf/a.yaml"
    assert len(list((tmp_path / "code").iterdir())) == 2


def test_a_copy_that_somebody_edited_is_not_used(checkout, tmp_path):
    place, _ = snapshot.take(tmp_path / "code", checkout)
    (place / "conf" / "a.yaml").write_text("edited")
    again, _ = snapshot.take(tmp_path / "code", checkout)
    assert again == place and (place / "conf" / "a.yaml").read_text() == "conf/a.yaml"


def test_a_name_is_a_part_of_the_hash(checkout):
    before = snapshot.code_hash(checkout)
    shutil.move(checkout / "conf" / "a.yaml", checkout / "conf" / "b.yaml")
    assert snapshot.code_hash(checkout) != before


def test_this_code(tmp_path):
    place, name = snapshot.take(tmp_path)
    assert (place / "ssl" / "selfsight" / "cluster" / "entry.py").is_file()
    assert (place / "conf" / "pretrain.yaml").is_file()
    assert not (place / "ssl" / "__init__.py").exists()
    assert name == snapshot.code_hash()
