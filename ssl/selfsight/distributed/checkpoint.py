"""Checkpoints that are whole or absent, checked when they are read, and never unpickled.

    checkpoints/step_00001000/manifest.json           what the other files must be, and all scalars
                              state-00000.safetensors tensors

A checkpoint is written into a hidden folder beside the others, flushed to the disk, and renamed
whole. The manifest holds size and SHA-256 of every payload file and a digest of itself. Payload may
lie in several files: a reader takes the union of those that the manifest names.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfsight.distributed.payload import Written, measure, write_tensors

FORMAT = "selfsight checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
PAYLOAD = "state-00000.safetensors"
# A checkpoint that is about to be replaced by one of the same step is called `.replaced` meanwhile.
_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
_TEMPORARY = ".unfinished_"


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which file and why."""


class CheckpointWriteError(Exception):
    """A checkpoint was not written; those before it are as they were."""


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
        tensors: name to tensor, on any device.
        scalars: everything else, as JSON has it; keys are strings.
        config_hash: what a resume compares its configuration with.
        world_size: number of ranks of the run.
        keep: the newest intact checkpoints that stay.
        keep_every: those of a step that it divides stay for good.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointWriteError: the disk is full, say.
        ValueError: a scalar is not JSON, or a tensor's dtype cannot be stored.
    """
    assert step >= 0
    assert keep >= 1
    folder = Path(folder)
    place = folder / f"step_{step:08d}"
    scratch = folder / f"{_TEMPORARY}{place.name}_{os.getpid()}"
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": world_size,
        "config_hash": config_hash,
        "scalars": _require_json(scalars, "scalars"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        scratch.mkdir()
        payload = write_tensors(scratch / PAYLOAD, tensors)
        manifest["files"] = {PAYLOAD: {"size": payload.size, "sha256": payload.sha256}}
        _write(scratch / MANIFEST, _manifest_text(manifest))
        _flush(scratch)
        _publish(scratch, place)
        if problem := _quick_problem(place):
            raise OSError(problem)
    except OSError as error:
        raise CheckpointWriteError(
            f"the checkpoint of step {step} was not written to {folder} "
            f"({error.strerror or error}); the ones before it are untouched."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _prune(place, keep, keep_every)
    return place


def latest(folder: Path | str, notice: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint in `folder` whose every byte is as it was written; None without one.

    A torn or altered one is passed over.

    Args:
        folder: where the run's checkpoints lie; it may not exist.
        notice: called with one sentence for each that is passed over.
    """
    for path in reversed(_all(Path(folder))):
        try:
            verify(path)
        except CheckpointError as error:
            if notice:
                notice(f"{error}; this checkpoint is passed over.")
        else:
            return path
    return None


def verify(path: Path | str) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the manifest.

    Raises:
        CheckpointError: a file is missing, torn or altered; it names the file.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        try:
            found = measure(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read ({error.strerror})") from error
        if found.size != expected["size"]:
            raise CheckpointError(
                f"{path / name} has {found.size} bytes and was written with {expected['size']}"
            )
        if found != Written(**expected):
            raise CheckpointError(f"{path / name} was altered: its SHA-256 is another one")
    return manifest


def load(
    path: Path | str, device: torch.device | str = "cpu", *, checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors, and its manifest with `step`, `scalars`, `config_hash`, ...

    On the CPU the tensors map the file: pages are read when they are used, and a change to a tensor
    does not reach the file. Copy them into place rather than keep them.

    Args:
        path: the folder of one checkpoint.
        device: where the tensors go.
        checked: True where `latest` or `verify` has read every byte already.

    Raises:
        CheckpointError: see `verify`.
    """
    path = Path(path)
    manifest = _read_manifest(path) if checked else verify(path)
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        try:
            with safe_open(path / name, framework="pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118  (it is no mapping)
                    assert key not in tensors, f"{key} lies in two files of {path}"
                    tensors[key] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name} cannot be read ({error})") from error
    return tensors, manifest


def _require_json(value: Any, where: str) -> Any:
    """`value`, which JSON must give back as it is (tuples as lists)."""
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"key {bad[0]!r} of {where} is not a string.")
        return {key: _require_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_require_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON does not have.")


def _manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest: any other byte in the file is an alteration."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, sort_keys=True, indent=1).encode() + b"\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(text)
        intact = _manifest_text(manifest) == text
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file} is torn or was altered")
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{file} is of format {manifest.get('format')!r}, version {manifest.get('version')!r}, "
            f"and this version of selfsight reads {FORMAT!r}, version {VERSION}"
        )
    if elsewhere := [name for name in manifest["files"] if Path(name).name != name]:
        raise CheckpointError(f"{file} names {elsewhere[0]!r}, which lies in another folder")
    return manifest


def _quick_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest and the sizes of its files, or None."""
    try:
        for name, expected in _read_manifest(path)["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{path / name} is torn"
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def _all(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by step; one that is being replaced just before its successor."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [
        path
        for _, _, path in sorted(
            (int(match[1]), match[2] is None, path) for match, path in found if match
        )
    ]


def _publish(scratch: Path, place: Path) -> None:
    """Rename `scratch` to `place`. At no instant is there neither the new nor the old one."""
    old = place.with_name(f"{place.name}.replaced")
    if place.exists():
        _remove(old)
        place.rename(old)
    scratch.rename(place)
    _flush(place.parent)
    _remove(old)


def _prune(newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete what is older than the `keep` newest intact checkpoints, `newest` being the first.

    Milestones stay, and so do later steps, from which this run was wound back.
    """
    paths = _all(newest.parent)
    paths = paths[: paths.index(newest) + 1]
    intact = [path for path in paths if _quick_problem(path) is None]
    if len(intact) < keep:
        return
    for path in paths[: paths.index(intact[-keep])]:
        match = _NAME.fullmatch(path.name)
        assert match
        if not (keep_every and int(match[1]) % keep_every == 0):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint: under its own name it is whole or absent at every instant.

    What cannot be deleted now is tried again at the next save.
    """
    hidden = path.with_name(f"{_TEMPORARY}removed_{path.name}_{os.getpid()}")
    try:
        path.rename(hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for old in folder.glob("step_*.replaced"):
        place = old.with_suffix("")
        if _quick_problem(place) is None:
            _remove(old)
        else:
            _remove(place)
            old.rename(place)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Have the names in `folder` reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
