"""What a run tells and keeps: its folder, checkpoints, figures, verdict, and the console.

The loop calls it at set moments and stays free of formatting. Only the main rank writes and speaks;
what is a collective is called by all.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.config import ConfigError, flat
from selfsight.data.sources.source import Source
from selfsight.distributed import checkpoint, collectives
from selfsight.distributed.env import World
from selfsight.distributed.payload import write_tensors
from selfsight.methods.method import Method, Now
from selfsight.state import TrainState
from selfsight.tracking.console import Console, duration
from selfsight.tracking.folder import RunFolder
from selfsight.tracking.judge import Judge
from selfsight.tracking.wandb import WandbRun
from selfsight.tracking.window import Clock

# What may differ when a run goes on: where and how it runs and reports, and how long.
FREE = (
    "name", "runs_dir", "device", "deterministic", "gpus", "images", "epochs", "steps", "resume",
    "schedule.lr.steps", "schedule.weight_decay.steps",
    "schedule.warmup_steps", "schedule.lr.warmup_steps", "checkpoint.", "loader.workers",
    "loader.prefetch", "loader.max_bad_share", "loader.decode_seconds", "loader.fetch_seconds",
    "loader.growth_gb", "cluster.", "tracking.", "eval.", "data.eval_",
)  # fmt: skip

WARMUP = ("schedule.warmup_steps", "schedule.lr.warmup_steps")
WARM_STEPS = 100  # no run is told that it does not learn before this, or a quarter of it


class Protocolled(Protocol):
    @property
    def protocol(self) -> str: ...


class Journal:
    """The record of one run on one rank."""

    def __init__(self, config: DictConfig, name: str, world: World) -> None:
        self.config, self.name, self.world = config, name, world
        self.folder = RunFolder(Path(config.runs_dir).expanduser() / name)
        self.started = time.monotonic()
        self.console: Console | None = None
        self.wandb: WandbRun | None = None
        self.judge = Judge(warm_until=0)
        self.line: dict[str, Any] = {}
        self.rate: float | None = None
        self._notices: list[str] = []
        self._first_step = 0

    # --------------------------------------------------------------------------- beginning

    def open(self) -> None:
        """Check that the run's folder is free, or may be continued; nothing is written yet.

        Raises:
            ValueError: it is something else's folder, or was started with another configuration.
        """
        problem = self._problem() if self.world.main else None
        if problem := collectives.broadcast_json(problem):
            raise ConfigError(problem)

    def _problem(self) -> str | None:
        path = self.folder.path
        text = self.folder.config_text()
        if text is None:
            found = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
            if path.exists() and found - {"checkpoints", "ledger.jsonl", "stream.jsonl"}:
                return f"{path} exists and is not the folder of a run: choose another name="
            return None
        if self.config.resume == "anyway" or not any(self.folder.checkpoints.glob("step_*")):
            return None  # a run that never saved binds nobody
        before, now = flat(OmegaConf.create(text)), flat(self.config)
        # by default it follows from the run's length, which may change; a value given by hand binds
        schedule = self.config.schedule
        follows = "warmup_steps" not in schedule or OmegaConf.is_interpolation(
            schedule, "warmup_steps"
        )
        free = FREE if follows else tuple(k for k in FREE if k not in WARMUP)
        for key in sorted({**before, **now}, key=lambda key: (not key.startswith("model."), key)):
            if before.get(key) != now.get(key) and not key.startswith(free):
                return (
                    f"{path} was started with {key}={before.get(key)}, and now it is "
                    f"{now.get(key)}: choose another name=, or resume=anyway to go on regardless"
                )
        return None

    def resume(self, state: TrainState) -> None:
        """Make the run's folder, and take over its newest whole checkpoint, if there is one.

        Raises:
            ForeignCheckpoint: it does not fit this model.
        """
        newest = None
        if self.world.main:
            self.folder.create()
            # one rank chooses, so that all go on from the same one
            newest = checkpoint.latest(self.folder.checkpoints, notice=self._notices.append)
        found = collectives.broadcast_json(str(newest) if newest else None)
        if found is None:
            if self.world.main:
                self.folder.truncate_metrics(-1)  # of a run that ended before it saved
            return
        tensors, manifest = checkpoint.load(found, checked=True)
        state.restore(tensors, manifest["scalars"], found)
        self._first_step = state.step
        self._notices.append(f"continuing {self.folder.path} after step {state.step}")
        threads, before = torch.get_num_threads(), manifest["scalars"].get("threads")
        if before not in (None, threads):
            self._notices.append(
                f"it ran with {before} threads per process and now with {threads}: results will "
                f"agree closely but not bit by bit; cluster.threads={before} would keep them equal"
            )
        if self.world.main:
            self.folder.truncate_metrics(state.step)

    def notice(self, text: str) -> None:
        """Something to tell once the console is open."""
        self._notices.append(text)

    def already_complete(self, state: TrainState) -> dict[str, Any]:
        """Say that there is nothing left to do."""
        self._open_console(state.step, bar=False)
        self._say(
            f"{self.folder.path} is complete with {state.step} updates; "
            "give a larger length to go on, or another name= to start anew"
        )
        return self.folder.summary()

    def introduce(
        self,
        source: Source,
        evaluation: Protocolled,
        method: Method,
        *,
        own_images: int,
        parts: int,
    ) -> None:
        """Write what the run is, and say it in a few lines."""
        c, world = self.config, self.world
        first = self._first_step
        self._open_console(first, bar=c.tracking.progress)
        if not world.main:
            return
        self.folder.write_config(OmegaConf.to_yaml(c, resolve=True))
        self.folder.write_environment(
            world_size=world.size, threads=torch.get_num_threads(), device=str(world.device)
        )
        for notice in self._notices:
            self._say(notice)
        warm = c.schedule.lr.get("warmup_steps", 0) or 0
        limit = c.steps // 4 if c.steps else warm
        self.judge = Judge(warm_until=min(max(warm, method.warmup_steps, WARM_STEPS), limit))
        length = f"{c.steps} updates" if c.steps else "no end"
        batch = f"{c.batch_size} images an update"
        if world.size > 1 or parts > 1:
            batch += f" = {world.size} processes x {parts} x {own_images // parts}"
        lr = c.schedule.lr.get("peak", c.schedule.lr.get("value"))
        self._say(
            f"{source.name}: {source.extent()}; {batch}; {length}; "
            f"peak lr {lr:.4g}; {world.device.type}, {c.precision}"
        )
        self._say(f"folder {self.folder.path}; {evaluation.protocol}")
        self.folder.update_summary(status="running", step=first, steps=c.steps)
        self.wandb = WandbRun(
            mode=c.tracking.wandb,
            project=c.tracking.wandb_project,
            name=self.name,
            folder=self.folder.path,
            config=OmegaConf.to_container(c, resolve=True),  # pyright: ignore[reportArgumentType]
            say=self._say,
        )

    # -------------------------------------------------------------------------------- steps

    def advance(self) -> None:
        """One update is done."""
        if self.console is not None:
            self.console.advance()

    def record_line(
        self,
        state: TrainState,
        now: Now,
        figures: Mapping[str, float],
        clock: Clock,
        new_skips: int,
        method: Method,
    ) -> None:
        """Write one line of metrics, judge it, and show it."""
        updates = state.step - self.line.get("step", self._first_step)
        state.skipped += new_skips
        if not self.world.main:
            return
        line = {"step": state.step, **now.values, **figures, "skipped": state.skipped}
        self.line, self.rate = {**line, **clock.line}, clock.images_per_second
        self.folder.append_metrics(self.line)
        if self.judge.observe(method, figures, now, new_skips, updates):
            self._say(f"step {state.step}: {self.judge.text}")
        assert self.console is not None and self.wandb is not None
        self.console.show(state.step, self.line, _latest(state.figures))
        self.wandb.log(state.step, self.line)

    def record_evaluation(
        self, state: TrainState, figures: Mapping[str, float], suffix: str = ""
    ) -> None:
        """Keep and show the figures of an evaluation."""
        named = {f"{key}{suffix}": value for key, value in figures.items()}
        state.figures |= named
        if not self.world.main:
            return
        self.folder.append_metrics({"step": state.step, **named})
        self.folder.update_summary(step=state.step, **state.figures)
        assert self.wandb is not None
        self.wandb.log(state.step, named)
        place = "at random initialisation" if suffix else f"after step {state.step}"
        self._say(f"{_figures_text(figures)} {place}")

    def save(self, state: TrainState) -> None:
        """Write a checkpoint. One that fails is told, and training goes on: the last one stands."""
        if self.world.main:
            scalars = {**state.scalars(), "threads": torch.get_num_threads()}
            try:
                checkpoint.save(
                    self.folder.checkpoints,
                    state.step,
                    state.tensors(),
                    scalars,
                    config_hash=self._config_hash(),
                    keep=self.config.checkpoint.keep,
                    world_size=self.world.size,
                )
            except checkpoint.CheckpointWriteError as error:
                self._say(f"step {state.step}: {error}; training goes on")
            self._summarise(state, "running")
        collectives.barrier()

    # ---------------------------------------------------------------------------------- end

    def finish(self, state: TrainState, method: Method, complete: bool) -> dict[str, Any]:
        """Export the trunk, write the summary, and say what was learnt and what comes next."""
        if not self.world.main:
            return {}
        self._summarise(state, "complete" if complete else "stopped")
        path = self.folder.path
        if not complete:
            self._say(
                f"stopped after step {state.step}; the same command with name={self.name} goes on"
            )
            return self._close()
        part = self.folder.trunk.with_name(".trunk.part")
        write_tensors(part, method.trunk.state_dict(), self._trunk_metadata(state))
        part.replace(self.folder.trunk)
        took = duration(time.monotonic() - self.started)
        rate = f", {self.rate:.0f} img/s" if self.rate else ""
        self._say(f"done: {state.step} updates in {took}{rate}")
        self._say(f"state: {self.judge.text}")
        self._say(f"trunk: {self.folder.trunk}   figures: {path / 'metrics.jsonl'}")
        self._say(
            "more:  python launch/pretrain.py data=folder data.path=FOLDER  (your own images)"
        )
        self._say(_comparison(state.figures))
        return self._close()

    def close_progress(self) -> None:
        """Take the progress bar off the terminal."""
        if self.console is not None:
            self.console.close()

    def _close(self) -> dict[str, Any]:
        summary = self.folder.summary()
        if self.wandb is not None:
            self.wandb.close(summary)
        return summary

    # ------------------------------------------------------------------------------ helpers

    def _open_console(self, first: int, bar: bool) -> None:
        self.console = Console(
            steps=self.config.steps, first=first, active=self.world.main, bar=bar
        )

    def _say(self, text: str) -> None:
        assert self.console is not None
        self.console.say(text)

    def _summarise(self, state: TrainState, status: str) -> None:
        self.folder.update_summary(
            status=status,
            step=state.step,
            steps=self.config.steps,
            images_seen=state.step * self.config.batch_size,
            skipped_updates=state.skipped,
            seconds=round(time.monotonic() - self.started, 1),
            loss=self.line.get("loss"),
            images_per_second=self.rate,
            verdict=self.judge.verdict.state,
            verdict_text=self.judge.text,
            **state.figures,
        )

    def _config_hash(self) -> str:
        bound = {k: v for k, v in flat(self.config).items() if not k.startswith(FREE)}
        return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()

    def _trunk_metadata(self, state: TrainState) -> dict[str, str]:
        c = self.config
        trunk = OmegaConf.to_container(c.model.trunk, resolve=True)
        pixels = {
            "channels": c.pixels.channels,
            "bits": c.pixels.bits,
            "mean": _numbers(state.method.pixel_mean),
            "std": _numbers(state.method.pixel_std),
        }
        return {
            "format": "pt",
            "trunk": json.dumps(trunk),
            "pixels": json.dumps(pixels),
            "run": self.name,
            "step": str(state.step),
        }


def _numbers(values: torch.Tensor) -> list[float]:
    """As plain numbers, without the digits that float32 does not have."""
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def _latest(figures: Mapping[str, Any]) -> str:
    if "knn_top1" in figures:
        return f"k-NN {figures['knn_top1']:.1f} %"
    if "knn_top1_random_init" in figures:
        return f"k-NN {figures['knn_top1_random_init']:.1f} % (random)"
    return f"rank {figures['rank']:.1f}" if "rank" in figures else ""


def _figures_text(figures: Mapping[str, float]) -> str:
    if "knn_top1" in figures:
        return f"k-NN top-1 {figures['knn_top1']:.1f} %, rank {figures['rank']:.1f}"
    return (
        f"rank {figures['rank']:.1f}, uniformity {figures['uniformity']:.2f} (no labels: no k-NN)"
    )


def _comparison(figures: Mapping[str, Any]) -> str:
    """The run's last line: what it ended with beside what it began with."""
    if "knn_top1" in figures:
        end, begin = figures["knn_top1"], figures["knn_top1_random_init"]
        return (
            f"k-NN top-1: {begin:.1f} % at random initialisation -> {end:.1f} % after pretraining "
            f"({end - begin:+.1f} points)"
        )
    return (
        f"no labels, so no k-NN: rank {figures['rank_random_init']:.1f} at random initialisation "
        f"-> {figures['rank']:.1f}, uniformity {figures['uniformity_random_init']:.2f} -> "
        f"{figures['uniformity']:.2f}"
    )
