"""DeepSpeed's operators in C++, which are compiled where they are used: what is told when one cannot be."""

from __future__ import annotations

import textwrap
import traceback
from typing import Any

from lightning_par.errors import ConfigurationError


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
                raise ConfigurationError(
                    f"DeepSpeed's operator {builder.NAME} cannot be built on this machine ({reason}): install a C++ compiler (g++) "
                    "and ninja (pip install ninja), or use an optimizer of torch, such as torch.optim.AdamW"
                ) from error
