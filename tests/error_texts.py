"""The page of every error that the package raises on purpose, by its text: what `docs/errors.md` is made of."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from lightning_par import errors as tree

PACKAGE = Path(tree.__file__).parent
KINDS = {name for name, kind in vars(tree).items() if isinstance(kind, type) and issubclass(kind, tree.LightningParError)}
DOCS = PACKAGE.resolve().parent / "docs"
HOLE = "…"
# Where a message belongs, by the longest path that its file begins with.
SECTIONS = {
    "The layout and the config": ("layouts.md", "layout.py config host/check host/ranks.py host/option.py"),
    "Your module, your data and the plan": ("overrides.md", "trace plan prepare.py install.py tensor host/first_batch.py"),
    "A run": ("running.md", "host runtime engine.py gradients.py"),
    "Runs that survive": ("surviving.md", "host/launch host/stop.py"),
    "Checkpoints": ("checkpoints.md", "checkpoint host/checkpoints.py host/saving.py host/data"),
    "Guards": ("guards.md", "guard host/anomaly.py"),
    "Pipelines": ("pipelines.md", "pipeline picture host/timeline.py split_backward.py"),
    "ZeRO": ("zero.md", "zero private/deepspeed"),
    "Recomputing, offload, memory, compile": ("recomputation.md", "recompute offload.py memory host/memory.py compilation.py"),
    "Precision and float8": ("precision.md", "host/precision.py loss_scale.py tensor/float8.py private/torchao.py"),
    "Models larger than a host": ("large.md", "materialize host/construction.py"),
    "Choosing a layout": (
        "choosing.md",
        "planner plan_command.py calibrate_command.py host/auto.py host/here.py host/calibrate",
    ),
    "lightning-par check": ("proof.md", "check_command.py parity"),
    "Data for language models": ("data.md", "data"),
    "lightning-par doctor": ("doctor.md", "doctor_command.py"),
}
OTHER = "Everything else"
_HEAD = """\
# Errors by text

Every message says what is wrong in your own words and values, the rule, and one thing to do. Here are those that the package raises
on purpose, to be found by their words; … stands for what depends on your run. Whole examples of refusals are in
[What works, what is refused and why](works.md).
"""


def errors() -> str:
    """The page."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for kind, text in raised(ast.parse(path.read_text())):
            found.setdefault(section_of(path.relative_to(PACKAGE).as_posix()), set()).add((text, kind))
    drawn = re.search(r"^    LightningParError\n(?:    .*\n)+", tree.__doc__ or "", re.MULTILINE)
    assert drawn is not None
    parts = [_HEAD, "```\n" + re.sub("^    ", "", drawn[0], flags=re.MULTILINE).replace("``", "") + "```"]
    for title in (*SECTIONS, OTHER):
        if title in found:
            parts += [f"## {title}", explained(SECTIONS[title][0]) if title in SECTIONS else ""]
            rows = [f"| {code(text)} | {kind} |" for text, kind in sorted(found[title], key=lambda row: (row[0].lower(), row))]
            parts.append("\n".join(["| text | error |", "|---|---|", *rows]))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def explained(page: str) -> str:
    """The line that leads to a page, by its title."""
    title = (DOCS / page).read_text().splitlines()[0].removeprefix("# ")
    return f"Explained in [{title}]({page})."


def section_of(file: str) -> str:
    """The section of a file's messages."""
    places = [(len(start), title) for title, (_, starts) in SECTIONS.items() for start in starts.split() if file.startswith(start)]
    return max(places)[1] if places else OTHER


def code(text: str) -> str:
    """A text as code in a cell of a table."""
    marks = "``" if "`" in text else "`"
    return f"{marks} {text} {marks}".replace("|", "/") if marks == "``" else f"`{text}`".replace("|", "/")


def raised(module: ast.Module) -> Iterator[tuple[str, str]]:
    """The kind and the text of each error that a module raises with words of its own."""
    for node in ast.walk(module):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            text = words(node.exc.args[0]) if node.exc.args else ""
            if node.exc.func.id in KINDS and len(re.findall(r"\w+", text)) > 2:
                yield node.exc.func.id, text


def words(node: ast.expr) -> str:
    """The text of an expression, with holes for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("\n", " ")
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{HOLE}+", HOLE, "".join(words(value) for value in node.values))
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return HOLE
