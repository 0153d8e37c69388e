"""Tokens and texts as training data: what samples hold, that all layouts read the same, and that a run goes on where it was."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shlex
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from lightning_par import HybridParallelStrategy, cli
from lightning_par.config.run import build_run
from lightning_par.config.search_path import register
from lightning_par.data.hugging_face import HuggingFace, Stream, Table
from lightning_par.data.order import Order
from lightning_par.data.packing import best_fit
from lightning_par.data.sample import IGNORED, sample_of_pieces, sample_of_window
from lightning_par.data.stream_loader import StreamLoader, ahead_of
from lightning_par.data.streams import Lane, Source, batches
from lightning_par.data.token_folder import read_index
from lightning_par.data.tokenize import plan_job, tokenize
from lightning_par.data.tokenizer import Bytes
from lightning_par.data.tokens import Tokens
from lightning_par.data.windows import Documents, TokenFiles, Windows
from lightning_par.demo.gpt import GPT
from lightning_par.demo.language_model import LanguageModel
from lightning_par.errors import DataError
from tests.corpora import texts, train_tokenizer, write_lines
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of 60 documents of all lengths from 1 to 60 bytes, in several shards."""
    root = tmp_path_factory.mktemp("tokens")
    found = [text.strip()[: number + 1] or "x" for number, text in enumerate(texts(60))]
    index = tokenize(plan_job([str(write_lines(root / "a.jsonl", found))], str(root / "out"), part_bytes=1500), 1)
    assert len(index.shards) > 2
    return root / "out"


def replica(rank: int, size: int, **others: Any) -> Any:
    """What a data module asks of its Trainer."""
    return SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": size}, **others)


# ---------------------------------------------------------------------- files of tokens


def test_windows_hold_every_token_once_as_a_target(folder: Path) -> None:
    files = TokenFiles(folder)
    windows = Windows(files, CONTEXT, "tokens")
    assert len(windows) == sum((shard.tokens - 1) // CONTEXT for shard in files.index.shards)
    number = 0
    for shard in files.index.shards:
        whole = np.fromfile(folder / f"{shard.name}.bin", "<u2").astype(np.int64)
        for start in range(0, len(whole) - CONTEXT, CONTEXT):
            sample = windows[number]
            assert sample["tokens"].tolist() == whole[start : start + CONTEXT].tolist()
            assert sample["targets"].tolist() == whole[start + 1 : start + CONTEXT + 1].tolist()
            number += 1
    assert number == len(windows) and windows[0]["tokens"].dtype == torch.int64


def test_documents_are_whole_and_none_is_a_target_for_another(folder: Path) -> None:
    files = TokenFiles(folder)
    count = sum(shard.documents for shard in files.index.shards)
    found = []
    for sample in (rows := Documents(files, CONTEXT, "tokens", 0, count)):
        tokens, targets, documents = sample["tokens"], sample["targets"], sample["document_ids"]
        for number in documents.unique().tolist():
            chosen = documents == number
            piece = tokens[chosen].tolist()
            if (targets[chosen] == IGNORED).all() and not any(piece):
                continue  # what fills the rest
            assert targets[chosen].tolist() == [*piece[1:], IGNORED]
            assert sample["position_ids"][chosen].tolist() == list(range(len(piece)))
            found.append(piece)
    expected = []
    for shard, each in enumerate(files.index.shards):
        whole = files.read(shard, 0, each.tokens).tolist()
        for start, end in itertools.pairwise([0, *files.ends(shard).tolist()]):
            expected += [whole[place : min(place + CONTEXT, end)] for place in range(start, end, CONTEXT)]
    # a piece that is one token 0, the end of a document of a whole number of contexts, looks like filling
    assert sorted(found) == sorted(piece for piece in expected if piece != [0])
    assert len(rows) * CONTEXT < 1.1 * sum(map(len, expected))


def test_the_samples_of_pieces_by_hand() -> None:
    pieces = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    sample = sample_of_pieces(pieces, 7, 3, "tokens")
    assert {name: value.tolist() for name, value in sample.items()} == {
        "tokens": [5, 6, 7, 8, 9, 3, 3],
        "targets": [6, 7, -100, 9, -100, -100, -100],
        "position_ids": [0, 1, 2, 0, 1, 0, 1],
        "document_ids": [0, 0, 0, 1, 1, 2, 2],
    }
    sample = sample_of_pieces(pieces, 5, 3, "transformers")
    assert {name: value.tolist() for name, value in sample.items()} == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, 6, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }
    sample = sample_of_window(torch.tensor([1, 2, 3]), "transformers")
    assert {name: value.tolist() for name, value in sample.items()} == {"input_ids": [1, 2], "labels": [1, 2]}


