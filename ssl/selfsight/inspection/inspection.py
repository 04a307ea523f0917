"""Look into the data of a run: read a sample as the run would, and report on it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import cv2
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from selfsight.build import build
from selfsight.config import ConfigError
from selfsight.data.decode import DecodeLimits
from selfsight.data.lanes import sources_of
from selfsight.data.loader import start_server
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.source import Record, Source
from selfsight.data.statistics import pixel_statistics
from selfsight.data.worker import WorkerLimits
from selfsight.distributed.env import World
from selfsight.inspection import figures, speed
from selfsight.inspection.examine import Examiner, Seen
from selfsight.inspection.html import page
from selfsight.inspection.notes import notes
from selfsight.inspection.pictures import Picture, crop_sheet, image_sheet, picture
from selfsight.inspection.sample import Entry, Held, Sample
from selfsight.inspection.settings import Inspect, settings_from
from selfsight.inspection.table import table
from selfsight.runtime import colour_on_device, decode_limits, loader_workers

HELD_IMAGES, HELD_BYTES = 512, 1 << 28  # kept in memory for the mean and standard deviation
FILES = ("report.html", "report.json", "images.png", "crops.png")


def inspect_data(config: DictConfig, name: str) -> dict[str, Any]:
    """Inspect the data of a checked configuration; returns what is in report.json.

    Writes the `FILES` to the folder `inspect.out`, or `inspections/{name}`, and prints a table.

    Raises:
        ValueError: one sentence about something asked for that cannot be done.
    """
    section: Any = OmegaConf.to_container(config.inspect, resolve=True)
    settings = settings_from(section)
    folder = _folder(settings, name)
    groups_of: Any = OmegaConf.to_container(config.views, resolve=True)
    groups = {str(group): CropGroup(**crops) for group, crops in groups_of.items()}
    examiner = Examiner(
        groups,
        limits=decode_limits(config.loader),
        pixels=PixelFormat(config.pixels.channels, config.pixels.bits),
        reduced=config.loader.reduced,
        seed=config.seed,
        decode_seconds=config.loader.decode_seconds,
    )
    source: Source = build(config.data.train)
    device = _device(config.device)
    workers = loader_workers(config.loader.workers, World(device=device))
    with _quiet_libraries():
        report, pictures = _inspected(config, settings, source, examiner, groups, device, workers)
    _write(folder, report, pictures)
    print(table(report))
    print(f"\n{folder / FILES[0]}")
    return report


def _inspected(
    config: DictConfig,
    settings: Inspect,
    source: Source,
    examiner: Examiner,
    groups: Mapping[str, CropGroup],
    device: torch.device,
    workers: int,
) -> tuple[dict[str, Any], list[Picture]]:
    """The report, and the pictures that go with it."""
    limits, form = decode_limits(config.loader), examiner.full.pixels
    if workers and settings.loader_seconds:
        start_server()  # imports torch beside us
    # As in a loader's process: one core.
    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        reading = _Reading(source, examiner, settings, config.batch_size, config.seed)
        reading.run(progress=config.tracking.progress)
        report = reading.report(groups, config.loader.max_bad_share)
        report["pixels"] = _pixels(config, reading.held(source.name), limits, form)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv_threads)
    rates = (settings.images_per_second,) if settings.images_per_second else speed.RATES
    network = max(part.threads for part in sources_of(source))
    used = report["sample"]["used"]
    stages = speed.stage_figures(examiner.seconds, used, examiner.slowest, network, rates)
    report["speed"] = {"machine": speed.machine(), "one_core": stages, "loader": None}
    if settings.loader_seconds and used:
        report["speed"]["loader"] = speed.loader_figures(
            source,
            MultiCrop(
                groups,
                pixels=form,
                reduced=config.loader.reduced,
                colour=not colour_on_device(config.loader.colour, device, form),
            ),
            batch_size=config.batch_size,
            own_images=max(1, config.batch_size // config.gpus),
            seed=config.seed,
            workers=workers,
            prefetch=config.loader.prefetch,
            options={"limits": limits},
            limits=WorkerLimits(
                config.loader.decode_seconds, config.loader.fetch_seconds, config.loader.growth_gb
            ),
            images=settings.samples,
            seconds=settings.loader_seconds,
        )
    return {"notes": notes(report), **report}, reading.pictures


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """What C libraries print about damaged files goes nowhere; Python's stderr stays."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with os.fdopen(os.dup(kept), "w") as stderr, redirect_stderr(stderr):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Reading:
    """The sample while it is read."""

    def __init__(
        self, source: Source, examiner: Examiner, settings: Inspect, batch_size: int, seed: int
    ) -> None:
        self.source, self.examiner, self.settings = source, examiner, settings
        self.sample = Sample(source, batch_size, seed)
        self.seen: list[Seen] = []
        self.pictures: list[Picture] = []
        self._held: list[Record] = []
        self._bytes = 0
        self._took = 0.0
        self._late = False

    def run(self, progress: bool) -> None:
        """Read until there are enough images, or no time, or no more images."""
        settings, start, warm = self.settings, time.monotonic(), False
        bar = tqdm(
            total=settings.samples,
            unit=" images",
            disable=not progress or not sys.stderr.isatty(),
            leave=False,
        )
        chunks, asked = self.sample.chunks(settings.samples), time.perf_counter()
        with bar:
            for chunk in chunks:
                each = (time.perf_counter() - asked) / len(chunk)
                for entry in chunk:
                    self.examiner.seconds["fetch"] += each
                    if not warm and entry.record is not None:
                        self._warm_up(entry)
                        warm = True
                    seen = self.examiner.examine(entry)
                    self.seen.append(seen)
                    if not seen.reason and entry.record is not None:
                        self._keep(seen, entry.record)
                    bar.update()
                    if time.monotonic() - start > settings.seconds:
                        break
                self._late = time.monotonic() - start > settings.seconds
                if self._late:
                    break
                asked = time.perf_counter()
        chunks.close()
        self._took = time.monotonic() - start

    def _warm_up(self, entry: Entry) -> None:
        """What is imported and allocated at the first image is not what an image takes."""
        self.examiner.examine(entry)
        for stage in ("decode", "crops", "colour"):
            self.examiner.seconds[stage] = 0.0
        self.examiner.slowest = (0.0, "")

    def _keep(self, seen: Seen, record: Record) -> None:
        examiner, settings = self.examiner, self.settings
        assert examiner.pixels is not None
        size = len(record.data) if isinstance(record.data, bytes) else record.data.nbytes
        if len(self._held) < HELD_IMAGES and self._bytes + size <= HELD_BYTES:
            self._held.append(record)
            self._bytes += size
        if len(self.pictures) < max(settings.pictures, settings.crops):
            views = examiner.views if len(self.pictures) < settings.crops else []
            self.pictures.append(
                picture(seen.key, (seen.width, seen.height), examiner.pixels, views)
            )

    def held(self, name: str) -> Source:
        """The first usable images."""
        return Held(name, self._held)

    def report(self, groups: Mapping[str, CropGroup], most_bad: float) -> dict[str, Any]:
        """All figures but those of pixels and speed."""
        seen, parts = self.seen, self.sample.lanes.sources
        bad = figures.bad_figures(seen, most_bad)
        return {
            "data": {"name": self.source.name, "extent": _extent(parts)},
            "sample": {
                "asked": self.settings.samples,
                "read": len(seen),
                "used": len(seen) - bad["count"],
                "seconds": self._took,
                "stopped_by_time": self._late,
                "whole": self.sample.complete and not self._late,
            },
            "sources": figures.source_figures(seen, [part.name for part in parts]),
            "bad": bad,
            "images": figures.image_figures(seen),
            "labels": figures.label_figures(seen, self.source.classes),
            "crops": figures.crop_figures(seen, groups),
        }


