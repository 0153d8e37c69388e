"""Train a model in any layout.

python train.py                                   # the main job: tp2_pp2, four processes
python train.py parallel=tp2_pp2                  # two-way tensor parallel, two pipeline stages
python train.py parallel=tp4_pp2_zero1 trainer.devices=16
python train.py -m parallel=tp2,pp2,dp2_zero1     # one run after another
torchrun --nproc-per-node 8 train.py parallel=tp4_pp2
python train.py --help                            # every group and value
"""

from __future__ import annotations

from omegaconf import DictConfig

from lightning_par.config.app import app
from lightning_par.config.run import build_run


@app(config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    trainer, module, data = build_run(config)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
