"""Full float32 arithmetic for the few places that need it.

Autocast lowers matrix products to half precision, and TF32 (or bfloat16 on CPU) lowers them without
changing a dtype. Both are harmless in a trunk; in optimal transport, where scores are divided by
an epsilon of 0.03 and exponentiated, they cost two decimals of every assignment.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast off on `device`, and matrix products to IEEE arithmetic, for a block of code.

    Sets flags of the process on the host, puts them back on leaving, and never touches the device.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
