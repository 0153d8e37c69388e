"""`lightning-par tokenize`: the same bytes by any number of processes, on from where it was stopped, and every refusal's words."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_par.cli import main
from lightning_par.data import extra
from lightning_par.data.inputs import cut, documents, find_files
from lightning_par.data.token_folder import Index, dtype_for, read_index
from lightning_par.data.tokenize import Job, plan_job, tokenize
from lightning_par.data.tokenizer import open_tokenizer
from lightning_par.data.workers import run_all
from lightning_par.errors import DataError, ProcessError
from tests.corpora import END, texts, train_tokenizer, write_lines

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with every kind of file, 40 documents."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    found = texts(40)
    for number, text in enumerate(found[:10]):
        (folder / "more" / f"{number}.txt").write_text(text)
    write_lines(folder / "b.jsonl", found[10:30])
    write_lines(folder / "a.jsonl.gz", found[30:])
    (folder / "left.out").write_text("of another kind")
    return folder


def read(folder: Path) -> tuple[Index, list[list[int]]]:
    """The index of a folder, and its documents with the token at their end."""
    index, found = read_index(folder), []
    for shard in index.shards:
        tokens = np.fromfile(folder / f"{shard.name}.bin", index.dtype)
        ends = np.fromfile(folder / f"{shard.name}.end", "<u8")
        assert (len(tokens), len(ends)) == (shard.tokens, shard.documents) and ends[-1] == len(tokens)
        found += [part.tolist() for part in np.split(tokens, ends.astype(int)[:-1])]
    return index, found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def in_order() -> list[str]:
    """The documents of the corpus, as they are to be read."""
    found = texts(40)
    return found[30:] + found[10:30] + found[:10]


def test_bytes_of_every_kind_of_file_in_the_order_of_their_names(corpus: Path, tmp_path: Path) -> None:
    main(["tokenize", str(corpus), "--output", str(tmp_path / "out"), "--processes", "1"])
    index, found = read(tmp_path / "out")
    assert (index.vocabulary, index.end_of_document, index.tokenizer, index.dtype) == (256, 0, "bytes", np.dtype("<u2"))
    assert [bytes(each[:-1]).decode() for each in found] == in_order() and {each[-1] for each in found} == {0}


def test_a_tokenizer_file_neither_cuts_nor_pads_nor_adds_and_texts_cannot_end_themselves(tokenizer: str, tmp_path: Path) -> None:
    import tokenizers

    (tmp_path / "a.txt").write_text(f"def first(): return 1 {END} def second(): pass")
    main(["tokenize", str(tmp_path / "a.txt"), "--tokenizer", tokenizer, "--output", str(tmp_path / "out"), "--processes", "1"])
    index, (document,) = read(tmp_path / "out")
    plain = tokenizers.Tokenizer.from_file(tokenizer)
    assert index.vocabulary == 400 and index.end_of_document == plain.token_to_id(END) == 0
    assert document.count(0) == 1 and document[-1] == 0 and 1 not in document
    assert plain.decode(document[:-1], skip_special_tokens=False) == (tmp_path / "a.txt").read_text()
    job = plan_job([str(tmp_path / "a.txt")], str(tmp_path / "none"), tokenizer, "none")
    assert tokenize(job, 1).end_of_document is None and read(tmp_path / "none")[1] == [document[:-1]]


def test_any_number_of_processes_writes_the_same_bytes_and_goes_on(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    def job(name: str) -> Job:
        return plan_job([str(corpus)], str(tmp_path / name), tokenizer, part_bytes=20_000)

    told: list[int] = []
    tokenize(job("one"), 1, told.append)
    whole = contents(tmp_path / "one")
    assert len(job("one").parts) > 4 and sum(told) == job("one").num_bytes and max(told) < 20_000 + 4_000
    tokenize(job("three"), 3)
    assert contents(tmp_path / "three") == whole
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "three").iterdir()}
    damaged = bytearray(whole["00001.bin"])
    damaged[100] ^= 1
    (tmp_path / "three" / "00001.bin").write_bytes(damaged)  # of the same size
    (tmp_path / "three" / "00003.json").unlink()  # as if it was stopped before
    tokenize(job("three"), 1)
    assert contents(tmp_path / "three") == whole
    changed = {name for name, then in times.items() if (tmp_path / "three" / name).stat().st_mtime_ns != then}
    assert changed == {"index.json", *(f"0000{number}.{suffix}" for number in (1, 3) for suffix in ("bin", "end", "json"))}


def test_what_has_changed_is_made_again_and_what_is_no_more_is_removed(corpus: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    tokenize(plan_job([str(corpus)], output, part_bytes=20_000), 1)
    (corpus / "a.jsonl.gz").unlink()
    write_lines(corpus / "b.jsonl", ["only one"])
    tokenize(plan_job([str(corpus)], output, part_bytes=20_000), 1)
    tokenize(plan_job([str(corpus)], str(tmp_path / "fresh"), part_bytes=20_000), 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 5000])
def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path: Path, part_bytes: int) -> None:
    found = ["a", "", "ä" * 30, "b\nc", *map(str, range(20))]
    path = write_lines(tmp_path / "a.jsonl", found)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 3)[:-1])  # empty lines, and none at the end
    groups = cut([path], part_bytes)
    assert [text for group in groups for part in group for text in documents(part, "text")] == found
    assert (len(groups) == 1) == (part_bytes == 5000)


def test_tables_are_read_by_groups_of_rows(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    found = texts(20)
    parquet.write_table(pyarrow.table({"text": found, "n": list(range(20))}), tmp_path / "a.parquet", row_group_size=6)
    groups = cut(find_files([str(tmp_path)]), 1)
    assert len(groups) == 4 and [text for (part,) in groups for text in documents(part, "text")] == found
    with pytest.raises(
        DataError, match=r"a\.parquet: there is no column 'body', it has text, n: name the one to read with --column"
    ):
        list(documents(groups[0][0], "body"))
    with pytest.raises(DataError, match=r"column 'n' has a int, no text: name one with --column NAME"):
        list(documents(groups[0][0], "n"))
    (tmp_path / "b.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"b\.parquet is no parquet file .*: get it again, or leave it out"):
        cut([tmp_path / "b.parquet"], 1)


def test_dtypes() -> None:
    assert dtype_for(1 << 16) == np.dtype("<u2") and dtype_for((1 << 16) + 1) == np.dtype("<u4")


def start(corpus: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal starts it; it writes slowly."""
    program = (
        "import sys, time, lightning_par.data.tokenizer as t\n"
        "if __name__ == '__main__':\n"
        "    import signal\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell\n"
        "    from lightning_par.cli import main\n"
        "    import lightning_par.data.tokenize as k\n"
        "    k.plan_job.__defaults__ = (*k.plan_job.__defaults__[:-1], 1)\n"
        "    main(sys.argv[1:])\n"
        "else:\n"
        "    old = t.Bytes.encode\n"
        "    t.Bytes.encode = lambda self, texts: (time.sleep(0.2), old(self, texts))[1]\n"
    )
    script = output.parent / "slow.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "tokenize", str(corpus), "--output", str(output), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def is_group_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_leaves_no_process_and_what_can_go_on(tmp_path: Path, sent: signal.Signals) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for number in range(10, 26):
        (corpus / f"{number}.txt").write_text(str(number))
    process = start(corpus, output, "--processes", "2")
    wait_for(lambda: len(list(output.glob("*.json"))) >= 2)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # Ctrl-C goes to all
    else:
        process.send_signal(sent)
    _, said = process.communicate(timeout=20)
    wait_for(lambda: is_group_gone(process.pid))
    if sent == signal.SIGINT:
        assert process.returncode == 1
        assert said == f"stopped: the same words go on, {output} keeps the shards that are done\n"
    with pytest.raises(DataError, match=r"is no folder of tokens \(index\.json: No such file"):
        read_index(output)
    kept = {file: file.stat().st_mtime_ns for file in output.glob("[0-9]*.json")}
    assert 2 <= len(kept) < 16
    tokenize(plan_job([str(corpus)], str(output), part_bytes=1), 1)
    assert [bytes(each[:-1]).decode() for each in read(output)[1]] == list(map(str, range(10, 26)))
    assert all(file.stat().st_mtime_ns == then for file, then in kept.items())


