"""What a person sees of a run: a progress bar in a terminal, quiet lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

QUIET_SECONDS = 15.0


class Console:
    """Progress and messages of the main process; silent on the others.

    Args:
        steps: Updates in all, or None for a run without end.
        first: Step the run starts or goes on at.
        active: Whether this process speaks.
        bar: Whether to draw a bar where the output is a terminal.
    """

    def __init__(self, *, steps: int | None, first: int, active: bool, bar: bool) -> None:
        self.steps, self.active = steps, active
        self.started, self.first = time.monotonic(), first
        self.spoke = float("-inf")
        self.bar = None
        if active and bar and sys.stderr.isatty():
            self.bar = tqdm(
                total=steps,
                initial=first,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} "
                "{remaining} left{postfix}",
            )

    def say(self, text: str) -> None:
        """One line above the progress."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One update is done."""
        if self.bar is not None:
            self.bar.update(1)

    def show(self, step: int, figures: Mapping[str, float], knn: str) -> None:
        """Show the figures of a log line after `step` updates."""
        if not self.active:
            return
        text = (
            f"loss {figures['loss']:.3f}  lr {figures['lr']:.3g}  "
            f"{figures['images_per_second']:.0f} img/s  data wait {figures['data_wait']:.0%}"
        ) + (f"  {knn}" if knn else "")
        if self.bar is not None:
            self.bar.set_postfix_str(" " + text, refresh=False)
        elif time.monotonic() - self.spoke >= QUIET_SECONDS or step == self.steps:
            self.spoke = time.monotonic()
            total = f"/{self.steps}" if self.steps else ""
            print(f"step {step}{total}  {text}{self._left(step)}", file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        if self.steps is None or step <= self.first:
            return ""
        seconds = (time.monotonic() - self.started) / (step - self.first) * (self.steps - step)
        return f"  {duration(seconds)} left" if seconds else ""

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min` or `8 d 3 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
