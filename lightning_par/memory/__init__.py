"""What every rank stores: model states counted from the plan, activations from a dry run of each stage."""

from lightning_par.memory.fit import fit_recompute
from lightning_par.memory.forecast import forecast
from lightning_par.memory.optimizer import OptimizerForm, read_optimizer

__all__ = ["OptimizerForm", "fit_recompute", "forecast", "read_optimizer"]
