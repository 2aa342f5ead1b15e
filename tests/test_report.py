"""What a log says: read, added up, shown as a page, and what it suggests, each where it must and where it must not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sglang_dynasor import cli
from sglang_dynasor.observe import report as report_module
from sglang_dynasor.observe.advice import FEWEST, Advice
from sglang_dynasor.observe.entry import UNKNOWN, entry_of
from sglang_dynasor.observe.report import NONE, NUM_SHOWN, OTHERS, Report, lines_of, with_older
from sglang_dynasor.observe.report_page import page, summary
from sglang_dynasor.observe.spread import Spread
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.sheet import bar_of, page_of, table_of

RECORD: dict[str, Any] = {
    "algorithm": "self_consistency", "answer": "19", "certaindex": 0.97, "leader_share": 0.75, "votes": [{"answer": "19", "votes": 3}, {"answer": "7", "votes": 1}],
    "num_abstentions": 0, "num_truncated": 0, "num_branches": 4, "cap": 16, "num_tokens": 400, "branch_tokens": [100] * 4,
    "finish_reasons": ["stop"] * 4, "stop_rule": "careful", "stop_reason": "certain",
}  # fmt: skip


def line(
    program: str = "p", *, settings: dict[str, Any] | None = None, took_s: float = 2.0, **keys: Any
) -> dict[str, Any]:
    """As a server writes it; keys of the record, None for one that it has not."""
    record = {"program": program, **RECORD, **keys}
    return {
        "v": 1, "id": program, "arrived_at": 1.7e9, "at": 1.7e9 + took_s, "took_s": took_s, "model": "m", "endpoint": "/generate", "prompt_tokens": 50,
        "output_tokens": 100, "settings": {"answer": "auto", "equal": "math", "max_new_tokens": 200, **(settings or {})},
        "record": {key: value for key, value in record.items() if value is not None},
    }  # fmt: skip


def read(*lines: Any) -> Report:
    report = Report()
    report.read((text if isinstance(text, bytes) else json.dumps(text).encode()) + b"\n" for text in lines)
    report.close()
    return report


# What it adds up


def test_tokens_are_told_by_algorithm_template_and_tenant() -> None:
    report = read(
        line("a", tenant="acme", template="math@2"),
        line("b", tenant="acme", stop_reason="cap", num_branches=16, num_tokens=1600, branch_tokens=[100] * 16),
        line("c", algorithm="long_cot", cap=1, num_branches=1, num_tokens=900, branch_tokens=[900], stop_reason="cap"),
    )
    assert report.all.num_tokens == 2900
    assert {label: sums.num_tokens for label, sums in report.groups["tenant"].items()} == {"acme": 2000, NONE: 900}
    assert {label: sums.num_tokens for label, sums in report.groups["template"].items()} == {"math@2": 400, NONE: 2500}
    assert set(report.groups["algorithm"]) == {"self_consistency", "long_cot"}
    assert report.groups["tenant"]["acme"].tokens == {"certain": 400, "cap": 1600}
    assert report.all.num_prompt_tokens == 150


def test_only_who_was_sure_or_priced_out_has_saved() -> None:
    """The rule of the live page and of /dynasor/status."""
    for reason in ("certain", "price"):
        assert (
            read(line(stop_reason=reason)).all.num_tokens_saved,
            read(line(stop_reason=reason)).all.num_branches_saved,
        ) == (1200, 12)
    for reason in ("cap", "deadline", "budget", "operator", "aborted", "failed"):
        sums = read(line(stop_reason=reason)).all
        assert (sums.num_tokens_saved, sums.num_branches_saved, sums.num_tokens) == (0, 0, 400)


def test_the_slowest_and_the_least_certain_are_shown() -> None:
    """So many; what was given up was never sure of anything."""
    lines = [line(f"p{i}", took_s=float(i), certaindex=1 - i / 1000) for i in range(NUM_SHOWN + 30)]
    report = read(*lines, line("given-up", took_s=0.0, certaindex=0.0, stop_reason="aborted"))
    assert [entry.program for entry in report.slowest.entries()] == [f"p{i}" for i in range(NUM_SHOWN + 29, 29, -1)]
    assert [entry.program for entry in report.unsurest.entries()] == [f"p{i}" for i in range(NUM_SHOWN + 29, 29, -1)]


def test_a_program_whose_branches_a_client_sends_counts_once() -> None:
    """As its last line tells it; the time is its own, not a branch's. An id that is used again is another program."""
    lines = [
        line(
            "x",
            index=i,
            num_branches=i + 1,
            num_tokens=100 * (i + 1),
            took_s=1.0 + i,
            stop_reason="certain" if i == 2 else None,
        )
        for i in range(3)
    ]
    report = read(*lines)
    assert (report.all.num_programs, report.all.num_tokens, report.all.num_client_s) == (1, 300, 1)
    assert report.all.outcomes == {"certain": 1}
    assert report.slowest.entries()[0].took_s == 3.0
    assert read(*lines, *lines).all.num_programs == 2
    assert read(*lines[:2]).all.outcomes == {"open": 1}
    assert read(*lines[:2], line("x", index=0, num_tokens=500, tenant="other")).all.num_programs == 2


