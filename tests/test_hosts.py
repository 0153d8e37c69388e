"""Which host each rank is on: who says so, the numbers that follow, and what is said of it."""

import os
import socket
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_par.errors import ConfigurationError
from lightning_par.host import hosts as hosts_module
from lightning_par.host import meeting
from lightning_par.host.hosts import describe_hosts, order_by_host, this_host, tp_between_hosts
from lightning_par.host.launch.started import (
    check_is_rank,
    count_machines,
    is_first_rank,
    started_on_this_machine,
    started_rank,
    started_words,
)
from lightning_par.layout import Layout
from tests.ranks import run_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"}


def started_with(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in (*NAMES, *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_")))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


# ------------------------------------------------------------------ who has started the ranks


@pytest.mark.parametrize(
    ("environment", "rank", "is_first", "words", "here"),
    [
        ({}, 0, True, "", None),
        (TORCHRUN, 5, False, "rank 5", 4),
        ({**TORCHRUN, "RANK": "0"}, 0, True, "rank 0", 4),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 0, True, "", 1),
        (SRUN, 5, False, "rank 5", 4),
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, 0, True, "", None),
        ({**SRUN, **TORCHRUN, "RANK": "0"}, 0, True, "rank 0", 4),  # srun has started torchruns, each of which is a run
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "2"}, 0, False, "local rank 2", None),  # started by us in a batch script
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, False, "rank 1", None),
        ({"LOCAL_RANK": "0"}, 0, True, "", None),
        ({"NODE_RANK": "1"}, 1, False, "local rank 0", None),
    ],
)
def test_what_a_process_knows_of_its_place(
    environment: dict[str, str], rank: int, is_first: bool, words: str, here: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_with(monkeypatch, **environment)
    assert (started_rank(), is_first_rank(), started_words(), started_on_this_machine()) == (rank, is_first, words, here)


def test_machines_are_counted_where_nobody_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with(monkeypatch, **TORCHRUN)
    assert count_machines(4, 1) == count_machines(4, 2) == 2
    started_with(monkeypatch, **SRUN)
    assert count_machines(4, 1) == 2
    started_with(monkeypatch)
    assert count_machines(4, 3) == 3, "they are ours to start"


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "message"),
    [
        (
            TORCHRUN, 2, 1,
            "devices=2, and torchrun has started 4 ranks on this machine: use devices=4, or torchrun --nproc-per-node=2",
        ),
        (SRUN, 8, 1, "devices=8, and srun has started 4 ranks on this machine: use devices=4, or srun --ntasks-per-node=8"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, 3, 1,
            "torchrun has started 8 ranks, 3 of them on this machine: every machine must have as many: give each the same "
            "--nproc-per-node",
        ),
        (
            TORCHRUN, 4, 3,
            "num_nodes=3 with devices=4 is 12 ranks, and torchrun has started 8: leave num_nodes out, or use torchrun --nnodes=3",
        ),
    ],
)  # fmt: skip
def test_other_ranks_than_the_trainer_says(
    environment: dict[str, str], devices: int, num_nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_with(monkeypatch, **environment)
    with pytest.raises(ConfigurationError) as error:
        count_machines(devices, num_nodes)
    assert str(error.value) == message


def test_in_a_batch_script_nobody_waits_for_tasks_that_srun_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with(monkeypatch, **{**SRUN, "SLURM_PROCID": "0"})
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ConfigurationError, match=r"SLURM_NTASKS=8, and this process is none of these tasks.* put srun before the"):
        count_machines(4, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    assert count_machines(1, 1) == 1


def test_in_a_pod_without_torchrun_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with(monkeypatch, RANK="1", WORLD_SIZE="2")
    with pytest.raises(ConfigurationError, match=r"RANK=1 of WORLD_SIZE=2 is set, as in a pod of a PyTorchJob.* use torchrun"):
        check_is_rank()
    started_with(monkeypatch, RANK="0", WORLD_SIZE="1")
    check_is_rank()
    started_with(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    check_is_rank()


def test_devices_left_out_are_what_srun_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_par.config.devices import choose_devices

    started_with(monkeypatch, **SRUN)
    assert choose_devices({"accelerator": "cpu"}, Layout(tp=2)) == {"accelerator": "cpu", "devices": 4}


# ------------------------------------------------------------------ the order of ranks


def test_ranks_of_a_host_follow_each_other() -> None:
    assert order_by_host(list("aabb")) == [0, 1, 2, 3]
    assert order_by_host(list("abab")) == [0, 2, 1, 3]
    assert order_by_host(list("babcb")) == [0, 2, 4, 1, 3], "the first stays the first"


def test_a_host_is_its_name_and_boot_or_what_nccl_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(hosts_module, "_BOOT", tmp_path / "boot_id")
    assert this_host() == "node7"
    (tmp_path / "boot_id").write_text("f00d\n")
    assert this_host() == "node7 f00d"
    monkeypatch.setenv("NCCL_HOSTID", "rack1")
    assert this_host() == "rack1"


@pytest.mark.parametrize(
    ("layout", "hosts", "words", "warning"),
    [
        (Layout(tp=2, pp=2, dp=1), "aabb", "2 hosts x 2 ranks: tp inside a host, pp between hosts", None),
        (Layout(tp=2, pp=2, dp=2), "aaaabbbb", "2 hosts x 4 ranks: tp inside a host, dp inside a host, pp between hosts", None),
        (Layout(dp=4), "aabb", "2 hosts x 2 ranks: dp between hosts", None),
        (
            Layout(tp=4, dp=1), "aabb", "2 hosts x 2 ranks: tp between hosts",
            "tp4 with 2 ranks on host a: 1 of 1 tp groups are on several hosts, and all their split layers wait for the network, "
            "forward and backward: use tp2, or hosts with a multiple of 4 ranks",
        ),
        (
            Layout(tp=2, dp=3), "aaabbb", "2 hosts x 3 ranks: tp between hosts, dp between hosts",
            "tp2 with 3 ranks on host a: 1 of 3 tp groups are on several hosts, and all their split layers wait for the network, "
            "forward and backward: use hosts with a multiple of 2 ranks",
        ),
        (Layout(tp=2, dp=3), "aaaabb", "2 hosts with 4, 2 ranks: tp inside a host, dp between hosts", None),
    ],
)  # fmt: skip
def test_what_is_said_of_hosts(layout: Layout, hosts: str, words: str, warning: str | None) -> None:
    assert describe_hosts(layout, list(hosts)) == words
    assert tp_between_hosts(layout, list(hosts)) == warning


def test_it_is_said_that_ranks_have_other_numbers() -> None:
    said = describe_hosts(Layout(tp=2, dp=2), list("aabb"), is_renumbered=True)
    assert said.endswith("; ranks are numbered host by host, not as they were started")


def test_every_rank_learns_its_number_and_what_the_first_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    store, found = HashStore(), {}
    store.set_timeout(timedelta(seconds=10))
    here = threading.local()
    monkeypatch.setattr(meeting, "this_host", lambda: here.host)

    def rank_main(rank: int) -> None:
        here.host = "ab"[rank % 2]
        found[rank] = meeting.exchange(store, rank, 4, [f"of {rank}", None])

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank].rank for rank in range(4)] == [0, 2, 1, 3]
    assert {(found[rank].hosts, found[rank].is_renumbered) for rank in range(4)} == {(("a", "a", "b", "b"), True)}
    assert [found[rank].told for rank in range(4)] == [["of 0", None]] * 4


