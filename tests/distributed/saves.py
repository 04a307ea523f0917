"""Small states to save, and processes that are killed while they save them."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import torch

from selfsight.distributed import checkpoint, checkpoint_folder
from tests.parallel.ranks import PRELOADED

SIZE = 1000
NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def make_state(step: int, size: int = SIZE) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps_in(folder: Path) -> list[int]:
    return [checkpoint_folder.step_of(path) for path in checkpoint.checkpoints(folder)]


def require(path: Path | None, step: int) -> None:
    """`path` is whole and of `step`."""
    assert path is not None
    tensors, manifest = checkpoint.load(path)
    assert manifest["step"] == step
    assert torch.equal(tensors["weight"], torch.full_like(tensors["weight"], step))
    assert int(tensors["count"]) == step


def start(function, *arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process  # pyright: ignore[reportReturnType]


def exit_codes(processes: list, seconds: float = 60) -> list[int | None]:
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def deadly(calls: int) -> None:
    """Have this process be killed just before its change number `calls` of the disk."""
    left = calls

    def wrap(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("write", "fsync", "mkdir", "rename", "rmdir", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))
