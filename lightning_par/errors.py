"""What can go wrong, as a tree.

    LightningParError
    ├── ConfigurationError (ValueError)    what the user typed cannot work: raised before the first step, exit code 2
    │   ├── LayoutError                    a layout word, or degrees that do not fit the devices
    │   ├── ModelError                     the module cannot be split this way
    │   ├── PlanError                      a line of the ``plan:`` section
    │   └── DataError                      the batches do not fit the layout
    ├── ReplicaError (RuntimeError)        ranks that must agree do not
    ├── CheckpointError (RuntimeError)     a checkpoint cannot be written or read
    ├── NumericsError (RuntimeError)       a loss or a gradient is infinite or undefined
    └── ProcessError (RuntimeError)        a process of `lightning-par check` has failed

Every message says what is wrong in the user's own words and values, the rule, and one thing to do.
"""


class LightningParError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(LightningParError, ValueError):
    """What the user asked for cannot work; nothing has been started."""


class LayoutError(ConfigurationError):
    """A layout word that cannot be read, or degrees that do not fit the devices."""


class ModelError(ConfigurationError):
    """The module cannot be split in the way the layout asks for."""


class PlanError(ConfigurationError):
    """A line of the ``plan:`` section that cannot be applied."""


class DataError(ConfigurationError):
    """Batches that do not fit the layout."""


class ReplicaError(LightningParError, RuntimeError):
    """Ranks that must hold the same values hold different ones."""


class CheckpointError(LightningParError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class NumericsError(LightningParError, RuntimeError):
    """A loss or a gradient that is infinite or undefined; the step was not taken."""


class ProcessError(LightningParError, RuntimeError):
    """A process that was started to find something out has failed; the message has its traceback."""
