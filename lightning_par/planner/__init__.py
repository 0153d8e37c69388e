"""What fits, how fast, and why not the others: layouts of a module on a cluster, estimated before a device is there."""

from lightning_par.planner.anatomy import Anatomy
from lightning_par.planner.cluster import Cluster, Device, read_cluster
from lightning_par.planner.link import Link
from lightning_par.planner.search import Limits, Outlook, search

__all__ = ["Anatomy", "Cluster", "Device", "Limits", "Link", "Outlook", "read_cluster", "search"]
