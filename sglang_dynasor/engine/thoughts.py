"""Running thoughts are asked for their answer, and closed once it stands (policy/thought.py decides both)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import Asking, BranchTag, LiveProgram, ProbeTag, branch_tag_of, tag_of
from sglang_dynasor.engine.probe import (
    MOST_TRIAL_TOKENS,
    ThoughtTokens,
    closed,
    cost_tokens,
    is_answered,
    is_over,
    make_probe,
    read_trial,
    says,
    thought_tokens,
)
from sglang_dynasor.engine.readings import Readings
from sglang_dynasor.policy.reading import reading_chars
from sglang_dynasor.policy.thought import is_place_to_ask, is_wave_due
from sglang_dynasor.policy.wave import chains_to_ask

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import Req


class Thoughts:
    """Who looks after probes, and after when the branches are asked that they ask.

    Args:
        line_ends: the tokens that end a line.
        go_on: queues a branch in place of a program's branch `index`, which begins with the tokens given; the last
            argument is what that one has generated.
    """

    def __init__(
        self,
        scheduler: Any,
        inside: Inside,
        ends: Ends,
        readings: Readings,
        line_ends: Callable[[], Collection[int]],
        go_on: Callable[[LiveProgram, int, array[int], int], None],
    ):
        self.scheduler = scheduler
        self.inside = inside
        self.admission = inside.admission
        self.ends = ends
        self.readings = readings
        self.num_waves = 0
        self.num_tokens_read = 0  # whose KV the thoughts had that probes have asked
        self.num_tokens_cached = 0  # of those, found in the radix cache
        self._line_ends = line_ends
        self._go_on = go_on
        self._due: list[BranchTag] = []  # to be asked before the next prefill batch
        self.made: list[tuple[Req, ProbeTag]] = []  # probes that wait to be computed together
        self._num_steps = 0  # that the first of them has waited

    @property
    def may_ask(self) -> bool:
        """Whether the KV of a running thought can be shared; where it cannot, thoughts are thought to their end."""
        tree_cache = self.scheduler.tree_cache
        return not (tree_cache.disable or tree_cache.supports_mamba())

    # Thoughts

    def begin(self, tag: BranchTag) -> None:
        """Have a fresh branch asked now and then, if it is a thought."""
        if tag.live.program.spec.thought is not None and self.may_ask:
            asking = Asking()
            asking.at_tokens = self._next(tag.live, asking)
            tag.asking = asking
            self.admission.num_thoughts += 1

    def stop(self, tag: BranchTag) -> None:
        """Ask it no more. No harm if nobody does."""
        if tag.asking is not None:
            tag.asking = None
            self.admission.num_thoughts -= 1

    def note_output(self, req: Req, tag: BranchTag) -> None:
        """A branch goes on: it may have come to the place where it is asked next."""
        if tag.asking is not None and tag.asking.is_stale:
            tag.asking.is_stale, tag.asking.at_tokens = False, self._next(tag.live, tag.asking)
        if tag.asking is not None and tag.asking.at_tokens <= len(req.output_ids) and self._is_place(req, tag):
            self._due.append(tag)

    def _is_place(self, req: Req, tag: BranchTag) -> bool:
        """After the word asked for; else as policy says."""
        assert tag.asking is not None
        thought = tag.live.program.spec.thought
        if thought is not None and thought.word:
            return req.output_ids[-1] in self._tokens(tag.live).word_ends and says(req, thought.word)
        is_line_end = req.output_ids[-1] in self._line_ends()
        return is_place_to_ask(len(req.output_ids), tag.asking.at_tokens, is_line_end=is_line_end)

    def _next(self, live: LiveProgram, asking: Asking) -> int:
        chains = live.program.chains
        assert chains is not None
        num_suffix_tokens = len(self._tokens(live).suffix) + 1  # the KV of the thought's last token is not there
        return chains.next_turn_tokens(asking.num_tokens, asking.costs, num_suffix_tokens)

    def _tokens(self, live: LiveProgram) -> ThoughtTokens:
        spec = live.program.spec
        assert spec.thought is not None
        return thought_tokens(spec.thought, spec.answer, self.scheduler.tokenizer)

    # Probes

    def make_due(self) -> None:
        """Make the probes whose thoughts have come to their place. Before SGLang fills its next prefill batch."""
        due, self._due = self._due, []
        for live in dict.fromkeys(tag.live for tag in due):  # in order; once for each program
            self.ends.guarded(live, self._call)
        for tag in due:
            self.ends.guarded(tag.live, lambda live, tag=tag: self._ask(live, tag))

    def _call(self, live: LiveProgram) -> None:
        """Call the chains that are asked together, if enough of them have come to their turn.

        Each that is called is asked at its next place, whatever becomes of the others: nobody waits for one that was retracted or
        has ended.
        """
        chains = live.program.chains
        if chains is None or not chains.are_asked_together:
            return
        thinking = dict[int, tuple[Asking, int]]()
        for index, req in live.reqs.items():
            asking = branch_tag_of(req).asking
            if asking is not None and req.kv.holds_kv and not req.finished() and req.to_finish is None:
                thinking[index] = asking, len(req.output_ids)
        ready = [index for index, (asking, num_tokens) in thinking.items() if asking.at_tokens <= num_tokens]
        for index in chains_to_ask(ready, thinking):
            asking, num_tokens = thinking[index]
            if not asking.is_called:
                asking.is_called, asking.at_tokens = True, num_tokens  # from here on it waits for the end of its line

    def _ask(self, live: LiveProgram, tag: BranchTag) -> None:
        """Ask a running thought for its answer, unless it is over, was retracted, or is being asked."""
        program, req, asking = live.program, live.reqs.get(tag.index), tag.asking
        if req is None or asking is None or tag_of(req) is not tag or not self.ends.programs.holds(live):
            return
        if req.finished() or req.to_finish is not None or not req.kv.holds_kv or tag.index in live.probes:
            return  # it comes by again with the next step
        if program.chains is not None and program.chains.are_asked_together:
            if not asking.is_called or not self._is_place(req, tag):
                return  # likewise
            asking.is_called = False
        tokens, num_tokens = self._tokens(live), len(req.output_ids)
        if is_over(req, tokens, asking.num_tokens):
            self.stop(tag)  # it is writing its answer
            return
        asking.num_tokens = num_tokens
        asking.at_tokens = self._next(live, asking)
        aside = ProbeTag(live, tag.index, self, num_thought_tokens=num_tokens)
        is_line_end = req.output_ids[-1] in self._line_ends()
        probe = make_probe(self.scheduler, req, tokens, self.inside.new_rid(), aside, is_line_end=is_line_end)
        if probe is not None:
            assert_same("dynasor asks %s at %d tokens", req.rid, num_tokens)
            live.probes[tag.index] = probe
            program.num_probes += 1
            self.made.append((probe, aside))

    def send(self) -> None:
        """Queue the probes that were made, if it is time. Last in a step: they go with what else was started."""
        if not self.made:
            return
        # Not what its program has ended or retracted meanwhile.
        self.made = [(probe, tag) for probe, tag in self.made if tag.live.probes.get(tag.index) is probe]
        if not self.made:
            self._num_steps = 0
            return
        self._num_steps += 1
        is_due = is_wave_due(
            len(self.made) + self.admission.num_probes,
            self.admission.num_thoughts,
            self._num_steps,
            is_pass_next=self.inside.front.is_pass_due,
            is_urgent=any(tag.live.program.may_close(tag.index) for _, tag in self.made),
        )
        if not is_due:
            return
        made, self.made, self._num_steps = self.made, [], 0
        self.num_waves += 1
        for probe, tag in reversed(made):
            self.inside.put(probe, tag)
            self.admission.num_probes += 1

    def has_output(self, req: Req, tag: ProbeTag) -> None:
        if req.output_ids and is_answered(req, self._tokens(tag.live), tag.live.program.spec.answer):
            self.inside.end(req)

    def has_left(self, tag: ProbeTag) -> None:
        self.admission.num_probes -= 1

    def is_lost(self, req: Req, tag: ProbeTag, abort: AbortReq) -> None:
        self.inside.end_probe(tag.live, tag.index)

    def has_ended(self, req: Req, tag: ProbeTag) -> None:
        """A probe has its answer: the thought goes on, or is closed where it was asked."""
        live, index = tag.live, tag.index
        program = live.program
        if live.probes.pop(index, None) is None or live.parent is None:  # nobody waits for it
            return
        program.num_probe_tokens += cost_tokens(req)
        num_read = len(live.parent.origin_input_ids) + tag.num_thought_tokens - 1  # the KV of the last was under way
        self.num_tokens_read += num_read
        self.num_tokens_cached += min(num_read, req.cached_tokens)
        num_chars = reading_chars(program.spec, len(req.output_ids))
        self.readings.add(live, num_chars, partial(self._take, req=req, tag=tag))

    def _take(self, live: LiveProgram, req: Req, tag: ProbeTag) -> None:
        """Read what a probe has found, unless its thought is over."""
        program, index = live.program, tag.index
        tokens, cost = self._tokens(live), cost_tokens(req)
        chain = live.reqs.get(index)
        if chain is None or chain.finished() or chain.to_finish is not None or not self.ends.programs.holds(live):
            return
        if isinstance(req.finished_reason, FINISH_ABORT) or program.reason is not None:
            return
        asked = branch_tag_of(chain)
        if is_over(chain, tokens, tag.num_thought_tokens):
            self.stop(asked)
            return
        if asked.asking is not None:
            asked.asking.costs.append(cost)
            asked.asking.at_tokens = self._next(live, asked.asking)
        trial = read_trial(req, tag, tokens, program.spec.answer, program.spec.equal)
        if not _has_room(trial.num_tokens, tokens, chain.sampling_params.max_new_tokens or 0):
            return
        closing = program.see_trial(index, trial)
        if program.reason is not None:  # what all chains say a finished one has said
            self.ends.answer(live)
            return
        if program.speaker is not None:
            self.ends.end_rest(live, spared=program.speaker)
        if closing is not None:
            self._close(live, closing)

    def _close(self, live: LiveProgram, index: int) -> None:
        """End a thought as the model ends it: a new Req goes on from there and writes the answer.

        What the chain generated since it was asked is dropped: the answer follows the text that the probe has read. One that has
        ended its thought meanwhile answers by itself.
        """
        chain, branch, tokens = live.reqs[index], live.program.branches[index], self._tokens(live)
        num_tokens = branch.closed_at
        assert num_tokens is not None
        if chain.finished() or chain.to_finish is not None or is_over(chain, tokens, num_tokens):
            branch.closed_at = None
            return
        assert_same("dynasor closes the thought of %s at %d tokens", chain.rid, num_tokens)
        self.inside.end_probe(live, index)
        is_line_end = chain.output_ids[num_tokens - 1] in self._line_ends()
        given = closed(chain.output_ids[:num_tokens], tokens, is_line_end=is_line_end)
        self._go_on(live, index, given, self.inside.end(chain))


def _has_room(num_tokens: int, tokens: ThoughtTokens, max_new_tokens: int) -> bool:
    """Whether a thought of so many tokens that is closed has room left for what asks for its answer, and for that answer.

    The suffix counts beside the end, which it mostly begins with: models write a few words more than it does.
    """
    num_given = num_tokens + len(tokens.new_line) + len(tokens.end)
    return num_given + len(tokens.suffix) + MOST_TRIAL_TOKENS <= max_new_tokens
