"""The first process of a SLURM job: starts its ranks, and starts them again.

    python -m selfsight.cluster.supervise JOB.json        (the job script's one command)

SLURM itself runs a job again when a node fails or when it preempts it, and never when a process is
killed, when a rank fails or at the time limit. So: ranks that were told to leave (a warning before
the time limit or a preemption) save, and this process has SLURM queue the job again under the same
id; ranks that fail are started again within the job, at most `restarts` times in a row without a
new checkpoint between them. A mistake of the user's ends it at once.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from selfsight.cluster.spec import (
    EXIT_AGAIN,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Spec,
    job_id,
    newest_step,
    read_json,
    write_json,
)

FIRST_PORT, PORTS = 15_000, 15_000  # below the ports that systems give out by themselves
REQUEUE_SECONDS = 120.0  # SLURM tells a job that it queues again to end within this
TRIES = 1000  # starts within one run of the job, for one number that grows over all starts


class Supervisor:
    """Runs the ranks of one job until they are done, must move, or cannot be helped."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.spec = Spec.read(path)
        self.id = job_id() or "0"
        self.told_to_end = False
        self._ranks: subprocess.Popen[bytes] | None = None
        self._failures = self.spec.jobs / f"{self.id}.failures.json"

    def run(self) -> int:
        """Returns the exit status of the job."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._pass_on)
        requeues = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        for attempt in range(TRIES):
            restart = requeues * TRIES + attempt
            code = self._start(restart)
            status = read_json(self._result(restart)).get("status")
            if status in ("complete", "stopped"):
                return 0
            if status == "user error":
                return EXIT_USER_ERROR
            if status == "interrupted":
                return EXIT_INTERRUPTED
            if status == "preempted":
                if self._requeue() or self.told_to_end:
                    return EXIT_AGAIN
            elif self._ends() or not self._may_try_again(code):
                return EXIT_FAILURE
        return EXIT_FAILURE

    def _start(self, restart: int) -> int:
        """Run all ranks once; returns the exit status of srun."""
        spec = self.spec
        interpreter = [sys.executable, "-P", "-u", "-m", "selfsight.cluster.entry"]
        # until Python can note them, USR2 and TERM must not end a rank
        shielded = ["sh", "-c", 'trap "" USR2 TERM; exec "$@"', "rank"]
        host, port = self._meeting_point(restart)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(spec.code) / "ssl"),
            "SELFSIGHT_JOB_ID": self.id,
            "SELFSIGHT_RESTART": str(restart),
            "SELFSIGHT_CODE": spec.code_hash,
            "SELFSIGHT_COMMIT": spec.commit or "",
            "SELFSIGHT_MEET": f"tcp://{host}:{port}",
        }
        command = ["srun", *spec.srun, *shielded, *interpreter, self.path]
        self._ranks = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        return self._ranks.wait()

    def _meeting_point(self, restart: int) -> tuple[str, int]:
        """Host and port where the ranks meet: this machine, which is rank 0's; a port that follows
        from the job, or the next free one."""
        spec = self.spec
        host = "127.0.0.1" if spec.processes == spec.per_node else socket.gethostname()
        digits = "".join(c for c in self.id if c.isdigit())
        port = FIRST_PORT + (int(digits) * 17 + restart) % PORTS
        for _ in range(PORTS):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
                return host, port
            port = FIRST_PORT + (port + 1 - FIRST_PORT) % PORTS
        return host, port

    def _may_try_again(self, code: int) -> bool:
        step, before = newest_step(self.spec.folder), read_json(self._failures)
        failures = 1 if step > before.get("step", -2) else before["failures"] + 1
        write_json(self._failures, {"step": step, "failures": failures})
        again = failures <= self.spec.restarts
        where = f"after step {step}" if step >= 0 else "before the first checkpoint"
        self._say(
            f"a rank failed or was killed {where} (srun ended with {code}); "
            f"failure {failures} in a row without a new checkpoint: "
            + ("starting again" if again else f"giving up (cluster.restarts={self.spec.restarts})")
        )
        return again

    def _ends(self) -> bool:
        """Whether SLURM is ending the job: told so, or a node of it is gone."""
        return self.told_to_end or self._state() != "RUNNING"

    def _requeue(self) -> bool:
        """Have SLURM queue this job again; False where it will not, or does so by itself."""
        if self._state() != "RUNNING":  # it is being ended, or queued again from outside
            return True
        self._say("saved; queueing the job again")
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
        if done.returncode:
            self._say(f"SLURM does not queue it again ({done.stderr.strip()}); going on here")
            return False
        end = time.monotonic() + REQUEUE_SECONDS
        while not self.told_to_end and time.monotonic() < end:
            time.sleep(0.1)
        return True

    def _state(self) -> str:
        command = ["scontrol", "--oneliner", "show", "job", self.id]
        words = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return next((w.split("=")[1] for w in words if w.startswith("JobState=")), "RUNNING")

    def _result(self, restart: int) -> Path:
        return self.spec.jobs / f"{self.id}.{restart}.json"

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """SLURM sends TERM to the ranks as well; other signals came to this process alone."""
        if number == signal.SIGTERM:
            self.told_to_end = True
        elif self._ranks is not None:
            with contextlib.suppress(ProcessLookupError):
                self._ranks.send_signal(number)

    def _say(self, text: str) -> None:
        print(f"selfsight: job {self.id}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(Supervisor(sys.argv[1]).run())