TASKS = """
import os
from lightning_par.errors import DataError

def prepare(job):
    def run(number, advance):
        if job == "die":
            os._exit(9)
        if job == "refuse":
            raise DataError("this line cannot work")
        if job == "fail":
            raise KeyError(number)
        advance(number)
        return number * number
    return run
"""


def test_processes_that_die_or_raise_end_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_tasks.py").write_text(TASKS)  # a module of its own: the processes import it, and not torch as this one does
    monkeypatch.syspath_prepend(tmp_path)
    prepare, told = import_module("small_tasks").prepare, list[int]()
    assert dict(run_all(prepare, "work", range(7), 2, told.append)) == {number: number**2 for number in range(7)}
    assert sorted(told) == list(range(7))
    for job, error, said in (
        ("die", ProcessError, r"the process that wrote shard \d died, maybe for want of memory: run again to go on, with fewer"),
        ("refuse", DataError, r"^this line cannot work$"),
        ("fail", ProcessError, r"(?s)the process that wrote shard \d failed: run again to go on\n.*KeyError: \d"),
    ):
        with pytest.raises(error, match=said):
            list(run_all(prepare, job, [0, 1, 2], 2, told.append))


def lines(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nothing"],
            r"nothing: no such file, and a folder must have files with \.txt, \.jsonl, \.jsonl\.gz, \.parquet: for others",
        ),
        (["a.txt", "--tokenizer", "none.json"], r"--tokenizer none\.json is no file: name a tokenizer\.json, or leave it out for"),
        (["a.txt", "--tokenizer", "a.txt"], r"--tokenizer a\.txt cannot be read \(.*\): it must be a tokenizer\.json of"),
        (
            ["a.txt", "--end-of-document", "<e>"],
            r"--end-of-document <e>: bytes have no such token, documents end with byte 0: leave",
        ),
        (["a.txt", "--processes", "0"], r"0 is no number of processes: write 1 or more"),
        (["empty.txt"], r"the inputs have no text: nothing is written"),
        (["bad.jsonl"], r"bad\.jsonl, the line at byte 14: not JSON \(.*\): each line must be an object with a text"),
        (
            ["odd.jsonl"],
            r"odd\.jsonl, the line at byte 0: there is no text 'text', it has body, n: name the one to read with --column",
        ),
        (["list.jsonl"], r"there is no text 'text', it is a list: name the one to read with --column NAME"),
        (["odd.jsonl", "--column", "n"], r"there is no text 'n', it has body, n: name"),
        (["cut.jsonl.gz"], r"cut\.jsonl\.gz is no whole gzip file \(.*\): get it again, or leave it out"),
        (["a.txt", "--output", "a.txt"], r"a\.txt: File exists: nothing is lost, mend it and run again"),
    ],
)
def test_mistakes_are_named_with_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text")
    Path("empty.txt").touch()
    lines(Path("bad.jsonl"), b'{"text": "a"}\n{"text": \n')
    lines(Path("odd.jsonl"), b'{"body": "a", "n": 1}\n')
    lines(Path("list.jsonl"), b"[1]\n")
    lines(Path("cut.jsonl.gz"), gzip.compress(json.dumps({"text": "a" * 99}).encode())[:-12])
    with pytest.raises(SystemExit) as end:
        main(["tokenize", "--processes", "1", *(["--output", "out"] if "--output" not in words else []), *words])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said, said
    assert not Path("out", "index.json").exists()


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, tokenizer: str) -> None:
    other = str(train_tokenizer(tmp_path / "other.json", end="<|stop|>"))
    known = r"<\|endoftext\|> or <\|end_of_text\|> or </s> or <eos> or \[SEP\]"
    with pytest.raises(DataError, match=rf"other\.json has no token {known} to stand after a document: name one of its tokens"):
        open_tokenizer(other)
    assert open_tokenizer(other, "<|stop|>").end_of_document == 0
    with pytest.raises(
        DataError, match=r"tokenizer\.json has no token <eod> to stand after a document: .*say --end-of-document none"
    ):
        open_tokenizer(tokenizer, "<eod>")


