"""Layout words as Hydra configs, the shipped configs, and the errors a user meets at the command line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_par.config.devices import choose_devices
from lightning_par.config.parallel import ParallelConfig, read_layout
from lightning_par.config.run import build_run
from lightning_par.config.search_path import register
from lightning_par.config.source import LayoutConfigSource
from lightning_par.errors import LayoutError
from lightning_par.host.loss_weight import FieldCount
from lightning_par.layout import EXAMPLES, Layout, parse_layout

ROOT = Path(__file__).resolve().parents[1]
# clusters are no options of a run: they describe machines to `lightning-par plan`
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in (ROOT / "conf").glob("*/*.yaml")
    if path.parent.name not in ("parallel", "cluster")
)


@pytest.fixture(scope="module", autouse=True)
def _words() -> Iterator[None]:
    register()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str, folder: Path = ROOT / "conf", name: str = "train") -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(name, list(overrides))


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("word", [*EXAMPLES, "mb3_tp5", "zero2_dp7"])
def test_a_layout_word_needs_no_file(word: str) -> None:
    config = composed(f"parallel={word}")
    assert read_layout(config.parallel) == parse_layout(word)


def test_a_word_can_be_changed_field_by_field() -> None:
    config = composed("parallel=tp2_pp2", "parallel.tp=4", "parallel.microbatches=3")
    assert read_layout(config.parallel) == Layout(tp=4, pp=2, microbatches=3)


def test_the_words_work_at_another_package() -> None:
    assert composed("+parallel@teacher.parallel=tp2_zero1").teacher.parallel.zero == 1


def test_yaml_of_the_same_name_wins(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "tp2.yaml").write_text("pp: 5\n")
    (tmp_path / "parallel" / "mine.yaml").write_text("defaults: [tp4_pp2, _self_]\nzero: 1\n")
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    assert read_layout(composed("parallel=tp2", searched).parallel) == Layout(pp=5)
    assert read_layout(composed("parallel=mine", searched).parallel) == Layout(tp=4, pp=2, zero=1)


def test_a_misspelt_word_is_explained() -> None:
    with pytest.raises(ConfigCompositionException, match=r"parallel=tp4_xx2: unknown token 'xx2'.*Did you mean"):
        composed("parallel=tp4_xx2")
    with pytest.raises(ConfigCompositionException, match=r"parallel=tp0: tp0: tensor-parallel size must be"):
        composed("parallel=tp0")


def test_another_word_gets_the_list_of_options() -> None:
    with pytest.raises(ConfigCompositionException, match=r"(?s)Could not find 'parallel/nonsense'.*Available options.*tp2_pp2"):
        composed("parallel=nonsense")


def test_values_are_typed() -> None:
    with pytest.raises(CompactHydraException):
        composed("parallel=tp2", "parallel.tp=two")
    with pytest.raises(CompactHydraException):
        composed("parallel=tp2", "parallel.tpp=3")


def test_a_key_that_is_forced_in_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.tpp: there is no such key; the keys are tp, pp, vp, dp, zero, microbatches"):
        read_layout(composed("parallel=tp2", "+parallel.tpp=3").parallel)


def test_completion_and_help_list_examples() -> None:
    source = LayoutConfigSource(provider="lightning_par", path="par://words")
    assert source.list("", None) == ["parallel"]
    assert source.list("parallel", None) == sorted(EXAMPLES)
    assert source.list("model", None) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("loss_weight=labels", "FieldCount(field='labels', ignore_index=-100, shift=0)"),
        (
            "loss_weight={field: inner.tokens, ignore_index: 0, shift: 1}",
            "FieldCount(field='inner.tokens', ignore_index=0, shift=1)",
        ),
        ("loss_weight={_target_: builtins.len, _partial_: true}", "loss_weight=len"),
        ("loss_weight=null", "None"),
    ],
)
def test_what_counts_the_targets_reaches_the_strategy(override: str, named: str) -> None:
    config = composed("parallel=single", "trainer.default_root_dir=null", override)
    trainer, _, _ = build_run(config, accelerator="cpu", devices=1, logger=False, callbacks=[])
    count = trainer.strategy.options.loss_weight
    assert (repr(count) if isinstance(count, FieldCount) else str(count)) == named


@pytest.mark.parametrize(
    ("lines", "said"),
    [([], (True, 0)), (["detect_anomaly=null", "drift_guard=50"], (False, 50)), (["detect_anomaly=first"], (True, 0))],
)
def test_guards_reach_the_strategy(lines: list[str], said: tuple[bool, int]) -> None:
    config = composed("parallel=single", "trainer.default_root_dir=null", *lines)
    trainer, _, _ = build_run(config, accelerator="cpu", devices=1, logger=False, callbacks=[])
    assert (trainer.strategy.options.detects_anomaly, trainer.strategy.options.drift_guard) == said


@pytest.mark.parametrize(("lines", "said"), [([], True), (["monitor=false"], False)])
def test_one_line_turns_the_monitor_off(lines: list[str], said: bool) -> None:
    config = composed("parallel=single", "trainer.default_root_dir=null", *lines)
    trainer, _, _ = build_run(config, accelerator="cpu", devices=1, logger=False, callbacks=[])
    assert trainer.strategy.options.monitor is said


def test_options_of_the_group_parallel_reach_the_strategy() -> None:
    said = {"recompute": "full", "memory_gib": 3.0, "offload_activations": True, "compile": True, "fp8": "rowwise"}
    sizes = {field.name for field in fields(Layout)}
    assert said.keys() == {field.name for field in fields(ParallelConfig)} - sizes
    lines = [f"parallel.{name}={value}" for name, value in said.items()]
    config = composed("parallel=tp2", "trainer.default_root_dir=null", *lines)
    trainer, _, _ = build_run(config, accelerator="cpu", devices=2, logger=False, callbacks=[])
    assert trainer.strategy.options.memory_gib == 3.0
    assert trainer.strategy.options.overrides.items() >= {"compile": "inductor", "fp8": "rowwise"}.items()
    assert trainer.strategy.options.overrides["recompute"] == {"*": "full"}
    assert trainer.strategy.options.overrides["offload_activations"] == {"*": True}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_option_builds_its_object(option: str, tmp_path: Path) -> None:
    group = option.split("=")[0]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [option, f"hydra.runtime.output_dir={tmp_path}"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    try:
        assert instantiate(config[group], _convert_="all")
    finally:
        HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("word", "devices"),
    [("single", 1), ("tp2", 2), ("tp2_pp3", 6), ("zero1", 2), ("tp2_zero3", 4), ("dp3_zero1", 3), ("pp2_dp3", 6)],
)
def test_devices_on_the_cpu_are_what_the_layout_needs(word: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    trainer = {"accelerator": "cpu", "devices": "auto"}
    assert choose_devices(trainer, parse_layout(word)) == {"accelerator": "cpu", "devices": devices}


def test_devices_that_are_given_or_already_started_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tp=2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_devices({"accelerator": "cpu", "devices": 4}, layout)["devices"] == 4
    assert choose_devices({"accelerator": "cuda", "devices": "auto"}, layout) == {"accelerator": "cuda", "devices": "auto"}
    assert choose_devices({"accelerator": "cpu", "devices": "auto", "num_nodes": 2}, layout)["devices"] == 1
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert choose_devices({"accelerator": "cpu", "devices": "auto"}, layout)["devices"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel=tp4_xx2"], "parallel=tp4_xx2: unknown token 'xx2'"),
        (["parallel=tp2", "+parallel.tpp=3"], "parallel.tpp: there is no such key"),
        (["trainer.max_stepz=3"], "Key 'max_stepz' is not in struct"),
        (["--multirun", "parallel=tp2,tp4", "+parallel.tpp=3"], "parallel.tpp: there is no such key"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(overrides: list[str], message: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_errors_do_not_wait_for_torch() -> None:
    program = "import sys, train, lightning_par.cli; print([name for name in ('torch', 'lightning_fabric') if name in sys.modules])"
    result = run("-c", program, folder=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
