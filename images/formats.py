"""The pixel format of a run: channels, value range, mean and standard deviation; and how values become 0 to 255.

`measure_format` determines a format on a sample of training images. docs/data.md describes the flags.
Axis letters: h w pixels, c channels.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow
SAMPLE = 200  # images that are measured before a run


@dataclass(frozen=True)
class PixelFormat:
    """What pixels a run takes and how values become 0 to 255, then about zero mean and unit variance.

    Args:
        channels: Number of channels of the model's images.
        pages: What the pages of a stack are, "channels" of one image or "images".
        value_range: Which values become 0 and 255.
            "auto": those of the type for 8-bit files, and `low` and `high` for all others.
            (LOW, HIGH): the same two values for all files.
            "p1,p99": percentiles of each image.
            "type": those of the type for 8- and 16-bit files. Other files are refused.
        low, high: (c,) values that `measure_format` found for "auto".
        is_float: Pixels are float32 instead of uint8.
        mean, std: (c,) of values from 0 to 1.
        max_megapixels: A larger image counts as a bad file, because it may be a decompression bomb. Programs may set
            different limits, so this field is neither saved nor compared.
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
        """The format in a run's config, whose JSON has lists instead of tuples and calls `is_float` "deep"."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return cls(is_float=values.pop("deep", False), **values)

    @property
    def is_rgb8(self) -> bool:
        """Whether images have three 8-bit channels."""
        return self.channels == 3 and not self.is_float

    @property
    def requested(self) -> dict:
        """The fields that flags set. The others are measured."""
        return {name: getattr(self, name) for name in ("channels", "pages", "value_range")}

    def to_dict(self) -> dict:
        """What a run's config keeps; the inverse of `of`."""
        values = asdict(self)
        del values["max_megapixels"]
        return {"deep" if name == "is_float" else name: value for name, value in values.items()}


def percentiles(value_range) -> tuple[float, float] | None:
    """(1, 99) for the value range "p1,p99"; None for a value range of another kind."""
    match = re.fullmatch(r"p(\d+\.?\d*),p(\d+\.?\d*)", value_range) if isinstance(value_range, str) else None
    return (float(match[1]), float(match[2])) if match else None


# ------------------------------------------------------------------------------------------------- channels and values


def convert_channels(values: np.ndarray, pixel_format: PixelFormat, pages: int = 0) -> np.ndarray:
    """Values with the channels of a format: colour becomes grey by luma, and grey becomes colour by repetition.

    Args:
        values: (h, w, bands) of any real type. True and False become 255 and 0.
        pages: Number of pages that were taken as channels, or 0.

    Returns:
        (h, w, c).

    Raises:
        DataError: The image has another number of channels.
    """
    bands, channels = values.shape[-1], pixel_format.channels
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if bands == channels:
        return values
    if channels == 3 and bands == 1:
        return values.repeat(3, axis=-1)
    if pages:
        raise DataError(
            f"{pages} pages taken as channels, where --channels is {channels}; "
            "--pages images takes each page as an image"
        )
    if channels == 1 and bands == 3:
        if values.dtype == np.uint8:
            return np.array(Image.fromarray(values).convert("L"))[..., None]
        return (values @ np.array(LUMA))[..., None]
    raise DataError(f"{bands} channel{'s' * (bands != 1)}, where --channels is {channels}")


