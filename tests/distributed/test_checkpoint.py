"""Checkpoints: round trip, and every way of breaking one that needs no cluster."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from selfsight.distributed import checkpoint, checkpoint_folder, payload
from tests.distributed.saves import deadly
from tests.parallel.ranks import PRELOADED

SCALARS = {"lr": 0.1, "best": None, "seen": 12, "done": False, "name": "größe", "log": [1, [2.5]]}


def _state(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}


def _save(folder: Path, step: int, **options) -> Path:
    return checkpoint.save(folder, step, _state(step), SCALARS, config_hash="abc", **options)


def _intact(path: Path) -> bool:
    return checkpoint_folder.quick_problem(path) is None


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = _save(tmp_path / "new" / "checkpoints", 7, world_size=4)
    assert path.name == "step_00000007"
    assert _names(path) == ["manifest.json", "state-00000.safetensors"]
    tensors, manifest = checkpoint.load(path)
    assert all(torch.equal(tensors[name], value) for name, value in _state(7).items())
    assert manifest["scalars"] == SCALARS
    assert (manifest["step"], manifest["world_size"], manifest["config_hash"]) == (7, 4, "abc")
    assert checkpoint.latest(path.parent) == path
    assert checkpoint.verify(path) == manifest


def test_a_loaded_tensor_is_not_the_file(tmp_path):
    path = _save(tmp_path, 1)
    checkpoint.load(path)[0]["weight"].zero_()
    assert torch.equal(checkpoint.load(path)[0]["weight"], _state(1)["weight"])


def test_nothing_to_find(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / "step_x").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(
    ("scalars", "said"),
    [
        ({"a": {1: 2}}, r"key 1 of scalars\.a"),
        ({"a": [0, torch.zeros(1)]}, r"scalars\.a\[1\] is a Tensor"),
        ({"path": Path("x")}, r"scalars\.path is a \w*Path"),
    ],
)
def test_scalars_that_json_would_change_are_refused(tmp_path, scalars, said):
    with pytest.raises(ValueError, match=said):
        checkpoint.save(tmp_path, 1, {}, scalars, config_hash="")
    assert _names(tmp_path) == []


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(0, 60, 10):
        _save(tmp_path, step, keep=2, keep_every=30)
    kept = ["step_00000000", "step_00000030", "step_00000040", "step_00000050"]
    assert _names(tmp_path) == kept


def test_retention_does_not_count_torn_ones(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    (tmp_path / "step_00000003" / checkpoint.payload_name(0)).write_bytes(b"")
    _save(tmp_path, 4, keep=2)
    assert _names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_a_run_wound_back_keeps_what_it_writes(tmp_path):
    for step in (10, 20, 30):
        _save(tmp_path, step, keep=5)
    _save(tmp_path, 11, keep=1)  # never fewer than two up to its own step
    assert _names(tmp_path) == [f"step_000000{step}" for step in (10, 11, 20, 30)]
    assert checkpoint.discard_after(tmp_path, 11) == [20, 30]
    assert _names(tmp_path) == ["step_00000010", "step_00000011"]
    assert checkpoint.discard_after(tmp_path / "absent", 0) == []


def test_one_whose_bytes_were_altered_is_no_reason_to_delete_another(tmp_path):
    """Nothing in the sizes tells: the older ones are read before they are counted on."""
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    checkpoint_folder._verified.clear()  # as in the process that resumes
    file = tmp_path / "step_00000003" / checkpoint.payload_name(0)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    _save(tmp_path, 4, keep=2)
    assert _names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    assert checkpoint.verify(tmp_path / "step_00000002")


def test_a_disk_that_stores_something_else_is_noticed(tmp_path, monkeypatch):
    """The file is altered behind the writer's back, before it is read back."""
    first = _save(tmp_path, 1)

    def write_and_alter(path, tensors, metadata=None):
        written = payload.write_tensors(path, tensors, metadata)
        with path.open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"??")
        return written

    monkeypatch.setattr(checkpoint, "write_tensors", write_and_alter)
    with pytest.raises(checkpoint.CheckpointWriteError, match="does not read as it was written"):
        _save(tmp_path, 2)
    assert _names(tmp_path) == [first.name]


