"""MkDocs hook: files outside docs/ that pages link to become part of the site, so that links are the same here and there.

A link in a page is relative to where the file lies in the repository. In the site docs/ is the root, and what lies outside
stands there under its own path; links are turned accordingly.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def in_repository(uri: str) -> str:
    """Where a file of the site lies in the repository."""
    return uri if (ROOT / uri).is_file() and not (ROOT / "docs" / uri).is_file() else f"docs/{uri}"


def in_site(path: str) -> str:
    """The other way round."""
    return path.removeprefix("docs/")


def linked(path: str, text: str) -> set[str]:
    """The files of the repository that a page links to."""
    here = posixpath.dirname(path)
    found = {posixpath.normpath(posixpath.join(here, link)) for link in LINK.findall(text)}
    # Not the README: MkDocs would make it the site's index, which docs/index.md is. A link to it fails the build.
    return {link for link in found - {"README.md"} if not link.startswith("..") and (ROOT / link).is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and what that links to."""
    todo = [in_repository(file.src_uri) for file in files.documentation_pages()]
    seen = set(todo)
    while todo:
        path = todo.pop()
        for link in linked(path, (ROOT / path).read_text()) - seen if path.endswith(".md") else ():
            seen.add(link)
            todo.append(link)
            if not link.startswith("docs/"):
                files.append(File.generated(config, link, abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page to where the files stand in the site."""
    here = posixpath.dirname(in_repository(page.file.src_uri))
    base = posixpath.dirname(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, found[1]))
        return posixpath.relpath(in_site(path), base or ".")

    return LINK.sub(turned, markdown)
