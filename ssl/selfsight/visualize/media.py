"""Images from files, folders, videos and sources, each with a name."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from selfsight.config import ConfigError
from selfsight.data.decode import DecodeError, Encoded
from selfsight.data.pixels import PixelFormat, from_array
from selfsight.data.sources.source import IMAGE_EXTENSIONS, Source

VIDEO_EXTENSIONS = {"mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg"}
Named = tuple[str, np.ndarray]  # a name; pixels (H, W, C), upright


def read_path(
    path: Path, form: PixelFormat, *, most: int, seconds: float, notice: Callable[[str], None]
) -> list[Named]:
    """At most `most` images of a file, a folder (evenly spread over its files, by name) or a video
    (a frame every so many seconds). What cannot be read is told and passed over.

    Raises:
        ConfigError: there is nothing to look at.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _extension(p) in IMAGE_EXTENSIONS)
        if not files:
            raise ConfigError(
                f"{path} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS)[:6])}…)"
            )
        chosen = spread(len(files), most)
        found = list(_decoded((_file(files[n], path) for n in chosen), form, notice))
    elif _extension(path) in VIDEO_EXTENSIONS:
        found = _frames(path, form, most, seconds)
    else:
        found = list(_decoded(iter([(path.name, path.read_bytes())]), form, notice))
    if not found:
        raise ConfigError(f"{path} holds no image that can be read")
    return found


def read_source(
    source: Source, form: PixelFormat, most: int, notice: Callable[[str], None]
) -> list[Named]:
    """At most `most` images of a source, evenly spread."""
    some = source.excerpt(most)

    def records() -> Iterator[tuple[str, bytes | np.ndarray]]:
        for index in range(len(some)):
            try:
                record = some.read(index)
            except OSError as error:
                notice(f"{some.key(index)}: {error}")
                continue
            yield record.key, record.data

    found = list(_decoded(records(), form, notice))
    if not found:
        raise ConfigError(f"{source.name} holds no image that can be read")
    return found


def spread(length: int, most: int) -> list[int]:
    """At most `most` of so many places, evenly spread."""
    count = min(length, most)
    return [n * length // count for n in range(count)]


def _decoded(
    items: Iterator[tuple[str, bytes | np.ndarray]],
    form: PixelFormat,
    notice: Callable[[str], None],
) -> Iterator[Named]:
    for name, data in items:
        try:
            if isinstance(data, bytes):
                yield name, Encoded(data, None, form).decode()
            else:
                yield name, from_array(data, form)
        except DecodeError as error:
            notice(f"{name} is passed over: {error}")


def _file(path: Path, root: Path) -> tuple[str, bytes]:
    return str(path.relative_to(root)), path.read_bytes()


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _frames(path: Path, form: PixelFormat, most: int, seconds: float) -> list[Named]:
    if importlib.util.find_spec("av") is None:
        raise ConfigError(
            f"{path} is a video, which needs the package av: pip install 'selfsight[video]', or "
            "give a folder of its frames"
        )
    import av  # pyright: ignore[reportMissingImports]  (an extra)
    from av.error import FFmpegError  # pyright: ignore[reportMissingImports]

    found: list[Named] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            wanted = 0.0
            for frame in container.decode(stream):
                time = frame.time or 0.0
                if time + 1e-6 < wanted:
                    continue
                pixels = from_array(frame.to_ndarray(format="rgb24"), form)
                found.append((f"{path.stem}_{time:07.2f}s", pixels))
                wanted = time + seconds
                if len(found) == most:
                    break
    except (FFmpegError, IndexError) as error:
        raise ConfigError(f"{path} cannot be read as a video: {error}") from None
    return found
