"""What the thread that runs the steps is doing, read off its Python stack by another thread."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

# A file whose frame anywhere in the stack says that a step takes long for a reason; a part of its path.
_COMPILES = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/compile_fx.py")
_DEBUGS = ("/pdb.py", "/bdb.py", "/pydevd", "/debugpy/")
# A file that waits for other ranks, where it is among the innermost frames.
_WAITS = ("/torch/distributed/", "/deepspeed/comm/", "/lightning_par/runtime/")
_NUM_INNERMOST = 3  # a collective ends in torch/_ops.py or in a wrapper that logs the call


def stacks_of(thread: int) -> list[list[FrameType]]:
    """The frames of a thread, and of threads that Python did not start, outermost first.

    Args:
        thread: its `threading.get_ident`. Autograd runs the backward of a GPU in threads of its own, which are C++'s.
    """
    known = {other.ident for other in threading.enumerate()} - {thread}
    current = sys._current_frames()
    chosen = [current.pop(thread)] if thread in current else []
    chosen += [frame for other, frame in current.items() if other not in known]
    return [_from_outermost(frame) for frame in chosen]


def reason_to_wait(stacks: list[list[FrameType]]) -> str | None:
    """Why an action may take as long as it does: it compiles, waits for other ranks, or stands in a debugger. Else None."""
    frames = [frame for stack in stacks for frame in stack]
    if any(frame.f_trace is not None or _is_in(frame, _DEBUGS) for frame in frames):
        return "debugger"
    if any(_is_in(frame, _COMPILES) for frame in frames):
        return "compilation"
    if any(_is_in(frame, _WAITS) for stack in stacks for frame in stack[-_NUM_INNERMOST:]):
        return "collective"
    return None


def render_stacks(stacks: list[list[FrameType]]) -> str:
    """As Python prints a traceback, the innermost call last."""
    return "\n".join("".join(traceback.format_stack(stack[-1])) for stack in stacks)


def _from_outermost(frame: FrameType) -> list[FrameType]:
    frames = []
    current: FrameType | None = frame
    while current is not None:
        frames.append(current)
        current = current.f_back
    return frames[::-1]


def _is_in(frame: FrameType, files: tuple[str, ...]) -> bool:
    return any(file in frame.f_code.co_filename for file in files)