def test_of_a_program_that_failed_what_is_known_is_told() -> None:
    """Our own code raised: its record has two keys, its settings the others."""
    told = {
        "v": 1,
        "id": "a",
        "output_tokens": 70,
        "settings": {"algorithm": "self_consistency", "tenant": "acme", "cap": 8},
        "record": {"program": "a", "stop_reason": "failed"},
    }
    sums = read(told).groups["tenant"]["acme"]
    assert (sums.outcomes, sums.num_tokens) == ({"failed": 1}, 70)
    old = {"id": "a", "at": 1.0, "record": {"program": "a", "stop_reason": "failed"}}
    assert set(read(old).groups["algorithm"]) == {UNKNOWN}


def test_lines_without_a_version_are_read() -> None:
    """As servers wrote them before: when, and the record."""
    report = read({"id": "a", "at": 1.7e9, "record": {"program": "a", **RECORD}})
    assert (report.all.num_tokens, report.num_unreadable, report.num_unknown) == (400, 0, 0)
    assert report.slowest.entries() == []
    assert "No line says how long" in page(report, ["log"])


def test_a_real_record_is_read() -> None:
    """Of each algorithm, as the engine makes it."""
    for field in (
        {},
        {"algorithm": "long_cot"},
        {"algorithm": "long_cot", "branches": 4},
        {"statistics": True, "judge": "model"},
        {"equal": "model"},
    ):
        spec = parse_field({"answer": "hash", **field}, 64)
        program = Program("p", spec)
        for _ in range(min(2, spec.branches)):
            program.finish(program.start_branch(), "#### 4", 10)
        record = json.loads(json.dumps(program.record()))
        entry = entry_of({"id": "p", "record": record})
        assert (entry.num_tokens, entry.cap, entry.answer) == (
            10 * record["num_branches"],
            spec.branches,
            record["answer"],
        )


# What it does not trust


