"""The log of records: lines that are written beside the loop, files that follow each other, and what the next start reads."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.front import records_of
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.observe.ledger import IdBook
from sglang_dynasor.observe.line import LINE_HELP, settings_of
from sglang_dynasor.observe.log import MOST_UNWRITTEN, NUM_OLDER, RecordLog
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field


def record(program: str, **keys: Any) -> dict[str, Any]:
    return {"id": program, "at": 1.0, "record": {"program": program, **keys}}


def test_what_is_logged_is_read_at_the_next_start(tmp_path: Path) -> None:
    """But for a line that was cut off, and what is no record."""
    log = RecordLog(tmp_path / "log")
    assert log.newest(10) == []
    for i in range(5):
        log.write(record(str(i)))
    log.flush()
    with log.path.open("a") as file:
        file.write('[1]\n{"record": 3}\n{"id": "5", "rec')
    assert [line["id"] for line in RecordLog(log.path).newest(100)] == list("01234")
    assert [line["id"] for line in RecordLog(log.path).newest(4)] == list("1234")  # what is no line does not count
    assert (log.num_written, log.num_lost) == (5, 0)


def test_of_a_long_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server with years of records starts as soon as one without; nothing of what has no end."""
    log = RecordLog(tmp_path / "log")
    for i in range(50):
        log.write(record(str(i)))
    log.flush()
    size = log.path.stat().st_size
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_READ_BYTES", size // 5 + 10)
    assert [line["id"] for line in log.newest(100)] == [str(i) for i in range(40, 50)]
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_READ_BYTES", 10 * size)
    with log.path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert len(log.newest(100)) == 50
    assert RecordLog(Path("/dev/zero")).newest(100) == []


def test_a_file_full_of_nothing_is_not_searched(tmp_path: Path) -> None:
    """Nobody waits for it at the start."""
    (tmp_path / "log").write_bytes(json.dumps(record("a")).encode() + b"\n" * (1 << 22))
    started = time.process_time()
    assert RecordLog(tmp_path / "log").newest(100) == []
    assert time.process_time() - started < 2


def test_nothing_is_logged_while_it_is_off(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "log")
    log.is_on = False
    log.write(record("a"))
    assert not log.path.exists()