def scale_to_255(values: np.ndarray, pixel_format: PixelFormat, is_uint8: bool) -> np.ndarray:
    """Scale values from the file's units to 0 to 255.

    Args:
        values: (h, w, c) of any real type.
        is_uint8: The file has 8-bit values.

    Returns:
        (h, w, c), float32 if the format is, else uint8.

    Raises:
        DataError: The format has no range for values of this type.
    """
    value_range = pixel_format.value_range
    if is_uint8 and not pixel_format.is_float:
        return values
    if percentiles(value_range):
        sample = subsample(values)
        finite = np.where(np.isfinite(sample), sample, np.nan)
        low, high = np.nanpercentile(finite, percentiles(value_range), axis=(0, 1))
    elif not isinstance(value_range, str):
        low, high = value_range
    elif is_uint8:
        return values.astype(np.float32)
    elif value_range == "auto" and pixel_format.is_float:
        low, high = pixel_format.low, pixel_format.high
    elif value_range == "type" and values.dtype == np.uint16:
        return (values // 257).astype(np.uint8)
    else:
        raise DataError(
            f"{values.dtype} values, whose range is unknown because no measured file had such values: "
            "give --value-range LOW HIGH"
        )
    return rescale(values, low, high)


def rescale(values: np.ndarray, low, high) -> np.ndarray:
    """Map low to 0 and high to 255, float32. Values outside are clipped, and NaN becomes 0.

    Args:
        values: (h, w, c) of any real type.
        low, high: One number, or (c,) numbers.
    """
    wide = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
    low, high = np.asarray(low, wide.dtype), np.asarray(high, wide.dtype)
    span = np.where(high > low, high - low, np.inf)  # a constant channel becomes 0
    out = (wide - low) * (255 / span)
    return np.nan_to_num(out, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).astype(np.float32)


def subsample(values: np.ndarray, most: int = 1_000_000) -> np.ndarray:
    """About `most` pixels of an image (h, w, ...), evenly spread."""
    step = max(1, int(np.sqrt(values.shape[0] * values.shape[1] / most)))
    return values[::step, ::step]


def resize(pixels: np.ndarray, size: tuple, box: tuple | None = None) -> np.ndarray:
    """Resize an image, bicubic with antialiasing.

    Args:
        pixels: (h, w, c), uint8 or float32.
        size: Height and width of the result.
        box: (left, top, right, bottom) of the part to resize, in pixels; default: the whole image.

    Returns:
        (*size, c), of the same type.
    """

    def resize_by_pillow(values):
        image = Image.fromarray(np.ascontiguousarray(values))
        return np.asarray(image.resize(tuple(size[::-1]), Image.Resampling.BICUBIC, box=box))

    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return resize_by_pillow(pixels)
    out = np.stack([resize_by_pillow(channel) for channel in np.moveaxis(pixels, -1, 0)], axis=-1)
    return out if out.dtype == np.uint8 else out.clip(0, 255)  # bicubic weights overshoot


# ------------------------------------------------------------------------------------------------- measuring


class FileSample(NamedTuple):
    """What `measure_format` needs of one file.

    low, high: (c,) lowest and highest finite value. values: (h', w', c), about 10,000 pixels, in the file's units, or
    scaled to 0 to 255 if each image has a range of its own.
    """

    is_uint8: bool
    low: np.ndarray
    high: np.ndarray
    values: np.ndarray


def measure_format(images, requested: PixelFormat) -> tuple[PixelFormat, list[str]]:
    """Determine what a format leaves open, on up to 200 images evenly spread over the list.

    Three 8-bit channels under "auto" keep the range 0 to 255 and ImageNet's mean and standard deviation.

    Args:
        images: A source of images, see sources.py.
        requested: Has the channels, pages and value range of the run.

    Returns:
        The complete format, and lines to print that describe it.

    Raises:
        DataError: No image of the sample can be read.
    """
    positions = np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)).tolist()
    is_auto = requested.value_range == "auto"
    # The depth of the files is not known yet, so they are opened in a format that takes any.
    images = replace(images, form=replace(requested, low=None, high=None, is_float=True))
    with ThreadPoolExecutor() as pool:
        # Headers first: folders of 8-bit colour are the usual case, and need no decoding.
        if is_auto and requested.channels == 3 and False not in pool.map(partial(_is_uint8, images), positions):
            return replace(requested, low=None, high=None, is_float=False, mean=MEAN, std=STD), []
        results = list(pool.map(partial(_sample_file, images), positions))
    samples = [result for result in results if isinstance(result, FileSample)]
    if not samples:
        raise DataError(f"none of {len(positions)} images can be read; {images.name(positions[0])}: {results[0]}")

    # The range of "auto" comes from the files of more than 8 bits alone.
    deeper = [sample for sample in samples if not sample.is_uint8]
    pixel_format = replace(requested, is_float=bool(deeper) or not is_auto)
    if is_auto and deeper:
        low = np.min([sample.low for sample in deeper], axis=0)
        high = np.max([sample.high for sample in deeper], axis=0)
        pixel_format = replace(pixel_format, low=tuple(low.tolist()), high=tuple(high.tolist()))

    # Each image has the same weight in mean and standard deviation, whatever its size.
    if percentiles(requested.value_range):
        scaled = [sample.values / 255.0 for sample in samples]
    else:
        scaled = [scale_to_255(sample.values, pixel_format, sample.is_uint8) / 255.0 for sample in samples]
    mean = np.mean([values.mean((0, 1), dtype=np.float64) for values in scaled], axis=0)
    mean_square = np.mean([np.square(values, dtype=np.float64).mean((0, 1)) for values in scaled], axis=0)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    std = np.where(std < 1e-6, 1.0, std)  # a constant channel
    mean, std = (tuple(float(f"{value:.6g}") for value in values) for values in (mean, std))
    pixel_format = replace(pixel_format, mean=mean, std=std)

    lines = [describe_format(pixel_format, len(samples), len(images), is_mixed=0 < len(deeper) < len(samples))]
    return pixel_format, lines + range_warnings(pixel_format, deeper)


