import json

from selfsight.data.ledger import Failure, Ledger


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_with_all_fields(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.resume(0)
    assert not path.exists()
    ledger.write([Failure("web", "a/\udce9.jpg", "cut", 3), Failure("web", "b.jpg", "empty", 9)])
    ledger.write([])
    ledger.write([Failure("web", "c.jpg", "cut", 12)])
    lines = read(path)
    assert [line["position"] for line in lines] == [3, 9, 12]
    assert set(lines[0]) == {"time", "source", "key", "reason", "position"}


def test_a_resumed_run_does_not_list_a_position_twice(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).write([Failure("web", str(n), "cut", n) for n in (2, 5, 8)])
    ledger = Ledger(path)
    ledger.resume(4)  # what comes before position 4 is never met again
    ledger.write([Failure("web", str(n), "cut", n) for n in (5, 8, 11)])
    assert [line["position"] for line in read(path)] == [2, 5, 8, 11]


def test_what_is_listed_comes_back_as_events(tmp_path):
    path = tmp_path / "ledger.jsonl"
    failures = [Failure("web", "a", "cut", 1), Failure("web", "s.tar", "gone", 7, turn=2)]
    Ledger(path).write(failures)
    assert Ledger(path).resume(0) == {1: failures[0], 7: failures[1]}
    assert Ledger(path).resume(2) == {7: failures[1]}
    assert "turn" not in read(path)[0] and read(path)[1]["turn"] == 2


def test_a_line_cut_by_a_kill_is_written_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).write([Failure("web", "a", "cut", 1), Failure("web", "b", "cut", 2)])
    path.write_bytes(path.read_bytes()[:-10])
    ledger = Ledger(path)
    ledger.resume(0)
    ledger.write([Failure("web", "a", "cut", 1), Failure("web", "b", "cut", 2)])
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["position"] for line in whole] == [1, 2]
