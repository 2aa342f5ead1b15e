"""The algorithms as pure policy: budgets, shares, stops, and that each gate stays shut in the opposite case."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from math import ceil, exp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.algorithms.beam import Beam
from sglang_dynasor.algorithms.best_of_n import BestOfN
from sglang_dynasor.algorithms.catalogue import ALGORITHMS
from sglang_dynasor.algorithms.mcts import Mcts
from sglang_dynasor.algorithms.rebase import Rebase, shares
from sglang_dynasor.algorithms.tree import ROOT, Algorithm, Reason, Sample
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.rules import parse_stop

Sampler = Callable[[int], Sample]  # of the node's depth
NAMES = tuple(name for name, record in ALGORITHMS.items() if record.search is not None)
NEVER, PREDICTIVE = parse_stop("never"), parse_stop("predictive:0.02")


def make(name: str, cap: int, stop: str = "never", **options: Any) -> Algorithm:
    search = ALGORITHMS[name].search
    assert search is not None
    return search(cap, parse_stop(stop), **options)


def run(search: Algorithm, sampler: Sampler, *, room: int = 64, lost: float = 0.0, seed: int = 0) -> int:
    """Drive a search to its end, reports in a random order; returns how many samples it asked for."""
    rng = random.Random(seed)
    in_flight: list[int] = []
    asked = 0
    for _ in range(100_000):
        for node, num in search.expand(room):
            assert num >= 1
            in_flight += [node] * num
            asked += num
        if not in_flight:
            break
        node = in_flight.pop(rng.randrange(len(in_flight)))
        if rng.random() < lost:
            search.lose(node)
        else:
            search.report(node, sampler(search.state[node].depth))
    assert search.reason is not None
    assert search.expand(room) == []
    assert search.budget == 0
    assert 0 <= search.certaindex <= 1
    json.dumps(search.record())
    return asked


def solution(answer: str, reward: float = 0.5, steps: int = 3, whole: bool = False) -> Sampler:
    """Samples that take `steps` steps to one answer."""

    def sample(depth: int) -> Sample:
        if whole:
            return Sample("step\n" * max(0, steps - depth) + f"#### {answer}", 5, True, reward, answer)
        if depth + 1 < steps:
            return Sample("step\n", 5, False, reward)
        return Sample(f"#### {answer}", 5, True, reward, answer)

    return sample


def noise(seed: int, whole: bool, answers: str = "12345") -> Sampler:
    rng = random.Random(seed)

    def sample(depth: int) -> Sample:
        is_terminal = whole or rng.random() < 0.3
        answer = rng.choice([*answers, None])
        text = f"#### {answer}" if answer else "?"
        return Sample(text if is_terminal else "step\n", 3, is_terminal, rng.choice([None, rng.random()]), answer)

    return sample


def is_whole(name: str) -> bool:
    return name in ("self_consistency", "best_of_n", "mcts")


# Shares


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(0, 64))
def test_shares_are_the_paper_s(rewards: list[float], width: int) -> None:
    """W_j = ceil(left * w_j / sum of the remaining w), descending; the whole width is given out and no more."""
    given_out = shares(rewards, width)
    assert sum(given_out) == (width if rewards else 0)
    order = sorted(range(len(rewards)), key=lambda j: (-rewards[j], j))
    left = width
    weights = [exp(r / 0.2) for r in rewards]
    for place, j in enumerate(order):
        remaining = sum(weights[i] for i in order[place:])
        expected = left * weights[j] / remaining
        # The two sums differ by rounding, which may lift a whole number over the ceiling.
        assert given_out[j] in {ceil(expected), ceil(expected - 1e-9), ceil(expected + 1e-9)}
        left -= given_out[j]
    assert sorted((given_out[j] for j in order), reverse=True) == [given_out[j] for j in order]


def test_shares_of_a_published_case() -> None:
    """A node much better than the others gets nearly everything; equal nodes share evenly."""
    assert shares([0.5, 0.5, 0.5, 0.5], 8) == [2, 2, 2, 2]
    assert shares([0.0, 1.0, 0.0], 16) == [0, 16, 0]
    assert shares([0.6, 0.8, 0.4], 10) == [3, 7, 0]
    assert shares([], 4) == []
    assert shares([0.3], 0) == [0]


# Budgets


@given(
    st.sampled_from(NAMES),
    st.integers(1, 24),
    st.integers(1, 40),
    st.sampled_from(["never", "predictive:0.02", "beta:0.95", "best:0.9", "entropy:0.7 and reward:0.5"]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 1000),
)
def test_the_budget_is_never_exceeded(name: str, cap: int, room: int, stop: str, lost: float, seed: int) -> None:
    """However samples come, or do not come: no more terminals than the cap, and every search ends."""
    if name == "self_consistency" and ("best" in stop or "reward" in stop):
        stop = "margin"
    search = make(name, cap, stop, **({"max_depth": 6} if name in ("rebase", "beam") else {}))
    asked = run(search, noise(seed, is_whole(name)), room=room, lost=lost, seed=seed)
    terminals = [node for node in search.state.nodes if node.is_terminal]
    if name == "beam":
        assert asked <= cap * 6
    else:
        assert len(terminals) <= cap
    if is_whole(name):
        assert asked <= cap
    if lost == 1.0:
        assert search.reason is Reason.FAILED
        assert search.aggregate().answer is None


@pytest.mark.parametrize("name", NAMES)
def test_never_uses_the_whole_cap(name: str) -> None:
    """Unanimous samples do not stop a search that was told not to stop."""
    search = make(name, 8, "never", **({"beams": 8} if name == "beam" else {}))
    run(search, solution("7", whole=is_whole(name)))
    assert search.reason is Reason.CAP
    assert search.record()["votes"] == [{"answer": "7", "votes": 8}]


@pytest.mark.parametrize("name", NAMES)
def test_a_search_of_one_branch(name: str) -> None:
    """One sample, one answer."""
    search = make(name, 1)
    assert run(search, solution("3", whole=is_whole(name)), room=1) == (3 if not is_whole(name) else 1)
    assert search.aggregate().answer == "3"
    node = search.aggregate().node
    assert node is not None
    assert search.state.text(node).endswith("#### 3")


# Stops, and where they must not


@pytest.mark.parametrize("name", NAMES)
def test_agreement_stops_early(name: str) -> None:
    """Unanimous branches end the search before its cap."""
    search = make(name, 16, "predictive:0.02", **({"beams": 16} if name == "beam" else {}))
    run(search, solution("7", whole=is_whole(name)), room=1)
    assert search.reason is Reason.CERTAIN
    assert search.record()["votes"][0]["votes"] < 16


@pytest.mark.parametrize("name", NAMES)
def test_disagreement_does_not_stop(name: str) -> None:
    """All different answers use the whole cap."""
    counter = iter(range(100))
    options = {"beam": {"beams": 12}, "mcts": {"branching": 12}}.get(name, {})
    search = make(name, 12, "predictive:0.02", **options)
    whole = is_whole(name)

    def sample(depth: int) -> Sample:
        if whole or depth == 1:
            answer = str(next(counter))
            return Sample(f"#### {answer}", 2, True, 0.5, answer)
        return Sample("step\n", 2, False, 0.5)

    run(search, sample, room=4)
    assert search.reason is Reason.CAP
    assert len(search.record()["votes"]) == 12


def test_contested_leads_do_not_stop() -> None:
    """Where the rewards favour another answer than the number of votes, no vote rule fires; a good branch alone does."""
    for stop, reason in (("predictive:0.5", Reason.CAP), ("best:0.9", Reason.CERTAIN)):
        search = BestOfN(5, parse_stop(stop), vote="best")
        search.expand(5)
        search.report(ROOT, Sample("", 1, True, 0.95, "a"))
        for _ in range(4):
            search.report(ROOT, Sample("", 1, True, 0.1, "b"))
        assert search.reason is reason
        assert search.aggregate().answer == "a"


def test_certaindex_is_the_paper_s() -> None:
    """The mean terminal reward for MCTS, the highest for Rebase."""
    for search, expected in ((Mcts(4, NEVER), 0.5), (Rebase(4, NEVER), 0.8)):
        assert search.certaindex == 0
        search.expand(4)
        for reward in (0.2, 0.8, 0.5, 0.5):
            search.report(ROOT, Sample("#### 1", 1, True, reward, "1"))
        assert search.certaindex == pytest.approx(expected)


@pytest.mark.parametrize("name", ["best_of_n", "rebase", "mcts", "beam"])
def test_hopeless_searches_are_abandoned_only_on_request(name: str) -> None:
    """Below the author's level it ends and says so; above it, or without a level, it goes on."""
    for reward, options, reason in (
        (0.1, {"hopeless": 0.2}, Reason.HOPELESS),
        (0.3, {"hopeless": 0.2}, Reason.CAP),
        (0.1, {}, Reason.CAP),
    ):
        search = make(name, 8, "never", **options, **({"beams": 4} if name == "beam" else {}))
        run(search, solution("1", reward, whole=is_whole(name)), room=4)
        assert search.reason is reason
        assert search.record()["stop_reason"] == str(reason)


