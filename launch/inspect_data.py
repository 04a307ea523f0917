"""Look into the images of a run: `python launch/inspect_data.py data=... inspect.samples=1000`."""

from omegaconf import DictConfig

from selfsight.build import application


def inspect_data(config: DictConfig, name: str) -> None:
    # torch is imported from here on: `--help`, `--cfg job` and mistakes answer without it
    from selfsight.inspection.inspection import inspect_data

    inspect_data(config, name)


if __name__ == "__main__":
    application(
        "inspect_data",
        inspect_data,
        sections={"inspect": "selfsight.inspection.settings.Inspect"},
        named_after=("data",),
    )
