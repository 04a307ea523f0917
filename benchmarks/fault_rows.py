"""Rows 1 to 14 of the fault matrix: each is a function (place, trials) -> (held, of, remark)."""

import signal
import statistics
from pathlib import Path
from typing import Any

from fault_runs import SITES, WRITES, Place, in_child, inject, intact

from tests.runs import pictures

Row = tuple[int, int, str]
LENGTH = ["steps=8", "checkpoint.every=2"]
HANG_SECONDS = 2.0
TIMEOUTS = [f"timeouts.step={HANG_SECONDS}", "timeouts.save=3", "timeouts.evaluation=3"]
SLACK = 5.0


def killed_anywhere(place: Place, trials: int) -> Row:
    """kill -9 of any rank at any place; the run started again ends with the same bits."""
    place.finish("whole", *LENGTH)
    whole = place.sums("whole", 8)
    held = 0
    for n in range(trials):
        name, draw = f"killed{n}", place.random
        site = (*SITES, *WRITES)[n % 6] if trials >= 6 else draw.choice((*SITES, *WRITES))
        step = draw.randrange(1, 8) if site in SITES else draw.randrange(1, 6)
        rank = draw.randrange(2) if site in SITES else 0
        fault = {"kind": "kill", "site": site, "step": step, "rank": rank}
        ended = place.run(name, *LENGTH, fault=fault)
        killed = ended.struck and -signal.SIGKILL in ended.statuses
        place.finish(name, *LENGTH)
        held += killed and place.sums(name, 8) == whole
    return held, trials, "runs with the bits of the undisturbed one"


def _save(folder: Path, first: int, last: int, fault: dict[str, Any] | None) -> None:
    import torch

    from selfsight.distributed.async_save import Saver
    from selfsight.distributed.env import World

    if fault:
        inject(fault, 0)
    saver = Saver(folder, World(), keep=2)
    for step in range(first, last):
        tensors = {"a": torch.full((50_000,), float(step)), "b": torch.arange(step + 10)}
        saver.save(step, tensors, {"step": step}, config_hash="", wait=step % 2 == 0)
    saver.finish()


def killed_while_saving(place: Place, trials: int) -> Row:
    """kill -9 in an asynchronous save, after the copy and before or at its rename."""
    held = 0
    for n in range(trials):
        folder = place.folder / f"saves{n}"
        assert in_child(_save, folder, 1, 3, None) == 0
        site = WRITES[n % 3]
        fault = {"kind": "kill", "site": site, "step": place.random.randrange(1, 6),
                 "once": str(place.folder / f"struck{n}")}  # fmt: skip
        killed = in_child(_save, folder, 3, 5, fault) == -signal.SIGKILL
        found = intact(folder)
        torn = len(list(folder.glob("step_*"))) - len(found)
        held += killed and torn == 0 and found[-1:] >= [2]
    return held, trials, "folders whose every named checkpoint is intact"


def disk_full(place: Place, trials: int) -> Row:
    """The file size limit stops a checkpoint in the middle: training goes on, told once."""
    held = 0
    for n in range(trials):
        at = 2 + n % 4
        fault = {"kind": "full", "site": "forward", "step": at, "rank": 0, "bytes": 60_000}
        more = ["steps=8", "checkpoint.every=1"]
        ended = place.run(f"full{n}", *more, size=1, fault=fault)
        left = list(place.checkpoints(f"full{n}").glob(".*"))
        alarms = ended.text.count("was not written")
        saved = place.steps(f"full{n}")
        right = ended.statuses == [0] and saved[-1:] == [8] and alarms == 1 and not left
        held += right
        if not right:
            print(f"   limit at {at}: {ended.statuses} {saved=} {alarms=} {left=}\n{ended.text}")
    return held, trials, "runs that went on, with one alarm and no partial files"


