"""Checkpoints that are written while training goes on, and every way in which that goes wrong."""

import ctypes
import os
import resource
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch

from selfsight.distributed import async_save, checkpoint, checkpoint_folder, payload
from selfsight.distributed.async_save import Saver
from selfsight.distributed.env import World
from tests.distributed.saves import (
    NO_LIMIT,
    SIZE,
    deadly,
    exit_codes,
    make_state,
    names_in,
    require,
    start,
    steps_in,
)


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this event is set."""
    event = threading.Event()

    def write(path, tensors, metadata=None):
        assert event.wait(30)
        return payload.write_tensors(path, tensors, metadata)

    monkeypatch.setattr(async_save, "write_tensors", write)
    yield event
    event.set()


@pytest.mark.parametrize("wait", [False, True])
def test_round_trip(tmp_path, wait):
    saver = Saver(tmp_path / "checkpoints", World())
    assert saver.save(7, make_state(7), {"lr": 0.1}, config_hash="abc", wait=wait)
    assert saver.finish()
    path = tmp_path / "checkpoints" / "step_00000007"
    assert saver.newest == path
    assert names_in(path) == ["manifest.json", "state-00000.safetensors"]
    require(checkpoint.latest(path.parent), 7)
    (outcome,) = saver.poll()
    assert (outcome.step, outcome.path, outcome.problem) == (7, path, None)
    assert outcome.seconds > 0
    assert saver.poll() == []
    assert saver.finish()


def test_what_is_saved_is_the_state_at_the_call(tmp_path, gate):
    """Training changes weights in place while they are written."""
    saver = Saver(tmp_path, World())
    state, scalars = make_state(3), {"list": [1]}
    saver.save(3, state, scalars, config_hash="")
    state["weight"].zero_()
    state["count"] += 1
    scalars["list"].append(2)
    assert steps_in(tmp_path) == []
    gate.set()
    assert saver.finish()
    require(checkpoint.latest(tmp_path), 3)
    assert checkpoint.verify(tmp_path / "step_00000003")["scalars"] == {"list": [1]}


def test_the_copies_memory_is_taken_once(tmp_path):
    saver = Saver(tmp_path, World())
    saver.reserve(make_state(0))
    memory = saver._staging._memory.data_ptr()
    for step in range(1, 5):
        saver.save(step, make_state(step), {}, config_hash="")
        assert saver._staging._memory.data_ptr() == memory
    assert saver.finish()
    assert 4008 <= saver._staging.bytes <= 4008 + 2 * 64
    saver.save(5, make_state(5, 2 * SIZE), {}, config_hash="")  # another state: more room
    assert saver.finish()
    require(checkpoint.latest(tmp_path), 5)


def test_another_save_waits_for_the_first(tmp_path, gate):
    saver = Saver(tmp_path, World())
    saver.save(1, make_state(1), {}, config_hash="")
    threading.Timer(0.3, gate.set).start()
    assert saver.save(2, make_state(2), {}, config_hash="")
    assert steps_in(tmp_path) == [1] or steps_in(tmp_path) == [1, 2]
    assert saver.finish()
    first, second = saver.poll()
    assert (first.step, second.step) == (1, 2)
    assert second.held > 0.1


def test_another_save_may_be_left_out_and_says_so(tmp_path, gate):
    said: list[str] = []
    saver = Saver(tmp_path, World(), notice=said.append, skip_when_busy=True, keep_every=3)
    assert saver.save(1, make_state(1), {}, config_hash="")
    assert not saver.save(2, make_state(2), {}, config_hash="")
    assert said == ["step 2: no checkpoint, as the one before is still being written"]
    threading.Timer(0.1, gate.set).start()
    assert saver.save(3, make_state(3), {}, config_hash="")  # a milestone waits
    assert saver.save(4, make_state(4), {}, config_hash="", wait=True)
    assert steps_in(tmp_path) == [1, 3, 4][-2:] or steps_in(tmp_path) == [3, 4]
    assert len(said) == 1


def test_retention_milestones_and_winding_back(tmp_path):
    saver = Saver(tmp_path, World(), keep=2, keep_every=30)
    for step in range(10, 80, 10):
        saver.save(step, make_state(step), {}, config_hash="")
    saver.discard_after(60)  # waits for the save under way
    assert steps_in(tmp_path) == [30, 60]
    saver.save(61, make_state(61), {}, config_hash="")
    saver.save(61, make_state(61, 5), {}, config_hash="")  # the same step again
    assert saver.finish()
    assert steps_in(tmp_path) == [30, 60, 61]
    require(checkpoint.latest(tmp_path), 61)
    assert [outcome.problem for outcome in saver.poll()] == [None] * 9
    assert names_in(tmp_path) == ["step_00000030", "step_00000060", "step_00000061"]


def test_a_guard_forbids_and_nothing_is_touched(tmp_path):
    said: list[str] = []
    calls: list[int] = []

    def guard() -> None:
        calls.append(1)
        if len(calls) in (3, 6):  # before the second save, and before the name of the third
            raise RuntimeError("job 8 holds the folder.")

    saver = Saver(tmp_path, World(), notice=said.append, guard=guard)
    assert saver.save(1, make_state(1), {}, config_hash="", wait=True)
    (tmp_path / ".unfinished_of_another").mkdir()
    assert not saver.save(2, make_state(2), {}, config_hash="", wait=True)
    assert names_in(tmp_path) == [".unfinished_of_another", "step_00000001"]
    calls.append(1)
    assert not saver.save(3, make_state(3), {}, config_hash="", wait=True)
    assert steps_in(tmp_path) == [1]
    assert len(said) == 2
    assert all("job 8 holds the folder); the ones before it are untouched" in s for s in said)


def test_mistakes_raise_in_the_training_thread(tmp_path):
    saver = Saver(tmp_path, World())
    with pytest.raises(ValueError, match=r"scalars\.a is a Tensor"):
        saver.save(1, {}, {"a": torch.ones(1)}, config_hash="")
    with pytest.raises(ValueError, match=r"tensor x of dtype torch\.complex64"):
        saver.save(1, {"x": torch.ones(1, dtype=torch.complex64)}, {}, config_hash="")
    assert saver.save(1, make_state(1), {}, config_hash="", wait=True)


def test_an_error_of_any_kind_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def write(*_):
        raise RuntimeError("what nobody thought of")

    said: list[str] = []
    saver = Saver(tmp_path, World(), notice=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(async_save, "write_tensors", write)
        saver.save(1, make_state(1), {}, config_hash="")
        assert not saver.finish()
    assert said == [
        f"step 1: the checkpoint was not written to {tmp_path} (RuntimeError: what nobody thought "
        "of); the ones before it are untouched."
    ]
    assert saver.save(2, make_state(2), {}, config_hash="", wait=True)
    assert names_in(tmp_path) == ["step_00000002"]


def test_without_memory_for_a_copy_it_writes_while_training_waits(tmp_path, monkeypatch):
    def none(*_, **__):
        raise RuntimeError("can't allocate memory")

    said: list[str] = []
    saver = Saver(tmp_path, World(), notice=said.append)
    with monkeypatch.context() as patch:
        patch.setattr("selfsight.distributed.staging.torch.empty", none)
        with pytest.raises(RuntimeError):
            torch.empty(1)
        patch.setattr(
            "selfsight.distributed.staging.torch.empty",
            lambda n, **_: none() if n else torch.zeros(0, dtype=torch.uint8),
        )
        saver.reserve(make_state(1))
    assert len(said) == 1
    assert "no 4,096 bytes of host memory" in said[0]
    assert saver.save(1, make_state(1), {}, config_hash="")
    require(checkpoint.latest(tmp_path), 1)


def test_a_run_that_crashes_does_not_wait(tmp_path, gate):
    saver = Saver(tmp_path, World())
    saver.save(1, make_state(1), {}, config_hash="")
    threading.Timer(0.1, gate.set).start()
    saver.close()
    saver.close()
    assert not any(thread.name == "save" for thread in threading.enumerate())


def _fill_the_disk(folder: Path, limit: int) -> None:
    """One save that finds the disk full, training beside it, and one that finds room again."""
    warnings.simplefilter("error")
    said: list[str] = []
    saver = Saver(folder, World(), notice=said.append)
    before = names_in(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    saver.save(3, make_state(3, 100_000), {}, config_hash="")
    torch.ones(10).sum()
    assert not saver.finish()
    assert names_in(folder) == before
    assert len(said) == 1
    assert "step 3: the checkpoint was not written" in said[0]
    assert "File too large" in said[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, NO_LIMIT)
    assert saver.save(4, make_state(4, 100_000), {}, config_hash="", wait=True)
    assert len(said) == 1
    os._exit(7)


@pytest.mark.parametrize("limit", [0, 100, 4096, 399_000])
def test_a_full_disk_is_told_and_the_earlier_ones_stay(tmp_path, limit):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, make_state(step), {}, config_hash="")
    assert exit_codes([start(_fill_the_disk, tmp_path, limit)]) == [7]
    require(checkpoint.latest(tmp_path), 4)
    assert steps_in(tmp_path) == [2, 4]


NO_SUCH_RIGHT = 77


def _on_a_small_disk(folder: Path) -> None:
    """Two megabytes of memory as a disk of its own, which nobody else sees; four saves fit."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(NO_SUCH_RIGHT)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=2m"):
        os._exit(NO_SUCH_RIGHT)
    said: list[str] = []
    saver = Saver(folder, World(), notice=said.append)
    steps = []
    for step, kilobytes in ((1, 500), (2, 500), (3, 1500), (4, 500), (5, 5000), (6, 500)):
        saver.save(step, make_state(step, kilobytes * 256), {}, config_hash="")
        assert saver.finish() == (kilobytes == 500), (step, said)
        assert len(names_in(folder)) == len(steps_in(folder))  # nothing partial
        require(checkpoint.latest(folder), steps_in(folder)[-1])
        steps.append(steps_in(folder))
    assert steps == [[1], [1, 2], [1, 2], [2, 4], [2, 4], [4, 6]]
    assert len(said) == 2
    assert all("No space left on device); the ones before it are untouched." in s for s in said)
    os._exit(0)


