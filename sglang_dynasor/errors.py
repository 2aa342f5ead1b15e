"""The errors users see. Each message names the setting, the value got, what is allowed and what to do."""

from __future__ import annotations


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
