"""SGLang's scheduler as a model: rows, KV tokens, prefill passes that hold up decode steps, retraction, and time.

It answers what `policy/admission.py` asks of an engine; what it decides itself is what SGLang 0.5.23 decides, by the names there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count, islice
from math import inf

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.admission import Admission, Gang, Waiting
from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.pace import Pace
from sglang_dynasor.policy.retraction import siblings, youngest_last
from sglang_dynasor.sim.costs import Costs
from sglang_dynasor.sim.pool import Pool
from sglang_dynasor.sim.ratio import TokenRatio
from sglang_dynasor.sim.request import Request, Size

CLIP_MAX_NEW_TOKENS = 4096  # SGLang reserves no more for a request
PAGE_TOKENS = 1


class Engine:
    """One engine. `programs` starts the branches of a gang; all else is called by who runs the simulation.

    Times are seconds from the begin of the simulation. One call of `step` is one iteration of SGLang's event loop.
    """

    shares_prompts = True

    def __init__(self, size: Size, costs: Costs, config: DynasorConfig):
        self.size, self.costs = size, costs
        self.whole = Room(size.rows, size.pool_tokens)
        self.pool = Pool(size.pool_tokens)
        self.now_s = 0.0
        self.front: list[Request] = []  # branches, in SGLang's queue before all others
        self.plain: list[Request] = []
        self.running: dict[Request, None] = {}
        self.chunked: Request | None = None
        self.make_branches: Callable[[Gang, int], None] = _no_programs
        patience_tokens = config.dynasor_patience_tokens
        self.admission = Admission(
            self,
            size.pool_tokens if patience_tokens < 0 else patience_tokens,
            config.tenant_weights,
            config.dynasor_width,
            config.dynasor_max_price,
        )
        self.pace = Pace()
        self.num_steps = 0  # decode
        self.num_passes = 0
        self.num_retracted = 0
        self.num_generated = 0  # tokens, those included that came after an end
        self.num_wasted = 0  # tokens that came after an end
        self.num_computed = 0  # tokens of prompts, and of what was generated before a retraction
        self._ratio = TokenRatio()
        self._kv_read = 0  # tokens that a decode step reads
        self._is_full = False  # SGLang's batch_is_full: nobody is let in until something leaves
        self._is_new = False  # something was put in front since then
        self._num_seen = 0  # decode steps of which the scheduler has seen the results
        self._ends: list[tuple[int, int, Request]] = []  # heap: step, turn, request
        self._begun: list[Request] = []  # whose first token the scheduler has not seen
        self._ended: list[Request] = []  # whose end it has not seen
        self._entries = count()

    # What admission asks

    @property
    def is_empty(self) -> bool:
        return not self.running and not self.front and self.chunked is None

    @property
    def free_rows(self) -> int:
        return self.size.rows - len(self.running) - len(self.front)

    @property
    def free_tokens(self) -> int:
        queued = sum(self._cost(request).tokens(1) for request in self.front)
        if self.chunked is not None:
            queued += self._cost(self.chunked).tokens(1)
        return int(self.pool.available - self._reserved()) - queued

    @property
    def num_branches(self) -> int:
        return sum(request.gang is not None for request in self.running) + len(self.front)

    @property
    def num_plain_waiting(self) -> int:
        return len(self.plain)

    def has_adapter_room(self, gang: Gang) -> bool:
        return True  # one model serves all

    def waiting(self, num: int) -> Iterator[Waiting]:
        return (Waiting(r.arrival, self.size.max_new_tokens, self._cost(r)) for r in islice(self.plain, num))

    def progress_tokens(self, gang: Gang) -> int:
        return sum(self.generated(request) for request in gang.owner.requests.values())

    def start(self, gang: Gang, num_branches: int) -> None:
        self.make_branches(gang, num_branches)

    def gang_cost(self, prompt_tokens: int) -> Cost:
        """What a program's branches take whose prompt nobody holds."""
        return Cost(prompt_tokens, self._left(0) + 2 * PAGE_TOKENS)

    def _cost(self, request: Request) -> Cost:
        gang = request.gang
        is_cached = gang is not None and gang.is_prompt_cached and not request.done
        num_tokens = 0 if is_cached else request.prompt_tokens + request.done
        return Cost(num_tokens, self._left(request.done) + 2 * PAGE_TOKENS)

    def _left(self, done: int) -> int:
        """Tokens that a request may still generate, as SGLang reserves them."""
        return max(0, min(self.size.max_new_tokens - done, CLIP_MAX_NEW_TOKENS))

    def _reserved(self) -> float:
        return self._ratio.value * sum(self._left(self.generated(request)) for request in self.running)

    # Requests

    def generated(self, request: Request) -> int:
        """Tokens of it that the scheduler has seen."""
        seen = request.done + (max(0, self._num_seen - request.since) if request.is_running else 0)
        return min(seen, request.length)

    def own_tokens(self, request: Request) -> int:
        """KV tokens that it shares with nobody."""
        return request.own + (self.num_steps - request.since if request.is_running else 0)

    def put(self, request: Request) -> None:
        """Queue a branch behind ours and before all others, a plain request behind all."""
        if request.gang is None:
            self.plain.append(request)
        else:
            self.front.append(request)
            self._is_new = True

    def end(self, request: Request) -> int:
        """End it with what it has; return the tokens that it generated. The step under way still carries one that runs."""
        num_tokens = self.generated(request)
        if request.is_over:
            return num_tokens
        if request.is_running:
            request.length = num_tokens
            if not request.is_ending:
                request.is_ending = True
                if self.costs.overlap == "off":
                    self._ends_at(request, self.num_steps + 1)
                else:
                    self._ended.append(request)
            return num_tokens
        if request is self.chunked:
            self.chunked = None
            self.pool.give_back(request.computed, is_kept=False)
            self._let_go(request)
        else:
            (self.plain if request.gang is None else self.front).remove(request)
        request.is_over = True
        request.owner.has_ended(request)
        return num_tokens

    # One iteration

    def step(self, until_s: float = 0.0) -> bool:
        """Let in what fits, then run a prefill pass or a decode step. Returns whether there was anything to run.

        Args:
            until_s: when something comes from outside; until then steps in which nothing can happen are run at once.
        """
        head = self.admission.look()
        if head is not None:
            self.pool.touch(head.owner.prompt)
        if self._is_new:
            self._is_full = self._is_new = False
        batch = self._fill()
        is_idle = not (batch or self.running)
        if is_idle:
            self._ratio.reset()
        begun, ended, num_seen, began_s = self._begun, self._ended, self.num_steps, self.now_s
        self._begun, self._ended = [], []
        if batch:
            self._prefill(batch)
        elif not is_idle:
            self._decode()
        if self.costs.overlap == "off":
            begun, ended, num_seen = self._begun, self._ended, self.num_steps
            self._begun, self._ended = [], []
        ended_s = self.now_s
        if self.costs.overlap == "device":
            self.now_s = began_s
        self._see(begun, ended, num_seen)
        self.now_s = ended_s
        if self.running and not (batch or begun or ended):
            self._decode_on(until_s)
        return not is_idle or bool(begun or ended)

    def _see(self, begun: list[Request], ended: list[Request], num_seen: int) -> None:
        """The scheduler sees what a step has brought: KV is free, and owners are told."""
        self._num_seen = num_seen
        left = [request for request in ended if request.is_running]  # but for those retracted meanwhile
        for request in left:
            self._leave(request)
        for request in left:
            request.owner.has_ended(request)
        for request in begun:
            if request.is_running and not request.is_ending:
                request.owner.has_output(request)

    def _fill(self) -> list[tuple[Request, int]]:
        """The next prefill pass: requests, and how many tokens of each are computed. As SGLang's PrefillAdder decides."""
        if not self.running:
            self._is_full = False
        if self.chunked is None and (self._is_full or not (self.front or self.plain)):
            return []
        num_rows = self.size.rows - len(self.running)
        if num_rows <= 0 and self.chunked is None:
            self._is_full = True
            return []
        tokens_left = self.pool.available - self._reserved() - self.admission.promised_tokens
        pass_left = self.size.pass_tokens
        plain_left, latest_plain = self.admission.plain_rows, self.admission.latest_plain
        batch: list[tuple[Request, int]] = []
        if self.chunked is not None:
            num_left = max(1, self._to_compute(self.chunked) - self.chunked.computed)
            num_now = min(num_left, pass_left)
            batch.append((self.chunked, num_now))
            pass_left -= num_now
            tokens_left -= num_now + (self._left(self.chunked.done) if num_now == num_left else 0)
            if num_now == num_left:
                self.chunked = None
        for request in [*self.front, *self.plain]:
            if pass_left <= 0:
                break
            if len(batch) >= num_rows:
                self._is_full = True
                break
            if request.gang is None and (plain_left == 0 or request.arrival > latest_plain):
                break
            num_all = self._to_compute(request)
            needed = num_all + self._left(request.done) + PAGE_TOKENS
            available = self.pool.available
            if self.pool.holds(request.prompt):
                self._hold(request)
                # It cannot be given up any more, but for its last token, which is not taken from the cache.
                tokens_left -= max(0, available - self.pool.available - 1)
            # As in engine/room.py: where nothing runs, what is promised to those behind it does not hold a branch back.
            lifted = 0 if self.running or batch or request.gang is None else self.admission.promised_tokens
            if needed >= tokens_left + lifted:
                self._let_go(request)
                if batch or self.running:
                    self._is_full = True
                    break
                raise ConfigError(
                    f"a request of {request.prompt_tokens} prompt tokens that may generate {self.size.max_new_tokens} does not "
                    f"fit into a pool of {self.size.pool_tokens}; give the engine more tokens, or allow less"
                )
            num_now = min(num_all, pass_left)
            batch.append((request, num_now))
            pass_left -= num_now
            tokens_left -= needed
            (self.plain if request.gang is None else self.front).remove(request)
            plain_left = None if plain_left is None else plain_left - (request.gang is None)
            if num_now < num_all:
                self.chunked = request
        return batch

    def _to_compute(self, request: Request) -> int:
        """Tokens that a prefill pass computes for it: at least the last, for its logits."""
        found = request.prompt_tokens if self.pool.holds(request.prompt) else 0
        return max(1, request.prompt_tokens + request.done - found)

    def _prefill(self, batch: list[tuple[Request, int]]) -> None:
        num_tokens = sum(num for _, num in batch)
        self.now_s += self.costs.prefill(len(batch), num_tokens)
        self.num_passes += 1
        self.num_computed += num_tokens
        for request, num in batch:
            if request is self.chunked:
                self.pool.take(num)
                request.computed += num
                continue
            self.pool.give_back(request.computed, is_kept=False)
            request.computed = 0
            if not request.holds_prompt:
                self._hold(request)
            request.own, request.since = request.done, self.num_steps
            self.pool.take(request.own)
            if request.length:
                request.done += 1
                self.num_generated += 1
            request.is_running = True
            self.running[request] = None
            self._kv_read += request.prompt_tokens + request.own
            self._begun.append(request)
            if request.done >= request.length:
                request.is_ending = True
                self._ended.append(request)
            else:
                self._ends_at(request, request.since + request.length - request.done)

    def _decode(self) -> None:
        if self.pool.available < len(self.running):
            self._retract()
        self._decode_steps(1, inf)
        while self._ends and self._ends[0][0] <= self.num_steps:
            _, turn, request = heapq.heappop(self._ends)
            if request.is_running and request.turn == turn:
                request.is_ending = True
                self._ended.append(request)

    def _decode_on(self, until_s: float) -> None:
        """Go on to the step before the next end, where nobody waits and nothing is to be seen: as `step` would, but faster."""
        admission = self.admission
        if self.front or self.plain or self.chunked or admission.order.num_waiting or admission.promised:
            return
        if self._begun or self._ended or not self._ends:
            return
        self._decode_steps(
            min(self._ends[0][0] - self.num_steps - 1, self.pool.available // len(self.running)), until_s
        )
        self._num_seen = self.num_steps - (self.costs.overlap != "off")

    def _decode_steps(self, num_steps: int, until_s: float) -> None:
        """So many steps with the same rows, fewer if something comes."""
        num_rows, costs, pace = len(self.running), self.costs, self.pace
        num_done = 0
        while num_done < num_steps and self.now_s < until_s:
            seconds = costs.decode(num_rows, self._kv_read)
            self.now_s += seconds
            self._kv_read += num_rows
            self._ratio.decay()
            num_done += 1
            pace.see(num_rows, seconds)
            rows = pace.news(self.admission.fixed_rows)
            if rows is not None:
                self.admission.fixed_rows = rows
        self.num_steps += num_done
        self.num_generated += num_done * num_rows
        self.pool.take(num_done * num_rows)

    def _ends_at(self, request: Request, step: int) -> None:
        request.turn = next(self._entries)
        heapq.heappush(self._ends, (step, request.turn, request))

    def _leave(self, request: Request) -> None:
        """It runs no more, and its KV stays as long as there is room."""
        own = self.own_tokens(request)
        self._stop_running(request)
        self._close(request)
        self._is_full = False
        self.pool.give_back(own, is_kept=True)
        self._let_go(request)

    def _close(self, request: Request) -> None:
        self.num_wasted += request.done - request.length
        request.done = request.length
        request.is_over = True

    def _stop_running(self, request: Request) -> None:
        self._kv_read -= request.prompt_tokens + self.own_tokens(request)
        request.done += self.num_steps - request.since
        request.is_running = False
        del self.running[request]

    def _retract(self) -> None:
        """Give KV back until a step fits, as SGLang does: those that generated least first, programs whole and youngest first."""
        requests = list(self.running)
        order = sorted(
            range(len(requests)), key=lambda i: (self.generated(requests[i]), -requests[i].prompt_tokens), reverse=True
        )
        order = youngest_last(order, lambda i: requests[i].number)
        retracted: list[Request] = []
        while len(order) > 1 and (not retracted or self.pool.available < len(order)):
            retracted.append(requests[order.pop()])
            self._give_up(retracted[-1])
        left = list(self.running)
        numbers = {request.number for request in retracted if request.number}
        for index in siblings([request.number or None for request in left], numbers):
            retracted.append(left[index])
            self._give_up(left[index])
        if self.pool.available < len(self.running):
            raise ConfigError(
                f"one request alone needs more than the pool of {self.size.pool_tokens} tokens; give the engine more"
            )
        num_generated = sum(map(self.generated, self.running))
        self._ratio.learn(num_generated, len(self.running), self.size.max_new_tokens)
        self.num_retracted += len(retracted)
        for request in retracted:
            if request.is_ending:
                self._close(request)
                request.owner.has_ended(request)
            elif request.gang is not None:
                self.put(request)
            else:
                self.plain.append(request)

    def _give_up(self, request: Request) -> None:
        own = self.own_tokens(request)
        self._stop_running(request)
        self.pool.give_back(own, is_kept=False)
        self._let_go(request)

    def _hold(self, request: Request) -> None:
        self.pool.hold(request.prompt, request.prompt_tokens)
        request.holds_prompt = True

    def _let_go(self, request: Request) -> None:
        if request.holds_prompt:
            request.holds_prompt = False
            self.pool.let_go(request.prompt)


def _no_programs(gang: Gang, num_branches: int) -> None:
    raise AssertionError("nobody makes branches here")
