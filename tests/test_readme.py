"""README and ARCHITECTURE say what is true: their code runs, their commands exist, their words and paths are real."""

from __future__ import annotations

import ast
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lightning_par import __version__, cli
from lightning_par.config.parallel import read_layout
from lightning_par.config.search_path import register
from lightning_par.host.launch.command import MAIN
from lightning_par.layout import TOKENS, parse_layout
from lightning_par.pipeline.schedules import SCHEDULES
from lightning_par.plan import Overrides
from tests import table
from tests.matrix import MATRIX
from tests.parity import TOLERANCE
from tests.ranks import run_ranks
from tests.test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[1]
README, ARCHITECTURE = ((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOKEN = rf"(?:{'|'.join(TOKENS)})\d+"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; "" for those without."""
    return [body for name, body in BLOCK.findall(text) if name == language]


def commands(program: str) -> list[list[str]]:
    """The words after ``program`` in every shell line of the README that calls it."""
    lines = [shlex.split(line, comments=True) for block in blocks(README, "bash") for line in block.splitlines()]
    inline = [shlex.split(code) for code in re.findall(r"`([^`\n]+)`", README) if code.startswith(f"python {program}")]
    found = [line[index + 1 :] for line in [*lines, *inline] for index, word in enumerate(line) if word == program]
    assert found, f"the README never calls {program}"
    return found


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the YAML files that the README shows, each under the name in its first line."""
    folder = tmp_path_factory.mktemp("readme")
    for block in blocks(README, "yaml"):
        path = folder / block.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    register()
    yield folder
    GlobalHydra.instance().clear()


def run_script(rank: int, world_size: int, script: str, folder: Path) -> None:
    os.chdir(folder)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})


def test_the_script_runs_in_one_process(tmp_path: Path) -> None:
    script, *others = blocks(README, "python")
    assert not others
    one_process = {'"tp2_pp2_zero1"': '"single"', "devices=8": "devices=1", "max_steps=100": "max_steps=1"}
    for written, small in one_process.items():
        assert script.count(written) == 1
        script = script.replace(written, small)
    run_ranks(run_script, 1, script, tmp_path)
    assert list(tmp_path.rglob("plan.yaml"))


def test_layout_words_are_words() -> None:
    words = set(re.findall(rf"[`\"=,]((?:{TOKEN}|single)(?:_{TOKEN})*)(?=[`\",\s])", README))
    assert len(words) > 15
    for word in words:
        parse_layout(word)


def test_the_token_table_is_complete() -> None:
    assert set(re.findall(r"^\| `([a-z]+)N` \|", README, re.MULTILINE)) == set(TOKENS)


def test_the_parity_table_is_the_matrix() -> None:
    (row,) = re.findall(r"^\| the GPT of the main job.*$", README, re.MULTILINE)
    (matrix,) = [
        node.value for node in ast.parse((ROOT / "tests" / "test_parity.py").read_text()).body if _names(node) == "LAYOUTS"
    ]
    assert tuple(re.findall(r"`([^`]+)`", row)) == ast.literal_eval(matrix)


def _names(node: ast.stmt) -> str:
    """The variable that a statement sets; "" for any other."""
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def test_the_table_of_what_works_is_the_matrix() -> None:
    """Each model in each of its layouts has a number within the tolerance, and nothing else has one."""
    errors = table.read(README)
    assert table.section(README, "works") == table.works(errors)
    for word, makers in MATRIX.items():
        assert {name for name, error in errors[word].items() if error} == set(makers), f"run python -m tests.table {word}"
        assert all(float(error) <= TOLERANCE for error in errors[word].values() if error)


def test_the_table_of_errors_has_their_words() -> None:
    assert table.section(README, "refused") == table.refused(), "run python -m tests.table refused"


def test_schedules_are_named() -> None:
    (row,) = re.findall(r"^\| schedules \| (.*?) \|", README, re.MULTILINE)
    assert row.lower().split(", ") == sorted(SCHEDULES)


def test_yaml_of_the_plan_parses(configs: Path) -> None:
    section = yaml.safe_load((configs / "my_configs" / "run.yaml").read_text())["plan"]
    overrides = Overrides.parse(section)
    assert (overrides.chain, overrides.stages) == ("network.blocks", (1, 3))
    assert overrides.kinds(["network.blocks.0.mlp.up", "network.head"]) == {"network.blocks.0.mlp.up": "replicate"}


