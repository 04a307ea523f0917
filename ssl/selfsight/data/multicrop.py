"""Multi-crop (Caron et al. 2020, SwAV): several random views of each image, in groups of one size.

The operations and their order are those of SwAV's code: random resized crop, flip, colour jitter in
random order, grey, blur; solarisation last, as DINO added it. The draws differ: each view of each
sample has its own stream of random numbers, a function of (seed, epoch, sample key, group, view),
read at fixed places. A view is planned before the image is decoded and rendered afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selfsight.data import photometric
from selfsight.data.crops import BOX_DRAWS, Box, Interpolation, planes, random_box, resize
from selfsight.data.decode import DecodeLimits, Encoded
from selfsight.data.pixels import RGB, PixelFormat, from_array
from selfsight.data.rng import hash64, mix, uniforms

# Places of the draws of one view. New ones go to the end.
_FLIP = BOX_DRAWS
_JITTER = _FLIP + 1
_FACTORS = _JITTER + 1  # four
_ORDER = _FACTORS + 4  # four
_GRAY = _ORDER + 4
_BLUR = _GRAY + 1
_SIGMA = _BLUR + 1
_SOLARIZE = _SIGMA + 1
_DRAWS = _SOLARIZE + 1


@dataclass
class CropGroup:
    """How the views of one group are made. The defaults are SwAV's.

    Attributes:
        size: side of the square view in pixels.
        count: views of each image.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width over its height.
        flip: probability of a horizontal flip.
        jitter_strengths: brightness, contrast, saturation: factor in [max(0, 1 - s), 1 + s]; hue:
            shift in [-s, s] of a full circle.
        jitter_probability: probability of the colour jitter.
        gray: probability of greyscale.
        blur: probability of Gaussian blur, one for all views or a list with one a view.
        blur_sigma: range of its standard deviation in pixels.
        solarize: probability of solarisation, one for all views or a list with one a view.
        interpolation: "bilinear" or "bicubic".
    """

    size: int
    count: int
    scale: Sequence[float]
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter_strengths: Sequence[float] = (0.8, 0.8, 0.8, 0.2)
    jitter_probability: float = 0.8
    gray: float = 0.2
    blur: float | Sequence[float] = 0.5
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize: float | Sequence[float] = 0.0
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        def need(condition: bool, field: str, what: str) -> None:
            if not condition:
                value = getattr(self, field)
                raise ValueError(f"crop group: {field} must be {what}, but it is {value}.")

        need(self.size >= 1, "size", "at least 1 pixel")
        need(self.count >= 1, "count", "at least 1 view")
        for field, most in (("scale", 1.0), ("ratio", None), ("blur_sigma", None)):
            pair = list(getattr(self, field))
            good = len(pair) == 2 and 0 < pair[0] <= pair[1]
            what = "two increasing numbers above 0" + (f" and up to {most:g}" if most else "")
            need(good and (most is None or pair[1] <= most), field, what)
            setattr(self, field, tuple(pair))
        self.jitter_strengths = tuple(self.jitter_strengths)
        good = len(self.jitter_strengths) == 4 and min(self.jitter_strengths) >= 0
        need(
            good and self.jitter_strengths[3] <= 0.5,
            "jitter_strengths",
            "four numbers from 0 (brightness, contrast, saturation, hue), the hue at most 0.5",
        )
        for field in ("flip", "jitter_probability", "gray", "blur", "solarize"):
            value = getattr(self, field)
            per_view = list(value) if isinstance(value, Sequence) else [value]
            good = all(0 <= p <= 1 for p in per_view)
            if isinstance(value, Sequence):
                what = f"one probability or a list of {self.count}, one a view"
                need(good and len(per_view) == self.count, field, what)
                setattr(self, field, tuple(per_view))
            else:
                need(good, field, "a probability from 0 to 1")
        need(self.interpolation in ("bilinear", "bicubic"), "interpolation", "bilinear or bicubic")


@dataclass(slots=True)
class View:
    """What is done to an image to make one view: a crop, then these operations in this order."""

    box: Box
    flip: bool
    jitter: list[tuple[int, float]]  # (index into photometric.JITTER, factor), in order
    gray: bool
    blur: float  # sigma in pixels, 0 for none
    solarize: bool


class _Recipe:
    """One view's group with its probabilities resolved."""

    def __init__(self, group: CropGroup, view: int) -> None:
        def at(value: float | Sequence[float]) -> float:
            return value[view] if isinstance(value, Sequence) else value

        self.scale = (group.scale[0], group.scale[1])
        self.ratio = (group.ratio[0], group.ratio[1])
        self.flip = group.flip
        self.jitter_probability = group.jitter_probability
        # (operation, lowest factor, width of the range); a strength of 0 leaves the operation out
        self.factors = [
            (n, -s, 2 * s) if n == 3 else (n, max(0.0, 1 - s), 1 + s - max(0.0, 1 - s))
            for n, s in enumerate(group.jitter_strengths)
            if s > 0
        ]
        self.gray = group.gray
        self.blur = at(group.blur)
        self.sigma = (group.blur_sigma[0], group.blur_sigma[1] - group.blur_sigma[0])
        self.solarize = at(group.solarize)

    def plan(self, u: list[float], width: int, height: int) -> View:
        jitter = []
        if u[_JITTER] < self.jitter_probability:
            jitter = [(n, low + range_ * u[_FACTORS + n]) for n, low, range_ in self.factors]
            jitter.sort(key=lambda pair: u[_ORDER + pair[0]])
        return View(
            box=random_box(u, width, height, self.scale, self.ratio),
            flip=u[_FLIP] < self.flip,
            jitter=jitter,
            gray=u[_GRAY] < self.gray,
            blur=self.sigma[0] + self.sigma[1] * u[_SIGMA] if u[_BLUR] < self.blur else 0.0,
            solarize=u[_SOLARIZE] < self.solarize,
        )


