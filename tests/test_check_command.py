"""`lightning-par check`: what is equal, what is different, what cannot be compared; each in the words that the user sees."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import Precision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_par import cli
from lightning_par.errors import ConfigurationError, DataError, ProcessError
from lightning_par.host import update
from lightning_par.host.launch.command import MAIN
from lightning_par.layout import parse_layout
from lightning_par.parity import shrink
from lightning_par.parity.compare import check_can_compare, compare_runs
from lightning_par.parity.dropout import WithoutDropout
from lightning_par.parity.processes import run_forked
from lightning_par.parity.run import Piece, RankRun, Run, clip_exactly
from lightning_par.parity.sample import small_batches
from tests.checked import Model, Samples


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-par"])
    monkeypatch.setenv(MAIN, "")  # so that it is forgotten again


@pytest.fixture
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for group, target in (("model", "Model"), ("data", "Data")):
        (folder / group).mkdir()
        (folder / group / "mine.yaml").write_text(f"_target_: tests.checked.{target}\n")
    return folder


@pytest.fixture
def check(configs: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str, model: str = "Model", data: str = "data._target_=tests.checked.Data") -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a check of a module of `tests.checked`."""
        targets = ["model=mine", f"model._target_=tests.checked.{model}", "data=mine", *data.split()]
        end: Any = None
        try:
            cli.main(["check", "-cd", str(configs), *targets, *words])
        except SystemExit as exit:
            end = exit.code
        return end or 0, *capfd.readouterr()

    return run


@pytest.mark.parametrize("word", ["tp2_pp2", "pp2_vp2_dp2_zero1", "tp2_sp_dp2_zero3"])
def test_an_equal_layout(word: str, check: Any, tmp_path: Path) -> None:
    """With dropout of every kind, Adam with its usual eps, and biases of keys."""
    code, output, errors = check(f"parallel={word}")
    assert code == 0, output + errors
    lines = output.splitlines()
    assert "key.bias" not in lines[-1]
    assert re.fullmatch(
        rf"Model as {word}_mb\d, beside one process: 3 steps of \d+ samples, float32 on the CPU, full size", lines[0]
    )
    assert "Dropout is left out" in lines[1]
    for row in ("loss of step 3", "gradient norm of step 1", r"gradient blocks\.\d", "weight "):
        assert re.search(rf"^ {row}.* +\d\.\de[-+]\d+ +\d", output, re.MULTILINE), row
    assert re.search(r"^Nothing but rounding is in the gradient of blocks\.\d\.key\.bias", output, re.MULTILINE)
    assert re.fullmatch(rf"equal: {word}_mb\d trains Model as one process does; worst gradient \S+ by \S+", lines[-1])
    assert f"training in {word}_mb" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_sum_differs(check: Any) -> None:
    code, output, _ = check("parallel=pp2", model="Summed")
    assert code == 1
    (last,) = output.splitlines()[-1:]
    assert re.match(r"differs: worst gradient \S+ by 7\.5e-01, 1e-05 allowed; \d+ of \d+ gradients, ", last)
    assert "3 of 3 losses" in last