def _extent(parts: list[Source]) -> str:
    return " + ".join(part.extent() for part in parts)


def _pixels(
    config: DictConfig, held: Source, limits: DecodeLimits, form: PixelFormat
) -> dict[str, Any]:
    """Mean and standard deviation of each channel, beside those that are set."""
    found: dict[str, Any] = {
        "channels": form.channels,
        "bits": form.bits,
        "estimated_at_start": bool(config.pixels.estimate),
        "configured": {"mean": list(config.pixels.mean), "std": list(config.pixels.std)},
        "estimated": None,
    }
    if len(held):
        seen = pixel_statistics(held, len(held), limits=limits, pixels=form)
        found["estimated"] = {
            "mean": list(seen.mean),
            "std": list(seen.std),
            "images": seen.images,
        }
    return found


def _device(asked: str) -> torch.device:
    """The kind of device that a run would take, which need not be on this machine."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def _folder(settings: Inspect, name: str) -> Path:
    """The folder of the report, which may hold an older one and nothing else."""
    folder = Path(settings.out).expanduser() if settings.out else Path("inspections") / name
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"inspect.out={folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILES[1]).exists():
        raise ConfigError(
            f"inspect.out={folder} holds other files and no report: name a new or empty folder"
        )
    return folder


def _write(folder: Path, report: dict[str, Any], pictures: list[Picture]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            (folder / file).unlink(missing_ok=True)
        with_views = [item for item in pictures if item.views]
        if pictures:
            image_sheet(pictures).save(folder / "images.png")
        if with_views:
            crop_sheet(with_views, list(report["crops"])).save(folder / "crops.png")
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "report.html").write_text(page(report, pictures), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None
