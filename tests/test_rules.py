"""When a program has seen enough: exact numbers, and what must hold for any votes."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from math import comb, log
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.certaindex import answer_entropy, beta_certainty, entropy_certaindex, overtake_risk, trust
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import RULES, parse_stop

DOCS = Path(__file__).parents[1] / "docs" / "stopping.md"
VOTES = st.lists(st.integers(1, 12), min_size=1, max_size=6).map(lambda c: tuple(sorted(c, reverse=True)))


def stops(rule: str, counts: tuple[int, ...], num_left: int = 10, **more: object) -> bool:
    return parse_stop(rule).stops(Evidence(counts, 0, num_left, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((5,), 1.0),
        ((4, 1), 0.689),
        ((3, 2), 0.582),
        ((3, 1, 1), 0.410),
        ((2, 2, 1), 0.345),
        ((2, 1, 1, 1), 0.172),
        ((1,) * 5, 0.0),
    ],
)
def test_entropy_certaindex_at_five(counts: tuple[int, ...], expected: float) -> None:
    """The paper's certaindex of every split of five votes."""
    assert entropy_certaindex(counts) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("n", "expected"), [(10, 0.699), (16, 0.750), (20, 0.769), (30, 0.796), (64, 0.833), (128, 0.857)]
)
def test_entropy_certaindex_of_a_tie_grows_with_size(n: int, expected: float) -> None:
    """Why a constant threshold must not be re-checked: an even two-way tie scores 1 - ln 2 / ln n."""
    assert entropy_certaindex((n // 2, n // 2)) == pytest.approx(expected, abs=5e-4)
    assert not stops("entropy", (n // 2, n // 2))


def test_entropy_of_nothing_is_zero() -> None:
    """No votes: no entropy, no certainty."""
    assert answer_entropy(()) == 0.0
    assert entropy_certaindex(()) == 0.0
    assert entropy_certaindex((1,)) == 0.0
    assert answer_entropy((1, 1)) == pytest.approx(log(2))


@pytest.mark.parametrize(
    ("votes", "probability"),
    [
        ((3, 0), 0.9375),
        ((4, 0), 0.9688),
        ((5, 1), 0.9375),
        ((6, 1), 0.9648),
        ((7, 2), 0.9453),
        ((8, 2), 0.9673),
        ((9, 3), 0.9539),
    ],
)
def test_beta_certainty_is_adaptive_consistency_s(votes: tuple[int, int], probability: float) -> None:
    """Adaptive-Consistency's figures, and so where it stops at 0.95."""
    assert beta_certainty(*votes) == pytest.approx(probability, abs=5e-5)
    counts = tuple(v for v in votes if v)
    assert stops("beta", counts) == (probability >= 0.95)


@given(st.integers(0, 256), st.integers(0, 256))
def test_beta_certainty_is_exact(first: int, second: int) -> None:
    """Of 2^(n + 1) outcomes those with at most `first` heads, and never another float than they give."""
    n = first + second + 1
    assert beta_certainty(first, second) == sum(comb(n, heads) for heads in range(first + 1)) / 2**n


@pytest.mark.parametrize(
    ("rule", "counts", "num_left", "expected"),
    [
        ("entropy", (5,), 11, True),
        ("entropy", (4,), 12, False),
        ("entropy", (4, 1), 11, False),
        ("entropy", (9, 1), 6, True),
        ("margin", (5, 1), 3, True),
        ("margin", (5, 1), 4, False),
        ("margin", (5, 5), 0, False),
        ("predictive", (1,), 1, False),  # one vote is none, whatever it leaves
        ("predictive:0.5", (1,), 4, False),
        ("predictive", (2,), 14, False),  # 0.05995
        ("balanced", (2,), 14, True),
        ("predictive", (3,), 13, True),  # 0.02056
        ("predictive:0.02", (3,), 13, False),
        ("careful", (3, 1), 12, False),  # 0.1352
        ("balanced", (3, 1), 12, False),
        ("fast", (3, 1), 12, True),
        ("fast", (2, 1), 13, False),
        ("predictive", (5, 1), 10, True),  # 0.01705
        ("predictive", (5, 2), 9, False),
        ("predictive", (8, 8), 0, False),
        ("predictive", (5, 5), 6, False),
        ("never", (16,), 0, False),
        ("reward", (3,), 5, False),
    ],
)
def test_each_rule_at_its_edges(rule: str, counts: tuple[int, ...], num_left: int, expected: bool) -> None:
    """Where each rule fires, and the nearest case where it must not."""
    assert stops(rule, counts, num_left) is expected


def test_window_wants_one_whole_unanimous_window() -> None:
    """ESC: only full windows count, and an abstention breaks one."""
    rule = "window:3"
    assert stops(rule, (3,), recent=("a", "a", "a"))
    assert not stops(rule, (2,), recent=("a", "a"))
    assert not stops(rule, (4,), recent=("a",) * 4)
    assert not stops(rule, (2,), recent=("a", None, "a"))
    assert stops(rule, (4, 2), recent=("b", "b", "a", "a", "a", "a")[-6:])
    assert not stops(rule, (3, 3), recent=("b", "b", "b", "a", "a", "a"))  # the window agrees, the vote is a tie


@pytest.mark.parametrize(
    ("weights", "num_left", "expected"),
    [
        ((0.3,), 2, False),
        ((0.3,), 0, True),
        ((2.5, 0.4), 2, True),
        ((2.5, 0.5), 2, False),  # two rewards of 1 would bring them level
        ((2.5, 0.4), 3, False),
        ((0.0,), 1, False),
    ],
)
def test_margin_by_weight(weights: tuple[float, ...], num_left: int, expected: bool) -> None:
    """Each branch left may weigh 1: votes that weigh little decide nothing, however many they are."""
    counts = (20, 3)[: len(weights)]
    assert stops("margin", counts, num_left, weights=weights) is expected
    assert stops("margin", counts, num_left)


def test_reward_uses_the_mean_and_never_fires_without_rewards() -> None:
    """The reward rule is ready for judges and silent until there is one."""
    assert stops("reward:0.4", (), rewards=(0.3, 0.6))
    assert not stops("reward:0.4", (), rewards=(0.3, 0.4))
    assert not stops("reward:0", ())


def test_rules_join_by_and_or() -> None:
    """All must hold, or any may."""
    assert not stops("beta and margin", (4,), 10)
    assert stops("beta or margin", (4,), 10)
    assert stops("beta and margin", (4,), 3)
    assert not stops("beta or never", (2, 2), 0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("beta:0.9 or beta:0.8 or predictive:0.1 or predictive:0.2", (("beta", 0.8), ("predictive", 0.2))),
        ("careful or fast", (("predictive", 0.2),)),
        ("balanced and predictive:0.2", (("predictive", 0.1),)),
        ("beta:0.9 and beta:0.8 and predictive:0.1 and predictive:0.2", (("beta", 0.9), ("predictive", 0.1))),
        (
            "window:3 or window:5 or window:3",
            (("window", 3.0), ("window", 5.0)),
        ),  # neither holds wherever the other does
        ("margin", (("margin", 0.0),)),
    ],
)
def test_of_many_levels_one_decides(text: str, parts: tuple[tuple[str, float], ...]) -> None:
    """The loosest of those any of which may hold, the strictest of those that all must; the text stays as it was sent."""
    rule = parse_stop(text)
    assert rule.parts == parts
    assert rule.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nope",
        "beta:",
        "beta:2",
        "beta:x",
        "beta:nan",
        "beta and",
        "beta margin",
        "beta and margin or never",
        "window:2.5",
        "window:inf",
        "predictive:-0.1",
        "fast:0.3",
        "quick",
        "margin:1",
    ],
)
def test_a_wrong_rule_is_refused(text: str) -> None:
    """The error names the field, the text got and what is allowed."""
    with pytest.raises(FieldError, match=r"dynasor\.stop="):
        parse_stop(text)


def test_predictive_risk_by_hand() -> None:
    """One vote left, 1-0: only an unseen answer can tie. P = (1/2)(1/2)/(1 + 3/2): half of the prior's share."""
    # alphas: leader 1.5, unseen 0.5, abstention 0.5: P(unseen next) = 0.5 / 2.5; a tie counts half.
    assert overtake_risk((1,), 0, 1) == pytest.approx(0.5 * 0.5 / 2.5)
    # 2-1, one left: the rival ties with 1.5 / 5, the unseen one cannot reach.
    assert overtake_risk((2, 1), 0, 1) == pytest.approx(0.5 * 1.5 / 5.0)
    assert overtake_risk((), 3, 5) == 1.0


def test_predictive_risk_matches_simulation() -> None:
    """The union of the pairwise terms, against drawing the future from the same posterior."""
    counts, abstentions, num_left = (4, 2, 1), 1, 6
    rng, draws = random.Random(0), 40_000
    total = 0.0
    for _ in range(draws):
        # the last two: an answer not seen yet, and abstention
        weights = [c + 0.5 for c in counts] + [0.5, abstentions + 0.5]
        final = [*counts, 0, 0]
        for _ in range(num_left):
            pick = rng.choices(range(5), weights)[0]
            weights[pick] += 1
            final[pick] += 1
        total += sum((final[j] > final[0]) + 0.5 * (final[j] == final[0]) for j in range(1, 4))
    assert overtake_risk(counts, abstentions, num_left) == pytest.approx(total / draws, abs=0.01)


def exact_risk(counts: tuple[int, ...], abstentions: int, num_left: int, trust: float = 1.0) -> Fraction:
    """The union bound by its definition: every way in which the votes left may go to a rival and to the leader."""
    each = Fraction(trust)

    def ways(alpha: Fraction) -> list[Fraction]:
        found = [Fraction(1)]
        for y in range(1, num_left + 1):
            found.append(found[-1] * (alpha + y - 1) / y)
        return found

    half = Fraction(1, 2)
    total = each * (sum(counts) + abstentions) + half * (len(counts) + 2)
    leader, all_ways = ways(each * counts[0] + half), ways(total)[num_left]
    risk = Fraction(0)
    for votes in (*counts[1:], 0):
        rival, others = ways(each * votes + half), ways(total - each * (counts[0] + votes) - 1)
        for mine in range(num_left + 1):
            for its in range(max(0, mine + counts[0] - votes), num_left - mine + 1):
                part = leader[mine] * rival[its] * others[num_left - mine - its] / all_ways
                risk += part / 2 if votes + its == counts[0] + mine else part
    return min(Fraction(1), risk)


TRUSTS = st.integers(1, 8).map(lambda eighths: eighths / 8)


@given(VOTES, st.integers(0, 5), st.integers(0, 16), TRUSTS)
def test_risk_is_what_its_definition_says(
    counts: tuple[int, ...], abstentions: int, num_left: int, trust: float
) -> None:
    """To 1e-12, against fractions."""
    assert overtake_risk(counts, abstentions, num_left, trust) == pytest.approx(
        float(exact_risk(counts, abstentions, num_left, trust)), abs=1e-12
    )


@pytest.mark.parametrize("trust", [1.0, 0.625])
@pytest.mark.parametrize(
    ("counts", "abstentions", "num_left"),
    [((40, 38, 9), 3, 90), ((1,) * 30, 0, 98), ((70, 2), 56, 128), ((3, 3, 2), 0, 120), ((90, 89), 0, 77)],
)
def test_risk_of_large_programs(counts: tuple[int, ...], abstentions: int, num_left: int, trust: float) -> None:
    """The same where many branches are left, and of unlikely ends."""
    exact = float(exact_risk(counts, abstentions, num_left, trust))
    assert overtake_risk(counts, abstentions, num_left, trust) == pytest.approx(exact, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "abstentions", "num_left", "trust", "risk"),
    [
        ((2,), 0, 14, 1, 0.059954),
        ((3,), 0, 13, 1, 0.020563),
        ((3,), 0, 13, 1 / 2, 0.070706),
        ((4,), 0, 12, 1, 0.006443),
        ((4,), 0, 12, 5 / 8, 0.020929),
        ((3, 1), 0, 12, 1, 0.135205),
        ((5, 1), 0, 10, 1, 0.017053),
        ((5, 2), 1, 8, 3 / 4, 0.063151),
        ((8, 3), 0, 21, 1, 0.029024),
        ((4,), 2, 26, 1 / 2, 0.044209),
    ],
)
def test_known_risks(counts: tuple[int, ...], abstentions: int, num_left: int, trust: float, risk: float) -> None:
    """Found apart from this code, when the rule was replayed first."""
    assert overtake_risk(counts, abstentions, num_left, trust) == pytest.approx(risk, abs=5e-7)


