"""What a reader of the report should know first, in sentences."""

from __future__ import annotations

from typing import Any

FEW_SAME = 0.01  # of repeated, black or plain images; more is said
MOST_ENLARGED = 0.5  # of the crops of a group
MEAN_OFF, STD_OFF = 0.05, 0.15  # from the configured ones: absolute, and as a share

WARNING, NOTE = "warning", "note"


def notes(report: dict[str, Any]) -> list[dict[str, str]]:
    """Findings that matter, as {level: warning or note, text}, warnings first."""
    found = [*_sample(report), *_bad(report), *_images(report), *_crops(report)]
    found += [*_pixels(report), *_speed(report)]
    levels = {WARNING: 0, NOTE: 1}
    return [
        {"level": level, "text": text}
        for level, text in sorted(found, key=lambda item: levels[item[0]])
    ]


def _sample(report: dict[str, Any]):
    sample = report["sample"]
    if not sample["used"]:
        yield WARNING, f"None of the {sample['read']:,} images read can be used."
    if sample["stopped_by_time"]:
        yield (
            NOTE,
            f"Time was up after {sample['read']:,} of {sample['asked']:,} images: raise "
            "inspect.seconds for more.",
        )
    elif sample["whole"]:
        yield NOTE, f"This is all of the data: {sample['read']:,} images."


def _bad(report: dict[str, Any]):
    bad = report["bad"]
    if not bad["count"]:
        return
    first = bad["reasons"][0]
    text = (
        f"{bad['share']:.1%} of the images cannot be used ({bad['count']:,}; most often: "
        f"{first['reason']})"
    )
    if bad["share"] > bad["most_allowed"]:
        yield (
            WARNING,
            f"{text}: more than loader.max_bad_share={bad['most_allowed']:g}, so a run would end. "
            "Mend the data, or raise the share.",
        )
    else:
        yield NOTE, f"{text}; a run passes over them."


def _images(report: dict[str, Any]):
    images = report["images"]
    for name, what in (
        ("duplicates", "are copies, byte by byte, of another one of the sample"),
        ("black", "are nearly black"),
        ("plain", "have nearly one colour only"),
    ):
        found = images[name]
        if found["share"] > FEW_SAME:
            yield WARNING, f"{found['share']:.1%} of the images {what} ({found['count']:,})."


def _crops(report: dict[str, Any]):
    for name, group in report["crops"].items():
        if group["enlarged_share"] > MOST_ENLARGED:
            yield (
                WARNING,
                f"{group['enlarged_share']:.0%} of the {name} crops are enlarged to "
                f"{group['size']} pixels: the images are small for views.{name}.size="
                f"{group['size']} at that scale.",
            )


def _pixels(report: dict[str, Any]):
    pixels = report["pixels"]
    estimated, configured = pixels["estimated"], pixels["configured"]
    if estimated is None or pixels["estimated_at_start"]:
        return
    if len(configured["mean"]) != len(estimated["mean"]):
        return
    off = [
        abs(a - b) > MEAN_OFF for a, b in zip(configured["mean"], estimated["mean"], strict=True)
    ]
    off += [
        abs(a - b) > STD_OFF * b for a, b in zip(configured["std"], estimated["std"], strict=True)
    ]
    if any(off):
        mean, std = (",".join(f"{v:.3f}" for v in estimated[key]) for key in ("mean", "std"))
        yield (
            NOTE,
            f"The channels differ from pixels.mean and pixels.std; theirs are pixels.mean=[{mean}] "
            f"pixels.std=[{std}].",
        )


def _speed(report: dict[str, Any]):
    stages, loader = report["speed"]["one_core"], report["speed"]["loader"]
    if stages:
        share = stages["stages"][stages["costliest"]]["share"]
        rate = stages["cores"][min(1, len(stages["cores"]) - 1)]
        yield (
            NOTE,
            f"One core makes {stages['images_per_second']:,.0f} images/s; {stages['costliest']} "
            f"takes {share:.0%} of that. {rate['images_per_second']:,.0f} images/s need "
            f"{needed(rate)}.",
        )
        fetch = stages["stages"]["fetch"]["images_per_second"]
        if stages["reads_in_flight"] and fetch < stages["images_per_second"]:
            yield (
                NOTE,
                f"Fetching, {stages['reads_in_flight']} at a time, gives {fetch:,.0f} images/s: a "
                "loader process waits for the network; more of them, or a cache of shards, help.",
            )
    if loader and "failed" in loader:
        yield WARNING, f"The loader stopped: {loader['failed']}"


def needed(row: dict[str, float]) -> str:
    """The cores of the loader that a rate needs, in words."""
    workers, device = cores(row["colour_by_workers"]), cores(row["colour_on_device"])
    less = "" if workers == device else f", or {device} with loader.colour=device"
    return f"{workers} for the loader{less}"


def cores(number: float) -> str:
    """A number of cores as text."""
    if number >= 10:
        return f"{number:,.0f} cores"
    return "1 core" if 0.95 <= number < 1.05 else f"{max(number, 0.1):.1f} cores"
