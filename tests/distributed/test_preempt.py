"""Wishes to stop: noted from the first line on, and followed by all ranks at one step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selfsight.distributed import preempt
from selfsight.distributed.preempt import Flags, StopRequest
from tests.parallel.ranks import on_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean():
    preempt.disarm()
    yield
    preempt.disarm()


def test_early_signals_are_noted_without_torch():
    """USR2 and TERM come before torch is imported: the process lives, and knows."""
    code = (
        "import os, signal, sys\n"
        "from selfsight.distributed import preempt\n"
        "preempt.arm()\n"
        "os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert 'torch' not in sys.modules\n"
        "print(preempt.noted())\n"
    )
    root = str(Path(preempt.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "preempted"), done.stderr


def test_reasons_and_their_order(tmp_path):
    file = tmp_path / "stop"
    stop = StopRequest(file)
    try:
        assert stop.code == 0
        assert stop.agree() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.code == 1
        file.touch()
        assert stop.code == 1, "it is not looked for at every step"
        stop._look = 0.0
        assert stop.code == 2
        assert stop.agree() == "stop file"
        assert not file.exists()
    finally:
        stop.close()


def test_the_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.agree() == "interrupt"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    stop.close()
    assert signal.getsignal(signal.SIGINT) == before


def test_children_started_in_the_shield_survive_the_jobs_signals():
    preempt.arm()
    with preempt.shielded():
        os.kill(os.getpid(), signal.SIGUSR2)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert preempt.noted() == "preempted"  # it was not lost
        child.send_signal(signal.SIGUSR2)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_job_whose_parent_blocked_the_signals_notes_them():
    """A fork server that was started within the shield hands its mask on to every child."""
    code = (
        "import os, signal\n"
        "from selfsight.distributed import preempt\n"
        "preempt.arm()\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "print(preempt.noted())\n"
    )
    root = str(Path(preempt.__file__).parents[2])
    with preempt.shielded():
        job = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out.strip()) == (0, "preempted")


def test_flags_of_one_process():
    flags = Flags(StopRequest(), CPU)
    good = torch.tensor(True)
    assert flags.read() is None
    for step, (finite, loss, bad) in enumerate(
        [
            (good, 2.0, False),
            (~good, 2.0, True),
            (good, float("nan"), True),
            (good, float("inf"), True),
        ]
    ):
        found = flags.exchange(step, finite, torch.tensor(loss), note=[step])
        answer = flags.read()
        assert answer is not None
        assert float(found) == bad == answer.bad == answer.own
        assert answer.bad_loss == (not loss < 1e9)
        assert (answer.step, answer.note, answer.reason) == (step, [step], None)
    assert flags.drain() == []


def _run(world, signalled: int, number: int, at: int) -> list:
    """Ten steps; `signalled` gets a signal at step `at`, and rank 1's loss is bad at step 3."""
    stop = StopRequest()
    flags = Flags(stop, CPU)
    answers = []
    for step in range(10):
        if (world.rank, step) == (signalled, at):
            os.kill(os.getpid(), number)
        loss = torch.tensor(float("nan") if (world.rank, step) == (1, 3) else 1.0 + world.rank)
        found = flags.exchange(step, torch.tensor(True), loss)
        answer = flags.read()
        assert answer is not None
        answers.append([step, float(found), answer.bad, answer.own, answer.loss])
        if stop.follow(answer.reason):
            break
    stop.close()
    return [stop.agreed, answers]


@pytest.mark.parametrize(
    ("number", "signalled", "reason"),
    [
        (signal.SIGUSR2, 1, "preempted"),
        (signal.SIGTERM, 0, "preempted"),
        (signal.SIGINT, 1, "interrupt"),
    ],
)
def test_all_ranks_stop_at_the_step_at_which_one_was_signalled(number, signalled, reason):
    (first, one), (second, other) = on_ranks(2, _run, signalled, int(number), 5)
    assert first == second == reason
    assert [a[0] for a in one] == [a[0] for a in other] == list(range(6))
    assert [a[1] for a in one] == [a[1] for a in other] == [0, 0, 0, 1, 0, 0]
    assert [a[4] for a in one] == [1.5, 1.5, 1.5, 1.0, 1.5, 1.5] == [a[4] for a in other]
    assert [a[3] for a in one] == [False] * 6
    assert [a[3] for a in other] == [step == 3 for step in range(6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_answers_come_one_step_late_and_without_a_synchronisation():
    device = torch.device("cuda")
    flags = Flags(StopRequest(), device)
    good = torch.tensor(True, device=device)
    losses = [torch.tensor(float(n), device=device) for n in range(8)]
    losses[4] *= float("nan")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [flags.exchange(step, good, loss) for step, loss in enumerate(losses[:2])]
        answers = [flags.read()]
        for step, loss in enumerate(losses[2:], 2):
            found.append(flags.exchange(step, good, loss))
            answers.append(flags.read())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    answers += flags.drain()
    steps = [answer.step for answer in answers if answer is not None]
    assert steps == list(range(8))
    assert [a.bad for a in answers if a] == [n == 4 for n in range(8)]
    assert [float(f) for f in found] == [float(n == 4) for n in range(8)]
