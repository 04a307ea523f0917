"""`launch/plan.py`: a run's needs, printed before it is started."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.build import build
from selfsight.config import ConfigError
from selfsight.planning.estimate import Estimate, estimate, rescaled, share_of_peak, smallest
from selfsight.planning.hardware import Hardware, hardware
from selfsight.planning.measure import Measured, measure
from selfsight.planning.rehearsal import Rehearsal, rehearse
from selfsight.planning.settings import Plan
from selfsight.planning.warnings import warnings
from selfsight.runtime import free_memory, usable_cores

SCALES = (1, 8, 64, 512)


def plan(config: DictConfig) -> dict[str, Any]:
    """Plan a checked configuration; prints the table and returns it as plain values.

    Raises:
        ValueError: one sentence about something asked for that cannot be done.
    """
    section: Any = OmegaConf.to_container(config.plan, resolve=True)
    settings = Plan(**section)
    _check(settings)
    steps, count = _length(config)
    gpus = settings.gpus or int(config.gpus)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = hardware(settings.device, usable_cores(), free_memory(here))
    _say("rehearsing an update; the largest models take a minute or two ...")
    found = rehearse(config, gpus, settings.per_node)
    checkpointing = bool(config.activation_checkpointing)
    other = rehearse(config, gpus, settings.per_node, activation_checkpointing=not checkpointing)
    local = settings.device in ("auto", here.type)
    measured = None
    if settings.measure or (settings.measure is None and local):
        measured = _measured(config, found, here, settings.seconds)
    share, source = _share(settings, found, device, measured)
    made = estimate(
        config,
        found,
        device,
        share=share,
        network=None if settings.network is None else settings.network * 1e9,
        per_node=settings.per_node,
        disk=settings.disk * 1e9,
        image_bytes=settings.image_kb * 1e3,
        images_per_core=settings.images_per_core,
        steps=steps,
    )
    fit = smallest(found, other, checkpointing, device.memory)
    told = list(warnings(config, found, made, device, steps))
    lines = _lines(config, settings, found, other, made, device, share, source, count)
    print("\n".join(lines))
    print(_fit_text(fit, device))
    for line in _scales(config):
        print(line)
    for text in told:
        print(f"! {text}")
    result = {
        "rehearsal": asdict(found),
        "other_checkpointing": asdict(other),
        "estimate": asdict(made),
        "share_of_peak": share,
        "measured": None if measured is None else asdict(measured),
        "smallest": None if fit is None else asdict(fit),
        "warnings": told,
    }
    if settings.out:
        Path(settings.out).expanduser().write_text(json.dumps(result, indent=1) + "\n")
    return result


def _check(settings: Plan) -> None:
    for name in ("gpus", "per_node", "share", "seconds", "network", "disk", "image_kb"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"plan.{name}={value} must be above 0")
    if settings.share is not None and settings.share > 1:
        raise ConfigError(f"plan.share={settings.share} is a share: at most 1")


def _length(config: DictConfig) -> tuple[int | None, int | None]:
    """Updates of the run, None where they cannot be told; and images of one pass over the data."""
    if isinstance(config.steps, int) or config.steps is None:
        return config.steps, None
    try:
        count = len(build(config.data.train))
    except (ValueError, OSError):
        _say("the images cannot be counted here: give images= or steps= for the run's length")
        config.steps = 10**6  # schedules need an end
        return None, None
    config.steps = math.ceil(config.epochs * count / config.batch_size)
    return config.steps, count


def _measured(
    config: DictConfig, found: Rehearsal, device: torch.device, seconds: float
) -> Measured | None:
    images = max(1, found.images // found.parts)
    room = free_memory(device)
    while room is not None and images > 2:
        if (
            found.states + found.gradients + found.activations * images * found.parts / found.images
            < (0.7 * room)
        ):
            break
        images //= 2
    if room is not None and found.states + found.gradients > 0.7 * room:
        _say("the model does not fit here: nothing is measured")
        return None
    threads = config.cluster.threads or max(1, usable_cores() - 1)
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure(config, images, device, seconds)
    finally:
        torch.set_num_threads(kept)


def _share(
    settings: Plan, found: Rehearsal, device: Hardware, measured: Measured | None
) -> tuple[float, str]:
    if settings.share is not None:
        return settings.share, "as given"
    if measured is not None:
        work = 2 * found.macs_per_image * measured.images
        reached = work / measured.seconds / device.flops
        return reached, (
            f"measured here: {measured.images} images in {measured.seconds:.3g} s, without a loader"
        )
    source = "as published runs reached" if device.published else "an estimate"
    return share_of_peak(found, device), source


def _lines(
    config: DictConfig,
    settings: Plan,
    found: Rehearsal,
    other: Rehearsal,
    made: Estimate,
    device: Hardware,
    share: float,
    source: str,
    count: int | None,
) -> Iterator[str]:
    micro = found.images // found.parts
    yield (
        f"{config.batch_size:,} images an update on {made.gpus} x {device.name}: "
        f"{found.images} each"
        + (f", in {found.parts} passes of {micro}" if found.parts > 1 else "")
        + f"; {config.precision}, {config.strategy}"
    )
    yield ""
    total = sum(found.parameters.values())
    parts = ", ".join(f"{name} {n:,}" for name, n in found.parameters.items())
    yield f"parameters        {total:,}: {parts}"
    if found.trained != total and config.strategy != "fsdp":
        yield f"  trained         {found.trained:,}"
    yield f"memory a device   {_gb(found.peak)} at the peak, of {_gb(device.memory)}"
    yield f"  weights         {_gb(found.weights)}"
    yield f"  gradients       {_gb(found.gradients)}"
    yield f"  optimiser       {_gb(found.optimizer)}"
    for name, size in found.buffers.items():
        if size >= 1e6:
            yield f"  {name:<15} {_gb(size)} (buffers)"
    on = bool(config.activation_checkpointing)
    words = ("with", "without") if on else ("without", "with")
    yield (
        f"  activations     {_gb(found.activations)} {words[0]} checkpointing, "
        f"{_gb(other.activations)} {words[1]}; {micro} images a pass"
    )
    yield (
        f"work an image     {2 * found.macs_per_image / 1e9:,.4g} GFLOP: forward, backward, and "
        "what is computed twice"
    )
    yield (
        f"images/s          {made.rate:,.4g} in all, {made.rate / made.gpus:,.4g} a device: "
        f"{share:.1%} of {device.flops / 1e12:.3g} TFLOP/s ({source})"
    )
    yield f"an update         {made.step_seconds:,.3g} s"
    if made.hours is not None:
        yield (
            f"the run           {config.steps:,} updates, {_time(made.hours)}, "
            f"{made.hours * made.gpus:,.4g} device hours"
            + ("" if count is None else f" ({config.epochs:g} passes over {count:,} images)")
        )
    yield (
        f"data              {made.data_rate / 1e6:,.3g} MB/s at {settings.image_kb:g} kB an image; "
        f"{made.loader_cores} loader cores a device at {settings.images_per_core:g} images/s a core"
    )
    if made.gpus > 1:
        traffic = ", ".join(
            f"{found.calls[k]} {k}s of {_gb(v)} in all" for k, v in found.traffic.items()
        )
        yield f"network an update {traffic}; {made.network:.2g} s if nothing overlaps"
    yield (
        f"a checkpoint      {_gb(made.checkpoint)}, {made.checkpoint_seconds:.2g} s at "
        f"{settings.disk:g} GB/s"
    )


def _fit_text(fit: Any, device: Hardware) -> str:
    if fit is None:
        return f"smallest cluster  none of {device.name}: choose a smaller model"
    how = "with" if fit.checkpointing else "without"
    return (
        f"smallest cluster  {fit.gpus} x {device.name}: strategy={fit.strategy} "
        f"images_per_device={fit.images}, {how} checkpointing; the rest of the batch is accumulated"
    )


def _scales(config: DictConfig) -> Iterator[str]:
    """The values that follow from the batch, for several numbers of devices."""
    columns: dict[int, Mapping[str, Any]] = {}
    for gpus in sorted({*SCALES, int(config.gpus)}):
        if (values := rescaled(config, gpus)) is not None:
            columns[gpus] = values
    if not columns:
        return
    yield ""
    each = config.batch_size // config.gpus
    head = f"with {each} images a device"
    yield f"{head:<34}" + "".join(f"{f'{gpus} GPUs':>14}" for gpus in columns)
    for name in next(iter(columns.values())):
        cells = (_cell(values.get(name)) for values in columns.values())
        yield f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else f"{value:.5g}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.3g} min"
    return f"{hours:.3g} h" if hours < 72 else f"{hours / 24:.3g} days"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
