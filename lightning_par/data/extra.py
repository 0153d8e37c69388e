"""Libraries that only some data need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_par.errors import DataError


def need(name: str, what: str) -> Any:
    """The module ``name``.

    Args:
        name: of a module of the extra ``data``.
        what: needs it, as the user typed it.

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise DataError(f"{what} needs {error.name}, which is not installed: pip install 'lightning-par[data]'") from None
