"""Which rank is blamed for standing still, without ranks: looks by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest

from lightning_par import HybridParallelStrategy
from lightning_par.errors import ConfigurationError
from lightning_par.host.launch.link import join_parent, link_words
from lightning_par.host.launch.pulse import Pulse, share_memory
from lightning_par.runtime import stack, watchdog
from lightning_par.runtime.watchdog import Watch, Watchdog

HANG_SECONDS, TIMEOUT_SECONDS = 5.0, 50.0


class Recorder:
    """A supervisor that ends nothing."""

    counts_heartbeats = True

    def __init__(self) -> None:
        self.expected: list[float] = []
        self.words: list[str] = []

    def expect(self, seconds: float) -> None:
        self.expected.append(seconds)

    def end(self, words: str) -> None:
        self.words.append(words)


class Watched:
    """A watchdog whose looks are made here, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dog, self.supervisor, self.now, self.is_busy = Watchdog(), Recorder(), 0.0, False
        self.watch = Watch(self.supervisor, "rank 7", HANG_SECONDS, TIMEOUT_SECONDS, lambda: self.is_busy)
        monkeypatch.setattr(watchdog.threading.Thread, "start", lambda thread: None)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        self.reason: str | None = None
        monkeypatch.setattr(watchdog, "reason_to_wait", lambda stacks: self.reason)
        self.dog.start(self.watch)

    def look(self, count: int) -> None:
        for _ in range(count):
            self.now += watchdog.LOOK_SECONDS
            self.dog.look(self.watch)

    def run(self, *actions: tuple[str, int], kind: str = "train") -> None:
        """A step whose actions last so many looks."""
        with self.dog.step(kind):
            for action, looks in actions:
                self.dog.begin(action)
                self.look(looks)
                self.dog.end()


def fail_in_step(dog: Watchdog) -> None:
    with dog.step("train"):
        dog.begin("F0")
        raise RuntimeError("the user's")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_an_action_that_does_not_end_is_blamed_once_it_is_known_how_long_it_takes(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.run(("F0", 0))
    with watched.dog.step("train"):
        watched.dog.begin("F0")
        watched.look(5)
        assert not watched.supervisor.words, "seen first, then 4 s more"
        watched.look(1)
    assert watched.supervisor.words == ["stands still in F0: 5 s without an end"]
    error = capsys.readouterr().err
    assert error.startswith("lightning_par: rank 7 stands still in F0: 5 s without an end; it is in\n")
    assert "watched.look(1)" in error, "the stack of the thread that runs the steps"


def test_the_first_step_of_a_kind_may_take_until_the_timeout(watched: Watched) -> None:
    watched.run(("F0", 40))
    watched.run(("F0", 40), kind="evaluate")
    assert not watched.supervisor.words
    watched.run(("F0", 52), kind="predict")
    assert len(watched.supervisor.words) == 2, "50 and 51 s, since this one ends nothing"
    watched.supervisor.words.clear()
    watched.run(("F0", 6))
    assert watched.supervisor.words, "how long the first step took, compiling, is no measure"


def test_a_slow_action_is_the_measure_of_a_slower_one(watched: Watched) -> None:
    watched.run(("F0", 0))
    watched.run(("F0", 3), ("B0", 1))  # seen for 2 s
    assert watched.dog._slowest_seconds == pytest.approx(2.0)
    watched.run(("F0", 40))
    assert not watched.supervisor.words, "20 x 2 s"
    watched.run(("F0", 55))
    assert watched.supervisor.words[0].startswith("stands still in F0: 50 s"), "never longer than the timeout"


def test_a_rank_that_waits_is_not_blamed(watched: Watched) -> None:
    watched.run(("F0", 0))
    with watched.dog.step("train"):
        watched.dog.begin("F1")
        watched.look(1)
        watched.dog.wait()
        watched.look(30)
        watched.dog.arrive()
        watched.look(5)
        assert not watched.supervisor.words
        watched.look(1)
        assert watched.supervisor.words == ["stands still in F1: 5 s without an end"]


def test_outside_of_a_step_nothing_is_too_long(watched: Watched) -> None:
    watched.run(("F0", 0))
    watched.look(100)
    with pytest.raises(RuntimeError, match="the user's"):
        fail_in_step(watched.dog)
    watched.look(100)
    assert not watched.supervisor.words


@pytest.mark.parametrize("reason", ["debugger", "compilation", "collective", "device"])
def test_time_with_a_reason_does_not_count(reason: str, watched: Watched) -> None:
    watched.run(("F0", 0))
    with watched.dog.step("train"):
        watched.dog.begin("F0")
        watched.look(4)
        watched.reason, watched.is_busy = (None, True) if reason == "device" else (reason, False)
        watched.look(100)
        watched.reason, watched.is_busy = None, False
        watched.look(4)
        assert not watched.supervisor.words
        watched.look(1)
        assert watched.supervisor.words


def test_answers_are_expected_in_steps_only_and_no_longer_once_stopped(watched: Watched) -> None:
    watched.run(("F0", 0))
    watched.run(("F0", 0))
    assert watched.supervisor.expected == [TIMEOUT_SECONDS, 0, HANG_SECONDS, 0]
    watched.dog.stop()
    watched.run(("F0", 0))
    assert len(watched.supervisor.expected) == 4


@pytest.mark.parametrize("seconds", [0, -1, 0.5, float("nan")])
def test_a_time_that_no_watchdog_can_wait(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"hang_seconds={seconds}: a watchdog looks once a second, .* use 20, or None"):
        HybridParallelStrategy("pp2", hang_seconds=seconds)


# ---------------------------------------------------------------------- what a stack says


def frames_in(path: str) -> list[FrameType]:
    """The stack of a thread that stands in code of a file called ``path``."""
    reached, gate = threading.Event(), threading.Lock()
    code = compile("reached.set()\ngate.acquire()", path, "exec")
    with gate:
        thread = threading.Thread(target=exec, args=(code, {"reached": reached, "gate": gate}))
        thread.start()
        reached.wait()
        assert thread.ident is not None
        return stack.stacks_of(thread.ident)[0]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/lib/torch/_dynamo/convert_frame.py", "compilation"),
        ("/lib/torch/_inductor/compile_fx.py", "compilation"),
        ("/lib/torch/_dynamo/eval_frame.py", None),  # compiled code that runs
        ("/lib/python3.11/pdb.py", "debugger"),
        ("/lib/pydevd/pydevd.py", "debugger"),
        ("/home/user/model.py", None),
    ],
)
def test_reasons_are_read_off_the_files_of_the_stack(path: str, reason: str | None) -> None:
    assert stack.reason_to_wait([frames_in(path)]) == reason