class MultiCrop:
    """All views of a sample, from named groups of crops.

    The name of a group seeds its draws: adding or reordering groups leaves the others' views alone.

    Args:
        groups: the crops.
        pixels: channels and bits of the images and of the views.
        reduced: whether a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every crop still has
            at least as many pixels as its view, so that none is enlarged because of it.
        colour: whether the colour jitter, grey, blur and solarisation are done here; False leaves
            them to who gets the plans (the flip is done here always).

    Attributes:
        dtype: of the views, uint8 or uint16.

    Raises:
        ValueError: no groups, or operations on colour for images that have none.
    """

    def __init__(
        self,
        groups: Mapping[str, CropGroup],
        *,
        pixels: PixelFormat = RGB,
        reduced: bool = True,
        colour: bool = True,
    ) -> None:
        if not groups:
            raise ValueError("multi-crop needs at least one group of crops under `views`.")
        for name, group in groups.items() if pixels.channels != 3 else ():
            strengths = group.jitter_strengths[2:] if group.jitter_probability else (0, 0)
            if any(strengths) or group.gray:
                field = "gray" if group.gray else "jitter_strengths of saturation and hue"
                raise ValueError(
                    f"views.{name}: {field} must be 0 for images of {pixels.channels} channels, "
                    "which have no colour."
                )
        self.groups = dict(groups)
        self.pixels, self.reduced, self.colour = pixels, reduced, colour
        self.dtype = np.dtype(pixels.dtype)
        self._operations = photometric.operations(pixels)
        self._recipes = [_Recipe(g, v) for g in self.groups.values() for v in range(g.count)]
        self._names = np.array(
            [hash64(name, v) for name, g in self.groups.items() for v in range(g.count)],
            dtype=np.uint64,
        )

    def shapes(self, images: int) -> list[tuple[int, ...]]:
        """Shape of the views of each group for a batch, in memory order: (count, b, s, s, C)."""
        channels = self.pixels.channels
        return [(g.count, images, g.size, g.size, channels) for g in self.groups.values()]

    def plan(self, seed: int, epoch: int, key: str, width: int, height: int) -> list[View]:
        """The views of a sample, group by group, for an image of that size in pixels."""
        base = np.uint64(hash64("views", seed, epoch, key))
        draws = uniforms(mix(self._names ^ base), _DRAWS).tolist()
        return [
            recipe.plan(u, width, height) for recipe, u in zip(self._recipes, draws, strict=True)
        ]

    def reduction(self, views: list[View]) -> int:
        """The most of 1, 2, 4, 8 by which the image can be smaller without enlarging a crop."""
        sizes = (g.size for g in self.groups.values() for _ in range(g.count))
        most = min(
            min(view.box.height, view.box.width) // size
            for view, size in zip(views, sizes, strict=True)
        )
        return 8 if most >= 8 else 4 if most >= 4 else 2 if most >= 2 else 1

    def render(
        self,
        pixels: np.ndarray,
        views: list[View],
        outs: list[np.ndarray],
        boxes: list[Box] | None = None,
    ) -> None:
        """Make the planned views of `pixels` (H, W, C).

        `outs` has one array (count, size, size, C) a group; each [size, size, C] must be
        contiguous. `boxes` replace those of the views, for pixels of another size.
        """
        source = planes(pixels[None])
        planned = iter(zip(views, boxes or [view.box for view in views], strict=True))
        jitter, gray, blur, solarize, flip = self._operations
        for group, out in zip(self.groups.values(), outs, strict=True):
            for crop, target in zip(out, planes(out).split(1), strict=True):
                view, box = next(planned)
                resize(source, box, target, group.interpolation)
                if view.flip:
                    flip(crop)
                if not self.colour:
                    continue
                for operation, factor in view.jitter:
                    jitter[operation](crop, factor)
                if view.gray:
                    gray(crop)
                if view.blur:
                    blur(crop, view.blur)
                if view.solarize:
                    solarize(crop)

    def __call__(
        self,
        data: bytes | np.ndarray,
        outs: list[np.ndarray],
        *,
        seed: int,
        epoch: int,
        key: str,
        limits: DecodeLimits | None = None,
    ) -> list[View]:
        """Write all views of one sample (encoded, or pixels) into `outs`; gives their plans.

        Raises:
            DecodeError: the sample cannot be used.
        """
        if isinstance(data, np.ndarray):
            pixels = from_array(data, self.pixels)
            views = self.plan(seed, epoch, key, pixels.shape[1], pixels.shape[0])
            self.render(pixels, views, outs)
            return views
        image = Encoded(data, limits, self.pixels)
        views = self.plan(seed, epoch, key, image.width, image.height)
        pixels = image.decode(self.reduction(views) if self.reduced else 1)
        self.render(pixels, views, outs, [image.place(view.box) for view in views])
        return views
