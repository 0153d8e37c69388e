"""The pages of the documentation lead to each other, and make a site that fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, anchors

SOURCES = {str(path.relative_to(ROOT)): path for folder in ("", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md")}


@pytest.mark.parametrize("source", SOURCES)
def test_links_between_pages_lead_somewhere(source: str) -> None:
    """To a file that is there, and to a heading of it."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", SOURCES[source].read_text()):
        path = (ROOT / source).parent / target if target else ROOT / source
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_every_page_is_in_the_site_and_in_the_readme() -> None:
    """By the title that it has."""
    listed = re.findall(r"^ +- (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {f"docs/{page}": text.splitlines()[0].removeprefix("# ") for page, text in PAGES.items() if page != "README.md"}
    assert {page for page in pages if page.removeprefix("docs/") not in listed} == set(), "add them to nav in mkdocs.yml"
    linked = dict(re.findall(r"\[([^\]]*)\]\((docs/\w+\.md)\)", PAGES["README.md"].split("## Documentation")[1]))
    del pages["docs/index.md"]
    assert {page: title for title, page in linked.items()} == pages


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a name of the API that is not there fails it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES if page != "README.md"} < set(pages)
    for page, text in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//", text)
        assert fetched == [], page
