"""How many images a second and a core does the whole SwAV pipeline make of real JPEGs?

    python benchmarks/loader.py SHARD.tar [--quick] [--workers 2] [--out FOLDER]

From encoded images to batches of 2 x 224 + 4 x 96 crops with flip, colour jitter, grey and blur
(Caron et al. 2020), in one run with

    reference   the same composition in torchvision on Pillow, in torch's DataLoader
    webdataset  webdataset's reader and shuffle with the reference's transforms
    decode      simplejpeg alone in as many processes: the limit

Ours comes in three forms: normalised float32 out, like for like with the reference; uint8 out, as
the loop takes it (normalisation is the device's); and the processes' side where colour and blur
are the device's too. Contenders take turns, each in processes of its own; a figure is the median
over rounds of images a second, a ratio the median of the rounds' ratios. Memory is the largest sum
of proportional set sizes (PSS) of the contender's processes.

The shard has a few images for a long run, so all of them are in memory (the page cache): this is
about decoding and augmentation, not about disks. webdataset must be installed for its line.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import tree_memory
from PIL import Image, ImageFilter
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLOBAL, LOCAL = (224, 2, (0.14, 1.0)), (96, 4, (0.05, 0.14))
BATCH = 64

# ------------------------------------------------------------------------------- the reference


class Blur:
    """Gaussian blur by Pillow with a standard deviation in [0.1, 2], half of the time."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() < 0.5:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image


class Crops:
    """All crops of one image as normalised float tensors, in torchvision's operations."""

    def __init__(self) -> None:
        jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
        self.views = []
        for size, count, scale in (GLOBAL, LOCAL):
            view = transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale=scale),
                    transforms.RandomHorizontalFlip(),
                    transforms.RandomApply([jitter], p=0.8),
                    transforms.RandomGrayscale(p=0.2),
                    Blur(),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            )
            self.views += [view] * count

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [view(image) for view in self.views]


class Images(torch.utils.data.Dataset):
    """The members of a tar file in memory, over and over."""

    def __init__(self, path: Path, transform: Callable[[bytes], Any]) -> None:
        self.data, self.transform = members(path), transform

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.data[index % len(self.data)])


def members(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        found = [tar.extractfile(m) for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]
        return [file.read() for file in found if file is not None]


def reference(path: Path, workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        Images(path, Crops()),
        batch_size=BATCH,
        num_workers=workers,
        shuffle=True,
        multiprocessing_context="fork",
    )
    for batch in loader:
        yield len(batch[0])


def with_webdataset(path: Path, workers: int) -> Iterator[int]:
    webdataset = importlib.import_module("webdataset")

    crops = Crops()

    def crop(sample: tuple[bytes]) -> list[torch.Tensor]:
        return crops(sample[0])

    data = webdataset.WebDataset(
        [str(path)] * workers, shardshuffle=False, nodesplitter=webdataset.split_by_node
    )
    data = data.repeat().shuffle(200).to_tuple("jpg").map(crop)
    loader = torch.utils.data.DataLoader(
        data,  # pyright: ignore[reportArgumentType]
        batch_size=BATCH,
        num_workers=workers,
        multiprocessing_context="fork",
    )
    for batch in loader:
        yield len(batch[0])


# ---------------------------------------------------------------------------------------- ours


def ours(path: Path, workers: int, *, colour: bool = True, floats: bool = False) -> Iterator[int]:
    from selfsight.data.loader import Loader
    from selfsight.data.multicrop import CropGroup, MultiCrop
    from selfsight.data.sources.shards import TarShards

    groups = {
        name: CropGroup(size, count, scale)
        for name, (size, count, scale) in (("global", GLOBAL), ("local", LOCAL))
    }
    crops = MultiCrop(groups, colour=colour)
    mean = torch.tensor(MEAN).view(1, 1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(STD).view(1, 1, 3, 1, 1) * 255)
    torch.set_num_threads(1)
    source = TarShards(str(path))
    with Loader(source, crops, batch_size=BATCH, seed=0, workers=workers) as loader:
        for batch in loader:
            if floats:
                for view in batch.views:
                    view.to(torch.float32).sub_(mean).mul_(scale)
            yield len(batch)


def _decode(path: Path, counter: Any) -> None:
    import simplejpeg

    data = members(path)
    while True:
        for encoded in data:
            simplejpeg.decode_jpeg(encoded, "RGB")
            with counter.get_lock():
                counter.value += 1


def decode(path: Path, workers: int) -> Iterator[int]:
    """Full decoding alone."""
    context = multiprocessing.get_context("spawn")
    counters = [context.Value("q", 0) for _ in range(workers)]
    processes = [context.Process(target=_decode, args=(path, c), daemon=True) for c in counters]
    for process in processes:
        process.start()
    while not all(c.value for c in counters):  # they are importing
        time.sleep(0.1)
    seen = sum(c.value for c in counters)
    while True:
        time.sleep(0.1)
        total = sum(c.value for c in counters)
        yield total - seen
        seen = total


CONTENDERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "reference": reference,
    "webdataset": with_webdataset,
    "ours, float32 out": lambda path, workers: ours(path, workers, floats=True),
    "ours, uint8 out": ours,
    "ours, colour on the device": lambda path, workers: ours(path, workers, colour=False),
    "decode": decode,
}

