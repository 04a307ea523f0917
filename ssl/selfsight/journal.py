"""What a run tells and keeps: its folder, checkpoints, figures, verdict, and the console.

The loop calls it at set moments and stays free of formatting. Only the main rank writes and speaks;
what is a collective is called by all.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight import recovery
from selfsight.config import ConfigError, published
from selfsight.data.sources.source import Source
from selfsight.distributed import checkpoint, collectives
from selfsight.distributed.async_save import Saver
from selfsight.distributed.env import World
from selfsight.distributed.lease import Lease, LeaseRefused
from selfsight.distributed.payload import write_tensors
from selfsight.distributed.shards import whole_state_dict
from selfsight.methods.method import Method, Now
from selfsight.recovery import GO_ON, Decision, Guard
from selfsight.report.reporter import Reporter
from selfsight.runtime import used_memory
from selfsight.state import TrainState
from selfsight.tracking import binding
from selfsight.tracking.console import Console, duration
from selfsight.tracking.export import trunk_metadata
from selfsight.tracking.folder import OWN_FILES, RunFolder
from selfsight.tracking.judge import Judge
from selfsight.tracking.trackers import Trackers
from selfsight.tracking.window import Clock
from selfsight.tracking.wording import BEGINNINGS, comparison, figures_text, latest_figure

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
        self.trackers = Trackers()
        active = world.main and config.tracking.report
        self.reporter = Reporter(self.folder.path, active=active, notice=self._say)
        self.judge = Judge(warm_until=0)
        self.line: dict[str, Any] = {}
        self.rate: float | None = None
        self.lease: Lease | None = None
        self.saver: Saver | None = None
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
            names = [p.name for p in path.iterdir()] if path.is_dir() else [path.name]
            found = {name for name in names if not name.startswith(".")}
            if path.exists() and found - OWN_FILES:
                return f"{path} exists and is not the folder of a run: choose another name="
            return None
        if self.config.resume == "anyway" or not any(self.folder.checkpoints.glob("step_*")):
            return None  # a run that never saved binds nobody
        if (found := binding.difference(text, self.config)) is None:
            return None
        key, old, new = found
        return (
            f"{path} was started with {key}={old}, and now it is {new}: choose another name=, or "
            "resume=anyway to go on regardless"
        )

    def resume(self, state: TrainState) -> None:
        """Make the run's folder, and take over its newest whole checkpoint, if there is one.

        Raises:
            ForeignCheckpoint: it does not fit this model.
        """
        newest = problem = None
        if self.world.main:
            self.folder.create()
            problem = self._take_lease()
        if problem := collectives.broadcast_json(problem):
            raise ConfigError(problem)
        c = self.config.checkpoint
        self.saver = Saver(
            self.folder.checkpoints,
            self.world,
            keep=c.keep,
            keep_every=c.keep_every,
            notice=self._say,
            guard=self.lease.check if self.lease else None,
            asynchronous=c.asynchronous,
        )
        if self.world.main:
            # one rank chooses, so that all go on from the same one
            newest = checkpoint.latest(self.folder.checkpoints, notice=self._notices.append)
        found = collectives.broadcast_json(str(newest) if newest else None)
        if found is None:
            if self.world.main:  # of a run that ended before it saved
                self.folder.truncate_metrics(-1)
                self.reporter.forget_after(-1)
            return
        with checkpoint.Reader(found, checked=True) as reader:
            state.restore(reader, found)
            manifest = reader.manifest
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
            self.reporter.forget_after(state.step)

    def notice(self, text: str) -> None:
        """Something to tell, once the console is open."""
        if self.console is None:
            self._notices.append(text)
        else:
            self._say(text)

    def _take_lease(self) -> str | None:
        """Become the one run that writes into this folder; what speaks against it, or None."""
        job = os.environ.get("SELFSIGHT_JOB_ID", f"{os.getpid()}")
        restart = int(os.environ.get("SELFSIGHT_RESTART", "0"))
        self.lease = Lease(self.folder.path, job, restart)
        try:
            if notice := self.lease.acquire():
                self._notices.append(notice)
        except LeaseRefused as error:
            return str(error)
        except OSError as error:
            return f"{self.folder.path} cannot be written ({error.strerror or error})"
        return None

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
        self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(published(c))))
        self.folder.write_environment(
            world_size=world.size, threads=torch.get_num_threads(), device=str(world.device)
        )
        if c.cluster.chosen:
            self._say(f"cluster={c.cluster.chosen}")
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
            f"peak lr {lr:.4g} from base_lr {c.schedule.base_lr:.4g}; "
            f"{world.device.type}, {c.precision}"
        )
        if scaling := method.scaling(c.batch_size):
            self._say(scaling)
        self._say(f"folder {self.folder.path}; {evaluation.protocol}")
        self.folder.update_summary(status="running", step=first, steps=c.steps)
        self.trackers.open(c.tracking, self.name, self.folder.path, published(c), self._say)

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
        memory = {"memory_gb": round(used_memory(self.world.device), 3)}
        self.line, self.rate = {**line, **clock.line, **memory}, clock.images_per_second
        self.folder.append_metrics(self.line)
        if self.judge.observe(method, {**figures, **clock.line}, now, new_skips, updates):
            self._tell_verdict(state.step)
        assert self.console is not None
        self.console.show(state.step, self.line, latest_figure(state.figures))
        self.trackers.log(state.step, self.line)

    def _tell_verdict(self, step: int) -> None:
        judge = self.judge
        self._say(f"step {step}: {judge.text}")
        self.folder.update_summary(**judge.summary())
        if not judge.good:
            self.trackers.alert(step, f"{self.name}: {judge.verdict.state}", judge.text)

    def wish(self, guard: Guard) -> Decision:
        """What the verdict of the line just recorded leads to, by `recovery.verdict`; the same on
        all ranks. A collective, unless it leads to nothing."""
        if guard.verdict == "go_on":
            return GO_ON
        judge = self.judge
        bad = None if judge.good else [judge.verdict.state, judge.since, judge.text]
        bad = collectives.broadcast_json(bad)
        return GO_ON if bad is None else guard.act_on(*bad)

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
        self.trackers.log(state.step, named)
        self.judge.evaluated(state.step, figures, initial=bool(suffix))
        place = BEGINNINGS.get(suffix, f"after step {state.step}")
        self._say(f"{figures_text(figures)} {place}")

    def track(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """Send figures that other jobs have found to where the run is tracked."""
        self.trackers.log(state.step, figures)

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint: it is written while training goes on. One that fails is told, and
        those before it stand."""
        assert self.saver is not None
        if self.lease is not None:
            self.lease.check()
        scalars = {**state.scalars(), "threads": torch.get_num_threads()}
        self.saver.save(state.step, state.tensors(), scalars, config_hash=self.config_hash())
        if self.world.main:
            self._summarise(state, "running")
        every = self.config.checkpoint.keep_every
        if every and state.step % every == 0:
            place = self.folder.path / "trunks" / f"step_{state.step:08d}.safetensors"
            place.parent.mkdir(exist_ok=True)
            self._export(state, place)

    def finish_saves(self) -> None:
        """Wait for the checkpoint under way."""
        assert self.saver is not None
        self.saver.finish()

    def roll_back(self, state: TrainState, guard: Guard, decision: Decision) -> None:
        """Go back to a checkpoint from before the trouble, but not in the stream: that checkpoint
        is written anew with the present position and count of attempts, later ones are removed."""
        self._say(f"step {state.step}: {decision.text}")
        assert self.saver is not None
        self.saver.finish()
        found = None
        if self.world.main:
            found = recovery.choose(self.folder.checkpoints, decision.before, notice=self._say)
        found = collectives.broadcast_json(str(found) if found else None)
        if found is None:
            guard.rolled_back(None)
            self._say("there is no checkpoint yet: the run goes on")
            return
        kept, cursors, skipped = guard.state_dict(), state.cursors, state.skipped
        with checkpoint.Reader(found, checked=True) as reader:
            state.restore(reader, found)
        guard.load_state_dict(kept)
        guard.rolled_back(state.step)
        state.cursors, state.skipped = cursors, skipped
        self.save(state)
        self.saver.finish()
        self.saver.discard_after(state.step)
        if self.world.main:
            self.folder.truncate_metrics(state.step)
            self._say(f"back at step {state.step}; the batches since are skipped")
            self.reporter.forget_after(state.step)
        self.judge.forget(f"the run went back to step {state.step}")
        self.line = {"step": state.step}
        collectives.barrier()

    # ---------------------------------------------------------------------------------- end

    def fail(self, state: TrainState, decision: Decision) -> dict[str, Any]:
        """End a run that cannot go on, with its verdict."""
        if not self.world.main:
            return {"status": "failed"}
        self._summarise(state, "failed")
        self.folder.update_summary(verdict=decision.state, verdict_text=decision.text)
        self._say(f"step {state.step}: {decision.text}")
        return self._close()

    def finish(
        self, state: TrainState, method: Method, complete: bool, reason: str | None = None
    ) -> dict[str, Any]:
        """Export the trunk, write the summary, and say what was learnt and what comes next."""
        ended = "preempted" if reason == "preempted" else "stopped"
        if complete:
            self._export(state, self.folder.trunk)
        if not self.world.main:
            return {"status": "complete" if complete else ended}
        self._summarise(state, "complete" if complete else ended)
        path = self.folder.path
        if not complete:
            self._say(
                f"stopped after step {state.step}; the same command with name={self.name} goes on"
            )
            return self._close()
        took = duration(time.monotonic() - self.started)
        rate = f", {self.rate:.0f} img/s" if self.rate else ""
        self._say(f"done: {state.step} updates in {took}{rate}")
        self._say(f"state: {self.judge.text}")
        self._say(f"trunk: {self.folder.trunk}   figures: {path / 'metrics.jsonl'}")
        self._say(
            "more:  python launch/pretrain.py data=folder data.path=FOLDER  (your own images)"
        )
        self._say(comparison(state.figures))
        return self._close()

    def close_progress(self) -> None:
        """Take the progress bar off the terminal; give up a checkpoint that is under way."""
        if self.console is not None:
            self.console.close()
        if self.saver is not None:
            self.saver.close()

    def _export(self, state: TrainState, place: Path) -> None:
        """Write the trunk alone, whole or not at all. A collective."""
        weights = whole_state_dict(state.method.trunk)
        if self.world.main:
            part = place.with_name(f".{place.name}.part")
            write_tensors(
                part, weights, trunk_metadata(self.config, state.method, self.name, state.step)
            )
            part.replace(place)

    def _close(self) -> dict[str, Any]:
        if self.lease is not None:
            self.lease.release()
        summary = self.folder.summary()
        self.trackers.close(summary)
        self.reporter.write()
        return summary

    # ------------------------------------------------------------------------------ helpers

    def _open_console(self, first: int, bar: bool) -> None:
        self.console = Console(
            steps=self.config.steps, first=first, active=self.world.main, bar=bar
        )

    def _say(self, text: str) -> None:
        (self.notice if self.console is None else self.console.say)(text)

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
            **self.judge.summary(),
            **state.figures,
        )
        self.reporter.write()

    def config_hash(self) -> str:
        return binding.config_hash(self.config)
