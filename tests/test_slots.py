"""Answers mixed in slots: who holds which, what is proposed and taken, and that it is exact however an engine schedules."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, log, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dynasor.engine.live import Answering, BranchTag, LiveProgram, set_tag
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.reader import MOST_ANSWER_TOKENS, AnswerReader
from sglang_dynasor.engine.slots import MIB, Memory, Slots, share_out
from sglang_dynasor.engine.statistics import DeviceStatistics, HostStatistics, Observer
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor_kernels import BEGUN, FRESH, NEVER, SAYING

WORDS = ["<eos>", "####", "\n", " ", "\\boxed{", "}", "{", "\\frac", "\\}", "\\", "7", "8", "9", "word", "so", "##"]
IDS = {word: i for i, word in enumerate(WORDS)}
VOCAB_SIZE = len(WORDS)
TOKENIZER: Any = SimpleNamespace(get_vocab=lambda: dict(IDS))
KEEPER: Any = SimpleNamespace(go_on=lambda live: None)


def live_program(name: str = "p", **options: Any) -> LiveProgram:
    options = {"statistics": True, "stop": "never", "branches": 64, **options}
    return LiveProgram(Program(name, parse_field(options, 64)), None)


def branch_of(live: LiveProgram) -> BranchTag:
    return BranchTag(live, live.program.start_branch(), KEEPER)


def come(slots: Slots, tag: BranchTag, said: tuple[int, ...], place: int) -> None:
    """A branch has come to a place of its answer."""
    slots.add(tag, said, place, tag.live.program.answers.see(said, {1: 0.0}))


# Who holds which slot


def test_memory_is_shared_out() -> None:
    """An eighth for each of two steps, but for small vocabularies; all of it is used, and none too much."""
    assert share_out(64, 151_936) == Memory(84, 13)
    assert share_out(64, 512) == Memory(32_768 - 512, 256)
    for mib, vocab_size in ((64, 151_936), (2, 151_936), (1, 552), (65_536, 262_144)):
        memory = share_out(mib, vocab_size)
        assert min(memory) >= 1
        assert 0 <= mib * MIB - 4 * vocab_size * (memory.num_slots + 2 * memory.num_kept) < 4 * vocab_size


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    """What it says is needed is enough, and one MiB less is not."""
    with pytest.raises(
        ConfigError, match=r"--dynasor-statistics-mib=1 holds 1 distributions .* 151936 tokens.* give at least 2"
    ):
        share_out(1, 151_936)
    assert share_out(2, 151_936) == Memory(1, 1)
    with pytest.raises(ConfigError, match=r"give at least 5$"):
        share_out(4, 400_000)
    assert share_out(5, 400_000) == Memory(1, 1)


def test_a_slot_is_kept_until_the_program_is_over() -> None:
    """Places of one program and of others have slots of their own; what is due is told once, in order, with all that is in it."""
    slots, (one, other) = Slots(3), (branch_of(live_program(name)) for name in "ab")
    come(slots, one, (), 5)
    come(slots, other, (), 6)
    come(slots, one, (), 7)
    assert [added.addition for added in slots.take_due()] == [(0, 2, [5, 7]), (1, 1, [6])]
    assert slots.take_due() == []
    come(slots, one, (3,), 1)
    come(slots, one, (), 2)
    assert [added.addition for added in slots.take_due()] == [(2, 1, [1]), (0, 3, [2])]
    slots.release(one.live)
    slots.release(one.live)  # no harm
    assert sorted(slots.free) == [0, 2]
    assert list(slots.held) == [other.live]


def test_without_a_free_slot_the_host_s_way_serves() -> None:
    """There and then, and counted once for each place; a slot that is free later is not for what is half mixed."""
    slots, (one, other) = Slots(1), (branch_of(live_program(name)) for name in "ab")
    come(slots, one, (), 0)
    for place in (1, 2):
        come(slots, other, (), place)
    assert slots.num_without == 1
    slots.release(one.live)
    come(slots, other, (), 3)
    assert slots.take_due() == []
    come(slots, other, (4,), 3)
    assert [added.addition for added in slots.take_due()] == [(0, 1, [3])]


def test_a_row_that_was_not_kept_costs_its_slot() -> None:
    """What is in it would never be all."""
    slots, tag = Slots(2), branch_of(live_program())
    come(slots, tag, (), 0)
    come(slots, tag, (), -1)
    assert slots.take_due() == []
    assert (len(slots.free), slots.num_without) == (2, 1)
    come(slots, tag, (), 1)
    assert slots.take_due() == []


def test_no_slot_leaks_over_many_programs() -> None:
    """10,000 programs that come and go, some with too few slots: at the end all are free, and none was held twice."""
    rng, slots = random.Random(0), Slots(50)
    running: list[BranchTag] = []
    for number in range(10_000):
        running.append(branch_of(live_program(str(number), branches=1)))
        for _ in range(4):
            tag = rng.choice(running)
            come(slots, tag, tuple(rng.choices(range(3), k=rng.randrange(3))), rng.randrange(-1, 20))
        if rng.random() < 0.5:
            for added in slots.take_due():
                if rng.random() < 0.05:
                    slots.lose(added.slot)
        if len(running) > 12:
            slots.release(running.pop(rng.randrange(len(running))).live)
        held = [slot.number for places in slots.held.values() for slot in places.values() if slot is not None]
        assert sorted([*held, *slots.free]) == list(range(50))
    assert slots.num_without > 100
    for tag in running:
        slots.release(tag.live)
    assert sorted(slots.free) == list(range(50))
    assert not slots.held
    assert not slots.due


def test_a_place_where_one_branch_came_gives_way_to_a_beginning() -> None:
    """The deepest, with nothing due; its program is told. A place within an answer takes none from anybody."""
    slots, (one, other) = Slots(3), (branch_of(live_program(name)) for name in "ab")
    for said in ((), (3,), (3, 4)):
        come(slots, one, said, 0)
    come(slots, other, (), 1)
    assert slots.num_without == 1  # everything is due
    slots.take_due()
    come(slots, other, (5,), 2)
    assert slots.num_without == 2
    third = branch_of(live_program("c"))
    come(slots, third, (), 2)
    assert slots.num_without == 2
    assert [added.addition for added in slots.take_due()] == [(2, 1, [2])]
    assert slots.held[one.live][3, 4] is None
    places = one.live.program.answers.places
    assert [places[said].is_on_device for said in ((), (3,), (3, 4))] == [True, True, False]
    come(slots, one, (3,), 3)
    slots.take_due()
    come(slots, branch_of(live_program("d")), (), 4)  # a second branch came there
    assert slots.num_without == 3


def test_branches_that_come_one_after_another_are_mixed_on_the_host() -> None:
    """In between their program has no slot, and one that is given anew would not hold all."""
    slots, tag = Slots(2), branch_of(live_program())
    come(slots, tag, (), 0)
    slots.take_due()
    slots.release(tag.live)
    tag.live.program.answers.rest()
    come(slots, tag, (), 0)
    assert (slots.take_due(), slots.num_without, len(slots.free)) == ([], 1, 2)
    assert tag.live.program.answers.mixture.num_tokens == 2


# Where answers begin and end


def test_which_rows_may_stand_at_an_answer() -> None:
    """After a mark; after a token that ends one, if the token before has begun it; not after any brace, nor in branches that do not decide."""
    words = [
        "y",
        "#",
        "##",
        " ###",
        "x#",
        "# ",
        "\\",
        "\\box",
        "ed",
        "ed{",
        "{",
        "^{",
        "}{",
        "x\\boxed{",
        "\\frac",
        "\\fra",
        "####",
        "#{",
    ]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: ids)
    reader, tag = AnswerReader(tokenizer), branch_of(live_program())
    named = {i: word for word, i in ids.items()}
    assert {named[i] for i in reader.marks} == {"x\\boxed{", "####"}
    assert {named[i] for i in reader.ends} == {"#", "##", "# ", "ed{", "{", "x\\boxed{", "####"}
    assert {named[i] for i in reader.begins} == {"#", "##", "####", " ###", "x#", "\\", "\\box", "ed"}
    req: Any = SimpleNamespace(output_ids=list[int]())
    for text, standing in (
        ([], FRESH), (["y"], FRESH), (["\\frac"], FRESH), (["\\box"], BEGUN), (["\\box", "ed"], BEGUN), (["##", "y"], BEGUN), (["##", "y", "y"], FRESH),
    ):  # fmt: skip
        req.output_ids = [ids[word] for word in text]
        assert reader.standing(req, tag) == standing, text
    assert reader.standing(req, None) == NEVER
    tag.answering = Answering(0)
    assert reader.standing(req, tag) == SAYING
    tag.num_answer_tokens = MOST_ANSWER_TOKENS
    assert reader.standing(req, tag) == NEVER
    tag.num_answer_tokens = 0
    tag.live.program.reason = StopReason.CERTAIN
    assert reader.standing(req, tag) == NEVER


@pytest.mark.parametrize(
    ("text", "answers", "is_whole"),
    [
        (["word", "####", "7", "\n", "8"], [["7", "\n"]], True),
        (["####", " ", "7", "8", "\n"], [["7", "8", "\n"]], True),
        (["##", "##", "7", "<eos>"], [["7", "<eos>"]], True),  # the mark in two tokens, and the end of the text
        (["\\boxed{", "\\frac", "{", "7", "}", "{", "8", "}", "}", "9"], [["\\frac", "{", "7", "}", "{", "8", "}", "}"]], True),
        (["\\boxed{", "\\}", "7", "\\", "}", "}"], [["\\}", "7", "\\", "}", "}"]], True),
        (["\\boxed{", "7", "\n", "8"], [["7", "\n", "8"]], False),
        (["####", "7", "\n", "\\boxed{", "8", "}"], [["7", "\n"], ["8", "}"]], True),
        (["##", "7", "\n", "{", "8", "}"], [], True),
        (["####", "<eos>"], [["<eos>"]], True),
        (["####", *["7"] * 40], [["7"] * MOST_ANSWER_TOKENS], True),
    ],
)  # fmt: skip
def test_answers_are_followed_to_their_end(text: list[str], answers: list[list[str]], is_whole: bool) -> None:
    """Token by token what was said before each; other tokens are none of an answer."""
    reader, tag = AnswerReader(TOKENIZER), branch_of(live_program())
    req: Any = SimpleNamespace(output_ids=list[int](), finished=lambda: req.output_ids[-1] == IDS["<eos>"])
    found: list[list[str]] = []
    for word in text:
        req.output_ids.append(IDS[word])
        said = reader.follow(req, tag, IDS[word])
        if said is not None:
            found += [[]] if not said else []
            assert [IDS[w] for w in found[-1]] == list(said)
            found[-1].append(word)
    assert found == answers
    assert (tag.answering is None) is is_whole


# The whole way, in an engine of a few lines


@dataclass
class Branch:
    """A request as an engine has it."""

    tag: BranchTag
    name: int
    output_ids: list[int] = field(default_factory=list[int])
    origin_input_ids: tuple[int, ...] = (IDS["word"],)
    finished_len: int | None = None
    has_kv: bool = False  # its prompt, or what it had when it was retracted, is computed
    num_retracted: int = 0

    def finished(self) -> bool:
        return bool(self.output_ids) and (self.output_ids[-1] == IDS["<eos>"] or len(self.output_ids) == 60)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Engine:
    """Steps, launched and read as SGLang does, with overlap or without."""

    def __init__(self, memory: Memory, *, overlap: bool, is_device: bool, seed: int):
        self.rng = random.Random(seed)
        self.overlap = overlap
        self.slots = Slots(memory.num_slots)
        self.programs = Programs(self.slots)
        ends: Any = SimpleNamespace(guarded=lambda live, step: step(live))
        watch = Watch(TOKENIZER, SimpleNamespace(num_watched=1), ends, self.slots)  # type: ignore[arg-type]
        self.observer = Observer(watch, memory, VOCAB_SIZE)
        group = SimpleNamespace(world_size=1 + is_device, rank_in_group=0, broadcast=lambda table: table)
        self.observer.__dict__["group"] = group
        self.running: list[Branch] = []
        self.under_way: Callable[[], None] | None = None
        self.spoil: Callable[[Branch], bool] = lambda branch: False
        self.true: dict[LiveProgram, dict[tuple[int, ...], list[torch.Tensor]]] = {}

    def logits(self, branch: Branch, tokens: list[int]) -> torch.Tensor:
        """What the model says after these tokens: the same whenever it is asked."""
        seed = hash((branch.name, *tokens)) % 2**31  # of whole numbers: the same in every run
        row = 2 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
        row[IDS["####"]] += 2
        row[IDS["7"]] += 3
        if len(tokens) < 3:
            row[0] = -inf
        if self.spoil(branch):
            row[5] = nan
        return row

    def step(self, batch: list[Branch], chunked: Branch | None = None) -> None:
        """Launch a step; read the one before, or with no overlap this one."""
        sees = {branch: self.tokens_of(branch) for branch in batch}
        is_decode = all(branch.has_kv for branch in batch) and chunked is None
        rows = [self.logits(branch, sees[branch]) for branch in batch]
        last = [(sees[branch] or list(branch.origin_input_ids))[-1] for branch in batch]
        reqs = list(batch)
        lens = [1 if branch.has_kv else 1 + len(sees[branch]) for branch in batch]
        if chunked is not None:
            reqs.append(chunked)
            rows.append(torch.zeros(VOCAB_SIZE))
            lens.append(1)
            last.append(self.rng.randrange(VOCAB_SIZE))
        ids = (
            last
            if is_decode
            else [token for n, token in zip(lens, last, strict=True) for token in [0] * (n - 1) + [token]]
        )
        mode = SimpleNamespace(is_decode=lambda: is_decode)
        forward: Any = SimpleNamespace(
            reqs=reqs, forward_mode=mode, input_ids=torch.tensor(ids), extend_lens=lens
        )  # fmt: skip
        self.observer.watch(forward)
        logits = torch.stack(rows)
        state = self.observer.before_grammar(logits, None)
        sampled: list[int] = []
        for branch in batch:
            weights = logits[len(sampled)].nan_to_num().softmax(0)
            generator = torch.Generator().manual_seed(hash((7, branch.name, *sees[branch])) % 2**31)
            sampled.append(int(weights.multinomial(1, generator=generator)))
            branch.has_kv = True
        assert isinstance(state, DeviceStatistics)
        there = state.copy_to_host(lambda tensor: tensor)
        assert isinstance(there, HostStatistics)
        was = {branch: branch.num_retracted for branch in batch}
        mine = dict(zip(batch, sampled, strict=True))
        self.in_flight = mine

        def read() -> None:
            starts: list[float] = []
            for branch, token in zip(batch, sampled, strict=True):
                starts.append(len(branch.output_ids))
                if branch.num_retracted == was[branch] and not branch.finished():
                    branch.output_ids.append(token)
            if self.in_flight is mine:
                self.in_flight = {}
            starts += [inf] if chunked is not None else []
            there.read(starts)
            self.running = [branch for branch in self.running if not branch.finished()]

        before, self.under_way = self.under_way, read
        if before is not None:
            before()
        if not self.overlap:
            self.drain()

    in_flight: dict[Branch, int]

    def tokens_of(self, branch: Branch) -> list[int]:
        """Its tokens, the one that is sampled in the step under way included."""
        token = self.in_flight.get(branch)
        return branch.output_ids + ([] if token is None else [token])

    def drain(self) -> None:
        if self.under_way is not None:
            read, self.under_way = self.under_way, None
            read()

    def retract(self, branch: Branch) -> None:
        """Its KV is given up, and what a step under way samples of it."""
        branch.has_kv = False
        branch.num_retracted += 1
        self.in_flight.pop(branch, None)

    def run(self, live: list[LiveProgram], num_branches: int) -> list[Branch]:
        """All branches of some programs to their ends, in steps as they come."""
        self.in_flight = {}
        waiting: list[Branch] = []
        for program in live:
            for _ in range(num_branches):
                branch = Branch(branch_of(program), len(waiting))
                set_tag(branch, branch.tag)  # type: ignore[arg-type]
                waiting.append(branch)
        everyone = list(waiting)
        while waiting or self.running:
            fresh = [branch for branch in self.running if not branch.has_kv]
            held = [branch for branch in self.running if branch.has_kv]
            if waiting and self.rng.random() < 0.3:
                fresh.append(waiting.pop(0))
                self.running.append(fresh[-1])
            chunked = waiting[0] if waiting and self.rng.random() < 0.3 else None
            is_prefill = bool(fresh) or chunked is not None  # alone, or with the decode mixed in
            batch = fresh if is_prefill and self.rng.random() < 0.5 else fresh + held
            if not batch and chunked is None:
                self.drain()
                continue
            self.step(batch, chunked)
            if held and self.rng.random() < 0.1:
                victim = self.rng.choice(held)
                if not victim.finished():
                    self.retract(victim)
        self.drain()
        return everyone


def beat(engine: Engine, num: int = 3) -> None:
    """A few steps of another program, so that what is due is added and told."""
    other = Branch(branch_of(live_program("beat")), 999)
    set_tag(other, other.tag)  # type: ignore[arg-type]
    for _ in range(num):
        other.output_ids = []
        engine.step([other])
    engine.drain()
    engine.programs.release(other.tag.live)


def expected(engine: Engine, branches: list[Branch]) -> tuple[dict[tuple[int, ...], list[torch.Tensor]], int]:
    """What each place of the answers was drawn from, told from the finished texts, and how many answers there are."""
    reader, places, num = AnswerReader(TOKENIZER), dict[tuple[int, ...], list[torch.Tensor]](), 0
    for branch in branches:
        tag = BranchTag(branch.tag.live, branch.tag.index, KEEPER)
        req: Any = SimpleNamespace(output_ids=list[int]())
        for place, token in enumerate(branch.output_ids):
            req.output_ids.append(token)
            req.finished = lambda place=place, branch=branch: place + 1 == len(branch.output_ids)
            said = reader.follow(req, tag, token)
            if said is not None:
                places.setdefault(said, []).append(engine.logits(branch, branch.output_ids[:place]).double().softmax(0))
                num += tag.answering is None
    return places, num


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_device", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_slots_hold_exactly_what_was_said(overlap: bool, is_device: bool, seed: int) -> None:
    """However steps come: prefills between decodes and mixed with them, chunks of prompts, retractions in the middle of answers."""
    engine = Engine(Memory(400, 40), overlap=overlap, is_device=is_device, seed=seed)
    lives = [live_program(str(i)) for i in range(3)]
    branches = engine.run(lives, 6)
    assert sum(branch.num_retracted for branch in branches) > 5
    beat(engine)
    for live in lives:
        mine = [branch for branch in branches if branch.tag.live is live]
        places, _ = expected(engine, mine)
        assert len(places) > 10
        answers = live.program.answers
        assert {said: place.num for said, place in answers.places.items()} == {
            said: len(rows) for said, rows in places.items()
        }
        for said, rows in places.items():
            mean = torch.stack(rows).mean(0)
            entropy = -torch.special.xlogy(mean, mean).sum().item()
            own = sum(-torch.special.xlogy(row, row).sum().item() for row in rows)
            assert answers.places[said].is_on_device
            assert answers.places[said].told == pytest.approx((len(rows), entropy, own / len(rows)), rel=1e-5, abs=1e-5)
            if said and len(rows) > 1:
                assert answers.places[said].told.entropy != pytest.approx(log(len(rows)))
        assert not answers.ending
        engine.programs.release(live)
    assert len(engine.slots.free) == 400
    assert engine.slots.num_without == 0


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_more_answers_than_slots(overlap: bool) -> None:
    """Those without are mixed on the host, here of all tokens too: the program's numbers are the same. And so with few places for rows."""
    told: list[Any] = []
    for memory in (Memory(400, 40), Memory(5, 40), Memory(400, 1)):
        engine = Engine(memory, overlap=overlap, is_device=True, seed=5)
        lives = [live_program(str(i)) for i in range(4)]
        engine.run(lives, 4)
        beat(engine)
        told.append(
            [(live.program.answers.mixture.entropy, live.program.answers.mixture.mean_entropy) for live in lives]
        )
        assert (engine.slots.num_without > 0) is (memory != (400, 40))
        for live in lives:
            engine.programs.release(live)
        assert sorted(engine.slots.free) == list(range(memory.num_slots))
    assert all(entropy > 0.5 for entropy, _ in told[0])
    for other in told[1:]:
        assert [pytest.approx(pair, rel=1e-4) for pair in told[0]] == other


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_programs_that_end_while_a_row_is_kept_leave_nothing(overlap: bool) -> None:
    """Each at another moment of its answers: their slots are free at once, and who gets them finds nothing of theirs."""
    engine = Engine(Memory(12, 12), overlap=overlap, is_device=False, seed=9)
    engine.in_flight = {}
    for num_steps in range(1, 25):
        live = live_program(str(num_steps))
        branches = [Branch(branch_of(live), i) for i in range(3)]
        for branch in branches:
            set_tag(branch, branch.tag)  # type: ignore[arg-type]
        engine.running = branches
        for _ in range(num_steps):
            engine.step(engine.running or branches[:1])
        live.program.reason = StopReason.DEADLINE
        engine.programs.release(live)
        assert len(engine.slots.free) == 12
        engine.drain()
        assert len(engine.slots.free) == 12
        engine.in_flight = {}
    live = live_program("last")
    branches = engine.run([live], 2)
    beat(engine)
    places, _ = expected(engine, branches)
    told = {said: place.told.entropy for said, place in live.program.answers.places.items() if place.is_on_device}
    assert told
    for said, entropy in told.items():
        mean = torch.stack(places[said]).mean(0)
        assert entropy == pytest.approx(-torch.special.xlogy(mean, mean).sum().item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("is_device", [False, True], ids=["cpu", "device"])
def test_rows_without_numbers_touch_nobody_else(is_device: bool) -> None:
    """A branch whose logits are NaN is not mixed in; the other branches' numbers are those without it, and so are other programs'."""
    told: list[Any] = []
    for num_spoilt in (0, 1):
        engine = Engine(Memory(400, 40), overlap=True, is_device=is_device, seed=3)
        engine.spoil = lambda branch, num=num_spoilt: num > 0 and branch.name == 2
        lives = [live_program(str(i)) for i in range(2)]
        branches = engine.run(lives, 3)
        beat(engine)
        other = lives[1].program.answers.mixture
        mine, _ = expected(engine, [b for b in branches[:3] if b.name != 2])
        places = lives[0].program.answers.places
        told.append((other.entropy, other.mean_entropy, other.num_tokens))
        if num_spoilt:
            assert {said: place.num for said, place in places.items()} == {
                said: len(rows) for said, rows in mine.items()
            }
            assert all(place.told.entropy == place.told.entropy for place in places.values())
    assert told[0] == pytest.approx(told[1])


def test_a_step_that_fails_costs_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be added is not: the host's way serves there, and is right."""
    engine = Engine(Memory(400, 40), overlap=True, is_device=True, seed=1)
    from sglang_dynasor.engine import statistics

    real, calls = statistics.add_rows, [0]

    def fail(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise RuntimeError("no memory")
        return real(*args)

    monkeypatch.setattr(statistics, "add_rows", fail)
    monkeypatch.setattr(statistics.FENCE, "is_strict", False)
    num = statistics.FENCE.num
    live = live_program()
    branches = engine.run([live], 4)
    monkeypatch.setattr(statistics, "add_rows", real)
    beat(engine)
    assert statistics.FENCE.num > num
    statistics.FENCE.begin(is_strict=False)
    places, _ = expected(engine, branches)
    lost = [slot for slot in engine.slots.held[live].values() if slot is None]
    assert lost
    for said, place in live.program.answers.places.items():
        mean = torch.stack(places[said]).mean(0)
        if place.is_on_device and place.num == len(places[said]):  # a step that failed has told of no row
            assert place.told.entropy == pytest.approx(
                -torch.special.xlogy(mean, mean).sum().item(), rel=1e-5, abs=1e-5
            )
    engine.programs.release(live)
    assert len(engine.slots.free) == 400


def test_nothing_is_kept_where_no_mark_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose answers nothing marks is watched, and no memory is taken for it, nor anything launched."""
    from sglang_dynasor.engine import statistics

    monkeypatch.setattr(statistics, "keep_rows", None)
    monkeypatch.setattr(statistics, "add_rows", None)
    engine = Engine(Memory(400, 40), overlap=True, is_device=True, seed=1)
    live = live_program(answer="number")
    engine.run([live], 3)
    assert engine.observer._sums is None
    assert live.program.answers.mixture.num_branches == 0