def _is_uint8(images, index: int) -> bool | None:
    with suppress(DataError):
        return images.open(index).is_uint8


def _sample_file(images, index: int) -> FileSample | DataError:
    try:
        opened = images.open(index)
        values = opened.raw()
        finite = np.where(np.isfinite(values), values, np.nan).reshape(-1, values.shape[-1])
        if np.isnan(finite).all(0).any():
            raise DataError("a channel without a number in it")
        low, high = np.nanmin(finite, 0).astype(float), np.nanmax(finite, 0).astype(float)
        if percentiles(images.form.value_range):
            values = scale_to_255(values, images.form, opened.is_uint8)
        return FileSample(opened.is_uint8, low, high, subsample(values, 10_000))
    except DataError as error:
        return error


def describe_format(pixel_format: PixelFormat, measured: int, total: int, is_mixed: bool) -> str:
    """One line about a format.

    Args:
        measured: Number of images that were measured, of `total`.
        is_mixed: There were 8-bit files among deeper ones.
    """

    def join(values):
        values = [f"{value:.6g}" for value in values]
        return values[0] if len(set(values)) == 1 else ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")

    channels, value_range = pixel_format.channels, pixel_format.value_range
    sample = f" (measured on {measured} of {total} images)"
    statistics = f"mean {join(pixel_format.mean)}, standard deviation {join(pixel_format.std)} of that range"
    if pixel_format.low:
        ranges = [f"{low:g} to {high:g}" for low, high in zip(pixel_format.low, pixel_format.high)]
        text = "; ".join(dict.fromkeys(ranges)) + sample + "; of 8-bit files 0 to 255" * is_mixed
    else:
        statistics += sample
        if percentiles(value_range):
            text = "each image's own {:g} to {:g} %".format(*percentiles(value_range))
        else:
            text = "{:g} to {:g}".format(*((0, 255) if value_range == "auto" else value_range))
    return f"pixels: {channels} channel{'s' * (channels > 1)}, values {text}; {statistics}"


def range_warnings(pixel_format: PixelFormat, samples: list[FileSample]) -> list[str]:
    """A warning if 99 % of the values of a channel lie within a twentieth of its measured range."""
    if not pixel_format.low:
        return []
    values = np.concatenate([sample.values.reshape(-1, pixel_format.channels) for sample in samples]).astype(float)
    finite = np.where(np.isfinite(values), values, np.nan)
    inner_low, inner_high = np.nanpercentile(finite, (0.5, 99.5), axis=0)
    low, high = pixel_format.low, pixel_format.high
    fraction = (inner_high - inner_low) / np.maximum(np.subtract(high, low), 1e-12)
    k = int(fraction.argmin())
    if fraction[k] > 0.05:
        return []
    return [
        f"warning: 99 % of the values of channel {k + 1} lie between {inner_low[k]:g} and {inner_high[k]:g}, "
        f"a small part of the range {low[k]:g} to {high[k]:g}: "
        "if the rest are outliers or stand for no data, give --value-range LOW HIGH or p0.5,p99.5"
    ]
