"""What a user gets wrong after composition: one sentence, exit status 2, nothing written over."""

from pathlib import Path

import pytest

from tests.runs import arguments, checksums, pictures, run_command, run_here


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


def refused(overrides: list[str]) -> str:
    """The one sentence a run is refused with."""
    with pytest.raises(ValueError) as error:
        run_here(overrides)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_missing_empty_and_pictureless_folders(tmp_path):
    gone, empty, texts = tmp_path / "gone", tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    (texts / "a.txt").write_text("no picture")
    for folder in (gone, empty, texts):
        said = refused(arguments(folder, tmp_path / "runs", f"to-{folder.name}"))
        assert str(folder) in said
    assert not (tmp_path / "runs").exists()  # nothing is left behind by a start that failed
    summary = run_here(arguments(pictures(gone), tmp_path / "runs", "to-gone", "steps=2"))
    assert summary["status"] == "complete"


def test_no_folder_no_shards_no_set(tmp_path):
    for data, key in (
        ("folder", "data.path"),
        ("uncurated_stream", "data.shards"),
        ("packed_npz", "data.path"),
        ("cifar10", "data.root"),
    ):
        command = [a for a in arguments(tmp_path, tmp_path / "runs", data) if "data." not in a]
        said = refused([f"data={data}" if a == "data=folder" else a for a in command])
        assert key in said, said


def test_pictures_that_cannot_be_read_are_listed_and_the_run_goes_on(tmp_path):
    folder = pictures(tmp_path / "some")
    (folder / "class0" / "torn.png").write_bytes((folder / "class0" / "00.png").read_bytes()[:200])
    (folder / "class1" / "text.jpg").write_text("<html>not here</html>")
    summary = run_here(arguments(folder, tmp_path / "runs", "some"))
    assert summary["status"] == "complete"
    ledger = (tmp_path / "runs" / "some" / "ledger.jsonl").read_text()
    assert "torn.png" in ledger and "text.jpg" in ledger


def test_only_pictures_that_cannot_be_read(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"no picture at all")
    assert "bad" in refused(arguments(folder, tmp_path / "runs", "bad"))


def test_batches_that_do_not_divide(data, tmp_path):
    said = refused(arguments(data, tmp_path, "three", "cluster.processes=3"))
    assert "batch_size=8" in said and "3 processes" in said
    said = refused(arguments(data, tmp_path, "five", "images_per_device=5"))
    assert "images_per_device=5" in said


def test_a_device_that_is_not_here(data, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "device=cuda is not on this machine" in refused(
        arguments(data, tmp_path, "gpu", "device=cuda")
    )


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(data, tmp_path):
    said = refused(
        arguments(
            data, tmp_path, "huge", "model=regnety_10b", "batch_size=8", "images_per_device=8"
        )
    )
    assert "needs 115.5 GB" in said


def test_a_head_for_another_trunk(data, tmp_path):
    said = refused(arguments(data, tmp_path, "head", "model.head.widths=[99,16]"))
    assert "99 channels" in said and "model.head.widths" in said


def test_a_run_is_not_continued_with_another_configuration(data, tmp_path):
    run_here(arguments(data, tmp_path, "first", "steps=4"))
    before = checksums(tmp_path / "first", 4)
    said = refused(arguments(data, tmp_path, "first", "steps=6", "method.temperature=0.2"))
    assert "method.temperature=0.1" in said and "0.2" in said and "name=" in said
    other = "model.trunk.se_ratio=0.5"
    said = refused(arguments(data, tmp_path, "first", "steps=6", other))
    assert "model.trunk" in said
    said = refused(arguments(data, tmp_path, "first", "steps=6", "method.prototypes=[50]",
                             "resume=anyway"))  # fmt: skip
    assert "another model" in said and "prototypes" in said
    assert checksums(tmp_path / "first", 4) == before
    assert run_here(arguments(data, tmp_path, "first", "steps=6"))["step"] == 6


def test_a_complete_run_is_left_alone(data, tmp_path):
    first = run_here(arguments(data, tmp_path, "done", "steps=4"))
    assert run_here(arguments(data, tmp_path, "done", "steps=4")) == first


def test_a_folder_that_is_not_a_runs_is_not_touched(data, tmp_path):
    place = tmp_path / "letters"
    place.mkdir()
    (place / "letter.txt").write_text("dear")
    assert "not the folder of a run" in refused(arguments(data, tmp_path, "letters"))
    assert [p.name for p in place.iterdir()] == ["letter.txt"]


def test_an_altered_checkpoint_is_passed_over(data, tmp_path, capsys):
    more = ["steps=6", "checkpoint.every=2"]
    run_here(arguments(data, tmp_path, "flip", *more))
    payload = next((tmp_path / "flip" / "checkpoints" / "step_00000006").glob("*.safetensors"))
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 1
    payload.write_bytes(content)
    run_here(arguments(data, tmp_path, "flip", *more))
    said = capsys.readouterr().err
    assert payload.name in said and "passed over" in said
    assert "after step 4" in said


def test_the_command_prints_one_sentence_and_exits_with_2(tmp_path):
    status, out, said = run_command(arguments(tmp_path / "gone", tmp_path, "gone"))
    assert status == 2
    assert out == ""
    assert said.count("\n") == 1 and said.startswith("selfsight: ") and "gone" in said


def test_two_ranks_say_it_once(tmp_path):
    status, _, said = run_command(
        arguments(tmp_path / "gone", tmp_path, "gone", "cluster.processes=2")
    )
    assert status == 2
    assert said.count("selfsight: ") == 1 and "Traceback" not in said