def test_the_tokens_of_another_tokenizer_are_not_written_over(tmp_path: Path, tokenizer: str) -> None:
    corpus = [lines(tmp_path / "a.txt", b"a text")]
    tokenize(plan_job(corpus, str(tmp_path / "out")), 1)
    before = contents(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"--output .*out holds tokens of bytes, which is not the tokenizer tokenizer\.json of this call"
    ):
        tokenize(plan_job(corpus, str(tmp_path / "out"), tokenizer), 1)
    assert contents(tmp_path / "out") == before


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        DataError, match=r"^--tokenizer t\.json needs tokenizers, which is not installed: pip install 'lightning-par\[data\]'"
    ):
        open_tokenizer("t.json")
    (tmp_path / "broken_library.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):  # it is there, and something of its own is not
        extra.need("broken_library", "this")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "index.json").unlink(),
            r"is no folder of tokens \(index\.json: No such file or directory\): make one with",
        ),
        (
            lambda f: (f / "index.json").write_text("{"),
            r"index\.json is damaged \(.*\): run `lightning-par tokenize` again as before",
        ),
        (
            lambda f: (f / "index.json").write_text("{}"),
            r"does not say 'lightning_par tokens 1', so something else wrote it: make one",
        ),
        (lambda f: edit(f, dtype="int64"), r"index\.json is damaged \(dtype 'int64'\): run `lightning-par tokenize` again"),
        (lambda f: edit(f, shards=[{}]), r"index\.json is damaged \(TypeError.*\): run `lightning-par tokenize` again"),
        (
            lambda f: (f / "00000.bin").write_bytes(b"1"),
            r"the files of shards 00000 are missing or not as long as index\.json says",
        ),
        (lambda f: (f / "00000.end").unlink(), r"the files of shards 00000 are missing or not as long as index\.json says"),
    ],
)
def test_a_folder_that_is_damaged_says_so(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    folder = tmp_path / "out"
    tokenize(plan_job([str(tmp_path / "a.txt")], str(folder)), 1)
    change(folder)
    with pytest.raises(DataError, match=message):
        read_index(folder)


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **changes}))


def test_help_does_not_wait_for_numpy() -> None:
    program = "import sys, lightning_par.cli; print([name for name in ('numpy', 'tokenizers', 'datasets') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout.strip() == "[]"
