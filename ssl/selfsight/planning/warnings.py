"""Where a run leaves the range in which its recipe was tried."""

from collections.abc import Iterator
from typing import Any

from selfsight.planning.estimate import ROOM, Estimate
from selfsight.planning.hardware import Hardware
from selfsight.planning.rehearsal import Rehearsal


def warnings(
    config: Any, found: Rehearsal, plan: Estimate, device: Hardware, steps: int | None
) -> Iterator[str]:
    """Sentences, each naming the key to change."""
    method, batch = config.method, config.batch_size
    if found.peak > ROOM * device.memory:
        yield (
            f"an update needs {found.peak / 1e9:.1f} GB and {device.name} has "
            f"{device.memory / 1e9:.1f}: lower images_per_device, or set "
            "activation_checkpointing=true or strategy=fsdp"
        )
    counts = method.get("prototypes")
    count = counts[0] if counts and not isinstance(counts, int) else counts
    if isinstance(count, int) and count > 8 * batch and not method.get("queue_length"):
        yield (
            f"{count:,} prototypes for {batch:,} images an update leave most without any: fewer "
            "method.prototypes, or a method.queue_length (SwAV at 256 images: 3,840 of 3,000)"
        )
    epsilon = method.get("epsilon")
    if epsilon is not None and epsilon > 0.03 and isinstance(count, int) and batch < 1024:
        yield (f"method.epsilon={epsilon:g} often stays at ln K with small batches: 0.03 is safer")
    freeze = method.get("freeze_prototypes_steps") or method.get("freeze_last_layer_steps") or 0
    if steps and freeze > steps / 4:
        yield f"prototypes are frozen for {freeze:,} of {steps:,} updates: freeze fewer"
    warmup = config.schedule.get("warmup_steps")
    if steps and isinstance(warmup, int) and warmup > steps / 3:
        yield f"schedule.warmup_steps={warmup:,} is more than a third of {steps:,} updates"
    own = found.images // found.parts
    if (
        any(kind == "trunk" for kind in found.buffers)
        and config.sync_batchnorm_group == 1
        and own < 16
    ):
        yield (
            f"BatchNorm sees {own} images of a device at a time: leave sync_batchnorm_group at "
            "null, or raise images_per_device"
        )
    if plan.network > 0.5 * plan.step_seconds:
        yield (
            f"the network needs {plan.network:.2g} s of an update of {plan.step_seconds:.2g} s: "
            "compress_gradients=bf16, or more images a device"
        )
    group = config.model.trunk.get("group_width")
    if group and group > 8 and group % 8 and "CPU" not in device.name:
        yield (
            f"model.trunk.group_width={group} is no multiple of 8: grouped convolutions of GPUs "
            "are slow at such widths, and the rate may be lower"
        )
    if plan.loader_cores > 16:
        yield (
            f"each device wants {plan.loader_cores} loader cores: loader.colour=device lets it do "
            "part of their work"
        )
    if plan.hours and plan.gpus >= 64:
        failures = plan.hours * plan.gpus / 1024 / 7.9
        if failures > 1:
            yield (
                f"about {failures:.0f} hardware failures are to be expected in {plan.hours:.0f} h "
                f"on {plan.gpus} GPUs (a mean of 7.9 h on 1,024 GPUs was reported): keep "
                "checkpoint.every small and cluster.restarts on"
            )
