"""Pages of the repository that stand outside docs/ are pages of the site, too, and links between all of them hold in both.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks), named in mkdocs.yml. Links in Markdown lead from file to
file as they lie in the repository; here those that leave docs/, or come from outside, are told where these pages are in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"benchmarks/RESULTS.md": "results.md", "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    return in_site(markdown, page.file.src_uri)


def in_site(markdown: str, page: str) -> str:
    """The text of a page of the site, with its links as they are there.

    Args:
        markdown: the text, with links from file to file of the repository.
        page: the page, as its path in the site's sources.
    """
    source = next((source for source, name in OUTSIDE.items() if name == page), f"docs/{page}")

    def linked(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(page) or ".")

    return LINK.sub(linked, markdown)
