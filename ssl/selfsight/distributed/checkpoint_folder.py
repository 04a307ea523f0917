"""The folder of a run's checkpoints: names, manifests, what is intact, and what is kept.

At every instant, whatever is killed, each `step_NNNNNNNN` is whole or absent. What is being written
or deleted lies beside them under a hidden name.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from selfsight.distributed.payload import Written, measure

FORMAT = "selfsight checkpoint"
VERSIONS = (1, 2)
"""1: whole tensors; 2: a file may hold parts of them (see `checkpoint_parts`)."""
MANIFEST = "manifest.json"
AT_LEAST = 2
"""Checkpoints that were read back whole; none of the last so many is ever deleted."""
# A checkpoint that is about to be replaced by one of the same step is called `.replaced` meanwhile.
_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
_TEMPORARY = ".unfinished_"
_verified: dict[Path, str] = {}  # the digest of each manifest whose files this process has read


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which file and why."""


class CheckpointWriteError(Exception):
    """A checkpoint was not written; those before it are as they were."""


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}"


def scratch_of(folder: Path, step: int, number: int) -> Path:
    """Where this process writes the checkpoint of `step`, its save number `number`."""
    return folder / f"{_TEMPORARY}{place_of(folder, step).name}_{os.getpid()}_{number}"


def latest(folder: Path | str, notice: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint in `folder` whose every byte is as it was written; None without one.

    A torn or altered one is passed over.

    Args:
        folder: where the run's checkpoints lie; it may not exist.
        notice: called with one sentence for each that is passed over.
    """
    for path in reversed(checkpoints(Path(folder))):
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

    Several files are read at once.

    Raises:
        CheckpointError: a file is missing, torn or altered; it names the file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    files: dict[str, Any] = manifest["files"]
    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1, 8)), "verify") as pool:
        for problem in pool.map(lambda name: _problem_of(path / name, files[name]), files):
            if problem:
                raise CheckpointError(problem)
    _verified[path.absolute()] = manifest["digest"]
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, torn, altered, or of another format.
    """
    file = path / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(text)
        intact = manifest_text(manifest) == text
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file} is torn or was altered")
    if manifest.get("format") != FORMAT or manifest.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{file} is of format {manifest.get('format')!r}, version {manifest.get('version')!r}, "
            f"and this version of selfsight reads {FORMAT!r}, versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    if elsewhere := [name for name in manifest["files"] if Path(name).name != name]:
        raise CheckpointError(f"{file} names {elsewhere[0]!r}, which lies in another folder")
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest: any other byte in the file is an alteration."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, sort_keys=True, indent=1).encode() + b"\n"


def new_manifest(
    step: int, scalars: Mapping[str, Any], *, config_hash: str, world_size: int
) -> dict[str, Any]:
    """A manifest that lacks its files.

    Raises:
        ValueError: a scalar is not JSON.
    """
    return {
        "format": FORMAT,
        "version": VERSIONS[-1],
        "step": step,
        "world_size": world_size,
        "config_hash": config_hash,
        "scalars": require_json(scalars, "scalars"),
        "files": {},
    }


def require_json(value: Any, where: str) -> Any:
    """A copy of `value`, which JSON must give back as it is (tuples as lists).

    Raises:
        ValueError: it would not; the message says which part.
    """
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"key {bad[0]!r} of {where} is not a string.")
        return {key: require_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [require_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON does not have.")


def quick_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest and the sizes of its files, or None."""
    try:
        for name, expected in read_manifest(path)["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{path / name} is torn"
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def checkpoints(folder: Path) -> list[Path]:
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


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def publish(scratch: Path, manifest: Mapping[str, Any], place: Path) -> None:
    """Complete `scratch`, whose files were read back, by its manifest and rename it to `place`.

    At no instant is there neither the new nor the old checkpoint of that step.
    """
    write_file(scratch / MANIFEST, manifest_text(manifest))
    flush(scratch)
    old = place.with_name(f"{place.name}.replaced")
    if place.exists():
        remove(old)
        place.rename(old)
    scratch.rename(place)
    flush(place.parent)
    remove(old)
    if problem := quick_problem(place):
        raise OSError(problem)
    _verified[place.absolute()] = read_manifest(place)["digest"]


def prune(newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete what is older than the `keep` newest intact checkpoints, `newest` being the first.

    Nothing is deleted before two of those that stay were read back whole. Milestones stay, and so
    do later steps: see `discard_after`.
    """
    intact = 0
    for path in reversed(checkpoints(newest.parent)):
        if step_of(path) > step_of(newest):
            continue
        if intact >= max(keep, AT_LEAST):
            if not (keep_every and step_of(path) % keep_every == 0):
                remove(path)
        elif _is_verified(path):
            intact += 1


def discard_after(folder: Path | str, step: int) -> list[int]:
    """Delete the checkpoints of later steps than `step`, to which the run was wound back.

    Returns:
        The steps that were deleted.
    """
    later = [path for path in checkpoints(Path(folder)) if step_of(path) > step]
    for path in reversed(later):
        remove(path)
    return sorted({step_of(path) for path in later})


def remove(path: Path) -> None:
    """Delete a checkpoint: under its own name it is whole or absent at every instant.

    What cannot be deleted now is tried again at the next save.
    """
    hidden = path.with_name(f"{_TEMPORARY}removed_{path.name}_{os.getpid()}")
    try:
        path.rename(hidden)
    except OSError:
        return
    _verified.pop(path.absolute(), None)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Clear away what killed runs left, and finish or undo a replacement they had begun."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for old in folder.glob("step_*.replaced"):
        place = old.with_suffix("")
        if quick_problem(place) is None:
            remove(old)
        else:
            remove(place)
            old.rename(place)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(folder: Path) -> None:
    """Have the names in `folder` reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_verified(path: Path) -> bool:
    """Whether a checkpoint is intact; its bytes are read once in the life of this process."""
    try:
        if _verified.get(path.absolute()) == read_manifest(path)["digest"]:
            return quick_problem(path) is None
        verify(path)
    except CheckpointError:
        return False
    return True


def _problem_of(file: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        found = measure(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    if found.size != expected["size"]:
        return f"{file} has {found.size} bytes and was written with {expected['size']}"
    if found != Written(**expected):
        return f"{file} was altered: its SHA-256 is another one"
    return None
