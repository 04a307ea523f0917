"""A run's folder as plain values."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.config import flat
from selfsight.report.difference import Change, changes
from selfsight.tracking.folder import RunFolder

PICTURES = "pictures"


@dataclass
class Record:
    """What is known of a run.

    Attributes:
        name: of the run.
        config: every value by its dotted key.
        changed: where it differs from its recipe; None where that cannot be told.
        metrics: the lines of metrics.jsonl.
        seen: what was seen, by step; `images` are the thumbnails, `crops` the views.
        bad: of the samples that could not be used: how many, by reason, with examples.
        evaluations: by name.
    """

    name: str
    config: dict[str, Any]
    changed: list[Change] | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    images: dict[str, Any] | None = None
    crops: dict[str, Any] | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    bad: list[tuple[str, int, list[str]]] = field(default_factory=list)
    evaluations: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Record:
    """Read a run's folder.

    Raises:
        ValueError: it is none.
    """
    folder = RunFolder(path)
    text = folder.config_text()
    if text is None:
        raise ValueError(f"{path} is not the folder of a run: it has no config.yaml")
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    pictures = path / PICTURES
    steps = sorted(pictures.glob("step_*.json")) if pictures.is_dir() else []
    return Record(
        name=path.resolve().name,
        config=flat(config),
        changed=changes(config),
        summary=folder.summary(),
        environment=_json(path / "environment.json") or {},
        metrics=list(folder.read_metrics()),
        images=_json(pictures / "images.json"),
        crops=_json(pictures / "crops.json"),
        seen=[found for found in map(_json, dict.fromkeys([*steps[:1], *steps[-1:]])) if found],
        bad=_bad(folder.ledger),
        evaluations={p.stem: _json(p) for p in sorted((path / "evals").glob("*.json"))},
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _bad(ledger: Path) -> list[tuple[str, int, list[str]]]:
    if not ledger.is_file():
        return []
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    with ledger.open() as file:
        for line in file:
            try:
                entry = json.loads(line)
                reason, key = str(entry["reason"]), str(entry["key"])
            except (ValueError, TypeError, KeyError):
                continue
            counts[reason] += 1
            if len(counted := examples.setdefault(reason, [])) < 4:
                counted.append(key)
    return [(reason, count, examples[reason]) for reason, count in counts.most_common(40)]
