"""The README, the pages of docs/ and ARCHITECTURE say what is true: code runs, commands exist, words and paths are real."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import lightning_par
from lightning_par import __version__, cli
from lightning_par.config.cluster import load_cluster, read_question
from lightning_par.config.command import add_config_options
from lightning_par.config.parallel import read_layout
from lightning_par.config.search_path import register
from lightning_par.host.launch.command import MAIN
from lightning_par.layout import TOKENS, parse_layout
from lightning_par.picture.simulation import read_simulation
from lightning_par.pipeline.schedules import SCHEDULES
from lightning_par.plan import Overrides
from tests import table
from tests.matrix import MATRIX
from tests.pages import BLOCK, PAGES, ROOT, blocks, commands, shell_lines
from tests.parity import TOLERANCE
from tests.ranks import run_ranks
from tests.test_layers import LAYERS
from tests.zoo import ZOO

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
README = PAGES["README.md"]
TOKEN = rf"(?:{'|'.join(TOKENS)})\d+"
# What a line of the shell may begin with; the last ones need other machines.
PROGRAMS = {"python", "lightning-par", "torchrun", "make", "pip", "eval", "export", "cd", "git", "srun", "sbatch", "kubectl"}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the YAML files that the pages show, each under the name in its first line, and the recipes."""
    folder = tmp_path_factory.mktemp("readme")
    for block in blocks("\n".join(PAGES.values()), "yaml"):
        if name := re.match(r"# (\S+\.yaml)$", block.splitlines()[0]):
            (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / name[1]).write_text(block)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    register()
    yield folder
    GlobalHydra.instance().clear()


