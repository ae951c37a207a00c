"""Open image files of any kind: photographs, TIFF stacks and arrays, of any depth and number of channels.

`open_file` reads a file's header and returns a PillowImage (8 bits) or an ArrayImage (anything else). Their `array()`
decodes the pixels as (h, w, c), uint8 or, in a float format, float32, in both cases from 0 to 255. So later stages need
not know the kind of file. docs/data.md has the table of kinds.

Axis letters: h w pixels, c channels, n pages. A string such as "nchw" gives the axes of an array, in order.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torchvision.io import ImageReadMode, decode_image

from engine.errors import DataError
from images.formats import PixelFormat, convert_channels, scale_to_255

ARRAYS, TIFF = (".npy", ".npz"), (".tif", ".tiff")
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    *TIFF,
    ".ppm",
    ".pgm",
    *(suffix for suffix in (".jfif", ".jpe", ".avif", ".jp2") if suffix in Image.registered_extensions()),
)
Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before decoding, gives an error that names the file
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a photograph may carry long texts


# ------------------------------------------------------------------------------------------------- opening


def open_file(path, pixel_format: PixelFormat) -> "ArrayImage":
    """Open an image without decoding its pixels.

    Args:
        path: A file, or one page of a file, such as `stack.tif#7`, the eighth.
        pixel_format: The format that the pixels will be converted to.

    Returns:
        A PillowImage or an ArrayImage.

    Raises:
        DataError: The file cannot be used for training; the message is the reason.
    """
    path, name = str(path), file_name(str(path))
    page = int(path[len(name) + 1 :]) if name != path else None
    suffix = os.path.splitext(name)[1].lower()
    with decoding_errors(name):
        if suffix in ARRAYS:
            return open_array(name, page, pixel_format)
        if suffix in TIFF and pixel_format.value_range != "type":
            if page is not None or not pillow_reads_all(name, pixel_format):
                return open_tiff(name, page, pixel_format)
        return open_with_pillow(name, pixel_format)


def open_image(path, pixel_format: PixelFormat = PixelFormat()) -> Image.Image:
    """Open a file with Pillow, which decodes it when its pixels are first used.

    Raises:
        DataError: Pillow cannot open the file, or the image is too thin or too large.
    """
    with decoding_errors(path):
        image = Image.open(path)
    check_sides(image.height, image.width, pixel_format)
    return image


def check_sides(height: int, width: int, pixel_format: PixelFormat):
    """Raise DataError for an image that is too thin or too large."""
    if min(height, width) < 8:
        raise DataError(f"{width} x {height} pixels, a side under 8")
    if width * height > pixel_format.max_megapixels * 1e6:
        raise DataError(
            f"{width} x {height} pixels, more than {pixel_format.max_megapixels:g} million; "
            "--max-megapixels sets the limit"
        )


@contextmanager
def decoding_errors(path=None):
    """Turn every exception of a decoder into a DataError, because corrupt files make decoders raise any type.

    Args:
        path: The file, if it may be missing or empty, so that the message can say so.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(describe_error(error, path)) from None


def describe_error(error: Exception, path=None) -> str:
    """Why a file cannot be decoded; see `decoding_errors`."""
    if path is not None:
        if os.path.isdir(path):
            return "a folder, not a file"
        if not os.path.exists(path):
            return "a link to nothing" if os.path.islink(path) else "no such file"
        if os.path.getsize(path) == 0:
            return "an empty file"
        if isinstance(error, (Image.UnidentifiedImageError, tifffile.TiffFileError)):
            return "not an image"
    if "imagecodecs" in str(error):
        return f"unreadable without a package: {str(error).strip('<>')} (pip install imagecodecs)"
    return f"unreadable: {str(error) or type(error).__name__}"


# ------------------------------------------------------------------------------------------------- opened images