def test_a_full_disk_is_counted_and_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full says ENOSPC; said once."""
    log = RecordLog(Path("/dev/full"))
    started = time.perf_counter()
    for i in range(100):
        log.write(record(str(i)))
    assert time.perf_counter() - started < 30
    log.flush()
    assert (log.num_written, log.num_lost) == (0, 100)
    assert caplog.text.count("could not be written") == 1


def test_more_than_the_disk_takes_is_lost_and_counted(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "log")
    log._thread = object()  # type: ignore[assignment]  # nobody writes
    for i in range(MOST_UNWRITTEN + 3):
        log.write(record(str(i)))
    assert log.num_lost == 3


def test_a_log_that_cannot_be_there_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        DynasorConfig("dynasor", dynasor_log="/nowhere/at/all")
    DynasorConfig("dynasor", dynasor_log="here.jsonl")


# A line that was cut


def test_a_cut_line_takes_no_other_with_it(tmp_path: Path) -> None:
    """By a crash: what is written next stands on a line of its own."""
    log = RecordLog(tmp_path / "log")
    log.path.write_text(json.dumps(record("a")) + '\n{"id": "b", "rec')
    log.write(record("c"))
    log.write(record("d"))
    log.flush()
    assert [line["id"] for line in log.newest(10)] == ["a", "c", "d"]
    assert log.path.read_text().count("\n") == 4
    whole = RecordLog(tmp_path / "log")  # of a file that ends as it should, nothing is added
    whole.write(record("e"))
    whole.flush()
    assert log.path.read_text().count("\n") == 5


def test_a_line_that_a_full_disk_cut_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of it never comes; the next, once there is room, is read."""
    log = RecordLog(tmp_path / "log")
    log.write(record("a"))
    log.flush()
    append_to = RecordLog._append_to

    def cut(self: RecordLog, file: Any, line: bytes, size: int) -> None:
        append_to(self, file, line[: len(line) // 2], size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordLog, "_append_to", cut)
    log.write(record("b"))
    log.flush()
    monkeypatch.undo()
    log.write(record("c"))
    log.flush()
    assert [line["id"] for line in log.newest(10)] == ["a", "c"]
    assert (log.num_written, log.num_lost) == (2, 1)


# Files that follow each other


def test_a_file_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines, the newest in FILE, some older files kept; the start reads over the boundary, oldest first."""
    size = len(json.dumps(record("00"))) + 1
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_FILE_BYTES", 3 * size + 1)
    log = RecordLog(tmp_path / "log")
    for i in range(10, 30):
        log.write(record(str(i)))
    log.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", *(f"log.{i}" for i in range(1, NUM_OLDER + 1))]
    assert (log.num_written, log.num_lost) == (20, 0)
    assert [json.loads(line)["id"] for line in (tmp_path / "log").read_text().splitlines()] == ["28", "29"]
    assert [line["id"] for line in RecordLog(log.path).newest(8)] == [str(i) for i in range(22, 30)]
    assert [line["id"] for line in RecordLog(log.path).newest(10_000)] == [str(i) for i in range(16, 30)]
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_READ_BYTES", 4 * size)
    assert [line["id"] for line in log.newest(10_000)] == [str(i) for i in range(26, 30)]


def test_a_line_longer_than_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: a file that is empty is not followed by another."""
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_FILE_BYTES", 10)
    log = RecordLog(tmp_path / "log")
    for i in range(3):
        log.write(record(str(i)))
    log.flush()
    assert [line["id"] for line in log.newest(10)] == list("012")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_renamed_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No line is lost for it, nor an older file; said once."""
    caplog.set_level("WARNING", "sglang_dynasor")
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_FILE_BYTES", 10)
    log = RecordLog(tmp_path / "log")
    (tmp_path / "log.1").write_text("older\n")
    replace = os.replace

    def refuse(old: Any, new: Any) -> None:
        if str(old).endswith("log"):
            raise PermissionError(1, "Operation not permitted")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    for i in range(NUM_OLDER + 5):
        log.write(record(str(i)))
    log.flush()
    assert (log.num_written, log.num_lost) == (NUM_OLDER + 5, 0)
    assert [path.name for path in tmp_path.iterdir() if path.read_text() == "older\n"] == ["log.2"]
    assert caplog.text.count("could not be renamed") == 1
    assert len(log.newest(100)) == NUM_OLDER + 5


def test_a_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that it leads to is the one that is renamed, in its own folder."""
    monkeypatch.setattr("sglang_dynasor.observe.log.MOST_FILE_BYTES", 10)
    (tmp_path / "disk").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "disk" / "records")
    log = RecordLog(tmp_path / "log")
    for i in range(3):
        log.write(record(str(i)))
    log.flush()
    assert (tmp_path / "log").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["records", "records.1", "records.2"]
    assert [line["id"] for line in log.newest(10)] == list("012")


# What the next start reads

ODD = [
    "{}", "[]", "3", "null", '"text"', '{"record": {"program": "p"}}', '{"id": ["x"], "record": {"program": "p"}}', '{"id": "x", "record": {"program": ["a"]}}',
    '{"id": "x", "record": {}}', '{"id": "x", "record": [1]}', '{"id": "x", "record": {"program": "p", "risk": NaN}}', '{"id": "x", "record": {"program": "p", "risk": 1e999}}',
    '{"id": "\\ud800x", "record": {"program": "p"}}', '{"id": "x", "record": {"program": "p", "answer": "\\udfff"}}', "[" * 100_000, '{"a":' * 100_000,
    '{"id": "x", "record": {"program": "p", "cap": ' + "9" * 5000 + "}}",
]  # fmt: skip


def front(log: Path) -> Any:
    """As much of SGLang's tokenizer manager as a book of records needs."""
    return SimpleNamespace(server_args=SimpleNamespace(_dynasor=DynasorConfig("dynasor", dynasor_log=str(log))))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:60])
