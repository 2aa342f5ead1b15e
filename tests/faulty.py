"""A server that a test can hold: at the step in which a program is at some stage, until the next message comes in.

It also says what was retracted, and reads a clock that the test steps.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from warm import WarmPython, WarmServer

HELD = "held-"  # rids of programs that are held begin so
LONGEST_HOLD_MS = 60_000
CODE = "import sys; sys.path[:0] = {path!r}; import faulty; faulty.install({folder!r}); from sglang.cli.main import main; main()"


class FaultyServer(WarmServer):
    """Its files are in the folder of its log."""

    def _start(self, options: list[str], environment: dict[str, str]) -> Any:
        self.folder = self.log.parent
        self.step_clock(0.0)
        code = CODE.format(path=sys.path, folder=str(self.folder))
        return WarmPython(["-c", code, *options], self.log, self.log, environment)

    def step_clock(self, by_s: float) -> None:
        """Let `time.time` differ from the clock of this machine by so much, in all of the server's processes."""
        path = self.folder / "clock"
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(struct.pack("d", by_s))

    def hold_at(self, stage: str) -> None:
        """Hold the scheduler when a program whose rid begins with HELD is at this stage, the next time."""
        for name in ("held", "let go"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "hold").write_text(stage)

    def wait_until(self, what: str) -> None:
        """Until the scheduler is `held`, or was `let go`: a message has come."""
        deadline = time.monotonic() + 100
        while not (self.folder / what).exists():
            assert time.monotonic() < deadline, f"it is not {what}"
            time.sleep(0.005)

    def pid_of(self, process: str) -> int:
        """Of its `scheduler`, `detokenizer` or `second rank`."""
        return int((self.folder / process).read_text())

    def squeeze_at(self, kind: str) -> None:
        """Let the KV pool be too full in the next step that decodes something of this kind, and forget what was retracted before."""
        (self.folder / "retracted").unlink(missing_ok=True)
        (self.folder / "squeeze").write_text(kind)

    def retracted(self) -> set[str]:
        """Kinds of what was retracted: the names of its tags, `plain`, and `thought` beside a branch's."""
        path = self.folder / "retracted"
        return set(path.read_text().split()) if path.exists() else set()


# In the server


def install(folder: str) -> None:
    """Be held and stepped by the files in `folder`. Before SGLang starts its processes."""
    from sglang.srt.managers import tokenizer_manager
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import get_parallel

    from sglang_dynasor.engine import comparing

    comparing.LABELS = ((" good", " bad"),)  # words of this model
    tokenizer_manager._REQUEST_STATE_WAIT_TIMEOUT = 0.3  # how often it looks whether a client is there
    _step_clock(Path(folder, "clock"))
    hold, held, let_go, retracted = (Path(folder, name) for name in ("hold", "held", "let go", "retracted"))
    ingest, retract = Scheduler.ingest_requests, ScheduleBatch.retract_decode
    squeeze, has_room = Path(folder, "squeeze"), ScheduleBatch.check_decode_mem
    load, detokenize = Scheduler.init_model_worker, DetokenizerManager.event_loop

    @wraps(load)
    def load_and_tell(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        is_first = get_parallel().tp_rank == 0
        Path(folder, "scheduler" if is_first else "second rank").write_text(str(os.getpid()))

    @wraps(detokenize)
    def tell_and_detokenize(self: Any) -> None:
        Path(folder, "detokenizer").write_text(str(os.getpid()))
        detokenize(self)

    @wraps(ingest)
    def ingest_or_be_held(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = ingest(self, *args, **kwargs)
        if os.path.exists(hold) and is_at(self, hold.read_text()):
            hold.rename(held)
            self.recv_from_tokenizer.poll(LONGEST_HOLD_MS)
            held.rename(let_go)
            found = ingest(self, *args, **kwargs)
        return found

    @wraps(has_room)
    def has_room_or_is_squeezed(self: Any, *args: Any, **kwargs: Any) -> bool:
        is_more = len(self.reqs) > 1  # SGLang keeps the last one
        if is_more and os.path.exists(squeeze) and any(squeeze.read_text() in kinds_of(req) for req in self.reqs):
            squeeze.unlink()
            return False
        return has_room(self, *args, **kwargs)

    @wraps(retract)
    def retract_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = retract(self, *args, **kwargs)
        with retracted.open("a") as out:
            print(*{kind for req in found[0] for kind in kinds_of(req)}, file=out)
        return found

    Scheduler.init_model_worker = load_and_tell  # type: ignore[method-assign]
    DetokenizerManager.event_loop = tell_and_detokenize  # type: ignore[method-assign]
    Scheduler.ingest_requests = ingest_or_be_held  # type: ignore[method-assign]
    ScheduleBatch.check_decode_mem = has_room_or_is_squeezed  # type: ignore[method-assign]
    ScheduleBatch.retract_decode = retract_and_tell  # type: ignore[method-assign]


def _step_clock(path: Path) -> None:
    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 8)
    now = time.time
    time.time = lambda: now() + struct.unpack("d", shared[:])[0]


def kinds_of(req: Any) -> set[str]:
    """What a request is."""
    tag = getattr(req, "dynasor_tag", None)
    if tag is None:
        return {"plain"}
    return {type(tag).__name__} | ({"thought"} if getattr(tag, "asking", None) is not None else set())


def is_at(scheduler: Any, stage: str) -> bool:
    """Whether one of the programs that are to be held is at that stage."""
    controller = scheduler._dynasor
    lives = [live for rid, live in controller.programs.held.items() if rid.startswith(HELD)]
    return any(STAGES[stage](scheduler, live) for live in lives)


def _is_in_prefill(scheduler: Any, live: Any) -> bool:
    tag = getattr(scheduler.chunked_req, "dynasor_tag", None)
    return tag is not None and tag.live is live


def _runs(live: Any, num_tokens: int) -> bool:
    return any(len(req.output_ids) >= num_tokens for req in live.in_flight())


STAGES: Mapping[str, Callable[[Any, Any], bool]] = {
    "waiting": lambda scheduler, live: not live.gang.ticket.is_started,
    "prefill": _is_in_prefill,
    "running": lambda scheduler, live: _runs(live, 3),
    "thought": lambda scheduler, live: _runs(live, 3) and not live.probes,
    "probed": lambda scheduler, live: bool(live.probes),
    "judged by the model": lambda scheduler, live: any(req is not None for req in live.judges.values()),
    "judged by a server": lambda scheduler, live: None in live.judges.values(),
    "compared by the model": lambda scheduler, live: any(req is not None for req in live.comparisons.values()),
    "compared by a server": lambda scheduler, live: None in live.comparisons.values(),
}