def trained_as_srun_numbers_them(rank: int, world_size: int, port: int, folder: str) -> Any:
    """Two nodes with two tasks each, numbered round the nodes; two steps."""
    import pytorch_lightning as pl
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_par import HybridParallelStrategy

    dist.destroy_process_group()
    for name in NAMES:
        os.environ.pop(name, None)
    node, local = rank % 2, rank // 2
    os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2", SLURM_NODEID=str(node))
    os.environ.update(SLURM_LOCALID=str(local), SLURM_NNODES="2", SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_STEP_ID="0")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), NCCL_HOSTID=f"node{node}", GLOO_SOCKET_IFNAME="lo")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(2)))

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.blocks(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(8, 6)
    alone = Model()
    alone.load_state_dict(model.state_dict())
    optimizer, expected = alone.configure_optimizers(), []
    for part in x.chunk(2):
        loss = alone.training_step([part, part.flip(0)], 0)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer = pl.Trainer(
        strategy=HybridParallelStrategy("tp2_pp2", print_plan=False), accelerator="cpu", devices=2, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Losses()],
        default_root_dir=f"{folder}/{rank}",
    )  # fmt: skip
    folders, select = [], trainer._checkpoint_connector._select_ckpt_path

    def looked_for_a_checkpoint(*args: Any, **kwargs: Any) -> Any:
        folders.append(trainer.default_root_dir)
        return select(*args, **kwargs)

    trainer._checkpoint_connector._select_ckpt_path = looked_for_a_checkpoint
    data = torch.cat([torch.stack([part, part.flip(0)], 1) for part in x.chunk(2)])
    trainer.fit(model, DataLoader(TensorDataset(data[:, 0], data[:, 1]), batch_size=4))
    mesh = trainer.strategy.mesh
    return SimpleNamespace(
        node=node, rank=trainer.global_rank, tp=list(mesh.tp.ranks), at=str(mesh.coordinate), num_nodes=trainer.num_nodes,
        folders=folders, losses=losses, expected=expected,
    )  # fmt: skip


