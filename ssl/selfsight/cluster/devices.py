"""The device that a job runs on."""

import torch

from selfsight.config import ConfigError


def choose_device(asked: str) -> str:
    """`cuda`, `mps` or `cpu`: what was asked for, or the best there is.

    Raises:
        ConfigError: it is not here.
    """
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if asked == "auto":
        return next(device for device, found in here.items() if found)
    if not here[asked]:
        found = ", ".join(device for device, is_here in here.items() if is_here)
        raise ConfigError(f"device={asked} is not on this machine; it has {found}")
    return asked