@pytest.mark.parametrize("words", commands("train.py"), ids=" ".join)
def test_commands_compose(words: list[str], configs: Path) -> None:
    if {"--help", "-sc"} & set(words):
        return
    overrides = [word for word in words if "=" in word and not word.startswith("ckpt_path=")]
    searched = [f"hydra.searchpath=[file://{configs / words[words.index('--config-dir') + 1]}]"] if "--config-dir" in words else []
    key, _, choices = overrides[0].partition("=")
    for choice in choices.split(","):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [f"{key}={choice}", *overrides[1:], *searched])
        read_layout(config.parallel)
        Overrides.parse(OmegaConf.to_container(config.plan))


def test_explain_prints_what_the_readme_shows(
    configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs)
    for words in (words for words in commands("lightning-par") if words[0] == "explain"):
        monkeypatch.setattr("sys.argv", ["lightning-par"])
        monkeypatch.setenv(MAIN, "")  # so that it is forgotten again
        cli.main(words)
    printed = capsys.readouterr().out
    shown = blocks(README, "")[:3]
    assert len(shown) == 3
    for line in "\n".join(shown).splitlines():
        assert line == "..." or line in printed
    assert "as the plan section says" in printed


def test_check_prints_what_the_readme_shows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the numbers, and for which parameters are the worst: rounding depends on the machine."""
    (words,) = [words for words in commands("lightning-par") if words[0] == "check"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-par"])
    monkeypatch.setenv(MAIN, "")
    cli.main(words)
    printed, shown = [
        [re.sub(r"network\S+|\d\.\S+", "", " ".join(line.split())) for line in text.splitlines()]
        for text in (capfd.readouterr().out, blocks(README, "")[3])
    ]
    assert [line for line in shown if line not in ("...", *printed)] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join([*blocks(README, "bash"), *re.findall(r"`([^`\n]+)`", README)])))
    assert named and named <= targets


def test_the_console_script_and_the_version_are_those_of_the_project() -> None:
    assert '\nlightning-par = "lightning_par.cli:main"\n' in (ROOT / "pyproject.toml").read_text()
    assert f": {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "ARCHITECTURE.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists()


def test_the_contents_are_the_sections() -> None:
    sections = re.findall(r"^## (.*)$", README, re.MULTILINE)
    listed = re.findall(r"\[([^\]]*)\]\(#([^)]*)\)", README.split("\n## ")[0])
    assert [name for name, _ in listed] == [name for name in sections if name != "Licence"]
    for name, anchor in listed:
        assert anchor == re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")


def named_paths() -> set[str]:
    """Files and folders that ARCHITECTURE.md names: with a slash at the end, or an extension."""
    return set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.py|\.txt)|\.ci/run|Makefile)`", ARCHITECTURE))


def test_every_path_in_the_architecture_exists() -> None:
    for path in named_paths():
        assert (ROOT / path).exists() or (ROOT / "lightning_par" / path).exists(), path


def test_the_architecture_names_every_module() -> None:
    package = ROOT / "lightning_par"
    files = dict.fromkeys(package.rglob("*.py"), package)
    files |= {path: ROOT for folder in ("tests", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    modules = {str(path.relative_to(base)) for path, base in files.items() if path.name != "__init__.py"}
    assert modules - named_paths() == set()


def test_the_architecture_names_what_the_code_has() -> None:
    files = [*(ROOT / "lightning_par").rglob("*.py"), *(ROOT / "tests").glob("*.py"), ROOT / "train.py"]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files if path.name != "test_readme.py")))
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", ARCHITECTURE):
        assert set(name.split(".")) <= words or name in named_paths(), name


def test_the_architecture_draws_the_layers_of_the_layer_test() -> None:
    (drawn,) = blocks(ARCHITECTURE, "")
    assert tuple(tuple(line.split()) for line in textwrap.dedent(drawn).splitlines()) == LAYERS


def test_every_block_has_a_language_that_is_tested() -> None:
    assert {name for name, _ in BLOCK.findall(README)} == {"", "bash", "python", "yaml"}
