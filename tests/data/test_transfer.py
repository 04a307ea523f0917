"""Batches that go to a device must be those of the loader, whenever the device does its copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsight.data import photometric_batch
from selfsight.data.batch import Batch
from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources.synthetic import SyntheticScenes
from selfsight.data.transfer import Mark, Transfer

CPU = torch.device("cpu")
BATCH = 6


def loader(workers: int = 0) -> Loader:
    crops = MultiCrop(
        {
            "large": CropGroup(size=32, count=2, scale=(0.4, 1.0)),
            "small": CropGroup(size=16, count=3, scale=(0.1, 0.4)),
        }
    )
    return Loader(SyntheticScenes(50), crops, batch_size=BATCH, seed=3, workers=workers, prefetch=2)


def copied(batch: Batch) -> list[Tensor]:
    return [t.clone() for t in (*batch.views, batch.positions, batch.labels)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[Tensor], Tensor]]:
    with loader() as batches:
        return [(copied(next(batches)), batches.cursors.clone()) for _ in range(6)]


class LateQueue:
    """A device that does its copies as late as the marks that are waited for allow."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0
        self.closed = 0

    def send(self, tensor: Tensor) -> Tensor:
        target = torch.full_like(tensor, 77)
        self.work.append(lambda: target.copy_(tensor))
        return target

    @contextmanager
    def running(self) -> Iterator[None]:
        self.run(len(self.work))
        yield

    def mark(self) -> "LateMark":
        return LateMark(self, len(self.work))

    def take(self, mark: Mark, tensors: list[Tensor]) -> None:
        assert isinstance(mark, LateMark) and mark.place >= len(tensors) > 2

    def run(self, end: int) -> None:
        while self.done < end:
            self.work[self.done]()
            self.done += 1

    def close(self) -> None:
        self.run(len(self.work))
        self.closed += 1


class LateMark:
    def __init__(self, queue: LateQueue, place: int) -> None:
        self.queue, self.place = queue, place

    def synchronize(self) -> None:
        self.queue.run(self.place)


class Steady:
    """A loader of plain numbers, each in the same memory, that says when it is ready."""

    def __init__(self, length: int = 100, ready: bool = True) -> None:
        self.memory = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
        self.cursors, self.wait_seconds = torch.zeros(2, dtype=torch.int64), 0.0
        self.length, self.is_ready, self.asked, self.closed = length, ready, 0, 0

    def __next__(self) -> Batch:
        if self.asked == self.length:
            raise ValueError("only unusable samples.")
        self.asked += 1
        self.memory.fill_(self.asked)
        self.cursors = torch.full((2,), self.asked)
        self.wait_seconds += 1.0
        return Batch([self.memory], torch.full((2,), self.asked), torch.full((2,), -1))

    def ready(self) -> bool:
        return self.is_ready

    def close(self) -> None:
        self.closed += 1


def test_on_cpu_batches_pass_as_they_are(expected):
    inner = loader()
    with Transfer(inner, CPU) as batches:
        for tensors, cursors in expected:
            batch = next(batches)
            assert all(map(torch.equal, copied(batch), tensors))
            assert torch.equal(batches.cursors, cursors)
            assert batches.wait_seconds == inner.wait_seconds > 0
            low = inner._ring.memory.ctypes.data
            assert all(low <= v.data_ptr() < low + inner._ring.memory.nbytes for v in batch.views)


def test_on_cpu_the_rest_of_the_work_is_done_in_place():
    table = np.zeros((2 * BATCH, photometric_batch.COLUMNS)).reshape(2, BATCH, -1)
    table[..., -1] = 1  # grey

    def finish(views: list[Tensor], host: Batch) -> None:
        assert len(host) == BATCH
        photometric_batch.apply(views[0], table)

    with Transfer(loader(), CPU, finish=finish) as batches:
        for _ in range(3):
            large, small = next(batches).views
            assert (large[:, :, :1] == large).all() and not (small[:, :, :1] == small).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_late_copies_give_the_same_batches(workers, expected):
    """What step k reads is looked at only after batch k + 1 was asked for."""
    queue = LateQueue()
    with Transfer(loader(workers), CPU, queue=queue) as batches:
        before = None
        for n, (_, cursors) in enumerate(expected):
            batch = next(batches)
            assert torch.equal(batches.cursors, cursors)
            if before is not None:
                assert all(map(torch.equal, copied(before), expected[n - 1][0]))
            before = batch
    assert queue.closed == 1 and queue.done == len(queue.work)


