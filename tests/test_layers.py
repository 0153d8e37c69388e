"""The architecture, read off the import statements: who may import whom, and where private names may be used."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "lightning_par"
# Lowest first. A module imports lower lines and its own package; those on one line never import each other.
LAYERS = (
    ("errors",),
    ("layout",),
    ("private", "runtime"),
    ("materialize",),
    ("trace",),
    ("plan",),
    ("tensor", "pipeline", "zero"),
    ("recompute", "offload", "compilation", "split_backward", "picture"),
    ("install", "gradients", "loss_scale", "checkpoint", "guard"),
    ("memory",),
    ("prepare", "engine"),
    ("planner",),
    ("host",),
    ("__init__",),
    ("parity",),
    ("config", "demo", "data", "checkpoint_command"),
    ("plan_command", "calibrate_command", "check_command", "doctor_command", "tokenize_command"),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FOREIGN = {"torch", "deepspeed", "lightning", "pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "transformers"}


def files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if "conf" not in path.relative_to(ROOT).parts]


def module_of(path: Path) -> str:
    """Dotted name below the package: runtime/mesh.py is runtime.mesh, runtime/__init__.py is runtime."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in files()}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import statement, wherever it stands; the name is "" where a module itself is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of this package that a file imports, named as in TREES."""
    found = set()
    for module, name in imports(tree):
        if module == "lightning_par" or module.startswith("lightning_par."):
            below = ".".join([*module.split(".")[1:], name]).strip(".")
            found.add(below if below in TREES else below.rpartition(".")[0] or "__init__")
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_place_in_the_table() -> None:
    assert {top(module) for module in TREES} <= set(LEVEL)


@pytest.mark.parametrize("module", TREES)
def test_a_module_imports_only_lower_layers(module: str) -> None:
    if module == "__init__":
        return  # the public names; what they are imported from is checked by each lower module
    for imported in own_imports(TREES[module]):
        inside = top(imported) == top(module)
        assert inside or LEVEL[top(imported)] < LEVEL[top(module)], f"lightning_par.{module} imports lightning_par.{imported}"


def test_there_is_no_cycle() -> None:
    try:
        TopologicalSorter({module: own_imports(tree) for module, tree in TREES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [module for module in TREES if top(module) != "private"])
def test_private_names_of_other_libraries_are_imported_in_one_place(module: str) -> None:
    for imported, name in imports(TREES[module]):
        parts = f"{imported}.{name}".split(".")
        private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
        assert parts[0] not in FOREIGN or not private, f"lightning_par.{module} imports {imported} {name}"


@pytest.mark.parametrize("module", ["errors", "layout"])
def test_words_need_no_library(module: str) -> None:
    outside = {name.split(".")[0] for name, _ in imports(TREES[module])} - {"lightning_par"}
    assert outside <= sys.stdlib_module_names
