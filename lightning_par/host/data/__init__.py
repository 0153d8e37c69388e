"""The loaders of a run that can be stopped and resumed anywhere: they go on with the batch that was to come."""

from lightning_par.host.data.resumption import DataResumption

__all__ = ["DataResumption"]
