"""Every recipe and every option of a config group composes, plans and runs, and recipes have the layout that the planner finds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_par.config.cluster import load_cluster, read_question
from lightning_par.config.parallel import read_layout
from lightning_par.config.run import build_run
from lightning_par.config.search_path import register
from lightning_par.host.outlook import outlook_of, taken_apart
from lightning_par.layout import Layout, parse_layout
from lightning_par.planner import search
from lightning_par.planner.cluster import shipped_cluster
from tests.ranks import run_ranks
from tests.recipes import NUM_RANKS, RECIPES, ROOT, TRAINER, chosen, small, small_layouts
from tests.test_config import OPTIONS

COMMAND = re.compile(r"^# (srun )?python train\.py --config-dir recipes --config-name (\w+)$")
COMMAND_OF_PLAN = re.compile(r"^#   (lightning-par plan .*)$", re.MULTILINE)
NEARLY = 1.05  # of the quickest: where a recipe has another layout than that, it says why
# What the options of a group need to run small; options of the model and the data are run by the recipes, unless they are here.
RUNS = {"callbacks=timeline": ["callbacks.timeline.steps=[0,1]"], "callbacks=sample": ["+callbacks.sample.num_bytes=2"]}
SHORT: dict[str, Any] = dict(enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0, num_nodes=1)
SILENT: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
ALONE: dict[str, Any] = dict(accelerator="cpu", devices=1, num_nodes=1, logger=False, callbacks=[])


class Losses(pl.Callback):
    """Writes down the loss of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.fixture(scope="module", autouse=True)
def _words() -> Iterator[None]:
    register()
    yield
    GlobalHydra.instance().clear()


