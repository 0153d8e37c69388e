"""The log of one rank: what is in its file, and what stands before each line."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_par.host.launch.rank_log import RankLog
from lightning_par.layout import Layout

LAYOUT = Layout(tp=2, pp=2, dp=3)
AT = "rank 7 (pp 1, dp 0, tp 1)"
log = logging.getLogger("a.user")


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[io.StringIO]:
    """The root logger as Hydra leaves it: a console, and a file of the job."""
    root, stream = logging.getLogger(), io.StringIO()
    saved = root.handlers, root.level
    handlers: list[logging.Handler] = [logging.StreamHandler(stream), logging.FileHandler(tmp_path / "train.log")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root.handlers, root.level = handlers, logging.INFO
    yield stream
    root.handlers, root.level = saved
    for handler in handlers:
        handler.close()


def test_every_line_has_the_name_of_the_rank(console: io.StringIO, tmp_path: Path) -> None:
    with RankLog(True, "rank 7") as rank_log:
        log.info("early")
        path = rank_log.open(tmp_path, LAYOUT, 7)
        log.info("two\nlines")
        warnings.warn("careful", stacklevel=1)
        print("a print of the first rank stays on the console")
    log.info("after")
    assert path == tmp_path / "ranks" / "rank_07_pp1_dp0_tp1.log"
    shown = console.getvalue().splitlines()
    assert shown[:3] == ["[rank 7] INFO early", f"[{AT}] INFO two", f"[{AT}] lines"]
    assert shown[3].startswith(f"[{AT}] WARNING ") and shown[3].endswith("UserWarning: careful")
    assert shown[-1] == "INFO after"
    assert (tmp_path / "train.log").read_text() == console.getvalue()
    written = path.read_text().splitlines()
    assert all(line.startswith("[rank 7] [" if index == 0 else f"[{AT}] ") for index, line in enumerate(written))
    assert written[0].endswith("[a.user][INFO] - early")
    assert [line.rpartition(" - ")[2] for line in written[1:3]] == ["two", f"[{AT}] lines"]
    assert "[py.warnings][WARNING]" in written[3]
    assert "print of" not in path.read_text() and "after" not in path.read_text()


def test_what_other_ranks_print_is_in_their_files_and_the_file_of_the_job_is_the_firsts(
    console: io.StringIO, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stdout = sys.stdout
    with RankLog(False, "rank 7") as rank_log:
        print("early")
        path = rank_log.open(tmp_path, LAYOUT, 7)
        assert rank_log.open(tmp_path, LAYOUT, 7) == path, "another Trainer of the job"
        print("late", file=sys.stderr)
        log.info("logged")
        kept = sys.stdout
        assert kept.fileno() == stdout.fileno()
    assert sys.stdout is stdout
    print("over", file=kept)
    assert capfd.readouterr() == ("early\nover\n", "late\n")
    assert (tmp_path / "train.log").read_text() == ""
    assert path.read_text().splitlines()[:2] == ["early", "late"]
    assert path.read_text().endswith("[a.user][INFO] - logged\n")


@pytest.mark.parametrize("is_first", [True, False])
def test_what_a_rank_raises_is_in_its_file(is_first: bool, console: io.StringIO, tmp_path: Path) -> None:
    def fail() -> None:
        with RankLog(is_first, "") as rank_log:
            rank_log.open(tmp_path, LAYOUT, 7)
            print(1 / 0)

    with pytest.raises(ZeroDivisionError):
        fail()
    (path,) = tmp_path.glob("ranks/*")
    assert path.read_text().endswith("ZeroDivisionError: division by zero\n")
    assert console.getvalue() == "", "Hydra shows it"


def test_a_rank_that_is_alone_has_no_log_of_its_own(console: io.StringIO) -> None:
    with RankLog(True, "") as rank_log:
        assert RankLog.current() is rank_log
        rank_log.leave()
        assert RankLog.current() is None
        log.info("as ever")
    assert console.getvalue() == "INFO as ever\n"


def test_each_job_of_a_sweep_has_its_own(console: io.StringIO, tmp_path: Path) -> None:
    for job in "ab":
        with RankLog(False, "") as rank_log:
            path = rank_log.open(tmp_path / job, LAYOUT, 7)
            log.info(job)
        assert path.read_text().endswith(f"- {job}\n")
    assert (tmp_path / "a" / "ranks" / path.name).read_text().count("\n") == 1


def test_ranks_of_large_runs_sort_by_their_names(tmp_path: Path, console: io.StringIO) -> None:
    with RankLog(False, "") as rank_log:
        assert rank_log.open(tmp_path, Layout(dp=1001), 7).name == "rank_0007_pp0_dp7_tp0.log"
