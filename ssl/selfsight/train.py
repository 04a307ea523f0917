"""The training loop, read top to bottom: one run, from a checked configuration to its last line."""

import math
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.build import build
from selfsight.data.lanes import sources_of
from selfsight.data.ledger import Ledger
from selfsight.data.loader import Loader, finish_colour, start_server
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.pixels import PixelFormat
from selfsight.data.stream import CURSOR
from selfsight.data.stream_log import StreamLog
from selfsight.data.transfer import Transfer
from selfsight.data.worker import WorkerLimits
from selfsight.distributed import collectives
from selfsight.distributed.batchnorm import KeptStatistics
from selfsight.distributed.env import World
from selfsight.distributed.parallelize import no_sync, parallelize
from selfsight.distributed.preempt import Answer, Flags, StopRequest
from selfsight.distributed.startup import check_ranks
from selfsight.distributed.watchdog import Limits, Watchdog
from selfsight.evals.observe import images, observe
from selfsight.evals.online import OnlineEvaluation
from selfsight.evals.sources import evaluation_during, run_sources
from selfsight.evals.start import Starter
from selfsight.journal import Journal
from selfsight.methods.method import Method, Now
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import lr_factors, parameter_groups, set_hyperparameters
from selfsight.recovery import GO_ON, Guard, record_bad_batch
from selfsight.runtime import (
    autocast_factory,
    colour_on_device,
    decode_limits,
    estimate_pixels,
    known_pixels,
    loader_workers,
    refuse_too_large,
    seed_forward,
    shares,
    threads_per_process,
)
from selfsight.schedules import Plateau
from selfsight.state import TrainState
from selfsight.tracking.window import Clock, Window
from selfsight.weights.start import Start