def altered(place: Place, trials: int) -> Row:
    """Truncation, a flipped bit, or deletion of each file of the newest checkpoint."""
    from selfsight.distributed import checkpoint

    place.finish("altered", *LENGTH)
    folder = place.checkpoints("altered")
    newest, former = (folder / f"step_{step:08d}" for step in (8, 6))
    files = sorted(path for path in newest.iterdir())
    held = 0
    for n in range(trials):
        path = files[n % len(files)]
        whole = path.read_bytes()
        at = place.random.randrange(len(whole))
        kind = n // len(files) % 3
        if kind == 0:
            path.write_bytes(whole[:at])
        elif kind == 1:
            bit = 1 << place.random.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        else:
            path.unlink()
        notices: list[str] = []
        chosen = checkpoint.latest(folder, notice=notices.append)
        held += chosen == former and len(notices) == 1 and path.name in notices[0]
        path.write_bytes(whole)
    assert checkpoint.latest(folder) == newest
    return held, trials, "mutations noticed, the file named, the one before used"


def retention(place: Place, trials: int) -> Row:
    """kill -9 while old checkpoints are deleted: two intact ones are always left."""
    held = 0
    for n in range(trials):
        folder = place.folder / f"kept{n}"
        assert in_child(_save, folder, 1, 4, None) == 0
        fault = {"kind": "kill", "site": "rename", "step": place.random.randrange(1, 9),
                 "once": str(place.folder / f"kept-struck{n}")}  # fmt: skip
        killed = in_child(_save, folder, 4, 8, fault) == -signal.SIGKILL
        held += killed and len(intact(folder)) >= 2
    return held, trials, "folders with two intact checkpoints or more"


def preempted(place: Place, trials: int) -> Row:
    """USR2 (once, twice, in a save) or TERM to one rank: all save the same step and leave."""
    place.finish("calm", *LENGTH)
    whole = place.sums("calm", 8)
    held = 0
    for n in range(trials):
        draw = place.random
        signals = [[signal.SIGUSR2], [signal.SIGUSR2] * 2, [signal.SIGTERM]][n % 3]
        in_save = n % 5 == 4
        step = draw.randrange(1, 4) if in_save else draw.randrange(1, 6)
        fault = {"kind": "signal", "site": "write" if in_save else draw.choice(SITES),
                 "step": step, "rank": 0 if in_save else draw.randrange(2),
                 "signals": [int(s) for s in signals]}  # fmt: skip
        ended = place.run(f"preempted{n}", *LENGTH, fault=fault)
        saved = place.steps(f"preempted{n}")
        right = ended.statuses == [75, 75]
        if not in_save:
            right = right and saved[-1] in (step + 1, step + 2)  # seen before or after its flags
        place.finish(f"preempted{n}", *LENGTH)
        held += right and place.sums(f"preempted{n}", 8) == whole
    return held, trials, "runs that saved at the next boundary and went on bitwise"


