"""Pretrain a trunk: `python launch/pretrain.py model=... data=... key=value`."""

from omegaconf import DictConfig

from selfsight.build import application


def pretrain(config: DictConfig, name: str) -> None:
    # torch is imported from here on: `--help`, `--cfg job` and mistakes answer without it
    from selfsight.cluster import launch
    from selfsight.train import pretrain

    launch(config, name, pretrain)


if __name__ == "__main__":
    application("pretrain", pretrain)
