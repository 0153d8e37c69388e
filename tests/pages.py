"""The README and the pages of docs/, as tests read them: their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; "" for those without."""
    return [textwrap.dedent(body) for _, name, body in BLOCK.findall(text) if name == language]


def shell_lines(text: str) -> list[list[str]]:
    """The words of each line of the shell."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(program: str, pages: Iterable[str] = PAGES) -> list[list[str]]:
    """The words after ``program`` in every line of these pages that calls it, each once."""
    text = "\n".join(PAGES[page] for page in pages)
    inline = [shlex.split(code) for code in re.findall(r"`([^`\n]+)`", text) if code.startswith(f"python {program}")]
    lines = [*shell_lines(text), *inline]
    found = [line[index + 1 :] for line in lines for index, word in enumerate(line) if word == program]
    assert found, f"no page calls {program}"
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def anchors(text: str) -> set[str]:
    """What a link calls the headings of a page, on GitHub and in the site."""
    names = re.findall(r"^##* (.*)$", re.sub(BLOCK, "", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}
