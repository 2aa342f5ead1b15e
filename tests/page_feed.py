"""Programs that nobody runs, for who tests or pictures the live page: as many as wanted, the same from each seed."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sglang_dynasor.observe.recent import Recent
from sglang_dynasor.page.files import FOLDER, PAGE, serve_file
from sglang_dynasor.page.stream import EventStream, event
from sglang_dynasor.page.watching import Watching

ALGORITHMS = ("self_consistency", "self_consistency", "best_of_n", "long_cot")
TENANTS = ("", "checkout", "tutor", "nightly-evals")
STEP_TOKENS = 13  # of each running branch between two looks
PER_STEP_S = 0.5


class Feed:
    """A server as its live page sees it. Each look is half a second of its life."""

    def __init__(self, num_programs: int = 12, cap: int = 16, seed: int = 0, has_texts: bool = False):
        self.dice = random.Random(seed)
        self.num_programs, self.cap, self.has_texts = num_programs, cap, has_texts
        self.recent = Recent()
        self.programs: list[dict[str, Any]] = []
        self.num_looks = 0
        self.num_made = 0
        self.status = {"num_programs": 0, "num_certain": 0, "num_expired": 0, "num_tokens": 0, "num_policy_errors": 0}
        self.watching = Watching(self.look)

    def make(self, **more: Any) -> dict[str, Any]:
        """A new program; `more` overrides what it says."""
        self.num_made += 1
        algorithm = self.dice.choice(ALGORITHMS)
        cap = 4 if algorithm == "long_cot" else self.cap
        return {
            "id": f"{self.dice.getrandbits(64):016x}{self.num_made:04x}", "algorithm": algorithm, "tenant": self.dice.choice(TENANTS) or None,
            "state": "waiting", "age_s": 0.0, "cap": cap, "width": self.dice.choice((None, None, 4)), "gang": 4, "stop_rule": "predictive 0.05",
            "num_tokens": 0, "num_probe_tokens": 0, "certaindex": 0.0, "risk": 1.0, "price": None, "votes": [], "branches": [],
            "answers": [str(self.dice.randint(2, 400)) for _ in range(3)], **more,
        }  # fmt: skip

    def step(self) -> None:
        """Half a second."""
        self.num_looks += 1
        while len(self.programs) < self.num_programs:
            self.programs.append(self.make())
        rows = 64 if self.num_programs < 50 else 512
        for program in self.programs:
            program["age_s"] += PER_STEP_S
            self._run(program)
            in_flight = [b for b in program["branches"] if b["state"] in ("running", "queued", "probed")]
            at_once = min(program["width"] or 5, program["cap"] - len(program["branches"]) + len(in_flight))
            used = sum(b["state"] in ("running", "probed") for p in self.programs for b in p["branches"])
            if program["certaindex"] < 0.95 and used + at_once <= rows:
                for _ in range(at_once - len(in_flight)):
                    state = "queued" if self.dice.random() < 0.15 else "running"
                    program["branches"].append(
                        {
                            "state": state,
                            "num_tokens": 0,
                            "answer": None,
                            "finish_reason": None,
                            "reward": None,
                            "trials": [],
                        }
                    )
                program["state"] = "running" if program["branches"] else "waiting"
        for program in [p for p in self.programs if self._is_over(p)]:
            self.programs.remove(program)
            self._end(program)

    def _run(self, program: dict[str, Any]) -> None:
        for branch in program["branches"]:
            if branch["state"] == "queued" and self.dice.random() < 0.5:
                branch["state"] = "running"
            if branch["state"] in ("judged", "compared"):
                branch["state"] = "finished"
            if branch["state"] == "probed":
                branch["state"] = "running"
            if branch["state"] != "running":
                continue
            branch["num_tokens"] += self.dice.randint(STEP_TOKENS // 2, STEP_TOKENS * 2)
            fate = self.dice.random()
            if branch["num_tokens"] > 90 and fate < 0.16:
                self._finish(program, branch)
            elif program["algorithm"] == "long_cot" and fate < 0.3:
                branch["state"] = "probed"
                branch["trials"].append(
                    [branch["num_tokens"], program["answers"][0], round(self.dice.uniform(0.6, 1), 3)]
                )
        program["num_tokens"] = sum(b["num_tokens"] for b in program["branches"])

    def _finish(self, program: dict[str, Any], branch: dict[str, Any]) -> None:
        fate = self.dice.random()
        branch["state"] = "judged" if program["algorithm"] == "best_of_n" else "finished"
        branch["finish_reason"] = "length" if fate < 0.08 else "stop"
        if fate < 0.08:
            return
        branch["answer"] = program["answers"][0 if fate < 0.72 else 1 if fate < 0.9 else 2]
        branch["reward"] = round(self.dice.random(), 3) if program["algorithm"] == "best_of_n" else None
        votes = dict(program["votes"])
        votes[branch["answer"]] = votes.get(branch["answer"], 0) + 1
        program["votes"] = sorted(([a, n] for a, n in votes.items()), key=lambda vote: -vote[1])
        counts = [n for _, n in program["votes"]]
        lead = counts[0] - (counts[1] if len(counts) > 1 else 0)
        program["risk"] = round(min(1.0, 0.55**lead + 0.04 * (len(counts) - 1)), 4)
        program["certaindex"] = round(1 - program["risk"], 4)

    def _is_over(self, program: dict[str, Any]) -> bool:
        has_left = any(b["state"] in ("running", "queued", "probed") for b in program["branches"])
        return program["certaindex"] >= 0.95 or (len(program["branches"]) == program["cap"] and not has_left)

    def _end(self, program: dict[str, Any]) -> None:
        for branch in program["branches"]:
            if branch["finish_reason"] is None:
                branch.update(state="ended", finish_reason="ended")
        votes = [{"answer": answer, "votes": num} for answer, num in program["votes"]]
        places = {vote["answer"]: place for place, vote in enumerate(votes)}
        record = {
            "program": program["id"], "algorithm": program["algorithm"], "answer": votes[0]["answer"] if votes else None,
            "certaindex": program["certaindex"], "risk": program["risk"], "votes": votes, "cap": program["cap"], "width": program["width"],
            "branch_votes": [places.get(b["answer"]) for b in program["branches"]], "num_branches": len(program["branches"]),
            "num_tokens": program["num_tokens"], "branch_tokens": [b["num_tokens"] for b in program["branches"]],
            "finish_reasons": [b["finish_reason"] for b in program["branches"]], "stop_rule": program["stop_rule"],
            "stop_reason": "certain" if program["certaindex"] >= 0.95 else "cap",
            **({"tenant": program["tenant"]} if program["tenant"] else {}),
            **({"rewards": [b["reward"] for b in program["branches"]]} if program["algorithm"] == "best_of_n" else {}),
            **program.get("record", {}),
        }  # fmt: skip
        self.recent.add(record, time_s=1_795_000_000 + PER_STEP_S * self.num_looks, latency_s=program["age_s"])
        self.status["num_programs"] += 1
        self.status["num_certain"] += record["stop_reason"] == "certain"
        self.status["num_tokens"] += record["num_tokens"]

    def frame(self) -> dict[str, Any]:
        """What a look finds now."""
        used = sum(b["state"] in ("running", "probed") for p in self.programs for b in p["branches"])
        kv = sum(p["num_tokens"] for p in self.programs)
        programs = [{key: value for key, value in p.items() if key not in ("answers", "record")} for p in self.programs]
        of = 64 if self.num_programs < 50 else 512
        scheduler = {
            "rank": 0, "step": 40 * self.num_looks, "rows": {"used": used, "of": of}, "kv_tokens": {"used": kv, "of": 400 * of},
            "num_queued": sum(b["state"] == "queued" for p in self.programs for b in p["branches"]), "programs": programs, "status": self.status,
        }  # fmt: skip
        return {
            "time_s": 1_795_000_000 + PER_STEP_S * self.num_looks,
            "schedulers": [scheduler],
            "sums": self.recent.sums(),
        }

    async def look(self) -> tuple[bytes, float]:
        self.step()
        return event("state", self.frame()), 0.0

    async def events(self) -> AsyncGenerator[bytes]:
        """What one viewer is sent."""
        yield event("hello", {"version": "0", "model": "tiny-reasoner", "has_texts": self.has_texts})
        newest = 0
        async with aclosing(self.watching.frames()) as frames:
            async for frame in frames:
                newest, rows = self.recent.since(newest)
                yield frame + event("finished", rows) if rows else frame


def feed_app(feed: Feed) -> Starlette:
    """The live page over `feed`."""

    async def stream(request: Request) -> Response:
        return EventStream(feed.events())

    async def opened(request: Request) -> Response:
        return JSONResponse(
            {"texts": {"prompt": "Q: <b>how many?</b>", "branches": {"0": "<script>alert(1)</script>\n#### 4"}}}
        )

    routes = [
        Route(PAGE, serve_file),
        Route(FOLDER + "{name}", serve_file),
        Route(f"{PAGE}/events", stream),
        Route(f"{PAGE}/opened", opened),
    ]
    return Starlette(routes=routes)
