"""Figures between two log lines: summed on the device, reduced over ranks once a line."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from selfsight.distributed import collectives


class Window:
    """Sums of figures since the last log line.

    Adding never waits for the device; `reduce` does, and empties the window.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's or update's figures."""
        for name, value in figures.items():
            held = self._sums.get(name)
            value = value.detach().float()
            self._sums[name] = value.clone() if held is None else held.add_(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def reduce(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Means of scalars and sums of larger tensors, over the window and all ranks, on the CPU.

        One collective for all of them.
        """
        names = sorted(self._sums)
        flat = torch.cat([self._sums[name].flatten() for name in names])
        flat = collectives.all_reduce_sum(flat).cpu()
        means: dict[str, float] = {}
        sums: dict[str, Tensor] = {}
        for name, part in zip(
            names, flat.split([self._sums[n].numel() for n in names]), strict=True
        ):
            if self._sums[name].dim() == 0:
                means[name] = part.item() / (self._counts[name] * collectives.size())
            else:
                sums[name] = part.view(self._sums[name].shape)
        self._sums.clear()
        self._counts.clear()
        return means, sums


class Clock:
    """Rates of the training steps alone: what happens while `paused` does not count."""

    def __init__(self, images_per_update: int) -> None:
        self.images_per_update = images_per_update
        self.line: dict[str, float] = {}
        """Of the last line: images a second over all ranks, and share of time that the loop waited
        for data."""
        self._images = 0
        self._seconds = 0.0
        self._line_images = 0
        self._line_seconds = 0.0
        self._line_waited = 0.0
        self._since = time.perf_counter()

    def update(self) -> None:
        """One update is done."""
        self._line_images += self.images_per_update

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is not training time."""
        self._line_seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def mark_line(self, waited: float) -> None:
        """Take the rates since the last call; `waited` is the loader's total of seconds."""
        with self.paused():
            seconds = max(self._line_seconds, 1e-9)
            self.line = {
                "images_per_second": self._line_images / seconds,
                "data_wait": min(1.0, (waited - self._line_waited) / seconds),
            }
            self._images += self._line_images
            self._seconds += self._line_seconds
            self._line_images, self._line_seconds, self._line_waited = 0, 0.0, waited

    @property
    def images_per_second(self) -> float | None:
        """Of this process's whole time so far, as of the last line."""
        return self._images / self._seconds if self._seconds else None
