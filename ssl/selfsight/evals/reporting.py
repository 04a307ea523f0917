"""Results of evaluations: one JSON file each, and where they are told."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsight.tracking.folder import environment, write_whole
from selfsight.tracking.wandb import WandbRun


def result_name(content: dict[str, Any]) -> str:
    """EVALUATOR[.DATA][.random_init][.step_N][.SUFFIX]: results of other data or another
    checkpoint stand beside, the same again replaces."""
    subject = content["subject"]
    parts = [content["evaluator"], content["data"]["name"]]
    if subject.get("random_init"):
        parts.append("random_init")
    if content.get("step_asked") is not None:
        parts.append(f"step_{content['step_asked']:08d}")
    if content.get("suffix"):
        parts.append(content["suffix"])
    return ".".join(re.sub(r"[^A-Za-z0-9_-]+", "_", str(part)) for part in parts)


def write_result(
    folder: Path,
    content: dict[str, Any],
    *,
    say: Callable[[str], None],
    wandb: Any = None,
) -> Path:
    """Write a result into `folder`, and send its main figure to the wandb run that `folder`
    belongs to, if that is tracked (a run that still trains reads the file itself)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **content,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": environment(),
    }
    path = folder / f"{result_name(content)}.json"
    write_whole(path, json.dumps(content, indent=2) + "\n")
    run = folder.parent
    if wandb is not None and (run / "wandb").is_dir() and _ended(run):
        tracked = WandbRun(
            mode=wandb.wandb,
            project=wandb.wandb_project,
            name=run.name,
            folder=run,
            config={},
            say=say,
        )
        tracked.close(tracked_figures(content))
    return path


def tracked_figures(content: dict[str, Any]) -> dict[str, float]:
    """{"evals/NAME/FIGURE": value} of a result."""
    name = result_name(content)
    return {f"evals/{name}/{k}": f["value"] for k, f in content["figures"].items()}


def _ended(run: Path) -> bool:
    try:
        return json.loads((run / "summary.json").read_text()).get("status") != "running"
    except (OSError, ValueError):
        return True


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All whole results in a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and "evaluator" in content:
            found.append(content)
    return found