def test_a_gradient_that_is_not_summed_is_found_by_name(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of norms under sp each rank has the gradient of its part of the sequence alone."""
    monkeypatch.setattr(update, "sum_shared_gradients", lambda parameters, mesh: None)
    code, output, _ = check("parallel=tp2_sp", "--steps", "1")
    assert code == 1
    assert re.match(
        r"differs: worst gradient blocks\.\d\.\S+\.(weight|bias) by [3-9]\.\de-01, 1e-05 allowed; ", output.splitlines()[-1]
    )
    (loss,) = re.findall(r"^ loss of step 1 .* (\S+) +1e-05 *$", output, re.MULTILINE)
    assert float(loss) < 1e-6


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        (["parallel=tp3"], "Model", r"tp3"),
        (["parallel=tp2", "trainer.devices=3"], "Model", r"parallel=tp2 needs a multiple of 2 processes"),
        (["parallel=pp5"], "Model", r"pp5"),
        (["parallel=tp2", "--steps", "0"], "Model", r"--steps 0: the check compares what at least one step does"),
        (["parallel=tp2", "--tolerance", "-1"], "Model", r"--tolerance -1\.0: a relative error, which is positive"),
        (["parallel=dp2", "--steps", "1"], "Noisy", r"Noisy\.training_step draws random numbers: with another seed"),
        (["parallel=dp2", "--steps", "1"], "Undefined", r"Undefined in one process: the loss of step 1 is nan"),
    ],
)
def test_what_cannot_be_checked(words: list[str], model: str, message: str, check: Any) -> None:
    code, output, errors = check(*words, model=model)
    assert code == 2
    assert re.search(message, errors) and "Traceback" not in errors
    assert output == ""


def test_batches_that_do_not_fit_together(check: Any) -> None:
    code, _, errors = check("parallel=dp2_mb2", data="data._target_=tests.checked.Ragged")
    assert code == 2
    assert "dp2_mb2 reads 2 batches of 2 in a step, which one process must get as one batch" in errors


def test_a_rank_that_fails_is_named(check: Any) -> None:
    code, _, errors = check("parallel=tp2", "--steps", "1", model="Failing")
    assert code == 1
    assert "rank 1 (pp 0, dp 0, tp 1) of tp2" in errors and "OSError: the disk of rank 1 is full" in errors


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("WithData", "data._target_=types.NoneType"),
        ("Model", "data._target_=torch.utils.data.DataLoader +data.dataset._target_=tests.checked.Samples +data.batch_size=8"),
    ],
)
def test_data_without_a_data_module(model: str, data: str, check: Any) -> None:
    code, output, errors = check("parallel=dp2", "--steps", "1", model=model, data=data)
    assert code == 0, errors
    assert "1 step of 4 samples" in output


def test_weights_are_read(check: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With none but zeros, each of the 24 tokens is as likely as any."""
    module = Model()
    module.configure_model()
    path = tmp_path_factory.mktemp("weights") / "zeros.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}, path)
    _, output, errors = check("parallel=tp2", "--steps", "1", f"+model.weights={path}")
    assert f"{log(24):.7g}" in re.findall(r"loss of step 1 +(\S+)", output), errors


def test_what_is_left_out_is_said(check: Any) -> None:
    """And all devices of the user's machines are processes here."""
    words = [
        "parallel=tp2",
        "trainer.devices=[0]",
        "+trainer.num_nodes=2",
        "parallel.compile=true",
        "trainer.precision=bf16-mixed",
        "+trainer.accumulate_grad_batches=2",
    ]
    code, output, errors = check(*words, "--steps", "1")
    assert code == 0, errors
    expected = "Left out here: trainer.precision=bf16-mixed, trainer.accumulate_grad_batches=2, parallel.compile=True"
    assert expected in output.splitlines()


def test_a_large_module_is_shrunken(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "LARGE", 1000)
    for words, model, size in (
        ((), "Model", "2 of its 4 blocks, all else in full; --full takes all"),
        (("--full",), "Model", "full size"),
        ((), "Counted", r"full size: with 2 of its 4 blocks it does not work \(index 2 is out of range\)"),
    ):
        code, output, errors = check("parallel=pp2", "--steps", "1", *words, model=model)
        assert code == 0, errors
        assert re.search(rf"on the CPU, {size}$", output.splitlines()[0])
        assert bool(re.search(r"blocks\.[23]", output)) is (size[0] == "f")


def test_an_unknown_option_is_an_error(check: Any) -> None:
    code, _, errors = check("parallel=tp2", "--step", "1", "--nonsense")
    assert code == 2 and "unrecognized arguments: --nonsense" in errors


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["check", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "lightning-par check parallel=tp2_pp2" in output
    assert {"--steps", "--tolerance", "--full", "-cd", "-cn"} <= set(re.findall(r"--?[a-z]+", output))


# ---------------------------------------------------------------------- parts of it


def wait_in_processes(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored

    def wait(name: str) -> None:
        (folder / name).write_text(str(os.getpid()))
        time.sleep(300)

    run_forked([partial(wait, "0"), partial(wait, "1")], ["0", "1"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(number: signal.Signals, tmp_path: Path) -> None:
    starter = multiprocessing.get_context("fork").Process(target=wait_in_processes, args=(tmp_path,))
    starter.start()
    try:
        files = [tmp_path / name for name in "01"]
        _wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        assert starter.pid is not None
        os.kill(starter.pid, number)
        _wait_until(lambda: not any(Path("/proc", file.read_text()).exists() for file in files))
    finally:
        starter.kill()


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(ProcessError, match="the one failed: it was killed by SIGKILL"):
        run_forked([lambda: os.kill(os.getpid(), signal.SIGKILL)], ["the one"])


def test_an_interrupted_check_ends(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_par.parity.check.check_parity", interrupt)
    assert check("parallel=tp2")[0] == 130


DROPPING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F.dropout": lambda x: F.dropout(x, 0.5),
    "F.dropout, by name": lambda x: F.dropout(x, p=0.5, training=True),
    "F.dropout1d": lambda x: F.dropout1d(x, 0.5),
    "F.dropout2d": lambda x: F.dropout2d(x[None], 0.5),
    "F.dropout3d": lambda x: F.dropout3d(x[None, None], 0.5),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "torch.dropout_": lambda x: torch.dropout_(x.clone(), 0.5, True),
    "torch.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.5, True),
    "torch.feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5),
    "attention, by name": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "nn.Dropout": nn.Dropout(0.5),
    "nn.MultiheadAttention": lambda x: _ATTENTION(x, x, x)[0],
}
_ATTENTION = nn.MultiheadAttention(8, 2, dropout=0.5)


@pytest.mark.parametrize("name", DROPPING)
def test_nothing_is_dropped(name: str) -> None:
    x = torch.rand(4, 6, 8) + 0.5
    with torch.no_grad():
        dropped = DROPPING[name](x)
        with WithoutDropout() as mode:
            kept, again = DROPPING[name](x), DROPPING[name](x)
    assert mode.has_dropped
    assert torch.equal(kept, again) and not torch.equal(kept, dropped)


def test_what_drops_nothing_is_no_dropout() -> None:
    with WithoutDropout() as mode:
        F.dropout(torch.ones(4), 0.0)
        F.dropout(torch.ones(4), 0.5, training=False)
        F.scaled_dot_product_attention(*[torch.ones(1, 2, 2)] * 3)
    assert not mode.has_dropped


@pytest.mark.parametrize(
    ("word", "batch_size", "sizes"),
    [
        ("dp2_mb2", 8, [8, 8]),
        ("mb2", 8, [4, 4]),
        ("dp2_mb4", 4, [8, 8]),
        ("mb4", 3, [3, 3]),
        ("mb1", 8, [8, 8]),
        ("dp3_mb1", 2, [6, 6]),
    ],
)
def test_batches_are_as_small_as_the_layout_lets_them(word: str, batch_size: int, sizes: list[int]) -> None:
    layout = parse_layout(word)
    batches = small_batches(DataLoader(Samples(), batch_size), layout.resolve(layout.world_size), 2)
    assert [len(batch["tokens"]) for batch in batches] == sizes
    assert torch.equal(batches[0]["tokens"], torch.stack([Samples()[index]["tokens"] for index in range(sizes[0])]))


def test_data_that_end_begin_anew_and_too_few_are_an_error() -> None:
    samples: Any = [Samples()[index] for index in range(4)]
    layout = parse_layout("dp2_mb1").resolve(2)
    first, second = small_batches(DataLoader(samples, 4), layout, 2)
    assert torch.equal(first["tokens"], second["tokens"])
    with pytest.raises(
        DataError, match=r"the training data has 4 batches of 1, and dp8_mb1 reads 8 of them in a step: give it more"
    ):
        small_batches(DataLoader(samples, 1), parse_layout("dp8_mb1").resolve(8), 1)


def piece(name: str, part: int, start: int, length: int, difference: float) -> Piece:
    return Piece(name, part, start, length, difference, 1.0)


def test_errors_are_put_together_from_the_pieces_of_all_ranks() -> None:
    """Ranges and parts add up, of copies the worst counts, and what nobody has is missing."""
    alone = Run([1.0], [2.0], {"a": torch.full((4,), 5.0), "b": torch.full((4,), 5.0)}, {"a": torch.ones(4)})
    parts = {("a", 0): (4, 100.0), ("b", 0): (2, 50.0), ("b", 1): (2, 50.0)}
    ranks = [
        RankRun([1.0], [2.0], [piece("a", 0, 0, 4, 4.0), piece("b", 0, 0, 2, 0.0)], [piece("a", 0, 0, 4, 0.0)], parts),
        RankRun([1.5], [2.0], [piece("a", 0, 0, 4, 9.0)], [piece("a", 0, 0, 4, 0.0)], parts),
    ]
    found = compare_runs(alone, alone, ranks, 1e-5)
    errors = {each.name: each.error for each in found.gradients}
    assert errors == {"a": pytest.approx(3 / 10), "b": pytest.approx(sqrt(50) / 10)}
    assert [(each.name, each.found, each.is_equal) for each in found.losses] == [("loss of step 1", 1.5, False)]
    assert not found.is_equal and found.norms[0].is_equal and found.weights[0].is_equal


def test_a_weight_that_no_rank_has_and_a_step_that_was_not_taken_are_different() -> None:
    alone = Run([1.0, 1.0], [2.0, 2.0], {"a": torch.ones(4)}, {"a": torch.ones(4)})
    rank = RankRun([1.0], [2.0, 2.0], [piece("a", 0, 0, 4, 0.0)], [], {("a", 0): (4, 4.0)})
    found = compare_runs(alone, alone, [rank], 1e-5)
    assert found.weights[0].error == 1.0
    assert [each.is_equal for each in found.losses] == [True, False]


def test_what_rounding_moves_may_differ_by_ten_times_as_much() -> None:
    alone = Run([1.0], [2.0], {"a": torch.ones(4)}, {"a": torch.ones(4)})
    moved = Run([1.0], [2.0], {"a": torch.ones(4) * 1.125}, {"a": torch.ones(4)})
    (gradient,) = compare_runs(alone, moved, [RankRun([1.0], [2.0], [], [], {})], 1e-5).gradients
    assert gradient.allowed == pytest.approx(1.25)


def test_one_process_clips_by_an_exact_norm() -> None:
    """torch's own norm of so many elements is off by 1e-4 on one thread."""
    parameter, plugin = nn.Parameter(torch.zeros(5_000_000)), Precision()
    parameter.grad = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    clip_exactly(plugin)
    plugin.clip_gradients(torch.optim.SGD([parameter]), 10.0)
    assert float(parameter.grad.double().norm()) == pytest.approx(10, rel=1e-6)


def test_nothing_to_compare() -> None:
    empty = Run([1.0], [0.0])
    with pytest.raises(ConfigurationError, match="Frozen: no parameter has a gradient after one step in one process"):
        check_can_compare(empty, empty, empty, 1e-5, "Frozen")
