"""What requests that were accepted have said about an id of their owner's, for as long as it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from sglang_dynasor.observe.shelf import Shelf

T = TypeVar("T")


@dataclass(slots=True)
class _Said(Generic[T]):
    """One thing that was said about an id."""

    value: T
    rids: dict[str, None] = field(
        default_factory=dict[str, None]
    )  # of the requests that said so, but for some that are over
    is_kept: bool = False  # a record came of one


class Claims(Generic[T]):
    """Ids of the newest `size`, with what was said about each.

    It holds while a request that said so is under way, and from its first record on. What SGLang or a scheduler refused in the end
    has left neither, and shuts nobody out.

    Args:
        is_open: whether the request of a rid is under way.
    """

    def __init__(self, is_open: Callable[[str], bool], size: int = 10_000):
        self.is_open = is_open
        self._said: Shelf[list[_Said[T]]] = Shelf(size)

    def holding(self, owner: str, id: str) -> list[T]:
        """What holds of an id of this owner's, the latest last; mostly one thing or none."""
        said = self._said.find(owner, id)
        if said is None:
            return []
        said[:] = [one for one in said if one.is_kept or any(map(self.is_open, one.rids))]
        if not said:
            self._said.drop(owner, id)
        return [one.value for one in said]

    def take(self, owner: str, id: str, value: T, rid: str) -> None:
        """The request of a rid says this of an id of its owner's."""
        self.holding(owner, id)
        said = self._said.find(owner, id) or []
        one = next((one for one in said if one.value == value), None) or _Said(value)
        said[:] = [*(other for other in said if other is not one), one]
        if not one.is_kept:
            for old in list(islice(one.rids, 2)):  # so that what is over does not gather
                del one.rids[old]
                if self.is_open(old):
                    one.rids[old] = None
            one.rids[rid] = None
        self._said.keep(owner, id, said)

    def keep(self, owner: str, id: str, rid: str) -> None:
        """A record came of the request of a rid: what it said of the id holds from now on."""
        said = self._said.find(owner, id) or []
        one = next((one for one in said if rid in one.rids), None)
        if one is None and said and not any(one.is_kept for one in said):
            one = said[-1]  # choices have rids that SGLang gave them
        if one is not None:
            one.is_kept = True
            one.rids.clear()
