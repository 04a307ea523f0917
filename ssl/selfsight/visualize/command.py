"""`launch/visualize.py`: from a trunk and images to PNG files and one page."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsight.build import build, compose
from selfsight.config import ConfigError, check_section
from selfsight.data.evaluation import central_square
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.source import Source
from selfsight.evals.features import extract
from selfsight.pictures import attention, colours
from selfsight.pictures.components import as_colours
from selfsight.pictures.neighbours import nearest
from selfsight.visualize.media import Named, read_path, read_source
from selfsight.visualize.page import page
from selfsight.visualize.settings import Visualize, checked
from selfsight.weights.load import LoadedTrunk, load_trunk

ROOT = Path(__file__).parents[3]


@dataclass
class Seen:
    """One image and the pictures made of it.

    Attributes:
        name: of the image.
        image: as the trunk got it, before normalisation.
        pictures: by name: `attention_mean`, `attention_head_0`, `mask_mean`, ..., `patches`.
        alike: its nearest neighbours with their cosines, nearest first.
    """

    name: str
    image: Image.Image
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    alike: list[tuple[str, float, Image.Image]] = field(default_factory=list)


def visualize(arguments: Sequence[str]) -> Path:
    """Do what the command line asks; returns the page's path.

    Raises:
        ValueError: one sentence about what cannot be done.
    """
    settings, data = _parse(arguments)
    subject = settings.run or settings.trunk
    assert subject is not None
    loaded = load_trunk(Path(subject).expanduser())
    form = PixelFormat(channels=len(loaded.mean))
    images = _images(settings, data, form)
    folder = _folder(settings)
    look = _Look(loaded, settings)
    seen = look.maps(images)
    if settings.neighbours:
        bank, exact = _bank(settings, data, form, images)
        look.neighbours(seen, images, bank, exact)
    for item in seen:
        place = folder / _safe(item.name)
        place.mkdir(exist_ok=True)
        item.image.save(place / "image.png")
        for name, picture in item.pictures.items():
            picture.save(place / f"{name}.png")
    path = folder / "visualize.html"
    name = Path(subject).expanduser().resolve().name
    path.write_text(page(name, loaded.description, look.notices, seen, look.attends, settings.mass))
    for notice in look.notices:
        print(notice, file=sys.stderr)
    print(f"{path}  ({len(seen)} images; PNG files beside it)")
    return path


def _parse(arguments: Sequence[str]) -> tuple[Visualize, Source | None]:
    """The settings, and the source that `data=...` describes."""
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is not understood: write key=value, or --help")
    of_data = [a for a in arguments if re.match(r"\+*data[.=]", a)]
    config: Any = dict(compose("visualize", [a for a in arguments if a not in of_data]))
    config = {str(key): value for key, value in config.items()}
    check_section("visualize", config, f"{Visualize.__module__}.{Visualize.__name__}")
    settings = checked(Visualize(**config), bool(of_data))
    return settings, build(compose("pretrain", of_data).data.train) if of_data else None


def _images(settings: Visualize, data: Source | None, form: PixelFormat) -> list[Named]:
    if settings.image is None:
        assert data is not None
        return read_source(data, form, settings.images, _say)
    path = Path(settings.image).expanduser()
    return read_path(path, form, most=settings.images, seconds=settings.seconds, notice=_say)


def _bank(
    settings: Visualize, data: Source | None, form: PixelFormat, images: list[Named]
) -> tuple[list[Named], bool]:
    """Images among which neighbours are sought, and whether they are the images themselves."""
    if settings.bank is not None:
        path = Path(settings.bank).expanduser()
        found = read_path(path, form, most=settings.among, seconds=settings.seconds, notice=_say)
        return found, False
    if data is not None:
        return read_source(data, form, settings.among, _say), False
    path = Path(settings.image or "").expanduser()
    if path.is_dir():
        return read_path(path, form, most=settings.among, seconds=1.0, notice=_say), False
    return images, True


class _Look:
    """A trunk, and what is made of images with it."""

    def __init__(self, loaded: LoadedTrunk, settings: Visualize) -> None:
        kind = settings.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind)
        self.trunk, self.loaded, self.settings = loaded.trunk, loaded, settings
        self.trunk.to(self.device).eval()
        self.attends = attention.attends(self.trunk)
        self.notices: list[str] = []
        if not self.attends:
            self.notices.append(
                f"{type(self.trunk).__name__} is convolutional and has no attention to show: these "
                "are the components of its last feature map, and neighbours."
            )
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in (loaded.mean, loaded.std)
        )

    def maps(self, images: Sequence[Named]) -> list[Seen]:
        """Attention, masks and components of each image."""
        unit = getattr(self.trunk, "patch_size", 32)
        seen, features = [], []
        for name, pixels in images:
            pixels = fitted(pixels, self.settings.size, unit)
            tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
            inputs = self._normalised(tensor.to(self.device))
            item = Seen(name, colours.rgb(tensor[0].numpy()))
            features.append(attention.patch_features(self.trunk, inputs)[0].cpu())
            if self.attends:
                self._attention(item, attention.class_attention(self.trunk, inputs)[0].cpu())
            seen.append(item)
        for item, colour in zip(seen, as_colours(features), strict=True):
            array = (colour.numpy() * 255).round().astype(np.uint8)
            item.pictures["patches"] = colours.enlarged(array, item.image.size)
        return seen

    def _attention(self, item: Seen, heads: Tensor) -> None:
        """Pictures of (heads, rows, columns)."""
        named = {"mean": heads.mean(0), **{f"head_{n}": head for n, head in enumerate(heads)}}
        for name, values in named.items():
            mask = attention.mass_mask(values, self.settings.mass)
            item.pictures[f"attention_{name}"] = colours.attention_picture(
                item.image, values.numpy()
            )
            item.pictures[f"mask_{name}"] = colours.mask_picture(item.image, mask.numpy())

    def neighbours(
        self, seen: list[Seen], images: list[Named], bank: list[Named], same: bool
    ) -> None:
        """Add to each image the nearest of the bank; not itself."""
        if same and len(images) < 2:
            self.notices.append(
                "One image has no neighbours: give bank=FOLDER or data=... to look for them in."
            )
            return
        names = {name: n for n, (name, _) in enumerate(bank)}
        squares = self._squares(bank)
        found = self._features(squares)
        queries = found if same else self._features(self._squares(images))
        own = torch.tensor([names.get(name, -1) for name, _ in images])
        count = self.settings.neighbours + 1  # itself among them, perhaps
        cosines, indices = nearest(queries, found, count)
        for n, item in enumerate(seen):
            for cosine, index in zip(cosines[n].tolist(), indices[n].tolist(), strict=True):
                if index != own[n] and len(item.alike) < self.settings.neighbours:
                    item.alike.append((bank[index][0], cosine, colours.rgb(squares[index].numpy())))

    def _squares(self, images: Sequence[Named]) -> Tensor:
        size = self.loaded.image_size
        squares = [central_square(pixels, size, round(size * 256 / 224)) for _, pixels in images]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()

    def _features(self, squares: Tensor) -> Tensor:
        return extract(
            self.trunk, squares, normalize=self._normalised, batch_size=32, device=self.device
        )

    def _normalised(self, pixels: Tensor) -> Tensor:
        white = 255 if pixels.dtype == torch.uint8 else 65535
        return (pixels.float() / white - self.mean) / self.std


def fitted(pixels: np.ndarray, size: int, unit: int) -> np.ndarray:
    """Pixels (H, W, C) with the shorter side resized to `size` and both cropped, centrally, to
    multiples of `unit`; sides longer than four times the shorter are cut before."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = (max(0, side - 4 * short) // 2 for side in (height, width))
    pixels = pixels[top : top + 4 * short, left : left + 4 * short]
    height, width = pixels.shape[:2]
    size = max(unit, size // unit * unit)
    scaled = [max(size, round(side * size / short)) for side in (height, width)]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    tensor = torch.nn.functional.interpolate(
        tensor, scaled, mode="bicubic", align_corners=False, antialias=True
    )
    whole = tensor[0].round().clamp(0, 65535 if pixels.dtype == np.uint16 else 255)
    array = whole.permute(1, 2, 0).numpy().astype(pixels.dtype)
    rows, columns = (side // unit * unit for side in scaled)
    top, left = (scaled[0] - rows) // 2, (scaled[1] - columns) // 2
    return array[top : top + rows, left : left + columns]


def _folder(settings: Visualize) -> Path:
    """The folder of the pictures, made."""
    what = Path(settings.image or "data").name
    subject = Path(settings.run or settings.trunk or "").expanduser()
    default = subject / "visualize" if settings.run else Path("visualizations") / subject.stem
    folder = Path(settings.out).expanduser() if settings.out else default / _safe(what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be made: {error.strerror or error}") from None
    return folder


def _safe(name: str) -> str:
    """A name as that of one folder."""
    return re.sub(r"[^\w.+-]+", "_", name).strip(".") or "image"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print((ROOT / "conf" / "visualize.yaml").read_text(), end="")
        return 0
    try:
        visualize(arguments)
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        return 2
    return 0
