"""Who holds which slot of the sums on the device, and what is added to them in the next step.

A slot is for one place in the answers of one program: the branches that have said the same so far. It is given when the first
of them comes there and is free again when the program is over. All of it is decided on what is equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dynasor.engine.live import BranchTag, LiveProgram
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.mixture import Said
from sglang_dynasor_kernels import Addition

MOST_KEPT = 256  # rows of one step that may stand at an answer
MIB = 2**20


class Memory(NamedTuple):
    """How many distributions the device holds: float32 over the vocabulary."""

    num_slots: int
    num_kept: int  # of each of two steps: with overlap the host has heard of the one before last


def share_out(mib: int, vocab_size: int) -> Memory:
    """What is in `mib` MiB.

    Raises:
        ConfigError: not even one slot is.
    """
    num = mib * MIB // (4 * vocab_size)
    if num < 3:
        needed = -(-3 * 4 * vocab_size // MIB)
        raise ConfigError(
            f"--dynasor-statistics-mib={mib} holds {num} distributions over this model's {vocab_size} tokens, and 3 are the least; "
            f"give at least {needed}"
        )
    num_kept = max(1, min(MOST_KEPT, num // 8))
    return Memory(num - 2 * num_kept, num_kept)


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the answers of a program."""

    number: int
    said: Said
    tag: BranchTag  # of the branch that came there last
    num_rows: int = 0  # in it, those included that are to be added
    due: list[int] = field(default_factory=list[int])  # where these are kept

    @property
    def is_spare(self) -> bool:
        """Whether little is lost with it."""
        return bool(self.said) and self.num_rows == 1 and not self.due


class Added(NamedTuple):
    """What a step adds to a slot."""

    slot: Slot
    addition: Addition


class Slots:
    """Slots by program, and by what its branches have said."""

    def __init__(self, num: int):
        self.num = num
        self.free = list(range(num))[::-1]
        self.held: dict[LiveProgram, dict[Said, Slot | None]] = {}  # None: the host's way serves there
        self.due: dict[Slot, None] = {}
        self.num_without = 0  # places that the host mixed because nothing was free

    def add(self, tag: BranchTag, said: Said, place: int, num: int) -> None:
        """Let the row that is kept in `place` be added in the next step; -1: it was not kept, for lack of room.

        Args:
            num: how many have come there, this one included. A slot is given to the first.
        """
        slots = self.held.setdefault(tag.live, {})
        if said not in slots:
            slots[said] = self._give(tag, said) if num == 1 and place >= 0 else None
            self.num_without += not slots[said]
        slot = slots[said]
        if slot is None:
            return
        if place < 0:
            self.num_without += 1
            self.lose(slot)
            return
        slot.tag = tag
        slot.num_rows += 1
        slot.due.append(place)
        self.due[slot] = None

    def _give(self, tag: BranchTag, said: Said) -> Slot | None:
        """A slot. Where none is free one where a single branch came, which tells nothing yet, is taken for the beginning of answers."""
        if not self.free and not said:
            single = [slot for slots in self.held.values() for slot in slots.values() if slot and slot.is_spare]
            if single:
                self.lose(max(single, key=lambda slot: (len(slot.said), slot.number)))
        if not self.free:
            return None
        tag.live.program.answers.mix_on_device(said)
        return Slot(self.free.pop(), said, tag)

    def take_due(self) -> list[Added]:
        """What the step that begins adds."""
        if not self.due:
            return []
        taken = [Added(slot, Addition(slot.number, slot.num_rows, slot.due)) for slot in self.due]
        for slot in self.due:
            slot.due = []
        self.due = {}
        return taken

    def holds(self, slot: Slot) -> bool:
        """Whether it is still what it was given for."""
        return self.held.get(slot.tag.live, {}).get(slot.said) is slot

    def lose(self, slot: Slot) -> None:
        """What it holds is not all, or nothing: the host's way serves from here on."""
        if self.holds(slot):
            self.held[slot.tag.live][slot.said] = None
            self._give_back(slot)
            slot.tag.live.program.answers.mix_on_host(slot.said)

    def release(self, live: LiveProgram) -> None:
        """The program is over. A step under way may still add to its slots: whoever gets them next forgets that."""
        for slot in self.held.pop(live, {}).values():
            if slot is not None:
                self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        self.due.pop(slot, None)
        self.free.append(slot.number)