@pytest.mark.parametrize("seed", range(3))
def test_pieces_go_to_the_fullest_sample_with_room(seed: int) -> None:
    """Against the rule, written down without any tricks."""
    lengths, capacity = np.random.default_rng(seed).integers(1, 33, 300), 32
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    bins = best_fit(lengths, capacity)
    used = np.bincount(bins, lengths)
    assert used.max() <= capacity and sorted(capacity - used) == sorted(rooms)
    assert (best_fit(lengths, capacity) == bins).all()


def test_files_are_mapped_and_not_copied_to_other_processes(folder: Path) -> None:
    files = TokenFiles(folder)
    files.read(0, 0, 5)
    (mapped,) = files._maps.values()
    assert isinstance(mapped, np.memmap)
    copied = pickle.loads(pickle.dumps(files))
    assert not copied._maps and copied.read(0, 0, 5).tolist() == files.read(0, 0, 5).tolist()
    assert len(pickle.dumps(Windows(files, CONTEXT, "tokens"))) < 2000


def module(folder: Path, **options: Any) -> Tokens:
    data = Tokens(str(folder), **{"context": CONTEXT, "batch_size": 2, "num_validation_samples": 10, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_what_is_held_out_is_not_trained_on(folder: Path, packing: str) -> None:
    data = module(folder, packing=packing)

    def rows(dataset: Any) -> list[Any]:
        return [tuple(dataset[index]["tokens"].tolist()) for index in range(len(dataset))]

    training, validation = rows(data.training), rows(data.validation)
    assert 10 <= len(validation) <= 13 and len(training) > 50
    whole = rows(module(folder, packing=packing, num_validation_samples=0).training)
    assert len(training) + len(validation) in (len(whole), len(whole) + 1)
    if packing == "windows":
        assert training + validation == whole
    other = module(folder, packing=packing, validation_path=str(folder))
    assert rows(other.training) == whole and rows(other.validation) == validation
    assert module(folder, num_validation_samples=0).val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_all_layouts_read_the_same_samples_in_a_step(folder: Path, workers: int) -> None:
    def steps(size: int, epoch: int) -> list[list[Any]]:
        found = []
        for rank in range(size):
            data = module(folder, batch_size=8 // size, num_workers=workers)
            data.trainer = replica(rank, size)
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            found.append([batch["tokens"].tolist() for batch in loader])
        return [sorted(itertools.chain.from_iterable(parts)) for parts in zip(*found, strict=True)]

    one = steps(1, 3)
    assert len(one) == len(module(folder).training) // 8
    for size in (2, 4) if not workers else (2,):
        assert steps(size, 3) == one
    if not workers:
        assert sorted(steps(1, 4)[0]) != one[0]


@pytest.mark.parametrize(("number", "size"), [(17, 2), (15, 4), (8, 8), (3, 4)])
def test_an_order_gives_no_sample_twice(number: int, size: int) -> None:
    parts = [list(Order(range(number), replica(rank, size), shuffle=False)) for rank in range(size)]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(number - number % size))
    assert {len(part) for part in parts} == {len(Order(range(number), replica(0, size), shuffle=True))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "tight"}, r"data\.packing=tight: there is no such packing: use windows or documents"),
        ({"format": "numpy"}, r"data\.format=numpy: there is no such format: use tokens or transformers"),
        (
            {"num_validation_samples": 9999},
            r"has nothing to train on beside data\.num_validation_samples=9999 of 16 tokens: make them",
        ),
        ({"batch_size": 999}, r"has \d+ samples of 16 tokens to train on, and a batch of all replicas is 1998 of them: make"),
        ({"path": "nowhere"}, r"nowhere is no folder of tokens"),
    ],
)
def test_what_tokens_refuse(folder: Path, options: dict[str, Any], message: str) -> None:
    def make() -> None:
        data = module(options.pop("path", folder), **options)
        data.trainer = replica(0, 2)
        data.train_dataloader()

    with pytest.raises(DataError, match=message):
        make()


