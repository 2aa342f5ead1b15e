"""The errors users see. Each message names the setting, the value got, what is allowed and what to do."""

from __future__ import annotations

import reprlib

MOST_QUOTED_CHARS = 80


class DynasorError(Exception):
    """Base of every error this project raises on purpose."""


class FieldError(DynasorError, ValueError):
    """A client's `dynasor` field is wrong; SGLang turns a ValueError at validation into an HTTP 400."""


class RefusedError(FieldError):
    """The server refused one request for a reason of its own, such as a prompt that is too long for the model."""


class ConfigError(DynasorError, ValueError):
    """The operator's settings cannot be served."""


class PatchError(DynasorError, RuntimeError):
    """This SGLang is not the one the patches were written for, or a hook is not live."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxother = 3, MOST_QUOTED_CHARS


def quoted(value: object) -> str:
    """What somebody sent, as messages and logs say it: as Python would write it, so on one line, and no more than
    MOST_QUOTED_CHARS of it, then `...`. Never raises."""
    is_long = isinstance(value, str) and len(value) > MOST_QUOTED_CHARS
    try:
        text = repr(value[:MOST_QUOTED_CHARS]) if isinstance(value, str) else _SHORT.repr(value)
    except ValueError:  # a number of thousands of digits
        text = f"a huge {type(value).__name__}"
    if is_long or len(text) > MOST_QUOTED_CHARS + 2:
        return f"{text[: MOST_QUOTED_CHARS + 1]}..."
    return text


def spelled(text: str) -> str:
    """The same of a name that stands in a message without quotes."""
    return quoted(text).strip("'\"")
