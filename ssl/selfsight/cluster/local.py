"""Runs a job on this machine: in this process, or in one process a device.

Ranks meet over the loopback interface. If one fails, the others are ended, and what it said is
said once, however many ranks said it.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.config import ConfigError, divisors_text, register_resolvers
from selfsight.distributed import collectives, env

Job = Callable[[DictConfig, str, env.World], dict[str, Any]]


class JobFailed(ValueError):
    """A process of the job ended with an error that has been shown."""


def launch(config: DictConfig, name: str, job: Job) -> dict[str, Any]:
    """Run `job(config, name, world)` on every process of the job; returns rank 0's result.

    Raises:
        ValueError: what was asked for cannot be done here; one sentence.
    """
    device = choose_device(config.device)
    processes = config.cluster.processes or (torch.cuda.device_count() if device == "cuda" else 1)
    if config.batch_size % processes:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide over {processes} processes; "
            f"{divisors_text(config.batch_size, processes)}"
        )
    if device == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"cluster.processes={processes} but there are {torch.cuda.device_count()} GPUs: "
            "one process uses one"
        )
    if processes == 1:
        return job(config, name, env.join(device=device))
    return _launch_ranks(config, name, job, device, processes)


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


def _launch_ranks(
    config: DictConfig, name: str, job: Job, device: str, processes: int
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    address = f"tcp://127.0.0.1:{env.free_port()}"
    ranks, pipes = [], []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (OmegaConf.to_container(config), name, job, device, rank, processes)
            process = context.Process(target=_run_rank, args=(*arguments, address, theirs))
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        results = _collect(pipes)
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
                process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
    return results[0]


def _collect(pipes: list[Connection]) -> dict[int, dict[str, Any]]:
    """Wait for all ranks; the first that fails ends the wait."""
    results: dict[int, dict[str, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise JobFailed(
                    f"the process of rank {rank} ended without a word; was it killed?"
                ) from None
            if kind == "user error":
                raise ConfigError(value)
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _run_rank(
    config: dict[str, Any],
    name: str,
    job: Job,
    device: str,
    rank: int,
    processes: int,
    address: str,
    pipe: Connection,
) -> None:
    register_resolvers()
    try:
        world = env.join(
            rank,
            processes,
            local_rank=rank,
            local_size=processes,
            address=address,
            device=device,
            timeout=config["cluster"]["timeout_minutes"] * 60,
        )
        answer = ("done", job(OmegaConf.create(config), name, world))
        collectives.barrier()  # rank 0 keeps the store that the others may still need
        env.leave()
    except ValueError as error:
        answer = ("user error", str(error))
    except Exception:
        answer = ("error", traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    if answer[0] != "done":
        sys.stderr.flush()
        os._exit(1)  # the process group may wait for ranks that are gone