class ArrayImage:
    """An opened image whose values are decoded when they are asked for.

    Args:
        read: Decodes the values as the file stores them, (h, w, bands) of any real type.
        sides: Height and width of these values.
        form: The pixel format to convert to.
        is_uint8: The file has 8-bit values.
        orientation: EXIF's or TIFF's number, 1 to 8, for how the stored values become upright. Any other counts as 1.
        pages: Number of pages that `read` returns as channels, or 0.

    `sides` of the object are height and width of the upright image.
    """

    def __init__(self, read: Callable, sides, form: PixelFormat, is_uint8=False, orientation: int = 1, pages: int = 0):
        check_sides(*sides, form)
        self.read, self.form, self.is_uint8, self.orientation, self.pages = read, form, is_uint8, orientation, pages
        self.sides = tuple(sides[::-1] if is_transposed(orientation) else sides)

    def draft(self, height: int, width: int):
        """Allow decoding at a smaller size, but not below this one. Only JPEG files can be, see PillowImage."""

    def raw(self) -> np.ndarray:
        """The upright image (h, w, c), in the file's units and with the format's channels."""
        with decoding_errors():
            return apply_orientation(convert_channels(self.read(), self.form, self.pages), self.orientation)

    def array(self) -> np.ndarray:
        """The upright image (h, w, c) from 0 to 255, uint8 or float32."""
        return scale_to_255(self.raw(), self.form, self.is_uint8)


class PillowImage(ArrayImage):
    """An opened image of 8-bit values that Pillow decodes."""

    def __init__(self, image: Image.Image, form: PixelFormat):
        self.image = image
        # Pillow itself turns a TIFF upright, and gives the size that it will have.
        self.is_transposed = is_transposed(exif_orientation(image)) and image.format != "TIFF"
        sides = image.size if self.is_transposed else image.size[::-1]
        # Not a method of this object: a reference to itself would keep the pixels until the next garbage collection.
        super().__init__(partial(read_upright, image, form), sides, form, is_uint8=True)

    def draft(self, height: int, width: int):
        """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, but not below this one."""
        self.image.draft(None, (height, width) if self.is_transposed else (width, height))


def read_upright(image: Image.Image, pixel_format: PixelFormat) -> np.ndarray:
    """The upright image (h, w, 3), or (h, w, bands) if the format has two, or four or more, channels."""
    bands = len(image.getbands())
    if bands != pixel_format.channels or bands in (1, 3):
        return np.array(to_rgb(image))
    image.load()  # RGBA or CMYK as four channels, not as a colour
    return np.array(apply_orientation(np.asarray(image), exif_orientation(image)), order="C")


# ------------------------------------------------------------------------------------------------- files for Pillow


def open_with_pillow(path, pixel_format: PixelFormat) -> ArrayImage:
    """Open a file of a kind that Pillow knows, with another decoder where Pillow would lose depth."""
    image = open_image(path, pixel_format)
    read = None if pixel_format.value_range == "type" else reader_of_deep_image(image, path)
    if read is None:
        return PillowImage(image, pixel_format)
    return ArrayImage(
        lambda: composite_on_white(read(), pixel_format.channels),
        image.size[::-1],
        pixel_format,
        orientation=exif_orientation(image),
    )


def reader_of_deep_image(image: Image.Image, path) -> Callable | None:
    """A function that decodes an image of more than 8 bits, (h, w, bands) as stored; None for an image of 8 bits.

    Of most such files Pillow would clip the values, scale them, or cut them to 8 bits.
    """
    codec, _, offset, args = image.tile[0] if image.tile else ("", None, 0, "")
    if image.format == "PNG" and args in ("LA;16B", "RGB;16B", "RGBA;16B"):
        return partial(read_deep_png, path)
    if image.format == "PPM" and (image.mode == "I" or isinstance(args, tuple) and args[-1] > 255):
        shape = (image.height, image.width, len(image.getbands()))
        return partial(read_deep_pnm, path, offset, shape, is_text=codec == "ppm_plain")
    if image.format == "JPEG2000" and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            header = file.read(4096)
        marker = header.find(b"\xff\x51")  # SIZ, whose byte 40 has the depth of the first channel, minus 1
        if marker >= 0 and (header[marker + 40] & 127) >= 8:
            raise DataError(
                "JPEG 2000 in colour with more than 8 bits, which would be cut to 8: save it as TIFF or PNG"
            )
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return lambda: np.asarray(image)[..., None]
    return None


