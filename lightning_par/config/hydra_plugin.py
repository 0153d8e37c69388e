"""Where Hydra 1.3 looks for plugins. A wheel installs this file as ``hydra_plugins/lightning_par_plugin/__init__.py``."""

from lightning_par.config.source import LayoutConfigSource

__all__ = ["LayoutConfigSource"]
