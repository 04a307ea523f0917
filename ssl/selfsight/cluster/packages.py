"""Package versions that a run's numbers depend on: recorded, and held when it goes on."""

import platform
from importlib import metadata
from pathlib import Path

from selfsight.cluster.spec import read_json
from selfsight.config import ConfigError

NAMES = (
    "torch", "torchvision", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
    "safetensors",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that compute, by name; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hold(before: dict[str, str | None], what: str, anyway: bool) -> None:
    """Refuse versions other than those of `before`; names that one side lacks are passed over.

    Args:
        before: versions by name.
        what: who had them, for the sentence.
        anyway: say it, and go on.

    Raises:
        ConfigError: the first that differs, and what to do.
    """
    now = versions()
    for name, version in before.items():
        if name in now and version != now[name]:
            told = f"{what} had {name} {version}, and here is {now[name]}"
            if not anyway:
                raise ConfigError(
                    f"{told}: use the same environment, or cluster.environment=anyway "
                    "(results will agree closely, not bit by bit)"
                )
            print(f"selfsight: {told}; cluster.environment=anyway", flush=True)
            return


def hold_run(folder: Path, anyway: bool) -> None:
    """Hold the versions that the run in `folder` was last continued with, if it ever saved.

    Raises:
        ConfigError: as `hold`.
    """
    record = read_json(folder / "environment.json")
    if record and any(folder.glob("checkpoints/step_*")):
        before = {"python": record.get("python"), **record.get("versions", {})}
        hold(before, f"the run {folder}", anyway)
