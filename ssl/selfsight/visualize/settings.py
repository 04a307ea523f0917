"""What `launch/visualize.py` takes, checked."""

from dataclasses import dataclass
from pathlib import Path

from selfsight.config import ConfigError


@dataclass
class Visualize:
    """The keys of conf/visualize.yaml, each explained there."""

    run: str | None = None
    trunk: str | None = None
    image: str | None = None
    bank: str | None = None
    out: str | None = None
    device: str = "auto"
    size: int = 480
    images: int = 16
    seconds: float = 0.5
    neighbours: int = 8
    among: int = 2000
    mass: float = 0.6


def checked(settings: Visualize, has_data: bool) -> Visualize:
    """The settings, if they go together.

    Raises:
        ConfigError: one sentence that names the key.
    """
    if (settings.run is None) == (settings.trunk is None):
        raise ConfigError("give one of run=runs/NAME and trunk=FILE, whose trunk is looked at")
    if settings.image is None and not has_data:
        raise ConfigError("give image=PATH (an image, a folder, a video) or data=... to look at")
    for key in ("run", "trunk", "image", "bank"):
        value = getattr(settings, key)
        if value is not None and not Path(value).expanduser().exists():
            raise ConfigError(f"{key}={value} does not exist")
    for key, least in (("size", 16), ("images", 1), ("neighbours", 0), ("among", 2)):
        if getattr(settings, key) < least:
            raise ConfigError(f"{key}={getattr(settings, key)} must be at least {least}")
    if not 0 < settings.mass < 1:
        raise ConfigError(f"mass={settings.mass} must be between 0 and 1")
    if settings.seconds <= 0:
        raise ConfigError(f"seconds={settings.seconds} must be above 0")
    if settings.device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"device={settings.device} is not one of auto, cpu, cuda, mps")
    return settings