@pytest.mark.parametrize(
    "odd",
    [
        b"", b"  ", b'{"id": "a", "rec', b"[" * 100_000, b"\xff\xfe", b"\0" * 50, {"id": 1, "record": {"program": "p"}}, {"id": "a", "record": {"program": ["p"]}},
        line(num_tokens=-1), line(num_tokens=1e300), line(num_tokens=True), line(num_tokens="many"), line(num_tokens=10**400), line(certaindex=float("nan")),
        line(certaindex=float("inf")), line(took_s=float("inf")), line(votes=3), line(branch_tokens=[1, "x"]), line(branch_tokens=[0] * 70_000), line(tenant=["a"]),
        line(stop_reason={}), {**line(), "settings": 3}, {**line(), "at": "now"},
        {**line(), "v": 2}, {**line(), "v": "1"}, {**line(), "v": True}, {**line(), "v": -1}, {**line(), "v": 1.0}, {**line(), "v": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_line_is_counted_and_left_out(odd: Any) -> None:
    """The lines around it are read. What is of another version may be right, and is told apart."""
    report = read(line("a"), odd, line("b"))
    assert (report.all.num_programs, report.all.num_tokens) == (2, 800)
    version = odd.get("v", 1) if isinstance(odd, dict) else 1
    is_other = version != 1 or type(version) is not int
    is_empty = isinstance(odd, bytes) and not odd.strip()
    assert (report.num_unreadable, report.num_unknown) == ((0, 0) if is_empty else (0, 1) if is_other else (1, 0))
    assert page(report, ["log"]).count("of them") == (0 if is_empty else 1)


class Page(HTMLParser):
    """What a browser makes of it: elements with their attributes, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


EVIL = "<script>alert(1)</script><img src=http://a.b/c onerror=alert(1)>\"'&</td>\u202e\x1b[2J\ud800"


def test_nothing_that_was_sent_is_markup() -> None:
    """Wherever it stands; and nothing is loaded from anywhere."""
    lines = [
        line(EVIL, answer=EVIL, tenant=EVIL, template=EVIL, algorithm=EVIL, stop_rule=EVIL, stop_reason="cap", num_abstentions=4, settings={"answer": EVIL, "equal": EVIL})
        for _ in range(2 * FEWEST)
    ]  # fmt: skip
    lines = [{**each, "model": EVIL, "endpoint": EVIL, "prompt": EVIL, "owner": EVIL} for each in lines]
    report = Report()
    for each in lines:  # as they are; no line that is read has half a character
        report.add(entry_of(each))
    for each in (line("other"), {**line("b"), "model": "n", "endpoint": "/v1"}):
        report.add(entry_of(each))
    assert report.advice()
    html = page(report, [EVIL])
    found = Page()
    found.feed(html)
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "i", "div", "small", "b", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "ul", "li",
    }  # fmt: skip
    assert not {key for _, attributes in found.tags for key in attributes} & {"src", "href", "onerror", "style"}
    assert EVIL in "".join(found.words)
    assert not re.search(r"https?://|url\(|@import", re.sub(r">[^<]*<", "><", html))
    told = "\n".join(summary(report))
    assert all(character.isprintable() or character == "\n" for character in told)


def test_memory_is_bounded_by_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tenants, settings and open programs there are; what does not fit shares a line."""
    for name in ("MOST_OPEN", "MOST_LABELS", "MOST_KINDS"):
        monkeypatch.setattr(report_module, name, 20)

    def lines(num: int) -> Iterator[bytes]:
        for i in range(num):
            yield json.dumps(line(f"p{i}", tenant=f"t{i}", cap=16 + i)).encode()
            yield json.dumps(line(f"c{i}", tenant=f"t{i}", index=0, stop_reason=None)).encode()

    sizes: list[int] = []
    for num in (200, 800):
        report = Report()
        tracemalloc.start()
        report.read(lines(num))
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        report.close()
        assert report.all.num_programs == 2 * num
        assert len(report.groups["tenant"]) == 21
        assert report.groups["tenant"][OTHERS].num_programs == 2 * (num - 20)
        assert sum(sums.num_programs for sums in report.groups["tenant"].values()) == 2 * num
        assert report.num_unlooked > 0
        assert len(page(report, ["log"])) < 60_000
    assert sizes[1] < 1.3 * sizes[0]


def test_a_line_without_an_end_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is one line that cannot be read."""
    monkeypatch.setattr(report_module, "MOST_LINE_BYTES", 4000)
    path = tmp_path / "log"
    path.write_bytes(
        json.dumps(line("a")).encode()
        + b"\n"
        + b"x" * 20_000
        + b"\n"
        + json.dumps(line("b")).encode()
        + b"\n"
        + b'{"id": "c'
    )
    assert max(map(len, lines_of(path))) == 4000
    report = Report()
    report.read(lines_of(path))
    assert (report.all.num_programs, report.num_lines, report.num_unreadable) == (2, 4, 2)


def test_quantiles_are_right_to_five_percent() -> None:
    spread = Spread()
    for value in range(1, 10_001):
        spread.add(value / 100)
    assert spread.quantile(0.5) == pytest.approx(50, rel=0.051)
    assert spread.quantile(0.95) == pytest.approx(95, rel=0.051)
    assert spread.quantile(1.0) <= spread.most == 100
    assert (Spread().quantile(0.5), Spread().mean) == (0.0, 0.0)
    zeros = Spread()
    zeros.add(0.0)
    assert zeros.quantile(0.5) == 0.0


# What it suggests


def suggested(num: int = FEWEST, others: tuple[dict[str, Any], ...] = (), **keys: Any) -> dict[str, str]:
    """What is suggested of so many programs like this: settings with their values."""
    report = read(*(line(f"p{i}", **keys) for i in range(num)), *others)
    return {each.setting: each.value for each in report.advice()}


WHOLE = {
    "num_branches": 16,
    "num_tokens": 1600,
    "branch_tokens": [100] * 16,
    "finish_reasons": ["stop"] * 16,
    "stop_reason": "cap",
}
USUAL = {"num_branches": 13}  # nothing stands out
APART = {**WHOLE, "leader_share": 0.2, "votes": [{"answer": str(i), "votes": 1} for i in range(12)]}
LENGTH = "max_new_tokens (max_tokens)"
PRICE = "--dynasor-max-price, max_price"
THOUGHT = {"algorithm": "long_cot", "cap": 1, "num_branches": 1, "num_tokens": 900, "branch_tokens": [900], "stop_reason": "cap", "num_probes": 3, "closed_at_tokens": [None], "settings": {"agree": 2}}  # fmt: skip


def test_nothing_is_suggested_where_nothing_is_wrong() -> None:
    assert suggested(300, **USUAL) == {}
    assert read().advice() == []


@pytest.mark.parametrize(
    ("keys", "setting", "value"),
    [
        ({}, "branches", "4"),
        ({"num_branches": 12}, "branches", "12"),
        (APART, "equal", "symbolic"),
        ({**APART, "settings": {"answer": "last_line"}}, "equal", "model"),
        ({**APART, "settings": {"equal": "symbolic"}}, "branches", "8"),
        ({**APART, "votes": RECORD["votes"]}, "branches", "8"),
        ({**WHOLE, "leader_share": 0.9}, "stop", "balanced"),
        ({**WHOLE, "leader_share": 0.9, "stop_rule": "balanced"}, "stop", "fast"),
        ({**WHOLE, "leader_share": 0.9, "stop_rule": "never"}, "stop", "careful"),
        ({**USUAL, "stop_reason": "deadline", "settings": {"deadline_s": 20}}, "deadline_s", "40"),
        ({**USUAL, "num_truncated": 4, "num_abstentions": 4, "finish_reasons": ["length"] * 4, "branch_tokens": [200] * 4}, LENGTH, "400"),
        ({**USUAL, "num_abstentions": 4}, "answer", "boxed"),
        ({**USUAL, "num_abstentions": 4, "settings": {"answer": "hash"}}, "answer", "auto"),
        (THOUGHT, "effort", "low"),
        ({**THOUGHT, "settings": {"agree": 1}}, "exit", "trial:0.9"),
        ({**THOUGHT, "num_probes": 0}, "min_tokens", "450"),
        ({**USUAL, "stop_reason": "aborted", "took_s": 30.0}, "deadline_s", "2"),
        ({**USUAL, "stop_reason": "price", "price": 0.02, "certaindex": 0.5}, PRICE, "0.01"),
    ],
)  # fmt: skip
def test_what_stands_out_is_suggested_with_a_value(keys: dict[str, Any], setting: str, value: str) -> None:
    """From so many programs on; not from one fewer."""
    found = suggested(**keys)
    assert set(found) == {setting}
    assert found[setting].startswith(value)
    assert suggested(FEWEST - 1, **keys) == {}


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"stop_rule": "never"}, "nobody uses the cap: who says never wants all"),
        ({"num_branches": 13}, "more than three quarters are used"),
        ({"cap": 2, "num_branches": 1}, "a program needs two"),
        ({"stop_reason": "deadline"}, "there was no time for more"),
        ({"stop_reason": "operator"}, "nor patience"),
        ({"stop_reason": "budget"}, "nor tokens"),
        ({**WHOLE, "leader_share": 0.6}, "the whole cap is used, and answers neither agree nor differ"),
        ({**WHOLE, "leader_share": 0.9, "stop_rule": "fast"}, "nothing is quicker"),
        ({**WHOLE, "leader_share": 0.9, "stop_rule": "margin"}, "it has no levels"),
        ({**APART, "rewards": [0.5] * 16}, "rewards decide, not votes"),
        ({**APART, "cap": 3, "num_branches": 3}, "so few may well differ"),
        ({**USUAL, "stop_reason": "deadline", "settings": {"deadline_s": 86_400}}, "no deadline may be longer"),
        ({**USUAL, "num_truncated": 2, "num_abstentions": 2, "finish_reasons": ["length"] * 2, "branch_tokens": [200] * 2}, "few are cut"),
        ({**USUAL, "stop_reason": "deadline", "num_truncated": 9, "num_abstentions": 9, "finish_reasons": ["length"] * 9}, "time cut them"),
        ({**USUAL, "stop_reason": "operator", "num_truncated": 9, "num_abstentions": 9, "finish_reasons": ["length"] * 9}, "somebody cut them"),
        ({**USUAL, "num_abstentions": 3}, "few are not read"),
        ({**USUAL, "num_abstentions": 9, "num_weak": 9}, "they were ended as weak"),
        ({**THOUGHT, "closed_at_tokens": [500]}, "thoughts are closed"),
        ({**THOUGHT, "cap": 4, "num_branches": 4, "stop_reason": "certain"}, "they decide together"),
        ({**USUAL, "stop_reason": "aborted", "took_s": 0.5}, "too soon for any deadline"),
        ({**USUAL, "stop_reason": "aborted", "took_s": 30.0, "settings": {"deadline_s": 20}}, "they had a deadline"),
        ({**USUAL, "stop_reason": "price", "price": 0.02, "certaindex": 0.9}, "they were sure enough"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_stand_out_is_not_suggested(keys: dict[str, Any], why: str) -> None:
    assert suggested(**keys) == {}, why


def test_a_few_that_are_otherwise_matter() -> None:
    """Suggestions are about nearly all programs with the same settings, not about some."""
    most = {"num_branches": 15}
    assert suggested(others=(line("x", **most),)) == {}  # one used the cap
    half = tuple(line(f"x{i}", **USUAL) for i in range(2 * FEWEST))
    assert suggested(others=half, **APART) == {}
    assert suggested(others=half, **{**USUAL, "stop_reason": "deadline", "settings": {"deadline_s": 20}}) == {}
    assert suggested(others=half, **{**USUAL, "stop_reason": "price", "price": 0.02, "certaindex": 0.5}) == {}
    many = tuple(line(f"x{i}", **USUAL) for i in range(9 * FEWEST))
    assert suggested(others=many, **{**USUAL, "stop_reason": "aborted", "took_s": 30.0}) == {}
    assert suggested(others=(line("x", **{**THOUGHT, "closed_at_tokens": [9]}),), **THOUGHT) == {}


def test_programs_with_other_settings_are_looked_at_apart() -> None:
    """And each suggestion says of which, and how many it rests on; what takes most tokens comes first."""
    report = read(
        *(line(f"a{i}", template="small@1") for i in range(FEWEST)),
        *(line(f"b{i}", template="large@1", **{**APART, "num_tokens": 9000}) for i in range(FEWEST)),
        *(line(f"c{i}", template="rare@1") for i in range(FEWEST - 1)),
    )
    found: list[Advice] = report.advice()
    assert [(each.kind.template, each.setting) for each in found] == [("large@1", "equal"), ("small@1", "branches")]
    assert f"none of {FEWEST} programs used more than 4 of the 16" in found[1].why
    html = page(report, ["log"])
    assert "large@1, cap 16, careful, auto, math" in html
    assert "rare@1, cap" not in html


# The command


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_dynasor.cli", "report", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)


def write(path: Path, *lines: Any) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_a_log_becomes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the files that it was before, each once; a few lines say the same."""
    write(tmp_path / "log", line("c"))
    write(tmp_path / "log.1", line("b"), line("b2", stop_reason="cap"))
    write(tmp_path / "log.2", line("a"))
    write(tmp_path / "log.old", line("z"))
    write(tmp_path / "second", line("y"))
    assert [file.name for file in with_older(tmp_path / "log")] == ["log.2", "log.1", "log"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sglang-dynasor", "report", "log", "./log.1", "second", str(tmp_path / "log")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "programs: 5 (4 certain" in said
    assert "tokens generated: 2,000" in said
    assert "the page is in report.html" in said
    html = (tmp_path / "report.html").read_text()
    assert html.index("from log.2") < html.index("from log.1") < html.index("from log<") < html.index("from second")


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    """Exit code 2; no page."""
    for arguments, says in (
        (["nowhere"], "'nowhere' cannot be read (No such file or directory)"), (["."], "'.' cannot be read (Is a directory)"),
        ([], "required: LOG"),
    ):  # fmt: skip
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    write(tmp_path / "log", line())
    done = run("log", "--html", "nowhere/page.html", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--html=nowhere/page.html cannot be written" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_an_empty_log_is_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    done = run("log", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no programs\nprograms: 0")
    assert "Nothing stands out" in (tmp_path / "page.html").read_text()


# The page


def test_cells_and_bars_are_escaped_and_drawn() -> None:
    assert "<td>&lt;b&gt;</td>" in table_of([{"<i>": "<b>"}])
    assert "<th>&lt;i&gt;</th>" in table_of([{"<i>": "<b>"}])
    assert table_of([]) == ""
    assert bar_of([("a", 1), ("b", 3)], 4).count("<rect") == 2
    assert 'x="25.00"' in bar_of([("a", 1), ("b", 3)], 4)
    assert bar_of([("a", 0)], 0).count("<rect") == 0
    assert "default-src 'none'" in page_of("<t>", [])
    assert "<title>&lt;t&gt;</title>" in page_of("<t>", [])


def test_reading_takes_little_for_a_line() -> None:
    """Some 100 microseconds; the limit is wide, for other work on this machine is in it."""
    text = json.dumps(line()).encode() + b"\n"
    started = time.process_time()
    report = Report()
    report.read(text for _ in range(10_000))
    assert report.all.num_programs == 10_000
    assert time.process_time() - started < 20
