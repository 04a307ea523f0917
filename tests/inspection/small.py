"""Small inspections for the tests, and the images they look at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfsight.build import compose
from selfsight.config import check
from selfsight.inspection.inspection import inspect_data

ROOT = Path(__file__).parents[2]
SECTIONS = {"inspect": "selfsight.inspection.settings.Inspect"}
SMALL = ["views.global.size=32", "views.local.size=16", "views.local.count=2", "batch_size=8"]
SMALL += ["steps=10", "images=null", "epochs=null", "schedule.lr.warmup_steps=1", "device=cpu"]
SMALL += ["method.prototypes=[30]", "loader.workers=0", "tracking.progress=false"]
QUICK = [*SMALL, "inspect.loader_seconds=0"]
PLAIN_VIEWS = [
    f"views.{group}.{key}"
    for group in ("global", "local")
    for key in ("scale=[1.0,1.0]", "ratio=[1.0,1.0]", "jitter_probability=0", "gray=0", "blur=0")
]


def inspected(*overrides: str) -> dict[str, Any]:
    return inspect_data(check(compose("inspect_data", list(overrides)), SECTIONS), "test")


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def noise(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
