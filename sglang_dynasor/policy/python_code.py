"""When two pieces of Python are the same answer: where they compile to the same."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dis import opmap
from types import CodeType
from typing import Any

CODE_CHARS = 1500  # longer Python is compared as text
_NOP = opmap["NOP"]


def python_form(code: str) -> str:
    """What Python compiles `code` to, without the places of its lines: comments, layout and docstrings do not count.

    Code that is no Python, or longer than CODE_CHARS, is compared as text.
    """
    plain = "\n".join(line.rstrip() for line in code.strip().splitlines())
    if len(plain) > CODE_CHARS:
        return plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Optimised twice, docstrings are gone; so are assertions, which count.
            compiled = compile(plain, "", "exec", dont_inherit=True, optimize=0 if "assert" in plain else 2)
            form = repr(_shape(compiled))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return plain
    return "python:" + hashlib.blake2b(form.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _shape(code: CodeType) -> tuple[Any, ...]:
    # What is left of a docstring, and of a `try`: the exception table tells the latter.
    steps = b"".join(code.co_code[i : i + 2] for i in range(0, len(code.co_code), 2) if code.co_code[i] != _NOP)
    return (
        steps, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, tuple(map(_constant, code.co_consts)),
    )  # fmt: skip


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _shape(value)
    if isinstance(value, frozenset):  # its order is another in each process
        return ("set", *sorted(map(repr, _each(value))))
    if isinstance(value, tuple):
        return tuple(map(_constant, _each(value)))
    return type(value).__name__, repr(value)


def _each(values: Any) -> Iterator[object]:
    yield from values
