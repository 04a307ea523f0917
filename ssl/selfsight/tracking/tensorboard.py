"""Event files for TensorBoard, an extra (`uv sync --extra tensorboard`)."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes figures for TensorBoard, or nothing at all: every method may be called either way.

    Raises:
        ValueError: wanted and not installed.
    """

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        self._writer: Any = None
        if not wanted:
            return
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tracking.tensorboard=true needs the package tensorboard: "
                "pip install 'selfsight[tensorboard]'"
            )
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, step)

    def text(self, step: int, title: str, words: str) -> None:
        if self._writer is not None:
            self._writer.add_text(title, words, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
