"""Checkpoints of all ranks, written while they train.

`Saver.save` copies what its rank writes into host memory and returns; a thread of each rank writes
one file, and reads it back. When all files are as they should be, rank 0 adds the manifest and
renames the whole (see `checkpoint`). The threads agree through notes in the ranks' store:

    rank 0   go: the hidden folder -> own file -> all parts -> manifest, rename, retention -> end
    others   go -> own file -> part: size and checksum, or what went wrong -> end

One save is under way at a time. Whatever goes wrong is told by a notice at the next call from the
training thread, and training goes on: the checkpoints before are as they were.
"""

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.distributed import checkpoint_folder as folders
from selfsight.distributed.board import Abandoned, Board
from selfsight.distributed.checkpoint import payload_name
from selfsight.distributed.checkpoint_parts import Reader, difference, to_write
from selfsight.distributed.collectives import all_gather_json
from selfsight.distributed.env import World
from selfsight.distributed.payload import reads_back, write_tensors
from selfsight.distributed.staging import Staging

VISIBLE = 15.0  # seconds until a file that another node has written is seen here
SLOW = 5.0  # seconds of waiting that are worth telling
MARGIN = 60.0  # seconds that the others wait longer than rank 0


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    path: Path | None
    """The checkpoint; None where it was not written."""
    problem: str | None
    """One sentence; None where it was written."""
    held: float
    """Seconds for which the training thread was held."""
    seconds: float
    """Seconds from the call until the checkpoint could be resumed from, or was given up."""


@dataclass
class _Job:
    step: int
    number: int
    manifest: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    started: float
    held: float = 0.0
    path: Path | None = None
    problem: str | None = None
    seconds: float = 0.0


