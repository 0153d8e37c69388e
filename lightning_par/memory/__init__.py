"""What every rank stores: model states counted from the plan, activations from a dry run of each stage."""

from lightning_par.memory.forecast import Forecast, RankMemory, forecast
from lightning_par.memory.optimizer import OptimizerForm, read_optimizer

__all__ = ["Forecast", "OptimizerForm", "RankMemory", "forecast", "read_optimizer"]
