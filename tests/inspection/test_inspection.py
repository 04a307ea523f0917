"""Whole inspections of data of which everything is known."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.stores import serving
from tests.data.tars import write
from tests.inspection.small import PLAIN_VIEWS, QUICK, SMALL, encoded, inspected, noise


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("report") / "new"
    return (
        inspected(
            *SMALL,
            "data=folder",
            f"data.path='{folder}'",
            f"inspect.out={out}",
            "loader.max_pixels=10_000",
            "loader.max_bad_share=0.1",
            "inspect.loader_seconds=0.2",
            "inspect.images_per_second=500",
        ),
        out,
    )


def test_figures_are_the_truth(report, folder):
    found, out = report
    assert found["sample"]["read"] == 40
    assert found["sample"]["used"] == 33
    assert found["sample"]["whole"] and not found["sample"]["stopped_by_time"]
    images = found["images"]
    width, height = images["sizes"]["width"], images["sizes"]["height"]
    assert (width["min"], width["median"], width["max"]) == (20, 40, 48)  # turned ones are upright
    assert (height["min"], height["median"], height["max"]) == (20, 20, 48)
    assert images["sizes"]["aspect_ratio"]["min"] == 0.5
    assert images["sizes"]["megapixels"]["max"] == pytest.approx(48 * 48 / 1e6)
    assert sum(width["histogram"]["counts"]) == 33
    formats = {"JPEG": 30, "PNG": 7, "HTML": 2, "empty": 1}
    assert images["formats"] == formats
    assert images["modes"] == {"RGB": 33}
    assert images["kinds"]["rotated"]["count"] == 4
    assert images["duplicates"]["count"] == 3
    assert images["duplicates"]["sets"][0]["images"] == 4
    assert images["black"]["count"] == 2
    assert images["plain"]["count"] == 1
    assert found["labels"]["counts"] == {"cats": 20, "dogs": 13}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found))


def test_bad_ones_are_counted_by_reason(report):
    found, _ = report
    bad = found["bad"]
    assert (bad["count"], bad["share"], bad["most_allowed"]) == (7, 7 / 40, 0.1)
    counts = {row["reason"]: row["count"] for row in bad["reasons"]}
    assert sum(counts.values()) == 7
    assert counts["200x100 pixels, more than the limit of 10,000"] == 1
    assert counts["empty file"] == 1
    pages = next(row for row in bad["reasons"] if "HTML" in row["what"])
    assert sorted(pages["examples"]) == ["dogs/page0.jpg", "dogs/page1.jpg"]
    torn = next(row for row in bad["reasons"] if "PNG" in row["what"] and row["count"] == 3)
    assert sorted(torn["examples"]) == [f"dogs/torn{n}.png" for n in range(3)]
    assert any("loader.max_bad_share=0.1" in n["text"] for n in found["notes"])
    assert found["notes"][0]["level"] == "warning"


def test_speed_is_measured_and_adds_up(report):
    speed = report[0]["speed"]
    one = speed["one_core"]
    assert set(one["stages"]) == {"fetch", "decode", "crops", "colour"}
    assert sum(s["milliseconds"] for s in one["stages"].values()) == pytest.approx(
        one["milliseconds"]
    )
    assert sum(s["share"] for s in one["stages"].values()) == pytest.approx(1)
    (row,) = one["cores"]
    assert row["colour_by_workers"] == pytest.approx(0.5 * one["milliseconds"])
    assert row["colour_on_device"] < row["colour_by_workers"]
    loader = speed["loader"]
    assert loader["images_per_second"] > 0 and loader["workers"] == 0
    assert loader["lanes"] == 8


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("img", "meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_page_stands_alone(report, folder):
    found, out = report
    text = (out / "report.html").read_text()
    page = _Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert "b" not in page.tags[: page.tags.index("h1") + 2], "the name is not taken as HTML"
    assert "&lt;b&gt;odd &amp; name" in text
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.sources) == 33 + 12 * (1 + 4)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not re.search(r"https?://|url\(", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for row in found["bad"]["reasons"]:
        assert row["reason"] in text


def test_contact_sheets_show_images_and_crops(report):
    _, out = report
    with Image.open(out / "images.png") as images:
        assert images.size == (10 + 8 * 154, 10 + 5 * 170)  # 33 images in rows of 8
    with Image.open(out / "crops.png") as crops:
        assert crops.size[1] == 24 + 10 + 12 * 154
        assert len(np.unique(np.asarray(crops.convert("L")))) > 100  # the noise is there


@pytest.mark.parametrize(("size", "share"), [(20, 0.0), (21, 1.0)])
def test_enlarged_crops(tmp_path, size, share):
    """Of images of 40 x 20 pixels whole square crops are the central 20 x 20."""
    (tmp_path / "in").mkdir()
    for n in range(6):
        (tmp_path / "in" / f"{n}.png").write_bytes(encoded(noise(n, 40, 20)))
    found = inspected(
        *QUICK,
        *PLAIN_VIEWS,
        "data=folder",
        f"data.path={tmp_path / 'in'}",
        f"inspect.out={tmp_path / 'out'}",
        f"views.global.size={size}",
        "views.local.size=10",
    )
    crops = found["crops"]
    assert crops["global"]["crops"] == 12
    assert crops["global"]["enlarged_share"] == share
    assert crops["global"]["magnification"]["median"] == pytest.approx(size / 20)
    assert crops["local"]["enlarged_share"] == 0
    warned = any("global crops are enlarged" in note["text"] for note in found["notes"])
    assert warned == bool(share)


def test_means_and_deviations(tmp_path):
    """Half of each image is black, half of it of one colour."""
    (tmp_path / "in").mkdir()
    for n in range(5):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[:20] = 51, 102, 255
        pixels[0, 0, 0] = n
        (tmp_path / "in" / f"{n}.png").write_bytes(encoded(pixels))
    found = inspected(
        *QUICK, "data=folder", f"data.path={tmp_path / 'in'}", f"inspect.out={tmp_path / 'out'}"
    )["pixels"]
    assert found["estimated"]["images"] == 5
    assert found["estimated"]["mean"] == pytest.approx([0.1, 0.2, 0.5], abs=1e-3)
    assert found["estimated"]["std"] == pytest.approx([0.1, 0.2, 0.5], abs=1e-3)
    assert found["configured"]["mean"] == [0.485, 0.456, 0.406]


def mixture(tmp_path: Path) -> list[str]:
    """Three shards of 20 grey images, 12 more images in a folder, mixed 3 to 1."""
    for shard in range(3):
        members = {}
        for n in range(20):
            grey = noise(100 * shard + n, 24, 24)[:, :, 0]
            members[f"{n:03d}.jpg"] = encoded(grey, "JPEG")
            members[f"{n:03d}.cls"] = b"1"
        members["020.jpg"] = b"no image"
        write(tmp_path / "shards" / f"web-{shard}.tar", members)
    (tmp_path / "own").mkdir()
    for n in range(12):
        (tmp_path / "own" / f"{n}.png").write_bytes(encoded(noise(n, 50, 50)))
    sources = (
        "{web: {_target_: selfsight.data.sources.shards.TarShards, "
        f"shards: {tmp_path}/shards/web-*.tar, whole_index: false, pieces: 2}}, "
        "own: {_target_: selfsight.data.sources.folder.ImageFolder, "
        f"path: {tmp_path}/own}}}}"
    )
    target = "selfsight.data.sources.mixture.Mixture"
    train = f"{{_target_: {target}, sources: {sources}, weights: {{web: 3, own: 1}}}}"
    return ["data=folder", "~data.train", f"+data.train={train}"]


def test_a_mixture_of_shards_and_a_folder(tmp_path):
    found = inspected(*QUICK, *mixture(tmp_path), f"inspect.out={tmp_path / 'out'}")
    web, own = found["sources"]
    assert (web["read"], web["bad"]) == (63, 3)
    assert (own["read"], own["bad"]) == (12, 0)
    assert own["median_megapixels"] == pytest.approx(0.0025)
    assert found["images"]["kinds"]["grey"]["count"] == 60
    assert found["labels"]["counts"] == {"1": 60}
    assert found["sample"]["whole"]
    assert "Sources" in (tmp_path / "out" / "report.html").read_text()


def test_shards_behind_a_server(tmp_path):
    mixture(tmp_path)  # makes the shards
    with serving(tmp_path / "shards") as server:
        found = inspected(
            *SMALL,
            "data=uncurated_stream",
            f"data.shards='{server.url}/web-{{0..3}}.tar'",
            "data.pieces=2",
            "data.retry_seconds=2",
            "inspect.loader_seconds=0.2",
            f"inspect.out={tmp_path / 'out'}",
        )
    assert found["sample"]["used"] == 60
    gone = next(row for row in found["bad"]["reasons"] if "web-3.tar" in row["examples"][0])
    assert gone["count"] == 2  # its pieces
    one = found["speed"]["one_core"]
    assert one["reads_in_flight"] == 16
    assert one["stages"]["fetch"]["share"] is None  # waiting takes no core
    assert found["speed"]["loader"]["images_per_second"] > 0


def test_the_same_command_finds_the_same(tmp_path):
    def figures(out: str) -> dict[str, Any]:
        asked = ["data=synthetic", "inspect.samples=40", f"inspect.out={tmp_path / out}"]
        found = inspected(*SMALL, *asked, "inspect.loader_seconds=0")
        found["sample"].pop("seconds")
        return {k: v for k, v in found.items() if k not in ("speed", "notes")}

    first = figures("a")
    assert first == figures("b")
    assert first == figures("a")  # an older report is replaced
    assert first["sample"]["read"] == 40 and not first["sample"]["whole"]
    assert first["images"]["formats"] == {"pixels": 40}
    assert first["images"]["sizes"]["bytes"] is None
    assert first["labels"]["labelled"] == 40


def test_time_is_kept(tmp_path):
    found = inspected(
        *QUICK, "data=synthetic", "inspect.seconds=1e-6", f"inspect.out={tmp_path / 'out'}"
    )
    assert found["sample"]["stopped_by_time"]
    assert found["sample"]["read"] == 1
    assert any("inspect.seconds" in note["text"] for note in found["notes"])


def test_images_that_decode_too_slowly_are_bad(tmp_path, folder):
    found = inspected(
        *QUICK,
        "data=folder",
        f"data.path='{folder}'",
        "loader.decode_seconds=1e-9",
        f"inspect.out={tmp_path / 'out'}",
    )
    assert found["sample"]["used"] == 0
    slow = [r for r in found["bad"]["reasons"] if "loader.decode_seconds=1e-09" in r["reason"]]
    assert [row["count"] for row in slow] == [34]


def test_nothing_but_bad_images_is_a_report_too(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(b"no image at all")
    found = inspected(
        *SMALL, "data=folder", f"data.path={tmp_path / 'in'}", f"inspect.out={tmp_path / 'out'}"
    )
    assert found["sample"]["used"] == 0
    assert found["notes"][0] == {
        "level": "warning",
        "text": "None of the 3 images read can be used.",
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    "pixels",
    [
        ["pixels.channels=1", "pixels.mean=[0.5]", "pixels.std=[0.2]"],
        ["pixels.bits=16"],
    ],
)
def test_other_pixels(tmp_path, folder, pixels):
    colourless = [
        f"views.{group}.{key}"
        for group in ("global", "local")
        for key in ("jitter_strengths=[0.4,0.4,0,0]", "gray=0")
    ]
    found = inspected(
        *QUICK,
        *pixels,
        *colourless,
        "data=folder",
        f"data.path='{folder}'",
        f"inspect.out={tmp_path / 'out'}",
    )
    assert found["sample"]["used"] == 34  # the large one as well
    assert len(found["pixels"]["estimated"]["mean"]) == len(found["pixels"]["configured"]["mean"])
    assert (tmp_path / "out" / "crops.png").exists()
