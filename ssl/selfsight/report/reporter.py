"""Keeps what the report shows beside metrics, and writes the page while a run goes on.

    runs/NAME/pictures/images.json      thumbnails of the images that pictures are made of
                       crops.json       views as the first update got them
                       step_XXXXXXXX.json   what was seen after that step
             report.html

A failure here is told once and never ends a run.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from selfsight.pages.parts import inline
from selfsight.pictures.colours import rgb, sprite
from selfsight.report.page import page
from selfsight.report.record import PICTURES, read

THUMBNAIL = 64  # pixels a side
CROP = 112
IMAGES_OF_CROPS = 5


class Reporter:
    """The report of one run, on its main rank; elsewhere nothing is done.

    Args:
        folder: of the run.
        active: Whether this process writes it.
        notice: Takes one line for the console.
    """

    def __init__(self, folder: Path, *, active: bool, notice: Callable[[str], None]) -> None:
        self.folder, self.active, self._notice = folder, active, notice
        self._told = False

    def crops(self, names: Sequence[str], views: Sequence[Tensor]) -> None:
        """Keep the views of a batch's first images: one tensor (count, b, c, s, s) a group."""
        self._guarded(lambda: self._crops(names, views))

    def pictures(
        self,
        step: int,
        images: Callable[[], tuple[Tensor, list[int]]],
        observe: Callable[[], dict[str, Any]],
    ) -> None:
        """Keep what was seen after `step`; `images` and `observe` are called here or not at all."""
        self._guarded(lambda: self._pictures(step, images, observe))

    def forget_after(self, step: int) -> None:
        """The run goes back to `step`: what was seen later is not shown."""
        self._guarded(lambda: self._forget_after(step))

    def write(self) -> None:
        """Write the page from what lies in the run's folder."""
        self._guarded(lambda: write(self.folder))

    def _guarded(self, action: Callable[[], object]) -> None:
        if not self.active:
            return
        try:
            action()
        except Exception as error:
            if not self._told:
                self._told = True
                what = " ".join(str(error).split())[:200] or type(error).__name__
                self._notice(f"report.html lacks something ({what}); the run goes on")

    def _crops(self, names: Sequence[str], views: Sequence[Tensor]) -> None:
        count = min(IMAGES_OF_CROPS, views[0].shape[1])
        kept = [group[:, :count].contiguous().cpu().numpy() for group in views]
        rows = [
            [[inline(rgb(view[image]), CROP) for view in group] for group in kept]
            for image in range(count)
        ]
        sizes = [group.shape[-1] for group in views]
        self._keep("crops.json", {"groups": list(names), "sizes": sizes, "rows": rows})

    def _pictures(
        self,
        step: int,
        images: Callable[[], tuple[Tensor, list[int]]],
        observe: Callable[[], dict[str, Any]],
    ) -> None:
        if not (self.folder / PICTURES / "images.json").is_file():
            pixels, labels = images()
            sheet, columns, rows = sprite([rgb(p.numpy()) for p in pixels], THUMBNAIL)
            shown = {"sheet": inline(sheet), "columns": columns, "rows": rows, "labels": labels}
            self._keep("images.json", shown)
        self._keep(f"step_{step:08d}.json", {"step": step, **observe()})

    def _forget_after(self, step: int) -> None:
        for path in (self.folder / PICTURES).glob("step_*.json"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def _keep(self, name: str, value: Any) -> None:
        place = self.folder / PICTURES
        place.mkdir(exist_ok=True)
        part = place / f".{name}"
        part.write_text(json.dumps(value, separators=(",", ":")))
        part.replace(place / name)


def write(folder: Path) -> Path:
    """Write `report.html` of a run's folder; returns its path.

    Raises:
        ValueError: the folder is not a run's.
    """
    path = folder / "report.html"
    part = path.with_name(".report.html.part")
    part.write_text(page(read(folder)), encoding="utf-8")
    part.replace(path)
    return path
