"""What pixels a run takes, and how values of any depth become 0-255: channels, range, mean and deviation, measured on a sample of images.

docs/data.md says it for users. Axis letters: h w pixels, c channels.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
from PIL import Image

from engine.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LUMA = (0.299, 0.587, 0.114)  # Pillow's, ITU-R 601
SAMPLE = 200  # images whose values are looked at before a run


@dataclass(frozen=True)
class PixelFormat:
    """What pixels a run takes, and how values become 0-255 and then about zero mean and unit variance. Kept in a run's config.

    pages: what the pages of a stack are, "channels" or "images". value_range: "auto", the type's of 8-bit files and low to high
    of others, as `measure` found them; (LOW, HIGH), of all files; "p1,p99", each image's own percentiles; "type", of 8- and 16-bit files their
    type's, others refused. low, high: (c,). is_float: pixels are float32, not uint8. mean, std: (c,), of values from 0 to 1. max_megapixels: a larger image
    is taken for a bad file, for it may be a decompression bomb; it may differ from program to program, so it is not kept and not compared.
    """

    channels: int = 3
    pages: str = "channels"
    value_range: str | tuple = "type"
    low: tuple | None = None
    high: tuple | None = None
    is_float: bool = False
    mean: tuple = MEAN
    std: tuple = STD
    max_megapixels: float = field(default=89.0, compare=False, repr=False)  # Pillow warns from here on

    @classmethod
    def of(cls, saved: dict) -> "PixelFormat":
        """From the config of a run: its JSON has lists for tuples, and calls is_float "deep"."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return cls(is_float=values.pop("deep", False), **values)

    @property
    def is_rgb8(self) -> bool:
        """Three 8-bit channels."""
        return self.channels == 3 and not self.is_float

    @property
    def requested(self) -> dict:
        """What a person sets; the rest is measured."""
        return {name: getattr(self, name) for name in ("channels", "pages", "value_range")}

    def to_dict(self) -> dict:
        """What the config of a run keeps; see `of`."""
        names = {"is_float": "deep"}
        return {names.get(name, name): value for name, value in asdict(self).items() if name != "max_megapixels"}


def percentiles(value_range) -> tuple[float, float] | None:
    """(1, 99) of "p1,p99"; None for another range."""
    found = re.fullmatch(r"p(\d+\.?\d*),p(\d+\.?\d*)", value_range) if isinstance(value_range, str) else None
    return (float(found[1]), float(found[2])) if found else None


# ------------------------------------------------------------------------------------------------- channels and values


def convert_channels(values: np.ndarray, form: PixelFormat, pages: int = 0) -> np.ndarray:
    """(h, w, bands) with the channels of a format: one from colour by luma, three from grey by repetition, else as they are. DataError where they differ.

    pages: that have become bands."""
    bands, channels = values.shape[-1], form.channels
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if bands == channels:
        return values
    if channels == 3 and bands == 1:
        return values.repeat(3, axis=-1)
    if channels == 1 and bands == 3 and not pages:
        return (
            np.array(Image.fromarray(values).convert("L"))[..., None]
            if values.dtype == np.uint8
            else (values @ np.array(LUMA))[..., None]
        )
    if pages:
        raise DataError(
            f"{pages} pages taken as channels, where --channels is {channels}; --pages images takes each page as an image"
        )
    raise DataError(f"{bands} channel{'s' * (bands != 1)}, where --channels is {channels}")


