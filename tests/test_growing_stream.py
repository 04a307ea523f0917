"""Whole runs on a list of shards that grows while they go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.tars import write
from tests.runs import REGNET, SMALL, checksums, run_here


def shard(folder: Path, number: int, images: int = 12) -> None:
    random = np.random.default_rng(number)
    members = {}
    for n in range(images):
        pixels = random.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        picture = folder.parent / "picture.png"
        Image.fromarray(pixels).save(picture)
        members[f"{n:03d}.png"] = picture.read_bytes()
    write(folder / f"{number:06d}.tar", members)


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_that_join_are_replayed(tmp_path, processes):
    """A run whose list grew, killed and gone on with, ends with the same bits."""
    web, runs = tmp_path / "web", tmp_path / "runs"
    for n in range(2):
        shard(web, n)  # 4 pieces of 6 images: three updates a pass

    def run(name: str, steps: int) -> dict:
        return run_here(
            [
                *[o for o in SMALL if o != "data=folder" and not o.startswith("schedule.")],
                *REGNET, "data=uncurated_stream", f"data.shards={web}", "data.pieces=2",
                "data.whole_index=false", "schedule=constant", f"runs_dir={runs}", f"name={name}",
                f"steps={steps}", "checkpoint.every=2", "checkpoint.keep=9",
                f"cluster.processes={processes}",
            ]
        )  # fmt: skip

    assert run("a", 4)["status"] == "complete"
    shard(web, 2)
    shard(web, 3)
    assert run("a", 16)["status"] == "complete"
    lines = [json.loads(x) for x in (runs / "a" / "stream.jsonl").read_text().splitlines()]
    added = [line["added"] for line in lines]
    assert [len(names) for names in added[:2]] == [2, 0]  # settled while the first part ran
    assert sorted(len(names) for names in added[2:]) == [0] * (len(added) - 3) + [2]
    ended = checksums(runs / "a", 16)
    # as after a kill: newer checkpoints are gone, the log stays; another shard has come since
    shard(web, 4)
    for step in range(6, 17, 2):
        shutil.rmtree(runs / "a" / "checkpoints" / f"step_{step:08d}")
    run("a", 16)
    assert checksums(runs / "a", 16) == ended
