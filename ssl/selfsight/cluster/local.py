"""Runs a job on this machine: in this process, or in one process a device.

Ranks meet over the loopback interface. If one fails, the others are ended, and what it said is
said once, however many ranks said it. Signals go to this process alone, which hands each of them to
every rank once: a Ctrl-C of the terminal would reach a rank twice, and a `kill` none of them. If
this process is killed, its ranks end too.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.cluster import packages, ranks
from selfsight.cluster.devices import choose_device
from selfsight.cluster.places import Place
from selfsight.cluster.ranks import Job
from selfsight.cluster.spec import newest_step
from selfsight.config import ConfigError, divisors_text, register_resolvers
from selfsight.distributed import env, preempt


class JobFailed(ValueError):
    """A process of the job ended with an error that has been shown."""


def launch(config: DictConfig, name: str, job: Job) -> dict[str, Any]:
    """Run `job(config, name, world)` on every process of the job; returns rank 0's result.

    With `cluster.restarts` a job whose process fails or is killed is started again, at most so many
    times in a row without a new checkpoint between them.

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
    folder = Path(config.runs_dir).expanduser() / name
    packages.hold_run(folder, "anyway" in (config.cluster.environment, config.resume))
    restarts = config.cluster.restarts or 0
    if processes == 1 and not restarts:
        return job(config, name, env.join(device=device))
    failures, step = 0, newest_step(folder)
    while True:
        try:
            return _launch_ranks(config, name, job, processes)
        except (JobFailed, RuntimeError) as error:
            if newest_step(folder) > step:
                failures, step = 0, newest_step(folder)
            failures += 1
            if failures > restarts:
                raise
            print(
                f"selfsight: {error}\nselfsight: failure {failures} in a row without a new "
                f"checkpoint, of at most {restarts}: starting again",
                file=sys.stderr,
                flush=True,
            )
            os.environ["SELFSIGHT_RESTART"] = str(int(os.environ.get("SELFSIGHT_RESTART", 0)) + 1)


def _launch_ranks(config: DictConfig, name: str, job: Job, processes: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    meet = f"tcp://127.0.0.1:{env.free_port()}"
    started: list[BaseProcess] = []
    pipes: list[Connection] = []
    with _handed_on(started):
        try:
            for rank in range(processes):
                ours, theirs = context.Pipe(duplex=False)
                place = Place(rank, processes, rank, processes, meet)
                arguments = (OmegaConf.to_container(config), name, job, place, theirs)
                process = context.Process(target=_run_rank, args=arguments)
                process.start()
                theirs.close()
                started.append(process)
                pipes.append(ours)
            results = _collect(pipes)
        finally:
            for process in started:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()
            for pipe in pipes:
                pipe.close()
    return results[0]


@contextlib.contextmanager
def _handed_on(started: list[BaseProcess]) -> Iterator[None]:
    """Hand INT, TERM and USR2 to the ranks while they run. (Outside the main thread signals are
    somebody else's.)"""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            with contextlib.suppress(ValueError, ProcessLookupError):
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, number)

    former: dict[int, Any] = {}
    for number in (signal.SIGINT, *preempt.PREEMPTION):
        with contextlib.suppress(ValueError):
            former[number] = signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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
            if kind == "interrupted":
                raise KeyboardInterrupt
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _run_rank(config: dict[str, Any], name: str, job: Job, place: Place, pipe: Connection) -> None:
    preempt.arm()
    _leave_the_terminal()
    register_resolvers()
    try:
        answer = ("done", ranks.run(place, OmegaConf.create(config), name, job))
    except ValueError as error:
        answer = ("user error", str(error))
    except KeyboardInterrupt:
        answer = ("interrupted", None)
    except Exception:
        answer = ("error", traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    if answer[0] != "done":
        sys.stderr.flush()
        os._exit(1)  # the process group may wait for ranks that are gone


def _leave_the_terminal() -> None:
    """Its Ctrl-C comes from the parent alone; and there is no life without the parent."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()
