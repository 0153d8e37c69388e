"""Train a model in any layout.

python train.py                                   # one process
python train.py parallel=tp2_pp2                  # two-way tensor parallel, two pipeline stages
python train.py parallel=tp4_pp2_zero1 trainer.devices=16
python train.py -m parallel=tp2,pp2,dp2_zero1     # one run after another
torchrun --nproc-per-node 8 train.py parallel=tp4_pp2
python train.py --help                            # every group and value
"""

from __future__ import annotations

from omegaconf import DictConfig

from lightning_par.config.app import app
from lightning_par.config.devices import choose_devices
from lightning_par.config.parallel import read_layout


@app(config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    layout = read_layout(config.parallel)

    import pytorch_lightning as pl  # imported here, so that --help, completion and config errors do not wait for it
    from hydra.utils import instantiate

    from lightning_par import HybridParallelStrategy

    pl.seed_everything(config.seed, workers=True)
    module = instantiate(config.model, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    build_trainer = instantiate(config.trainer, _convert_="all", _partial_=True, **choose_devices(config.trainer, layout))
    trainer = build_trainer(
        strategy=HybridParallelStrategy(layout, plan=instantiate(config.plan, _convert_="all"), schedule=config.schedule),
        callbacks=list(instantiate(config.callbacks, _convert_="all").values()),
        logger=instantiate(config.logger, _convert_="all"),
    )
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
