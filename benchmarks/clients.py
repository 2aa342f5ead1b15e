"""What a client can do with a question at a server's chat endpoint: sample and vote itself, let its_hub do so, or send a program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from sglang_dynasor.demo import MAX_NEW_TOKENS, TEMPERATURE, read_record, vote
from sglang_dynasor.outcome import Solved
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.sim.peers import More

ITS_HUB = "its_hub 1.2.0"
# A connection that a client keeps must not be closed by the server just when it is used again.
KEEP_ALIVE = {"SGLANG_TIMEOUT_KEEP_ALIVE": "3600"}

Question = dict[str, Any]
Solve = Callable[[Question], Awaitable[Solved]]


class Chat:
    """Ways to solve a question by requests of one's own."""

    def __init__(self, url: str, session: aiohttp.ClientSession, cap: int):
        self.url = url
        self.session = session
        self.cap = cap

    async def ask(self, question: Question, **body: Any) -> dict[str, Any]:
        """The response to one question; `body` says how it is sampled."""
        body |= {
            "model": "default",
            "messages": [{"role": "user", "content": question["question"]}],
            "max_completion_tokens": MAX_NEW_TOKENS,
        }
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:500]}")
            return await response.json()

    async def samples(self, question: Question, **body: Any) -> Solved:
        """The majority of the samples in one response, counted by the client."""
        started = time.perf_counter()
        texts, num_tokens = _read(await self.ask(question, **body))
        return _count(question, texts, num_tokens, started)

    async def stock(self, question: Question) -> Solved:
        return await self.samples(question, n=self.cap, temperature=TEMPERATURE)

    async def single(self, question: Question) -> Solved:
        return await self.samples(question, temperature=TEMPERATURE)

    async def greedy(self, question: Question) -> Solved:
        return await self.samples(question, temperature=0)

    async def loop(self, question: Question, more: More) -> Solved:
        """One request a sample, as many more as `more` says whenever a wave of them is there."""
        started = time.perf_counter()
        texts: list[str] = []
        num_tokens = 0
        while (num := more([find(text) for text in texts], len(texts), self.cap)) is not None:
            for response in await asyncio.gather(*(self.ask(question, temperature=TEMPERATURE) for _ in range(num))):
                new_texts, new_tokens = _read(response)
                texts, num_tokens = texts + new_texts, num_tokens + new_tokens
        return _count(question, texts, num_tokens, started)

    async def program(self, question: Question, field: dict[str, Any]) -> Solved:
        started = time.perf_counter()
        field = {"branches": self.cap, "answer": "hash", **field}
        response = await self.ask(
            question, temperature=TEMPERATURE, return_meta_info=True, custom_params={"dynasor": field}
        )
        record = response["choices"][0]["meta_info"]["dynasor"]
        return read_record(question, record, time.perf_counter() - started)


@asynccontextmanager
async def chat(url: str, cap: int) -> AsyncIterator[Chat]:
    """A client with as many connections as it needs, which waits as long as it takes."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Chat(url, session, cap)


class Hub:
    """its_hub's self-consistency at the same endpoint, as shipped but for its orchestrator's limit."""

    def __init__(self, url: str, cap: int):
        import its_hub

        self.cap = cap
        self.model = its_hub.OpenAICompatibleLanguageModel(
            f"{url}/v1", "none", "default", temperature=TEMPERATURE, max_completion_tokens=MAX_NEW_TOKENS
        )
        # Its default limit, 32, waits in the threads of the event loop and hangs at 16 questions of 16 samples.
        self.orchestrator = its_hub.LMOrchestrator(max_concurrency=-1)
        settings: dict[str, Any] = {
            "consistency_space_projection_func": projection,
            "orchestrator": self.orchestrator,
        }
        self.algorithms = {
            "doubling": its_hub.AdaptiveSelfConsistency(**settings),
            "beta": its_hub.BetaSelfConsistency(**settings),
        }

    async def doubling(self, question: Question) -> Solved:
        return await self._solve("doubling", question)

    async def beta(self, question: Question) -> Solved:
        """Its tokens are those that its_hub reports: cancelled samples are not among them."""
        return await self._solve("beta", question)

    async def _solve(self, name: str, question: Question) -> Solved:
        started = time.perf_counter()
        result: Any = await self.algorithms[name].ainfer(
            self.model, question["question"], self.cap, return_response_only=False
        )
        key = find(result.the_one["content"] or "")
        num_sent = self.cap if name == "beta" else len(result.responses)
        is_right, latency_s = key == str(question["answer"]), time.perf_counter() - started
        return Solved(key, is_right, result.usage.completion_tokens, num_sent, latency_s, None)


@asynccontextmanager
async def hub(url: str, cap: int) -> AsyncIterator[Hub]:
    made = Hub(url, cap)
    try:
        yield made
    finally:
        await made.model.close()


def check_hub(option: str) -> None:
    """Raise SystemExit unless its_hub and what it needs are installed; `option` does without."""
    try:
        from its_hub import LMOrchestrator  # noqa: F401  (only there with its extra `lm`)
    except ImportError as error:
        raise SystemExit(
            f"error: the rows of {ITS_HUB} need it ({error}); run `pip install -e '.[bench]'`, or leave them out with {option}"
        ) from None


def find(text: str) -> str | None:
    """What votes: two texts with the same of it agree. None: no answer in it."""
    answer = extract_answer(text, "hash")
    return None if answer is None else answer_key(answer)


def projection(text: str) -> str:
    """What its_hub counts as equal: answers as ours; a text without one counts as itself, so that two do not agree."""
    key = find(text)
    return text if key is None else key


def _read(response: dict[str, Any]) -> tuple[list[str], int]:
    """Its texts, and the tokens of all."""
    texts = [choice["message"]["content"] or "" for choice in response["choices"]]
    return texts, response["usage"]["completion_tokens"]


def _count(question: Question, texts: list[str], num_tokens: int, started: float) -> Solved:
    outs = [{"text": text, "meta_info": {"completion_tokens": 0}} for text in texts]
    solved = vote(question, outs, time.perf_counter() - started)
    return Solved(solved.answer, solved.is_right, num_tokens, len(texts), solved.latency_s, None)