def pretrain(config: DictConfig, name: str, world: World) -> dict[str, Any]:
    """Run, or continue, the run `name` as this rank of `world`; returns its summary.

    Raises:
        ValueError: one sentence about something asked for that cannot be done.
    """
    # ------------------------------------------------------------------------------- set-up
    device = world.device
    on_cpu = device.type == "cpu"
    torch.use_deterministic_algorithms(
        on_cpu if config.deterministic is None else config.deterministic
    )
    torch.set_num_threads(threads_per_process(config.cluster.threads, world.local_size))
    autocast = autocast_factory(device, config.precision)
    workers = loader_workers(config.loader.workers, world)
    if workers:
        start_server()  # imports torch beside us
    own_images, parts = shares(config.batch_size, config.images_per_device, world.size)
    journal = Journal(config, name, world)
    check_ranks(world, journal.config_hash())
    journal.open()
    starter = Starter(journal.folder.path, config, main=world.main)
    stop = StopRequest(journal.folder.path / "stop" if world.main else None)

    # --------------------------------------------------------------------------------- data
    sources = run_sources(config)
    source = sources.train
    if config.steps == "auto":
        config.steps = math.ceil(config.epochs * len(source) / config.batch_size)
    steps: int | None = config.steps
    limits = decode_limits(config.loader)
    pixels = PixelFormat(config.pixels.channels, config.pixels.bits)
    views = OmegaConf.to_container(config.views, resolve=True)
    assert isinstance(views, dict)
    multicrop = MultiCrop(
        {str(group): CropGroup(**crops) for group, crops in views.items()},
        reduced=config.loader.reduced,
        pixels=pixels,
        colour=not colour_on_device(config.loader.colour, device, pixels),
    )

    # ------------------------------------------------------------------------------- method
    with torch.device("meta"):
        refuse_too_large(build(config.method), world, sharded=config.strategy == "fsdp")
    torch.manual_seed(config.seed)
    method: Method = build(config.method)
    method.set_pixels(*known_pixels(config.pixels))
    start = Start(method, config.trunk, known_pixels(config.pixels), journal.notice)
    method.to(device)

    # ------------------------------------------------------------------------- parallelise
    model = parallelize(
        method,
        units=method.units(),
        world=world,
        syncbn_group_size=config.sync_batchnorm_group or world.size,
        activation_checkpointing=config.activation_checkpointing,
        compile_units=method.compile_units() if config.compile else (),
        strategy=config.strategy,
        precision=config.precision,
        compress_gradients=config.compress_gradients,
    )
    statistics = KeptStatistics(method)

    # ------------------------------------------------------------- optimiser and schedules
    optimizer = build(config.optim.optimizer)(
        parameter_groups(
            method.named_parameters(),
            weight_decay=config.optim.weight_decay,
            exclude_bias_and_norm=config.optim.exclude_bias_and_norm,
            lr_factors=lr_factors(
                method.trainable_trunk,
                method.trainable_trunk.units(),
                decay=config.optim.layer_decay,
                patch_embed=config.optim.patch_embed_lr_factor,
                whole=config.optim.trunk_lr_factor,
            ),
        )
    )
    schedules = {key: build(config.schedule[key]) for key in ("lr", "weight_decay")}
    plateaus = {key: item for key, item in schedules.items() if isinstance(item, Plateau)}
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    guard = Guard(**config.recovery, scaling=scaler.is_enabled())

    # ------------------------------------------------------------------------------- resume
    state = TrainState(
        method,
        optimizer,
        cursors=torch.zeros(config.batch_size, CURSOR, dtype=torch.int64),
        small={"scaler": scaler, "guard": guard, **start.small, **plateaus},
    )
    journal.resume(state)
    if steps is not None and state.step >= steps:
        return journal.already_complete(state)

    ledger = Ledger(journal.folder.ledger)
    log = StreamLog(
        journal.folder.stream,
        sources_of(source),
        fresh=state.step == 0,
        strict=config.resume == "strict",
    )
    if state.step == 0 and world.main:
        ledger.clear()
    if state.step == 0 and config.pixels.estimate:
        method.set_pixels(*estimate_pixels(source, config.pixels.estimate, limits, pixels))

    # ------------------------------------------------------- loader, evaluation, first figures
    evaluation = evaluation_during(
        config,
        sources,
        limits=limits,
        pixels=pixels,
        device=device,
        autocast=autocast,
        folder=journal.folder.path,
    )
    eval_every = config.eval.every or (max(1, -(-steps // 5)) if steps else 1000)
    loader = Loader(
        source,
        multicrop,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        workers=workers,
        prefetch=config.loader.prefetch,
        cursors=state.cursors.view(world.size, -1, CURSOR)[world.rank].clone(),
        ledger=ledger,
        log=log,
        options={"limits": limits},
        max_bad_share=config.loader.max_bad_share,
        limits=WorkerLimits(
            config.loader.decode_seconds, config.loader.fetch_seconds, config.loader.growth_gb
        ),
    )
    stream = Transfer(
        loader, device, memory=loader.memory, finish=finish_colour, notice=journal.notice
    )
    # -------------------------------------------------------------------------------- steps
    window, clock = Window(), Clock(config.batch_size)
    flags, decision = Flags(stop, device), GO_ON
    skipped = torch.zeros((), device=device)

    def heed(answers: list[Answer]) -> None:
        """Take what all ranks know of updates made: wishes to stop, and numbers gone bad."""
        nonlocal decision
        for answer in answers:
            stop.follow(answer.reason)
            if (kind := guard.kind(answer)) is not None:
                record_bad_batch(journal.folder.path, answer, kind)
            found = guard.observe(answer)
            start.observe(answer)
            if found is not GO_ON:
                decision = found
                return

    def look() -> None:
        """Keep for the report what the evaluation just made shows."""
        if isinstance(evaluation, OnlineEvaluation):
            journal.reporter.pictures(
                state.step, partial(images, evaluation), partial(observe, method, evaluation)
            )

    watchdog = Watchdog(world, journal.folder.path, Limits(**config.timeouts))
    try:
        journal.introduce(source, evaluation, method, own_images=own_images, parts=parts)
        if state.step == 0:
            found = evaluation.run(method, calibrate=not start.loaded)
            journal.record_evaluation(state, found, start.suffix)
            start.judge(found, state.step)
            look()
        method.train()
        start.hold()
        while (steps is None or state.step < steps) and not stop.agreed:
            # global batch number `state.step`: this rank's lanes, in micro-batches
            watchdog.enter("data", state.step)
            whole = next(stream)
            batches = whole.micro(parts)
            if state.step == 0:
                journal.reporter.crops([str(group) for group in views], whole.views)
            watchdog.enter("forward and backward", state.step)
            values = {key: schedule(state.step) for key, schedule in schedules.items()}
            reseed = partial(seed_forward, config.seed, state.step, world.rank)
            now = Now(state.step, steps, values, reseed)

            # forward and backward
            statistics.keep()
            with autocast():
                plan = method.plan(batches, now) if parts > 1 else [None]
            loss = torch.zeros((), device=device)
            for index, batch in enumerate(batches):
                reseed(index)
                with no_sync(model, index < parts - 1):
                    with autocast():
                        part_loss, metrics = model(batch, now, plan[index])
                    scaler.scale(part_loss / parts).backward()
                loss += part_loss.detach() / parts
                window.add(metrics)
            method.after_backward(now)
            start.drop_gradients()

            # the update, masked on the device if a loss or gradient of any rank is not finite
            if scaler.is_enabled():
                scaler.unscale_(optimizer)
            watchdog.enter("update", state.step)
            norm = gradient_norm(
                optimizer, clip=config.clip_gradients, per_tensor=config.clip_per_tensor
            )
            bad = flags.exchange(state.step, norm.isfinite(), loss, note=whole.positions)
            set_hyperparameters(optimizer, lr=values["lr"], weight_decay=values["weight_decay"])
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.zero_grad()
            if scaler.is_enabled():
                scaler.update()
            method.after_step(now, ok=bad == 0)
            statistics.restore_where(bad)
            window.add({"loss": loss, "gradient_norm": norm})
            skipped += bad
            state.step += 1
            clock.update()
            journal.advance()
            if (answer := flags.read()) is not None:
                heed([answer])

            # figures, evaluation, checkpoint
            last = state.step == steps
            saves = state.step % config.checkpoint.every == 0 or (last and config.checkpoint.at_end)
            saves = saves or stop.agreed is not None
            if saves or last:
                heed(flags.drain())
            if decision.rolls_back:
                flags.drain()
                state.cursors = collectives.all_gather_rows(stream.cursors)
                with watchdog.within("save"):
                    journal.roll_back(state, guard, decision)
                decision = GO_ON
                window = Window()
                skipped.zero_()
                continue
            if decision.stops:
                break
            evaluates = last or state.step % eval_every == 0
            if state.step % config.tracking.log_every == 0 or saves or evaluates:
                figures = method.figures(*window.reduce())
                for plateau in plateaus.values():
                    plateau.observe(state.step, figures["loss"])
                new_skips = int(skipped)
                skipped.zero_()
                clock.mark_line(stream.wait_seconds)
                journal.record_line(state, now, figures, clock, new_skips, method)
                decision = journal.wish(guard)
            with clock.paused():
                if evaluates:
                    with watchdog.within("evaluation"):
                        found = evaluation.run(method, last=last, step=state.step)
                        journal.record_evaluation(state, found)
                        fallen = start.judge(found, state.step)
                        decision = decision if fallen is GO_ON else fallen
                        look()
                if saves:
                    with watchdog.within("save"):
                        state.cursors = collectives.all_gather_rows(stream.cursors)
                        journal.save(state)
                        starter.saved(state.step)
                        journal.track(state, starter.news())
            if decision.stops:
                break
        journal.finish_saves()
    finally:
        watchdog.close()
        stream.close()
        stop.close()
        journal.close_progress()

    # ---------------------------------------------------------------------------------- end
    if decision.stops:
        return journal.fail(state, decision)
    complete = not stop.agreed or state.step == steps
    summary = journal.finish(state, method, complete=complete, reason=stop.agreed)
    if complete:
        starter.ended()
    return summary
