"""How close two answers are, as the operator's embedding server sees them: SGLang's or any other's `/v1/embeddings`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_dynasor.engine.reward_model import post

MOST_VECTORS = 2048  # of the newest answers that are remembered
Vector = NDArray[np.float32]


class EmbeddingServer:
    """Thread-safe. An answer is sent once, and again only after many others."""

    def __init__(self, url: str, timeout_s: float):
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._vectors: OrderedDict[str, Vector] = OrderedDict()
        self._lock = threading.Lock()

    def closest(self, text: str, others: Sequence[str]) -> tuple[int, float]:
        """Which of `others`, one or more, is closest to `text`, the first of equals, and the cosine between them, in [-1, 1].

        Raises:
            ValueError: the server's answer is not one vector for each text, all of one length.
            OSError: it does not answer in time.
        """
        one, *rest = vectors = self._vectors_of([text, *others])
        _check_lengths(vectors)  # also of those that came before
        cosines = [float(one @ vector) for vector in rest]
        best = max(range(len(cosines)), key=lambda i: (cosines[i], -i))
        return best, max(-1.0, min(1.0, cosines[best]))

    def _vectors_of(self, texts: list[str]) -> list[Vector]:
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        if fresh:
            known |= zip(fresh, vectors_of(self._ask(fresh), len(fresh)), strict=True)
            with self._lock:
                self._vectors |= known
                while len(self._vectors) > MOST_VECTORS:
                    self._vectors.popitem(last=False)
        return [known[text] for text in texts]

    def _ask(self, texts: list[str]) -> Any:
        return post(f"{self.url}/v1/embeddings", {"model": "default", "input": texts}, self.timeout_s)


def vectors_of(answer: Any, num: int) -> list[Vector]:
    """The `num` vectors of an `/v1/embeddings` answer, in the order of the texts, each of length 1.

    Raises:
        ValueError: anything else.
    """
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or len(rows) != num or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"its answer has not {num} vectors under 'data': {str(answer)[:200]}")
    vectors = [_unit(row.get("embedding")) for row in sorted(rows, key=lambda row: row.get("index", 0))]
    _check_lengths(vectors)
    return vectors


def _check_lengths(vectors: Sequence[Vector]) -> None:
    if len({vector.shape for vector in vectors}) > 1:
        raise ValueError("its answer has vectors of several lengths; serve one model")


def _unit(numbers: Any) -> Vector:
    if not isinstance(numbers, list) or not all(isinstance(x, int | float) for x in numbers):
        raise ValueError(f"its answer has no numbers under 'embedding': {str(numbers)[:200]}")
    vector = np.asarray(numbers, np.float32)
    length = float(np.linalg.norm(vector))
    if not 0 < length < float("inf"):
        raise ValueError(f"a vector of its answer has no direction: {str(numbers)[:200]}")
    return vector / np.float32(length)
