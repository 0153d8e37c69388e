"""What the code of a step does on every stage of a pipeline, because it runs before the stage's blocks."""

from __future__ import annotations

from lightning_par.layout import Layout
from lightning_par.trace import Trace


def side_effects(trace: Trace, layout: Layout) -> tuple[str, ...]:
    """Notes on changes of buffers, and of tensors that are attributes of modules, outside of the blocks.

    Code before the blocks and between them runs on every later stage too, once for each microbatch.
    """
    if layout.pp == 1:
        return ()
    end = 2 * trace.num_blocks
    found = {path: name for path, name, phase in trace.writes if phase < end and phase % 2 == 0}
    return tuple(
        f"{path} is changed before the last block ({name}): that happens on every later stage, once for each microbatch; what the "
        "change reads of earlier stages are placeholders there"
        for path, name in found.items()
    )
