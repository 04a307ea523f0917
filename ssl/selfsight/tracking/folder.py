"""The folder of a run: what it is, what it measured, what it made.

runs/NAME/config.yaml        the resolved configuration
          environment.json   commit, versions, hardware
          metrics.jsonl      one line a logged update
          summary.json       status, figures and verdict, rewritten as the run goes on
          ledger.jsonl       samples that could not be used
          checkpoints/       step_00001000/ ...
          trunk.safetensors  the trunk, its configuration in the metadata
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from selfsight.tracking.revision import commit

VERSIONS = (
    "selfsight", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
    "safetensors", "hydra-core",
)  # fmt: skip

# What a run's folder may hold before the run has written its configuration.
OWN_FILES = {"checkpoints", "ledger.jsonl", "stream.jsonl", "code", "jobs", "job.json", "stop"}
OWN_FILES |= {"lease.json"}


class RunFolder:
    """Paths of a run and the files that are rewritten whole or appended to.

    Only the main process writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.trunk = path / "trunk.safetensors"
        self.ledger = path / "ledger.jsonl"
        self.stream = path / "stream.jsonl"
        self.metrics = path / "metrics.jsonl"

    def create(self) -> None:
        """Make the folder.

        Raises:
            ValueError: it cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the run's folder {self.path} cannot be made ({error.strerror}): "
                "set runs_dir to a folder that can be written"
            ) from None

    def config_text(self) -> str | None:
        """The configuration the run was started with, if it was."""
        path = self.path / "config.yaml"
        return path.read_text() if path.is_file() else None

    def write_config(self, text: str) -> None:
        write_whole(self.path / "config.yaml", text)

    def write_environment(self, **more: Any) -> None:
        write_whole(self.path / "environment.json", json.dumps(environment() | more, indent=2))

    def summary(self) -> dict[str, Any]:
        """The summary as last written, or an empty one."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def update_summary(self, **figures: Any) -> None:
        """Merge figures into summary.json."""
        text = json.dumps(self.summary() | figures, indent=2)
        write_whole(self.path / "summary.json", text + "\n")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop lines later than `step`, and a torn last one: a resumed run writes them again."""
        if not self.metrics.is_file():
            return
        kept = [json.dumps(line) for line in self.read_metrics() if line["step"] <= step]
        write_whole(self.metrics, "".join(line + "\n" for line in kept))

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole."""
        if not self.metrics.is_file():
            return
        for line in self.metrics.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # torn by a kill while it was written; nothing whole follows


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place and rename it there, so that no reader sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def environment() -> dict[str, Any]:
    """What a result depends on beside the configuration: commit, versions, hardware."""
    devices = [
        torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in VERSIONS},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": devices,
        "cuda": torch.version.cuda if devices else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
