"""What a run's `trunk.safetensors` says of itself."""

import json

from omegaconf import DictConfig, OmegaConf

from selfsight.methods.method import Method
from selfsight.tracking.wording import numbers


def trunk_metadata(config: DictConfig, method: Method, name: str, step: int) -> dict[str, str]:
    """The metadata of the file: enough to build the trunk again and to normalise its images."""
    pixels = {
        "channels": config.pixels.channels,
        "bits": config.pixels.bits,
        "mean": numbers(method.pixel_mean),
        "std": numbers(method.pixel_std),
    }
    return {
        "format": "pt",
        "trunk": json.dumps(OmegaConf.to_container(config.model.trunk, resolve=True)),
        "pixels": json.dumps(pixels),
        "run": name,
        "step": str(step),
    }
