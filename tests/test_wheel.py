"""What a user gets who installs the package: configs and recipes inside, and layout words in a Hydra program of their own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import hydra

@hydra.main(config_path=".", config_name="mine", version_base="1.3")
def main(config):
    print(config.parallel.tp, config.parallel.zero, config.trainer.max_steps)

main()
"""
CONFIG = """
defaults: [parallel: tp2, trainer: default, _self_]
hydra: {searchpath: [pkg://lightning_par.conf, par://words], run: {dir: out}}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=240)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_configs_pages_and_the_plugin_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {"lightning_par/conf/train.yaml", "lightning_par/conf/__init__.py", "lightning_par/recipes/demo.yaml"} <= set(names)
    assert {
        f"lightning_par/picture/page/{name}"
        for name in ("frame.html", "timeline.html", "page.html", "mesh.html", "plan.html", "page.css", "draw.js", "plan.js")
    } <= set(names)
    assert "hydra_plugins/lightning_par_plugin/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names, "it is a namespace that other packages add to"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_par", "hydra_plugins"}


@pytest.mark.slow
def test_an_installed_wheel_serves_a_program_that_does_not_import_it(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "program.py", "parallel=tp4_zero2", "trainer.max_steps=7"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "4 2 7\n", result.stderr
    where = "import lightning_par, lightning_par.conf as conf; print(lightning_par.__file__, conf.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == [
        str(site / "lightning_par" / "__init__.py"),
        str(site / "lightning_par" / "conf" / "__init__.py"),
    ]
