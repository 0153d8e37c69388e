"""DeepSpeed's engine, taken out of its own control flow. Read in DeepSpeed 0.19.8.

ZeRO there is bound to ``engine.forward`` and ``engine.backward``; a pipeline runs several microbatches through parts of the
module and reduces once. So the engine is built, its gradient hooks are removed, and what they would have called is called
here, once per optimizer step. Nothing in this folder imports DeepSpeed before `start_zero_engine` runs: a run without ZeRO
never loads it.
"""

from lightning_par.private.deepspeed.engine import ZeroEngine
from lightning_par.private.deepspeed.mark import mark_stepped
from lightning_par.private.deepspeed.operator import check_operator, load_async_io, missing_for_operators
from lightning_par.private.deepspeed.start import import_deepspeed, quieten_deepspeed, start_zero_engine
from lightning_par.private.deepspeed.traffic import Traffic
from lightning_par.private.deepspeed.version import DEEPSPEED_VERSION, check_deepspeed

__all__ = [
    "DEEPSPEED_VERSION",
    "Traffic",
    "ZeroEngine",
    "check_deepspeed",
    "check_operator",
    "import_deepspeed",
    "load_async_io",
    "mark_stepped",
    "missing_for_operators",
    "quieten_deepspeed",
    "start_zero_engine",
]
