"""Pages stand alone, escape what they are told, and draw curves as they are."""

import html.parser
import json
import math
import re

import pytest
from PIL import Image

from selfsight.pages.charts import BOTTOM, LEFT, RIGHT, TOP, Series, _ticks, chart
from selfsight.pages.parts import bars, document, inline, notes, table, tiles


class Structure(html.parser.HTMLParser):
    """Every tag that is opened is closed, and nothing is loaded from elsewhere."""

    ALONE = ("meta", "img", "rect", "line", "circle", "polyline", "polygon", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def curve(text: str) -> list[tuple[float, float]]:
    found = re.search(r'class="curve"[^>]*points="([^"]+)"', text)
    assert found
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]  # type: ignore[misc]


def test_a_page_stands_alone_and_escapes():
    odd = "<b>odd & 'name'\x1b[31m"
    body = tiles([("3", odd, True)]) + notes([{"level": "warning", "text": odd}])
    body += table((odd, "n"), [(odd, "1")]) + bars(odd, {odd: 3})
    body += chart(odd, [Series(odd, [0, 1], [1.0, 2.0])], levels=[(1.5, odd)])
    body += f'<img alt="" src="{inline(Image.new("RGB", (8, 8)))}">'
    text = document(odd, body)
    page = Structure(text)
    assert "<b>odd" not in text and "\x1b" not in text
    assert not re.search(r"https?://", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "prefers-color-scheme: dark" in text


def test_a_curve_is_where_its_values_are():
    text = chart("t", [Series("a", [0, 5, 10], [0.0, 1.0, 0.5])])
    points = curve(text)
    assert points == [(LEFT, BOTTOM), ((LEFT + RIGHT) / 2, TOP), (RIGHT, (TOP + BOTTOM) / 2)]


def test_long_curves_are_averaged_with_a_band():
    values = [float(n % 2) for n in range(10_000)]
    text = chart("t", [Series("a", list(range(10_000)), values)])
    assert len(curve(text)) <= 240 and 'class="band"' in text
    assert len({y for _, y in curve(text)}) == 1, "every group's mean is a half"


def test_values_that_are_not_finite_leave_no_trace():
    text = chart("t", [Series("a", [0, 1, 2], [1.0, math.nan, math.inf])])
    data = json.loads(re.search(r'data-points="([^"]+)"', text)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert data["series"][0]["x"] == [0.0]
    assert chart("t", [Series("a", [], [])]) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.39, 3.41), (-2e-5, 7e-5), (0, 123456)])
def test_ticks_are_round_and_cover(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(high) and ticks[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(ticks) <= 7
    step = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
    assert min(abs(step - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-6