# ---------------------------------------------------------------------- texts of datasets


def dataset(kind: str, shards: int = 8, count: int = 160) -> Any:
    """Texts that say which they are, as a table or as a stream of several files."""
    datasets = pytest.importorskip("datasets")
    found = [f"{number:04d} " + "x" * (number % 37) for number in range(count)]
    if kind == "table":
        return datasets.Dataset.from_dict({"text": found, "number": list(range(count))})

    def generate(files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            yield from ({"text": text} for text in found[file::shards])

    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"files": list(range(shards))})


def source(kind: str, lanes: int = 8, shuffle: bool = True, shards: int = 8, seed: int = 0) -> Source:
    made = Table if kind == "table" else Stream
    return made(dataset(kind, shards), "text", shuffle, seed, block=7, lanes=lanes)


def first(count: int, *arguments: Any, **options: Any) -> list[tuple[list[Any], Any]]:
    found = itertools.islice(batches(*arguments, **options), count)
    return [(batch["tokens"].tolist(), places) for batch, places in found]


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_all_layouts_read_the_same_texts_in_a_step(kind: str) -> None:
    def steps(size: int, lanes: int, seed: int = 0) -> list[list[Any]]:
        parts = [
            first(60, source(kind, lanes, seed=seed), Bytes(True), CONTEXT, 12 // size, (rank, size), "tokens")
            for rank in range(size)
        ]
        return [sorted(itertools.chain.from_iterable(rows for rows, _ in found)) for found in zip(*parts, strict=True)]

    one = steps(1, 8)
    for size in (2, 4, 3):  # three replicas need lanes of each other
        assert steps(size, 8) == one
    assert steps(1, 8, seed=1) != one != steps(1, 4)


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_every_text_is_read_once_in_a_turn_and_then_in_another_order(kind: str) -> None:
    lanes = source(kind)

    def turn(number: int) -> list[list[str]]:
        return [[text for block, _ in lanes.read(lane, number, None) for text in block] for lane in range(8)]

    zero, one = turn(0), turn(1)
    for found in (zero, one):
        assert sorted(int(text[:4]) for text in itertools.chain.from_iterable(found)) == list(range(160))
    assert zero != one and zero == turn(0)
    plain = source(kind, shuffle=False)
    numbers = [int(text[:4]) for block, _ in plain.read(3, 5, None) for text in block]
    assert numbers == list(range(3, 160, 8))
    for lane in (0, 5):
        blocks = list(lanes.read(lane, 2, None))
        for done in range(len(blocks)):  # on from any block
            assert [block for block, _ in lanes.read(lane, 2, blocks[done][1])] == [block for block, _ in blocks[done + 1 :]]


def noted(lanes: Source) -> dict[int, Any]:
    """Where each lane of a source is read from first."""
    calls, read = {}, lanes.read

    def note(lane: int, turn: int, after: Any) -> Any:
        calls.setdefault(lane, (turn, after))
        return read(lane, turn, after)

    lanes.read = note  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_replica_goes_on_from_any_batch_without_reading_what_was_used(kind: str) -> None:
    arguments = Bytes(True), CONTEXT, 3, (1, 2), "tokens"
    whole = first(80, source(kind), *arguments)
    for done in (1, 2, 17, 40, 79):
        places = pickle.loads(pickle.dumps(whole[done - 1][1]))
        lanes = source(kind)
        calls = noted(lanes)
        rest = first(80 - done, lanes, *arguments, start=done * 6, places=places)
        assert [rows for rows, _ in rest] == [rows for rows, _ in whole[done:]]
        beginning = {"turn": 0, "after": None}
        kept = {lane: places.get(lane, beginning) for lane in calls}
        assert calls == {lane: (place["turn"], place["after"]) for lane, place in kept.items()} and set(calls) <= {1, 3, 5, 7}
    assert any(place["turn"] > 0 for place in whole[-1][1].values())


class Used:
    """A Trainer's count of batches, kept in a list, and how many of them are of a step that is not taken yet."""

    def __init__(self, used: list[int], unfinished: int = 0) -> None:
        self._used, self.position = used, SimpleNamespace(unfinished=unfinished)

    @property
    def total(self) -> int:
        return self._used[0]


def loaders(size: int, batch: int, used: list[int], ahead: int = 0) -> list[StreamLoader]:
    """One for each replica, of a Trainer that has used so many batches."""
    found = []
    for rank in range(size):
        lanes = source("stream")

        def read(start: int, places: Any, lanes: Source = lanes, rank: int = rank) -> Any:
            return batches(lanes, Bytes(True), CONTEXT, batch, (rank, size), "tokens", start, places)

        loader = StreamLoader(read, None, batch * size, ahead)
        loader._progress = Used(used)  # type: ignore[assignment]
        found.append(loader)
    return found


def taken(found: list[StreamLoader], count: int, used: list[int]) -> list[list[Any]]:
    """What all replicas read together in the next steps."""
    steps = []
    readers = [iter(loader) for loader in found]
    for _ in range(count):
        steps.append(sorted(itertools.chain.from_iterable(next(reader)["tokens"].tolist() for reader in readers)))
        used[0] += 1
    return steps


@pytest.mark.parametrize(("size", "batch"), [(2, 4), (4, 2), (1, 8), (8, 1), (3, 4)])
def test_a_stream_goes_on_in_any_layout(size: int, batch: int) -> None:
    used = [0]
    whole = list(itertools.chain.from_iterable(taken(loaders(2, 4, used), 30, used)))
    used = [0]
    stopped = loaders(2, 4, used, ahead=3)
    taken(stopped, 9, used)
    states = [pickle.loads(pickle.dumps(loader.state_dict())) for loader in stopped]
    assert [state["samples"] for state in states] == [72, 72]
    resumed = loaders(size, batch, used)
    for rank, loader in enumerate(resumed):
        loader.load_state_dict(states[rank % 2])
    rest = list(itertools.chain.from_iterable(taken(resumed, 10, used)))
    together = size * batch
    expected = whole[72 : 72 + 10 * together] if together == 8 else None
    if expected is not None:
        assert [sorted(rest[start : start + 8]) for start in range(0, 80, 8)] == [
            sorted(expected[start : start + 8]) for start in range(0, 80, 8)
        ]
    else:  # batches of another size: the same samples, no one twice and none left out
        assert sorted(rest[:96]) == sorted(whole[72:168])


def test_an_epoch_goes_on_after_the_batches_that_were_used() -> None:
    used = [0]
    whole = taken(loaders(1, 4, used), 12, used)
    used = [0]
    found = loaders(1, 4, used, ahead=2)
    again = taken(found, 5, used) + taken(found, 4, used)
    assert found[0].state_dict()["batches"] == 9 and again + taken(found, 3, used) == whole
    fresh = loaders(1, 4, [9])  # of a checkpoint without a state
    assert sorted(next(iter(fresh[0]))["tokens"].tolist()) == whole[9]


def test_what_is_made_ahead_is_the_same_and_its_thread_ends() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "batches made ahead"]

    assert list(ahead_of(iter(range(50)), 3)) == list(range(50))
    endless = ahead_of(itertools.count(), 2)
    assert next(endless) == 0 and threads()
    endless.close()
    for thread in threading.enumerate():
        if thread.name == "batches made ahead":
            thread.join(5)
    assert not threads()

    def fail() -> Iterator[int]:
        yield 1
        raise KeyError("in the thread")

    failing = ahead_of(fail(), 1)
    assert next(failing) == 1
    with pytest.raises(KeyError, match="in the thread"):
        next(failing)