def hangs(place: Place, trials: int) -> Row:
    """A stopped rank, or one that leaves a collective out: the others exit and name it."""
    held, slowest = 0, 0.0
    for n in range(trials):
        rank = n % 2
        kind = ("stop", "skip")[n // 2 % 2]
        fault = {"kind": kind, "site": SITES[n % 3] if kind == "stop" else "backward",
                 "step": place.random.randrange(2, 6), "rank": rank}  # fmt: skip
        ended = place.run(f"hang{n}", *LENGTH, *TIMEOUTS, fault=fault)
        others = [s for r, s in enumerate(ended.statuses) if r != rank]
        took = max(t for r, t in enumerate(ended.after_fault) if r != rank)
        named = f"missing: rank {rank} " in ended.text
        held += all(others) and named and took < HANG_SECONDS + SLACK
        slowest = max(slowest, took)
    return held, trials, f"hangs ended with the rank named; slowest {slowest:.1f} s"


def bad_starts(place: Place, trials: int) -> Row:
    """Another configuration on one rank; a rank that never comes."""
    held = 0
    for n in range(trials):
        rank = n % 3 if n % 2 == 0 else 1 + n % 2
        kind = ("another configuration", "absent")[n % 2]
        fault = {"kind": kind, "rank": rank, "timeout": 8}
        ended = place.run(
            f"start{n}", *LENGTH, "batch_size=12", "method.queue_length=24", size=3, fault=fault
        )
        codes = [s for r, s in enumerate(ended.statuses) if kind != "absent" or r != rank]
        held += all(codes) and f"rank {rank}" in ended.text and not place.steps(f"start{n}")
    return held, trials, "starts refused before step 1, the rank named"


def bad_numbers(place: Place, trials: int) -> Row:
    """NaN and infinity in twelve places, on one rank: no rank makes that update."""
    nan, inf = float("nan"), float("inf")
    sites = [("forward", "loss", v) for v in (nan, inf, -inf)]
    sites += [("backward", "gradient", v) for v in (nan, inf, -inf)]
    sites += [("forward", "trunk", nan), ("forward", "trunk", inf), ("forward", "codes", nan)]
    sites += [("forward", "codes", inf), ("forward", "scores", nan), ("forward", "scores", inf)]
    more = ["steps=6", "checkpoint.every=1", "checkpoint.keep=20"]
    held = 0
    for n, (site, where, value) in enumerate(sites[:trials]):
        fault = {"kind": "spoil", "site": site, "where": where, "value": value, "step": 3,
                 "rank": n % 2, "parameter": 7 * n}  # fmt: skip
        ended = place.run(f"bad{n}", *more, fault=fault)
        before, after = place.tensors(f"bad{n}", 3), place.tensors(f"bad{n}", 4)
        last = place.tensors(f"bad{n}", 6)
        learnt = [k for k in before if k.startswith("optimizer/") or k == "method/queue"]
        learnt += [k for k in before if k.endswith((".weight", ".bias"))]
        same = all(before[k].equal(after[k]) for k in learnt if "prototypes" not in k)
        finite = all(v.isfinite().all() for v in last.values())
        listed = (place.folder / "runs" / f"bad{n}" / "bad_batches.jsonl").exists()
        right = same and bool(finite) and listed and ended.statuses == [0, 0]
        held += right
        if not right:
            odd = [k for k, v in last.items() if not v.isfinite().all()]
            print(f"   {where} {value} at {site}: same={same} listed={listed} not finite: {odd}")
    for n in range(max(0, trials - len(sites))):  # an epsilon at which a plain form overflows
        name = f"epsilon{n}"
        ended = place.run(name, *more, "method.epsilon=0.005")
        held += all(v.isfinite().all() for v in place.tensors(name, 6).values())
    return held, trials, "places from which nothing reached the weights, and the batch was listed"


def spikes(place: Place, trials: int) -> Row:
    """A learning rate far too high for five updates: back, those batches skipped, and on."""
    more = ["steps=60", "checkpoint.every=10", "recovery.spike=8", "recovery.after=2",
            "tracking.log_every=1", "checkpoint.keep=9", "optim=sgd"]  # fmt: skip
    ends = []
    for seed in range(2, 5):
        place.finish(f"calm{seed}", *more, f"seed={seed}", size=1)
        ends.append(_last_losses(place, f"calm{seed}"))
    band = statistics.mean(ends) + 4 * max(statistics.stdev(ends), 0.02)
    held, back = 0, 0
    for n in range(trials):
        fault = {"kind": "lr", "step": 30 + n % 9, "steps": 5, "factor": 1000.0}
        ended = place.run(f"spike{n}", *more, f"seed={n}", size=1, fault=fault)
        went_back = "skipped" in ended.text
        end = _last_losses(place, f"spike{n}")
        back += went_back
        held += ended.statuses == [0] and end < band
        if end >= band or not went_back:
            print(f"   run {n}: {ended.statuses} {went_back=} ended at {end:.3f}, band {band:.3f}")
    return held, trials, f"runs that ended in the baseline's band; {back} of them went back"


def _last_losses(place: Place, name: str) -> float:
    import json

    lines = (place.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    return statistics.mean(losses[-8:])


def scaler(place: Place, trials: int) -> Row:
    """fp16: an overflow on one rank is skipped by all, and the scale survives a kill."""
    more = [*LENGTH, "precision=fp16"]
    fault = {"kind": "spoil", "site": "backward", "where": "gradient", "value": float("inf"),
             "step": 5, "rank": 1, "again": True}  # fmt: skip
    held = 0
    for n in range(trials):
        whole = place.run(f"half{n}", *more, f"seed={n}", fault={**fault, "rank": n % 2})
        first = {**fault, "rank": n % 2}
        place.run(f"half-cut{n}", *more, f"seed={n}", "steps=4", "schedule.lr.steps=8")
        place.run(f"half-cut{n}", *more, f"seed={n}", fault=first)
        same = place.sums(f"half{n}", 8) == place.sums(f"half-cut{n}", 8)
        held += same and whole.statuses == [0, 0]
    return held, trials, "interrupted runs with the bits of whole ones"


def workers(place: Place, trials: int) -> Row:
    """A loader process is killed or stopped: replaced, no sample lost or doubled."""
    place.finish("loaded", *LENGTH, size=1)
    whole = place.sums("loaded", 8)
    held, passed, slowest = 0, 0, 0.0
    for n in range(trials):
        number = (signal.SIGKILL, signal.SIGSTOP)[n % 2]
        fault = {"kind": "worker", "site": SITES[n % 3], "step": 1 + n % 5, "rank": 0,
                 "signals": [int(number)]}  # fmt: skip
        more = ["loader.workers=2", "loader.decode_seconds=3", "loader.fetch_seconds=3"]
        ended = place.run(f"worker{n}", *LENGTH, *more, size=1, fault=fault)
        # a sample at which a process was stopped is passed over, and listed: other bits, rightly
        ledger = place.folder / "runs" / f"worker{n}" / "ledger.jsonl"
        listed = ledger.read_text().count("took more than 3 s") if ledger.exists() else 0
        same = place.sums(f"worker{n}", 8) == whole
        held += ended.statuses == [0] and (same if listed == 0 else listed == 1)
        passed += listed
        slowest = max(slowest, *ended.after_fault)
    remark = f"runs with the same bits, or ({passed}) one sample listed and passed over"
    return held, trials, f"{remark}; slowest end after the fault {slowest:.1f} s"


def positions(place: Place, trials: int) -> Row:
    """Gone on with at any step with other numbers of workers: the same ids and pixels."""
    from selfsight.data.loader import Loader
    from selfsight.data.multicrop import CropGroup, MultiCrop
    from selfsight.data.sources.folder import ImageFolder

    crops = {
        "global": CropGroup(count=2, size=32, scale=(0.3, 1.0)),
        "local": CropGroup(count=2, size=16, scale=(0.1, 0.3)),
    }
    batches = 20

    def take(count: int, workers: int, cursors: Any = None) -> tuple[list[Any], Any]:
        source = ImageFolder(str(place.pictures))
        with Loader(source, MultiCrop(crops), batch_size=8, seed=1, workers=workers,
                    cursors=cursors) as loader:  # fmt: skip
            taken = []
            for _ in range(count):
                batch = next(loader)
                taken.append([batch.positions.clone(), *(view.clone() for view in batch.views)])
            return taken, loader.cursors.clone()

    whole, _ = take(batches + 30, 0)
    held = 0
    for n in range(trials):
        start = place.random.randrange(1, 30)
        _, cursors = take(start, (0, 2, 4)[n % 3])
        later, _ = take(batches, (2, 4, 0)[n % 3], cursors)
        wanted = whole[start : start + batches]
        pairs = [(a, b) for x, y in zip(wanted, later, strict=True)
                 for a, b in zip(x, y, strict=True)]  # fmt: skip
        held += all(a.equal(b) for a, b in pairs)
    return held, trials, f"resumes whose next {batches} batches are bitwise the same"


def worlds(place: Place, trials: int) -> Row:
    """4 -> 2 -> 1 -> 4 ranks: the same samples, weights within 1e-5 of those of 4 ranks."""
    sizes = [4, 2, 1, 4]
    held = total = 0
    slack = 0.0
    for n in range(trials):
        name, keep = f"worlds{n}", ["checkpoint.every=5", "checkpoint.keep=9", f"seed={n}"]
        place.finish(f"{name}-four", "steps=20", *keep, size=4)
        for part, size in enumerate(sizes):
            more = [f"steps={5 * part + 5}", "schedule.lr.steps=20"]
            place.finish(name, *more, *keep, size=size)
        for step in (10, 15, 20):
            one, other = place.tensors(f"{name}-four", step), place.tensors(name, step)
            weights = [k for k in other if k.startswith("method/") and not k.endswith("queue")]
            worst = max(float((one[k].double() - other[k].double()).abs().max()) for k in weights)
            total += 1
            held += one["stream/cursors"].equal(other["stream/cursors"]) and worst < 1e-5
            slack = max(slack, worst)
    return held, total, f"comparisons: same place in the stream, weights within {slack:.1e}"


def prepare(folder: Path) -> Place:
    """A place with pictures."""
    pictures(folder / "pictures")
    return Place(folder)