@pytest.mark.parametrize(
    ("num_finished", "num_in_flight", "expected"),
    [
        (0, 0, 1 / 8),
        (0, 16, 1 / 8),
        (1, 255, 1 / 8),
        (3, 0, 1),
        (3, 13, 3 / 8),
        (4, 4, 6 / 8),
        (15, 1, 1),
        (8, 4, 7 / 8),
    ],
)
def test_votes_count_for_less_while_others_are_in_flight(
    num_finished: int, num_in_flight: int, expected: float
) -> None:
    """Eight times the root of the finished share, rounded to eighths."""
    assert trust(num_finished, num_in_flight) == expected


def test_at_full_width_three_votes_are_not_enough() -> None:
    """Of sixteen: one after the other three agree and the program ends; with the rest in flight four have to."""
    assert stops("predictive", (3,), 13)
    assert not stops("predictive", (3,), 13, num_in_flight=13)
    assert stops("predictive", (4,), 12, num_in_flight=12)


def test_dear_branches_stop_sooner() -> None:
    """2-0 of sixteen has a risk of 0.06: enough where branches are dear, not where they are cheap."""
    assert not stops("predictive", (2,), 14)
    assert stops("predictive", (2,), 14, cheapness=0.8)
    assert stops("predictive", (3,), 13)
    assert stops("predictive", (3,), 13, cheapness=2.0)
    assert not stops("predictive:0.03", (3,), 13, cheapness=2.0)


