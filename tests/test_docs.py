"""README and docs: short enough, fresh, with links that lead somewhere, snippets that compile, and every key explained."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from readme import ROOT, filled, pages
from test_driver import SOLUTION, Script, drive

from sglang_dynasor.algorithms.catalogue import ALGORITHMS, SEARCH_HELP
from sglang_dynasor.config import HELP, DynasorConfig
from sglang_dynasor.errors import FieldError
from sglang_dynasor.offline import _failed
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.record import RECORD_HELP
from sglang_dynasor.policy.rules import RULES
from sglang_dynasor.policy.shared_budget import SharedBudget
from sglang_dynasor.policy.spec import FIELD_HELP, parse_field

MOST_README_WORDS = 1200
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kernels").glob("*.md")), *sorted((ROOT / "patches").glob("*.md")),
    ROOT / "examples" / "tiny_reasoner" / "README.md",
]  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The ids of a page's headings, as forges and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    """As `wc -w` counts."""
    assert len((ROOT / "README.md").read_text().split()) <= MOST_README_WORDS


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_generated_is_fresh(page: Path) -> None:
    """Else: `make readme`."""
    assert page.read_text() == filled(page.read_text())


def test_a_marker_that_is_not_known_or_has_no_end_is_told() -> None:
    """A table that silently stays as it is would grow stale."""
    with pytest.raises(ValueError, match="reference:fields is not known"):
        filled("<!-- reference:fields -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="stands 0 times"):
        filled("<!-- reference:field -->\n")
    assert "| `width` |" in filled("<!-- reference:field -->\n<!-- end -->\n")


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@each_page
def test_snippets_are_what_they_say(page: Path) -> None:
    """Python compiles, JSON parses."""
    for _, language, code in re.findall(r"^( *)```(\w+)\n(.*?)^\1```", page.read_text(), re.S | re.M):
        if language == "python":
            ast.parse(dedent(code))
        elif language == "json":
            json.loads(code)


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    """As `make docs`; each page must be in the navigation, too."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "rebase.py" in (tmp_path / "frontend.html").read_text()


@pytest.mark.parametrize("key", FIELD_HELP)
def test_a_key_that_is_explained_is_read(key: str) -> None:
    """The parser looks at it, whatever else is sent; one without help it refuses."""
    for algorithm in ("self_consistency", "long_cot"):
        with pytest.raises(FieldError, match=rf"dynasor\.{key}=") as told:
            parse_field({"algorithm": algorithm, key: []}, 64)
        assert "not a key" not in str(told.value)


def test_every_key_of_a_search_is_explained() -> None:
    """And nothing that no search takes."""
    assert {key for found in ALGORITHMS.values() for key in found.search_keys} == set(SEARCH_HELP)


def test_every_rule_is_explained() -> None:
    """docs/stopping.md names each, with its default and its levels; one that takes no level has none."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|(.*)\|$", (ROOT / "docs" / "stopping.md").read_text(), re.M)
    with_level = [row for row in rows if row[2].strip()]
    told = {name: (tuple(map(float, levels.split(" to "))), float(level)) for name, levels, level in with_level}
    takes_level = {name: rule for name, rule in RULES.items() if rule.high > rule.low}
    assert told == {name: ((rule.low, rule.high), rule.default) for name, rule in takes_level.items()}
    assert [name for name, *_ in rows] == list(RULES)


def test_every_option_is_explained() -> None:
    """And nothing else is."""
    assert list(HELP) == [field.name for field in fields(DynasorConfig)]


def record(**field: Any) -> dict[str, Any]:
    """Of a program whose first two branches have answered."""
    program = Program("p", parse_field({"answer": "hash", **field}, 64))
    for _ in range(min(2, program.spec.branches)):
        program.finish(program.start_branch(), "#### 4", 10)
    return program.record()


def test_every_key_of_a_record_is_explained() -> None:
    """And none that no record has, whoever made it: the engine, a search, a batch."""
    judge = {"judge": "model", "vote": "reward"}
    found = [record(), record(statistics=True), record(**judge), record(algorithm="long_cot", exit="published")]
    for algorithm in ("best_of_n", "rebase", "mcts", "beam"):
        field = {"algorithm": algorithm, "branches": 4}
        found.append(drive(Script(lambda data: SOLUTION), field, {"max_new_tokens": 40}).record)
    always = set.intersection(*(set(keys) for keys in found))
    found += [_failed("Q", "refused", 0.0).record, {"index": 0}]  # a question of a batch, a client's own branch
    found += [record(equal="model"), record(algorithm="long_cot", branches=2)]
    dear = Program("p", parse_field({"budget_tokens": 9}, 64))
    SharedBudget(9).join(dear, dear, 9)
    dear.end_if_dear(0.0)
    dear.branches[dear.start_branch()].num_reasoning_tokens = 1
    found.append(dear.record())
    found.append(record(answer="boxed"))  # which nobody writes: there is a hint
    found.append(record(tenant="gold", template="math-hard@2"))
    assert set.union(*(set(keys) for keys in found)) == set(RECORD_HELP)
    assert {key for key, (where, _) in RECORD_HELP.items() if where == "always"} == always
