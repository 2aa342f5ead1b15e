"""What our code names of SGLang, found from its source, looked up in the source of any SGLang: nothing is imported or installed.

    python -m sglang_dynasor_patches.uses DIR

DIR holds the package, as an unpacked wheel does. Of a function it is checked that it is there and takes the arguments that are named, of
an object (a scheduler, a Req, ...) that its class has the attribute, of what a hook takes the place of that its parameters are the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sglang_dynasor_patches.patch import Patch
from sglang_dynasor_patches.records import PATCHES

_MANAGERS = "sglang.srt.managers"
# What our code calls an object of SGLang's, as a name or as an attribute of another, and its class.
OBJECTS = {
    "scheduler": f"{_MANAGERS}.scheduler.Scheduler",
    "tokenizer_manager": f"{_MANAGERS}.tokenizer_manager.TokenizerManager",
    "req": f"{_MANAGERS}.schedule_batch.Req",
    "parent": f"{_MANAGERS}.schedule_batch.Req",
    "winner": f"{_MANAGERS}.schedule_batch.Req",
    "batch": f"{_MANAGERS}.schedule_batch.ScheduleBatch",
    "running_batch": f"{_MANAGERS}.schedule_batch.ScheduleBatch",
    "kv": f"{_MANAGERS}.schedule_batch.ReqKvInfo",
    "inputs": f"{_MANAGERS}.schedule_batch.MultimodalInputs",
    "item": f"{_MANAGERS}.schedule_batch.MultimodalDataItem",
    "time_stats": "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats",
    "sampling_params": "sglang.srt.sampling.sampling_params.SamplingParams",
    "tree_cache": "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache",
    "token_to_kv_pool_allocator": "sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator",
    "new_token_ratio_tracker": f"{_MANAGERS}.scheduler_components.new_token_ratio_tracker.NewTokenRatioTracker",
    "grammar_manager": "sglang.srt.constrained.grammar_manager.GrammarManager",
}
OURS = ("dynasor_", "_dynasor")  # attributes that we add


class Use(NamedTuple):
    """A name of SGLang's in our code."""

    target: str  # module and name; of an attribute with its class before it
    keywords: tuple[str, ...]  # arguments that a call names
    place: str  # file and line

    def __str__(self) -> str:
        return self.target + (f"({', '.join(f'{name}=' for name in self.keywords)})" if self.keywords else "")


def uses(root: Path) -> list[Use]:
    """What the Python files under `root` name of SGLang; each once."""
    found: dict[tuple[str, tuple[str, ...]], Use] = {}
    for path in sorted(root.rglob("*.py")):
        for use in _uses_of(ast.parse(path.read_text()), path.relative_to(root).as_posix()):
            found.setdefault((use.target, use.keywords), use)
    return list(found.values())


