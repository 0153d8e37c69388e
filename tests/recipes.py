"""The recipes as small runs: the sizes of their models and batches made small, their techniques kept, on four processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from lightning_par.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
NUM_RANKS = 4
# For each group of data that needs files: one that every machine has, as small as can be.
EMBEDDED = {
    "tokens": ["data=standard_library", "data.context=32"],
    "standard_library": ["data.context=32"],
    "image_folder": ["data=glyphs", "data.image_size=32"],
    "text_files": ["data=packages", "data.length=32", "model.weights=null"],
}
TRAINER = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", f"trainer.devices={NUM_RANKS}")


def small(recipe: str) -> list[str]:
    """Overrides that leave of a recipe what is not its size or its data."""
    options = chosen(recipe)
    sizes = yaml.safe_load((ROOT / "conf" / "model" / f"{options['model']}.yaml").read_text())["network"]
    config, at = sizes.get("config", sizes), "config." if "config" in sizes else ""
    numbers = {key: value for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool)}
    model = [f"++model.network.{at}{key}={value}" for key, value in numbers.items()]
    return [*EMBEDDED[options["data"]], "data.batch_size=8", *model, *TRAINER, "trainer.default_root_dir=null"]


def chosen(recipe: str) -> dict[str, str]:
    """The option of each group, by the recipe's own list or by ``train``'s."""
    found: dict[str, str] = {}
    for file in (ROOT / "conf" / "train.yaml", ROOT / "recipes" / f"{recipe}.yaml"):
        for line in yaml.safe_load(file.read_text())["defaults"]:
            if isinstance(line, dict):
                found |= {key.removeprefix("override "): value for key, value in line.items()}
    return found


def small_layouts(layout: Layout) -> list[Layout]:
    """The same techniques on `NUM_RANKS` ranks: one layout with all of its axes, or where these are three, one for each two."""
    axes = [axis for axis, size in (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp or 1)) if size > 1]
    if len(axes) == 1:
        sizes = [{axes[0]: NUM_RANKS}]
    else:
        sizes = [dict.fromkeys(pair, 2) for pair in ([axes] if len(axes) == 2 else [axes[:2], axes[1:]])]
    return [
        replace(
            layout,
            **{"tp": 1, "pp": 1, "dp": 1, **each},
            vp=min(layout.vp, 2) if "pp" in each else 1,
            sp=layout.sp and "tp" in each,
            zero=layout.zero if "dp" in each else 0,
            microbatches=min(layout.microbatches or 1, 4) if "pp" in each else min(layout.microbatches or 1, 2),
        )
        for each in sizes
    ]
