"""A Hydra program for tests/test_launcher.py: job by job, as many ranks as its config says.

python tests/launched_hydra.py --multirun ranks=2,3
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hydra.core.hydra_config import HydraConfig
from launched import act, build
from omegaconf import DictConfig

from lightning_par.config.app import app
from lightning_par.host.launch.record import this_attempt


@app(config_path="launched_conf", config_name="launched")
def main(config: DictConfig) -> None:
    def work() -> None:
        attempt = this_attempt()
        if config.die and attempt is not None and attempt.restart == 0:
            act("die" if os.environ["LOCAL_RANK"] == "1" else "wait", Path())
        job = HydraConfig.get().job
        folder = Path(HydraConfig.get().runtime.output_dir)
        values = os.environ["WORLD_SIZE"], config.text, job.get("num", 0), job.name
        (folder / f"rank-{os.environ['LOCAL_RANK']}").write_text(" | ".join(map(str, values)))
        assert config.ranks != 4, "a job that fails"

    build(config.ranks, max_restarts=config.max_restarts).launch(work)


if __name__ == "__main__":
    main()