def test_a_small_file_system_that_is_full(tmp_path):
    (code,) = exit_codes([start(_on_a_small_disk, tmp_path)])
    if code == NO_SUCH_RIGHT:
        pytest.skip("this machine does not let its users mount a file system of their own")
    assert code == 0


def _save_and_die(folder: Path, step: int, calls: int) -> None:
    deadly(calls)
    saver = Saver(folder, World())
    saver.save(step, make_state(step), {}, config_hash="")
    saver.finish()


# 2 is there already and is replaced
@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_before_any_change_of_the_disk_loses_nothing(tmp_path, step):
    for calls in range(1, 60):
        folder = tmp_path / str(calls)
        for before in (1, 2):
            checkpoint.save(folder, before, make_state(before), {}, config_hash="")
        (code,) = exit_codes([start(_save_and_die, folder, step, calls)])
        path = checkpoint.latest(folder)
        reached = checkpoint.verify(path)["step"] if path else 0
        assert reached in (2, step)
        require(path, reached)
        intact = [
            p for p in checkpoint.checkpoints(folder) if checkpoint_folder.quick_problem(p) is None
        ]
        assert len(intact) >= 2
        Saver(folder, World()).save(4, make_state(4), {}, config_hash="", wait=True)
        assert names_in(folder) == [f"step_{reached:08d}", "step_00000004"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    else:
        pytest.fail("the save never came to its end")
    assert calls > 8