def scale_to_255(values: np.ndarray, form: PixelFormat, eight_bits: bool) -> np.ndarray:
    """(h, w, c) values in the file's units as 0-255: uint8, or float32 in a deep format. DataError for a range that nobody knows."""
    shares = percentiles(form.value_range)
    if not form.is_float and eight_bits:
        return values
    if shares:
        low, high = np.nanpercentile(
            np.where(np.isfinite(subsample(values)), subsample(values), np.nan), shares, axis=(0, 1)
        )
    elif not isinstance(form.value_range, str):
        low, high = form.value_range
    elif eight_bits:
        return values.astype(np.float32)
    elif form.value_range == "auto" and form.is_float:
        low, high = form.low, form.high
    elif form.value_range == "type" and values.dtype == np.uint16:
        return (values // 257).astype(np.uint8)
    else:
        raise DataError(
            f"{values.dtype} values, of whose range nothing is known, for none of the files that were looked at had such: "
            "give --value-range LOW HIGH"
        )
    return rescale(values, low, high)


def rescale(values: np.ndarray, low, high) -> np.ndarray:
    """low to high as 0 to 255, float32; what lies outside is cut off, what is no number becomes low. low, high: numbers, or one a channel."""
    wide = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
    low, span = np.asarray(low, wide.dtype), np.asarray(high, wide.dtype) - np.asarray(low, wide.dtype)
    out = (wide - low) * (255 / np.where(span > 0, span, np.inf))
    return np.nan_to_num(out, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).astype(np.float32)


def subsample(values: np.ndarray, most: int = 1_000_000) -> np.ndarray:
    """About `most` pixels of an image, evenly spread."""
    step = max(1, int(np.sqrt(values.shape[0] * values.shape[1] / most)))
    return values[::step, ::step]


def resize(pixels: np.ndarray, sides: tuple, box: tuple | None = None) -> np.ndarray:
    """(h, w, c), uint8 or float32, or the box (left, top, right, bottom) of it, as (*sides, c): bicubic with antialiasing."""

    def one(part):
        return np.asarray(Image.fromarray(part).resize(tuple(sides[::-1]), Image.Resampling.BICUBIC, box=box))

    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return one(np.ascontiguousarray(pixels))
    out = np.stack([one(np.ascontiguousarray(pixels[..., k])) for k in range(pixels.shape[-1])], axis=-1)
    return out if out.dtype == np.uint8 else out.clip(0, 255)


# ------------------------------------------------------------------------------------------------- measuring


def measure_format(images, asked: PixelFormat) -> tuple[PixelFormat, list[str]]:
    """The format of a run over `images`, and lines that say what was found: range, mean and deviation of a sample of files.

    images: a source with `len` and `open(index)`. Three 8-bit channels keep their type's range and ImageNet's mean and deviation.
    """
    places = np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)).tolist()
    images = replace(images, form=replace(asked, low=None, high=None, is_float=True))
    with ThreadPoolExecutor() as pool:
        kinds = [kind for kind in pool.map(partial(_eight_bits, images), places) if kind is not None]
        if asked.value_range == "auto" and asked.channels == 3 and all(kinds):
            return replace(asked, low=None, high=None, is_float=False, mean=MEAN, std=STD), []
        found = list(pool.map(partial(_look, images), places))
        looks = [look for look in found if not isinstance(look, DataError)]
        if not looks:
            raise DataError(f"none of {len(places)} images can be read; {images.name(places[0])}: {found[0]}")
    deep = [look for look in looks if not look[0]]
    form = replace(asked, is_float=bool(deep) or asked.value_range != "auto")
    if asked.value_range == "auto" and deep:
        form = replace(
            form,
            low=tuple(np.min([low for _, low, _, _ in deep], axis=0).tolist()),
            high=tuple(np.max([high for _, _, high, _ in deep], axis=0).tolist()),
        )
    shares = [
        (values if percentiles(asked.value_range) else scale_to_255(values, form, eight)) / 255.0
        for eight, _, _, values in looks
    ]
    mean = np.mean([share.mean((0, 1), dtype=np.float64) for share in shares], axis=0)
    square = np.mean([np.square(share, dtype=np.float64).mean((0, 1)) for share in shares], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    rounded = [tuple(float(f"{value:.6g}") for value in values) for values in (mean, np.where(std < 1e-6, 1.0, std))]
    form = replace(form, mean=rounded[0], std=rounded[1])
    return form, describe_format(
        form, len(looks), len(images), asked.value_range == "auto" and bool(deep) and len(deep) < len(looks)
    ) + range_warnings(form, deep)


def _eight_bits(images, index) -> bool | None:
    with suppress(DataError):
        return images.open(index).is_uint8


def _look(images, index):
    """(whether 8 bits, lowest and highest finite value of each channel, some pixels: in the file's units, or scaled to its own percentiles)."""
    try:
        opened = images.open(index)
        values = opened.raw()
        finite = np.where(np.isfinite(values), values, np.nan).reshape(-1, values.shape[-1])
        if np.isnan(finite).all(0).any():
            raise DataError("a channel without a number in it")
        if percentiles(images.form.value_range):
            return opened.is_uint8, None, None, subsample(scale_to_255(values, images.form, opened.is_uint8), 10_000)
        return (
            opened.is_uint8,
            np.nanmin(finite, 0).astype(float),
            np.nanmax(finite, 0).astype(float),
            subsample(values, 10_000),
        )
    except DataError as error:
        return error


def describe_format(form: PixelFormat, looked_at: int, of: int, mixed: bool) -> list[str]:
    """What was found, in a line."""

    def each(values):
        values = [f"{value:.6g}" for value in values]
        return values[0] if len(set(values)) == 1 else ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")

    where = f"measured on {looked_at} of {of} images"
    if form.low:
        ends = "; ".join(dict.fromkeys(f"{low:g} to {high:g}" for low, high in zip(form.low, form.high)))
        ranged = f"{ends} ({where})" + ("; of 8-bit files 0 to 255" if mixed else "")
    elif percentiles(form.value_range):
        ranged = "each image's own {} to {} %".format(*(f"{share:g}" for share in percentiles(form.value_range)))
    else:
        ranged = "0 to 255" if form.value_range == "auto" else "{:g} to {:g}".format(*form.value_range)
    return [
        f"pixels: {form.channels} channel{'s' * (form.channels > 1)}, values {ranged}; mean {each(form.mean)}, deviation {each(form.std)} "
        f"of that range" + ("" if form.low else f" ({where})")
    ]


def range_warnings(form: PixelFormat, deep: list) -> list[str]:
    """A warning where nearly all values lie in a small part of a measured range."""
    if not form.low:
        return []
    values = np.concatenate([values.reshape(-1, form.channels) for _, _, _, values in deep]).astype(float)
    inner = np.nanpercentile(np.where(np.isfinite(values), values, np.nan), (0.5, 99.5), axis=0)
    share = (inner[1] - inner[0]) / np.maximum(np.subtract(form.high, form.low), 1e-12)
    k = int(share.argmin())
    if share[k] > 0.05:
        return []
    return [
        f"warning: 99 % of the values of channel {k + 1} lie between {inner[0][k]:g} and {inner[1][k]:g}, a small part of the range {form.low[k]:g} to "
        f"{form.high[k]:g}: if the rest are outliers or stand for no data, give --value-range LOW HIGH or p0.5,p99.5"
    ]
