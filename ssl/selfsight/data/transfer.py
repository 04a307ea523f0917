"""Batches on the device: the next one is copied, and coloured, while the present one is used.

On CUDA the memory that loader processes write into is page-locked where it lies, so a batch goes
from there to the GPU without a copy on the host and without holding up the program. Copies run on
a stream of their own; a slot goes back to the loader only when its copy is done. On CPU a batch is
handed on as it is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from selfsight.data.batch import Batch


class HostLoader(Protocol):
    """What is wrapped, such as `Loader`: a batch is valid until the following `next()`.

    It may have a method `ready() -> bool`: whether `next()` would return without waiting for data.
    """

    cursors: Tensor
    wait_seconds: float

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class Mark(Protocol):
    """A place in a queue of work for a device."""

    def synchronize(self) -> None:
        """Wait until everything before it is done."""


class Queue(Protocol):
    """Copies, and work on them, that a device does in order, beside its other work."""

    def send(self, tensor: Tensor) -> Tensor:
        """Queue a copy to the device. The source must stay as it is until that is done."""
        ...

    def running(self) -> AbstractContextManager:
        """Within it, operations on the device are queued here."""
        ...

    def mark(self) -> Mark:
        """The place after everything queued so far."""
        ...

    def take(self, mark: Mark, tensors: list[Tensor]) -> None:
        """Have the caller's own work on the device, from here on, come after `mark`."""
        ...

    def close(self) -> None:
        """Wait for everything and let go of the host's memory."""
        ...


class _Sent(NamedTuple):
    """A batch on its way, with the loader's state after it."""

    batch: Batch
    ready: Mark
    cursors: Tensor
    wait_seconds: float


class Transfer:
    """Endless batches on `device`, from a loader on the host.

    Args:
        loader: gives the batches on the host; closed with this.
        device: where they are wanted.
        memory: the host's memory that the views of all batches lie in (uint8, `Ring.memory`), to be
            page-locked for CUDA; None leaves it as it is, and copies then hold up the program.
        finish: what is still to be done to the views of a batch: called with the views on the
            device, which it changes in place, and the batch on the host.
        notice: takes one sentence if the memory cannot be page-locked.
        queue: the device's queue of copies; None: a CUDA stream on CUDA, elsewhere none.

    A batch is valid until the following `next()`, on CUDA for as long as it is referred to.

    Attributes:
        cursors: of the loader, after the batch that was handed out last (not of the one that is
            already on its way).
        wait_seconds: time spent waiting for the data of all batches handed out.

    An error of the loader is raised when its batch is asked for, as without this.
    """

    def __init__(
        self,
        loader: HostLoader,
        device: torch.device,
        *,
        memory: np.ndarray | None = None,
        finish: Callable[[list[Tensor], Batch], None] | None = None,
        notice: Callable[[str], None] | None = None,
        queue: Queue | None = None,
    ) -> None:
        self._loader, self._device, self._finish = loader, device, finish
        self.cursors, self.wait_seconds = loader.cursors, loader.wait_seconds
        self._queue = queue
        if queue is None and device.type == "cuda":
            self._queue = CudaQueue(device, memory, notice)
        self._sent: _Sent | Exception | None = None
        self._copied: Mark | None = None  # the loader's latest slot is no longer read
        self._waited = 0.0  # for copies

    def __iter__(self) -> Transfer:
        return self

    def __next__(self) -> Batch:
        if self._queue is None:
            return self._in_place()
        sent = self._send(self._queue) if self._sent is None else self._sent
        self._sent = None
        if isinstance(sent, Exception):
            raise sent
        batch = sent.batch
        self._queue.take(sent.ready, [*batch.views, batch.positions, batch.labels])
        self.cursors, self.wait_seconds = sent.cursors, sent.wait_seconds
        # The next one sets out now, unless the device would stand still while it is waited for.
        ready = getattr(self._loader, "ready", None)
        if ready is None or ready():
            try:
                self._sent = self._send(self._queue)
            except Exception as error:  # its turn comes with the next call
                self._sent = error
        return batch

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is on its way, unlock the memory, and close the loader."""
        try:
            if self._queue is not None:
                self._queue.close()
        finally:
            self._sent = self._copied = None
            self._loader.close()

    def _in_place(self) -> Batch:
        batch = next(self._loader)
        host = batch
        if self._device.type != "cpu":  # blocking copies
            views = [view.to(self._device) for view in host.views]
            batch = Batch(views, host.positions.to(self._device), host.labels.to(self._device))
            batch.on_host = host.positions
        if self._finish is not None:
            self._finish(batch.views, host)
        self.cursors, self.wait_seconds = self._loader.cursors, self._loader.wait_seconds
        return batch

    def _send(self, queue: Queue) -> _Sent:
        """Get the next batch from the loader and queue what brings it to the device."""
        if self._copied is not None:  # `next` hands the slot of the batch before to the workers
            start = time.perf_counter()
            self._copied.synchronize()
            self._waited += time.perf_counter() - start
            self._copied = None
        host = next(self._loader)
        views = [queue.send(view) for view in host.views]
        batch = Batch(views, queue.send(host.positions), queue.send(host.labels))
        batch.on_host = host.positions
        self._copied = queue.mark()
        if self._finish is not None:
            with queue.running():
                self._finish(batch.views, host)
        waited = self._loader.wait_seconds + self._waited
        return _Sent(batch, queue.mark(), self._loader.cursors, waited)


class CudaQueue:
    """A CUDA stream beside the current one, that copies out of page-locked memory.

    Args:
        device: a CUDA device.
        memory: uint8, page-locked until `close`; None for none.
        notice: takes one sentence if that fails.
    """

    def __init__(
        self,
        device: torch.device,
        memory: np.ndarray | None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory: np.ndarray | None = None  # what is locked
        if memory is None:
            return
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(device):
            error = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(error) == 0:
            self._memory = memory
            return
        # CUDA keeps the error until the next kernel is launched, which would be blamed for it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
        if notice is not None:
            notice(
                f"the loader's memory ({memory.nbytes / 1e9:.1f} GB) could not be page-locked "
                f"(CUDA error {int(error)}): copies to the GPU hold up the program."
            )

    def send(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            # Outside the locked memory are only a few numbers; `pin_memory` copies them.
            source = tensor if self._locked(tensor) or tensor.dim() > 1 else tensor.pin_memory()
            return source.to(self._device, non_blocking=True)

    def _locked(self, tensor: Tensor) -> bool:
        if self._memory is None:
            return False
        start = self._memory.ctypes.data
        return start <= tensor.data_ptr() < start + self._memory.nbytes

    def running(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def take(self, mark: Mark, tensors: list[Tensor]) -> None:
        assert isinstance(mark, torch.cuda.Event)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in tensors:  # allocated on the other stream: not reused before this one is done
            tensor.record_stream(current)

    def close(self) -> None:
        self._stream.synchronize()
        if self._memory is not None:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._memory.ctypes.data)
            self._memory = None