@pytest.mark.parametrize(
    ("level", "cap", "votes"),
    [
        ("careful", 8, 2),
        ("careful", 16, 3),
        ("careful", 32, 3),
        ("balanced", 8, 2),
        ("balanced", 16, 2),
        ("balanced", 32, 2),
    ],
)
def test_how_many_agreeing_votes_are_enough(level: str, cap: int, votes: int) -> None:
    """One after the other, of branches as long as others'."""
    assert next(num for num in range(1, cap) if stops(level, (num,), cap - num)) == votes


@given(VOTES, st.integers(0, 5), st.integers(0, 40))
def test_risk_is_a_probability_and_zero_exactly_when_decided(
    counts: tuple[int, ...], abstentions: int, num_left: int
) -> None:
    """Risk falls to 0 exactly when the lead exceeds what is left."""
    risk = overtake_risk(counts, abstentions, num_left)
    assert 0.0 <= risk <= 1.0
    lead = counts[0] - (counts[1] if len(counts) > 1 else 0)
    assert (risk == 0.0) == (lead > num_left)


@given(VOTES, st.integers(1, 40))
def test_risk_falls_as_the_lead_grows(counts: tuple[int, ...], num_left: int) -> None:
    """One more vote for the leader, with one branch fewer left, never raises the risk."""
    more = (counts[0] + 1, *counts[1:])
    assert overtake_risk(more, 0, num_left - 1) <= overtake_risk(counts, 0, num_left) + 1e-12


