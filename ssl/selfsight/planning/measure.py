"""A short measurement of a run's update on this machine: real tensors, random images, no loader."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from selfsight.build import build
from selfsight.data.batch import Batch
from selfsight.distributed.env import World
from selfsight.distributed.parallelize import parallelize
from selfsight.methods.method import Method, Now
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.planning.meter import Meter
from selfsight.runtime import autocast_factory

LEAST_UPDATES = 2


@dataclass(frozen=True)
class Measured:
    """Seconds of one update of so many images; bytes alive at its peak, where they were counted."""

    images: int
    seconds: float
    updates: int
    peak: int


class Trial:
    """A run's method and optimiser on this machine, ready for updates of `images` images."""

    def __init__(self, config: DictConfig, images: int, device: torch.device) -> None:
        self.device, self.images = device, images
        torch.manual_seed(config.seed)
        self.method: Method = build(config.method)
        self.method.to(device)
        self.model = parallelize(
            self.method,
            units=self.method.units(),
            world=World(device=device),
            activation_checkpointing=config.activation_checkpointing,
            compile_units=self.method.compile_units() if config.compile else (),
            precision=config.precision,
        )
        self.optimizer: Any = build(config.optim.optimizer)(
            parameter_groups(
                self.method.named_parameters(),
                weight_decay=config.optim.weight_decay,
                exclude_bias_and_norm=config.optim.exclude_bias_and_norm,
            )
        )
        self.autocast = autocast_factory(device, config.precision)
        white = 256 if config.pixels.bits == 8 else 65536
        shapes = [
            (g["count"], images, config.pixels.channels, g["size"], g["size"])
            for g in config.views.values()
        ]
        dtype = torch.uint8 if config.pixels.bits == 8 else torch.uint16
        views = [torch.randint(0, white, shape, dtype=dtype, device=device) for shape in shapes]
        places = torch.arange(images)
        self.batch = Batch(views, places, torch.full_like(places, -1))
        self.step = 10**6

    def update(self) -> None:
        """One update, as the loop makes it."""
        now = Now(self.step, 10**7, {"lr": 1e-4, "weight_decay": 0.0})
        self.step += 1
        with self.autocast():
            loss, _ = self.model(self.batch, now, None)
        loss.backward()
        self.method.after_backward(now)
        gradient_norm(self.optimizer)
        set_hyperparameters(self.optimizer, lr=1e-4, weight_decay=0.0)
        self.optimizer.found_inf = torch.zeros((), device=self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(now, ok=torch.ones((), dtype=torch.bool, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(config: DictConfig, images: int, device: torch.device, seconds: float) -> Measured:
    """Updates of `images` images for about so many seconds, after one that is not counted."""
    trial = Trial(config, images, device)
    trial.update()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_UPDATES or time.perf_counter() - started < seconds:
        start = time.perf_counter()
        trial.update()
        times.append(time.perf_counter() - start)
    middle = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(images, middle, len(times), peak)


def measured_peak(config: DictConfig, images: int) -> int:
    """Bytes of tensors alive at the peak of a real second update on CPU."""
    meter = Meter()
    with meter:
        trial = Trial(config, images, torch.device("cpu"))
        trial.update()
        meter.peak = meter.alive
        trial.update()
    return meter.peak