def hugging_face(**options: Any) -> HuggingFace:
    made = HuggingFace(**{"training": dataset("table"), "context": CONTEXT, "batch_size": 2, "lanes": 4, **options})
    made.setup("fit")
    return made


def test_validation_reads_a_dataset_once() -> None:
    data = hugging_face(validation=dataset("stream", 1, 20), num_validation_samples=1000)
    whole = b"".join(f"{number:04d} ".encode() + b"x" * number + b"\0" for number in range(20))
    found = [bytes(sample["tokens"].tolist()) for sample in data.samples]
    assert found == [whole[start : start + CONTEXT] for start in range(0, len(whole) - CONTEXT, CONTEXT)]
    assert len(hugging_face(validation=dataset("stream"), num_validation_samples=5).samples) == 5
    assert hugging_face().val_dataloader() == []


def test_files_are_loaded_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(4):
        write_lines(tmp_path / f"{number}.jsonl", (f"file {number} text {row}" for row in range(9)), column="body")
    arguments = {"path": "json", "data_files": str(tmp_path / "*.jsonl"), "split": "train", "streaming": True}
    data = hugging_face(training=arguments, column="body")
    assert data.source.num_lanes == 4
    found = [text for lane in range(4) for block, _ in data.source.read(lane, 0, None) for text in block]
    assert sorted(found) == sorted(f"file {number} text {row}" for number in range(4) for row in range(9))
    with pytest.raises(DataError, match=r"data\.column=text: the dataset has the columns body, number: name the one with"):
        hugging_face(training=arguments)
    with pytest.raises(
        DataError, match=r"data\.column=body: the dataset has the columns text: name the one"
    ):  # known when it is read
        next(hugging_face(training=dataset("stream"), column="body").source.read(0, 0, None))
    with pytest.raises(DataError, match=r"(?s)data=hugging_face: datasets\.load_dataset\(path='json', .*\) says: .*nothing.jsonl"):
        hugging_face(training={**arguments, "data_files": str(tmp_path / "nothing.jsonl")})
    with pytest.raises(DataError, match=r"got a IterableDatasetDict, which is no dataset of texts: name one part of it, as data"):
        hugging_face(training={name: value for name, value in arguments.items() if name != "split"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "numpy"}, r"data\.format=numpy: there is no such format: use tokens or transformers"),
        ({"column": "body"}, r"data\.column=body: the dataset has the columns text, number: name the one with the texts"),
        ({"training": {"train": 1}}, r"data=hugging_face got a dict, which is no dataset of texts: name one part of it"),
        ({"training": [1]}, r"data=hugging_face got a list, which is no dataset of texts: name one part of it"),
        ({"validation": "empty"}, r"data\.validation of data=hugging_face has no 17 tokens for a sample: give it more, or make"),
    ],
)
def test_what_datasets_refuse(options: dict[str, Any], message: str) -> None:
    if options.get("validation") == "empty":
        options = {"validation": dataset("table", count=1)}
    with pytest.raises(DataError, match=message):
        hugging_face(**options)