def test_two_bad_samples_are_no_ground_to_abandon() -> None:
    """From three on."""
    search = BestOfN(2, NEVER, hopeless=0.9)
    run(search, solution("1", 0.1, whole=True))
    assert search.reason is Reason.CAP


# Rebase


def test_rebase_spends_width_on_the_better_node() -> None:
    """The published tree: a depth is expanded when all of it has its reward; finished solutions keep their share."""
    search = Rebase(8, NEVER)
    assert search.expand(1) == [(ROOT, 8)]
    assert search.expand(1) == []
    for reward in (0.9, 0.1, 0.1, 0.1, 0.1, 0.1):
        search.report(ROOT, Sample("a\n", 1, False, reward))
    search.report(ROOT, Sample("#### 4", 1, True, 0.5, "4"))
    assert search.expand(9) == []
    search.report(ROOT, Sample("#### 5", 1, True, 0.5, "5"))
    (first, num), *rest = search.expand(9)
    assert num + sum(n for _, n in rest) == 6
    assert search.state[first].reward == 0.9
    assert num == 6


def test_rebase_goes_on_in_rounds_until_certain() -> None:
    """A first round as wide as could decide; another only while the rule has not fired. `round_width` fixes it."""
    sure, unsure, published = Rebase(16, PREDICTIVE), Rebase(16, PREDICTIVE), Rebase(16, PREDICTIVE, round_width=16)
    assert sure.expand(1) == [(ROOT, 4)]
    assert published.expand(1) == [(ROOT, 16)]
    counter = iter(range(99))
    run(unsure, lambda _: Sample("", 1, True, 0.5, str(next(counter))))
    assert unsure.record()["num_rounds"] > 1
    for _ in range(4):
        sure.report(ROOT, Sample("", 1, True, 0.5, "1"))
    assert sure.reason is Reason.CERTAIN
    assert sure.record()["num_rounds"] == 1


