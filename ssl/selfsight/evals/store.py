"""Features of a labelled set, extracted once and kept.

FOLDER/HASH/about.json             what it holds, in words
            labels-00000.npy       int64 (n), or int8 (n, classes) with 1, 0 and -1 (not judged)
            rows-00000.npy         int64 (n): indices in the source; those that failed are absent
            bad-00000.json         those, with reasons
            feature-00000.npy ...  fp32 or fp16 (n, d), one file a vector and shard

The hash is over the trunk's weights, the data and what is done to the images, so nothing stale is
ever used. Shards are cut by the data alone; each rank takes every so-manieth and writes it whole or
not at all, so an extraction that was stopped goes on where it was. Reading maps the files into
memory: a set may be larger than it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.data.decode import DecodeLimits
from selfsight.data.evaluation import read_images
from selfsight.data.ledger import Failure
from selfsight.data.sources.source import Source
from selfsight.distributed import collectives
from selfsight.evals.subject import Subject
from selfsight.trunks.vectors import vectors

FORMAT = 1
_SAMPLED = 64  # images whose bytes go into the digest of a source
_SMALLEST, _LARGEST = 256, 65_536  # images of a shard


@dataclass(frozen=True)
class Transform:
    """What is done to an image: its shorter side resized, the central square taken."""

    size: int
    resize: int | None
    limits: DecodeLimits


class Features:
    """Features of one source, mapped into memory.

    Attributes:
        labels: int64 (n,), or int8 (n, classes).
        rows: int64 (n,), indices in the source.
        bad: images that could not be used.
    """

    def __init__(self, folder: Path, shards: int, layers: Sequence[str]) -> None:
        self.folder, self._shards = folder, range(shards)
        self.labels = torch.from_numpy(np.concatenate(self._parts("labels")))
        self.rows = torch.from_numpy(np.concatenate(self._parts("rows")))
        self.bad = [
            Failure(**item)
            for shard in self._shards
            for item in json.loads((folder / f"bad-{shard:05d}.json").read_text())
        ]
        self._maps = {layer: self._parts(layer) for layer in layers}
        self._starts = np.cumsum([0, *(len(part) for part in self._parts("rows"))])

    def __len__(self) -> int:
        return len(self.rows)

    def width(self, layer: str) -> int:
        return self._maps[layer][0].shape[1]

    def take(self, layer: str, indices: Tensor | None = None) -> Tensor:
        """fp32 (n, d) of those images (by place among the usable ones), or of all."""
        parts = self._maps[layer]
        if indices is None:
            return torch.cat([torch.tensor(np.asarray(part)).float() for part in parts])
        wanted = indices.numpy()
        out = np.empty((len(wanted), self.width(layer)), np.float32)
        shard = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(shard):
            own = shard == number
            out[own] = parts[number][wanted[own] - self._starts[number]]
        return torch.from_numpy(out)

    def _parts(self, name: str) -> list[np.ndarray]:
        return [np.load(self.folder / f"{name}-{s:05d}.npy", mmap_mode="r") for s in self._shards]


def source_digest(source: Source, indices: Sequence[int]) -> str:
    """16 hex digits over the list of images, and the bytes and labels of some, evenly spread."""
    whole = hashlib.sha256(f"{source.name} {source.fingerprint()} {len(indices)}".encode())
    whole.update(json.dumps(source.classes).encode())
    if indices != range(len(source)):
        whole.update(np.asarray(indices, np.int64).tobytes())
    for n in range(min(_SAMPLED, len(indices))):
        try:
            record = source.read(int(indices[n * len(indices) // min(_SAMPLED, len(indices))]))
        except OSError:
            continue
        data = record.data if isinstance(record.data, bytes) else record.data.tobytes()
        whole.update(f"{record.key} {record.label} ".encode())
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()[:16]


def extract_features(
    subject: Subject,
    source: Source,
    indices: Sequence[int],
    *,
    layers: Sequence[str],
    folder: Path,
    transform: Transform,
    batch_size: int,
    workers: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    precision: str = "fp32",
    half: bool = False,
    digest: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Features, bool]:
    """The features of those images of a source, and whether all were there already.

    A collective: every rank extracts its shards and gets them all. Ranks must see one folder.

    Raises:
        ValueError: none of the images can be read.
    """
    digest = digest or source_digest(source, indices)
    about = {
        "format": FORMAT,
        "trunk": subject.digest(),
        "data": digest,
        "images": len(indices),
        "size": transform.size,
        "resize": transform.resize,
        "limits": str(transform.limits),
        "precision": precision,
        "half": half,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    place = folder / key
    each = min(_LARGEST, max(_SMALLEST, -(-len(indices) // 64)))
    shards = -(-len(indices) // each)
    place.mkdir(parents=True, exist_ok=True)
    found = True
    for shard in range(collectives.rank(), shards, collectives.size()):
        missing = [x for x in layers if not (place / f"{x}-{shard:05d}.npy").is_file()]
        if not missing and (place / f"rows-{shard:05d}.npy").is_file():
            continue
        found = False
        own = indices[shard * each : (shard + 1) * each]
        reader = _Reader(source, own, batch_size, transform, subject, workers)
        _extract_shard(subject, reader, missing, place, shard, device, autocast, half)
        progress(shard + 1, shards)
    if collectives.rank() == 0:
        described = about | {"source": source.name, "shards": shards}
        _whole(place / "about.json", lambda p: p.write_text(json.dumps(described, indent=2)))
    collectives.barrier()
    features = Features(place, shards, layers)
    if not len(features):
        first = features.bad[0] if features.bad else None
        raise ValueError(
            f"{source.name}: none of {len(indices)} images can be read"
            + (f" ({first.key}: {first.reason})" if first else "")
        )
    return features, all(collectives.all_gather_json(found))


def _extract_shard(
    subject: Subject,
    reader: "_Reader",
    layers: list[str],
    place: Path,
    shard: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    half: bool,
) -> None:
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    labels: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    bad: list[Failure] = []
    for images, targets, own, failures in reader:
        bad += failures
        labels.append(targets)
        rows.append(own)
        if not len(images):
            continue
        with torch.no_grad(), autocast():
            found = vectors(subject.trunk, subject.normalize(images.to(device)), layers)
        for layer, values in found.items():
            kept = values.half() if half else values
            parts[layer].append(kept.cpu().numpy())
    for layer, arrays in parts.items():
        if arrays:
            _save(place / f"{layer}-{shard:05d}.npy", np.concatenate(arrays))
        else:
            _save(place / f"{layer}-{shard:05d}.npy", _empty(subject, reader, layer, device))
    text = json.dumps([f._asdict() for f in bad])
    _whole(place / f"bad-{shard:05d}.json", lambda p: p.write_text(text))
    _save(place / f"labels-{shard:05d}.npy", np.concatenate(labels))
    _save(place / f"rows-{shard:05d}.npy", np.concatenate(rows))  # last: it says that all is there


def _empty(subject: Subject, reader: "_Reader", layer: str, device: torch.device) -> np.ndarray:
    """(0, d), for a shard of which no image can be read."""
    size = reader.transform.size
    blank = torch.zeros(1, subject.pixels.channels, size, size, device=device)
    with torch.no_grad():
        return vectors(subject.trunk, blank, [layer])[layer][:0].cpu().numpy()


def _save(path: Path, array: np.ndarray) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    _whole(path, write)


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    write(part)
    part.replace(path)


class _Reader:
    """Batches of (images, targets, indices, failures), the next one read while one is used."""

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        batch_size: int,
        transform: Transform,
        subject: Subject,
        workers: int,
    ) -> None:
        self.source, self.transform = source, transform
        self._parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        self._pixels, self._workers = subject.pixels, workers

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray, list[Failure]]]:
        with ThreadPoolExecutor(1, "features") as pool:
            ahead: Future | None = pool.submit(self._read, self._parts[0])
            for following in [*self._parts[1:], None]:
                assert ahead is not None
                batch = ahead.result()
                ahead = None if following is None else pool.submit(self._read, following)
                yield batch

    def _read(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray, np.ndarray, list[Failure]]:
        images, labels, failures = read_images(
            self.source,
            indices,
            size=self.transform.size,
            resize=self.transform.resize,
            workers=self._workers,
            limits=self.transform.limits,
            pixels=self._pixels,
        )
        gone = {failure.position for failure in failures}
        rows = np.array([int(i) for i in indices if int(i) not in gone], np.int64)
        sets = self.source.label_sets
        targets = labels.numpy() if sets is None else np.stack([sets(int(i)) for i in indices])
        if sets is not None:
            targets = targets[[int(i) not in gone for i in indices]]
        return images, targets, rows, failures