def test_an_odd_line_stops_no_start(tmp_path: Path, odd: str) -> None:
    """Whatever it says; the lines around it are read, and all that is listed can be sent."""
    path = tmp_path / "log"
    path.write_text("\n".join([json.dumps(record("a")), odd, json.dumps(record("b")), ""]))
    book = records_of(front(path))
    assert [(owner, found["program"]) for owner, found in book.newest()] == [("", "b"), ("", "a")]
    json.dumps(list(book.newest()), allow_nan=False, ensure_ascii=False).encode()


def test_a_program_is_found_by_both_of_its_ids_after_a_restart(tmp_path: Path) -> None:
    """As before it: by the response's, and by the program's, which stays its owner's."""
    path = tmp_path / "log"
    lines = [{"id": f"r{i}", "record": {"program": "mine", "tenant": "acme", "index": i}} for i in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    book = records_of(front(path))
    assert (book.find("mine") or {})["index"] == 1
    assert (book.find("r0") or {})["index"] == 0
    assert len(list(book.newest())) == 1
    theirs = parse_field({"program": "mine", "tenant": "other"}, 64)
    with pytest.raises(ValueError, match="is another tenant's"):
        IdBook(lambda rid: None).claim("r9", theirs, book)


def test_records_stay_their_owner_s_after_a_restart(tmp_path: Path) -> None:
    """Two may have given one id."""
    path = tmp_path / "log"
    lines = [{"id": "r", "owner": owner, "record": {"program": "mine", "index": i}} for i, owner in enumerate("ab")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    book = records_of(front(path))
    assert [(book.find("mine", owner) or {}).get("index") for owner in ("a", "b", "")] == [0, 1, None]


def test_lines_without_a_version_are_read(tmp_path: Path) -> None:
    """As they were written before there were versions."""
    (tmp_path / "log").write_text('{"id": "a", "at": 1.5, "record": {"program": "a"}}\n')
    assert records_of(front(tmp_path / "log")).find("a") == {"program": "a"}


# What a line says


def settings(**field: Any) -> dict[str, Any]:
    spec = parse_field(field, 64)
    return settings_of(spec, Program("p", spec).record())


def test_settings_are_what_the_field_came_to() -> None:
    """Defaults included; what the record says is not said twice."""
    usual = {"answer": "auto", "equal": "math", "vote": "majority"}
    assert settings() == usual
    assert settings(tenant="acme", branches=4, width=2, stop="never") == usual
    assert settings(answer="hash", deadline_s=2) == {**usual, "answer": "hash", "deadline_s": 2.0}
    assert settings(budget="b", budget_tokens=900, budget_programs=3) == {
        **usual,
        "budget": "b",
        "budget_tokens": 900,
        "budget_programs": 3,
    }
    thought = settings(algorithm="long_cot", effort="low")
    assert thought == {**usual, "agree": 1, "level": 0.95, "min_tokens": 256}
    judged = settings(algorithm="best_of_n", judge="model")
    assert judged == {"answer": "auto", "equal": "math", "judge": "model"}


def test_no_text_of_a_client_s_is_a_setting() -> None:
    """A suffix may hold anything."""
    judge = {"judge": "self", "judge_suffix": "SECRET", "judge_good": "y", "judge_bad": "n"}
    said = settings(**judge) | settings(
        algorithm="long_cot", probe_suffix="SECRET", think_end="SECRET", probe_word="SECRET"
    )
    assert "SECRET" not in json.dumps(said)
    assert said["judge"] == "self"


def test_a_record_that_says_little_has_all_settings() -> None:
    """Of a program in which our own code failed."""
    spec = parse_field({"tenant": "acme", "branches": 4, "template": "t@1"}, 64)
    found = settings_of(spec, {"program": "p", "stop_reason": "failed"})
    assert found == {"algorithm": "self_consistency", "template": "t@1", "tenant": "acme", "cap": 4, "stop_rule": "careful", "answer": "auto", "equal": "math", "vote": "majority"}  # fmt: skip


def test_every_key_of_a_line_is_explained() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert all(f"| `{key}` |" in page for key in LINE_HELP)
