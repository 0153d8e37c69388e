"""Steps that run their blocks again and again, as one that generates tokens does."""

from __future__ import annotations

NUM_PASSES = 2  # the first one tells the plan, the second one proves it: with a cache it gets other shapes


class PassesSeen(BaseException):
    """Ends a dry run where a further pass would begin; not an Exception, so that no handler of the user's stops it."""


class Loop:
    """Tells the passes of a dry run over the blocks apart.

    A pass begins where the step calls a module after the blocks that it called before them.

    Attributes:
        end: how many operations the first pass has; None where there was no second.
        num_passes: how often the first block was called.
    """

    def __init__(self) -> None:
        self.end: int | None = None
        self.num_passes = 0
        self._before: set[str] = set()  # modules called before the blocks, or around them
        self._again: int | None = None  # operations before the first of them was called again

    def enter(self, module: str, num_ops: int, is_complete: bool) -> None:
        """The step calls a module, after ``num_ops`` operations; ``is_complete``: all blocks have run."""
        if self.num_passes == 0:
            self._before.add(module)
        elif is_complete and self._again is None and module in self._before:
            self._again = num_ops

    def enter_blocks(self, num_ops: int) -> None:
        """The first block is called.

        Raises:
            PassesSeen: `NUM_PASSES` times before.
        """
        if self.num_passes == NUM_PASSES:
            raise PassesSeen
        if self.num_passes == 1:
            self.end = num_ops if self._again is None else self._again
        self.num_passes += 1
