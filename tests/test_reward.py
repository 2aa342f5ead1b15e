"""Rewards from another server: what its answers mean, and what happens when it does not give any."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import exp
from types import SimpleNamespace
from typing import Any

import pytest
from others import OtherServer

from sglang_dynasor.engine.beside import MOST_AT_ONCE
from sglang_dynasor.engine.judge import MOST_STEPS, reward_texts
from sglang_dynasor.engine.reward_model import RewardModel, rewards_of
from sglang_dynasor.policy.spec import JudgeSpec


@contextmanager
def model(answer: bytes, status: int = 200, delay_s: float = 0.0) -> Iterator[str]:
    """A server that gives one answer to every text; our own logic is under test, not a model."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(delay_s)
            with suppress(OSError):  # the client may have hung up
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = OtherServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def wait(rewards: RewardModel, num: int) -> dict[tuple[int, int], float | None]:
    deadline = time.monotonic() + 60
    while len(given := dict(rewards.given())) < num:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return given


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"embedding": [0.0]}, [0.5]),
        ({"embedding": 2.0}, [1 / (1 + exp(-2))]),
        ([{"embedding": [3.0]}, {"embedding": [-1.0]}], [1 / (1 + exp(-3)), 1 / (1 + exp(1))]),
        ({"embedding": [-5.0, 5.0]}, [1 / (1 + exp(-10))]),  # bad, good
        ({"embedding": [5.0, -5.0]}, [1 / (1 + exp(10))]),
        ({"embedding": [9999.0]}, [1.0]),
    ],
)
def test_what_an_answer_means(answer: Any, expected: list[float]) -> None:
    """A sigmoid of the one number, the softmax of two; one for each text."""
    assert rewards_of(answer) == pytest.approx(expected)


def test_the_least_of_the_steps_counts() -> None:
    """A solution is as good as its worst step; all are asked about at once."""
    with model(b'[{"embedding": [3.0]}, {"embedding": [-1.0]}, {"embedding": [2.0]}]') as url:
        rewards = RewardModel(url, 60)
        rewards.ask_about((1, 0), lambda: ["a", "ab", "abc"])
        assert wait(rewards, 1) == {(1, 0): pytest.approx(1 / (1 + exp(1)))}


class Letters:
    """A tokenizer of letters."""

    bos_token_id = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))


def finished(text: str) -> Any:
    return SimpleNamespace(
        origin_input_ids=[0, *map(ord, "Q\n")], output_ids_through_stop=[*map(ord, text)], finished_reason=None
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n#### 1", ["Q\na\n?", "Q\na\nb\n?", "Q\na\nb\n#### 1?"]),
        ("\n\na\n\n", ["Q\n\n\na\n\n?"]),  # empty lines are no steps
        ("a", ["Q\na?"]),
    ],
)
def test_steps_are_lines(text: str, expected: list[str]) -> None:
    """What was there after each line, and the whole; without steps the whole alone; never more than the limit."""
    steps, whole = JudgeSpec("?", is_external=True, by_steps=True), JudgeSpec("?", is_external=True)
    assert reward_texts(Letters(), finished(text), steps) == expected
    assert reward_texts(Letters(), finished(text), whole) == expected[-1:]
    for num in (MOST_STEPS - 1, MOST_STEPS, 5 * MOST_STEPS):
        texts = reward_texts(Letters(), finished("x\n" * num + "y"), steps)
        assert len(texts) <= MOST_STEPS
        assert texts[-1].endswith("x\ny?")


@pytest.mark.parametrize(
    "answer", [{}, [], {"embedding": []}, {"embedding": ["a"]}, {"embedding": [float("nan")]}, "x"]
)
def test_an_answer_without_numbers_is_an_error(answer: Any) -> None:
    """It says what it got."""
    with pytest.raises(ValueError, match=r"no numbers under 'embedding'|is empty"):
        rewards_of(answer)


def test_a_head_of_many_numbers_is_an_error() -> None:
    """Nobody can tell which of them is the reward."""
    with pytest.raises(ValueError, match="its head gives 3 numbers"):
        rewards_of({"embedding": [3.0, -1.0, 2.0]})


def test_a_reward_is_given_until_it_is_forgotten() -> None:
    """SGLang may drop what a poll returns, so it is told again."""
    with model(b'{"embedding": [0.0]}') as url:
        rewards = RewardModel(url, 60)
        assert dict(rewards.given()) == {}
        rewards.ask_about((1, 2), lambda: ["text"])
        assert wait(rewards, 1) == {(1, 2): 0.5}
        assert dict(rewards.given()) == {(1, 2): 0.5}
        rewards.forget((1, 2))
        assert dict(rewards.given()) == {}
        assert rewards.num_errors == 0


@pytest.mark.parametrize(
    ("answer", "status", "delay_s"), [(b"oops", 200, 0), (b"{}", 200, 0), (b"{}", 500, 0), (b"{}", 200, 2)]
)
def test_a_model_that_fails_costs_the_reward_only(
    answer: bytes, status: int, delay_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Not JSON, no numbers, an error, too slow: None, counted, and one line that says what to do."""
    with model(answer, status, delay_s) as url, caplog.at_level(logging.ERROR):
        rewards = RewardModel(url, 0.5)
        rewards.ask_about((1, 0), lambda: ["text"])
        rewards.ask_about((1, 1), lambda: ["text"])
        assert wait(rewards, 2) == {(1, 0): None, (1, 1): None}
    assert rewards.num_errors == 2
    assert [r.message.count("--dynasor-reward-url") for r in caplog.records] == [1]


def test_the_timeout_counts_from_asking() -> None:
    """Also for those that wait behind others: more than fit at once, to a server that hangs."""
    with model(b'{"embedding": [0.0]}', delay_s=60) as url:
        rewards = RewardModel(url, 2)  # machines of tests stall
        started = time.monotonic()
        for index in range(2 * MOST_AT_ONCE):
            rewards.ask_about((1, index), lambda: ["text"])
        assert dict(rewards.given()) == {}
        given = wait(rewards, 2 * MOST_AT_ONCE)
        assert time.monotonic() - started < 50  # nobody has waited for an answer
        assert set(given.values()) == {None}
        assert rewards.num_errors == 2 * MOST_AT_ONCE
        rewards.ask_about((2, 0), lambda: ["text"])
        rewards.forget((2, 0))  # its program is over
        time.sleep(2.2)
        assert (2, 0) not in dict(rewards.given())


def test_a_server_that_is_not_there() -> None:
    """Refused connections are errors like any other."""
    rewards = RewardModel("http://127.0.0.1:9", 0.5)
    rewards.ask_about((0, 0), lambda: ["text"])
    assert wait(rewards, 1) == {(0, 0): None}
