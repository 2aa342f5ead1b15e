"""What is remembered of many owners, in bounded room that none of them can fill at the others' cost."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Shelf(Generic[T]):
    """Values by owner and key, `size` of all owners together; beyond that whoever has most loses the oldest of theirs.

    Nothing here takes longer the more there is, but for `owners_of` and `newest`.
    """

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[tuple[str, str], T] = OrderedDict()  # the newest last
        self._keys: dict[str, OrderedDict[str, None]] = {}  # of each owner, the newest last
        self._sized: dict[
            int, dict[str, None]
        ] = {}  # owners by how many values they have, who was heard of last at the end
        self._most = 0

    def keep(self, owner: str, key: str, value: T) -> None:
        """Store `value`, as the newest."""
        keys = self._keys.setdefault(owner, OrderedDict())
        before = len(keys)
        keys[key] = None
        keys.move_to_end(key)
        self._note(owner, before, len(keys))
        self._values[owner, key] = value
        self._values.move_to_end((owner, key))
        while len(self._values) > self.size:
            most = next(iter(self._sized[self._most]))
            self.drop(most, next(iter(self._keys[most])))

    def find(self, owner: str, key: str) -> T | None:
        return self._values.get((owner, key))

    def drop(self, owner: str, key: str) -> None:
        """Forget a value that is there."""
        del self._values[owner, key]
        keys = self._keys[owner]
        del keys[key]
        if not keys:
            del self._keys[owner]
        self._note(owner, len(keys) + 1, len(keys))

    def owners_of(self, key: str) -> list[str]:
        """Who has something under this key."""
        return [owner for owner, keys in self._keys.items() if key in keys]

    def newest(self) -> Iterator[tuple[str, T]]:
        """Each value after its owner, the newest first."""
        return ((owner, value) for (owner, _), value in reversed(self._values.items()))

    def _note(self, owner: str, before: int, now: int) -> None:
        """An owner has another number of values, one more or less, or was heard of again."""
        if before:
            del self._sized[before][owner]
            if not self._sized[before]:
                del self._sized[before]
        if now:
            self._sized.setdefault(now, {})[owner] = None
        if now > self._most:
            self._most = now
        elif self._most not in self._sized:
            self._most = now  # it was the only one with most, and has one less

    def __len__(self) -> int:
        return len(self._values)
