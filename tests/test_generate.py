"""Tokens generated inside ``predict_step`` under tensor parallelism are those of one process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import generation  # noqa: F401

from lightning_par.errors import ModelError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import parse_layout
from lightning_par.plan import Plan
from lightning_par.prepare import prepare_plan
from tests.models import VOCABULARY, adamw, gpt2
from tests.planning import Block
from tests.ranks import run_ranks
from tests.zoo import ZOO

GREEDY = dict(max_new_tokens=5, do_sample=False)
BEAMS = dict(**GREEDY, num_beams=3, early_stopping=True, no_repeat_ngram_size=2)
SCORED = dict(**GREEDY, repetition_penalty=1.2, min_new_tokens=2, return_dict_in_generate=True, output_logits=True)
STOPPING = dict(max_new_tokens=12, do_sample=False, eos_token_id=list(range(0, VOCABULARY, 5)))
SAMPLING = dict(max_new_tokens=5, do_sample=True, top_k=50, top_p=0.95, temperature=0.8)


class Generator(pl.LightningModule):
    """A language model of transformers that answers prompts of different lengths."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        return loss

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        output = self.model.generate(**batch, pad_token_id=0, **self.options)
        return output if isinstance(output, torch.Tensor) else {"ids": output.sequences, "logits": list(output.logits)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Written(pl.LightningModule):
    """Blocks called by the step itself, in a loop of its own, without a cache; a layer that only runs afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.judge = nn.Linear(VOCABULARY, 4)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        ids = batch["input_ids"]
        while ids.shape[1] < 12:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            ids = torch.cat([ids, self.head(x)[:, -1].argmax(-1, keepdim=True)], 1)
        judged: torch.Tensor = self.judge(nn.functional.one_hot(ids, VOCABULARY).float().sum(1))
        return judged


def generator(name: str, options: dict[str, Any], layers: int = 2) -> Callable[[], pl.LightningModule]:
    def make() -> pl.LightningModule:
        model = (gpt2 if name == "GPT-2" else ZOO[name])().model
        if layers == 1:
            del model.model.layers[1:]
            model.config.num_hidden_layers = 1
        return Generator(model, options)

    return make


CASES: dict[str, Callable[[], pl.LightningModule]] = {
    **{name: generator(name, GREEDY) for name in ("GPT-2", "Llama", "GPTNeoX", "Bloom", "Mistral", "T5")},
    "no cache": generator("Llama", {**GREEDY, "use_cache": False}),
    "beams": generator("Llama", BEAMS),
    "beams, fused": generator("GPTNeoX", BEAMS),
    "scores": generator("GPT-2", SCORED),
    "stopping": generator("Llama", STOPPING),
    "one block": generator("Llama", STOPPING, layers=1),  # no chain, and a loop that ends on a value
    "written": Written,
}
FEW = {name: CASES[name] for name in ("GPT-2", "Llama", "Bloom", "beams")}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def prompts() -> dict[str, torch.Tensor]:
    """Four prompts, padded on the left."""
    ids = torch.randint(1, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in ((1, 3), (2, 1)):
        ids[row, :length], mask[row, :length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(
    make: Callable[[], pl.LightningModule], word: str | None, fits: bool, **strategy_options: Any
) -> tuple[Any, Plan | None]:
    """What ``predict`` gives for a freshly made module, in a layout or in one process, perhaps after a step of training."""
    torch.manual_seed(0)
    module, plan, answers = make(), None, None
    for verb in ("fit", "predict") if fits else ("predict",):
        options: dict[str, Any] = {"devices": 1}
        if word is not None:
            options = dict(
                strategy=HybridParallelStrategy(word, print_plan=False, **strategy_options), devices=parse_layout(word).world_size
            )
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(accelerator="cpu", max_steps=1, use_distributed_sampler=False, **quiet, **options)
            answers = getattr(trainer, verb)(module, DataLoader([prompts()], batch_size=None))
        plan = getattr(trainer.strategy, "plan", None)
    assert answers is not None
    return answers[0], plan


def answer_all(
    rank: int,
    world_size: int,
    cases: dict[str, Callable[[], pl.LightningModule]],
    word: str,
    fits: bool,
    strategy_options: dict[str, Any],
) -> dict[str, Any]:
    return {name: answer(make, word, fits, **strategy_options) for name, make in cases.items()}


def check_answers(
    cases: dict[str, Callable[[], pl.LightningModule]], word: str, fits: bool = False, **strategy_options: Any
) -> dict[str, Plan]:
    """Hold the answers of every rank against those of one process; the plans."""
    ranks = run_ranks(answer_all, parse_layout(word).world_size, cases, word, fits, strategy_options, timeout=150)
    for name, make in cases.items():
        alone, _ = answer(make, None, fits)
        for rank, results in enumerate(ranks):
            torch.testing.assert_close(results[name][0], alone, msg=lambda text, at=(name, word, rank): f"{at}: {text}")
    return {name: ranks[0][name][1] for name in cases}


def activations(plan: Plan) -> set[str]:
    return {layer.activation for layer in plan.layers if layer.name.endswith("q_proj")}


def test_the_same_tokens() -> None:
    plans = check_answers(CASES, "tp2")
    for name in ("GPT-2", "Llama", "GPTNeoX", "Mistral", "beams", "beams, fused"):
        assert not any(layer.kind == "replicate" for layer in plans[name].layers if ".h." in layer.name or ".layers." in layer.name)
    assert activations(plans["Llama"]) == activations(plans["beams"]) == {"global"}  # generate reads values before it calls a block
    assert plans["written"].layer("judge") is None and plans["written"].layer("embedding").kind == "vocabulary"  # type: ignore[union-attr]


def test_the_same_tokens_on_parts_of_the_sequence() -> None:
    check_answers(FEW, "tp2_sp")


def test_the_same_tokens_on_four_ranks() -> None:
    check_answers({name: CASES[name] for name in ("Llama", "GPTNeoX")}, "tp4")


def test_the_same_tokens_after_training() -> None:
    plans = check_answers(FEW, "tp2", fits=True)
    assert activations(plans["Llama"]) == activations(plans["beams"]) == {"local"}


def test_the_same_tokens_from_compiled_blocks() -> None:
    check_answers({"Llama": CASES["Llama"]}, "tp2", fits=True, compile="aot_eager")


def sample(rank: int, world_size: int) -> list[list[int]]:
    ids, _ = answer(generator("Llama", SAMPLING), "tp2_dp2", False)
    return ids.tolist()


def test_a_replica_draws_one_answer() -> None:
    """Ranks are numbered with tp fastest: 0 and 1 are a replica. Both replicas have the same prompts."""
    drawn = run_ranks(sample, 4)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]


# ---------------------------------------------------------------------- pipelines


PIPELINED = {name: CASES[name] for name in CASES if name not in ("T5", "one block")}  # T5 generates by its decoder alone


def test_the_same_tokens_from_a_pipeline() -> None:
    check_answers(PIPELINED, "pp2")


def test_the_same_tokens_from_a_pipeline_with_tensor_parallelism() -> None:
    check_answers(FEW, "tp2_pp2")


def test_the_same_tokens_from_a_trained_pipeline() -> None:
    check_answers(FEW, "pp2", fits=True)


class Validated(Generator):
    """Generates where a pipeline does not."""

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)


def test_generating_in_validation_is_refused_in_a_pipeline() -> None:
    message = (
        r"parallel=tp2_pp2: validation_step of Validated calls the blocks of model.model.layers again and again "
        r"\(model.generate does, for each token\), which a pipeline does in predict_step alone: generate there with "
        r"trainer.predict, or use parallel=tp2_dp2 or parallel=tp4$"
    )
    module = Validated(ZOO["Llama"]().model, GREEDY)
    with pytest.raises(ModelError, match=message):
        prepare_plan(module, prompts(), parse_layout("tp2_pp2").resolve(4), step="validation_step")
