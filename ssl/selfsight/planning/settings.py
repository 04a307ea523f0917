"""What `launch/plan.py` can be told beside what a run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The section `plan`; conf/plan.yaml says what each key does."""

    device: str = "auto"
    gpus: int | None = None
    per_node: int = 8
    share: float | None = None
    measure: bool | None = None
    seconds: float = 20.0
    network: float | None = None
    disk: float = 1.0
    image_kb: float = 110.0
    images_per_core: float = 90.0
    out: str | None = None
