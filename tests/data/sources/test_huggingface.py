"""Sets of the package `datasets`, made here on disk in each of the forms it knows."""

import importlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources import huggingface
from selfsight.data.sources.huggingface import HuggingFaceImages

ROWS = 30

# Read when `datasets` is imported: nothing is asked of the network, nothing written to the home.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def datasets() -> Any:
    try:
        module: Any = importlib.import_module("datasets")
    except ImportError:
        pytest.skip("the package datasets is not installed (extra huggingface)")
    module.disable_progress_bars()
    return module


@pytest.fixture(scope="module")
def images(picture, encode) -> list[bytes]:
    forms = ("JPEG", "PNG", "WEBP")
    return [encode(picture(n, 40 + n, 30), forms[n % 3]) for n in range(ROWS)]


@pytest.fixture(scope="module")
def rows(datasets, images) -> Any:
    features = datasets.Features(
        {
            "note": datasets.Value("string"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "owl"]),
            "number": datasets.Value("int64"),
        }
    )
    columns = {
        "note": ["x" * 100_000] * ROWS,
        "picture": [{"bytes": image, "path": None} for image in images],
        "kind": [n % 3 if n else -1 for n in range(ROWS)],
        "number": [n // 10 for n in range(ROWS)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def forms(datasets, rows, tmp_path_factory) -> dict[str, str]:
    """Where the same rows lie in each form."""
    root = tmp_path_factory.mktemp("sets")
    rows.save_to_disk(str(root / "disk"), num_shards=3)
    both = datasets.DatasetDict({"train": rows, "test": rows.select(range(5))})
    both.save_to_disk(str(root / "both"))
    (root / "parquet").mkdir()
    (root / "hub" / "data").mkdir(parents=True)
    for n in range(2):
        part = rows.select(range(n * 15, n * 15 + 15))
        part.to_parquet(str(root / "parquet" / f"part-{n}.parquet"))
        part.to_parquet(str(root / "hub" / "data" / f"train-0000{n}-of-00002.parquet"))
    return {
        "save_to_disk": str(root / "disk"),
        "several splits": str(root / "both"),
        "arrow": str(root / "disk" / "data-*.arrow"),
        "parquet": str(root / "parquet" / "*.parquet"),
        "hub layout": str(root / "hub"),
    }


FORMS = ["save_to_disk", "several splits", "arrow", "parquet", "hub layout"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes_keys_and_labels(form, forms, images, tmp_path):
    source = HuggingFaceImages(forms[form], cache=str(tmp_path))
    assert len(source) == ROWS and source.classes == ["cat", "dog", "owl"]
    for n, image in enumerate(images):
        record = source.read(n)
        assert (record.key, record.data) == (f"train/{n}", image) and record.key == source.key(n)
        assert record.label == (n % 3 if n else None)
    assert source.fingerprint() == HuggingFaceImages(forms["save_to_disk"]).fingerprint()
    # To another process go the names of the files, not what is in them.
    sent = pickle.dumps(source)
    assert len(sent) < 20_000
    copy = pickle.loads(sent)
    assert [copy.read(n) for n in range(ROWS)] == [source.read(n) for n in range(ROWS)]


def test_slices_and_other_splits(forms, images, tmp_path):
    part = HuggingFaceImages(forms["parquet"], split="train[10:20]", cache=str(tmp_path))
    assert [part.read(n).data for n in range(len(part))] == images[10:20]
    assert pickle.loads(pickle.dumps(part)).read(9).data == images[19]
    test = HuggingFaceImages(forms["several splits"], split="test")
    assert len(test) == 5 and test.key(4) == "test/4"
    assert test.fingerprint() != part.fingerprint()


def test_columns_may_be_named(forms):
    source = HuggingFaceImages(forms["save_to_disk"], column="picture", label_column="number")
    assert source.classes is None
    assert [source.read(n).label for n in (0, 15, 29)] == [0, 1, 2]


def test_images_that_are_not_declared_as_such(datasets, images, tmp_path):
    """As in parquet files that were not written by `datasets`."""
    plain = datasets.Dataset.from_dict({"jpg": images, "text": ["a"] * ROWS})
    plain.to_parquet(str(tmp_path / "plain.parquet"))
    where, cache = str(tmp_path / "plain.parquet"), str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"has no image column: name .* its columns are jpg, text"):
        HuggingFaceImages(where, cache=cache)
    source = HuggingFaceImages(where, column="jpg", cache=cache)
    assert [source.read(n).data for n in range(ROWS)] == images and source.read(0).label is None
    with pytest.raises(ValueError, match=r"'text' of .* holds no images but string"):
        HuggingFaceImages(where, column="text", cache=cache)
    records = [{"bytes": image, "path": "x"} for image in images]
    datasets.Dataset.from_dict({"a": records}).save_to_disk(str(tmp_path / "struct"))
    assert HuggingFaceImages(str(tmp_path / "struct")).read(3).data == images[3]


def test_images_in_files_beside_the_set(datasets, images, tmp_path):
    (tmp_path / "good.jpg").write_bytes(images[0])
    os.mkfifo(tmp_path / "pipe.jpg")
    paths = [str(tmp_path / name) for name in ("good.jpg", "pipe.jpg", "gone.jpg")]
    paths += ["https://example.org/x.jpg", str(tmp_path), None]
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": None, "path": path} for path in paths] + [None]
    # Not by `save_to_disk`, which puts the bytes of the files into the set.
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "x.arrow"), features=features) as w:
        for cell in cells:
            w.write({"image": cell})
        w.finalize()
    source = HuggingFaceImages(str(tmp_path / "x.arrow"))
    assert source.read(0).data == images[0]
    reasons = [
        "pipe.jpg cannot be read: it is not a file",
        "gone.jpg cannot be read: No such file or directory",
        "this row names an address: only bytes and local files are read",
        "cannot be read: ",
        "there is no image in this row",
        "there is no image in this row",
    ]
    for n, reason in enumerate(reasons, 1):
        with pytest.raises(OSError, match=reason):
            source.read(n)
    assert source.fingerprint().startswith("7 rows, ")


