"""Decisions about bad numbers, the list of bad batches, and the choice of a checkpoint."""

import json
import math
import random

import pytest
import torch

from selfsight.distributed import checkpoint, env
from selfsight.distributed.preempt import Answer
from selfsight.recovery import FILE, SCALE_SEARCH, Guard, choose, record_bad_batch
from tests.parallel.ranks import on_ranks


def answer(step: int, bad: bool = False, loss: float = 1.0, bad_loss: bool = False) -> Answer:
    return Answer(step, bad or bad_loss, bad_loss, loss, None, bad or bad_loss, [step])


def kinds(guard: Guard, bads: str, first: int = 0) -> list[str]:
    """Decisions over a row of updates: `x` is a bad one, anything else a good one."""
    return [guard.observe(answer(first + n, bad == "x")).kind for n, bad in enumerate(bads)]


def test_so_many_in_a_row_lead_back_and_fewer_do_not():
    guard = Guard(after=3)
    assert set(kinds(guard, "..x.xx.xx.")) == {"go on"}
    assert kinds(guard, ".xxx", 10) == ["go on"] * 3 + ["roll back"]
    assert guard.first == 11


def test_attempts_are_bounded_and_go_further_back():
    guard = Guard(after=2, attempts=2)
    first = [guard.observe(answer(step, True)) for step in (40, 41)][-1]
    assert first.rolls_back and first.before == 40
    guard.rolled_back(35)
    second = [guard.observe(answer(step, True)) for step in (36, 37)][-1]
    assert second.rolls_back and second.before == 34
    guard.rolled_back(30)
    last = [guard.observe(answer(step, True)) for step in (30, 31)][-1]
    assert last.stops
    assert "2 updates in a row" in last.text and "going back 2 times" in last.text
    assert "precision=bf16" in last.text


def test_no_attempts_end_at_once():
    guard = Guard(after=1, attempts=0)
    assert guard.observe(answer(3, True)).stops


def test_good_updates_wipe_attempts_out():
    guard = Guard(after=1, attempts=1, forgiven=10)
    assert guard.observe(answer(5, True)).rolls_back
    guard.rolled_back(4)
    kinds(guard, "." * 10, 4)
    assert guard.observe(answer(14, True)).rolls_back


def test_a_loss_scaler_may_search_but_not_for_ever():
    guard = Guard(after=3, scaling=True)
    assert set(kinds(guard, "x" * SCALE_SEARCH)) == {"go on"}
    assert kinds(guard, "xxx", SCALE_SEARCH) == ["go on", "go on", "roll back"]
    guard = Guard(after=3, scaling=True)
    decisions = [guard.observe(answer(n, bad_loss=True)).kind for n in range(3)]
    assert decisions == ["go on", "go on", "roll back"]  # not the scaler's doing


def test_spikes_are_told_from_noise_and_from_a_falling_loss():
    noise = random.Random(0)
    guard = Guard(after=3, spike=8.0)
    for step in range(600):
        loss = 9 * math.exp(-step / 200) + 0.1 * noise.gauss(0, 1) + 2
        assert guard.observe(answer(step, loss=loss)).kind == "go on"
        assert not guard.streak, step
    decisions = [guard.observe(answer(600 + n, loss=20.0)) for n in range(3)]
    assert [d.kind for d in decisions] == ["go on", "go on", "roll back"]
    assert decisions[-1].before == 600 and "far above" in decisions[-1].text
    assert len(guard.losses) == 128 and max(guard.losses) < 5
    assert Guard().observe(answer(0, loss=1e9)).kind == "go on"  # by option only


def test_its_state_is_plain_and_whole():
    row = [answer(n, bad=n % 7 == 0, loss=2 + n % 5) for n in range(60)]
    row += [answer(60 + n, loss=1e6) for n in range(6)]
    whole = Guard(after=4, spike=6.0)
    decisions = [whole.observe(a).kind for a in row]
    assert decisions[-3] == "roll back"
    for cut in (0, 20, 61, 63):
        before, after = Guard(after=4, spike=6.0), Guard(after=4, spike=6.0)
        for a in row[:cut]:
            before.observe(a)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [after.observe(a).kind for a in row[cut:]] == decisions[cut:]
        assert after.state_dict() == whole.state_dict()


def _record(world: env.World, folder) -> None:
    own = world.rank == 1
    note = torch.arange(3) + 10 * world.rank
    bad = Answer(4, True, False, 1.0, None, own, note)
    record_bad_batch(folder, bad, "a kind")
    record_bad_batch(folder, bad, "a kind", names=lambda ps: [f"p{p}.jpg" for p in ps])
    record_bad_batch(folder, bad, "a kind")  # met again after a resume
    spiked = Answer(5, False, False, 9.0, None, False, note)
    record_bad_batch(folder, spiked, "a spike")


def test_bad_batches_are_listed_with_the_ranks_samples(tmp_path):
    on_ranks(2, _record, tmp_path)
    plain, named, spiked = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    assert plain == {"step": 4, "kind": "a kind", "ranks": [1], "positions": [10, 11, 12]}
    assert named == plain | {"samples": ["p10.jpg", "p11.jpg", "p12.jpg"]}
    assert spiked["ranks"] == [] and spiked["positions"] == [0, 1, 2, 10, 11, 12]


def test_a_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "ki')
    record_bad_batch(tmp_path, answer(4, True), "a kind")
    assert json.loads((tmp_path / FILE).read_text().splitlines()[1])["step"] == 4


@pytest.mark.parametrize(
    ("before", "damaged", "chosen"),
    [(100, [], 30), (30, [], 30), (29, [], 20), (29, [20], 10), (5, [], 10), (5, [10, 20, 30], 0)],
)
def test_the_choice_of_a_checkpoint(tmp_path, before, damaged, chosen):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)}, {}, config_hash="", keep=9)
    for step in damaged:
        (path,) = (tmp_path / f"step_{step:08d}").glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
    notices: list[str] = []
    found = choose(tmp_path, before, notices.append)
    assert found == (tmp_path / f"step_{chosen:08d}" if chosen else None)
    assert len(notices) == len(damaged)