@given(VOTES, st.integers(0, 30), st.sampled_from(sorted(set(RULES) - {"reward"})))
def test_a_tie_never_stops(counts: tuple[int, ...], num_left: int, rule: str) -> None:
    """Whatever the rule, two leaders mean no decision."""
    tied = (counts[0], *counts)
    assert not stops(rule, tied, num_left, recent=("a",) * 5)


@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=16),
    st.permutations("abcde"),
    st.sampled_from(sorted(RULES)),
)
def test_names_of_answers_do_not_matter(answers: list[str], renamed: list[str], rule: str) -> None:
    """Permuting the labels changes no decision."""

    def decide(names: list[str]) -> bool:
        counts = tuple(sorted((names.count(name) for name in set(names)), reverse=True))
        return stops(rule, counts, 16 - len(names), recent=tuple(names))

    mapping = dict(zip("abcde", renamed, strict=True))
    assert decide(answers) == decide([mapping[a] for a in answers])


def test_a_rule_is_short() -> None:
    """It is asked after every branch, of every request: a long one would hold up the scheduler."""
    assert parse_stop(" or ".join(["margin"] * 25)).parts
    with pytest.raises(FieldError, match=r"dynasor.stop has 308 characters; at most 256 are allowed"):
        parse_stop(" or ".join(["margin"] * 31) + "  ")


def test_the_page_has_every_rule_with_its_levels() -> None:
    """As the code has them."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\| (.*?) ?\|$", DOCS.read_text(), re.MULTILINE)
    told = {name: (levels, default) for name, levels, default in rows}
    expected = {
        name: (f"{rule.low:g} to {rule.high:g}", f"{rule.default:g}") if rule.high > rule.low else ("", "")
        for name, rule in RULES.items()
    }
    assert told == expected
