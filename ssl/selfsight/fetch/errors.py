"""Why a URL gave no image."""

from __future__ import annotations

from importlib.util import find_spec


class FetchError(OSError):
    """A URL that gave no image.

    Attributes:
        reason: a short word from a small set, that reports count by ("timeout", "status 404").
        detail: more about this one case.
        again: whether another try may end better.
        wait: seconds that the server asked to wait before that, or None.
    """

    def __init__(
        self, reason: str, detail: str = "", again: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.again = again
        self.wait = wait


def require(package: str) -> None:
    """Raise ValueError, with the remedy, unless the optional package is installed."""
    if find_spec(package) is None:
        raise ValueError(
            f"fetching from URL lists needs the package {package}: install the extra `fetch` "
            "(uv sync --extra fetch)."
        )
