"""A long overload by clients that misbehave, after which nothing may be left behind.

    python benchmarks/soak.py --minutes 15 --csv benchmarks/results/soak.csv

A real server with `--dynasor-strict` (a fault of ours ends it) and SGLang's memory checks on, in every step and when idle
(a leak ends it), gets twice the requests it sustains: programs of all difficulties, some with deadlines and tenants, and
plain requests. Some are aborted, some clients hang up, some fields are malformed and must be HTTP 400; when too many are
outstanding the oldest client hangs up. Then it drains, and what must be zero is checked: exit code 1 if it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from forked import REASONER
from machine import machine
from rows import percentile, write_rows
from server import Server

from sglang_dynasor.demo import program_params, read_questions, show

MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",  # rows and KV tokens add up, or the scheduler ends
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",  # the same after every step
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",  # no page is freed twice or used after
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}
SERVER = ("--scheduler", "dynasor", "--dynasor-strict", "--dtype", "float32", "--log-level", "error",
          "--max-running-requests", "64", "--max-total-tokens", "32768", "--dynasor-patience-tokens", "8000")  # fmt: skip
OVERLOAD = 2
MAX_OUTSTANDING = 300
NUM_WARM_OUTSTANDING = 16  # of the closed loop that measures what the server sustains
MAX_GROWTH_MB = 100
MAX_WRONG = 50  # wrong answers after which there is nothing more to learn: the server is down, say
SHARE_ABORTED = SHARE_HUNG_UP = SHARE_MALFORMED = 0.05
SHARE_PLAIN = 0.2
SHARE_THINKING = SHARE_JUDGED = SHARE_COMPARED = SHARE_BUDGET = 0.1
END = "</think>\n####"
THOUGHT = {"algorithm": "long_cot", "think_end": END, "probe_suffix": END, "probe_tokens": 24, "min_tokens": 24}
JUDGED = {"vote": "reward", "judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
MALFORMED: tuple[Any, ...] = (
    7, "majority", [], {"branches": 0}, {"branches": "many"}, {"branches": 10**9}, {"widht": 4}, {"width": -1},
    {"stop": "later"}, {"stop": "beta:2"}, {"answer": "regex:("}, {"algorithm": None}, {"program": "no spaces"},
    {"deadline_s": -1}, {"deadline_s": "soon"}, {"tenant": 5},
)  # fmt: skip


class Soak:
    """The clients of one server, and what became of them."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int):
        self.session, self.url = session, url
        self.rng = random.Random(seed)
        self.questions = read_questions(REASONER, 600)
        self.events: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()  # answers a client must not get
        self.latencies_s: list[float] = []  # of programs answered in peace
        self.outstanding: dict[str, asyncio.Task[None]] = {}  # by rid, the oldest first
        self.helpers: set[asyncio.Task[None]] = set()
        self.num_sent = 0

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return await response.json()

    def body(self, rid: str) -> dict[str, Any]:
        """A well-formed request: a program or a plain one."""
        prompt = self.rng.choice(self.questions)["prompt"]
        if self.rng.random() < SHARE_PLAIN:
            return {"rid": rid, "text": prompt, "sampling_params": {"temperature": 1, "max_new_tokens": 200}}
        cap = self.rng.choice((4, 16, 32))
        field: dict[str, Any] = {}
        if self.rng.random() < 0.2:
            field["deadline_s"] = self.rng.uniform(0.2, 10)
        if self.rng.random() < 0.5:
            field["tenant"] = self.rng.choice("abc")
        if self.rng.random() < 0.2:
            field["stop"] = "never"
        if self.rng.random() < 0.2:
            field["width"] = self.rng.randint(1, cap)
        if self.rng.random() < SHARE_THINKING:
            field = {key: field[key] for key in field if key in ("deadline_s", "tenant")} | THOUGHT
            prompt, cap = prompt + "<think>\n", self.rng.choice((1, 1, 4))
        elif self.rng.random() < SHARE_JUDGED:
            field |= JUDGED
        elif self.rng.random() < SHARE_COMPARED:
            field["equal"] = "symbolic"
        elif self.rng.random() < SHARE_BUDGET and "width" not in field:
            field["budget_tokens"] = self.rng.randint(200, 3000)
        return {"rid": rid, "text": prompt, "sampling_params": program_params(cap, **field)}

    async def ask(self, body: dict[str, Any], may_fail: bool = False) -> None:
        """Send one well-formed request and look at the answer; only one that somebody aborted may fail."""
        started = time.perf_counter()
        async with self.session.post(f"{self.url}/generate", json=body) as response:
            out = await response.json()
        is_program = "custom_params" in body["sampling_params"]
        kind = "programs" if is_program else "plain requests"
        info = out.get("meta_info", {}) if isinstance(out, dict) else {}
        is_whole = response.status == 200 and info.get("finish_reason", {}).get("type") in ("stop", "length")
        if is_whole and ("dynasor" in info) == is_program:
            self.events[f"{kind} answered"] += 1
            if is_program and not may_fail:
                self.latencies_s.append(time.perf_counter() - started)
        elif may_fail and not is_whole and response.status in (200, 400, 503):
            self.events[f"{kind} aborted"] += 1
        else:
            self.wrong[f"{kind}: HTTP {response.status}, {str(out)[:200]}"] += 1

    async def ask_malformed(self) -> None:
        params = {"max_new_tokens": 20, "custom_params": {"dynasor": self.rng.choice(MALFORMED)}}
        async with self.session.post(f"{self.url}/generate", json={"text": "Q", "sampling_params": params}) as response:
            text = await response.text()
        self.events["malformed fields"] += 1
        if response.status != 400 or "dynasor" not in text:
            self.wrong[f"malformed {params['custom_params']}: HTTP {response.status}, {text[:200]}"] += 1

    async def abort_later(self, rid: str) -> None:
        await asyncio.sleep(self.rng.uniform(0, 5))
        self.events["aborts sent"] += 1
        async with self.session.post(f"{self.url}/abort_request", json={"rid": rid}) as response:
            if response.status != 200:
                self.wrong[f"abort: HTTP {response.status}"] += 1

    async def hang_up_later(self, rid: str) -> None:
        await asyncio.sleep(self.rng.uniform(0, 5))
        self.hang_up(rid, "clients hung up")

    def hang_up(self, rid: str, why: str) -> None:
        """Close the connection of a request, if it is still unanswered."""
        if rid in self.outstanding:
            self.outstanding.pop(rid).cancel()
            self.events[why] += 1

    def arrive(self) -> None:
        """One arrival of the overload."""
        self.num_sent += 1
        rid = f"soak-{self.num_sent}."  # ends in a dot: SGLang aborts by prefix
        chance = self.rng.random()
        if chance < SHARE_MALFORMED:
            self.start(self.ask_malformed())
            return
        is_aborted = chance < SHARE_MALFORMED + SHARE_ABORTED
        task = asyncio.create_task(self.ask(self.body(rid), may_fail=is_aborted))
        self.outstanding[rid] = task
        task.add_done_callback(lambda done: self.ended(rid, done))
        if is_aborted:
            self.start(self.abort_later(rid))
        elif chance < SHARE_MALFORMED + SHARE_ABORTED + SHARE_HUNG_UP:
            self.start(self.hang_up_later(rid))
        if len(self.outstanding) > MAX_OUTSTANDING:
            self.hang_up(next(iter(self.outstanding)), "oldest clients hung up")

    def start(self, helper: Any) -> None:
        task = asyncio.create_task(helper)
        self.helpers.add(task)
        task.add_done_callback(self.helped)

    def helped(self, task: asyncio.Task[None]) -> None:
        self.helpers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong[f"{type(error).__name__}: {error}"] += 1

    def ended(self, rid: str, task: asyncio.Task[None]) -> None:
        self.outstanding.pop(rid, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong[f"{type(error).__name__}: {error}"] += 1

    async def sustained(self, seconds: float) -> float:
        """Requests per second with always some waiting."""
        ends_at, num_done = time.perf_counter() + seconds, 0

        async def client(index: int) -> None:
            nonlocal num_done
            while time.perf_counter() < ends_at:
                await self.ask(self.body(f"warm-{index}-{num_done}."))  # an id is its tenant's for good
                num_done += 1

        started = time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(NUM_WARM_OUTSTANDING)))
        return num_done / (time.perf_counter() - started)

    async def overload(self, rate: float, minutes: float) -> None:
        """Poisson arrivals for so long, then wait until all have ended."""
        at_s = started = told = time.perf_counter()
        while at_s < started + 60 * minutes and self.wrong.total() < MAX_WRONG:
            await asyncio.sleep(at_s - time.perf_counter())
            self.arrive()
            at_s += self.rng.expovariate(rate)
            if time.perf_counter() > told + 60:
                told = time.perf_counter()
                print(
                    f"{(told - started) / 60:.0f} min: {len(self.outstanding)} outstanding, {dict(self.events)}",
                    flush=True,
                )
        print(f"draining {len(self.outstanding)}", flush=True)
        while left := [*self.outstanding.values(), *self.helpers]:
            await asyncio.wait(left)

    async def leftovers(self) -> dict[str, float]:
        """What the server still holds; all of it should be 0. SGLang looks for clients that hung up every few seconds.

        The cache is flushed last: that also clears what leaked.
        """
        for _ in range(60):
            (status,) = await self.get("/dynasor/status")
            (load,) = (await self.get("/v1/loads"))["loads"]
            left = {
                key: status.get(key, 0) for key in ("num_held_programs", "num_branches_inside", "num_waiting_programs")
            }
            # What the prefix cache may evict does not count as used.
            left |= {key: load[key] for key in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
            if not any(left.values()):
                break
            await asyncio.sleep(1)
        async with self.session.post(f"{self.url}/flush_cache", params={"timeout": 30}) as response:
            left["cache not flushed"] = int(response.status != 200)
        return left | {"policy errors": status["num_policy_errors"]}


def scheduler_rss_mb(server: Server) -> float:
    """Of the largest process: the scheduler holds the model and the KV pool."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return max(child.memory_info().rss for child in children) / 2**20


async def soak(server: Server, minutes: float, warm_s: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Run the whole thing; return its row, and what is wrong."""
    # A connection each: one that is kept may be closed by a busy server just when the next request goes out on it.
    no_limit = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=no_limit, timeout=aiohttp.ClientTimeout(total=None)) as session:
        clients = Soak(session, server.url, seed)
        rate = OVERLOAD * await clients.sustained(warm_s)
        clients.events.clear()
        clients.latencies_s.clear()
        before_mb = scheduler_rss_mb(server)
        print(f"{rate:.1f} requests per second for {minutes:g} min", flush=True)
        await clients.overload(rate, minutes)
        left = await clients.leftovers()
        growth_mb = scheduler_rss_mb(server) - before_mb
        await clients.ask(clients.body("still-there."))
    problems = [f"{key} {value}" for key, value in left.items() if value]
    if growth_mb > MAX_GROWTH_MB:
        problems.append(f"memory grew {growth_mb:.0f} MB")
    problems += [f"{num}x {text}" for text, num in clients.wrong.items()]
    row = {
        "minutes": minutes,
        "requests per s": f"{rate:.1f}",
        **dict(sorted(clients.events.items())),
        "p50 s of answered": f"{percentile(clients.latencies_s, 0.5):.1f}",
        "p99 s of answered": f"{percentile(clients.latencies_s, 0.99):.1f}",
        **left,
        "memory grew MB": f"{growth_mb:.0f}",
        "problems": len(problems),
    }
    return row, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--warm-seconds", type=float, default=20, help="of the closed loop that measures the rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    facts = {"model": "tiny reasoner", **machine()}
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"starting the server; it logs to {log}", flush=True)
    server = Server(log, *SERVER, environment=MEMORY_CHECKS)
    try:
        server.wait()
        row, problems = asyncio.run(soak(server, args.minutes, args.warm_seconds, args.seed))
    finally:
        server.stop()
    show([{"what": key, "value": value} for key, value in row.items()])
    if args.csv:
        write_rows(args.csv, [row | facts])
    if problems:
        sys.exit("error: the soak left something behind or got a wrong answer:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
