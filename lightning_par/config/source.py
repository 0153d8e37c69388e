"""Layout words as Hydra configs: ``parallel=tp2_pp2_zero1`` needs no file of that name.

Hydra asks every source of its search path for ``parallel/<word>`` and takes the first that has it. This one has every word
that `parse_layout` reads. Its scheme is ``par://``; what follows is not used.
"""

from __future__ import annotations

import builtins

from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from lightning_par.config.parallel import ParallelConfig
from lightning_par.errors import LayoutError
from lightning_par.layout import EXAMPLES, looks_like_layout, parse_layout

GROUP = "parallel"


class LayoutConfigSource(ConfigSource):
    """The group ``parallel``, one typed config per layout word. Harmless where no search path names ``par://``."""

    @staticmethod
    def scheme() -> str:
        return "par"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        """Whether the path is ``parallel/<layout word>``.

        Raises:
            MissingConfigException: a word that is nearly one, so that its own error is shown in place of Hydra's list.
        """
        word = _word(config_path)
        if word is None:
            return False
        try:
            parse_layout(word)
        except LayoutError as error:
            if not looks_like_layout(word):
                return False
            raise MissingConfigException(str(error), missing_cfg_file=config_path, options=EXAMPLES) from None
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        word = _word(config_path)
        if word is None:
            raise ConfigLoadError(f"Config not found: {config_path}")
        config = OmegaConf.structured(ParallelConfig.of(parse_layout(word)))
        return ConfigResult(provider=self.provider, path=f"par://{self.path}", config=config, header={"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        """Examples, for ``--help`` and shell completion."""
        path = config_path.strip("/")
        if path == "" and results_filter in (None, ObjectType.GROUP):
            return [GROUP]
        if path == GROUP and results_filter in (None, ObjectType.CONFIG):
            return sorted(EXAMPLES)
        return []


def _word(config_path: str) -> str | None:
    group, _, name = config_path.strip("/").rpartition("/")
    return name.removesuffix(".yaml") if group == GROUP else None
