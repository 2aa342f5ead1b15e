"""SGLang's own tests, as its wheel ships them, on a server with `--scheduler dynasor` and on one without: any difference fails.

    python benchmarks/upstream.py

They are the kits of `sglang.test.kits` that need a server only, and the programs of `sglang.test.test_programs`. The tiny reasoner knows no capital of France: a test that fails on both servers is no difference. One that differs is run again on
both, twice, and told if it differs each time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import pkgutil
import signal
import sys
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from server import CHECKPOINT, Server

TEST_S = 90  # seconds after which a test counts as hanging
NUM_AGAIN = 2
ENDS_STOCK = "streaming_session_kit"  # without the option for it, which a server that is tested here has not
Test = Callable[[], None]


class Hangs(Exception):
    """A test took longer than TEST_S."""


def kit_tests(url: str, model: str) -> Iterator[tuple[str, Test]]:
    """Each test of a kit by name, bound to a server."""
    import sglang.test.kits

    given = {"base_url": url, "model": model, "served_model_name": model, "api_key": "none", "process": None}
    for module in pkgutil.iter_modules(sglang.test.kits.__path__):
        if not module.name.endswith("_kit") or module.name == ENDS_STOCK:
            continue
        try:
            kit = importlib.import_module(f"sglang.test.kits.{module.name}")
        except ImportError:  # it needs a package that a server does not
            continue
        for name, mixin in inspect.getmembers(kit, inspect.isclass):
            if mixin.__module__ != kit.__name__ or not name.endswith("Mixin"):
                continue
            case = type(name, (mixin, unittest.TestCase), {**given, "client": _client(url), "tokenizer": _tokenizer()})
            for test in unittest.TestLoader().getTestCaseNames(case):
                yield f"{module.name}.{name}.{test}", partial(_run_case, case, test)


def _client(url: str) -> Any:
    import openai

    return openai.Client(api_key="none", base_url=f"{url}/v1")


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def _run_case(case: type[unittest.TestCase], test: str) -> None:
    result = unittest.TestResult()
    case(test).run(result)
    if result.skipped:
        raise unittest.SkipTest
    for _, told in (*result.errors, *result.failures):
        raise AssertionError(told.strip().rpartition("\n")[2])


def program_tests(url: str) -> Iterator[tuple[str, Test]]:
    """The frontend's own tests, on the same server."""
    from sglang.test import test_programs

    for name, test in inspect.getmembers(test_programs, inspect.isfunction):
        if name.startswith("test_"):
            yield f"test_programs.{name}", partial(_run_program, url, test)


def _run_program(url: str, test: Callable[..., None]) -> None:
    import sglang as sgl

    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    test(**{name: False for name in inspect.signature(test).parameters if name == "check_answer"})


def outcome(test: Test) -> str:
    """`passed`, `skipped`, or the kind of error that it ended with."""

    def hangs(*_: Any) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(TEST_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            test()
    except unittest.SkipTest:
        return "skipped"
    except Exception as error:
        return type(error).__name__
    finally:
        signal.alarm(0)
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run tests whose name contains this")
    args = parser.parse_args()
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {
            name: Server(Path(folder) / name, *options, "--max-running-requests", "64")
            for name, options in (("stock", ()), ("dynasor", ("--scheduler", "dynasor", "--dynasor-strict")))
        }
        for server in servers.values():
            stack.callback(server.stop)
            server.wait()
        tests = {
            name: dict(chain(kit_tests(server.url, str(CHECKPOINT)), program_tests(server.url)))
            for name, server in servers.items()
        }
        counts, different = Counter[str](), list[str]()
        for name in [name for name in tests["stock"] if args.only in name]:
            found = _both(tests, name)
            again = NUM_AGAIN
            while found[0] != found[1] and again:
                found, again = _both(tests, name), again - 1
            counts[found[0]] += 1
            is_same = found[0] == found[1]
            print(f"{name}: {found[0]}" + ("" if is_same else f", WITH DYNASOR {found[1]}"), flush=True)
            if not is_same:
                different.append(name)
    told = ", ".join(f"{num} {what}" for what, num in counts.most_common())
    print(
        f"{sum(counts.values())} tests of SGLang {_version()} on stock: {told}. {len(different)} differ with dynasor."
    )
    return bool(different)


def _both(tests: dict[str, dict[str, Test]], name: str) -> tuple[str, str]:
    return outcome(tests["stock"][name]), outcome(tests["dynasor"][name])


def _version() -> str:
    import sglang

    return sglang.__version__


if __name__ == "__main__":
    sys.exit(main())
