"""Plans beside the tables that models of transformers carry for their own tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from lightning_par.plan import Plan
from tests.models import VOCABULARY, TransformersModel, make_batch
from tests.planning import layer_of, plan_of

SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
DECODER = dict(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)

AGREE = "Apertus Cohere Gemma2 Gemma3Text GPTNeoX Llama Mistral Olmo2 Phi Phi3 Qwen2 Qwen3".split()
AGREE_TOO = """
Arcee Cohere2 Ernie4_5 Exaone4 Gemma Glm Glm4 Granite Helium NanoChat Nemotron Olmo Olmo3 SeedOss SmolLM3 Starcoder2
""".split()

WHOLE = "this plan not at all: only Linear and Conv1D layers of the blocks, and those of the vocabulary, are split"


class Model(TransformersModel):
    model: Any


def causal(name: str, **settings: Any) -> Model:
    """A small model of an architecture, with a table of its own."""
    config = getattr(transformers, f"{name}Config")(**{**(SIZES if name == "GPTNeoX" else DECODER), **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.tp_plan
    return Model(model)


def planned(module: Model, word: str = "tp2", **section: Any) -> Plan:
    return plan_of(module, word, make_batch(0, 4), section)


def opinions(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "tp_plan splits" in note]


@pytest.mark.parametrize("name", [*AGREE, *(pytest.param(name, marks=pytest.mark.slow) for name in AGREE_TOO)])
def test_the_plan_cuts_as_the_model_says(name: str) -> None:
    plan = planned(causal(name))
    assert opinions(plan) == []
    assert {layer.kind for layer in plan.layers} == {"column", "row", "vocabulary"}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_weights_of_experts_are_left_whole(name: str) -> None:
    """transformers is ahead: it cuts the experts, each a slice of one parameter and no Linear; ours are right, and not smaller."""
    assert opinions(planned(causal(name, **EXPERTS))) == [
        f"model.tp_plan splits model.layers.*.mlp.experts.gate_up_proj by column (packed_colwise), {WHOLE}",
        f"model.tp_plan splits model.layers.*.mlp.experts.down_proj by row (rowwise), {WHOLE}",
    ]


def test_a_fused_output_is_gathered_there_and_kept_in_segments_here() -> None:
    """The same weights are cut, so it is no difference; ours needs no collective in between."""
    module = causal("Phi3")
    assert module.model.tp_plan["model.layers.*.self_attn.qkv_proj"] == "colwise_gather_output"
    assert layer_of(planned(module), "self_attn.qkv_proj").segments == (32, 16, 16)


# what a table might say wrongly, by pattern, and what the plan answers
ALTERED = {
    "model.layers.*.self_attn.o_proj": ("colwise", "by column (colwise), this plan by row: it reads only what column layers give"),
    "model.layers.*.mlp.up_proj": ("rowwise", "by row (rowwise), this plan by column: it reads the hidden state"),
    "model.layers.*.mlp.gate_proj": ("replicate", "not at all (replicate), this plan by column: it reads the hidden state"),
    "model.embed_tokens": ("colwise_rep", "by column (colwise_rep), this plan by vocabulary: embeds the 128 tokens"),
    "model.layers.*.input_layernorm": ("colwise", f"by column (colwise), {WHOLE}"),
}


def test_a_difference_is_a_note_for_each_pattern() -> None:
    module = causal("Llama")
    module.model.tp_plan = {**module.model.tp_plan, **{pattern: style for pattern, (style, _) in ALTERED.items()}}
    expected = {f"model.tp_plan splits {pattern} {answer}" for pattern, (_, answer) in ALTERED.items()}
    assert set(opinions(planned(module))) == expected
    assert opinions(planned(module, "pp2")) == []  # nothing is cut


def test_other_words_and_other_modules_have_no_say() -> None:
    module = causal("Llama")
    module.model.tp_plan = {"model.layers.*.mlp": "all_reduce", "model.norm": "sequence_parallel", "model.nowhere": "colwise"}
    assert opinions(planned(module)) == []
    for table in ("auto", {"model.layers.*.mlp.up_proj": object()}):
        module.model._tp_plan = table
        assert opinions(planned(module)) == []


def test_the_plan_section_is_the_reason_where_it_speaks() -> None:
    plan = planned(causal("Llama"), split={"*.mlp.*": "replicate"})
    assert opinions(plan) == [
        f"model.tp_plan splits model.layers.*.mlp.{layer} by {kind}, this plan not at all: as the plan section says"
        for layer, kind in (("gate_proj", "column (colwise)"), ("up_proj", "column (colwise)"), ("down_proj", "row (rowwise)"))
    ]
