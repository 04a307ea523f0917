"""Checkpoints that are whole or absent, checked when they are read, and never unpickled.

    checkpoints/step_00001000/manifest.json           what the other files must be, and all scalars
                              state-00000.safetensors tensors, or parts of them, one file a rank

A checkpoint is written into a hidden folder beside the others, flushed to the disk, and renamed
whole. The manifest holds size and SHA-256 of every payload file and a digest of itself.

This module writes from one process while it waits; `async_save` writes from all ranks while they
train. What either wrote is read here, into any number of ranks.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.distributed.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    CheckpointWriteError,
    checkpoints,
    discard_after,
    latest,
    new_manifest,
    place_of,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
    scratch_of,
    verify,
)
from selfsight.distributed.checkpoint_parts import Reader, load_into, to_write
from selfsight.distributed.payload import reads_back, write_tensors

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "CheckpointWriteError",
    "Reader",
    "checkpoints",
    "discard_after",
    "latest",
    "load",
    "load_into",
    "payload_name",
    "read_manifest",
    "save",
    "verify",
]


def payload_name(rank: int) -> str:
    """The file of a checkpoint that `rank` writes."""
    return f"state-{rank:05d}.safetensors"


def save(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    *,
    config_hash: str,
    world_size: int = 1,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `step`, then delete those that are no longer kept.

    One rank calls it; it changes none of what it is given. Folders that a killed run left half
    written are removed. When it fails, what it wrote is removed and nothing else.

    Args:
        folder: where the run's checkpoints lie.
        step: the number of finished steps.
        tensors: name to tensor, on any device; whole, that is, no DTensor of several ranks.
        scalars: everything else, as JSON has it; keys are strings.
        config_hash: what a resume compares its configuration with.
        world_size: number of ranks of the run.
        keep: the newest intact checkpoints that stay; never fewer than two.
        keep_every: those of a step that it divides stay for good.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointWriteError: the disk is full, say.
        ValueError: a scalar is not JSON, or a tensor cannot be stored.
    """
    assert step >= 0
    assert keep >= 1
    folder = Path(folder)
    place, scratch = place_of(folder, step), scratch_of(folder, step, 0)
    manifest = new_manifest(step, scalars, config_hash=config_hash, world_size=world_size)
    own, metadata = to_write(tensors, 0, 1)
    if metadata or len(own) < len(tensors):
        raise ValueError("tensors that are cut over ranks are saved by all ranks: see async_save.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        scratch.mkdir()
        written = write_tensors(scratch / payload_name(0), own)
        if not reads_back(scratch / payload_name(0), own):
            raise OSError(f"{payload_name(0)} does not read as it was written")
        manifest["files"][payload_name(0)] = asdict(written)
        publish(scratch, manifest, place)
    except OSError as error:
        raise CheckpointWriteError(
            f"the checkpoint of step {step} was not written to {folder} "
            f"({error.strerror or error}); the ones before it are untouched."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prune(place, keep, keep_every)
    return place


def load(
    path: Path | str, device: torch.device | str = "cpu", *, checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its whole tensors, and its manifest with `step`, `scalars`, ...

    On the CPU the tensors map the file: pages are read when they are used, and a change to a tensor
    does not reach the file. Copy them into place rather than keep them. `load_into` reads what a
    rank holds, and no more.

    Args:
        path: the folder of one checkpoint.
        device: where the tensors go.
        checked: True where `latest` or `verify` has read every byte already.

    Raises:
        CheckpointError: see `verify`.
    """
    with Reader(path, checked=checked) as reader:
        return {name: reader.read(name, device) for name in reader.shapes}, reader.manifest
