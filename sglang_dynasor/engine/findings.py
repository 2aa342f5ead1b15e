"""What the first rank finds out about answers beside the loop: by sympy in a process, by an embedding server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import NamedTuple

from sglang_dynasor.engine.beside import Beside, Key
from sglang_dynasor.engine.embedding import EmbeddingServer
from sglang_dynasor.engine.fence import guarded
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.symbolic import shared_worker

_APART = "answers stay apart"


class Finding(NamedTuple):
    """What an answer was found to be."""

    into: int | None  # the branch whose answer it is; None: nobody's
    score: float | None = None


class Findings:
    """One place to ask for each comparer. What the model finds comes by itself (comparing.py): only its time-out is kept here."""

    def __init__(self, embedding_url: str, timeout_s: float):
        self.lost: dict[Key, None] = {}  # that could not be asked about: told as found to be nobody's
        self._embedding = EmbeddingServer(embedding_url, timeout_s)
        then = f"{_APART}. Check that it serves an embedding model and answers within --dynasor-equal-timeout-s={timeout_s:g}"
        self._beside: dict[str, Beside[Finding]] = {
            "symbolic": Beside(timeout_s, "symbolic", "the process that compares formulas found nothing", _APART),
            "embedding": Beside(
                timeout_s, "embedding", f"no vectors from --dynasor-embedding-url={embedding_url}", then
            ),
            "model": Beside(
                timeout_s, "model", "the model was not asked in time whether answers mean the same", _APART
            ),
        }

    @guarded("ask")  # on the first rank only: the others go on, and so does it
    def ask(self, key: Key, spec: ProgramSpec, answer: str, known: Mapping[int, str]) -> bool:
        """Have an answer compared with known ones (1 or more, by branch); the finding is among `given` within the time-out.

        Returns:
            True; anything else means that it was not asked about.
        """
        finders: dict[str, Callable[[], Finding]] = {
            "symbolic": partial(self._by_formula, answer, known),
            "embedding": partial(self._by_embedding, answer, known, spec),
        }
        find = finders.get(spec.comparer)
        self._beside[spec.comparer].ask(key, None if find is None else lambda: find)
        return True

    def given(self) -> Iterator[tuple[Key, Finding | None]]:
        """Findings that have come, None for those that will not in time, until they are forgotten."""
        lost = ((key, None) for key in self.lost)
        return chain(lost, *(beside.given() for beside in self._beside.values()))

    @guarded("forget")
    def forget(self, key: Key) -> None:
        """The finding has been used, or is no longer wanted."""
        self.lost.pop(key, None)
        for beside in self._beside.values():
            beside.forget(key)

    @property
    def num_errors(self) -> int:
        return sum(beside.num_errors for beside in self._beside.values())

    def _by_formula(self, answer: str, known: Mapping[int, str]) -> Finding:
        place = shared_worker().first_same(answer, list(known.values()))
        return Finding(None if place is None else list(known)[place])

    def _by_embedding(self, answer: str, known: Mapping[int, str], spec: ProgramSpec) -> Finding:
        place, cosine = self._embedding.closest(answer, list(known.values()))
        return Finding(list(known)[place], cosine) if cosine >= spec.least_score else Finding(None)
