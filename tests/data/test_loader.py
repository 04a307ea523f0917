"""The batches are one function of (source, seed, batch number), whoever reads them.

Takes about a minute on one core: each case starts its own worker processes.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsight.data.decode import DecodeLimits
from selfsight.data.ledger import Ledger
from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources.folder import ImageFolder
from selfsight.data.sources.packed import PackedNpz
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Record, Source
from selfsight.data.stream import Stream
from selfsight.data.worker import WorkerLimits

BATCH = 8
STEPS = 7


def multicrop() -> MultiCrop:
    return MultiCrop(
        {"global": CropGroup(24, 2, (0.14, 1.0)), "local": CropGroup(16, 3, (0.05, 0.14))}
    )


@pytest.fixture(scope="module")
def sources(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """The same images, bad ones among them, as a folder, as shards and packed."""
    folder = ImageFolder(str(photos), labels="folders")
    place = tmp_path_factory.mktemp("sources")
    records = [folder.read(i) for i in range(len(folder))]
    for s in range(2):
        with tarfile.open(place / f"{s}.tar", "w") as tar:
            for n, record in enumerate(records[s::2]):
                assert isinstance(record.data, bytes)
                member = tarfile.TarInfo(f"{n:03d}.jpg")
                member.size = len(record.data)
                tar.addfile(member, io.BytesIO(record.data))
    data = [record.data for record in records if isinstance(record.data, bytes)]
    np.savez(
        place / "set.npz",
        train_bytes=np.frombuffer(b"".join(data), np.uint8),
        train_offsets=np.cumsum([0, *map(len, data)]),
        train_labels=np.arange(len(data)),
    )
    return {
        "folder": folder,
        "shards": TarShards(str(place / "{0..1}.tar")),
        "packed": PackedNpz(str(place / "set.npz")),
    }


def take(loader: Loader, steps: int) -> list[tuple[torch.Tensor, ...]]:
    """The next batches, copied, with the cursors after each."""
    batches = []
    for _ in range(steps):
        batch = next(loader)
        copies = [view.clone() for view in batch.views]
        batches.append((batch.positions, batch.labels, *copies, loader.cursors))
    return batches


def joined(parts: list[list[tuple[torch.Tensor, ...]]]) -> list[tuple[torch.Tensor, ...]]:
    """The global batches of all ranks: views along their images, the rest along lanes."""
    return [
        tuple(torch.cat(t, dim=1 if t[0].ndim == 5 else 0) for t in zip(*ranks, strict=True))
        for ranks in zip(*parts, strict=True)
    ]


def same(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def expected(sources: dict[str, Source]) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    result = {}
    for name, source in sources.items():
        with Loader(source, multicrop(), batch_size=BATCH, seed=5) as loader:
            result[name] = take(loader, STEPS)
    return result


def test_shapes_positions_and_labels(sources, expected):
    folder = sources["folder"]
    stream = Stream([len(folder)], 1, BATCH, 5)
    for positions, labels, globals_, locals_, _ in expected["folder"]:
        assert globals_.shape == (2, BATCH, 3, 24, 24) and locals_.shape == (3, BATCH, 3, 16, 16)
        assert globals_.dtype == torch.uint8
        for lane, (position, label) in enumerate(
            zip(positions.tolist(), labels.tolist(), strict=True)
        ):
            assert position % BATCH == lane
            record = folder.read(stream.piece(lane, position // BATCH).shard)
            assert label == (-1 if record.label is None else record.label)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", ["folder", "shards", "packed"])
def test_workers_change_nothing(sources, expected, name, workers):
    with Loader(sources[name], multicrop(), batch_size=BATCH, seed=5, workers=workers) as loader:
        assert same(take(loader, STEPS), expected[name])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_change_nothing(sources, expected, world_size, workers):
    parts = []
    for rank in range(world_size):
        with Loader(
            sources["shards"], multicrop(), batch_size=BATCH, seed=5,
            rank=rank, world_size=world_size, workers=workers,
        ) as loader:  # fmt: skip
            parts.append(take(loader, STEPS))
    assert same(joined(parts), expected["shards"])


@pytest.mark.parametrize("at", range(STEPS))
def test_resumed_anywhere_at_another_size(sources, expected, at):
    """Cursors of one rank without workers, gone on with by two ranks, one with a worker."""
    cursors = expected["folder"][at][-1]
    parts = []
    for rank in range(2):
        own = cursors[rank * BATCH // 2 : (rank + 1) * BATCH // 2]
        with Loader(
            sources["folder"], multicrop(), batch_size=BATCH, seed=5,
            rank=rank, world_size=2, workers=rank, cursors=own,
        ) as loader:  # fmt: skip
            parts.append(take(loader, STEPS - at - 1))
    assert same(joined(parts), expected["folder"][at + 1 :])


def test_fewer_images_than_lanes(tmp_path, encode, picture):
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(encode(picture(n, 40, 30)))
    batches = []
    for workers in (0, 2):
        with Loader(
            ImageFolder(str(tmp_path)), multicrop(), batch_size=BATCH, seed=0, workers=workers
        ) as loader:
            batches.append(take(loader, 3))
    assert same(*batches)
    globals_ = batches[0][0][2]
    assert len({globals_[0, lane].numpy().tobytes() for lane in range(BATCH)}) == BATCH


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_replaced(sources, expected, victim):
    with Loader(sources["folder"], multicrop(), batch_size=BATCH, seed=5, workers=2) as loader:
        batches = take(loader, 1)
        for _ in range(2):  # twice, with progress in between
            pid = loader._workers[victim].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            batches += take(loader, 3)  # two may have been ready, the third needs a new worker
            assert loader._workers[victim].process.pid != pid
    assert same(batches, expected["folder"])


class Slow(Source):
    """Images that take a while, with a fault at one of them (-1: all). Imported by the workers."""

    name = "slow"

    def __init__(
        self,
        seconds: float,
        deadly: int | None = None,
        wrong: int | None = None,
        hanging: int | None = None,
        leak: int = 0,
    ) -> None:
        self.seconds, self.deadly, self.wrong, self.hanging = seconds, deadly, wrong, hanging
        self.leak, self.leaked = leak, []

    def __len__(self) -> int:
        return 64

    def read(self, index: int) -> Record:
        time.sleep(self.seconds)
        if self.deadly in (index, -1):
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.wrong:
            raise ZeroDivisionError("a mistake in the source")
        if index == self.hanging:
            time.sleep(60)
        if self.leak:
            self.leaked.append(b"x" * self.leak)
        return Record(str(index), np.full((20, 30, 3), index, np.uint8), index)


def test_a_death_in_the_middle_of_a_batch_is_noticed_at_once():
    def options(workers: int) -> dict:
        return {"batch_size": BATCH, "seed": 1, "workers": workers}

    with Loader(Slow(0.0), multicrop(), **options(0)) as loader:
        expected = take(loader, 3)
    with Loader(Slow(0.1), multicrop(), **options(2)) as loader:
        next(loader)
        first = loader._workers[0]
        pid = first.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        start = time.perf_counter()
        first.receive() if first.pipe.poll(1) else pytest.fail("no notice within a second")
        while first.process.pid == pid:  # batches that it had finished come first
            first.receive()
        assert time.perf_counter() - start < 1
        assert same(take(loader, 2), expected[1:])


def test_a_worker_that_stops_between_samples_is_replaced(sources, expected):
    limits = WorkerLimits(decode_seconds=1.0, fetch_seconds=1.0)
    with Loader(
        sources["folder"], multicrop(), batch_size=BATCH, seed=5, workers=2, limits=limits
    ) as loader:
        batches = take(loader, 1)
        worker = loader._workers[1]
        while worker._mark.read() is not None or not worker.pipe.poll():
            time.sleep(0.01)
        time.sleep(0.5)  # the batches it was asked for are done
        pid = worker.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        batches += take(loader, 5)
        assert worker.process.pid != pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert same(batches, expected["folder"][: len(batches)])


def test_a_sample_that_kills_workers_is_passed_over(tmp_path):
    """And listed; a resumed run passes it over without dying again, and reads the same."""
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def read(workers: int, deadly: int | None, steps: int, cursors=None):
        with Loader(
            Slow(0.0, deadly=deadly), multicrop(), batch_size=BATCH, seed=1,
            workers=workers, ledger=ledger, cursors=cursors,
        ) as loader:  # fmt: skip
            return take(loader, steps)

    batches = read(2, 20, 8)
    labels = torch.cat([batch[1] for batch in batches]).tolist()
    assert len(labels) == 64 and set(labels) == set(range(64)) - {20}
    (line,) = [json.loads(text) for text in ledger.path.read_text().splitlines()]
    assert line["key"] == "20" and "died over it twice (signal 9)" in line["reason"]
    again = read(0, 20, 6, cursors=batches[1][-1])
    assert same(again, batches[2:])
    # the same without the danger: what is listed counts
    assert same(read(1, None, 8, cursors=torch.zeros(BATCH, 3).long()), batches)


def test_deaths_at_many_samples_end_in_a_sentence():
    with (
        Loader(Slow(0.0, deadly=-1), multicrop(), batch_size=BATCH, seed=1, workers=1) as loader,
        pytest.raises(RuntimeError, match="a loader worker died 5 times at the same batch"),
    ):
        take(loader, 8)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_sample_that_hangs_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    limits = WorkerLimits(fetch_seconds=1.0)
    with Loader(
        Slow(0.0, hanging=20), multicrop(), batch_size=BATCH, seed=1,
        workers=2, ledger=ledger, limits=limits,
    ) as loader:  # fmt: skip
        batches = take(loader, 8)
    labels = torch.cat([batch[1] for batch in batches]).tolist()
    assert len(labels) == 64 and set(labels) == set(range(64)) - {20}
    (line,) = [json.loads(text) for text in ledger.path.read_text().splitlines()]
    assert line["key"] == "20" and "fetching it took more than 1 s" in line["reason"]


def test_a_worker_that_grows_is_replaced():
    with Loader(Slow(0.0), multicrop(), batch_size=BATCH, seed=1) as loader:
        expected = take(loader, 6)
    limits = WorkerLimits(growth_gb=0.05)
    with Loader(
        Slow(0.0, leak=10_000_000), multicrop(), batch_size=BATCH, seed=1, workers=1, limits=limits
    ) as loader:
        pids = set()
        batches = []
        for _ in range(6):
            batches += take(loader, 1)
            pids.add(loader._workers[0].process.pid)
    assert len(pids) > 1
    assert same(batches, expected)


def test_an_error_in_a_worker_surfaces():
    with (
        Loader(Slow(0.0, wrong=20), multicrop(), batch_size=BATCH, seed=1, workers=1) as loader,
        pytest.raises(RuntimeError, match="ZeroDivisionError: a mistake in the source") as caught,
    ):
        take(loader, 8)
    assert "in read" in str(caught.value.__cause__)


def test_bad_samples_are_listed_once_in_one_order(sources, hostile, tmp_path):
    def lines(path: Path) -> list[dict]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "time"} for line in found]

    def run(path: Path, steps: int, workers: int = 0, cursors=None) -> torch.Tensor:
        with Loader(
            sources["folder"], multicrop(), batch_size=BATCH, seed=5,
            workers=workers, cursors=cursors, ledger=Ledger(path),
        ) as loader:  # fmt: skip
            take(loader, steps)
            return loader.cursors

    run(tmp_path / "one.jsonl", 9)
    listed = lines(tmp_path / "one.jsonl")
    # every hostile file in every pass: 18 items a pass, 72 entries and more
    assert {line["key"].split("/")[-1] for line in listed} == set(hostile)
    assert len(listed) >= 4 * len(hostile) - 2
    assert len({line["position"] for line in listed}) == len(listed)
    reasons = {line["key"].split("/")[-1]: line["reason"] for line in listed}
    assert reasons["empty.jpg"] == "empty file" and "pixels" in reasons["bomb.png"]
    run(tmp_path / "two.jsonl", 9, workers=3)
    assert lines(tmp_path / "two.jsonl") == listed
    # six steps, then a resume from the cursors after the third: the same lines, none twice
    cursors = run(tmp_path / "three.jsonl", 3)
    run(tmp_path / "three.jsonl", 3, cursors=cursors)
    run(tmp_path / "three.jsonl", 6, workers=1, cursors=cursors)
    assert lines(tmp_path / "three.jsonl") == listed


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_samples(tmp_path, workers):
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(b"not an image")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with (
        Loader(
            ImageFolder(str(tmp_path)),
            multicrop(),
            batch_size=4,
            seed=0,
            workers=workers,
            ledger=ledger,
        ) as loader,
        pytest.raises(ValueError, match=r"100 samples in a row of the source .* \(not an image"),
    ):
        next(loader)
    assert len(ledger.path.read_text().splitlines()) == 100


def test_max_pixels_reaches_the_workers(sources):
    seen = []
    for limit in (100_000_000, 3000):
        with Loader(
            sources["folder"],
            multicrop(),
            batch_size=BATCH,
            seed=5,
            workers=1,
            options={"limits": DecodeLimits(max_pixels=limit)},
        ) as loader:
            seen.append(take(loader, 2)[1][-1].sum().item())
    assert seen[1] > seen[0]  # more entries were passed over


def test_mistakes_are_one_sentence(sources):
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        Loader(sources["folder"], multicrop(), batch_size=BATCH, seed=0, world_size=3)
    with pytest.raises(ValueError, match="the saved stream has 4 lanes on this rank"):
        Loader(
            sources["folder"], multicrop(), batch_size=8, seed=0, cursors=torch.zeros(4, 3).long()
        )


def test_waiting_is_counted(sources):
    with Loader(Slow(0.01), multicrop(), batch_size=BATCH, seed=0) as loader:
        next(loader)
        assert loader.wait_seconds >= 0.01 * BATCH


def test_workers_end_with_a_killed_main_process(tmp_path, photos):
    """kill -9 of the main process leaves no worker and no shared memory behind."""
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, time\n"
        "from selfsight.data.loader import Loader\n"
        "from selfsight.data.multicrop import CropGroup, MultiCrop\n"
        "from selfsight.data.sources.folder import ImageFolder\n"
        "if __name__ == '__main__':\n"
        "    crops = MultiCrop({'g': CropGroup(24, 1, (0.14, 1.0))})\n"
        "    loader = Loader(ImageFolder(sys.argv[1]), crops, batch_size=4, seed=0, workers=2)\n"
        "    next(loader)\n"
        "    print(*[w.process.pid for w in loader._workers], flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(photos)]
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as main:
        assert main.stdout is not None
        pids = [int(pid) for pid in main.stdout.readline().split()]
        main.kill()
    assert len(pids) == 2
    deadline = time.perf_counter() + 10
    while any(_alive(pid) for pid in pids) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)
    left = (set(shared.iterdir()) if shared.exists() else set()) - before
    assert not [path for path in left if path.name.startswith(("pym", "torch"))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
