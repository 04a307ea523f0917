"""What an encoded image may cost, and the error of one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import UnidentifiedImageError

MAX_PIXELS = 100_000_000


class DecodeError(Exception):
    """This image cannot be used; the message is the reason, the same whenever it is read."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Checked against the bytes and the header, before any pixel is decoded.

    Attributes:
        max_pixels: width times height.
        max_bytes: length of the encoded image.
        max_side: the longer side in pixels; 65,535 is the most that a JPEG can have.
        truncated: "skip" refuses an image that ends early or is damaged; "use" takes the part of it
            that Pillow decodes, the rest being black or grey.
        min_decoded: the least share of rows, estimated, that such a part must have.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = 100_000_000
    max_side: int = 65_535
    truncated: Literal["skip", "use"] = "skip"
    min_decoded: float = 0.5

    def __post_init__(self) -> None:
        for field in ("max_pixels", "max_bytes", "max_side"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"decoding: {field} must be at least 1, but it is {getattr(self, field)}."
                )
        if self.truncated not in ("skip", "use"):
            raise ValueError(
                f"decoding: truncated must be skip or use, but it is {self.truncated}."
            )
        if not 0 <= self.min_decoded <= 1:
            raise ValueError(
                f"decoding: min_decoded must be a share from 0 to 1, but it is {self.min_decoded}."
            )

    def check_size(self, width: int, height: int) -> None:
        """DecodeError where an image of that size is not decoded."""
        if width < 1 or height < 1:
            raise DecodeError("no pixels")
        if width * height > self.max_pixels:
            raise DecodeError(
                f"{width}x{height} pixels, more than the limit of {self.max_pixels:,}"
            )
        if max(width, height) > self.max_side:
            raise DecodeError(
                f"{width}x{height} pixels, a side longer than the limit of {self.max_side:,}"
            )


def describe(error: Exception) -> str:
    """One line that is the same in every process, for the ledger."""
    if isinstance(error, DecodeError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, MemoryError):
        return "MemoryError: it declares more than there is memory for"
    text = " ".join(str(error).split())
    if " at 0x" in text:  # the address of a Python object
        text = text.partition("<")[0].strip()
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
