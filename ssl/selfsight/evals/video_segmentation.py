"""Objects followed through videos by the features of patches: DAVIS's task, on any folder.

    FOLDER/frames/NAME/*.jpg   or DAVIS's own JPEGImages/480p/NAME/*.jpg
           masks/NAME/*.png                Annotations/480p/NAME/*.png

Masks hold the number of the object at each pixel (palette or grey; 0 is the background, 255 is
ignored), named like their frames. The first frame's is given; the others' are found by
`propagation.py` and compared where a mask is. Published for DINO (J and F, mean, DAVIS 2017 val):
ViT-S/16 61.8, ViT-B/16 62.3, ViT-S/8 69.9, ViT-B/8 71.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsight.data.decode import DecodeError, Encoded
from selfsight.data.sources.source import IMAGE_EXTENSIONS
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.intervals import Figure
from selfsight.evals.propagation import (
    one_hot,
    outline_match,
    propagate,
    region_overlap,
    sharpened,
)
from selfsight.pictures.attention import attends, patch_features

if TYPE_CHECKING:
    from selfsight.evals.bench import Bench
    from selfsight.evals.subject import Subject

LAYOUTS = (
    ("frames", "masks"),
    ("JPEGImages/480p", "Annotations/480p"),
    ("JPEGImages", "Annotations"),
)
IGNORED = 255
STEP = 64  # sides are resized to multiples of this, as DINO does


@dataclass(frozen=True)
class Video:
    """Frames in order, and the mask of each that has one."""

    name: str
    frames: list[Path]
    masks: list[Path | None]


class VideoSegmentation(Evaluator):
    """J and F of label propagation.

    Args:
        path: Folder of the videos.
        size: Shorter side of the frames, pixels.
        previous: Frames before the present one that answer, beside the first.
        radius: In patches, around a place, where answers are looked for.
        topk: Answers of a place.
        temperature: Of the softmax over them.
        level: Feature map of a convolutional trunk.
        skip_last: DAVIS does not count the last frame of a video.
        videos: At most so many, by name; null: all.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        size: int = 480,
        previous: int = 7,
        radius: int = 12,
        topk: int = 5,
        temperature: float = 0.1,
        level: str = "c4",
        skip_last: bool = True,
        videos: int | None = None,
    ) -> None:
        if size < STEP or previous < 0 or radius < 1 or topk < 1 or temperature <= 0:
            raise ValueError(
                f"eval.video_segmentation needs size of at least {STEP}, previous of at least 0, "
                "radius and topk of at least 1, and temperature above 0"
            )
        self.path, self.size, self.previous = path, size, previous
        self.how: dict[str, Any] = {"radius": radius, "topk": topk, "temperature": temperature}
        self.level, self.skip_last, self.videos = level, skip_last, videos

    def layers(self, subject: "Subject") -> Sequence[str]:
        return ()

    def evaluate(self, bench: "Bench") -> Answer:
        if self.path is None:
            raise ValueError("give the folder of videos: eval.video_segmentation.path=FOLDER")
        videos = find_videos(Path(self.path).expanduser())[: self.videos]
        rows: list[tuple[str, int, float, float]] = []
        for number, video in enumerate(videos):
            rows += self._one(video, bench)
            bench.say(f"video {number + 1} of {len(videos)}: {video.name}")
        if not rows:
            raise ValueError(f"{self.path}: no frame but the first has a mask to compare with")
        table = torch.tensor([row[2:] for row in rows], dtype=torch.float64) * 100
        both = table.mean(1)
        return Answer(
            main="j_and_f",
            figures={
                "j_and_f": _interval(both),
                "j": _interval(table[:, 0]),
                "f": _interval(table[:, 1]),
            },
            protocol=(
                f"label propagation in {len(videos)} videos, {len(rows)} objects: first frame and "
                f"{self.previous} previous, radius {self.how['radius']}, top {self.how['topk']}, "
                f"T {self.how['temperature']:g}, {self.size} pixels"
            ),
            details={
                "objects": [
                    {"video": name, "object": which, "j": 100 * j, "f": 100 * f}
                    for name, which, j, f in rows
                ]
            },
        )

    def _one(self, video: Video, bench: "Bench") -> list[tuple[str, int, float, float]]:
        """J and F of each object, means over the frames of a video."""
        first = video.masks[0]
        assert first is not None
        truth = read_mask(first)
        objects = [int(k) for k in np.unique(truth) if k not in (0, IGNORED)]
        classes = max(objects, default=0) + 1
        features = self._features(video.frames[0], bench)
        given = torch.from_numpy(np.where(truth == IGNORED, 0, truth).astype(np.int64))
        place = (features.shape[0], features.shape[1])
        start = (features, one_hot(given, classes, place).to(features.device))
        recent: list[tuple[Tensor, Tensor]] = []
        measured: dict[int, list[tuple[float, float]]] = {k: [] for k in objects}
        last = len(video.frames) - 1
        for number in range(1, len(video.frames)):
            features = self._features(video.frames[number], bench)
            context = [start, *recent]
            shares = propagate(
                features, [f for f, _ in context], [label for _, label in context], **self.how
            )
            recent = [*recent, (features, shares)][-self.previous :] if self.previous else []
            mask = video.masks[number]
            if mask is None or (number == last and self.skip_last and last > 1):
                continue
            truth = read_mask(mask)
            found = sharpened(shares, truth.shape).cpu().numpy()
            counted = truth != IGNORED
            for k in objects:
                pair = ((found == k) & counted, truth == k)
                measured[k].append((region_overlap(*pair), outline_match(*pair)))
        means = {k: np.mean(pairs, axis=0).tolist() for k, pairs in measured.items() if pairs}
        return [(video.name, k, j, f) for k, (j, f) in means.items()]

    @torch.no_grad()
    def _features(self, path: Path, bench: "Bench") -> Tensor:
        """(h, w, d) of one frame."""
        subject = bench.subject
        try:
            pixels = Encoded(path.read_bytes(), None, subject.pixels).decode()
        except (DecodeError, OSError) as error:
            raise ValueError(f"the frame {path} cannot be read: {error}") from None
        shorter = min(pixels.shape[:2])
        scaled = [
            max(STEP, round(side * self.size / shorter / STEP) * STEP) for side in pixels.shape[:2]
        ]
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(
            tensor.float(), scaled, mode="bicubic", align_corners=False, antialias=True
        )
        top = 255 if tensor.dtype == torch.uint8 else 65535
        images = resized.round().clamp(0, top).to(tensor.dtype).to(bench.device)
        with bench.autocast():
            inputs = subject.normalize(images)
            if attends(subject.trunk):
                return patch_features(subject.trunk, inputs)[0]
            return subject.trunk.features(inputs)[self.level][0].float().permute(1, 2, 0)