def _uses_of(tree: ast.Module, file: str) -> Iterator[Use]:
    names: dict[str, str] = {}
    has_objects = file.startswith("engine/")  # elsewhere the same words mean other things
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sglang":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Use(f"{node.module}.{alias.name}", (), f"{file}:{node.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = _class_of(node.value) if has_objects else None
            if owner is not None and not node.attr.startswith(OURS):
                yield Use(f"{owner}.{node.attr}", (), f"{file}:{node.lineno}")
            elif isinstance(node.value, ast.Name) and node.value.id in names:
                yield Use(f"{names[node.value.id]}.{node.attr}", (), f"{file}:{node.lineno}")
        elif isinstance(node, ast.Call):
            keywords = tuple(sorted(keyword.arg for keyword in node.keywords if keyword.arg))
            target = _called(node.func, names, has_objects=has_objects)
            if keywords and target is not None:
                yield Use(target, keywords, f"{file}:{node.lineno}")


def _class_of(node: ast.expr) -> str | None:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return OBJECTS.get(name)


def _called(node: ast.expr, names: dict[str, str], *, has_objects: bool) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if has_objects and isinstance(node, ast.Attribute) and (owner := _class_of(node.value)) is not None:
        return f"{owner}.{node.attr}"
    return None


@dataclass(slots=True)
class Found:
    """What a name of a module or of a class stands for, as far as its source says."""

    node: ast.AST
    module: Module


@dataclass(slots=True, eq=False)
class Module:
    """The source of one module."""

    name: str
    source: Source
    is_package: bool
    names: dict[str, ast.AST] = field(default_factory=dict[str, ast.AST])
    stars: list[str] = field(default_factory=list[str])  # modules that all is imported from

    def find(self, name: str) -> Found | None:
        """What `name` is in this module, also where it is imported from another of SGLang's."""
        node = self.names.get(name)
        if node is None:
            found = (module.find(name) for star in self.stars if (module := self.source.module(star)) is not None)
            return next(filter(None, found), None)
        if isinstance(node, ast.ImportFrom):
            module = self.source.module(self.absolute(node))
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            found = None if module is None else module.find(original)
            return found or Found(node, self)
        return Found(node, self)

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import names, which may be relative."""
        if not node.level:
            return node.module or ""
        package = self.name.split(".")[: None if self.is_package else -1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


class Source:
    """The source of an SGLang.

    Args:
        root: the folder that holds the package `sglang`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.module = cache(self._module)
        self.attributes = cache(self._attributes)

    def missing(self, use: Use) -> str | None:
        """What of `use` is not there; None if all is."""
        found = self.find(use.target)
        if found is None:
            return f"{use.target} is not there (used in {use.place})"
        parameters = self._parameters(found) if use.keywords else None
        lacking = [] if parameters is None else [name for name in use.keywords if name not in parameters]
        return f"{use.target} takes no {', '.join(lacking)} (used in {use.place})" if lacking else None

    def changed(self, patch: Patch) -> str | None:
        """What of a hook's target is not as it was; None if nothing is."""
        found = self.find(patch.target)
        if found is None or not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return f"patch {patch.target}: not there"
        arguments = found.node.args
        named = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args)]
        params = (
            *named,
            *_starred(arguments.vararg),
            *(arg.arg for arg in arguments.kwonlyargs),
            *_starred(arguments.kwarg),
        )
        if params == patch.params:
            return None
        return f"patch {patch.target}: parameters are {', '.join(params)}; expected {', '.join(patch.params)}"

    def find(self, target: str) -> Found | None:
        """What a name with its module is: of an attribute whatever its class assigns or defines."""
        parts = target.split(".")
        for at in range(len(parts), 0, -1):
            if (module := self.module(".".join(parts[:at]))) is not None:
                rest = parts[at:]
                break
        else:
            return None
        if not rest:
            return Found(ast.Module([], []), module)
        found = module.find(rest[0])
        for name in rest[1:]:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return found  # of an object that the source does not tell more of
            found = self.attributes(found.module.name, found.node.name).get(name)
        return found

    def _attributes(self, module_name: str, class_name: str) -> dict[str, Found]:
        """By name what a class and those that it inherits from define, and what they assign to `self`."""
        module = self.module(module_name)
        found = None if module is None else module.find(class_name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return {}
        attributes: dict[str, Found] = {}
        for base in reversed(found.node.bases):
            name = (
                base.id
                if isinstance(base, ast.Name)
                else base.value.id
                if isinstance(base, ast.Subscript) and isinstance(base.value, ast.Name)
                else ""
            )
            parent = found.module.find(name)
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                attributes |= self.attributes(parent.module.name, parent.node.name)
        for node in _outer(found.node):
            for name in _bound(node):
                attributes[name] = Found(node, found.module)
        for node in ast.walk(found.node):
            for name in _assigned(node):
                attributes.setdefault(name, Found(node, found.module))
        return attributes

    def _parameters(self, found: Found) -> set[str] | None:
        """Names of the parameters; None where any is taken, or it cannot be told."""
        node = found.node
        if isinstance(node, ast.ClassDef):
            attributes = self.attributes(found.module.name, node.name)
            init = attributes.get("__init__")
            if init is None:  # a data class, a named tuple, a struct
                return set(attributes)
            node = init.node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.args.kwarg is not None:
            return None
        return {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}

    def _module(self, name: str) -> Module | None:
        path = self.root / Path(*name.split(".")) if name else self.root
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if not name.startswith("sglang") or not file.is_file():
            return None
        module = Module(name, self, is_package=file.name == "__init__.py")
        for node in _outer(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                module.stars.append(module.absolute(node))
            for bound in _bound(node):
                if not isinstance(module.names.get(bound), ast.ClassDef):  # a class that is made anew from itself
                    module.names[bound] = node
        return module


def _starred(argument: ast.arg | None) -> tuple[str, ...]:
    return () if argument is None else (argument.arg,)


def _outer(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, those under `if` and `try` included, not those of functions and classes."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _outer(node)


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a statement of a module or class defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)
    else:
        yield from (part.id for part in _targets(node) if isinstance(part, ast.Name))


def _assigned(node: ast.AST) -> Iterator[str]:
    """The attributes that a statement of a method gives its object."""
    for part in _targets(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in ("self", "cls"):
            yield part.attr


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from ast.walk(target)


def problems(ours: Path, sglang: Path, patches: Sequence[Patch] = PATCHES) -> tuple[int, list[str]]:
    """How many names our source under `ours` and the hooks use of the SGLang under `sglang`, and what is not there of them."""
    source, used = Source(sglang), uses(ours)
    wrong = [source.missing(use) for use in used] + [source.changed(patch) for patch in patches]
    return len(wrong), [line for line in wrong if line is not None]


def our_source() -> Path:
    """Where our packages lie."""
    return _folder("sglang_dynasor")


def installed_problems() -> tuple[int, list[str]]:
    """`problems` of the SGLang that is installed."""
    return problems(our_source(), _folder("sglang").parent)


def _folder(package: str) -> Path:
    """Where a package lies, which is not imported for that."""
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations)))


def main() -> int:
    """Print what would break; 1 if anything would."""
    root = Path(sys.argv[1])
    if not (root / "sglang" / "srt").is_dir():
        print(f"error: {root} holds no sglang/srt; unpack a wheel there")
        return 2
    num, wrong = problems(our_source(), root)
    print("\n".join([*wrong, f"{num} names of SGLang are used; {len(wrong)} are missing"]))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