def run_scripts(rank: int, world_size: int, scripts: list[str], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = ["mine.py", "single", "1"]
    for script in scripts:
        exec(compile(script, "docs.py", "exec"), {"__name__": "__main__"})


def test_the_scripts_run_in_one_process(tmp_path: Path) -> None:
    (script,), (own,) = blocks(README, "python"), blocks(PAGES["quickstart.md"], "python")
    assert blocks(PAGES["index.md"], "python") == [script]
    small = replaced(script, {'"tp2_pp2_zero1"': '"single"', "devices=8": "devices=1", "max_steps=100": "max_steps=1"})
    run_ranks(run_scripts, 1, [small, replaced(own, {"devices=4": "devices=1"})], tmp_path)
    assert list(tmp_path.rglob("plan.yaml")) and (tmp_path / "mine.ckpt" / "checkpoint.json").exists()


@pytest.mark.slow
def test_the_quick_start_is_a_way_to_go(tmp_path: Path, configs: Path) -> None:
    """Every line about a module of one's own, as it stands: two trainings, a checkpoint, what looks ahead."""
    (script,) = blocks(PAGES["quickstart.md"], "python")
    (tmp_path / "mine.py").write_text(script)
    (tmp_path / "my_configs").symlink_to(configs / "my_configs")
    programs = {"python": [sys.executable], "lightning-par": [sys.executable, "-m", "lightning_par.cli"]}
    lines = [words for words in shell_lines(PAGES["quickstart.md"]) if any("mine" in word for word in words)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:."}
    printed = ""
    for program, *words in lines:
        command = [*programs[program], *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        printed += result.stdout
    assert "\nequal: tp2_pp2" in printed
    assert (tmp_path / "mine" / "model.safetensors").exists()


def replaced(script: str, words: dict[str, str]) -> str:
    """The script with other words, each of which it has once."""
    for written, other in words.items():
        assert script.count(written) == 1
        script = script.replace(written, other)
    return script


@pytest.mark.parametrize("page", PAGES)
def test_python_of_every_page_compiles(page: str) -> None:
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "lightning_par":
                assert all(hasattr(lightning_par, name.name) for name in node.names), block


def test_layout_words_are_words() -> None:
    words = set(re.findall(rf"[`\"=,]((?:{TOKEN}|single)(?:_{TOKEN})*)(?=[`\",\s])", "\n".join(PAGES.values())))
    assert len(words) > 15
    for word in words:
        parse_layout(word)


@pytest.mark.parametrize("page", ["README.md", "layouts.md"])
def test_the_token_table_is_complete(page: str) -> None:
    assert set(re.findall(r"^\| `([a-z]+)N` \|", PAGES[page], re.MULTILINE)) == set(TOKENS)


def test_the_parity_table_is_the_matrix() -> None:
    (row,) = re.findall(r"^\| the GPT of the main job.*$", PAGES["proof.md"], re.MULTILINE)
    (matrix,) = [
        node.value for node in ast.parse((ROOT / "tests" / "test_parity.py").read_text()).body if _names(node) == "LAYOUTS"
    ]
    assert tuple(re.findall(r"`([^`]+)`", row)) == ast.literal_eval(matrix)


def _names(node: ast.stmt) -> str:
    """The variable that a statement sets; "" for any other."""
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def test_the_table_of_what_works_is_the_matrix() -> None:
    """Each model in each of its layouts has a number within the tolerance, and nothing else has one."""
    errors = table.read(PAGES["works.md"])
    assert table.section(PAGES["works.md"], "works") == table.works(errors)
    for word, makers in MATRIX.items():
        assert {name for name, error in errors[word].items() if error} == set(makers), f"run python -m tests.table {word}"
        assert all(float(error) <= TOLERANCE for error in errors[word].values() if error)


def test_the_table_of_errors_has_their_words() -> None:
    assert table.section(PAGES["works.md"], "refused") == table.refused(), "run python -m tests.table refused"


def test_schedules_are_named() -> None:
    (row,) = re.findall(r"^\| schedules \| (.*?) \|", PAGES["supported.md"], re.MULTILINE)
    assert row.lower().split(", ") == sorted(SCHEDULES)


def test_yaml_of_the_plan_parses(configs: Path) -> None:
    section = yaml.safe_load((configs / "my_configs" / "run.yaml").read_text())["plan"]
    overrides = Overrides.parse(section)
    assert (overrides.chain, overrides.stages) == ("network.blocks", (1, 3))
    assert overrides.kinds(["network.blocks.0.mlp.up", "network.head"]) == {"network.blocks.0.mlp.up": "replicate"}


def composed(folder: Path | None, name: str | None, overrides: list[str]) -> DictConfig:
    """What Hydra makes of the words after a program, from a folder of configs and the name of a primary one."""
    primary = folder is not None and (folder / f"{name}.yaml").exists()
    searched = f"hydra.searchpath=[file://{ROOT / 'conf' if primary else folder}]"
    with initialize_config_dir(str(folder if primary else ROOT / "conf"), version_base="1.3"):
        return compose(name or "train", [*overrides, *([searched] if folder else [])])


def check_composes(words: list[str], folder: Path) -> None:
    """The words after train.py, or after a command that composes what it would."""
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    options, overrides = parser.parse_known_args(words)
    others = ("ckpt_path=", "hydra", "+hydra")  # what to resume from, and what is Hydra's own
    overrides = [word for word in overrides if "=" in word and not word.startswith(others)] or ["seed=1"]
    key, _, choices = overrides[0].partition("=")
    for choice in choices.split(",") if "-m" in words else [choices]:
        searched = options.config_dir and folder / options.config_dir
        config = composed(searched, options.config_name, [f"{key}={choice}", *overrides[1:]])
        read_layout(config.parallel)
        Overrides.parse(OmegaConf.to_container(config.plan))


@pytest.mark.parametrize("words", commands("train.py"), ids=" ".join)
def test_commands_compose(words: list[str], configs: Path) -> None:
    if not {"--help", "-sc"} & set(words):
        check_composes(words, configs)


@pytest.mark.parametrize("words", commands("lightning-par"), ids=" ".join)
def test_commands_of_the_console_script_parse(words: list[str], configs: Path) -> None:
    options, others = cli._parser().parse_known_args(words)
    overrides = [*vars(options).get("overrides", []), *others]
    if words[0] == "simulate":
        read_simulation(options.words)
    elif words[0] in ("plan", "calibrate"):
        question = read_question(overrides)
        load_cluster(question, options.config_dir)
        overrides = question.overrides
    if "overrides" in options:
        places = {"--config-dir": options.config_dir, "--config-name": options.config_name}
        check_composes([*(word for pair in places.items() if pair[1] for word in pair), *overrides], configs)
    else:
        assert not others


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_the_shell_begin_with_programs(page: str) -> None:
    for words in shell_lines(PAGES[page]):
        program = Path(next(word for word in words if not re.match(r"\w+=", word))).name
        assert program in PROGRAMS, f"{' '.join(words)}: not one of {sorted(PROGRAMS)}"


def test_modules_that_are_run_exist() -> None:
    named = set(re.findall(r"python -m ((?:benchmarks|tests)\.\w+)", "\n".join([*PAGES.values(), ARCHITECTURE])))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def test_explain_prints_what_the_pages_show(
    configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs)
    for words in commands("lightning-par", ["how.md", "overrides.md"]):
        monkeypatch.setattr("sys.argv", ["lightning-par"])
        monkeypatch.setenv(MAIN, "")  # so that it is forgotten again
        cli.main(words)
    printed = capsys.readouterr().out
    shown = [*blocks(PAGES["how.md"], ""), *blocks(PAGES["memory.md"], "")]
    assert len(shown) == 3
    for line in "\n".join(shown).splitlines():
        assert line == "..." or line in printed
    assert "as the plan section says" in printed


def test_check_prints_what_its_page_shows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the numbers, and for which parameters are the worst: rounding depends on the machine."""
    (words,) = commands("lightning-par", ["proof.md"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-par"])
    monkeypatch.setenv(MAIN, "")
    cli.main(words)
    printed, shown = [
        [re.sub(r"network\S+|\d\.\S+", "", " ".join(line.split())) for line in text.splitlines()]
        for text in (capfd.readouterr().out, blocks(PAGES["proof.md"], "")[0])
    ]
    assert [line for line in shown if line not in ("...", *printed)] == []


def test_the_numbers_of_the_readme_are_those_of_the_pages() -> None:
    """Of what is behind the promise: each stands on the page that the point leads to."""
    (section,) = re.findall(r"^## What is behind the promise\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    parity, *others = section.split("\n- ")[1:]
    worst = max(float(error) for errors in table.read(PAGES["works.md"]).values() for error in errors.values() if error)
    assert f" {len(ZOO)} models" in parity and f"more than {worst:.0e}".replace("e-0", "e-") in parity
    assert len(others) == 2
    for point in others:
        (page,) = re.findall(r"docs/(\w+\.md)", point)
        assert [number for number in re.findall(r"\d+(?:\.\d+)?", point) if number not in PAGES[page]] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(PAGES.values())
    named = {words[1] for words in shell_lines(text) if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)", text))
    assert named and named <= targets


def test_the_console_script_and_the_version_are_those_of_the_project() -> None:
    assert '\nlightning-par = "lightning_par.cli:main"\n' in (ROOT / "pyproject.toml").read_text()
    assert f": {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


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
    assert {name for text in PAGES.values() for _, name, _ in BLOCK.findall(text)} == {"", "bash", "python", "yaml"}