class Saver:
    """Writes the checkpoints of one run. Every rank has one and calls it at the same places.

    Args:
        folder: where the run's checkpoints lie; all ranks see it.
        world: the place of this process.
        keep: the newest intact checkpoints that stay; never fewer than two.
        keep_every: those of a step that it divides stay for good.
        notice: called on rank 0, from the training thread, with a sentence on what went wrong.
        guard: called on rank 0, from the background thread, before a save touches the folder and
            again before the checkpoint gets its name; what it raises forbids it and is told.
        asynchronous: False writes while training waits, and takes no memory for a copy.
        skip_when_busy: a save that finds another under way is left out, with a notice; False has it
            wait. A milestone always waits.
        timeout: seconds that rank 0 gives the others, once its own file is written.
    """

    _made = 0

    def __init__(
        self,
        folder: Path | str,
        world: World,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        notice: Callable[[str], None] | None = None,
        guard: Callable[[], object] | None = None,
        asynchronous: bool = True,
        skip_when_busy: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        assert keep >= 1
        self.folder, self.world = Path(folder), world
        self.keep, self.keep_every = keep, keep_every
        self.notice, self.guard = notice, guard
        self.asynchronous, self.skip_when_busy, self.timeout = asynchronous, skip_when_busy, timeout
        self.newest: Path | None = None
        """The last checkpoint that this object has written, as far as it has been told."""
        self._staging = Staging()
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._outcomes: list[Outcome] = []
        self._saves = 0
        Saver._made += 1
        self._board = Board(f"checkpoint/{Saver._made}", self._abandoned)

    # -------------------------------------------------------------------- the training thread

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory for the copies now, rather than at the first save."""
        if self.asynchronous:
            own, _ = to_write(tensors, self.world.rank, self.world.size)
            self._stage(self._staging.reserve, own)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        *,
        config_hash: str,
        wait: bool = False,
    ) -> bool:
        """Begin the checkpoint of `step`. All ranks call it, with the same names and scalars.

        A save under way is waited for first: see `skip_when_busy`.

        Args:
            step: the number of finished steps. A checkpoint of the same step is replaced.
            tensors: name to tensor, on any device; plain ones are the same on all ranks, others are
                DTensors. They may be changed once this returns.
            scalars: everything else, as JSON has it; those of rank 0 count.
            config_hash: what a resume compares its configuration with.
            wait: write while training waits, from the tensors themselves.

        Returns:
            False if it was left out, or failed while this waited.

        Raises:
            ValueError: a scalar is not JSON, or a tensor cannot be stored.
        """
        assert step >= 0
        assert not self._abandoned.is_set(), "the saver is closed"
        started = time.perf_counter()
        world = self.world
        manifest = folders.new_manifest(
            step, scalars, config_hash=config_hash, world_size=world.size
        )
        own, metadata = to_write(tensors, world.rank, world.size)
        milestone = self.keep_every is not None and step % self.keep_every == 0
        if self.skip_when_busy and not (wait or milestone):
            busy = self._thread is not None and self._thread.is_alive()
            if any(all_gather_json(busy)):  # all leave it out, or none
                self._tell(f"step {step}: no checkpoint, as the one before is still being written")
                return False
        before = time.perf_counter()
        self._join()
        if (waited := time.perf_counter() - before) > SLOW:
            self._tell(f"step {step}: training waited {waited:.0f} s for the checkpoint before")
        waits = wait or not self.asynchronous
        if not waits:
            copies = self._stage(self._staging.copy, own)
            waits, own = copies is None, copies or own
        if waits and any(tensor.device.type == "cuda" for tensor in own.values()):
            torch.cuda.current_stream(world.device).synchronize()  # another thread reads them
        self._saves += 1
        job = self._job = _Job(
            step=step,
            number=self._saves,
            manifest=manifest,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            tensors=own,
            metadata=metadata,
            started=started,
        )
        # a daemon: what crashes the run must not wait for it, and a half-written folder is no harm
        self._thread = threading.Thread(target=self._run, args=(job,), name="save", daemon=True)
        self._thread.start()
        if waits:
            self._join()
            return job.path is not None
        job.held = time.perf_counter() - started
        return True

    def poll(self) -> list[Outcome]:
        """The saves that ended since it was last asked, in order. It waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self) -> bool:
        """Wait for the save under way; all ranks return about when rank 0 does.

        Returns:
            False if it failed; True also where there was none.
        """
        job = self._job
        self._join()
        return job is None or job.path is not None

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps than `step`, to which the run is wound back.

        A save under way is waited for. All ranks call it.
        """
        self._join()
        if self.world.main:
            folders.discard_after(self.folder, step)

    def close(self) -> None:
        """Give up what is under way, where an error ends the run. Harmless after `finish`."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(5)

    def _stage(self, act: Callable[[dict[str, Tensor]], Any], own: dict[str, Tensor]) -> Any:
        """What `act` of the staging gives; None, and no staging from now on, without memory."""
        try:
            return act(own)
        except MemoryError as error:
            self.asynchronous = False
            self._tell(f"{error}: checkpoints are written while training waits")
            return None

    def _join(self) -> None:
        job, thread = self._job, self._thread
        if job is None or thread is None:
            return
        before = time.perf_counter()
        thread.join()
        job.held += time.perf_counter() - before
        self._job = self._thread = None
        job.tensors = {}
        self.newest = job.path or self.newest
        self._outcomes.append(Outcome(job.step, job.path, job.problem, job.held, job.seconds))
        if job.problem:
            self._tell(f"step {job.step}: {job.problem}")

    def _tell(self, text: str) -> None:
        if self.notice and self.world.main:
            self.notice(text)

    # ------------------------------------------------------------------ the background thread

    def _run(self, job: _Job) -> None:
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)
            self._staging.wait()
            if self.world.main:
                self._lead(job)
            else:
                self._follow(job)
        except Abandoned:
            job.problem = "the run ended before its checkpoint was written."
        except Exception as error:  # whatever it is: training goes on
            job.problem = f"the checkpoint was not written ({_short(error)})."
        finally:
            job.seconds = job.seconds or time.perf_counter() - job.started

    def _lead(self, job: _Job) -> None:
        job.problem = "the run ended before its checkpoint was written."
        try:
            job.path = self._write(job)
            job.problem = None
            job.seconds = time.perf_counter() - job.started
            folders.prune(job.path, self.keep, self.keep_every)
        except Abandoned:
            raise
        except Exception as error:
            if job.path is None:
                job.problem = (
                    f"the checkpoint was not written to {self.folder} ({_short(error)}); "
                    "the ones before it are untouched."
                )
        finally:
            self._board.post(f"{job.number} end", job.problem)
            names = [f"part {rank}" for rank in range(1, self.world.size)]
            self._board.clear([f"{job.number - 2} {name}" for name in ("go", "end", *names)])

    def _write(self, job: _Job) -> Path:
        """What rank 0 does until the checkpoint has its name."""
        place = folders.place_of(self.folder, job.step)
        scratch = folders.scratch_of(self.folder, job.step, job.number)
        self._require_leave()
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.remove_leftovers(self.folder)
        scratch.mkdir()
        try:
            self._board.post(f"{job.number} go", scratch.name)
            parts = [self._part(job, scratch)]
            names = [f"{job.number} part {rank}" for rank in range(1, self.world.size)]
            notes = self._board.read(names, self.timeout)
            parts += [notes.get(name) for name in names]
            self._complete(job, scratch, parts)
            self._require_leave()
            folders.publish(scratch, job.manifest, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return place

    def _follow(self, job: _Job) -> None:
        go, end = f"{job.number} go", f"{job.number} end"
        notes = self._board.read([go, end], self.timeout + MARGIN, any_of=True)
        if go in notes and end not in notes:
            part = self._part(job, self.folder / notes[go])
            self._board.post(f"{job.number} part {self.world.rank}", part)
            notes = self._board.read([end], self.timeout + MARGIN)
        if end not in notes:
            raise TimeoutError("rank 0 did not say how it ended")
        job.problem = notes[end]
        job.path = None if job.problem else folders.place_of(self.folder, job.step)

    def _part(self, job: _Job, scratch: Path) -> dict[str, Any]:
        """Write this rank's file and read it back: its size and checksum, or what went wrong."""
        path = scratch / payload_name(self.world.rank)
        if not job.tensors:
            return {}
        try:
            _await(scratch.is_dir)
            written = write_tensors(path, job.tensors, job.metadata)
            if not reads_back(path, job.tensors, job.metadata):
                raise OSError(f"{path.name} does not read as it was written")
            folders.flush(scratch)
        except Exception as error:
            path.unlink(missing_ok=True)  # others may need the room
            return {"problem": _short(error)}
        return asdict(written)

    def _complete(self, job: _Job, scratch: Path, parts: list[dict[str, Any] | None]) -> None:
        """Enter the parts of all ranks into the manifest, if they are whole as seen from here."""
        if missing := [rank for rank, part in enumerate(parts) if part is None]:
            raise folders.CheckpointWriteError(
                f"ranks {missing} did not write their parts within {self.timeout:g} s"
            )
        for rank, part in enumerate(parts):
            assert part is not None
            if "problem" in part:
                raise folders.CheckpointWriteError(
                    part["problem"] if self.world.size == 1 else f"rank {rank}: {part['problem']}"
                )
            if part:
                path = scratch / payload_name(rank)
                if not _await(lambda path=path, part=part: _size(path) == part["size"]):
                    raise folders.CheckpointWriteError(
                        f"rank {rank} wrote {path.name} with {part['size']} bytes, and rank 0 "
                        f"finds {_size(path) or 'none'}: do all nodes see the same folder?"
                    )
                job.manifest["files"][path.name] = part
        with Reader(scratch, manifest=job.manifest) as reader:
            if problem := difference(job.shapes, reader.shapes):
                raise folders.CheckpointWriteError(f"ranks differ in what they save: {problem}")

    def _require_leave(self) -> None:
        if self.guard:
            try:
                self.guard()
            except Exception as error:
                raise folders.CheckpointWriteError(str(error).rstrip(".")) from error


def _await(condition: Callable[[], bool]) -> bool:
    """Whether what another node did to the file system is seen here, before long."""
    deadline = time.monotonic() + VISIBLE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _short(error: Exception) -> str:
    """An error in words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError | folders.CheckpointError | folders.CheckpointWriteError):
        return str(error).rstrip(".")
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
