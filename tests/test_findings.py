"""What the first rank finds out about answers: by an embedding server that may be wrong, slow or gone, and by a process."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from others import OtherServer

from sglang_dynasor.engine import beside as beside_module
from sglang_dynasor.engine import comparing as comparing_module
from sglang_dynasor.engine import findings as findings_module
from sglang_dynasor.engine.comparing import PREAMBLE, Comparing, same_ids, same_tokens
from sglang_dynasor.engine.embedding import EmbeddingServer, vectors_of
from sglang_dynasor.engine.findings import Finding, Findings
from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.engine.readings import Readings
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.reading import STEP_CHARS
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.symbolic import SymbolicWorker

VECTORS = {"big": [1.0, 0.0], "large": [4.0, 1.0], "small": [0.0, 2.0]}


def embed(texts: list[str]) -> Any:
    """The right answer, the texts not in order."""
    rows = [{"index": i, "embedding": VECTORS[text]} for i, text in enumerate(texts)]
    return {"data": rows[::-1]}


@contextmanager
def server(answer: Callable[[list[str]], Any] = embed, status: int = 200, delay_s: float = 0.0) -> Iterator[Any]:
    """An embedding server; `.asked` are the texts it was sent."""
    asked: list[list[str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings"
            asked.append(body["input"])
            time.sleep(delay_s)
            with suppress(OSError):  # the client may have hung up
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer(body["input"])).encode())

        def log_message(self, *args: Any) -> None:
            pass

    made = OtherServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{made.server_port}/", asked=asked)
    finally:
        made.shutdown()
        made.server_close()


def wait(findings: Findings, num: int) -> dict[tuple[int, int], Finding | None]:
    deadline = time.monotonic() + 60
    while len(given := dict(findings.given())) < num:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return given


def spec(equal: str) -> Any:
    return parse_field({"equal": equal}, 64)


def test_the_closest_answer() -> None:
    """By the angle between vectors, whatever their length; each text is sent once."""
    with server() as fake:
        embedding = EmbeddingServer(fake.url, 60)
        assert embedding.closest("big", ["small", "large"]) == (1, pytest.approx(4 / 17**0.5))
        assert embedding.closest("large", ["small"]) == (0, pytest.approx(1 / 17**0.5))
        assert embedding.closest("big", ["big"]) == (0, pytest.approx(1.0))
        assert fake.asked == [["big", "small", "large"]]


@pytest.mark.parametrize(("equal", "into"), [("embedding", 7), ("embedding:0.97", 7), ("embedding:0.98", None)])
def test_what_is_close_enough(equal: str, into: int | None) -> None:
    """The level is the client's; a finding is given until it is forgotten."""
    with server() as fake:
        findings = Findings(fake.url, 60)
        findings.ask((1, 9), spec(equal), "big", {3: "small", 7: "large"})
        found = wait(findings, 1)[1, 9]
        assert found == Finding(into, None if into is None else pytest.approx(0.970143))
        assert dict(findings.given()) == {(1, 9): found}
        findings.forget((1, 9))
        assert dict(findings.given()) == {}
        assert findings.num_errors == 0


