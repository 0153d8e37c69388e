"""From a composed config to the objects of a run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_par.config.devices import choose_devices
from lightning_par.config.parallel import read_arguments, read_layout
from lightning_par.layout import Layout

if TYPE_CHECKING:
    from omegaconf import DictConfig


def build_run(
    config: DictConfig, strategy_options: Mapping[str, Any] | None = None, **trainer_options: Any
) -> tuple[Any, Any, Any]:
    """The Trainer, the module and the data that a config describes.

    Args:
        config: composed from ``conf/train.yaml`` or a recipe.
        strategy_options: win over what the config says to the strategy.
        **trainer_options: win over the config's ``trainer``, ``callbacks`` and ``logger``.

    Raises:
        ConfigurationError: the layout cannot be read or does not fit the devices.
    """
    layout = read_layout(config.parallel)

    import pytorch_lightning as pl  # imported here, so that --help, completion and config errors do not wait for it
    from hydra.utils import instantiate

    from lightning_par.host.construction import construct

    # Lightning 2.6 on torch 2.13 warns of its own code, on every rank
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    pl.seed_everything(config.seed, workers=True)
    trainer = build_trainer(config, layout, strategy_options, **trainer_options)
    model, _ = take_weights(config.model)
    module = construct(lambda: instantiate(model, _convert_="all"), _read_init(config))
    return trainer, module, instantiate(config.data, _convert_="all")


def build_trainer(
    config: DictConfig, layout: Layout, strategy_options: Mapping[str, Any] | None = None, **trainer_options: Any
) -> Any:
    """The Trainer that a config describes, in a layout.

    Args:
        config: as for `build_run`.
        layout: in the place of what the config says.
        strategy_options: as for `build_run`.
        **trainer_options: as there; a ``strategy`` among them wins over all that.

    Raises:
        ConfigurationError: the layout does not fit the devices, or the strategy cannot have an option.
    """
    from hydra.utils import instantiate

    options: dict[str, Any] = {**choose_devices({**config.trainer, **trainer_options}, layout), **trainer_options}
    if "strategy" not in options:
        options["strategy"] = _build_strategy(config, layout, strategy_options or {})
    if "callbacks" not in options:
        options["callbacks"] = list(instantiate(config.callbacks, _convert_="all").values())
    if "logger" not in options:
        options["logger"] = instantiate(config.logger, _convert_="all")
    return instantiate(config.trainer, _convert_="all", _partial_=True)(**options)


def _build_strategy(config: DictConfig, layout: Layout, chosen: Mapping[str, Any]) -> Any:
    from hydra.utils import instantiate

    from lightning_par import HybridParallelStrategy

    _, weights = take_weights(config.model)
    options: dict[str, Any] = {
        **read_arguments(config.parallel),
        "plan": instantiate(config.plan, _convert_="all"),
        "schedule": config.schedule,
        "zero": instantiate(config.get("zero"), _convert_="all"),
        "async_save": config.async_save,
        "hang_seconds": config.hang_seconds,
        "detect_anomaly": config.get("detect_anomaly", "first"),
        "drift_guard": config.get("drift_guard", 0),
        "max_restarts": config.get("max_restarts", 0),
        "audit": config.get("audit", True),
        "monitor": config.get("monitor", True),
        "init": _read_init(config),
        "weights": weights,
        "loss_weight": instantiate({"given": config.get("loss_weight")}, _convert_="all")["given"],  # a plain word, too
    }
    return HybridParallelStrategy(layout, **{**options, **chosen})


def _read_init(config: DictConfig) -> str:
    """How weights are made; fast where they are read from files, as nobody sees what is drawn."""
    _, weights = take_weights(config.model)
    init: str = config.get("init", "exact")
    return "fast" if weights is not None and init == "exact" else init


def take_weights(model: DictConfig) -> tuple[DictConfig, str | None]:
    """``model`` without its key ``weights``, and that; a constructor that takes ``weights`` itself gets them."""
    from hydra.utils import get_object
    from omegaconf import OmegaConf

    if "weights" not in model or "weights" in inspect.signature(get_object(model["_target_"])).parameters:
        return model, None
    return OmegaConf.masked_copy(model, [str(key) for key in model if key != "weights"]), model.weights
