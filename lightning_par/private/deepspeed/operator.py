"""DeepSpeed's operators in C++, which are compiled where they are used: what is told when one cannot be."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.private.deepspeed.start import import_deepspeed

_COMPILER, _NINJA, _LIBAIO = "a C++ compiler (g++)", "ninja (pip install ninja)", "libaio with its header (apt install libaio-dev)"
_INSTEAD = {"async_io": "use zero.offload_optimizer=cpu"}


def missing_for_operators(device: torch.device) -> dict[str, list[str] | None]:
    """What this machine lacks for each operator that a training may need; None for one that is compiled already.

    Args:
        device: what trains.

    Raises:
        ConfigurationError: DeepSpeed is missing or another version.
    """
    import_deepspeed(device)
    builders = importlib.import_module("deepspeed.ops.op_builder")
    with _without_information():
        found = [builders.CPUAdamBuilder(), builders.AsyncIOBuilder()]
        return {builder.NAME: None if _is_compiled(builder.NAME) else _missing(builder) for builder in found}


def _is_compiled(name: str) -> bool:
    """When DeepSpeed was installed, or by an earlier run."""
    if importlib.import_module("deepspeed.git_version_info").installed_ops.get(name, False):
        return True
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or importlib.import_module("torch.utils.cpp_extension").get_default_build_root()
    return any(Path(root).glob(f"**/{name}/{name}.so"))


def load_async_io(device: torch.device) -> None:
    """Load the operator that reads and writes files. It is compiled where it has not been before, which takes minutes.

    Args:
        device: where the parameters are.

    Raises:
        ConfigurationError: it cannot be; says what is missing.
    """
    import_deepspeed(device)
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    with _without_information():  # the command of every compilation
        if _missing(builder):
            raise _refused(builder)
        try:
            builder.load(verbose=False)
        except Exception as error:
            check_operator(error)
            raise


@contextmanager
def _without_information() -> Iterator[None]:
    """While open, nothing is logged that is no warning."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def check_operator(error: BaseException) -> None:
    """Explain an error that DeepSpeed raised while it built one of its C++ operators, as for ``DeepSpeedCPUAdam``.

    Args:
        error: anything.

    Raises:
        ConfigurationError: it is such an error; names the operator and what to install.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):  # what went wrong first says the most
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            builder: Any = frame.f_locals.get("self")
            if frame.f_globals.get("__name__", "").startswith("deepspeed.ops.op_builder") and hasattr(builder, "NAME"):
                reason = textwrap.shorten(str(cause), 100) or type(cause).__name__  # of a compiler it is its whole command
                raise _refused(builder, f" ({reason})") from error


def _refused(builder: Any, reason: str = "") -> ConfigurationError:
    needed = _missing(builder) or [_COMPILER, _NINJA]
    instead = _INSTEAD.get(builder.NAME, "use an optimizer of torch, such as torch.optim.AdamW")
    return ConfigurationError(
        f"DeepSpeed's operator {builder.NAME} cannot be built on this machine{reason}: install {' and '.join(needed)}, or {instead}"
    )


def _missing(builder: Any) -> list[str]:
    """What a machine lacks for an operator, as far as it can be seen."""
    has_compiler = shutil.which(os.environ.get("CXX", "c++")) is not None
    found = {_COMPILER: has_compiler, _NINJA: importlib.import_module("torch.utils.cpp_extension").is_ninja_available()}
    if builder.NAME == "async_io" and has_compiler:
        found[_LIBAIO] = builder.has_function("io_submit", ("aio",))
    return [name for name, is_there in found.items() if not is_there]