def read_deep_pnm(path, offset: int, shape: tuple, is_text: bool) -> np.ndarray:
    """Read a PGM or PPM with values above 255, which Pillow scales to 65535 or cuts to 8 bits.

    Args:
        offset: Where the values start in the file.
        shape: (h, w, bands).
        is_text: The values are numbers in text (P2 and P3), otherwise two bytes each (P5 and P6).

    Returns:
        (h, w, bands), uint16.
    """
    if is_text:
        text = re.sub(rb"#[^\n]*", b"", Path(path).read_bytes()[offset:])  # without comments
        values = np.array(text.split(), np.uint16)
    else:
        values = np.fromfile(path, ">u2", math.prod(shape), offset=offset)
    return values.reshape(shape).astype(np.uint16)


def read_deep_png(path) -> np.ndarray:
    """Read a PNG of 16 bits in colour or with transparency, (h, w, bands), by torchvision. Pillow cuts it to 8 bits."""
    with warnings.catch_warnings(action="ignore"):  # torchvision's decoders are to move to another package
        return rearrange(decode_image(str(path), ImageReadMode.UNCHANGED), "c h w -> h w c").numpy()


def composite_on_white(values: np.ndarray, channels: int) -> np.ndarray:
    """Composite 16-bit values on white if the last of two or four bands is transparency.

    Args:
        values: (h, w, bands), uint16.
        channels: Number of channels that are wanted. If there are as many bands, transparency is one of the channels.
    """
    if values.shape[-1] not in (2, 4) or values.shape[-1] == channels:
        return values
    alpha = values[..., -1:] / 65535
    return np.rint(values[..., :-1] * alpha + 65535 * (1 - alpha)).astype(np.uint16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame of an image as upright 8-bit RGB.

    16 bits are scaled to 8, transparency is composited on white, and CMYK, palette and grey are converted.

    Raises:
        DataError: The values have 32 bits. Their range is in no file: it may be 0 to 1, or heights, or counts.
    """
    image.load()
    orientation = exif_orientation(image)
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):  # there 16 bits at most
        kind = "float" if image.mode == "F" else "integer"
        raise DataError(f"32-bit {kind} values, whose range is not known: save the image with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.asarray(image, np.int64)
        image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if orientation == 1 else Image.fromarray(apply_orientation(np.asarray(image), orientation))


def to_chw(pixels) -> torch.Tensor:
    """A copy of a Pillow image or an array (h, w, c) as a tensor (c, h, w)."""
    return rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")


# ------------------------------------------------------------------------------------------------- orientation


def exif_orientation(image: Image.Image) -> int:
    """EXIF's number for how a photograph becomes upright, usually 1 to 8; 1 if the tags cannot be read."""
    with suppress(Exception):  # some cameras write invalid tags, but the photograph can be used
        return image.getexif().get(0x0112, 1)
    return 1


def is_transposed(orientation: int) -> bool:
    """Whether height and width of the upright image are width and height as stored."""
    return orientation in (5, 6, 7, 8)


def apply_orientation(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored values (h, w, ...) upright by EXIF's or TIFF's number. An invalid number changes nothing."""
    values = values.swapaxes(0, 1) if is_transposed(orientation) else values
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


# ------------------------------------------------------------------------------------------------- pages


def page_count(axes: str, shape: Sequence[int]) -> int:
    """Number of pages of an array: the product of its axes that are called "n", or 1."""
    return math.prod(size for axis, size in zip(axes, shape) if axis == "n")


def split_pages(values: np.ndarray, axes: str) -> np.ndarray:
    """Bring an array with any number and order of axes into the form (n, h, w, c).

    Args:
        axes: A letter for each axis: h and w, at most one c, and any number of n.
    """
    pages = page_count(axes, values.shape)
    order = sorted(range(values.ndim), key=lambda k: axes[k] != "n")  # pages first, the others in their order
    values = values.transpose(order)
    values = values.reshape(pages, *values.shape[axes.count("n") :])
    return rearrange(values, f"n {' '.join(axes.replace('n', ''))} -> n h w {'c' if 'c' in axes else '1'}")


def is_8_bit(dtype: np.dtype) -> bool:
    """Whether an array's values are 8-bit, or true and false. DataError if they are not real numbers."""
    if dtype.kind not in "buif":
        raise DataError(f"values of type {dtype}, which are no real numbers")
    return dtype in (np.uint8, bool)


def count_pages(path, pixel_format: PixelFormat) -> int:
    """How many images are in a file. 1 for an unreadable file, whose error is reported when it is opened."""
    suffix = os.path.splitext(path)[1].lower()
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        if suffix in ARRAYS:
            shape = load_array(path).shape
            return page_count(array_axes(shape, pixel_format), shape)
        if suffix in TIFF:
            with tifffile.TiffFile(path) as file:
                return page_count(tiff_axes(file.series[0]), file.series[0].shape)
    return 1


def expand_pages(root: Path, names: list[str], pixel_format: PixelFormat) -> list[str]:
    """The names of all images in some files.

    Args:
        root: The folder of the files.
        names: Their paths below it.
        pixel_format: If its pages are "images", each page of a stack is an image, called `stack.tif#0` and so on.
    """
    if pixel_format.pages != "images":
        return names
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(lambda name: count_pages(root / name, pixel_format), names))
    expanded = []
    for name, count in zip(names, counts):
        expanded += [name] if count == 1 else [f"{name}#{k}" for k in range(count)]
    return expanded


def file_name(name: str) -> str:
    """The name of the file that an image is in: `stack.tif` for `stack.tif#7`."""
    return re.sub(r"#\d+$", "", name)


# ------------------------------------------------------------------------------------------------- .npy and .npz


def open_array(path, page: int | None, pixel_format: PixelFormat) -> ArrayImage:
    """Open the array of a .npy or .npz file, or one of its pages."""
    values = load_array(path)
    pages = split_pages(values, array_axes(values.shape, pixel_format))
    is_uint8 = is_8_bit(values.dtype)
    if len(pages) > 1 and page is None:
        raise DataError(f"{len(pages)} images in one file, to be named {os.path.basename(path)}#0 and so on")
    return ArrayImage(lambda: np.array(pages[page or 0]), pages.shape[1:3], pixel_format, is_uint8)


def load_array(path) -> np.ndarray:
    """The array of a .npy file, mapped into memory, or the only array of a .npz file."""
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        if len(loaded.files) != 1:
            raise DataError(f"{len(loaded.files)} arrays ({', '.join(loaded.files[:4])}), where one is expected")
        return loaded[loaded.files[0]]
    return loaded


def array_axes(shape: Sequence[int], pixel_format: PixelFormat) -> str:
    """Determine the axes of an array from its shape, "hw", "hwc", "chw", or with n before them.

    A last axis of 1, 3 or 4, or of the format's number of channels, is taken as channels. Of three other axes the first
    is channels, or pages if pages are images and it has not the format's number of channels.

    Raises:
        DataError: There are more axes, or pages in a format whose pages are not images.
    """
    channels_last = shape[-1] in (1, 3, 4, pixel_format.channels)
    axes = {2: "hw", 3: "hwc" if channels_last else "chw", 4: "nhwc" if channels_last else "nchw"}.get(len(shape))
    if axes is None:
        raise DataError(
            f"an array of {len(shape)} axes; (h, w), (h, w, c) or (c, h, w) are read, "
            "with a first axis of pages by --pages images"
        )
    if axes == "chw" and pixel_format.pages == "images" and shape[0] != pixel_format.channels:
        axes = "nhw"
    if axes[0] == "n" and pixel_format.pages != "images":
        raise DataError(f"an array of {' x '.join(map(str, shape))}; --pages images takes the first axis as images")
    return axes


# ------------------------------------------------------------------------------------------------- TIFF


def pillow_reads_all(path, pixel_format: PixelFormat) -> bool:
    """Whether Pillow reads all of a TIFF, so that tifffile is not needed.

    This holds for unsigned values of at most 8 bits, without bands that Pillow would drop, on one page, or on pages in
    colour, of which the first is used.
    """
    with suppress(Exception), Image.open(path) as image:  # what Pillow cannot open, tifffile may read
        tags = image.tag_v2
        bits, photometric, orientation = tags.get(258, (1,)), tags.get(262), tags.get(274, 1)
        samples, extra_samples, sample_format = tags.get(277, 1), tags.get(338, (0,)), tags.get(339, (1,))
        is_signed_or_float = np.max(sample_format) > 1
        is_transparent = 1 in extra_samples or 2 in extra_samples
        drops_bands = samples > {2: 3, 5: 4, 6: 3}.get(photometric, 1) and not is_transparent  # RGB, CMYK, YCbCr
        is_scrambled = orientation != 1 and samples == 1 and photometric == 1  # by Pillow, in some cases
        keeps_bands = samples == pixel_format.channels and samples not in (1, 3)
        if np.max(bits) > 8 or is_signed_or_float or drops_bands or is_scrambled or keeps_bands:
            return False
        return samples > 1 or image.n_frames == 1
    return False


def open_tiff(path, page: int | None, pixel_format: PixelFormat) -> ArrayImage:
    """Open a TIFF's first series with tifffile: one page, or all pages as channels if each has a single band."""
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape, dtype = tiff_axes(series), series.shape, series.dtype
        orientation = series.keyframe.tags.valueof(274, 1)
    is_uint8 = is_8_bit(dtype)
    pages = page_count(axes, shape)
    pages_as_channels = pages > 1 and page is None
    if pages_as_channels and "c" in axes:
        raise DataError(f"{pages} pages of several channels each; --pages images takes each page as an image")

    def read():
        values = read_tiff(path, axes, None if pages_as_channels else page or 0)
        return rearrange(values, "n h w c -> h w (n c)")  # there is one page, or one channel

    sides = [shape[axes.index(side)] for side in "hw"]
    return ArrayImage(read, sides, pixel_format, is_uint8, orientation, pages if pages_as_channels else 0)


def tiff_axes(series: tifffile.TiffPageSeries) -> str:
    """The axes of a TIFF's series. An axis named C or S is channels, unless its size is 1; all others are pages.

    Raises:
        DataError: There are no height and width, or several axes of channels.
    """
    axes = ""
    for name, size in zip(series.axes, series.shape):
        is_channels = name in "CS" and size > 1
        axes += "c" if is_channels else {"Y": "h", "X": "w"}.get(name, "n")
    if sorted(axes.replace("n", "")) not in (["h", "w"], ["c", "h", "w"]):
        raise DataError(f"a TIFF of axes {series.axes}, of which no image can be made")
    return axes


def read_tiff(path, axes: str, page: int | None) -> np.ndarray:
    """Read pages of a TIFF's first series.

    Args:
        axes: Those of the series, see `tiff_axes`.
        page: Index of the only page to read; None: all pages.

    Returns:
        (n, h, w, c).
    """
    page_axes = axes.replace("n", "")
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        pages = page_count(axes, series.shape)
        try:
            if page is not None and len(series.pages) == pages > 1:  # the file stores each page by itself
                page_shape = [size for axis, size in zip(axes, series.shape) if axis != "n"]
                return split_pages(series.pages[page].asarray().reshape(page_shape), page_axes)
            values = split_pages(series.asarray(), axes)
            return values if page is None else values[page][None]
        except ValueError as error:  # tifffile needs a package for this compression; Pillow has most, for single bands
            with suppress(Exception), Image.open(path) as image:
                frames = []
                for index in range(pages) if page is None else [page]:
                    image.seek(index)
                    frames.append(np.asarray(image))
                if image.mode.startswith(("I;16", "F", "L")) and len(page_axes) == 2:
                    return np.stack(frames)[..., None]
            raise error
