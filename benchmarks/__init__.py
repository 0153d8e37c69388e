"""Measurements of lightning_par beside other systems. Each module is a command: ``python -m benchmarks.communication --help``."""