def recipe_config(recipe: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return compose(recipe, [f"hydra.searchpath=[file://{ROOT / 'conf'}]", *overrides])


def option_config(options: list[str], folder: Path) -> DictConfig:
    """Options in the demo, with Hydra's own values."""
    words = ["parallel=pp2_dp2", "data.context=16", "data.batch_size=4", "model.network.width=16", *TRAINER]
    needed = [word for option in options for word in RUNS.get(option, [])]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config: DictConfig = compose(
            "train", [*options, *words, *needed, f"hydra.runtime.output_dir={folder}"], return_hydra_config=True
        )
    return config


def sized(layout: Layout) -> list[str]:
    """Overrides that make a layout of another one."""
    values = {field.name: getattr(layout, field.name) for field in fields(Layout) if field.name not in ("auto", "placement")}
    return [f"parallel.{name}={'null' if value is None else value}" for name, value in values.items()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_its_command_and_says_its_layout_once(recipe: str) -> None:
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    config, command = recipe_config(recipe), COMMAND.match(text.splitlines()[0])
    assert command is not None and command[2] == recipe
    has_nodes = config.trainer.get("num_nodes", 1) > 1
    assert bool(command[1]) == has_nodes, "one node starts its own ranks, on several nodes srun does"
    layout = read_layout(config.parallel)
    devices = config.trainer.devices
    if devices != "auto":
        assert layout.resolve(devices * config.trainer.get("num_nodes", 1))


def test_small_layouts_have_all_techniques_of_the_large_one() -> None:
    layout = parse_layout("tp8_sp_pp8_vp4_dp2_zero1_mb64")
    assert [str(each) for each in small_layouts(layout)] == ["tp2_sp_pp2_vp2_mb4", "pp2_vp2_dp2_zero1_mb4"]
    assert [str(each) for each in small_layouts(parse_layout("dp8_zero3_mb16"))] == ["dp4_zero3_mb2"]
    assert [str(each) for each in small_layouts(parse_layout("tp2_dp4"))] == ["tp2_dp2_mb1"]


def train(rank: int, world_size: int, cases: dict[str, DictConfig]) -> dict[str, list[float]]:
    found = {}
    for name, config in cases.items():
        watch = Losses()
        options = {**SHORT, **SILENT, "callbacks": []}
        if "hydra" in config:  # an option, whose callbacks and loggers are what is tried
            HydraConfig.instance().set_config(config)
            options = SHORT
        trainer, module, data = build_run(config, {"print_plan": False, "audit": False}, **options)
        trainer.callbacks.append(watch)
        trainer.fit(module, data)
        found[name] = watch.seen
    return found


def test_every_recipe_and_every_option_plans_and_runs_small(tmp_path: Path) -> None:
    cases = {}
    for recipe in RECIPES:
        devices = recipe_config(recipe).trainer
        count = NUM_RANKS if devices.devices == "auto" else devices.devices * devices.get("num_nodes", 1)
        for layout in small_layouts(read_layout(recipe_config(recipe).parallel).resolve(count)):
            cases[f"{recipe} {layout}"] = recipe_config(recipe, *small(recipe), *sized(layout))
    groups = {
        group: [option for option in OPTIONS if option.startswith(f"{group}=")] for group in ("callbacks", "logger", "trainer")
    }
    for index in range(max(map(len, groups.values()))):  # the next option of each group together, until all have run
        options = [options[index % len(options)] for options in groups.values()]
        cases[" ".join(options)] = option_config(options, tmp_path / str(index))
    assert set(OPTIONS) - set(" ".join(cases).split()) == {each for each in OPTIONS if each.startswith(("model=", "data="))}
    by_rank = run_ranks(train, NUM_RANKS, cases, timeout=200)
    for name in cases:
        losses = by_rank[0][name]
        assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[0] != losses[1], name
    assert list(tmp_path.rglob("timeline/**/*.html")) and list(tmp_path.rglob("events*"))


def test_the_recipes_have_every_model_and_every_data() -> None:
    """So that each of them has run above, or the group that stands in for data that needs files."""
    used = {f"{group}={chosen(recipe)[group]}" for recipe in RECIPES for group in ("model", "data")}
    used |= {word for recipe in RECIPES for word in small(recipe) if word.startswith("data=")}
    elsewhere = {"data=hugging_face"} & set(OPTIONS)
    assert {option for option in OPTIONS if option.split("=")[0] in ("model", "data")} == used | elsewhere


def test_every_cluster_has_a_layout_for_the_demo() -> None:
    words = [*small("demo"), "model.network.heads=1", "parallel=single"]  # with one head no tp has to be taken apart
    trainer, module, data = build_run(recipe_config("demo", *words), **ALONE)
    with taken_apart(trainer, lambda words: None, module, data) as (anatomy, _):
        for path in sorted((ROOT / "conf" / "cluster").glob("*.yaml")):
            found = search(anatomy, shipped_cluster(path.stem, 2), 64)
            assert found.best[0].most_bytes <= found.cluster.device.usable_bytes and found.num_considered > 10, path.stem


def typed(config: DictConfig) -> str:
    """The layout of a recipe in the words of the planner, without ``parallel=``."""
    words = [str(read_layout(config.parallel))]
    words += [f"schedule={config.schedule}"] * (config.schedule is not None)
    words += [f"parallel.recompute={config.parallel.recompute}"] * (config.parallel.recompute != "none")
    return " ".join(words)


def forecasts(text: str) -> dict[str, float]:
    """The seconds of a step of each layout that a recipe lists, the quickest first."""
    rows = re.findall(r"^#   (\S.*): ([\d.]+) (m?)s, .* GiB", text, re.MULTILINE)
    return {words: float(number) / (1000 if milli else 1) for words, number, milli in rows}


PLANNED = [recipe for recipe in RECIPES if recipe != "demo"]


@pytest.mark.parametrize("recipe", PLANNED)
def test_a_recipe_says_what_the_planner_found_and_has_its_best_or_nearly_so(recipe: str) -> None:
    listed = forecasts((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    assert len(listed) >= 3 and list(listed.values()) == sorted(listed.values())
    assert listed[typed(recipe_config(recipe))] <= NEARLY * min(listed.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLANNED)
def test_the_planner_finds_what_a_recipe_says(recipe: str) -> None:
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    command = COMMAND_OF_PLAN.search(text)
    assert command is not None and command[1].split()[2:6] == ["-cd", "recipes", "-cn", recipe]
    question = read_question(command[1].split()[6:])
    cluster, config = load_cluster(question, None), recipe_config(recipe)
    replicas = read_layout(config.parallel).resolve(cluster.num_devices).dp or 1
    assert question.batch == config.data.batch_size * replicas
    alone = recipe_config(recipe, *question.overrides, "parallel=single", "trainer.default_root_dir=null")
    trainer, module, data = build_run(alone, **ALONE)
    outlook, _ = outlook_of(trainer, module, data, cluster, question.batch, lambda words: None)
    found = {estimate.candidate.words.removeprefix("parallel="): estimate for estimate in outlook.best}
    chosen = found[typed(config)]
    assert chosen.most_bytes <= cluster.device.usable_bytes
    assert chosen.step_seconds <= NEARLY * outlook.best[0].step_seconds
    assert chosen.step_seconds == pytest.approx(forecasts(text)[typed(config)], rel=0.02)
