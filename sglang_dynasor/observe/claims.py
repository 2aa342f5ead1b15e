"""What requests that were accepted have said about an id of their owner's, for as long as it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar
from weakref import ref

from sglang_dynasor.observe.shelf import Shelf

T = TypeVar("T")


@dataclass(slots=True)
class _Said(Generic[T]):
    """One thing that was said about an id."""

    value: T
    # Requests that said so, but for some that are over: their rids, which may be sent again, and what SGLang held of each.
    requests: dict[str, ref[Any]] = field(default_factory=dict[str, "ref[Any]"])
    is_kept: bool = False  # a record came of one


class Claims(Generic[T]):
    """Ids of the newest `size`, with what was said about each.

    It holds while a request that said so is under way, and from its first record on. What SGLang or a scheduler refused in the end
    has left neither, and shuts nobody out.

    Args:
        under_way: what SGLang holds of the request of a rid; None: nothing, it is over.
    """

    def __init__(self, under_way: Callable[[str], Any], size: int = 10_000):
        self.under_way = under_way
        self._said: Shelf[list[_Said[T]]] = Shelf(size)

    def holding(self, owner: str, id: str) -> list[T]:
        """What holds of an id of this owner's, the latest last; mostly one thing or none."""
        said = self._said.find(owner, id)
        if said is None:
            return []
        said[:] = [one for one in said if one.is_kept or self._has_open(one)]
        if not said:
            self._said.drop(owner, id)
        return [one.value for one in said]

    def take(self, owner: str, id: str, value: T, rid: str) -> None:
        """The request of a rid, which is under way, says this of an id of its owner's."""
        self.holding(owner, id)
        said = self._said.find(owner, id) or []
        one = next((one for one in said if one.value == value), None) or _Said(value)
        said[:] = [*(other for other in said if other is not one), one]
        if not one.is_kept:
            for old, request in list(islice(one.requests.items(), 2)):  # so that what is over does not gather
                del one.requests[old]
                if self._is_open(old, request):
                    one.requests[old] = request
            one.requests[rid] = ref(self.under_way(rid))
        self._said.keep(owner, id, said)

    def keep(self, owner: str, id: str, rid: str) -> None:
        """A record came of the request of a rid: what it said of the id holds from now on."""
        said = self._said.find(owner, id) or []
        one = next((one for one in said if rid in one.requests), None)
        if one is None and said and not any(one.is_kept for one in said):
            one = said[-1]  # choices have rids that SGLang gave them
        if one is not None:
            one.is_kept = True
            one.requests.clear()
            said[:] = [
                other for other in said if other is one or not other.is_kept
            ]  # a rid that is sent again and again holds one

    def _has_open(self, one: _Said[T]) -> bool:
        return any(self._is_open(rid, request) for rid, request in one.requests.items())

    def _is_open(self, rid: str, request: ref[Any]) -> bool:
        found = self.under_way(rid)
        return found is not None and found is request()
