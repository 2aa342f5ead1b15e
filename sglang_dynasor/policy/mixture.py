"""What branches would answer, before they have: the distributions of their answers' tokens, mixed.

The entropy of the mixture is the mean entropy of its parts (each branch's own doubt) plus their disagreement (the
Jensen-Shannon divergence): votes weighed by how sure each branch is of its own. Of answers of several tokens it is that of the
whole answer, by the chain rule: at each token those are mixed that have said the same before.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, inf, log
from typing import NamedTuple

Distribution = Mapping[int, float]  # token id -> log-probability, of the most likely ones
Said = tuple[int, ...]  # the tokens of an answer so far

MOST_PLACES = 256  # of one program


@dataclass(frozen=True, slots=True)
class Mixture:
    """All in nats, 0 or more. `entropy` = `mean_entropy` + `disagreement`."""

    num_branches: int  # that have said an answer to its end
    entropy: float
    mean_entropy: float
    num_tokens: int = 0  # of answers that were looked at, all branches together

    def agreed(self, num_more: int) -> Mixture:
        """The mixture if `num_more` branches joined that are as sure as can be of one and the same answer (about)."""
        num = self.num_branches + num_more
        share = self.num_branches / num
        return Mixture(num, share * self.entropy, share * self.mean_entropy, self.num_tokens)

    @property
    def disagreement(self) -> float:
        return max(0.0, self.entropy - self.mean_entropy)


NO_MIXTURE = Mixture(0, 0.0, 0.0)


class Counted(NamedTuple):
    """What is known of a place."""

    num: int  # branches
    entropy: float  # of the mean of their distributions
    mean_entropy: float


NOBODY = Counted(0, 0.0, 0.0)


@dataclass(slots=True)
class Place:
    """What branches that have said the same so far may say next.

    The entropy of each is known. What they disagree by the device finds from all tokens, where it mixes, and tells a step or two later: from
    then on a branch counts. Elsewhere the host finds it from what it has of each, the likeliest tokens; what that leaves out counts as one
    further token, the same for all, so it finds no more than there is.
    """

    num: int = 0  # answers that came here
    total: dict[int | None, float] = field(default_factory=dict[int | None, float])  # by token; None: what is left out
    own_entropy: float = 0.0  # of these, added up
    true_entropy: float = 0.0  # of whole distributions, added up
    is_on_device: bool = False  # it mixes them
    told: Counted = NOBODY  # by it, of the first that came
    untold: list[float] = field(default_factory=list[float])  # entropies of those after

    def add(self, distribution: Distribution, entropy: float | None) -> None:
        parts: dict[int | None, float] = {token: exp(logprob) for token, logprob in distribution.items()}
        parts[None] = max(0.0, 1.0 - sum(parts.values()))
        for token, p in parts.items():
            self.total[token] = self.total.get(token, 0.0) + p
        own = _entropy(parts.values())
        entropy = own if entropy is None else entropy
        self.num += 1
        self.own_entropy += own
        self.true_entropy += entropy
        self.untold.append(entropy)

    def tell(self, num: int, entropy: float) -> None:
        """So much the mean of the first `num` distributions has, more than were told before."""
        news, self.untold = self.untold[: num - self.told.num], self.untold[num - self.told.num :]
        own = self.told.num * self.told.mean_entropy + sum(news)
        self.told = Counted(num, entropy, own / num)

    @property
    def counted(self) -> Counted:
        if self.is_on_device:
            return self.told
        mean = self.true_entropy / self.num
        disagreement = _entropy([p / self.num for p in self.total.values()]) - self.own_entropy / self.num
        return Counted(self.num, mean + max(0.0, disagreement), mean)


@dataclass(slots=True)
class Depth:
    """All places after so many tokens, together; the entropies by the answers that came there."""

    num: int = 0
    entropy: float = 0.0
    mean_entropy: float = 0.0
    num_ended: int = 0  # answers whose last token this was

    def weigh(self, counted: Counted, sign: int) -> None:
        self.num += sign * counted.num
        self.entropy += sign * counted.num * counted.entropy
        self.mean_entropy += sign * counted.num * counted.mean_entropy


class Ending(NamedTuple):
    """An answer that is said to its end, until the device tells what its last token was drawn from."""

    branch: int
    said: Said  # before that token
    number: int  # of the branch among those who came there


@dataclass(slots=True)
class Answers:
    """What the branches of a program say in place of an answer, token by token."""

    places: dict[Said, Place] = field(default_factory=dict[Said, Place])
    depths: list[Depth] = field(default_factory=list[Depth])
    branches: set[int] = field(default_factory=set[int])  # that have said an answer to its end
    ending: list[Ending] = field(default_factory=list[Ending])
    num_changes: int = 0  # of what they say together
    _mixture: Mixture | None = None  # until it changes

    def see(self, said: Said, distribution: Distribution, entropy: float | None = None) -> int:
        """A branch that has said `said` of its answer says its next token.

        Args:
            distribution: what that token was drawn from.
            entropy: of all tokens, in nats; None: that of `distribution`.

        Returns:
            How many have come there; 0 where that is one place too many.
        """
        if said not in self.places:
            if len(self.places) == MOST_PLACES:
                return 0
            self.places[said] = Place()
        while len(self.depths) <= len(said):
            self.depths.append(Depth())
        with self._changed(said) as place:
            place.add(distribution, entropy)
        return place.num

    def mix_on_device(self, said: Said) -> None:
        """What is said there the device mixes, from the first branch on."""
        with self._changed(said) as place:
            place.is_on_device = True

    def mix_on_host(self, said: Said) -> None:
        """The device has given up what is said there. No harm if it did not mix it."""
        if said in self.places:
            with self._changed(said) as place:
                place.is_on_device = False

    def tell(self, said: Said, num: int, entropy: float) -> bool:
        """The device has mixed what the first `num` branches said there. Returns whether that is news."""
        place = self.places.get(said)
        if place is None or not place.is_on_device or not place.told.num < num <= place.num:
            return False
        with self._changed(said):
            place.tell(num, entropy)
        return True

    def end(self, index: int, said: Said) -> None:
        """Branch `index` has said an answer to its end, `said` and a last token."""
        place = self.places.get(said)
        self.ending.append(Ending(index, said, 0 if place is None else place.num))
        self._hear(said)

    def forget(self, index: int) -> None:
        """Branch `index` is none of those that decide. What it said stays mixed in."""
        self._note()
        self.branches.discard(index)
        self.ending = [ending for ending in self.ending if ending.branch != index]

    def rest(self) -> None:
        """Nobody says anything for now. Of answers' further tokens what was found is kept, and the tokens are not: there may be thousands
        of such programs."""
        for said in self.places:
            self.mix_on_host(said)
        self.places = {said: place for said, place in self.places.items() if not said}

    def close(self) -> None:
        """Nobody says anything more: what was found is kept, and the tokens are not. Where nothing is told yet the host serves."""
        for said, place in self.places.items():
            if not place.told.num:
                self.mix_on_host(said)
        for ending in self.ending:
            self._count(ending)
        self.places.clear()
        self.ending.clear()

    @contextmanager
    def _changed(self, said: Said) -> Generator[Place]:
        """A place, to be changed."""
        self._note()
        place, depth = self.places[said], self.depths[len(said)]
        if place.num:
            depth.weigh(place.counted, -1)
        yield place
        depth.weigh(place.counted, +1)
        self._hear(said)

    def _hear(self, said: Said) -> None:
        """Count the answers that ended there, as far as what they said is known."""
        place = self.places.get(said)
        known = inf if place is None or not place.is_on_device else place.told.num
        for ending in [ending for ending in self.ending if ending.said == said and ending.number <= known]:
            self.ending.remove(ending)
            self._count(ending)

    def _count(self, ending: Ending) -> None:
        self._note()
        if len(ending.said) < len(self.depths):
            self.depths[len(ending.said)].num_ended += 1
        self.branches.add(ending.branch)

    def _note(self) -> None:
        self._mixture = None
        self.num_changes += 1

    @property
    def mixture(self) -> Mixture:
        """Of all branches that came to an answer; all 0 for none. Of a token know those who said it, or ended before."""
        if self._mixture is None:
            self._mixture = self._mix()
        return self._mixture

    def _mix(self) -> Mixture:
        entropy = mean_entropy = 0.0
        num_tokens = num_ended = 0
        for depth in self.depths:
            if depth.num:
                entropy += depth.entropy / (depth.num + num_ended)
                mean_entropy += depth.mean_entropy / (depth.num + num_ended)
            num_tokens += depth.num
            num_ended += depth.num_ended
        return Mixture(len(self.branches), max(0.0, entropy), max(0.0, mean_entropy), num_tokens)


def _entropy(probabilities: Iterable[float]) -> float:
    return -sum([p * log(p) for p in probabilities if p > 0])
