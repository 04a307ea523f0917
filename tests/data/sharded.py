"""A source of real shards for tests: folders of number files, read from disk by each process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Gone, Record, Source


class NumberShards(Source):
    """Shards are text files `name.txt` of one number a line; image n is a square of its digits."""

    flat = False

    def __init__(self, folder: Path, pieces: int = 2, threads: int = 0, grows: bool = False):
        self.folder, self.pieces, self.threads, self.grows = folder, pieces, threads, grows
        self.name = folder.name
        self._names = self._there()

    def _there(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.txt"))

    def __len__(self) -> int:
        raise ValueError("the number of images is not known: set steps= instead of epochs=")

    def read(self, index: int) -> Record:
        raise NotImplementedError

    def shards(self) -> int:
        return len(self._names)

    def _numbers(self, shard: int, piece: int) -> list[int]:
        path = self.folder / self._names[shard]
        if not path.exists():
            raise Gone(f"{path.name} is gone")
        lines = [int(line) for line in path.read_text().split()]
        n = len(lines)
        return lines[n * piece // self.pieces : n * (piece + 1) // self.pieces]

    def length(self, shard: int, piece: int) -> int:
        return len(self._numbers(shard, piece))

    def fetch(self, shard: int, piece: int, member: int) -> Record:
        number = self._numbers(shard, piece)[member]
        key = self.fetch_key(shard, piece, member)
        if number % 100 == 13:
            raise OSError("an unlucky number")
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[8:, 8:, 2] = number % 251, number // 251 % 251, 255
        return Record(key, pixels, number)

    def fetch_key(self, shard: int, piece: int, member: int) -> str:
        return self._names[shard] + ("" if member < 0 else f":{piece}:{member}")

    def poll(self) -> list[str]:
        return [name for name in self._there() if name not in set(self._names)]

    def extend(self, names: list[str]) -> None:
        self._names += names

    def listing(self) -> list[str]:
        return list(self._names)

    def adopt(self, names: list[str]) -> None:
        self._names = list(names)


def write_shard(folder: Path, name: str, numbers: range | list[int]) -> None:
    """One shard, whole at once."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}"
    part.write_text("\n".join(map(str, numbers)))
    part.rename(folder / f"{name}.txt")
