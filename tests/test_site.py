"""The pages of the documentation lead to each other, and make a site that fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_par
from lightning_par import errors
from lightning_par.config.parallel import ParallelConfig
from tests import generated
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
    listed = re.findall(r"^ +- (?:[\w ]+: )?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {f"docs/{page}": text.splitlines()[0].removeprefix("# ") for page, text in PAGES.items() if page != "README.md"}
    assert {page for page in pages if page.removeprefix("docs/") not in listed} == set(), "add them to nav in mkdocs.yml"
    linked = dict(re.findall(r"\[([^\]]*)\]\((docs/\w+\.md)\)", PAGES["README.md"].split("## Documentation")[1]))
    del pages["docs/index.md"]
    assert {page: title for title, page in linked.items()} == pages


@pytest.mark.parametrize("page", generated.PAGES)
def test_pages_that_follow_from_the_code_are_up_to_date(page: str) -> None:
    assert PAGES[page] == generated.PAGES[page](), "run python -m tests.generated"


def test_every_key_is_on_the_page_of_keys() -> None:
    """As PyYAML finds them, where the page is made line by line."""
    named = set(re.findall(r"^\| `([^`]+)`", PAGES["config.md"], re.MULTILINE))
    for path in (ROOT / "conf").rglob("*.yaml"):
        group = path.parent.name if path.parent.name != "conf" else ""
        if group != "cluster" or path.stem == "your_own":
            assert {".".join(filter(None, (group, key))) for key in leaves(yaml.safe_load(path.read_text()))} <= named, path
    assert {f"parallel.{field.name}" for field in fields(ParallelConfig)} <= named


def leaves(values: dict[str, Any]) -> set[str]:
    """The whole names of all keys that have no keys in them; none of a defaults list."""
    inner = {f"{key}.{name}" for key, value in values.items() if isinstance(value, dict) for name in leaves(value)}
    return inner | {key for key, value in values.items() if not (value and isinstance(value, dict)) and key != "defaults"}


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", PAGES["api.md"], re.MULTILINE)}
    rest = set(lightning_par.__all__) - documented - {"__version__"}
    assert rest == {name for name in rest if hasattr(errors, name)}, "the page shows all of lightning_par.errors"


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a name of the API that is not there fails it; with --quiet mkdocs would count none of that."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES if page != "README.md"} < set(pages)
    for page, text in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//", text)
        assert fetched == [], page
        broken = re.findall(r"<p>[^<]*(?:<(?!/p>)[^<]*)*\n(?:- |\| |\d\. )", text)
        assert broken == [], f"{page}: put an empty line before the list or table"
