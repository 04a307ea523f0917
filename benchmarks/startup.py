"""How soon does a stream of very many shards give its first batch, and in how much memory?

    python benchmarks/startup.py [--shards 100000] [--out FOLDER]

The shards are hard links to a few real tar files of 1,000 small JPEGs each, so their indexes are of
real size and read by the real code. What is named by a list file, a glob and braces is opened in a
fresh process with two loader processes, and the first batch of 256 images is asked for; so is a
list of 16 of them, beside which the cost of the others shows. Goal: 5 s and 500 MB for 100,000.

Importing torch alone takes seconds and half a gigabyte of resident memory a process, nearly all of
it pages of its libraries, which processes share. So the time is counted from when the main process
and the server of the loader have imported (a training run builds its model meanwhile); `in all`
is the whole life of the process. Memory is the largest sum over all processes of
pages that are not those of files (`Pss_Anon`); the short list shows the imports' part of it.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from memory import tree_memory

MEMBERS, BATCH, LINKS = 1000, 256, 25_000


def make(folder: Path, shards: int) -> None:
    """Hard links folder/NNN/NNNNNN.tar, and a list of them."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    image = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image, "JPEG")
    names, whole = [], folder
    for n in range(shards):
        if n % LINKS == 0:  # a file system limits the links to one file
            whole = folder / f"whole{n // LINKS}.tar_"
            with tarfile.open(whole, "w") as tar:
                for m in range(MEMBERS):
                    member = tarfile.TarInfo(f"{m:06d}.jpg")
                    member.size = len(image.getvalue())
                    tar.addfile(member, io.BytesIO(image.getvalue()))
        place = folder / f"{n // 1000:03d}"
        place.mkdir(exist_ok=True)
        names.append(f"{place.name}/{n:06d}.tar")
        os.link(whole, folder / names[-1])
    (folder / "shards.txt").write_text("\n".join(names) + "\n")


def first_batch(shards: str) -> None:
    """In a fresh process: print the seconds to the first batch, and to the source."""
    from selfsight.data.loader import Loader, start_server
    from selfsight.data.multicrop import CropGroup, MultiCrop
    from selfsight.data.sources.shards import TarShards
    from selfsight.data.worker import CONTEXT

    start_server()
    idle = CONTEXT.Process(target=int)  # returns when the server has imported
    idle.start()
    idle.join()
    start = time.perf_counter()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            peak[0] = max(peak[0], tree_memory("Pss_Anon"))

    threading.Thread(target=watch, daemon=True).start()
    source = TarShards(shards, whole_index=False)
    listed = time.perf_counter() - start
    crops = MultiCrop(
        {"global": CropGroup(224, 2, (0.14, 1.0)), "local": CropGroup(96, 4, (0.05, 0.14))}
    )
    with Loader(source, crops, batch_size=BATCH, seed=0, workers=2) as loader:
        next(loader)
        took = time.perf_counter() - start
        done.set()
        memory = max(peak[0], tree_memory("Pss_Anon"))
    print(json.dumps({"listed": listed, "batch": took, "mb": memory / 1e6, "n": source.shards()}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up of a stream of very many shards.")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--first-batch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        first_batch(options.first_batch)
        return
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, options.shards)
        last = f"{(options.shards - 1) // 1000:03d}"
        short = folder / "short.txt"
        short.write_text("".join(f"000/{n:06d}.tar\n" for n in range(16)))
        ways = {
            "16 of them": str(short),
            "list file": str(folder / "shards.txt"),
            "glob": str(folder / "*" / "*.tar"),
            "folders by braces": str(folder / f"{{000..{last}}}"),
        }
        print(f"{'':20}{'listed':>10}{'first batch':>14}{'in all':>10}{'memory':>10}")
        for name, shards in ways.items():
            rounds = []
            for _ in range(options.rounds):
                command = [sys.executable, __file__, "--first-batch", shards]
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                assert result["n"] == (16 if name == "16 of them" else options.shards)
                rounds.append({**result, "process": time.perf_counter() - start})
            best = min(rounds, key=lambda r: r["process"])
            found[name] = rounds
            print(
                f"{name:20}{best['listed']:8.2f} s{best['batch']:12.2f} s{best['process']:8.2f} s"
                f"{best['mb']:7.0f} MB"
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        import torch

        record = {
            "command": "python benchmarks/startup.py " + " ".join(sys.argv[1:]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "rounds": found,
        }
        (options.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
