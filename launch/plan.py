"""What a run needs: `python launch/plan.py model=... data=... plan.device=h100_80gb`."""

from omegaconf import DictConfig

from selfsight.build import application


def plan(config: DictConfig, name: str) -> None:
    # torch is imported from here on: `--help`, `--cfg job` and mistakes answer without it
    from selfsight.planning.command import plan

    plan(config)


if __name__ == "__main__":
    application(
        "plan",
        plan,
        sections={"plan": "selfsight.planning.settings.Plan"},
        named_after=("model", "data"),
    )
