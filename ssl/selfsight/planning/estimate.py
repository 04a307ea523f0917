"""From a rehearsal and a machine to a plan: time, traffic, data, and the smallest cluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfsight.planning.hardware import Hardware
from selfsight.planning.rehearsal import Rehearsal

ROOM = 0.92  # of a device's memory; the rest is the allocator's, cuDNN's and NCCL's
INSIDE = 150e9  # bytes a second between devices of one node
MOST_GPUS = 4096


@dataclass
class Estimate:
    """Of one configuration on so many devices. Bytes, seconds, images.

    Attributes:
        rate: images a second of all devices, if the loader keeps up.
        network: seconds that one update's traffic takes by itself.
        checkpoint: bytes of one checkpoint.
    """

    gpus: int
    rate: float
    step_seconds: float
    hours: float | None
    network: float
    data_rate: float
    loader_cores: int
    checkpoint: float
    checkpoint_seconds: float


def share_of_peak(found: Rehearsal, device: Hardware) -> float:
    """The share that training reaches: that of convolutions and of all else, by their work."""
    total = sum(found.macs.values()) or 1
    conv = found.macs.get("convolutions", 0) / total
    return 1 / (conv / device.conv + (1 - conv) / device.transformer)


def estimate(
    config: Any,
    found: Rehearsal,
    device: Hardware,
    *,
    share: float,
    network: float | None,
    per_node: int,
    disk: float,
    image_bytes: float,
    images_per_core: float,
    steps: int | None,
) -> Estimate:
    """The plan of a rehearsed configuration. `share` is of the device's peak; `network` and `disk`
    are bytes a second."""
    compute = 2 * sum(found.macs.values()) / (device.flops * share)
    gpus = found.ranks
    crossing = gpus > per_node
    speed = (network or device.network) if crossing else INSIDE
    moved = sum(size * ring(kind, gpus) for kind, size in found.traffic.items())
    whole_states = found.weights + found.optimizer
    if config.strategy == "fsdp":
        whole_states *= gpus
    checkpoint = whole_states + sum(found.buffers.values())
    rate = config.batch_size / compute
    return Estimate(
        gpus=gpus,
        rate=rate,
        step_seconds=compute,
        hours=None if steps is None else steps * compute / 3600,
        network=moved / speed if gpus > 1 else 0.0,
        data_rate=rate * image_bytes,
        loader_cores=math.ceil(rate / gpus / images_per_core),
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint / disk,
    )


def ring(kind: str, gpus: int) -> float:
    """Bytes a device sends for each byte it hands to a collective."""
    once = (gpus - 1) / gpus
    return 2 * once if kind == "all-reduce" else once


@dataclass(frozen=True)
class Fit:
    """The fewest devices on which a run fits, and how."""

    gpus: int
    images: int
    checkpointing: bool
    strategy: str


def smallest(found: Rehearsal, other: Rehearsal, checkpointing: bool, memory: float) -> Fit | None:
    """The fewest devices that hold an update, the rest of the batch being accumulated: weights on
    each if they fit, or else a share of them (FSDP2).

    Args:
        found, other: Rehearsals with and without the configuration's checkpointing; their
            activations are taken to grow with the images of a pass.
        checkpointing: Whether `found` has it.
    """
    room = ROOM * memory
    for rehearsal, on in ((found, checkpointing), (other, not checkpointing)):
        each = rehearsal.activations / max(1, rehearsal.images // rehearsal.parts)
        free = room - rehearsal.states - rehearsal.gradients
        if free >= 2 * each:  # BatchNorm and Sinkhorn want two at least
            return Fit(1, _below(free / each, rehearsal.images), on, "ddp")
    lean = min((found, other), key=lambda r: r.activations)
    on = checkpointing if lean is found else not checkpointing
    each = lean.activations / max(1, lean.images // lean.parts)
    # Sharded, one unit of the trunk is whole at a time: the largest about a tenth of the weights.
    for gpus in (2**n for n in range(1, 13)):
        held = (lean.states + lean.gradients) / gpus + 0.1 * lean.weights
        if room - held >= 2 * each:
            return Fit(gpus, _below((room - held) / each, lean.images), on, "fsdp")
    return None


def _below(most: float, images: int) -> int:
    """The largest power of two up to `most`, at most `images` or what it is a multiple of."""
    return min(images, 2 ** int(math.log2(max(1, most))))


def rescaled(config: Any, gpus: int) -> Mapping[str, Any] | None:
    """What the values that depend on the batch become on so many devices with as many images each;
    None where the batch stays as it is."""
    each = config.batch_size // config.gpus
    batch = each * gpus
    ratio = batch / config.batch_size
    method, schedule = config.method, config.schedule
    values: dict[str, Any] = {"batch_size": batch}
    peak = schedule.lr.get("peak", schedule.lr.get("value"))
    if peak is not None:
        values["learning rate (by the batch)"] = peak * ratio
        if "adamw" in str(config.optim.optimizer.get("_target_", "")).lower():
            values["learning rate (by its root)"] = peak * math.sqrt(ratio)
    if isinstance(config.steps, int):
        values["updates"] = math.ceil(config.steps / ratio)
    for key in ("freeze_prototypes_steps", "freeze_last_layer_steps"):
        if method.get(key):
            values[f"method.{key}"] = max(1, round(method[key] / ratio))
    warmup = schedule.get("warmup_steps")
    if isinstance(warmup, int) and warmup:
        values["schedule.warmup_steps"] = max(1, round(warmup / ratio))
    if method.get("teacher_momentum"):
        values["method.teacher_momentum"] = method["teacher_momentum"] ** ratio
    if method.get("queue_length"):
        values["method.queue_length"] = max(1, round(method["queue_length"] / batch)) * batch
    return values