# ------------------------------------------------------------------------------------ measuring


def measure(name: str, path: Path, workers: int, seconds: float, pipe: Any) -> None:
    """Body of a contender's process: images a second after its first batches, and memory."""
    os.setsid()
    batches = CONTENDERS[name](path, workers)
    for _ in range(3 if name != "decode" else 10):
        next(batches)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], tree_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    images, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        images += next(batches)
    done.set()
    watcher.join()
    pipe.send((images / took, max(peak[0], tree_memory())))
    time.sleep(60)  # until it is ended from outside, with all its processes


def one(name: str, path: Path, workers: int, seconds: float) -> tuple[float, int]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(name, path, workers, seconds, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed, see above") from None
    finally:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="The SwAV pipeline's speed.")
    parser.add_argument("shard", type=Path, help="an uncompressed tar of JPEGs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="two rounds of three seconds")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 3.0
    names = list(CONTENDERS)
    if importlib.util.find_spec("webdataset") is None:
        names.remove("webdataset")
        print("webdataset is not installed: its line is left out")
    sizes = [Image.open(io.BytesIO(data)).size for data in members(options.shard)]
    megapixels = statistics.mean(w * h for w, h in sizes) / 1e6
    print(f"{options.shard.name}: {len(sizes)} JPEGs of {megapixels:.2f} megapixels in the mean")
    rates: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = dict.fromkeys(names, 0)
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            rate, peak = one(name, options.shard, options.workers, options.seconds)
            rates[name].append(rate)
            memory[name] = max(memory[name], peak)
    table = {}
    print(f"{'':28}{'images/s':>10}{'a core':>9}{'ratio':>8}{'of decode':>11}{'MiB':>8}")
    for name in names:
        ratio = np.median(np.array(rates[name]) / np.array(rates["reference"]))
        limit = np.median(np.array(rates[name]) / np.array(rates["decode"]))
        rate = statistics.median(rates[name])
        table[name] = {
            "images_per_second": rate,
            "per_core": rate / options.workers,
            "ratio_to_reference": float(ratio),
            "share_of_decode": float(limit),
            "pss_mib": memory[name] / 2**20,
            "rounds": rates[name],
        }
        print(
            f"{name:28}{rate:10.0f}{rate / options.workers:9.0f}{ratio:8.2f}{limit:10.0%} "
            f"{memory[name] / 2**20:8.0f}"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python benchmarks/loader.py "
            + " ".join([options.shard.name, *sys.argv[2:]]),
            "images": len(sizes),
            "megapixels": megapixels,
            "workers": options.workers,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "contenders": table,
        }
        (options.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
