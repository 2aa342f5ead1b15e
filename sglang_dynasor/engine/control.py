"""What an operator asks of the schedulers: a look, the answer of a program now, its end, other settings, no new programs.

The front process asks (routes in front.py), SGLang broadcasts, and every rank does the same in the same iteration (messages.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.engine.messages import Answer, Ask
from sglang_dynasor.engine.req import refusal
from sglang_dynasor.engine.snapshot import program_state, snapshot, tokens
from sglang_dynasor.policy.program import StopReason

if TYPE_CHECKING:
    from sglang_dynasor.engine.controller import Controller

DRAINS = "The server drains: it takes no new programs. Send it to another, or without the dynasor field."


class Control:
    """One scheduler's side of it."""

    def __init__(self, controller: Controller):
        self.controller = controller
        self.num_looks = 0

    def hear(self, ask: Ask) -> Answer:
        """Do what is asked. What goes wrong is told, and has changed nothing else."""
        assert_same("dynasor is asked %s", ask.what)
        try:
            return Answer(found=self._do(ask.what, dict(ask.arguments)))
        except Exception as error:
            self.controller.fence.fall_back("control", error)
            return Answer(found={"error": f"{type(error).__name__} in the scheduler; its log has more"})

    def _do(self, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
        controller = self.controller
        match what:
            case "look":
                self.num_looks += 1
                started_s = time.thread_time()  # what this thread computes; told, and decided by in no step
                found = snapshot(controller, arguments.get("most"))
                return {**found, "status": controller.status(), "look_s": time.thread_time() - started_s}
            case "whose":
                return {"owners": self._owners_of(arguments["id"])}
            case "program":
                return self._program(self._find(arguments["id"], arguments["owner"]), has_texts=arguments["has_texts"])
            case "finish":
                return {"is_done": self._finish(self._find(arguments["id"], arguments["owner"]))}
            case "cancel":
                return {"is_done": self._cancel(self._find(arguments["id"], arguments["owner"]))}
            case _:
                self._set(**arguments)
                return self.settings()

    def _find(self, program_id: str, owner: str) -> LiveProgram | None:
        """A program in flight."""
        programs = self.controller.programs
        live = programs.held.get(program_id)
        return live if live is not None and live.program.spec.owner == owner else programs.sent_by(owner, program_id)

    def _owners_of(self, program_id: str) -> list[str]:
        """Who has a program in flight with this id."""
        programs = self.controller.programs
        held = programs.held.get(program_id)
        owners = [] if held is None else [held.program.spec.owner]
        return owners + [owner for owner, id in programs.sent if id == program_id and programs.sent_by(owner, id)]

    def _program(self, live: LiveProgram | None, *, has_texts: bool) -> dict[str, Any]:
        if live is None:
            return {}
        queued = {id(req) for req in self.controller.scheduler.waiting_queue}
        found = {**live.program.record(), **program_state(live, queued, time.perf_counter())}
        return {**found, "tokens": tokens(live)} if has_texts else found

    def _finish(self, live: LiveProgram | None) -> bool:
        """Have a program answered with what it has. Returns whether it was there, and undecided."""
        if live is None or live.program.reason is not None:
            return False
        branches, ends = self.controller.branches, self.controller.ends
        if live.parent is not None:
            ends.guarded(live, lambda live: branches.close(live, StopReason.OPERATOR))
        else:
            live.program.reason = StopReason.OPERATOR
            ends.guarded(live, ends.end_rest)
        return True

    def _cancel(self, live: LiveProgram | None) -> bool:
        """End a program without an answer. Returns whether it was there."""
        if live is None:
            return False
        ends = self.controller.ends
        if live.parent is not None:
            ends.abort(live, refusal("The operator cancelled this program."))
        else:
            live.program.reason = live.program.reason or StopReason.FAILED
            ends.guarded(live, ends.end_rest)
        return True

    def _set(self, **settings: Any) -> None:
        """Change settings, each in range (front.py has checked)."""
        intake, admission = self.controller.intake, self.controller.admission
        for name, value in settings.items():
            match name:
                case "width":
                    admission.fixed_width = value
                case "max_price":
                    admission.max_price = value
                case "level":
                    intake.level = value
                case "drain":
                    intake.refusal = DRAINS if value else ""
                case _:
                    raise ValueError(f"{name!r} is no setting")
        admission.note_change()

    def settings(self) -> dict[str, Any]:
        """As they are now."""
        intake, admission = self.controller.intake, self.controller.admission
        return {
            "width": admission.fixed_width,
            "max_price": admission.max_price,
            "level": intake.level,
            "drain": bool(intake.refusal),
        }
