"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# Small tensors on machines that run several things at once: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real image sets, named by SELFSIGHT_DATA."""
    folder = os.environ.get("SELFSIGHT_DATA")
    if not folder:
        pytest.skip("SELFSIGHT_DATA is not set: no real images here")
    return Path(folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes or many gigabytes unless it is asked for by `-m slow`."""
    if "slow" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="slow: run it with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
