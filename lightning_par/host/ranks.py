"""The ranks as Lightning sees them: its questions about devices, replicas and the data they read, and its collectives."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from lightning_par.host.data import DataResumption
from lightning_par.host.hosts import describe_hosts, tp_between_hosts
from lightning_par.host.launch.command import output_folder, take_output_folder
from lightning_par.host.launch.ending import say
from lightning_par.host.launch.rank_log import RankLog
from lightning_par.host.launch.started import check_is_rank, count_machines
from lightning_par.host.meeting import Meeting, join, meet
from lightning_par.host.namespace import environments, worker_seeding
from lightning_par.layout import AUTO, Layout
from lightning_par.private import lightning
from lightning_par.runtime.mesh import Mesh, wait_for_all

if TYPE_CHECKING:
    from pytorch_lightning.strategies import ParallelStrategy as Host
else:
    Host = object  # the class of the caller's Lightning, by `bind`


class RankedStrategy(Host):
    """The part of `HybridParallelStrategy` that places ranks.

    Args:
        layout: sizes of the axes; dp may be left open until the Trainer says how many devices there are.
        typed: the layout as the user typed it.
        timeout: how long a collective may wait for a rank.
    """

    root = ""  # the Lightning namespace, set by `bind`

    def __init__(self, layout: Layout, typed: str, timeout: timedelta) -> None:
        super().__init__()
        self.layout, self._typed, self._timeout = layout, typed, timeout
        self._num_nodes = 1
        self._mesh: Mesh | None = None
        self._meeting: Meeting | None = None
        self._data: DataResumption | None = None  # there while fitting

    # ------------------------------------------------------------------ devices and replicas

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        self._num_nodes = count

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices or ())

    @property
    def global_rank(self) -> int:
        """This rank's number; as started until the ranks have met, see `lightning_par.host.hosts`."""
        if dist.is_initialized():
            return dist.get_rank()
        return self._meeting.rank if self._meeting is not None else super().global_rank

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def mesh(self) -> Mesh:
        """This rank's axes; there once the Trainer has started."""
        if self._mesh is None:
            raise RuntimeError("the mesh exists once trainer.fit, validate, test or predict has started")
        return self._mesh

    @property
    def dp_rank(self) -> int:
        """Which replica this rank belongs to; what a dataset or sampler is sharded by."""
        return self.layout.coordinate_of(self.global_rank).dp

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return self.layout.dp or 1

    def set_world_ranks(self) -> None:
        """Tell Lightning's environment the world; fill in dp. Called by the Trainer before the launcher is made.

        Raises:
            ConfigurationError: other ranks were started than the Trainer says.
            LayoutError: the layout does not fit them.
        """
        assert self.cluster_environment is not None
        if isinstance(self.cluster_environment, environments(self.root).LightningEnvironment):
            check_is_rank()
        else:
            self._num_nodes = count_machines(self.num_processes, self._num_nodes)
        world_size = self._num_nodes * self.num_processes
        self.layout = self.layout.resolve(world_size, self._typed)
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(world_size)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        log = RankLog.current()
        if log is not None and world_size > 1:
            log.words = f"rank {self.global_rank}" if self.layout.auto else self.describe_rank(self.global_rank)
        if self.layout.zero and self.dp_size == 1:
            rank_zero_warn(f"parallel={self._typed}: zero{self.layout.zero} has nothing to shard with dp 1 and is ignored")

    def describe_rank(self, rank: int) -> str:
        """A rank's name for messages and logs."""
        return f"rank {rank} ({self.layout.coordinate_of(rank)})"

    def meet(self, trainer: Any) -> None:
        """Find the other ranks, where they have not met, and take over the first one's folders. Every rank calls it."""
        folders = output_folder(), trainer.default_root_dir
        if not dist.is_initialized():
            environment = self.cluster_environment
            assert environment is not None
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
            self._meeting = meet(environment.global_rank(), self.world_size, self._timeout, folders)
            rank_zero_only.rank = self._meeting.rank  # type: ignore[attr-defined]
            folders = self._meeting.told
        elif folders[0] is not None:  # each job of Hydra's has other ones
            folders = self.broadcast(folders)
        take_output_folder(folders[0])
        lightning.set_default_root_dir(trainer, folders[1])

    def setup_environment(self) -> None:
        """Join the other ranks, and build the axes; collective over the world."""
        super().setup_environment()
        is_new = not dist.is_initialized()
        if is_new:
            assert self._meeting is not None, "the launcher has the ranks meet"
            join(self._meeting, "nccl" if self.root_device.type == "cuda" else "gloo", self._timeout)
        if self._mesh is None:
            if self._typed == AUTO:
                self.agree_on_layout()
            self._mesh = Mesh(self.layout, self._timeout)
            self._open_log()
        if is_new and self.is_global_zero:
            self._report_hosts()

    def _open_log(self) -> None:
        """From here on this rank's log has its file, where there is a folder for it."""
        log, folder = RankLog.current(), output_folder()
        if log is None or folder is None:
            return
        if self.world_size == 1:
            log.leave()
            return
        path = log.open(Path(folder), self.layout, self.global_rank)
        if self.is_global_zero:
            say(f"the log of each rank is in {path.parent}")

    def _report_hosts(self) -> None:
        assert self._meeting is not None
        hosts = self._meeting.hosts
        if len(set(hosts)) == 1:
            return
        say(describe_hosts(self.layout, hosts, self._meeting.is_renumbered))
        warning = tp_between_hosts(self.layout, hosts)
        if warning is not None:
            rank_zero_warn(warning)

    def agree_on_layout(self) -> None:
        """Settle a layout that only rank 0 knows. Collective over the world; where all know it there is nothing to do."""

    # ------------------------------------------------------------------ what each rank reads

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning puts its sampler in the place of the user's: with one replica the data keep their order."""
        return self.dp_size > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All ranks of a replica read the same samples."""
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    def process_dataloader(self, dataloader: Any) -> Any:
        """Seed a loader's workers by replica, not by rank: the ranks of a replica augment alike. In ``fit`` it can be resumed."""
        if os.environ.get("PL_SEED_WORKERS") == "1" and getattr(dataloader, "worker_init_fn", self) is None:
            dataloader.worker_init_fn = partial(worker_seeding(self.root), rank=self.dp_rank)
        if self._data is None:
            return dataloader
        is_training = self.lightning_module.trainer.training
        return self._data.wrap(dataloader) if is_training else self._data.wrap_evaluation(dataloader)

    def on_train_start(self) -> None:
        if self._data is not None:
            self._data.begin()

    # ------------------------------------------------------------------ collectives

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            wait_for_all()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over all ranks. A mean over all ranks is the mean over replicas, as tp and pp ranks hold equal values."""
        if not isinstance(tensor, torch.Tensor) or not dist.is_initialized():
            return tensor
        total = tensor.clone().to(self.root_device)
        is_mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        operation = dist.ReduceOp.SUM if isinstance(reduce_op, str) or reduce_op is None else reduce_op
        total = total.double() if is_mean and not total.is_floating_point() else total
        dist.all_reduce(total, op=operation, group=group)
        return total / dist.get_world_size(group) if is_mean else total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        count = int(self.reduce(torch.tensor(int(decision)), reduce_op="sum"))
        return count == self.world_size if all else count > 0