def test_ranks_that_srun_numbers_round_the_nodes_have_their_tp_peers_on_their_node(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = run_ranks(trained_as_srun_numbers_them, 4, port, str(tmp_path), timeout=100)
    assert [one.rank for one in found] == [0, 2, 1, 3]
    assert [one.node for one in sorted(found, key=lambda one: one.rank)] == [0, 0, 1, 1]
    assert [one.tp for one in found] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert found[1].at == "pp 1, dp 0, tp 0"
    assert {one.num_nodes for one in found} == {2}, "nobody has said it"
    assert [one.folders for one in found] == [[str(tmp_path / "0")]] * 4, "where a requeued job goes on from"
    for one in found:
        assert one.losses == pytest.approx(one.expected, rel=1e-6)
    assert (
        "lightning_par: 2 hosts x 2 ranks: tp inside a host, pp between hosts; ranks are numbered host by host, not as they were "
        "started\n"
    ) in capfd.readouterr().err


# ------------------------------------------------------------------ where gloo listens


def network(monkeypatch: pytest.MonkeyPatch, names: dict[str, str], towards: dict[str, str]) -> None:
    """A host ``here`` with eth0, and what it takes names for."""
    monkeypatch.delenv(meeting.INTERFACE, raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(meeting, "_address_of", names.get)
    monkeypatch.setattr(meeting, "_own_address_towards", towards.get)
    interfaces = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}
    addresses = {name: [SimpleNamespace(address=address)] for name, address in interfaces.items()}
    monkeypatch.setattr(meeting.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_a_host_that_others_can_reach_by_its_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network(monkeypatch, {"here": "10.0.0.5"}, {})
    meeting.choose_interface(["there"])
    assert meeting.INTERFACE not in os.environ


@pytest.mark.parametrize("own", [{"here": "127.0.1.1"}, {"here": "::1"}, {}])
def test_otherwise_it_is_the_interface_towards_another_host(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    network(monkeypatch, own, {"here": "127.0.0.1", "there": "10.0.0.5"})
    meeting.choose_interface(["unknown", "here", "there"])
    assert os.environ[meeting.INTERFACE] == "eth0"


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network(monkeypatch, {}, {"there": "10.0.0.5"})
    os.environ[meeting.INTERFACE] = "ib0"
    meeting.choose_interface(["there"])
    assert os.environ[meeting.INTERFACE] == "ib0"


@pytest.mark.parametrize(("names", "words"), [({"here": "127.0.1.1"}, "127.0.1.1"), ({}, "no address")])
def test_a_host_that_others_cannot_reach_says_what_to_set(
    names: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network(monkeypatch, names, {"here": "127.0.0.1"})
    with pytest.raises(ConfigurationError) as error:
        meeting.choose_interface(["here", "unknown"])
    assert str(error.value) == (
        f"host here takes its own name for {words}, which no other host can reach: set GLOO_SOCKET_IFNAME to its network "
        "interface, such as eth0; `ip -brief address` lists them"
    )


def test_addresses_are_those_of_the_system() -> None:
    assert meeting._address_of("localhost") in ("127.0.0.1", "::1")
    assert meeting._own_address_towards("127.0.0.1") == "127.0.0.1"
    assert meeting._address_of("no host of this name") is meeting._own_address_towards("no host of this name") is None