def test_training_without_an_end_or_a_text_is_refused_and_lanes_are_counted() -> None:
    data = hugging_face()
    data.trainer = replica(0, 1, max_steps=-1, limit_train_batches=1.0)
    with pytest.raises(DataError, match=r"the texts are read again and again, so training has no end: say trainer\.max_steps=N"):
        data.train_dataloader()
    data.trainer = pl.Trainer(accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, barebones=False)
    assert len(next(iter(data.train_dataloader()))["tokens"]) == 2
    three = SimpleNamespace(**{**vars(replica(1, 3, max_steps=5, limit_train_batches=1.0)), "fit_loop": data.trainer.fit_loop})
    data.trainer = three
    with pytest.warns(
        UserWarning, match=r"data\.lanes=4 are not divided by the 3 replicas: each reads and tokenizes lanes of others"
    ):
        data.train_dataloader()
    datasets = pytest.importorskip("datasets")
    empty = Table(datasets.Dataset.from_dict({"text": ["", "", "a"]}), "text", False, 0, 2, lanes=2)
    assert Lane(empty, 0, Bytes(True), 1).take(0).tolist() == [97, 0]
    with pytest.raises(DataError, match=r"there is no text in lane 1 of 2: use fewer data\.lanes"):
        Lane(empty, 1, Bytes(True), 1).take(0)


