"""Makes the pages of docs/ that follow from the code: every config key, every command, every error.

    python -m tests.generated

A test compares the pages with what is made here (`tests/test_site.py`).
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lightning_par import cli
from lightning_par.config.parallel import ParallelConfig
from tests.error_texts import errors

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
KEY = re.compile(r"( *)([\w.]+):\s*(.*?)\s*(?:# (.*))?")
FIELD = re.compile(r"^    (\w+): [^=\n]+ = (\S+)(?:  # (.*))?$", re.MULTILINE)
Row = tuple[str, ...]
_CONFIG = """\
# Config keys

Every key of `conf/`, with its default; `python train.py --help` lists groups and values, `--cfg job` shows what is composed. Change
a key on the command line (`zero.reduce=microbatch`), add one that is not there with a plus (`+trainer.num_nodes=2`), or write both
into a YAML file of your own, see [Layouts](layouts.md) and [Overriding the plan](overrides.md).
"""
_PARALLEL = """\
A [layout](layouts.md) word sets them all; a YAML file in `parallel/`, or a key behind the word, changes single ones.
"""
_GROUPS = """\
Each of the groups below builds one object: `_target_` names its class, and any other argument of that can be added.
"""
_CLUSTERS = """\
Machines, for `lightning-par plan` and `calibrate`; the keys are shown as `your_own` has them.
"""
_COMMANDS = """\
# Commands

`train.py` trains what the [config](config.md) says. `lightning-par` has the commands below; those that take Hydra's overrides
compose what `train.py` would. Exit code 0: done; 2: what was typed cannot work; 1: anything else.
"""


def config() -> str:
    """Every key of the shipped configs, with its default and its comment."""
    top = [row for row in keys(CONF / "train.yaml") if row[0] != "defaults"]
    sections = {key: note for key, value, note in top if not value}
    text = [_CONFIG, "## A run", table([row for row in top if "." not in row[0] and row[0] not in sections])]
    for name, note in sections.items():
        text += [f"## {name}", sentence(note), table([row for row in top if row[0].startswith(f"{name}.")])]
    fields = FIELD.findall(inspect.getsource(ParallelConfig))
    layout = [(f"parallel.{name}", yaml_word(value), note) for name, value, note in fields]
    text += ["## parallel", _PARALLEL, table(layout), _GROUPS]
    for group in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("cluster", "__pycache__")):
        text.append(f"## {group.name}")
        text += [section for path in sorted(group.glob("*.yaml")) for section in option(path)]
    clusters = [(f"`{path.stem}`", comment(path)) for path in sorted((CONF / "cluster").glob("*.yaml"))]
    text += ["## cluster", _CLUSTERS, rows_of(("cluster", "machines"), clusters)]
    return page([*text, table(keys(CONF / "cluster" / "your_own.yaml", "cluster."))])


def option(path: Path) -> Iterator[str]:
    """A file of a group: what it says of itself, and its keys."""
    name = path.parent.name
    yield f"### {name}={path.stem}"
    yield comment(path)
    yield table([row for row in keys(path, f"{name}.") if row[0] != f"{name}.defaults"])


def comment(path: Path) -> str:
    """What a file says of itself, in the lines that it begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("# ") for line in lines if not line.startswith("# @package"))


def sentence(note: str) -> str:
    """A comment as a sentence."""
    return f"{note[0].upper()}{note[1:]}." if note else ""


def keys(path: Path, prefix: str = "") -> list[Row]:
    """Of each key of a YAML file its whole name, value and comment, in order; none of a key that only has others below it."""
    rows: list[Row] = []
    parents: list[str] = []
    for line in path.read_text().splitlines():
        if found := KEY.fullmatch(line):
            indent, name, value, note = found.groups()
            parents = [*parents[: len(indent) // 2], name]
            if value or note:
                rows.append((prefix + ".".join(parents), value, note or ""))
    return rows


def yaml_word(value: str) -> str:
    """A default of Python as YAML writes it."""
    return {"None": "null", "False": "false", "True": "true"}.get(value, value.strip('"'))


def page(parts: Iterable[str]) -> str:
    """The text of a page from its parts, those that are empty left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def table(rows: list[Row]) -> str:
    """Keys with their values and what they mean; without the last column where nothing is said."""
    shown = [(f"`{key}`", f"`{value}`" if value else "", re.sub(r"(\{.*\})", r"`\1`", note)) for key, value, note in rows]
    width = 3 if any(note for *_, note in rows) else 2
    return rows_of(("key", "default", "meaning")[:width], [row[:width] for row in shown])


def rows_of(heads: Row, rows: list[Row]) -> str:
    """A table of Markdown; none without rows."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]]) if rows else ""


def commands() -> str:
    """Every command of the console script: what it takes, what it does, examples."""
    parts = [part for words, parser in leaves("lightning-par", cli._parser()) for part in command(words, parser)]
    return page([_COMMANDS, *parts])


def leaves(words: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parsers that have no commands in them."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, parser
    for action in inner:
        for name, below in action.choices.items():
            yield from leaves(f"{words} {name}", below)


def command(words: str, parser: argparse.ArgumentParser) -> list[str]:
    """Its heading, description, arguments and the rest of its help."""
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [(shown(action), (action.help or "").replace("%%", "%")) for action in actions]
    about = (parser.description or "").strip().split("\n\n")
    return [f"## {words}", *map(fenced, about), rows_of(("argument", "meaning"), rows), fenced(parser.epilog or "", as_it_is=True)]


def fenced(text: str, as_it_is: bool = False) -> str:
    """A paragraph, as a block where its lines are columns or it is to stay ``as_it_is``."""
    return f"```\n{text.rstrip()}\n```" if text.strip() and (as_it_is or text.startswith("  ")) else text


def shown(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = action.metavar or "/".join(action.choices or [action.dest.upper()])
    words = [", ".join(action.option_strings), "" if action.nargs == 0 else str(value), "..." if action.nargs in ("*", "+") else ""]
    return f"`{' '.join(filter(None, words))}`"


PAGES: dict[str, Callable[[], str]] = {"config.md": config, "commands.md": commands, "errors.md": errors}


def main() -> None:
    """Write the pages."""
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make())


if __name__ == "__main__":
    main()