def test_a_collective_is_a_reason_only_where_it_is_innermost() -> None:
    inside, user = frames_in("/lib/torch/distributed/distributed_c10d.py"), frames_in("/home/user/model.py")
    assert stack.reason_to_wait([inside]) == "collective"
    assert stack.reason_to_wait([[*inside, *user]]) is None, "user's code that a collective calls"


def test_a_traced_frame_is_in_a_debugger() -> None:
    frame = frames_in("/home/user/model.py")[-1]
    frame.f_trace = lambda *event: None
    assert stack.reason_to_wait([[frame]]) == "debugger"
    frame.f_trace = None


# ---------------------------------------------------------------------- heartbeats


def test_silence_counts_where_answers_are_expected() -> None:
    memory = share_memory(2)
    ours, theirs = Pulse(os.dup(memory), 0), Pulse(memory, 1)
    assert [ours.silent_seconds(1, 1.0) for _ in range(9)] == [0.0] * 9, "nothing is expected of one that has not begun"
    theirs.expect(2.5)
    assert [ours.silent_seconds(1, 1.0) for _ in range(4)] == [0.0, 0.0, 0.0, 4.0], "3 s are allowed"
    theirs.beat()
    assert ours.silent_seconds(1, 1.0) == 0.0
    theirs.expect(0)
    assert [ours.silent_seconds(1, 1.0) for _ in range(9)] == [0.0] * 9


def test_a_process_that_no_rank_started_has_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_parent() is None
    assert link_words(1, 2, 3, 0) == {"LIGHTNING_PAR_PARENT": "1 2 3 0"}


@pytest.mark.alone
def test_the_alarm_ends_a_process_that_runs_no_python() -> None:
    program = (
        "import re\nfrom lightning_par.runtime.alarm import Alarm\n"
        "alarm = Alarm()\nalarm.extend(0.1)\nalarm.begin(0.1)\nalarm.cancel()\nalarm.extend(0.1)\n"
        "import time; time.sleep(0.4); print('not cancelled in vain', flush=True)\n"
        "alarm.begin(0.1)\nalarm.extend(0.3)\nre.match('(a?){64}a{64}$', 'a' * 63 + 'b')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stdout == "not cancelled in vain\n"
    assert 'File "<string>", line' in result.stderr
    assert time.monotonic() - begin < 20
