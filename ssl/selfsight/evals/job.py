"""One evaluation job on one rank: load the trunk, extract features, ask every evaluator, write."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.build import build
from selfsight.distributed import collectives
from selfsight.distributed.env import World
from selfsight.evals import reporting
from selfsight.evals.bench import Bench, Sets
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.labelled import check_same_names
from selfsight.evals.online import CALIBRATION_IMAGES, calibrate
from selfsight.evals.settings import short_name
from selfsight.evals.store import Transform
from selfsight.evals.subject import Subject, load_subject, trunk_file
from selfsight.report.reporter import Reporter
from selfsight.runtime import autocast_factory, decode_limits, threads_per_process, usable_cores


def evaluate(config: DictConfig, name: str, world: World) -> dict[str, Any]:
    """Run the evaluations of `config` as this rank of `world`; returns {name: main figure}.

    Raises:
        ValueError: one sentence about trunk, data or an evaluator.
    """
    torch.use_deterministic_algorithms(world.device.type == "cpu")
    torch.set_num_threads(threads_per_process(config.cluster.threads, world.local_size))

    def say(text: str) -> None:
        if world.main:
            print(text, flush=True)

    began = time.monotonic()
    path = trunk_file(config.run, config.trunk, config.step)
    subject = load_subject(path, world.device, random_init=config.random_init, seed=config.seed)
    evaluators = {key: build(node) for key, node in config.eval.items()}
    for key, evaluator in evaluators.items():
        if not isinstance(evaluator, Evaluator):
            raise ValueError(f"eval={key} trains the trunk: it is a run of its own")
    wanted = {key: list(one.layers(subject)) for key, one in evaluators.items()}
    sets = sources(config)
    size = config.image_size or config.data.eval_size
    out = Path(config.out)
    bench = Bench(
        subject=subject,
        sets=sets,
        layers=list(dict.fromkeys(layer for names in wanted.values() for layer in names)),
        transform=Transform(size, config.resize, decode_limits(config.loader)),
        cache=Path(config.features.folder or out.parent / "features").expanduser(),
        out=out,
        device=world.device,
        autocast=autocast_factory(world.device, config.precision),
        precision=config.precision,
        batch_size=config.features.batch_size,
        workers=_threads(config.features.workers, world),
        seed=config.seed,
        half=config.features.half,
        limits=(config.features.limit_train, config.features.limit_test),
        say=say,
    )
    what = f"{path}{', at random initialisation' if config.random_init else ''}"
    say(f"evaluating {what} on {sets.train.name}")
    if config.random_init:
        _calibrate(bench)
    written: dict[str, float] = {}
    for key, evaluator in evaluators.items():
        before = dict(bench.seconds)
        start = time.monotonic()
        answer = evaluator.evaluate(bench)
        extraction = sum(v for k, v in bench.seconds.items() if k not in before)
        seconds = {"evaluation": round(time.monotonic() - start - extraction, 2), **bench.seconds}
        figure = answer.figures[answer.main]
        written[key] = figure.value
        say(f"{key}: {answer.main} {figure}   ({answer.protocol})")
        if world.main:
            _write(config, key, subject, bench, answer, seconds)
    collectives.barrier()
    say(f"results in {out}, {time.monotonic() - began:.0f} s in all")
    return {"status": "complete", **written}


def sources(config: DictConfig) -> Sets:
    """The labelled sources of a data group: its split for evaluation, or its training images.

    Raises:
        ValueError: half of a split, or two whose classes differ.
    """
    data = config.data
    if (data.eval_train is None) != (data.eval_val is None):
        raise ValueError("data.eval_train and data.eval_val are given together, or both null")
    if data.eval_train is None:
        return Sets(build(data.train), None)
    sets = Sets(build(data.eval_train), build(data.eval_val))
    assert sets.test is not None
    check_same_names(sets.train, sets.test)
    return sets


def _threads(asked: int | None, world: World) -> int:
    return asked if asked is not None else max(1, min(8, usable_cores() // world.local_size))


def _calibrate(bench: Bench) -> None:
    """BatchNorm statistics for a trunk that has never seen an image."""
    from selfsight.data.evaluation import read_images

    source = bench.sets.train
    count = min(CALIBRATION_IMAGES, len(source))
    images, _, _ = read_images(
        source,
        [i * len(source) // count for i in range(count)],
        size=bench.transform.size,
        resize=bench.transform.resize,
        workers=bench.workers,
        limits=bench.transform.limits,
        pixels=bench.subject.pixels,
    )

    def forward() -> None:
        with torch.no_grad():
            for part in images.split(bench.batch_size):
                bench.subject.trunk(bench.subject.normalize(part.to(bench.device)))

    calibrate(bench.subject.trunk, forward)


def _write(
    config: DictConfig,
    key: str,
    subject: Subject,
    bench: Bench,
    answer: Answer,
    seconds: dict[str, float],
) -> None:
    sets = bench.sets
    content = {
        "evaluator": key,
        "subject": {**subject.facts, "digest": subject.digest()},
        "data": {
            "name": config.data_name or short_name(config.data),
            "train": sets.train.name,
            "test": None if sets.test is None else sets.test.name,
            "classes": None if sets.train.classes is None else len(sets.train.classes),
            "unusable": {k: len(f.bad) for k, f in bench._kept.items()},
        },
        "main": answer.main,
        "figures": {k: _finite(f.plain()) for k, f in answer.figures.items()},
        "protocol": answer.protocol,
        "details": answer.details,
        "seconds": seconds,
        "config": OmegaConf.to_container(config.eval[key], resolve=True),
        "image_size": bench.transform.size,
        "precision": bench.precision,
        "seed": bench.seed,
        "step_asked": config.step,
    }
    reporting.write_result(bench.out, content, say=bench.say, wandb=config.tracking)
    run = bench.out.parent
    Reporter(run, active=(run / "report.html").is_file(), notice=bench.say).write()


def _finite(figure: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    bad = [k for k, v in figure.items() if isinstance(v, float) and not math.isfinite(v)]
    return json.loads(json.dumps(figure | dict.fromkeys(bad)))
