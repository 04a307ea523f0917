"""A real SLURM for the tests of this folder, where there are root and apt; skipped elsewhere."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsight.cluster.spec import newest_step, read_json
from tests.runs import ROOT, arguments, pictures

SCRIPT = Path(__file__).with_name("cluster.sh")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "unshare", "nsenter")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DEFINED = 64


class Cluster:
    """SLURM with nodes node1..node64, of which two are started, in a network of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._script("up", str(DEFINED), "2")

    def _script(self, action: str, *words: str) -> None:
        done = subprocess.run(
            [SCRIPT, action, self.folder, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(
            [SCRIPT, "run", self.folder, *command],
            cwd=ROOT,
            env={**_without_slurm(), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def call(self, *command: str) -> str:
        """The output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def launch(self, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`launch/pretrain.py` as on a login node."""
        return self.run(sys.executable, "launch/pretrain.py", *overrides, **environment)

    def submit(self, *overrides: str) -> str:
        """Submit a run; returns the job's id."""
        done = self.launch("cluster=auto", "device=cpu", *overrides)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("submitted job ")[1].split(":")[0]

    def state(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, by its names (JobState, Restarts, ExitCode, NodeList, ...)."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        end = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in states:
            said = Path(state["StdOut"])
            log = said.read_text() if said.is_file() else ""
            assert time.monotonic() < end, f"{state}\n{log}"
            time.sleep(0.3)
        return state

    def wait_for_checkpoint(self, run: Path, after: int = 0, seconds: float = 300) -> int:
        """Wait until the run has a checkpoint of a step later than `after`."""
        end = time.monotonic() + seconds
        while (step := newest_step(run)) <= after:
            logs = "".join(p.read_text() for p in (run / "jobs").glob("*.log"))
            assert time.monotonic() < end, logs
            time.sleep(0.05)
        return step

    def ranks(self, job: str) -> list[int]:
        """Process ids of a job's ranks, as this machine knows them."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environ = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = b"selfsight.cluster.entry" in words and words[0].endswith(b"python")
            if ours and f"SELFSIGHT_JOB_ID={job}".encode() in environ:
                found.append(int(folder.name))
        return found

    def kill_node(self, node: str) -> None:
        self._script("kill", node)

    def boot_node(self, node: str) -> None:
        self._script("boot", node)

    def down(self) -> None:
        self._script("down")


def _without_slurm() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}


def _install() -> str | None:
    """Install what is missing; returns why that cannot be, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a SLURM of its own needs Linux and root"
    if all(shutil.which(program, path=PATH) for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return "slurm-wlm is not installed, and there is no apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {words[0]} failed: {done.stderr.strip()[-200:]}"
    return None


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if why := _install():
        pytest.skip(why)
    if subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        pytest.skip("namespaces cannot be made here")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets live in it
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of 24 updates on 2 nodes x 2 processes, without its name."""
    data = pictures(tmp_path_factory.mktemp("pictures"))
    more = ("steps=24", "checkpoint.every=4", "cluster.processes=4", "cluster.timeout_minutes=1")
    words = arguments(data, data.parent, "none", *more)
    return [word for word in words if not word.startswith(("name=", "runs_dir=", "cluster="))]


def summary(run: Path) -> dict[str, object]:
    return read_json(run / "summary.json")
