"""Slots of batches in memory that loader processes share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from multiprocessing.context import BaseContext

import numpy as np

_ALIGN = 64  # bytes


class Ring:
    """A ring of slots, each a list of arrays. Picklable while a process is started.

    Args:
        shapes: of the arrays of a slot.
        dtypes: theirs.
        slots: their number.
        context: what the processes are started by.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype],
        slots: int,
        context: BaseContext,
    ) -> None:
        self._arrays = [
            (shape, dtype, int(np.prod(shape)) * dtype.itemsize)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        self._slot = sum(-(-size // _ALIGN) * _ALIGN for *_, size in self._arrays)
        # RawArray is mapped from an unlinked file in /dev/shm, or in the temporary folder where a
        # container's /dev/shm is too small, and so nothing is left behind by a kill.
        self._memory = context.RawArray(ctypes.c_uint8, self._slot * slots)

    def slot(self, number: int) -> list[np.ndarray]:
        """The arrays of a slot."""
        start, arrays = number * self._slot, []
        for shape, dtype, size in self._arrays:
            arrays.append(self.memory[start : start + size].view(dtype).reshape(shape))
            start += -(-size // _ALIGN) * _ALIGN
        return arrays

    @property
    def memory(self) -> np.ndarray:
        """All of it, uint8."""
        return np.ctypeslib.as_array(self._memory)
