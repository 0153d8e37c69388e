"""What DeepSpeed asks about the ranks, answered from our mesh."""

from __future__ import annotations

import torch.distributed as dist

from lightning_par.runtime.mesh import Mesh


class MeshUnit:
    """DeepSpeed's "model parallel unit": the methods that DeepSpeed 0.19.8 calls for ZeRO 1 to 3.

    A method ``initialize_sequence_parallel`` must not exist: its mere presence makes DeepSpeed ignore these groups.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.dp.group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.coordinate

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All tp x pp ranks of one replica: DeepSpeed's overflow flag goes over it."""
        return self.mesh.replica.group

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.replica.size

    def get_model_parallel_rank(self) -> int:
        """The tp coordinate, not the place in the group above: DeepSpeed uses it to find the first tensor-parallel rank."""
        return self.mesh.tp.coordinate

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tp.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.mesh.tp.coordinate

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.pp.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.mesh.pp.size
