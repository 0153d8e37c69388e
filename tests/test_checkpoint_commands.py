"""`lightning-par checkpoint`: what it shows, verifies, exports, imports and prunes; exit codes and messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_par import cli
from lightning_par.checkpoint import Checkpoint
from lightning_par.checkpoint.intake import _only_assignment
from lightning_par.checkpoint.plain import take_apart
from lightning_par.checkpoint.save import Content, write_checkpoint
from lightning_par.checkpoint.share import Share, add_whole
from lightning_par.checkpoint.transformers_folder import find_configs
from lightning_par.checkpoint.whole import read_weight, read_whole_checkpoint
from lightning_par.host.strategy import HybridParallelStrategy
from tests.models import make_batch
from tests.parity import TOLERANCE, fit
from tests.ranks import run_ranks
from tests.written import EPOCH, Written, loader, train_plain, write_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "last.ckpt"
    write_run("tp2_pp2_zero1_mb2", path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that plain Lightning wrote."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    train_plain(1)[0].save_checkpoint(path)
    return path


def run(*words: Any) -> int:
    """The exit code of a command."""
    try:
        cli.main(["checkpoint", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def small(path: Path, **trainer: Any) -> Path:
    """A checkpoint of one weight."""
    share = Share()
    add_whole(share, "weight", "weight", torch.arange(6.0).view(2, 3))
    write_checkpoint(path, Content("single", share, take_apart({"trainer": trainer, "run": {}})), None)
    return path


def test_help_has_examples_and_waits_for_nothing() -> None:
    code = (
        "import sys\nfrom lightning_par import cli\n"
        "for words in ([], ['show'], ['verify'], ['export'], ['import'], ['prune']):\n"
        "    try: cli.main(['checkpoint', *words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'rich', 'transformers'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert shown.count("examples:\n  lightning-par checkpoint") == 5


def test_show_prints_a_table(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", saved) == 0
    shown = capsys.readouterr().out
    assert f"{saved}: written by parallel=tp2_pp2_zero1_mb2\nepoch 1, step 3, precision 32-true\n" in shown
    (row,) = [line.split() for line in shown.splitlines() if "model.transformer.h.0.attn.c_attn.weight" in line]
    # 32 x 96 of float32, three times; queries, keys and values are pieces of their own on each of two tp ranks
    assert row[1:] == "[32, 96] float32 weight, exp_avg, exp_avg_sq 36.9 kB 18".split()
    assert "= model.lm_head.weight" in shown and "29 tensors: exp_avg 122.4 kB" in shown


def test_show_prints_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", saved, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["epoch"], found["step"]) == ("tp2_pp2_zero1_mb2", 1, EPOCH)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    tied = tensors["model.transformer.wte.weight"]
    assert (tied["aliases"], tied["shape"], tied["kind"]) == (["model.lm_head.weight"], [128, 32], "parameter")
    assert tied["values"]["exp_avg"] == {"dtype": "float32", "bytes": 128 * 32 * 4, "pieces": 2}
    assert found["bytes_by_kind"]["exp_avg"] == sum(
        t["values"]["exp_avg"]["bytes"] for t in found["tensors"] if t["name"] != "seen"
    )
    assert tensors["seen"]["kind"] == "buffer" and "scratch" not in tensors and found["pickled"] == []


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", tmp_path / "none") == 1
    assert "none is not a checkpoint of this strategy (there is nothing): give the folder" in capsys.readouterr().err


def test_verify_reads_every_byte(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", saved) == 0
    assert f"{saved}: whole" in capsys.readouterr().out
    path = small(tmp_path / "last.ckpt")
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert run("verify", saved, path) == 1
    shown = capsys.readouterr()
    assert f"{shard} is damaged: weight: " in shown.err and "it holds weight: use another" in shown.err
    assert f"{saved}: whole\n{path}: damaged" in shown.out


# ---------------------------------------------------------------------- export


def test_export_writes_one_safetensors_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", saved, tmp_path / "out", "--format", "safetensors") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    found, checkpoint = load_file(tmp_path / "out" / "model.safetensors"), Checkpoint(saved)
    assert found.keys() == checkpoint.index.entries.keys()
    assert all(torch.equal(value, read_weight(checkpoint, name)) for name, value in found.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "model.lm_head.weight": "model.transformer.wte.weight"}
    assert run("export", saved, tmp_path / "out", "--format", "safetensors") == 2
    assert "out exists: name another place" in capsys.readouterr().err


def test_export_shards_large_ones(saved: Path, tmp_path: Path) -> None:
    assert run("export", saved, tmp_path / "out", "--format", "safetensors", "--max-shard-size", "20kB") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = {name: value for file in files for name, value in load_file(tmp_path / "out" / file).items()}
    assert sum(value.nbytes for value in whole.values()) == index["metadata"]["total_size"]
    assert all(sum(v.nbytes for v in load_file(tmp_path / "out" / file).values()) <= 20_000 for file in files)
    assert whole.keys() == Checkpoint(saved).index.entries.keys()


@pytest.mark.parametrize("size", ["5", "0GB", "many"])
def test_a_size_is_read(saved: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", saved, tmp_path / "out", "--format", "safetensors", "--max-shard-size", size) == 2
    assert f"--max-shard-size {size} is no size: write 5GB or 500MB" in capsys.readouterr().err


def test_export_needs_a_place_and_a_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path / "last.ckpt")
    (tmp_path / "file").write_text("")
    assert run("export", path, tmp_path / "file" / "out", "--format", "safetensors") == 2
    assert "out cannot be written (Not a directory): name another place" in capsys.readouterr().err
    share = Share()
    add_whole(share, "phase", "weight", torch.zeros(2, dtype=torch.complex64))
    write_checkpoint(tmp_path / "complex.ckpt", Content("single", share, take_apart({"trainer": {}, "run": {}})), None)
    assert run("export", tmp_path / "complex.ckpt", tmp_path / "out", "--format", "safetensors") == 2
    assert "phase is complex64, which safetensors cannot hold: use --format lightning" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["complex.ckpt", "file", "last.ckpt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    path = small(tmp_path / "last.ckpt")
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert run("export", path, tmp_path / "out", "--format", "safetensors") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(make_batch(9, 2)["tokens"]).logits
    return found


def test_export_writes_what_from_pretrained_loads(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert run("export", saved, tmp_path / "out", "--format", "transformers") == 0
    model, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), Written.load_from_checkpoint(saved)
    assert torch.equal(logits_of(model), logits_of(ours.model))
    assert model.lm_head.weight is model.transformer.wte.weight and type(model).__name__ == "GPT2LMHeadModel"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.slow
def test_what_eight_ranks_of_zero3_wrote_is_one_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_run("tp2_pp2_dp2_zero3_mb2", tmp_path / "last.ckpt")
    assert run("export", tmp_path / "last.ckpt", tmp_path / "out", "--format", "transformers") == 0
    model, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), logits_of(train_plain(1)[1].model)
    assert (logits_of(model) - expected).norm() < TOLERANCE * expected.norm()
    assert torch.equal(logits_of(model), logits_of(Written.load_from_checkpoint(tmp_path / "last.ckpt").model))


def test_export_takes_a_config(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    other = Written(width=16).model
    other.save_pretrained(tmp_path / "other")
    words = "export", saved, tmp_path / "out", "--format", "transformers", "--config"
    assert run(*words, tmp_path / "other") == 2
    shown = capsys.readouterr().err
    assert "does not hold a GPT2LMHeadModel under 'model.':" in shown and "of another shape: " in shown
    assert run(*words, tmp_path / "none.json") == 2
    assert "none.json has no configuration to read" in capsys.readouterr().err
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"n_embd": 32}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert run(*words, tmp_path / "other", "--prefix", "network.") == 2
    assert "missing: 29 (" in capsys.readouterr().err
    assert run(*words, tmp_path / "other" / "config.json") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(model), logits_of(Written.load_from_checkpoint(saved).model))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    assert run(*words[:2], tmp_path / "more", *words[3:], tmp_path / "other") == 2
    assert "the configuration is for Unheard, which transformers " in capsys.readouterr().err


def test_export_needs_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path / "last.ckpt")
    words = "export", path, tmp_path / "out", "--format", "transformers"
    assert run(*words) == 2
    assert "needs the model's configuration, and the checkpoint has none: give one with --config" in capsys.readouterr().err
    Written().model.save_pretrained(tmp_path / "other")
    assert run(*words, "--config", tmp_path / "other") == 2
    assert "the weights of the configured model are none of the checkpoint's: say what" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "T5ForConditionalGeneration"])
def test_tied_and_fused_weights_stand_in_files_as_their_model_writes_them(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes.update({"num_local_experts": 2, "head_dim": 8, "num_key_value_heads": 1, "pad_token_id": 0})
    kind = getattr(transformers, name)
    module = torch.nn.Module()
    module.net = kind(kind.config_class(**({"d_model": 16, "num_layers": 1} if name.startswith("T5") else sizes)))
    torch.save(module.state_dict(), tmp_path / "module.pt")
    module.net.save_pretrained(tmp_path / "expected")
    assert run("import", tmp_path / "module.pt", tmp_path / "last.ckpt") == 0
    words = "export", tmp_path / "last.ckpt", tmp_path / "out", "--format", "transformers", "--config", tmp_path / "expected"
    assert run(*words) == 0
    expected, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "out"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
    assert run("import", tmp_path / "out", tmp_path / "again.ckpt", "--prefix", "net.") == 0
    again = read_whole_checkpoint(tmp_path / "again.ckpt")["state_dict"]
    assert again.keys() == module.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in module.state_dict().items())


def test_configurations_are_found_in_a_module() -> None:
    module = pl.LightningModule()
    module.one, module.two = Written().model, torch.nn.ModuleList([Written().model.transformer])
    found = find_configs(module)
    assert list(found) == ["one.", "two.0."]
    assert found["one."]["config"]["architectures"] == ["GPT2LMHeadModel"] and found["one."]["config"]["n_embd"] == 32
    assert "generation_config" in found["one."] and "generation_config" not in found["two.0."]
    assert list(find_configs(module.one)) == [""] and find_configs(torch.nn.Linear(1, 1)) == {}


def test_several_configurations_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, share = Written().model, Share()
    for prefix in ("one.", "two."):
        for name, value in one.state_dict().items():
            add_whole(share, prefix + name, "weight", value.clone())
    configs = find_configs(one)[""]
    content = {"trainer": {}, "run": {"configs": {"one.": configs, "two.": configs}}}
    write_checkpoint(tmp_path / "last.ckpt", Content("single", share, take_apart(content)), None)
    words = "export", tmp_path / "last.ckpt", tmp_path / "out", "--format", "transformers"
    assert run(*words) == 2
    assert "the checkpoint has those of one., two.: choose one with --prefix" in capsys.readouterr().err
    one.save_pretrained(tmp_path / "config")
    assert run(*words, "--config", tmp_path / "config") == 2
    assert "stand at several places (one., two.): say what its names begin with" in capsys.readouterr().err
    assert run(*words, "--prefix", "two.") == 0


def test_export_writes_a_file_of_lightning(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    assert run("export", saved, path, "--format", "lightning") == 0
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == Written().state_dict().keys() and content["global_step"] == EPOCH
    _, _, losses = train_plain(2, str(path))
    assert losses == pytest.approx(train_plain(2)[2][EPOCH:], rel=TOLERANCE)


def test_a_file_of_lightning_may_have_no_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(tmp_path / "last.ckpt", optimizer_states=[{}], odd=os.stat_result)
    assert run("export", path, tmp_path / "plain.ckpt", "--format", "lightning") == 0
    shown = capsys.readouterr().err
    assert "without what only a pickle can hold (odd): add --trust to have it" in shown
    assert "without optimizer states: the checkpoint does not say of which" in shown
    assert "odd" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert run("export", path, tmp_path / "all.ckpt", "--format", "lightning", "--trust") == 0
    assert torch.load(tmp_path / "all.ckpt", weights_only=False)["odd"] is os.stat_result


# ---------------------------------------------------------------------- import


def resume(rank: int, world_size: int, path: Path, word: str) -> list[float]:
    strategy = HybridParallelStrategy(word, print_plan=False)
    options: dict[str, Any] = {"devices": world_size, "max_steps": -1, "max_epochs": 2, "gradient_clip_val": None}
    batches = loader(world_size, rank)
    _, _, watched = fit(Written, batches, ckpt_path=str(path), strategy=strategy, accelerator="cpu", **options)
    strategy.states.close()
    return watched.losses


def test_a_file_of_lightning_goes_on_in_a_layout(plain: Path, tmp_path: Path) -> None:
    assert run("import", plain, tmp_path / "here.ckpt") == 0
    entry = Checkpoint(tmp_path / "here.ckpt").index.entries["model.transformer.wte.weight"]
    assert entry.aliases == ["model.lm_head.weight"] and entry.values.keys() == {"weight", "exp_avg", "exp_avg_sq"}
    found, expected = read_whole_checkpoint(tmp_path / "here.ckpt", has_states=True), torch.load(plain, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
    (ours,), (theirs,) = found["optimizer_states"], expected["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    for place, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][place][key], value) for key, value in state.items())
    losses = run_ranks(resume, 2, tmp_path / "here.ckpt", "dp2_zero1", timeout=200)[0]
    assert losses == pytest.approx(train_plain(2)[2][EPOCH:], rel=TOLERANCE)


def test_tied_weights_may_have_another_name_first(plain: Path, tmp_path: Path) -> None:
    content = torch.load(plain, weights_only=True)
    weights = content["state_dict"]
    content["state_dict"] = {"model.lm_head.weight": weights.pop("model.lm_head.weight"), **weights}
    torch.save(content, tmp_path / "plain.ckpt")
    assert run("import", tmp_path / "plain.ckpt", tmp_path / "here.ckpt") == 0
    assert Checkpoint(tmp_path / "here.ckpt").index.entries["model.lm_head.weight"].aliases == ["model.transformer.wte.weight"]
    losses = run_ranks(resume, 1, tmp_path / "here.ckpt", "single", timeout=200)[0]
    assert losses == pytest.approx(train_plain(2)[2][EPOCH:], rel=TOLERANCE)


def test_which_state_is_of_which_parameter_follows_from_shapes() -> None:
    square, row, any_shape = (2, 2), (2,), None
    assert _only_assignment([square, row, square, row], [[square, square], [row, row]]) == [0, 1, 0, 1]
    assert _only_assignment([square, square], [[square], [square]]) is None  # either way round
    assert _only_assignment([square, row], [[row]]) == [None, 0]  # the first is frozen
    assert _only_assignment([square, square], [[square]]) is None  # which is frozen?
    assert _only_assignment([square, square], [[any_shape, any_shape]]) == [0, 0]
    assert _only_assignment([square], [[row]]) is None
    assert _only_assignment([square] * 50, [[square] * 50]) == [0] * 50


def test_states_that_are_not_clear_are_left_out(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(plain, weights_only=True)
    content["state_dict"].update(frozen=torch.zeros(32), extra={"version": 1})
    torch.save(content, tmp_path / "plain.ckpt")
    assert run("import", tmp_path / "plain.ckpt", tmp_path / "here.ckpt") == 0
    shown = capsys.readouterr().err
    assert "without optimizer states: which one is of which parameter does not follow" in shown
    assert "without what is no tensor in the state_dict: extra" in shown
    assert Checkpoint(tmp_path / "here.ckpt").index.entries["frozen"].values.keys() == {"weight"}


def test_a_pickle_needs_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}, "odd": os.stat_result}, tmp_path / "plain.ckpt")
    assert run("import", tmp_path / "plain.ckpt", tmp_path / "here.ckpt") == 1
    assert "plain.ckpt holds os.stat_result, which only a pickle can, and reading one may run any" in capsys.readouterr().err
    assert run("import", tmp_path / "plain.ckpt", tmp_path / "here.ckpt", "--trust") == 0
    assert Checkpoint(tmp_path / "here.ckpt").trainer(trust=True)["trainer"]["odd"] is os.stat_result


def test_a_folder_of_transformers_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = Written().model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    assert run("import", tmp_path / "model", tmp_path / "here.ckpt", "--prefix", "model.") == 0
    assert "29 tensors from transformers" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="not in the checkpoint: .'seen'"):
        module = Written.load_from_checkpoint(tmp_path / "here.ckpt", strict=False)
    assert torch.equal(module.model.lm_head.weight, model.lm_head.weight.float())
    assert Checkpoint(tmp_path / "here.ckpt").index.entries["model.transformer.wte.weight"].dtype == "bfloat16"
    assert run("export", tmp_path / "here.ckpt", tmp_path / "again", "--format", "transformers") == 0
    again, first = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "model"))
    assert again.keys() == first.keys() and all(torch.equal(again[name], value) for name, value in first.items())
    (tmp_path / "model" / "model.safetensors").unlink()
    assert run("import", tmp_path / "model", tmp_path / "more.ckpt") == 2
    assert "cannot be loaded as GPT2LMHeadModel of transformers" in capsys.readouterr().err


def test_safetensors_and_state_dicts_are_imported(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 2), "scalar": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    for place, source in enumerate((tmp_path / "model.safetensors", tmp_path, tmp_path / "model.pt")):
        assert run("import", source, tmp_path / f"{place}.ckpt") == 0
        checkpoint = Checkpoint(tmp_path / f"{place}.ckpt")
        assert all(torch.equal(checkpoint.read_whole(name), value) for name, value in tensors.items())
        assert run("verify", tmp_path / f"{place}.ckpt") == 0
    torch.save([1], tmp_path / "list.pt")
    assert run("import", tmp_path / "list.pt", tmp_path / "list.ckpt") == 2


def test_large_and_overlapping_tensors_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_par.checkpoint.share.PIECE_BYTES", 40)  # ten numbers
    whole = torch.arange(35.0).view(7, 5)
    torch.save({"whole": whole, "rows": whole[2:4], "tied": whole}, tmp_path / "model.pt")
    assert run("import", tmp_path / "model.pt", tmp_path / "here.ckpt") == 0
    checkpoint = Checkpoint(tmp_path / "here.ckpt")
    assert checkpoint.index.entries.keys() == {"whole", "rows"} and checkpoint.index.entries["whole"].aliases == ["tied"]
    assert len(checkpoint.index.entries["whole"].values["weight"].pieces) == 4
    assert torch.equal(checkpoint.read_whole("whole"), whole) and torch.equal(checkpoint.read_whole("rows"), whole[2:4])


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("none", 2, "none: there is no such folder or file"),
        ("empty", 2, "empty has nothing: give a folder of transformers, a safetensors file"),
        ("text.ckpt", 1, "text.ckpt is damaged, or no file of torch: copy it again"),
        ("list.ckpt", 2, "list.ckpt holds a list, not a dict of tensors"),
        ("zero", 1, "zero is a checkpoint of DeepSpeed, whose files are pickles, and reading one may run any code: add --trust"),
    ],
)
def test_other_sources_are_refused(source: str, code: int, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("not a pickle")
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("global_step1")
    assert run("import", tmp_path / source, tmp_path / "here.ckpt") == code
    assert message in capsys.readouterr().err and not (tmp_path / "here.ckpt").exists()
    assert run("import", tmp_path / source, tmp_path) == 2
    assert "exists: name another place" in capsys.readouterr().err


def write_zero(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as DeepSpeed writes it."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    config = {"train_batch_size": world_size, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    engine.save_checkpoint(str(folder))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_checkpoint_of_deepspeed_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = run_ranks(write_zero, 2, tmp_path / "zero", timeout=200)[0]
    assert run("import", tmp_path / "zero", tmp_path / "here.ckpt", "--trust", "--prefix", "network.") == 0
    assert "weights only, as float32" in capsys.readouterr().err
    found = read_whole_checkpoint(tmp_path / "here.ckpt")["state_dict"]
    assert found.keys() == {f"network.{name}" for name in expected}
    assert all(torch.equal(found[f"network.{name}"], value) for name, value in expected.items())
    tag = (tmp_path / "zero" / "latest").read_text().strip()
    assert run("import", tmp_path / "zero" / tag, tmp_path / "tag.ckpt", "--trust") == 0
    (tmp_path / "zero" / "latest").write_text("none")
    assert run("import", tmp_path / "zero", tmp_path / "more.ckpt", "--trust") == 1
    assert "zero cannot be read as a checkpoint of DeepSpeed: " in capsys.readouterr().err


# ---------------------------------------------------------------------- prune


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def several(folder: Path) -> None:
    """Three checkpoints, newest first in the alphabet, with what killed saves leave, and a link."""
    for time, name in enumerate(("c.ckpt", "b.ckpt", "a.ckpt")):
        index = small(folder / name) / "checkpoint.json"
        os.utime(index, (time, time))
    small(folder / "lost.ckpt").rename(folder / ".lost.ckpt.earlier")
    os.utime(folder / ".lost.ckpt.earlier" / "checkpoint.json", (9, 9))
    small(folder / "old.ckpt").rename(folder / ".a.ckpt.earlier")
    (folder / ".a.ckpt.saving").mkdir()
    (folder / ".gone.ckpt.removed").mkdir()
    (folder / "notes").mkdir()


LEFTOVERS = {".a.ckpt.earlier", ".a.ckpt.saving", ".gone.ckpt.removed"}


def test_prune_removes_what_killed_saves_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path)
    before = names_in(tmp_path)
    assert run("prune", tmp_path, "--dry-run") == 0
    assert names_in(tmp_path) == before and capsys.readouterr().out.count("would remove: ") == 3
    assert run("prune", tmp_path) == 0
    assert set(before) - set(names_in(tmp_path)) == LEFTOVERS
    assert capsys.readouterr().out.endswith("kept: c.ckpt, b.ckpt, a.ckpt, .lost.ckpt.earlier\n")


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    several(tmp_path)
    (tmp_path / "best.ckpt").symlink_to("c.ckpt")
    assert run("prune", tmp_path, "--keep", 2) == 0
    assert names_in(tmp_path) == [".lost.ckpt.earlier", "a.ckpt", "best.ckpt", "c.ckpt", "notes"]


def test_prune_never_removes_the_last_good_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path)
    for name in ("a.ckpt", ".lost.ckpt.earlier"):
        (tmp_path / name / "trainer.json").unlink()
    assert run("prune", tmp_path, "--keep", 1) == 0
    # what a damaged one replaced is the newest that is whole
    assert names_in(tmp_path) == [".a.ckpt.earlier", ".lost.ckpt.earlier", "a.ckpt", "notes"]
    assert capsys.readouterr().err.count("left: ") == 2


def test_prune_refuses_what_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", tmp_path / "none") == 2
    assert "none: there is no such folder: give the one that has the checkpoints in it" in capsys.readouterr().err
    assert run("prune", tmp_path, "--keep", 0) == 2
    assert "--keep 0 would keep no checkpoint: keep at least 1" in capsys.readouterr().err
