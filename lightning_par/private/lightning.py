"""Every private name of Lightning that this package uses, each with its reason. Read in Lightning 2.6.6.

Lightning comes under two names (`lightning.pytorch` and `pytorch_lightning`) whose classes are disjoint, so each function
takes the ``root`` to import from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def script_launcher_class(root: str) -> type[Any]:
    """The launcher that starts the other ranks as scripts.

    `Trainer` ends ranks on Ctrl-C and forwards SIGTERM to them only if the launcher is an instance of it
    (trainer/call.py, trainer/connectors/signal_connector.py).
    """
    return import_module(f"{root}.strategies.launchers.subprocess_script")._SubprocessScriptLauncher


def share_threads(root: str, num_processes: int) -> None:
    """Divide this machine's threads between its ranks, unless OMP_NUM_THREADS is set; the base launcher does the same."""
    fabric = "lightning.fabric" if root.startswith("lightning.") else "lightning_fabric"
    import_module(f"{fabric}.utilities.distributed")._set_num_threads_if_needed(num_processes=num_processes)


def set_default_root_dir(trainer: Any, folder: str) -> None:
    """Give a Trainer another folder than it was made with; there Lightning looks for what a requeued job of SLURM goes on from."""
    trainer._default_root_dir = folder


def loaders_of_next_validation(trainer: Any) -> list[Any]:
    """The loaders of the validation that follows the batch that was just trained on; none where none follows.

    Saved in a hook after the batch, a checkpoint is resumed after the validation (loops/training_epoch_loop.py).
    """
    loop = trainer.fit_loop
    if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
        return []
    loaders = loop.epoch_loop.val_loop._combined_loader
    return [] if loaders is None else list(loaders.flattened)


def logged_step(trainer: Any) -> int | None:
    """The step under which the Trainer logs after this training batch; None where it does not. Equal on all ranks.

    Called in the batch, from its first hook on (trainer/connectors/logger_connector: ``should_update_logs``, ``log_metrics``).
    What a Trainer logs in addition because it was told to stop is not foreseen: that may come later in the batch.
    """
    loop, every = trainer.fit_loop.epoch_loop, trainer.log_every_n_steps
    if loop._should_accumulate():
        return None
    step: int = loop._batches_that_stepped
    return step if trainer.fast_dev_run or (every and (step + 1) % every == 0) else None


# Modules that read checkpoints by a name of their own for the private `_load`, and whether they want the states of optimizers:
# `load_from_checkpoint` has no use for them, the CheckpointIO of other strategies does.
_LOADERS = {
    "pytorch_lightning.core.saving": False,
    "lightning.pytorch.core.saving": False,
    "lightning_fabric.plugins.io.torch_io": True,
    "lightning.fabric.plugins.io.torch_io": True,
}
Read = Callable[..., Any]


def extend_load(read: Read) -> None:
    """Let everything in Lightning that loads a checkpoint load ours too. It has no hook for that: it opens any path as a file.

    Modules that are not imported yet are changed when they are.

    Args:
        read: called as ``read(load, path, map_location, weights_only, has_states)``, where ``load()`` is what Lightning would do.
    """
    for name in _LOADERS.keys() & sys.modules.keys():
        _extend(sys.modules[name], read)
    sys.meta_path.insert(0, _WhenImported(read))


def _extend(module: ModuleType, read: Read) -> None:
    load, has_states = module.pl_load, _LOADERS[module.__name__]

    @wraps(load)
    def load_any(path_or_url: Any, map_location: Any = None, **options: Any) -> Any:
        as_before = partial(load, path_or_url, map_location, **options)
        return read(as_before, path_or_url, map_location, options.get("weights_only"), has_states)

    setattr(module, "pl_load", load_any)  # noqa: B010  mypy knows no such attribute


class _WhenImported(MetaPathFinder):
    """Finds what the other finders find, and changes the modules of `_LOADERS` when they have run."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _LOADERS:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module, self._read)

            setattr(spec.loader, "exec_module", execute_and_extend)  # noqa: B010  of this one module's loader
        return spec
