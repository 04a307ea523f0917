"""Small real runs on gloo ranks of this machine, with a fault put into one of them.

A run is `selfsight.train.pretrain` on each rank, in processes forked from a server that has
imported it. A fault is a plain dictionary: what (`kind`), where (`site`), at which update and rank,
and a file (`once`) by which it strikes one time only, however often the run is started.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "benchmarks"), str(ROOT / "ssl"), str(ROOT)]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # for the server that ranks are forked from

from selfsight.distributed import checkpoint, env  # noqa: E402
from tests.runs import arguments, checksums  # noqa: E402

Fault = dict[str, Any]
SITES = ("forward", "backward", "optimizer")
WRITES = ("write", "fsync", "rename")
QUEUE = ["method.queue_length=16", "method.queue_start_step=3", "tracking.progress=false"]
QUEUE += ["eval.every=1000"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["selfsight.train", "fault_runs", "torch._dynamo", "timeit"])
STATUS = {"complete": 0, "stopped": 0, "failed": 1, "preempted": 75}


@dataclass
class Ended:
    """How the ranks of a run ended."""

    statuses: list[int | None]
    said: list[str]
    seconds: float
    after_fault: list[float]
    """From the fault (or the start) until each rank was gone."""
    struck: bool
    """Whether the fault came."""

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@dataclass
class Place:
    """A folder with pictures, and runs in it."""

    folder: Path
    random: Random = field(default_factory=lambda: Random(0))
    count: int = 0

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def run(self, name: str, *more: str, size: int = 2, fault: Fault | None = None) -> Ended:
        """Start, or go on with, the run `name`; returns when all its ranks are gone."""
        words = arguments(self.pictures, self.folder / "runs", name, *QUEUE, *more)
        log = self.folder / "logs" / f"{name}-{self.count}"
        self.count += 1
        log.mkdir(parents=True)
        if fault and "once" not in fault:
            fault = {**fault, "once": str(log / "struck")}
        struck = Path(fault["once"]) if fault else None
        port = env.free_port()
        ranks = [
            CONTEXT.Process(target=_rank, args=(rank, size, port, words, fault, str(log)))
            for rank in range(size)
        ]
        start = time.monotonic()
        for process in ranks:
            process.start()
        hit, first = None, None
        gone: dict[int, float] = {}
        try:
            while any(process.is_alive() for process in ranks):
                now = time.monotonic()
                for rank, process in enumerate(ranks):
                    if process.exitcode is not None:
                        gone.setdefault(rank, now)
                if hit is None and struck is not None and struck.exists():
                    hit = now
                if first is None and any(p.exitcode not in (None, 0, 75) for p in ranks):
                    first = now
                others = [p for p in ranks if p.is_alive()]
                stuck = len(others) == 1 and first is not None and now - first > 5
                if now - start > 180 or (first is not None and now - first > 30) or stuck:
                    for process in others:
                        process.kill()
                time.sleep(0.02)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        end = time.monotonic()
        said = [(log / str(rank)).read_text() for rank in range(size)]
        codes = [process.exitcode for process in ranks]
        after = [gone.get(rank, end) - (hit or start) for rank in range(size)]
        return Ended(codes, said, end - start, after, bool(struck and struck.exists()))

    def finish(self, name: str, *more: str, size: int = 2) -> None:
        """Go on with a run until it is complete."""
        ended = self.run(name, *more, size=size)
        assert ended.statuses == [0] * size, ended.text

    def sums(self, name: str, step: int) -> dict[str, str]:
        return checksums(self.folder / "runs" / name, step)

    def checkpoints(self, name: str) -> Path:
        return self.folder / "runs" / name / "checkpoints"

    def steps(self, name: str) -> list[int]:
        """Steps of the intact checkpoints."""
        return intact(self.checkpoints(name))

    def tensors(self, name: str, step: int) -> dict[str, Any]:
        return checkpoint.load(self.checkpoints(name) / f"step_{step:08d}")[0]


def intact(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder` whose every byte is right."""
    found = []
    for path in sorted(folder.glob("step_*")):
        with contextlib.suppress(checkpoint.CheckpointError):
            found.append(checkpoint.verify(path)["step"])
    return sorted(set(found))