@pytest.mark.parametrize(
    ("answer", "status", "delay_s"),
    [
        (lambda texts: "oops", 200, 0),
        (lambda texts: {"data": []}, 200, 0),
        (lambda texts: {"data": [{"index": 0, "embedding": [1.0]}]}, 200, 0),
        (lambda texts: {"data": [{"index": i, "embedding": [1.0] * (i + 1)} for i in range(len(texts))]}, 200, 0),
        (embed, 500, 0),
        (embed, 200, 2),
    ],
    ids=["no object", "no vectors", "too few", "several lengths", "an error", "too slow"],
)
def test_a_server_that_fails_leaves_answers_apart(
    answer: Any, status: int, delay_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """None for each, counted, and one line that says what to do."""
    with server(answer, status, delay_s) as fake, caplog.at_level(logging.ERROR):
        findings = Findings(fake.url, 0.5 if delay_s else 10)
        findings.ask((1, 0), spec("embedding"), "big", {3: "large"})
        findings.ask((1, 1), spec("embedding"), "big", {3: "small"})
        assert wait(findings, 2) == {(1, 0): None, (1, 1): None}
    assert findings.num_errors == 2
    assert [record.message.count("--dynasor-embedding-url") for record in caplog.records] == [1]


def test_a_server_that_is_gone() -> None:
    """Refused connections are errors like any other."""
    findings = Findings("http://127.0.0.1:9", 5)
    findings.ask((1, 0), spec("embedding"), "big", {3: "large"})
    assert wait(findings, 1) == {(1, 0): None}


@pytest.mark.parametrize(
    "answer",
    [None, {}, {"data": 1}, {"data": [1, 2]}, {"data": [{"embedding": "x"}, {"embedding": [1]}]},
     {"data": [{"embedding": [0.0]}, {"embedding": [1.0]}]}, {"data": [{"embedding": [float("nan")]}, {"embedding": [1.0]}]}],
)  # fmt: skip
def test_an_answer_without_vectors_is_an_error(answer: Any) -> None:
    """Also one with a vector that points nowhere."""
    with pytest.raises(ValueError, match="its answer"):
        vectors_of(answer, 2)


def test_formulas_are_compared_by_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is the same, by branch; a process that is killed leaves the answer apart, and the next one is right."""
    worker = SymbolicWorker(pair_s=60.0)  # machines of tests stall
    monkeypatch.setattr(findings_module, "shared_worker", lambda: worker)
    findings = Findings("", 60)
    findings.ask((1, 5), spec("symbolic"), "2k+2", {4: "k", 2: "2+2k"})
    findings.ask((1, 6), spec("symbolic"), "2k+2", {4: "k"})
    assert wait(findings, 2) == {(1, 5): Finding(2), (1, 6): Finding(None)}
    assert findings.num_errors == 0
    findings.forget((1, 5))
    findings.forget((1, 6))
    worker.pair_s = 2.0
    findings.ask((1, 7), spec("symbolic"), "9^{9^{9^{9}}}", {4: "9^{9^{9^{8}}}+1"})
    assert wait(findings, 1) == {(1, 7): None}
    worker.pair_s = 60.0
    findings.ask((1, 8), spec("symbolic"), "7!", {4: "5040"})
    assert wait(findings, 2) == {(1, 7): None, (1, 8): Finding(4)}
    assert findings.num_errors == 1
    worker.close()


def test_of_the_model_only_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finding comes by itself; one that does not come in time is given up. Not one that has come."""
    now = [0.0]
    monkeypatch.setattr(beside_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    findings = Findings("", 0.2)
    findings.ask((1, 0), spec("model"), "a", {3: "b"})
    findings.ask((1, 1), spec("model"), "a", {3: "b"})
    findings.forget((1, 1))
    now[0] = 0.19
    assert dict(findings.given()) == {}
    for now[0] in (0.2, 0.5):
        assert dict(findings.given()) == {(1, 0): None}
    assert findings.num_errors == 1


class Words:
    """A tokenizer of the words that it has, and else of letters."""

    eos_token_id = 1

    def __init__(self, words: set[str], *, ends: bool = False):
        self.words = words
        self.ends = ends

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [1000 + sum(map(ord, text))] if text in self.words else [ord(letter) for letter in text]
        return [0, *ids, *([1] if self.ends else [])] if add_special_tokens else ids


@pytest.mark.parametrize(("words", "yes"), [({" yes", " no", "yes", "no"}, " yes"), ({"yes", "no"}, "yes")])
@pytest.mark.parametrize("ends", [False, True])
def test_the_labels_of_a_tokenizer(words: set[str], yes: str, ends: bool) -> None:
    """With a space before them if that is one token; the question begins as every text does, and does not end."""
    tokenizer = Words(words, ends=ends)
    tokens = same_tokens(tokenizer)
    assert [tokens.yes, tokens.no] == [tokenizer.encode(label, False)[0] for label in (yes, yes.replace("yes", "no"))]
    ids = same_ids(tokenizer, "two\n lines", "one")
    assert ids == [0, *map(ord, PREAMBLE), *map(ord, "Answer: two lines\nAnswer: one\nSame:")]


def test_a_model_without_such_tokens_is_refused() -> None:
    """It says what else there is."""
    with pytest.raises(FieldError, match="are not one token each of this model"):
        same_tokens(Words({"yes"}))


# Who looks after comparisons, on stand-ins for SGLang's parts


class Stage:
    """A program of model comparisons whose Reqs nobody runs: what was asked, ended, forgotten, and gone on with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fits: bool = True):
        self.put: list[Any] = []
        self.ended: list[Any] = []
        self.forgotten: list[Any] = []
        self.num_go_on = 0
        monkeypatch.setattr(
            comparing_module, "make_side", lambda *args, **options: self._make(args[4]) if fits else None
        )
        monkeypatch.setattr(comparing_module, "cost_tokens", lambda req: 7)
        inside = SimpleNamespace(new_rid=lambda: "r", put=lambda req, tag: self.put.append(req), end=self.ended.append)
        findings = SimpleNamespace(ask=lambda *args: True, forget=self.forgotten.append)
        scheduler = SimpleNamespace(tokenizer=Words({" yes", " no"}))
        self.comparing = Comparing(
            scheduler, cast("Any", inside), cast("Any", findings), Readings(lambda live, read: read(live)), self._go_on
        )
        self.live = LiveProgram(
            Program("p", parse_field({"branches": 4, "stop": "never", "equal": "model"}, 64)), cast("Any", object()), 5
        )
        for _ in range(4):
            self.live.program.start_branch()

    def _make(self, tag: Any) -> Any:
        return SimpleNamespace(tag=tag)

    def _go_on(self, live: LiveProgram) -> None:
        self.num_go_on += 1

    def say(self, *answers: str) -> None:
        for index, answer in enumerate(answers):
            self.live.program.count(index, answer, 10)
        self.comparing.ask(self.live)

    def answer(self, reward: float | None) -> None:
        """The latest Req comes to its end."""
        req = self.put[-1]
        req.tag.reward = reward
        self.comparing.has_ended(req, req.tag)

    @property
    def votes(self) -> list[int]:
        return sorted(map(len, self.live.program.votes.voters.values()), reverse=True)


def test_the_model_is_asked_about_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it says yes; nobody is asked twice about the same."""
    stage = Stage(monkeypatch)
    stage.say("a", "b")
    assert len(stage.put) == 1
    stage.comparing.ask(stage.live)
    assert len(stage.put) == 1
    stage.answer(0.1)
    assert (stage.votes, stage.num_go_on, stage.forgotten) == ([1, 1], 1, [(5, 1)])
    stage.live.program.count(2, "c", 10)
    stage.comparing.ask(stage.live)
    stage.answer(0.2)
    assert len(stage.put) == 3
    stage.answer(0.7)
    assert (stage.votes, stage.comparing.num, stage.comparing.num_merges) == ([2, 1], 2, 1)
    assert stage.live.program.comparisons.merges == [(2, 1, 0.7)]
    assert stage.live.program.comparisons.num_tokens == 21
    assert stage.comparing.num_lost == 0
    assert not stage.live.comparisons


@pytest.mark.parametrize("way", ["no reward", "lost", "too long"])
def test_a_model_that_cannot_say_leaves_answers_apart(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Counted; the program goes on."""
    stage = Stage(monkeypatch, fits=way != "too long")
    stage.say("a", "b")
    if way == "no reward":
        stage.answer(None)
    elif way == "lost":
        stage.comparing.is_lost(stage.put[0], stage.put[0].tag, cast("Any", None))
    assert (stage.votes, stage.comparing.num_lost, stage.comparing.num_merges) == ([1, 1], 1, 0)
    assert not stage.live.comparisons
    assert not stage.live.program.comparisons.under_way


def test_what_is_told_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out ends the question under way; what the model says then, and what is told again, changes nothing."""
    stage = Stage(monkeypatch)
    stage.say("a", "b")
    stage.comparing.settle(stage.live, 1, None, None)
    assert stage.ended == stage.put
    assert stage.num_go_on == 1
    stage.answer(0.9)
    stage.comparing.settle(stage.live, 1, 0, 0.9)
    stage.comparing.is_lost(stage.put[0], stage.put[0].tag, cast("Any", None))
    assert (stage.votes, stage.num_go_on, stage.comparing.num_lost) == ([1, 1], 1, 0)


def test_a_decided_program_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers stay what they were told to be."""
    stage = Stage(monkeypatch)
    stage.say("a", "b")
    stage.live.program.reason = StopReason.DEADLINE
    stage.answer(0.9)
    assert stage.votes == [1, 1]


def test_a_step_tokenizes_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is asked in the next steps; not what was given up meanwhile."""
    stage = Stage(monkeypatch)
    readings = stage.comparing.readings
    readings.add(stage.live, STEP_CHARS, lambda live: None)  # the step is full
    stage.say("a", "b", "c")
    assert (len(stage.put), len(readings)) == (0, 2)
    stage.comparing.settle(stage.live, 1, None, None)
    readings.open_step()
    assert [req.tag.index for req in stage.put] == [2]