class Blocks(Source):
    """Documents of one lane in blocks."""

    num_lanes = 1

    def __init__(self, *blocks: list[str]) -> None:
        self._blocks = blocks

    def read(self, lane: int, turn: int, after: Any) -> Iterator[tuple[list[str], Any]]:
        for number, block in enumerate(self._blocks[after or 0 :], start=after or 0):
            yield block, number + 1


def test_windows_lie_across_blocks_and_turns_and_go_on_from_every_place() -> None:
    blocks, count = Blocks(["abcdefg"], ["h"], ["ij", "k"], ["lmnopqrstuv"]), 20
    whole = "\0".join("abcdefg h ij k lmnopqrstuv".split()) + "\0"
    expected = [list((whole * count).encode()[4 * index : 4 * index + 5]) for index in range(count)]
    lane, places = Lane(blocks, 0, Bytes(True), 4), []
    for index in range(count):
        assert lane.take(index).tolist() == expected[index]
        places.append(lane.place)
    for index, place in enumerate(places[:-1], start=1):
        assert Lane(blocks, 0, Bytes(True), 4, place).take(index).tolist() == expected[index]
    # a place that lies ahead, of samples that are read again, is none to go on from
    ((tokens, _),) = first(1, blocks, Bytes(True), 4, 2, (0, 1), "tokens", 3, {0: places[9]})
    assert tokens == [window[:-1] for window in expected[3:5]]


def test_batches_of_a_step_that_is_not_taken_are_read_again() -> None:
    used, steps = [0], []
    (loader,) = loaders(1, 8, used)
    reader = iter(loader)
    for number in range(1, 6):
        steps.append(sorted(next(reader)["tokens"].tolist()))
        used[0] = number
        loader._progress = Used(used, max(0, number - 3))  # type: ignore[assignment]
    state = loader.state_dict()
    assert (state["batches"], state["samples"]) == (3, 24)
    used = [3]
    (resumed,) = loaders(1, 8, used)
    resumed.load_state_dict(state)
    assert taken([resumed], 2, used) == steps[3:]


# ---------------------------------------------------------------------- training


class Watch(pl.Callback):
    """Notes the samples and the loss of each step, and saves after one."""

    def __init__(self, path: Path | None = None, stop: int = 0) -> None:
        self.path, self.stop = path, stop
        self.seen: list[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["tokens"].tolist())
        if self.path is not None and trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)


def make_data(kind: str, folder: Path, batch_size: int) -> Any:
    if kind in ("windows", "documents"):
        return Tokens(str(folder), CONTEXT, batch_size, packing=kind, num_validation_samples=4)
    return HuggingFace(dataset(kind), context=CONTEXT, batch_size=batch_size, lanes=4, block=5)


def train(kind: str, folder: Path, batch_size: int, strategy: Any, devices: int, watch: Watch, start: Any = None) -> Any:
    torch.manual_seed(0)
    language_model = LanguageModel(GPT(width=16, depth=2, heads=2), lr=0.5, warmup_steps=1, optimizer=torch.optim.SGD)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, callbacks=[watch], max_steps=6, limit_val_batches=1,
        val_check_interval=3, check_val_every_n_epoch=None, **quiet,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(language_model, make_data(kind, folder, batch_size), ckpt_path=start)
    return {name: value.detach().clone() for name, value in language_model.named_parameters()}