def test_batches_by_worker_processes(forms):
    crops = MultiCrop({"all": CropGroup(size=24, count=2, scale=(0.3, 1.0))})
    source = HuggingFaceImages(forms["save_to_disk"])
    expected = Loader(source, crops, batch_size=8, seed=1)
    with Loader(source, crops, batch_size=8, seed=1, workers=1) as batches:
        for _ in range(5):
            ours, theirs = next(batches), next(expected)
            assert np.array_equal(ours.views[0], theirs.views[0])
            assert ours.positions.tolist() == theirs.positions.tolist()


def test_mistakes_are_one_sentence(forms, datasets, rows, images, tmp_path):
    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            HuggingFaceImages(*arguments, **options, cache=str(tmp_path / "cache"))
        assert "\n" not in str(caught.value)

    refused(r"set data\.path to a folder of save_to_disk", None)
    refused("/nowhere cannot be opened: there is no such file or folder", "/nowhere")
    refused("has the splits train, test, not 'val'", forms["several splits"], split="val")
    refused('Unknown split "val"', forms["hub layout"], split="val")
    refused("has no column 'image': its columns are note, picture", forms["arrow"], column="image")
    refused("has no column 'label'", forms["arrow"], label_column="label")
    refused("'note' of .* holds no classes", forms["arrow"], label_column="note")
    (tmp_path / "x.zip").write_bytes(b"PK")
    refused("only .arrow files or only .parquet files", str(tmp_path / "x.zip"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    refused("cut.parquet cannot be opened: ", str(tmp_path / "cut.parquet"))
    (tmp_path / "cut.arrow").write_bytes(b"\xff\xff")
    refused("cut.arrow cannot be opened: ", str(tmp_path / "cut.arrow"))
    two = rows.add_column("other", [{"bytes": i, "path": None} for i in images])
    two.save_to_disk(str(tmp_path / "two"))
    refused("has image columns picture, other: name the one", str(tmp_path / "two"))
    refused("no data", forms["parquet"], split="train[:0]")
    none = str(tmp_path / "none.arrow")
    with datasets.arrow_writer.ArrowWriter(path=none, features=rows.features) as writer:
        writer.finalize()
    refused("has no rows", none)
    shutil.copytree(forms["save_to_disk"], tmp_path / "damaged")
    (tmp_path / "damaged" / "state.json").write_text("{")
    refused("damaged cannot be opened: ", str(tmp_path / "damaged"))


PROCESS = """
import sys
from selfsight.data.sources.huggingface import HuggingFaceImages
try:
    HuggingFaceImages("nobody/nothing", cache=sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_a_name_on_the_hub_needs_a_network(datasets, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(Path(huggingface.__file__).parents[3]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.startswith("the Hugging Face set nobody/nothing cannot be opened: ")
    assert result.stdout.count("\n") == 1


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as import does where there is none
    with pytest.raises(ValueError, match="uv sync --extra huggingface"):
        HuggingFaceImages("x")