def find_videos(folder: Path) -> list[Video]:
    """The videos of a folder, by name.

    Raises:
        ValueError: there are none, or a video's first frame has no mask.
    """
    for frames, masks in LAYOUTS:
        if (folder / frames).is_dir() and (folder / masks).is_dir():
            break
    else:
        raise ValueError(
            f"{folder} needs frames/NAME/*.jpg and masks/NAME/*.png, or DAVIS's layout"
        )
    videos = []
    for place in sorted(p for p in (folder / frames).iterdir() if p.is_dir()):
        files = sorted(p for p in place.iterdir() if p.suffix.lower()[1:] in IMAGE_EXTENSIONS)
        known = {p.stem: p for p in (folder / masks / place.name).glob("*.png")}
        if not files:
            continue
        if files[0].stem not in known:
            raise ValueError(
                f"{folder / masks / place.name} lacks {files[0].stem}.png, the first frame's mask"
            )
        videos.append(Video(place.name, files, [known.get(file.stem) for file in files]))
    if not videos:
        raise ValueError(f"{folder / frames} holds no videos: one folder of frames for each")
    return videos


def read_mask(path: Path) -> np.ndarray:
    """Numbers of the objects, (rows, columns).

    Raises:
        ValueError: it is no image of one channel.
    """
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except Exception as error:  # Pillow raises what it likes
        raise ValueError(f"the mask {path} cannot be read: {error}") from None
    if mask.ndim != 2:
        raise ValueError(f"the mask {path} has colours: it must hold numbers (palette or grey)")
    return mask.astype(np.int64)


def _interval(values: Tensor) -> Figure:
    """Mean over objects, with its interval from their spread."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Figure(mean)
    half = 1.96 * float(values.std()) / count**0.5
    return Figure(mean, mean - half, mean + half, "objects")
