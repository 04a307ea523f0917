"""Does a run survive what can happen to it? The fault matrix, each row with its count.

    python benchmarks/faults.py [--quick] [--rows 1,6,9] [--out FOLDER]

Every row puts faults into small real runs (two gloo ranks where ranks matter) and counts how often
what must hold did. `--quick` is a few trials of the rows that take seconds, for CI. The figures go
to faults.json in the folder named by --out.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_rows as rows
from fault_runs import ROOT, Place, in_child

from selfsight.config import ConfigError, check

CANARY = "canary-5f1c0e97"


@dataclass(frozen=True)
class Fault:
    """One row: what is done, how often in full and in the quick form (0: not then)."""

    number: int
    name: str
    test: Callable[[Place, int], rows.Row]
    trials: int
    quick: int = 0


# -------------------------------------------------------------------------- rows 19, 20 and 21


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _load_poisoned(folder: Path) -> None:
    from selfsight.distributed import checkpoint

    try:
        found = checkpoint.latest(folder)
        if found is not None:
            checkpoint.load(found)
    except Exception:
        os._exit(1)


def poisoned_checkpoints(place: Place, trials: int) -> rows.Row:
    """A pickle that runs code, in place of or beside each file of a checkpoint."""
    import pickle

    import torch

    from selfsight.distributed import checkpoint

    held = 0
    for n in range(trials):
        folder, hit = place.folder / f"poisoned{n}", place.folder / f"code-ran{n}"
        for step in (1, 2):
            checkpoint.save(folder, step, {"a": torch.ones(5)}, {}, config_hash="")
        newest = folder / "step_00000002"
        names = [*(path.name for path in sorted(newest.iterdir())), ".metadata", "__0_0.distcp"]
        target = newest / names[n % len(names)]
        target.write_bytes(pickle.dumps(_Bomb(str(hit)), protocol=n % 6))
        status = in_child(_load_poisoned, folder)
        held += status == 0 and not hit.exists()
    return held, trials, "checkpoints passed over or read without running anything"


def _bad_configurations(folder: Path) -> list[list[str]]:
    bombs = "[" + ",".join(["x"] * 9) + "]"
    targets = ["os.system", "torch.load", "torch.hub.load", "numpy.load", "subprocess.run",
               "builtins.eval", "torch.utils.cpp_extension.load_inline", "hydra.utils.instantiate",
               "selfsight.distributed.env.join"]  # fmt: skip
    cases = [[f"model.trunk._target_={target}"] for target in targets]
    cases += [[f"data.train._target_={target}"] for target in targets[:5]]
    cases += [[f"name={name}"] for name in ("../up", "/etc/passwd", "a/b", "..", ".")]
    cases += [["batchsize=8"], ["checkpoint.evry=3"], ["batch_size=many"], ["precision=fp8"]]
    cases += [["model.trunk.depht=3"], ["optim.lr=3"], ["batch_size=-4"], ["device=tpu"]]
    cases += [["cluster.kind=kubernetes"], ["views.global.sise=3"], [f"method.prototypes={bombs}"]]
    return cases


def refused_configurations(place: Place, trials: int) -> rows.Row:
    """Targets outside the allow-list, paths in names, unknown keys: a sentence within a second."""
    from selfsight.build import compose

    cases = _bad_configurations(place.folder)[:trials]
    compose("pretrain", [])  # what is imported once
    held, slowest = 0, 0.0
    for overrides in cases:
        start = time.process_time()
        try:
            check(compose("pretrain", overrides))
        except ConfigError as error:
            took = time.process_time() - start
            slowest = max(slowest, took)
            held += took <= 1.0 and "\n" not in str(error)
        else:
            print(f"   accepted: {overrides}", file=sys.stderr)
    return held, len(cases), f"configurations refused; slowest {slowest:.2f} s of CPU"


def secrets(place: Place, trials: int) -> rows.Row:
    """Keys in the environment are in no file that a run leaves and in nothing that it says."""
    held = 0
    keys = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD")
    os.environ.update({key: CANARY for key in keys})
    try:
        for n in range(trials):
            reference = ["", "tracking.wandb_project=${oc.env:WANDB_API_KEY}",
                         "+data.note=${oc.env:HF_TOKEN}"][n % 3]  # fmt: skip
            more = [reference] if reference else []
            ended = place.run(f"secret{n}", "steps=2", "tracking.wandb=off", *more, size=1)
            files = [p for p in (place.folder / "runs").rglob("*") if p.is_file()]
            leaks = [str(p) for p in files if CANARY.encode() in p.read_bytes()]
            leaks += ["console"] * (CANARY in ended.text)
            held += not leaks
            for leak in leaks:
                print(f"   the key is in {leak}", file=sys.stderr)
    finally:
        for key in keys:
            os.environ.pop(key)
    return held, trials, "runs that left no trace of the keys"


# ---------------------------------------------------------------------------------------- main

MATRIX = (
    Fault(1, "kill -9, any rank, any place", rows.killed_anywhere, 50, 1),
    Fault(2, "kill -9 in an asynchronous save", rows.killed_while_saving, 50, 3),
    Fault(3, "disk full", rows.disk_full, 20, 1),
    Fault(4, "newest checkpoint altered", rows.altered, 200, 12),
    Fault(5, "kill -9 in rotation", rows.retention, 100, 3),
    Fault(6, "preemption", rows.preempted, 30, 1),
    Fault(7, "hang", rows.hangs, 20, 1),
    Fault(8, "start-up", rows.bad_starts, 6),
    Fault(9, "numbers that are not finite", rows.bad_numbers, 13, 1),
    Fault(10, "loss spike", rows.spikes, 10),
    Fault(11, "loss scaler", rows.scaler, 10),
    Fault(12, "loader process", rows.workers, 20),
    Fault(13, "resume position", rows.positions, 12, 2),
    Fault(14, "world size 4, 2, 1, 4", rows.worlds, 2),
    Fault(19, "malicious checkpoint", poisoned_checkpoints, 20, 4),
    Fault(20, "configuration", refused_configurations, 30, 30),
    Fault(21, "secrets", secrets, 3, 1),
)


def main() -> int:
    """Run the rows that were asked for; exit status 1 where one did not hold."""
    parser = argparse.ArgumentParser(description="Does a run survive what can happen to it?")
    parser.add_argument("--quick", action="store_true", help="a few trials, under a minute")
    parser.add_argument("--rows", help="numbers of rows, with commas; all by default")
    parser.add_argument("--trials", type=int, help="of each row, instead of the target")
    parser.add_argument("--out", type=Path, help="folder for faults.json")
    asked = parser.parse_args()
    chosen = {int(n) for n in asked.rows.split(",")} if asked.rows else None
    record: list[dict[str, Any]] = []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for fault in MATRIX:
            trials = asked.trials or (fault.quick if asked.quick else fault.trials)
            if not trials or (chosen and fault.number not in chosen):
                continue
            start = time.monotonic()
            place = rows.prepare(Path(folder) / str(fault.number))
            held, of, remark = fault.test(place, trials)
            seconds = round(time.monotonic() - start, 1)
            mark = "ok  " if held == of else "FAIL"
            print(f"{mark} {fault.number:2}  {fault.name}: {held} of {of} {remark}  ({seconds} s)",
                  flush=True)  # fmt: skip
            record.append({"row": fault.number, "name": fault.name, "held": held, "of": of,
                           "remark": remark, "seconds": seconds})  # fmt: skip
    if asked.out:
        from selfsight.tracking.folder import environment

        asked.out.mkdir(parents=True, exist_ok=True)
        whole = {"quick": asked.quick, "environment": environment(), "rows": record}
        (asked.out / "faults.json").write_text(json.dumps(whole, indent=2) + "\n")
    return int(any(row["held"] != row["of"] for row in record))


if __name__ == "__main__":
    assert platform.system() == "Linux", "the faults are put in by Linux's means"
    assert ROOT.is_dir()
    sys.exit(main())
