"""Quantiles of a stream of numbers, in bounded memory."""

from __future__ import annotations

from collections import Counter
from math import floor, log

_STEP = log(1.1)  # from one bucket to the next: quantiles are right to 5 %


class Spread:
    """Numbers that are 0 or more, how many there were and how they lie. As many buckets as there are tenths of them."""

    __slots__ = ("_buckets", "most", "num", "total")

    def __init__(self) -> None:
        self.num = 0
        self.total = self.most = 0.0
        self._buckets: Counter[int | None] = Counter()  # None: 0

    def add(self, value: float) -> None:
        self.num += 1
        self.total += value
        self.most = max(self.most, value)
        self._buckets[floor(log(value) / _STEP) if value > 0 else None] += 1

    @property
    def mean(self) -> float:
        """0 where there are none."""
        return self.total / self.num if self.num else 0.0

    def quantile(self, share: float) -> float:
        """The number that this share of them is not above, to 5 %; 0 where there are none."""
        left = share * self.num
        for bucket in sorted(self._buckets, key=lambda bucket: -(10**9) if bucket is None else bucket):
            left -= self._buckets[bucket]
            if left <= 0 and bucket is not None:
                return min(self.most, 1.1 ** (bucket + 0.5))
            if left <= 0:
                return 0.0
        return 0.0
