"""Puts the layout words on Hydra's search path, behind everything the user has."""

from __future__ import annotations

from typing import Any, SupportsIndex

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lightning_par.config.source import LayoutConfigSource

WORDS = "par://words"


def register() -> None:
    """Make ``parallel=<layout word>`` work in this program. Call it before `hydra.main` or `compose`.

    Only the source is discovered by Hydra on its own. The search path is not: it would add a group ``parallel`` to every
    Hydra program of the environment, and break those that have a plain key of that name.
    """
    plugins = Plugins.instance()
    plugins.register(LayoutConfigSource)
    plugins.register(LayoutSearchPath)


class LayoutSearchPath(SearchPathPlugin):
    """Appends the layout words to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.config_search_path = _WordsLast(search_path.get_path())  # type: ignore[attr-defined]
        search_path.append("lightning_par", WORDS)


class _WordsLast(list[Any]):
    """A search path on which the layout words stay last but for Hydra's own schema entry, which must be the very last.

    The first source that has a config wins, so a YAML file of the user's beats the word of the same name; and Hydra adds
    ``--config-dir`` and ``hydra.searchpath`` only after the plugins have run.
    """

    def append(self, entry: Any) -> None:
        super().append(entry)
        self._sort()

    def insert(self, index: SupportsIndex, entry: Any) -> None:
        super().insert(index, entry)
        self._sort()

    def _sort(self) -> None:
        self.sort(key=lambda entry: 2 if entry.provider == "schema" else 1 if entry.path == WORDS else 0)
