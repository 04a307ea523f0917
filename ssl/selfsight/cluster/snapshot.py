"""A copy of the code that a job runs, so that editing files changes nothing that waits or runs."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = ("ssl", "conf", "launch")
PASSED_OVER = ("__pycache__", ".egg-info", ".pyc", ".swp", "~")
SITE = (
    Path("conf") / "site.yaml"
)  # of the place, not of the code: what it says is in the job's file


def files(root: Path = ROOT) -> Iterator[Path]:
    """The code's files relative to `root`, in one order. Links to folders are not followed."""
    for folder in FOLDERS:
        for place, folders, names in os.walk(root / folder):
            folders[:] = sorted(n for n in folders if not n.endswith(PASSED_OVER) and n[0] != ".")
            for name in sorted(names):
                path = (Path(place) / name).relative_to(root)
                if not name.endswith(PASSED_OVER) and name[0] != "." and path != SITE:
                    yield path


def code_hash(root: Path = ROOT) -> str:
    """16 hex digits that name the code: sha256 over names and contents of its files."""
    whole = hashlib.sha256()
    for path in files(root):
        content = (root / path).read_bytes()
        whole.update(f"{path.as_posix()}\0{len(content)}\0".encode())
        whole.update(content)
    return whole.hexdigest()[:16]


def take(folder: Path, root: Path = ROOT) -> tuple[Path, str]:
    """Copy the code to `folder`/HASH, unless it is there; returns that place and the hash.

    The copy is made beside and renamed whole, and its own hash is the name: a file that was edited
    while it was copied does not go by the name of another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".part-{os.getpid()}"
    try:
        for path in files(root):
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, part / path)
        name = code_hash(part)
        place = folder / name
        if place.is_dir() and code_hash(place) != name:  # somebody edited the copy
            place.rename(folder / f".altered-{name}-{os.getpid()}")
        if not place.is_dir():
            part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place, name
