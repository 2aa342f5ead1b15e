"""Answers compared symbolically in the author's own process: on plain SGLang, in searches, and of branches of the author's own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from sglang_dynasor.policy.answers import shown
from sglang_dynasor.policy.comparison import MOST_COMPARED
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.formula import read_formula
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.symbolic import shared_worker

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def find_same(form: str, known: Mapping[int, str]) -> int | None:
    """Which of the known forms, by number, is the same as `form`; None where none is or nobody can say, which is logged once per kind."""
    try:
        place = shared_worker().first_same(form, list(known.values()))
    except Exception as error:
        kind = type(error).__name__
        if kind not in _logged:
            _logged.add(kind)
            logger.warning(
                "dynasor: answers were not compared (%s: %s) and stay apart. Logged once", kind, error
            )  # fmt: skip
        return None
    return None if place is None else list(known)[place]


class AnswerKeys:
    """The keys of one search's answers: of one that is found to be a known one, that one's. Thread-safe."""

    def __init__(self, spec: ProgramSpec):
        self.spec = spec
        self._keys: dict[str, str] = {}  # by an answer's own
        self._answers: list[
            tuple[str, str]
        ] = []  # that are different, with their keys, in the order in which they came
        self._merges: list[dict[str, Any]] = []
        self._num = 0  # answers that were compared
        self._lock = threading.Lock()

    def key(self, answer: str) -> str:
        """The key under which an answer is counted. A new formula waits until it has been compared."""
        own = answer_key(answer, self.spec.equal, self.spec.answer)
        if not self.spec.comparer:
            return own
        with self._lock:
            if own not in self._keys:
                self._keys[own] = self._find(own, answer)
            return self._keys[own]

    def _find(self, own: str, answer: str) -> str:
        if read_formula(own) is not None:
            forms = {i: key for i, (_, key) in enumerate(self._answers) if read_formula(key) is not None}
            self._num += bool(forms)
            into = find_same(own, {i: forms[i] for i in list(forms)[:MOST_COMPARED]})
            if into is not None:
                said, key = self._answers[into]
                self._merges.append(
                    {"answer": shown(answer), "into": shown(said), "by": self.spec.comparer, "score": None}
                )
                return key
        self._answers.append((answer, own))
        return own

    def record(self) -> dict[str, Any]:
        """Keys that the record has where answers were compared."""
        return {"merges": list(self._merges), "num_comparisons": self._num} if self.spec.comparer else {}