def test_rebase_ends_paths_at_its_depth() -> None:
    """A model that never comes to an end is cut off; such a path may still answer or abstain."""
    search = Rebase(4, NEVER, max_depth=3)
    run(search, lambda _: Sample("on and on\n", 2, False, 0.5))
    assert search.reason is Reason.CAP
    assert search.record()["num_abstentions"] == 4
    assert max(node.depth for node in search.state.nodes) == 3


# MCTS


def virtual(search: Mcts) -> int:
    return sum(visits.virtual + visits.pending for visits in search.visits)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.0, 0.3]), st.integers(0, 1000))
def test_no_virtual_loss_is_lost(cap: int, branching: int, room: int, lost: float, seed: int) -> None:
    """When nothing is in flight nobody is penalised, every iteration was credited to the root, and values add up."""
    search = Mcts(cap, NEVER, branching=branching, max_depth=5)
    rng = random.Random(seed)
    run(
        search,
        lambda depth: Sample("a\n" * rng.randint(0, 6) + "#### 1", 3, True, rng.random(), "1"),
        room=room,
        lost=lost,
    )
    assert virtual(search) == 0
    terminals = [node for node in search.state.nodes if node.is_terminal]
    assert search.visits[ROOT].num == len(terminals)
    assert search.visits[ROOT].value == pytest.approx(sum(node.reward or 0.0 for node in terminals))
    for index, node in enumerate(search.state.nodes):
        assert len(node.children) <= branching
        assert node.depth <= 5
        if not node.is_terminal:
            assert search.visits[index].num == sum(search.visits[child].num for child in node.children)


def test_virtual_loss_sends_parallel_samples_elsewhere() -> None:
    """With one place taken at each of two equal nodes, two iterations at once go to both."""
    search = Mcts(8, NEVER, branching=2, width=2)
    assert search.expand(2) == [(ROOT, 2)]
    for _ in range(2):
        search.report(ROOT, Sample("a\nb\n#### 1", 3, True, 0.5, "1"))
    wanted = search.expand(2)
    assert sorted(num for _, num in wanted) == [1, 1]
    assert virtual(search) == 2 + sum(search.state[node].depth + 1 for node, _ in wanted)
    # A better reward draws the next iteration.
    for (node, _), reward in zip(wanted, (1.0, 0.0), strict=True):
        search.report(node, Sample("#### 1", 1, True, reward, "1"))
    (chosen, _), *_ = search.expand(1)
    assert wanted[0][0] in search.state.path(chosen)


def test_freed_slots_speed_up_other_searches() -> None:
    """Without a width of its own a search takes the room that others have left; a width bounds it."""
    free, bound = Mcts(16, NEVER, branching=16), Mcts(16, NEVER, branching=16, width=2)
    for search, wide in ((free, 8), (bound, 2)):
        assert sum(num for _, num in search.expand(2)) == 2
        search.report(ROOT, Sample("#### 1", 1, True, 0.5, "1"))
        assert sum(num for _, num in search.expand(wide)) == (8 if search is free else 1)