KINDS = ("windows", "documents", "table", "stream")


def train_all(rank: int, world_size: int, folder: Path, out: Path) -> Any:
    """Each kind of data in dp2, and again from the middle."""
    found = {}
    for kind in KINDS:
        strategy = lambda kind=kind: HybridParallelStrategy(  # noqa: E731
            "dp2", print_plan=False, loss_weight="targets" if kind == "documents" else None
        )
        whole, rest = Watch(out / f"{kind}.ckpt", 4), Watch()
        weights = train(kind, folder, 2, strategy(), 2, whole)
        again = train(kind, folder, 2, strategy(), 2, rest, str(out / f"{kind}.ckpt"))
        same = all(torch.equal(weights[name], again[name]) for name in weights)
        found[kind] = whole.seen, rest.seen, weights, same
    return found


def resume_alone(rank: int, world_size: int, folder: Path, out: Path) -> Any:
    found = {}
    for kind in KINDS:
        watch = Watch()
        train(kind, folder, 4, HybridParallelStrategy("single", print_plan=False), 1, watch, str(out / f"{kind}.ckpt"))
        found[kind] = watch.seen
    return found


def test_training_is_that_of_one_process_and_goes_on_in_any_layout(folder: Path, tmp_path: Path) -> None:
    ranks = run_ranks(train_all, 2, folder, tmp_path)
    alone = run_ranks(resume_alone, 1, folder, tmp_path)[0]
    for kind in KINDS:
        plain = Watch()
        weights = train(kind, folder, 4, "auto", 1, plain)
        together = [sorted(one + two) for one, two in zip(ranks[0][kind][0], ranks[1][kind][0], strict=True)]
        assert together == list(map(sorted, plain.seen)) and len(together) == 6, kind
        for seen, rest, parted, same in (found[kind] for found in ranks):
            assert same and rest == seen[4:], kind
            for name, value in weights.items():
                torch.testing.assert_close(parted[name], value, rtol=1e-4, atol=1e-6, msg=lambda said: f"{kind} {name}: {said}")  # noqa: B023
        assert list(map(sorted, alone[kind])) == together[4:], kind


def test_a_model_of_transformers_keeps_documents_apart() -> None:
    """What it says of a document beside others is what it says of it alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    pieces = [torch.arange(1, 8), torch.arange(3, 9)]
    sample = sample_of_pieces(pieces, CONTEXT, 0, "transformers")
    batch = {name: value[None] for name, value in sample.items()}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
        torch.testing.assert_close(logits[:7], model(input_ids=pieces[0][None]).logits[0])
        torch.testing.assert_close(logits[7:13], model(input_ids=pieces[1][None]).logits[0])


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that train as far as the first batch and what the model makes of it."""
    page = (ROOT / "docs" / "data.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for language, block in blocks if language == "bash" for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("corpus").mkdir()
    rows = [{"text": text, "body": text} for text in texts(30)]
    Path("corpus", "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(Path("tokenizer.json"))
    register()
    assert len(lines) == 6
    for program, *words in lines:
        if program == "lightning-par":
            cli.main(words)
            continue
        assert words.pop(0) == "train.py"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [*words, "trainer.default_root_dir=null"])
        trainer, _, data = build_run(config, accelerator="cpu", logger=False, callbacks=[])
        data.trainer = trainer
        data.setup("fit")
        tokens = next(iter(data.train_dataloader()))["tokens"]
        assert tokens.shape == (16, 128) and tokens.max() < config.model.network.get("vocab_size", 256)
    (script,) = (block for language, block in blocks if language == "python")
    made: dict[str, Any] = {}
    exec(script, made)
    made["data"].setup("fit")
    assert next(iter(made["data"].train_dataloader()))["tokens"].shape == (2, 32)


def test_the_index_names_what_a_model_needs(folder: Path) -> None:
    index = read_index(folder)
    assert max(int(TokenFiles(folder).read(0, 0, 500).max()), index.end_of_document or 0) < index.vocabulary
