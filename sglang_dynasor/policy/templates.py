"""Named, versioned settings of programs, and which requests that send no field get them: an operator's TOML file, checked.

A table is a template: its header is NAME@VERSION, its keys are those of the field and what is put around the prompt. A row
of `default` gives one to the requests of an endpoint, of a model, or both.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from sglang_dynasor.config import CAREFUL
from sglang_dynasor.errors import ConfigError, FieldError, quoted
from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS
from sglang_dynasor.policy.spec import FIELD_HELP, ProgramSpec, parse_field
from sglang_dynasor.policy.values import TEMPLATE_ID

PLAIN = "plain"  # in place of a template: no program
# What is put around the prompt: text before and after the user's, and a system message of chats.
WRAPPER_HELP = {
    "before": "text put before the user's prompt; of a chat before its last user message",
    "after": "text put after it",
    "system": "a system message before the others of a chat; a chat's own follows in the same message",
}
MOST_WRAPPER_CHARS = 16_384
# Of the field: they are one request's own.
_REQUEST_KEYS = ("program", "budget", "budget_programs", "template")
KEYS = (*(key for key in FIELD_HELP if key not in _REQUEST_KEYS), *WRAPPER_HELP)
# By endpoint that a default may be for: what of the prompt can be wrapped there. Empty: SGLang renders the chat where
# nobody sees it before.
ENDPOINTS = {
    "/generate": "text",
    "/v1/completions": "text",
    "/v1/chat/completions": "chat",
    "/invocations": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "",
    "/api/generate": "text",
    "/api/chat": "",
}
_ROW_KEYS = ("endpoint", "model", "template")
_AT_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True, slots=True)
class Template:
    """Settings as a client would send them, and what is put around the prompt."""

    name: str
    version: int
    field: dict[str, Any]
    before: str = ""
    after: str = ""
    system: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def has_wrapper(self) -> bool:
        return bool(self.before or self.after or self.system)

    def unwrappable(self, kind: str) -> str:
        """Which of its keys a prompt of this kind, one of ENDPOINTS' values, cannot have; empty: none."""
        keys = {"text": ("system",), "chat": ()}.get(kind, tuple(WRAPPER_HELP))
        return next((key for key in keys if getattr(self, key)), "")

    def wrap(self, text: str) -> str:
        """The user's prompt with what is put around it."""
        return f"{self.before}{text}{self.after}"

    def as_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return self.field | {key: getattr(self, key) for key in WRAPPER_HELP if getattr(self, key)}


@dataclass(frozen=True, slots=True)
class Default:
    """What requests without a field get. An empty endpoint or model: any."""

    template: str  # NAME, NAME@VERSION, an algorithm's name or PLAIN
    endpoint: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Templates:
    """What a file says."""

    by_name: dict[str, dict[int, Template]] = field(default_factory=dict[str, dict[int, Template]])
    defaults: tuple[Default, ...] = ()

    def find(self, name: str) -> Template | None:
        """A template by NAME@VERSION, or the newest version of NAME."""
        name, _, version = name.partition("@")
        versions = self.by_name.get(name, {})
        if not version:
            return versions[max(versions)] if versions else None
        return versions.get(int(version)) if version.isascii() and version.isdigit() and len(version) < 10 else None

    def default_for(self, endpoint: str, model: str) -> Default | None:
        """The first row that fits. None at an endpoint that defaults are not for."""
        if endpoint not in ENDPOINTS:
            return None
        fits = (row for row in self.defaults if row.endpoint in ("", endpoint) and row.model in ("", model))
        return next(fits, None)

    def resolve(self, asked: Any) -> tuple[Any, Template | None]:
        """The field that a client's stands for, and the template it names: what is sent beside the name wins.

        Resolved again it is the same. A field that names no template comes back as it is.

        Raises:
            FieldError: a template that is not there.
        """
        name: Any = asked.get("template") if isinstance(asked, dict) else asked
        own: dict[str, Any] = cast("dict[str, Any]", asked) if isinstance(asked, dict) else {}
        if not isinstance(name, str) or (not own and name in ENGINE_ALGORITHMS):
            return asked, None
        template = self.find(name)
        if template is not None:
            return {**template.field, **own, "template": template.id}, template
        if not own and not self.by_name and "@" not in name:
            return asked, None  # an algorithm, misspelt
        there = f"the templates are {', '.join(self.by_name)}" if self.by_name else "this server has no templates"
        algorithms = "" if own else f", algorithms {', '.join(ENGINE_ALGORITHMS)}"
        raise FieldError(f"dynasor.template={quoted(name)} is not known; {there}{algorithms}")