def test_mcts_ends_where_no_place_is_left() -> None:
    """One child each, one step each: a single path, whatever the cap."""
    search = Mcts(8, NEVER, branching=1)
    run(search, lambda _: Sample("#### 1", 1, True, 0.5, "1"), room=4)
    assert search.reason is Reason.CAP
    assert len(search.state) == 2


# Beam


def test_beam_keeps_the_best() -> None:
    """The best nodes of a depth go on; a solution takes its place with it."""
    search = Beam(8, NEVER, beams=2)
    assert search.expand(1) == [(ROOT, 8)]
    for reward in (0.1, 0.9, 0.2, 0.8, 0.3, 0.3, 0.3):
        search.report(ROOT, Sample("a\n", 1, False, reward))
    search.report(ROOT, Sample("#### 1", 1, True, 0.05, "1"))
    wanted = search.expand(1)
    assert [search.state[node].reward for node, _ in wanted] == [0.9, 0.8]
    assert [num for _, num in wanted] == [4, 4]
    for place in range(8):
        search.report(wanted[place // 4][0], Sample("#### 2", 1, True, 1.0 if place == 0 else 0.1, "2"))
    assert search.reason is Reason.CAP
    assert search.record()["votes"] == [{"answer": "2", "votes": 2}]


# Bad input


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Rebase(0, NEVER), "dynasor.branches=0 is outside"),
        (lambda: Rebase(4, NEVER, round_width=5), "dynasor.round_width=5 is outside [1, 4]"),
        (lambda: Mcts(4, NEVER, branching=True), "dynasor.branching=True is a bool"),
        (lambda: Beam(4, NEVER, beams=5), "dynasor.beams=5 is outside [1, 4]"),
        (lambda: BestOfN(4, NEVER, vote="loudest"), "dynasor.vote='loudest'"),
        (lambda: BestOfN(4, NEVER, hopeless=1.5), "dynasor.hopeless=1.5 is outside [0, 1]"),
        (lambda: BestOfN(4, NEVER, hopeless="0.1"), "dynasor.hopeless='0.1' is a str"),  # type: ignore[arg-type]
    ],
)
def test_what_is_out_of_range_is_named(make_it: Callable[[], Any], message: str) -> None:
    """Key, value, what is allowed."""
    with pytest.raises(FieldError) as error:
        make_it()
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_lost_after_the_end_shrinks_no_cap(name: str) -> None:
    """Siblings that were ended with the decision come back as lost: their tokens count, the evidence stays as it was."""
    search = make(
        name, 8, "best:0.9" if name != "self_consistency" else "window:2", **({"width": 8} if name == "mcts" else {})
    )
    asked = [node for node, num in search.expand(8) for _ in range(num)]
    while search.reason is None:
        if not asked:
            asked = [node for node, num in search.expand(8) for _ in range(num)]
        node = asked.pop(0)
        search.report(node, solution("7", 0.95, whole=True)(0))
    before = search.record()
    for node in asked:
        search.lose(node, 3)
    after = search.record()
    assert asked or name in ("beam", "rebase")  # which decide on whole depths
    assert after["num_failed"] == 0
    assert (after["certaindex"], after["votes"]) == (before["certaindex"], before["votes"])
    assert after["num_tokens"] == before["num_tokens"] + 3 * len(asked)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 500))
def test_mcts_gives_each_step_its_tokens(lengths: list[int], num_tokens: int) -> None:
    """What a path has spent is the sum of its nodes: a sample from its middle has so much less left."""
    search = Mcts(4, NEVER)
    ((node, _),) = search.expand(1)
    text = "".join("x" * length + "\n" for length in lengths)
    search.report(node, Sample(text + "#### 1", num_tokens, True, 0.5, "1"))
    tokens = [found.num_tokens for found in search.state.nodes]
    assert sum(tokens) == num_tokens
    assert all(num >= 0 for num in tokens)
    assert search.record()["branch_tokens"] == [num_tokens]


def test_without_an_answer_the_best_text_speaks() -> None:
    """Prose has no answer to vote for; the highest reward decides, of equals the first."""
    for rewards, best in (([0.1, 0.9, 0.3], 1), ([0.5, 0.5], 0)):
        search = BestOfN(4, NEVER)
        nodes = [node for node, num in search.expand(4) for _ in range(num)]
        for node, reward in zip(nodes, rewards, strict=False):
            search.report(node, Sample("prose", 5, True, reward, None))
        assert search.record()["branch"] == best
