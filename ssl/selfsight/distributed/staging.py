"""A copy of tensors in host memory that is made while the device goes on.

The memory is taken once and used again: pinned for tensors of a GPU, whose copies are then queued
behind the work that makes the values, without waiting for them; ordinary memory otherwise.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64


class Staging:
    """Room for one set of tensors at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._layout: tuple[object, ...] | None = None
        self._copies: dict[str, Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    @property
    def bytes(self) -> int:
        """Host memory taken."""
        return self._memory.numel()

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory that `tensors` need, and have the system really give it.

        Raises:
            MemoryError: there is not so much.
        """
        layout = tuple((n, t.dtype, t.shape, t.device) for n, t in tensors.items())
        if layout == self._layout:
            return
        starts, end = [], 0
        for tensor in tensors.values():
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        pinned = any(tensor.device.type == "cuda" for tensor in tensors.values())
        if end > self._memory.numel() or pinned != self._pinned:
            self._layout, self._copies = None, {}
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the new one is taken
            try:
                self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned).zero_()
                self._pinned = pinned
            except RuntimeError as error:
                raise MemoryError(f"no {end:,} bytes of host memory for a copy") from error
        for start, (name, tensor) in zip(starts, tensors.items(), strict=True):
            room = self._memory[start : start + tensor.numel() * tensor.element_size()]
            self._copies[name] = room.view(tensor.dtype).view(tensor.shape)
        self._copies = {name: self._copies[name] for name in tensors}
        self._layout = layout

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors`, dense and in host memory, whose values are there after `wait`.

        They are valid until the next call. The tensors may be changed as soon as it returns, on the
        stream of this thread.

        Raises:
            MemoryError: see `reserve`.
        """
        self.reserve(tensors)
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=tensor.device.type == "cuda")
        self._events = []
        for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)
        return dict(self._copies)

    def wait(self) -> None:
        """Wait until the copies hold their values. Any thread may call it."""
        for event in self._events:
            event.synchronize()
