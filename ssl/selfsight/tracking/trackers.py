"""The places beside the run's folder that are told its figures: wandb and TensorBoard."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfsight.tracking.tensorboard import TensorBoard
from selfsight.tracking.wandb import WandbRun


class Trackers:
    """All that the section `tracking` asks for; before `open` and on other ranks, none.

    Every method may be called either way.
    """

    def __init__(self) -> None:
        self.wandb: WandbRun | None = None
        self.tensorboard: TensorBoard | None = None

    def open(
        self,
        settings: Any,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Begin.

        Raises:
            ValueError: something asked for is not installed, or has no key.
        """
        self.tensorboard = TensorBoard(folder / "tensorboard", wanted=settings.tensorboard)
        self.wandb = WandbRun(
            mode=settings.wandb,
            project=settings.wandb_project,
            name=name,
            folder=folder,
            config=config,
            say=say,
        )

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        if figures and self.wandb is not None and self.tensorboard is not None:
            self.wandb.log(step, figures)
            self.tensorboard.log(step, figures)

    def alert(self, step: int, title: str, text: str) -> None:
        """Tell of a bad state."""
        if self.wandb is not None and self.tensorboard is not None:
            self.wandb.alert(title, text)
            self.tensorboard.text(step, "verdict", text)

    def close(self, summary: Mapping[str, Any]) -> None:
        if self.wandb is not None and self.tensorboard is not None:
            self.wandb.close(summary)
            self.tensorboard.close()