def parse_templates(
    text: str, file: str, max_branches: int, level: str = CAREFUL, default: str = "",
    check: Callable[[ProgramSpec], None] | None = None,
) -> Templates:  # fmt: skip
    """What a file's text says.

    Args:
        text: TOML; empty where there is no file.
        file: its name, for messages.
        max_branches: the operator's limit on the cap.
        level: one of LEVELS, by which programs stop that do not say how.
        default: what requests get that no row fits; empty: no program.
        check: raises FieldError for what the server cannot serve.

    Raises:
        ConfigError: it is no TOML, or says what cannot be served; the message begins with the file and the line.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT_LINE.search(str(error))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        raise ConfigError(f"{file}:{line}: {_AT_LINE.sub('', str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{file}:1: it is nested too deep; a template's keys stand flat in its table") from None

    def wrong(message: str, *path: str | int) -> ConfigError:
        return ConfigError(f"{file}:{line_of(text, *path)}: {message}")

    def read(settings: dict[str, Any]) -> None:
        spec = parse_field(settings, max_branches, level)
        if check is not None:
            check(spec)

    by_name: dict[str, dict[int, Template]] = {}
    for header, table in tables.items():
        if header == "default":
            continue
        name, _, version = header.partition("@")
        if not TEMPLATE_ID.fullmatch(header) or not version:
            raise wrong(
                f'{quoted(header)} is no template; write a table ["NAME@VERSION"] with a version from 1 on', header
            )
        if name in (*ENGINE_ALGORITHMS, PLAIN):
            raise wrong(f"{quoted(name)} is a name of its own; call the template something else", header)
        if not isinstance(table, dict):
            raise wrong(f'{quoted(header)} is a value; write a table ["{header}"]', header)
        by_name.setdefault(name, {})[int(version)] = _template(header, table, wrong, read)
    found = Templates(by_name)
    rows = tables.get("default", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise wrong("default is a table; write rows [[default]]", "default")
    defaults = [_default(row, number, found, wrong) for number, row in enumerate(rows)]
    if default:
        if not is_known(default, found):
            raise ConfigError(f"--dynasor-default={quoted(default)} {_unknown(found)}")
        defaults.append(Default(default))
    return Templates(by_name, tuple(defaults))


def _template(
    header: str, table: dict[str, Any], wrong: Callable[..., ConfigError], read: Callable[[dict[str, Any]], None]
) -> Template:
    for key, value in table.items():
        if key in _REQUEST_KEYS:
            raise wrong(f"{key} is one request's own; leave it out of a template", header, key)
        if key not in KEYS:
            raise wrong(f"{quoted(key)} is not a key of a template; the keys are {', '.join(KEYS)}", header, key)
        if key in WRAPPER_HELP and not (isinstance(value, str) and len(value) <= MOST_WRAPPER_CHARS):
            raise wrong(f"{key} is no string of up to {MOST_WRAPPER_CHARS} characters", header, key)
    settings = {key: value for key, value in table.items() if key not in WRAPPER_HELP}
    try:
        read(settings)
    except FieldError as error:
        found = re.match(r"dynasor\.(\w+)", str(error))
        key = (found[1],) if found and found[1] in table else ()
        raise wrong(f"{header}: {error}", header, *key) from None
    name, _, version = header.partition("@")
    return Template(name, int(version), settings, **{key: table[key] for key in WRAPPER_HELP if key in table})


def _default(row: dict[str, Any], number: int, templates: Templates, wrong: Callable[..., ConfigError]) -> Default:
    at = "default", number
    for key, value in row.items():
        if key not in _ROW_KEYS:
            raise wrong(f"{quoted(key)} is not a key of a default; the keys are {', '.join(_ROW_KEYS)}", *at, key)
        if not isinstance(value, str) or not value:
            raise wrong(f"{key}={quoted(value)} is no string; leave it out where anything fits", *at, key)
    if "template" not in row:
        raise wrong("a default without a template; say which", *at)
    endpoint, name = row.get("endpoint", ""), row["template"]
    if endpoint and endpoint not in ENDPOINTS:
        raise wrong(f"endpoint={quoted(endpoint)} has no defaults; use one of {', '.join(ENDPOINTS)}", *at, "endpoint")
    if not is_known(name, templates):
        raise wrong(f"template={quoted(name)} {_unknown(templates)}", *at, "template")
    template = templates.find(name)
    if endpoint and template is not None and (key := template.unwrappable(ENDPOINTS[endpoint])):
        raise wrong(
            f"template={quoted(name)} has {key}, which cannot be put around the prompts of {endpoint}; use another template there",
            *at, "template",
        )  # fmt: skip
    return Default(name, endpoint, row.get("model", ""))


def is_known(name: str, templates: Templates) -> bool:
    """Whether a default may name it."""
    return name == PLAIN or name in ENGINE_ALGORITHMS or templates.find(name) is not None


def _unknown(templates: Templates) -> str:
    return f"is not known; use one of {', '.join((*templates.by_name, *ENGINE_ALGORITHMS, PLAIN))}"


def changed_versions(old: Templates, new: Templates) -> list[Template]:
    """Those of `old` that `new` has with other contents: records name a version, so it may not change."""
    return [
        template
        for name, versions in old.by_name.items()
        for version, template in versions.items()
        if (now := new.by_name.get(name, {}).get(version)) is not None and now != template
    ]


def line_of(text: str, *path: str | int) -> int:
    """The line, from 1, on which TOML that parses begins to define what stands at `path`; if that is not found, what is around it.

    A line defines it if what is before it parses without and the shortest text with it that parses has it. So a line of a
    text in quotes, or a comment, is none.
    """
    lines = text.split("\n")

    def has(num_lines: int) -> bool | None:
        try:
            at: Any = tomllib.loads("\n".join(lines[:num_lines]))
        except tomllib.TOMLDecodeError:
            return None
        for key in path:
            inner: dict[Any, Any] = dict(enumerate(at)) if isinstance(at, list) else at if isinstance(at, dict) else {}
            if key not in inner:
                return False
            at = inner[key]
        return True

    word = next((key for key in reversed(path) if isinstance(key, str)), "")
    for start, line in enumerate(lines):
        if word in line and has(start) is False:
            said = (has(end) for end in range(start + 1, len(lines) + 1))
            if next((known for known in said if known is not None), False):
                return start + 1
    return line_of(text, *path[:-1]) if len(path) > 1 else 1