def in_child(function: Callable[..., None], *arguments: Any) -> int | None:
    """Call a function in a process of its own; returns how that ended."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode


def _rank(rank: int, size: int, port: int, words: list[str], fault: Fault | None, log: str) -> None:
    from selfsight.distributed import preempt

    preempt.arm()
    handle = os.open(f"{log}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from selfsight.build import compose
    from selfsight.config import check
    from selfsight.distributed import collectives
    from selfsight.train import pretrain

    torch.set_num_threads(1)
    status = 1
    try:
        config = check(compose("pretrain", words))
        if fault and fault["kind"] == "absent" and rank == fault["rank"]:
            os._exit(0)
        place = {"local_rank": rank, "local_size": size, "address": f"tcp://127.0.0.1:{port}"}
        world = env.join(rank, size, **place, timeout=(fault or {}).get("timeout", 100))
        if fault:
            inject(fault, rank, config)
        summary = pretrain(config, config.name, world)
        status = STATUS[summary.get("status", "complete")]
        collectives.barrier()
    except (ValueError, ConnectionError) as error:
        print(f"selfsight: {error}")
        status = 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ------------------------------------------------------------------------------------- faults


def inject(fault: Fault, rank: int, config: Any = None) -> None:
    """Arm a fault in this process."""
    if fault.get("rank", rank) != rank:
        return
    site, kind = fault.get("site", ""), fault["kind"]
    if kind == "another configuration":
        config.method.temperature = 0.2
    elif site in SITES:
        _at_step(fault)
    elif site in WRITES:
        _at_write(fault)
    elif kind == "lr":
        _raise_lr(fault)


def _strikes(fault: Fault) -> bool:
    """Whether the fault is still to come; notes that it came."""
    if not fault.get("again"):
        try:
            os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    return True


def _strike(fault: Fault) -> None:
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "signal":
        for number in fault["signals"]:
            os.kill(os.getpid(), number)
    elif kind == "worker":
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid or 0, fault["signals"][0])
    elif kind == "full":
        limit = fault["bytes"]
        _finish_save()  # which must not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif kind == "skip":
        _skip_one()


def _finish_save() -> None:
    """Wait for the checkpoint under way."""
    for thread in threading.enumerate():
        if thread.name == "save":
            thread.join(60)


def _at_step(fault: Fault) -> None:
    """Strike in the pass, before the update, or after it, of one or several updates."""
    import torch

    from selfsight.methods.swav import SwAV

    name = {"forward": "forward", "backward": "after_backward", "optimizer": "after_step"}
    method_name = name[fault["site"]]
    original = getattr(SwAV, method_name)
    steps = range(fault["step"], fault["step"] + fault.get("steps", 1))

    def wrapped(self: Any, *arguments: Any, **more: Any) -> Any:
        now = next(a for a in arguments if hasattr(a, "values") and hasattr(a, "step"))
        here = now.step in steps
        if fault["kind"] == "full" and now.step == steps.stop:
            _finish_save()  # which must meet the limit
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if not here or (now.step == steps.start and not _strikes(fault)):
            return original(self, *arguments, **more)
        value = fault.get("value", 0.0)
        where = fault.get("where")
        if where == "trunk":
            hook = self.trunk.register_forward_hook(lambda m, a, out: out * value)
            try:
                return original(self, *arguments, **more)
            finally:
                hook.remove()
        if where in ("codes", "scores"):
            return _spoiled(where, value, lambda: original(self, *arguments, **more))
        _strike(fault)
        result = original(self, *arguments, **more)
        if where == "loss":
            return result[0] * value, result[1]
        if where == "gradient":
            with torch.no_grad():
                parameters = [p for p in self.parameters() if p.grad is not None]
                chosen = parameters[fault.get("parameter", 0) % len(parameters)]
                assert chosen.grad is not None
                chosen.grad.view(-1)[-1] = value
        return result

    setattr(SwAV, method_name, wrapped)


def _spoiled(where: str, value: float, call: Callable[[], Any]) -> Any:
    """Spoil the result of Sinkhorn ("codes") or what goes into it ("scores")."""
    from selfsight.methods import swav

    original = swav.sinkhorn

    def spoilt(scores: Any, *arguments: Any, **more: Any) -> Any:
        if where == "scores":
            scores = scores * value
        codes = original(scores, *arguments, **more)
        return codes * value if where == "codes" else codes

    swav.sinkhorn = spoilt
    try:
        return call()
    finally:
        swav.sinkhorn = original


def _skip_one() -> None:
    """This rank takes no part in its next small all-reduce."""
    from selfsight.distributed import collectives

    original = collectives.all_reduce_sum

    def skipping(tensor: Any, group: Any = None) -> Any:
        collectives.all_reduce_sum = original
        return tensor

    collectives.all_reduce_sum = skipping


def _at_write(fault: Fault) -> None:
    """Strike at the n-th write, flush or rename of a checkpoint."""
    counted = [0]

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            frame = sys._getframe(1)
            names = []
            while frame is not None and len(names) < 6:
                names.append(Path(frame.f_code.co_filename).name)
                frame = frame.f_back
            if any(n.startswith(("checkpoint", "payload", "async_save")) for n in names):
                counted[0] += 1
                if counted[0] == fault["step"] and _strikes(fault):
                    _strike(fault)
            return original(*arguments, **more)

        return wrapped

    if fault["site"] == "rename":
        Path.rename, shutil.rmtree = wrap(Path.rename), wrap(shutil.rmtree)
    else:
        setattr(os, fault["site"], wrap(getattr(os, fault["site"])))


def _raise_lr(fault: Fault) -> None:
    from selfsight import train

    original = train.set_hyperparameters
    calls = [0]

    def raised(optimizer: Any, *, lr: float, **more: Any) -> None:
        calls[0] += 1
        strange = fault["step"] <= calls[0] < fault["step"] + fault["steps"]
        original(optimizer, lr=lr * (fault["factor"] if strange else 1), **more)

    train.set_hyperparameters = raised