def test_version_1_is_read(tmp_path):
    """One file of whole tensors, and a manifest that says so."""
    path = tmp_path / "step_00000009"
    path.mkdir()
    name = "state-00000.safetensors"
    written = payload.write_tensors(path / name, _state(9))
    manifest = {
        "format": "selfsight checkpoint",
        "version": 1,
        "step": 9,
        "world_size": 1,
        "config_hash": "abc",
        "scalars": SCALARS,
        "files": {name: {"size": written.size, "sha256": written.sha256}},
    }
    (path / "manifest.json").write_bytes(checkpoint_folder.manifest_text(manifest))
    assert checkpoint.latest(tmp_path) == path
    own = {name: torch.zeros_like(tensor) for name, tensor in _state(9).items()}
    assert checkpoint.load_into(own, path)["scalars"] == SCALARS
    tensors, _ = checkpoint.load(path)
    assert all(torch.equal(own[k], v) and torch.equal(tensors[k], v) for k, v in _state(9).items())


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"weight": torch.ones(1000)}, "it has 1 others such as count"),
        ({**_state(1), "bias": torch.ones(1)}, "it lacks 1 tensors such as bias"),
        ({**_state(1), "weight": torch.ones(2)}, r"weight is \(1000,\) there and \(2,\) here"),
    ],
)
def test_another_model_changes_nothing(tmp_path, own, said):
    path = _save(tmp_path, 7)
    before = {name: tensor.clone() for name, tensor in own.items()}
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.load_into(own, path)
    assert all(torch.equal(own[name], before[name]) for name in own)


def test_the_same_step_again(tmp_path):
    _save(tmp_path, 5)
    path = checkpoint.save(tmp_path, 5, _state(6), {}, config_hash="abc")
    assert int(checkpoint.load(path)[0]["count"]) == 6
    assert _names(tmp_path) == ["step_00000005"]


def _mutations(path: Path):
    """Each file of a checkpoint: a bit flipped in places all over it, cut short, longer, gone."""
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for number in range(0, len(data), max(len(data) // 150, 1)):
            changed = bytearray(data)
            changed[number] ^= 1 << number % 8
            yield file, bytes(changed)
        for length in (0, 1, len(data) // 2, len(data) - 1):
            yield file, data[:length]
        yield file, data + b"\0"
        yield file, None


def test_every_alteration_is_named_and_the_one_before_is_used(tmp_path):
    first, second = _save(tmp_path, 1), _save(tmp_path, 2)
    count = 0
    for file, changed in list(_mutations(second)):
        data = file.read_bytes()
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        said: list[str] = []
        assert checkpoint.latest(tmp_path, said.append) == first
        assert len(said) == 1
        assert str(file) in said[0]
        with pytest.raises(checkpoint.CheckpointError, match=file.name):
            checkpoint.load(second)
        file.write_bytes(data)
        count += 1
    assert count > 200
    assert checkpoint.latest(tmp_path) == second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "another"}, "'another'"),
        ({"files": {"../secret": {"size": 0, "sha256": ""}}}, r"'\.\./secret', which lies in"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path, change, said):
    path = _save(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_bytes(checkpoint_folder.manifest_text(manifest | change))
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.load(path)


def _in_a_process(function, *arguments) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        process.join(60)
        assert process.exitcode is not None, "the process did not end"
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _save_and_die(folder: Path, step: int, calls: int) -> None:
    """Save, and be killed just before the call number `calls` that changes the disk."""
    deadly(calls)
    _save(folder, step)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_before_any_change_of_the_disk_loses_nothing(tmp_path, again):
    """`again`: the step that is being saved has a checkpoint already."""
    step = 2 if again else 3
    for calls in range(1, 60):
        folder = tmp_path / str(calls)
        for before in (1, 2):
            _save(folder, before)
        code = _in_a_process(_save_and_die, folder, step, calls)
        path = checkpoint.latest(folder)
        assert path is not None
        tensors, manifest = checkpoint.load(path)
        assert manifest["step"] in (2, step)
        assert torch.equal(tensors["weight"], _state(manifest["step"])["weight"])
        intact = [p for p in checkpoint.checkpoints(folder) if _intact(p)]
        assert len(intact) >= 2
        _save(folder, 4)  # the next save removes what was left
        assert _names(folder) == sorted({f"step_{manifest['step']:08d}", "step_00000004"})
        if code == 0:
            break
        assert code == -signal.SIGKILL
    else:
        pytest.fail("the save never came to its end")
    assert calls > 8


def _fill_the_disk(folder: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    before = _names(folder)
    try:
        checkpoint.save(folder, 3, _state(3, 100_000), {}, config_hash="")
    except checkpoint.CheckpointWriteError as error:
        assert "step 3 was not written" in str(error)
        assert "File too large" in str(error)
        assert _names(folder) == before
        os._exit(7)


@pytest.mark.parametrize("limit", [0, 100, 4096, 399_000])
def test_a_full_disk_leaves_the_earlier_ones(tmp_path, limit):
    _save(tmp_path, 1)
    second = _save(tmp_path, 2)
    assert _in_a_process(_fill_the_disk, tmp_path, limit) == 7
    assert checkpoint.latest(tmp_path) == second


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.CheckpointWriteError, match="step 1 was not written"):
        _save(tmp_path / "file" / "checkpoints", 1)


def test_the_file_a_loaded_tensor_maps_may_go(tmp_path):
    tensors, _ = checkpoint.load(_save(tmp_path, 1))
    shutil.rmtree(tmp_path)
    assert torch.equal(tensors["weight"], _state(1)["weight"])
