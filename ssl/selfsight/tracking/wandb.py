"""Weights & Biases, an extra (`uv sync --extra wandb`): the only place that imports it."""

import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HOSTS = ("api.wandb.ai",)


def key_configured() -> bool:
    """Whether a key lies in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any(netrc.netrc().authenticators(host) is not None for host in HOSTS)
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """A run on wandb, or nothing at all: every method may be called either way.

    Args:
        mode: `auto` (online where a key is configured, else nothing), `online`, `offline`, `off`.
        say: Takes one line for the console.

    Raises:
        ValueError: asked for explicitly and not installed, or online without a key.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        if mode == "off" or (mode == "auto" and not key_configured()):
            return
        if importlib.util.find_spec("wandb") is None:
            if mode != "auto":
                raise ValueError(
                    f"tracking.wandb={mode} needs the package wandb: pip install 'selfsight[wandb]'"
                )
            say("a wandb key is configured, but the package is not installed: not tracking there")
            return
        if mode == "online" and not key_configured():
            raise ValueError(
                "tracking.wandb=online needs a key: run `wandb login` or set WANDB_API_KEY, "
                "or use tracking.wandb=offline"
            )
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)

        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            resume="allow",
            dir=folder,
            config=dict(config),
            mode="offline" if mode == "offline" else "online",
            settings=wandb.Settings(silent=True, console="off"),
        )
        offline = f"offline, under {folder / 'wandb'}"
        say(f"wandb: {offline if mode == 'offline' else self._run.url}")

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(dict(figures), step=step)

    def alert(self, title: str, text: str) -> None:
        """Have wandb tell the user, by the ways set there."""
        if self._run is not None:
            self._run.alert(title=title, text=text, wait_duration=0)

    def close(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish()
            self._run = None
