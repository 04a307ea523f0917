"""What is evaluated: a trunk with the normalisation of its images."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfsight.build import build
from selfsight.data.pixels import PixelFormat
from selfsight.distributed.payload import read_header, write_tensors
from selfsight.trunks.trunk import Trunk
from selfsight.weights.load import load_trunk


@dataclass
class Subject:
    """A trunk in evaluation mode.

    Attributes:
        trunk: on its device.
        node: the configuration that builds it.
        mean, std: of the channels, of pixels in [0, 1].
        pixels: format of its images.
        path: the file it came from.
        facts: where it is from, for results: run, step, whether it is at random initialisation.
    """

    trunk: Trunk
    node: dict[str, Any]
    mean: list[float]
    std: list[float]
    pixels: PixelFormat
    path: Path
    facts: dict[str, Any]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or uint16 (n, C, h, w) -> normalised fp32, channels last."""
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        white = 255 if images.dtype == torch.uint8 else 65535
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return floats.div_(white).sub_(mean).div_(std)

    def digest(self) -> str:
        """32 hex digits over configuration, normalisation and all weights."""
        whole = hashlib.sha256()
        head = [self.node, self.mean, self.std, self.pixels.channels, self.pixels.bits]
        whole.update(json.dumps(head, sort_keys=True).encode())
        for name, tensor in sorted(self.trunk.state_dict().items()):
            plain = tensor.detach().cpu().contiguous()
            whole.update(f"{name}{tuple(plain.shape)}{plain.dtype}".encode())
            whole.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return whole.hexdigest()[:32]


def trunk_file(run: str | None, trunk: str | None, step: int | None) -> Path:
    """The file that `run=` or `trunk=` means.

    Raises:
        ValueError: none or both given, or no such file.
    """
    if (run is None) == (trunk is None):
        raise ValueError(
            "say what to evaluate: run=runs/NAME, or trunk=FILE"
            + (", not both" if run is not None else "")
        )
    if run is None:
        path = Path(str(trunk)).expanduser()
        if not path.exists():
            raise ValueError(f"the trunk {path} does not exist")
        return path
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a run")
    if step is None:
        path = folder / "trunk.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no trunk.safetensors: the run has not ended; step=N takes one of "
                "those that checkpoint.keep_every exported"
            )
        return path
    path = folder / "trunks" / f"step_{step:08d}.safetensors"
    if not path.is_file():
        steps = sorted(int(p.stem[5:]) for p in path.parent.glob("step_*.safetensors"))
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
        raise ValueError(
            f"{folder} has no trunk of step {step}: {there} (checkpoint.keep_every exports them)"
        )
    return path


def load_subject(path: Path, device: torch.device, *, random_init: bool, seed: int) -> Subject:
    """Load a trunk that a run has exported, or one of any layout that `selfsight.weights` reads.

    Args:
        random_init: leave its weights as initialised with `seed`, to compare with.

    Raises:
        ValueError: the file holds no trunk of ours, or one that does not fit; one sentence.
    """
    torch.manual_seed(seed)
    if not is_ours(path):
        return _load_foreign(path, device, random_init)
    node, pixels, facts = read_description(path)
    trunk: Trunk = build(node)
    if not random_init:
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        try:
            trunk.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the weights of {path} do not fit its own trunk: {reason}") from None
    facts = {**facts, "file": path.name, "random_init": random_init}
    form = PixelFormat(pixels["channels"], pixels["bits"])
    return Subject(trunk.to(device).eval(), node, pixels["mean"], pixels["std"], form, path, facts)


def _load_foreign(path: Path, device: torch.device, random_init: bool) -> Subject:
    """A trunk in any of the layouts that `selfsight.weights` reads."""
    loaded = load_trunk(path)
    node, trunk = dict(loaded.found.node), loaded.trunk
    if random_init:
        trunk.init_weights()
    facts = {"run": None, "step": -1, "file": path.name, "random_init": random_init}
    return Subject(
        trunk.to(device).eval(),
        node,
        list(loaded.mean),
        list(loaded.std),
        PixelFormat(len(loaded.mean), 8),
        path,
        facts | {"layout": loaded.description},
    )


def is_ours(path: Path) -> bool:
    """Whether a file says which trunk of ours it holds."""
    try:
        _, metadata = read_header(path)
    except (OSError, ValueError):
        return False
    return "trunk" in metadata and "pixels" in metadata


def as_ours(path: Path, folder: Path) -> Path:
    """`path`, or for a file of another layout, the same trunk written as ours into `folder`."""
    if is_ours(path):
        return path
    found = _load_foreign(path, torch.device("cpu"), False)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{path.stem}.safetensors"
    pixels = {"channels": found.pixels.channels, "bits": 8, "mean": found.mean, "std": found.std}
    write_tensors(
        place,
        found.trunk.state_dict(),
        {
            "format": "pt",
            "trunk": json.dumps(found.node),
            "pixels": json.dumps(pixels),
            "step": "-1",
        },
    )
    return place


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The trunk's configuration, its pixels and facts, from the metadata of a file. Needs no torch
    but to be imported."""
    try:
        _, metadata = read_header(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    if "trunk" not in metadata or "pixels" not in metadata:
        raise ValueError(
            f"{path} does not say which trunk it holds: give the trunk.safetensors of a run"
        )
    facts = {"run": metadata.get("run"), "step": int(metadata.get("step", -1))}
    return json.loads(metadata["trunk"]), json.loads(metadata["pixels"]), facts