def test_one_batch_is_on_its_way_and_its_state_is_not_shown():
    inner = Steady()
    batches = Transfer(inner, CPU, queue=LateQueue())
    for n in range(1, 5):
        next(batches)
        assert inner.asked == n + 1  # the next one has set out
        assert batches.cursors.tolist() == [n, n] and n <= batches.wait_seconds < n + 0.5
    batches.close()


def test_a_loader_that_is_not_ready_does_not_hold_up_the_step():
    inner = Steady(ready=False)
    with Transfer(inner, CPU, queue=LateQueue()) as batches:
        for n in range(1, 4):
            next(batches)
            assert inner.asked == n
        inner.is_ready = True
        next(batches)
        assert inner.asked == 5 and batches.cursors.tolist() == [4, 4]


def test_work_on_the_device_follows_the_copy():
    def finish(views: list[Tensor], host: Batch) -> None:
        views[0] += 100

    with Transfer(Steady(), CPU, finish=finish, queue=LateQueue()) as batches:
        for n in range(1, 5):
            assert (next(batches).views[0] == 100 + n).all()


def test_an_error_comes_with_its_own_batch():
    inner = Steady(length=3)
    with Transfer(inner, CPU, queue=LateQueue()) as batches:
        for n in range(1, 4):
            next(batches)
            assert batches.cursors.tolist() == [n, n]
        with pytest.raises(ValueError, match="only unusable samples"):
            next(batches)
    assert inner.closed == 1


def test_closing_stops_the_workers():
    inner = loader(workers=2)
    with Transfer(inner, CPU, queue=LateQueue()) as batches:
        next(batches)
        assert len(inner._workers) == 2
    assert not inner._workers
    batches.close()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(workers, expected):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device, notices = torch.device("cuda", 0), []
    rng = np.random.default_rng(0)
    table = np.zeros((2, BATCH, photometric_batch.COLUMNS), photometric_batch.DTYPE)
    table[..., 0] = 1  # brightness
    table[..., 1] = rng.uniform(0.5, 1.5, table.shape[:2])

    def finish(views: list[Tensor], host: Batch) -> None:
        photometric_batch.apply(views[0], table)

    inner = loader(workers)
    options = {"memory": inner._ring.memory, "finish": finish, "notice": notices.append}
    with Transfer(inner, device, **options) as batches:
        busy = torch.randn(2048, 2048, device=device)
        kept = []
        for _, cursors in expected:
            batch = next(batches)
            assert batch.views[0].is_cuda and batch.labels.is_cuda
            assert torch.equal(batches.cursors, cursors)
            for _ in range(20):  # the copies overlap with this
                busy = busy @ busy / 50
            kept.append(copied(batch))
    for tensors, (wanted, _) in zip(kept, expected, strict=True):
        first = wanted[0].clone()
        photometric_batch.apply(first, table)
        assert torch.equal(tensors[0].cpu(), first)
        assert all(torch.equal(t.cpu(), w) for t, w in zip(tensors[1:], wanted[1:], strict=True))
    assert not notices
    # Let go: it can be locked again, and a second time is refused with a notice.
    memory = np.zeros(1 << 20, np.uint8)
    one = Transfer(Steady(), device, memory=memory)
    two = Transfer(Steady(), device, memory=memory, notice=notices.append)
    assert "could not be page-locked" in notices[0]
    assert (next(two).views[0] == 1).all()
    one.close()
    two.close()
