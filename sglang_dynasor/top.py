"""`sglang-dynasor top`: the programs in flight on a server, in a terminal; finish or cancel the one that is marked."""

from __future__ import annotations

import curses
import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sglang_dynasor.errors import ConfigError

REFRESH_S = 1.0
TIMEOUT_S = 10.0
NOBODY = ("", "")  # who is marked: the id and the owner of a program
KEYS = "up/down: mark   f: finish now   c: cancel   q: quit"
_COLUMNS = (
    ("program", 24),
    ("algorithm", 16),
    ("tenant", 10),
    ("state", 7),
    ("age", 7),
    ("branches", 12),
    ("tokens", 8),
    ("sure", 5),
)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who asks a server."""

    url: str
    key: str = ""

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str) -> Any:
        return self._call("POST", path)

    def _call(self, method: str, path: str) -> Any:
        """The JSON that comes back.

        Raises:
            ConfigError: no answer, or another than 200, with what the server says.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, method=method, headers=headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ConfigError(
                f"--url={self.url}: {method} {path.partition('?')[0]} gave {error.code}: {_said(error)}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--url={self.url} does not answer ({error}); start one with --scheduler dynasor"
            ) from None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return "start it with --scheduler dynasor" if error.code == 404 else error.reason


def state_of(operator: Operator) -> list[dict[str, Any]]:
    """What is in flight, by scheduler.

    Raises:
        ConfigError: the server does not answer, or a scheduler says why it has none.
    """
    state = operator.get("/dynasor/state")
    for one in state:
        if why := one.get("error") or one.get("off"):
            raise ConfigError(f"--url={operator.url}: {why}")
    return state


def summary(state: list[dict[str, Any]]) -> list[str]:
    """Two lines about all schedulers together (`/dynasor/state`)."""
    statuses = [one["status"] for one in state]

    def total(key: str) -> int:
        return sum(status[key] for status in statuses)

    def share(key: str) -> str:
        return f"{sum(one[key]['used'] for one in state):,} of {sum(one[key]['of'] for one in state):,}"

    return [
        f"programs {total('num_held_programs')}, waiting {total('num_waiting_programs')}   rows {share('rows')}   KV tokens {share('kv_tokens')}",
        f"answered {total('num_programs'):,} ({total('num_certain'):,} early)   tokens {total('num_tokens'):,}   "
        f"branches {total('num_branches'):,}, not needed {total('num_branches_saved'):,}   errors {total('num_policy_errors')}",
    ]


def row(program: dict[str, Any]) -> str:
    """One program in flight."""
    states = [branch["state"] for branch in program["branches"]]
    num_over = sum(state in ("finished", "compared", "ended", "weak", "failed") for state in states)
    age_s = program["age_s"]
    cells = (
        program["id"], program["algorithm"], program["tenant"] or "", program["state"], "" if age_s is None else f"{age_s:.1f} s",
        f"{num_over}+{len(states) - num_over} of {program['cap']}", f"{program['num_tokens']:,}", f"{program['certaindex']:.2f}",
    )  # fmt: skip
    answer = program["votes"][0][0] if program["votes"] else None
    line = "  ".join(_fit(cell, width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return f"{line}  {_plain(answer or '')}".rstrip()


def head() -> str:
    return "  ".join(name.ljust(width) for name, width in _COLUMNS) + "  leading answer"


def _fit(text: str, width: int) -> str:
    text = _plain(text)
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "~"


def _plain(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def programs_of(state: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those in flight on all schedulers, the oldest first."""
    programs = [program for one in state for program in one["programs"]]
    return sorted(programs, key=lambda program: -(program["age_s"] or 0.0))


def run_top(url: str, key: str, *, once: bool) -> None:
    """Show until `q`; or print once.

    Raises:
        ConfigError: the server does not answer.
    """
    operator = Operator(url, key)
    if once:
        state = state_of(operator)
        print("\n".join([*summary(state), head(), *map(row, programs_of(state))]))
        return
    state_of(operator)  # told before the screen is taken
    curses.wrapper(_Screen(operator).run)


class _Screen:
    def __init__(self, operator: Operator):
        self.operator = operator
        self.marked = NOBODY
        self.said = KEYS

    def run(self, window: Any) -> None:
        curses.use_default_colors()
        curses.curs_set(0)
        window.timeout(int(1000 * REFRESH_S))
        while True:
            try:
                programs = self._draw(window)
            except ConfigError as error:
                programs = []
                window.erase()
                _put(window, 0, str(error))
            if not self._obey(window.getch(), list(map(_name, programs))):
                return

    def _draw(self, window: Any) -> list[dict[str, Any]]:
        state = state_of(self.operator)
        programs = programs_of(state)
        names = list(map(_name, programs))
        if self.marked not in names:
            self.marked = NOBODY  # nobody else is finished or cancelled by a key that was meant for it
        window.erase()
        for place, line in enumerate(summary(state)):
            _put(window, place, line)
        _put(window, 3, head(), curses.A_BOLD)
        num_rows = window.getmaxyx()[0] - 5
        first = max(0, names.index(self.marked) - num_rows + 1) if self.marked in names else 0
        for place, program in enumerate(programs[first : first + num_rows]):
            _put(
                window, 4 + place, row(program), curses.A_REVERSE if _name(program) == self.marked else curses.A_NORMAL
            )
        _put(window, window.getmaxyx()[0] - 1, f"{time.strftime('%H:%M:%S')}  {self.said}", curses.A_DIM)
        return programs

    def _obey(self, key: int, names: list[tuple[str, str]]) -> bool:
        """Do what a key means. Returns whether to go on."""
        if key in (ord("q"), 27):
            return False
        place = names.index(self.marked) if self.marked in names else -1
        if key in (curses.KEY_DOWN, ord("j")) and names:
            self.marked = names[min(len(names) - 1, place + 1)]
        elif key in (curses.KEY_UP, ord("k")) and names:
            self.marked = names[max(0, place - 1)]
        elif key in (ord("f"), ord("c")) and place >= 0:
            self._do("finish" if key == ord("f") else "cancel")
        return True

    def _do(self, what: str) -> None:
        try:
            id, owner = self.marked
            self.operator.post(f"/dynasor/programs/{quote(id, safe='')}/{what}?owner={quote(owner, safe='')}")
            self.said = f"{what}: {_plain(id)}   {KEYS}"
        except ConfigError as error:
            self.said = str(error)


def _name(program: dict[str, Any]) -> tuple[str, str]:
    """What tells a program from all others on a server: its id, and whose it is."""
    return program["id"], program["owner"] or ""


def _put(window: Any, place: int, line: str, how: int = 0) -> None:
    height, width = window.getmaxyx()
    if 0 <= place < height:
        with suppress(curses.error):  # of letters that are two wide the last may not fit
            window.addnstr(place, 0, line, width - 1, how)
