"""One writer a folder: other runs wait and refuse, later starts of the job take over."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfsight.distributed import lease as leases
from selfsight.distributed.lease import Lease, LeaseRefused, LostLease

SECONDS = 0.9
HOLD = """
import sys, time
from selfsight.distributed.lease import Lease
lease = Lease(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
lease.acquire()
print("held", flush=True)
for line in sys.stdin:
    if line == "release\\n":
        lease.release()
    try:
        lease.check()
        print("ours", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Other:
    """Another process that holds the lease."""

    def __init__(self, folder: Path, job: str, restart: int = 0, seconds: float = SECONDS) -> None:
        root = str(Path(leases.__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), job, str(restart), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": root},
            text=True,
        )
        assert self.line() == "held"

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def check(self) -> str:
        self.say("check")
        return self.line()

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def elsewhere(monkeypatch):
    """As if other holders were on another machine: their process numbers mean nothing here."""
    monkeypatch.setattr(leases, "_kernel", lambda: "another machine")


def timed(lease: Lease) -> tuple[float, str | None]:
    start = time.monotonic()
    notice = lease.acquire()
    return time.monotonic() - start, notice


def test_taken_checked_released_and_taken_again(tmp_path):
    first = Lease(tmp_path, "a", seconds=30)
    assert timed(first)[0] < 1
    first.check()
    first.release()
    with pytest.raises(AssertionError):
        first.check()
    took, notice = timed(Lease(tmp_path, "b", seconds=30))
    assert took < 1 and notice is None
    assert len(list(tmp_path.glob(".lease_*"))) == 1


@pytest.mark.usefixtures("elsewhere")
def test_a_living_holder_is_respected_and_named(tmp_path):
    with Other(tmp_path, "77") as other:
        with pytest.raises(LeaseRefused, match=r"job 77 \(process \d+ on .*choose another name="):
            Lease(tmp_path, "78", seconds=SECONDS).acquire()
        assert other.check() == "ours"
        other.say("release")
        assert "AssertionError" in other.line()
        took, _ = timed(Lease(tmp_path, "78", seconds=SECONDS))
        assert took < SECONDS


@pytest.mark.usefixtures("elsewhere")
def test_a_dead_holder_elsewhere_is_waited_for_one_lease_time(tmp_path):
    with Other(tmp_path, "77") as other:
        other.process.kill()
        other.process.wait()
        took, notice = timed(Lease(tmp_path, "78", seconds=SECONDS))
    assert SECONDS <= took < SECONDS + 2
    assert notice and "no sign of life" in notice


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path):
    with Other(tmp_path, "77", seconds=60) as other:
        other.process.kill()  # it may take a moment to be gone
        took, notice = timed(Lease(tmp_path, "78", seconds=60))
    assert took < 5
    assert notice and "job 77" in notice


@pytest.mark.usefixtures("elsewhere")
def test_a_later_start_of_the_job_takes_over_and_the_former_leaves(tmp_path):
    """A split brain: the former start lives on, cut off, and comes to its next commit."""
    with Other(tmp_path, "77", restart=0, seconds=30) as former:
        lease = Lease(tmp_path, "77", restart_count=1, seconds=30)
        assert timed(lease)[0] < 1
        said = former.check()
        assert said.startswith("LostLease")
        assert "job 77" in said and str(tmp_path) in said
        lease.check()
        former.say("release")  # a former holder's end changes nothing
        former.line()
        lease.check()
        with pytest.raises(LeaseRefused, match="this is start 0"):
            Lease(tmp_path, "77", restart_count=0, seconds=30).acquire()
        lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_a_stopped_holder_that_wakes_up_finds_its_lease_taken(tmp_path):
    import signal

    with Other(tmp_path, "77") as other:
        other.process.send_signal(signal.SIGSTOP)
        lease = Lease(tmp_path, "78", seconds=SECONDS)
        lease.acquire()
        other.process.send_signal(signal.SIGCONT)
        assert other.check().startswith("LostLease")
        time.sleep(2 * SECONDS)  # it renews no more
        lease.check()
        assert not lease.lost
        lease.release()


@pytest.mark.usefixtures("elsewhere")
def test_of_starts_at_the_same_moment_one_remains(tmp_path):
    with Other(tmp_path, "1", seconds=3) as a:
        # as a start would that looked before `a` had written
        (tmp_path / leases.FILE).rename(tmp_path / "hidden")
        with Other(tmp_path, "2", seconds=3) as b:
            assert sorted([a.check().split()[0], b.check()]) == ["LostLease", "ours"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../../x"}', '{"token": 3}'])
def test_a_file_that_is_no_lease_binds_nobody(tmp_path, text):
    (tmp_path / leases.FILE).write_text(text)
    lease = Lease(tmp_path, "1")
    lease.acquire()
    lease.check()
    assert json.loads((tmp_path / leases.FILE).read_text())["job"] == "1"
    (tmp_path / leases.FILE).unlink()
    with pytest.raises(LostLease, match="is gone"):
        lease.check()
    lease.release()
