"""How a file becomes an image: photographs, arrays and stacks, of any depth and number of channels.

A file is opened as a Photograph (8 bits, by Pillow) or an Array (anything else); `array()` gives its pixels (h, w, c), uint8 or, in a
format that is deep, float32, both in 0-255, so that what comes after need not know. docs/data.md has the table of kinds.
Axis letters: h w pixels, c channels, n pages.
"""

import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin

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


def open_file(path, form: PixelFormat) -> "PillowImage | ArrayImage":
    """What is in a file, decoded when its pixels are asked for. path: of a file, or of a page, `stack.tif#7`. DataError for what no training should see."""
    path, _, page = str(path).partition("#") if re.search(r"#\d+$", str(path)) else (str(path), "", "")
    page, suffix = int(page) if page else None, os.path.splitext(path)[1].lower()
    if suffix in ARRAYS:
        return open_array(path, page, form)
    if suffix not in TIFF or form.value_range == "type":
        return open_with_pillow(path, form)
    with decoding_errors(path):
        if page is None and pillow_reads_all(path, form):
            return open_with_pillow(path, form)
        return open_tiff(path, page, form)


def open_image(path, form: PixelFormat = PixelFormat()) -> Image.Image:
    """A lazily decoded image of any kind that Pillow reads; DataError for what no training should see."""
    try:
        image = Image.open(path)
    except Exception as error:  # plugins raise whatever a corrupt header leads them to
        raise DataError(_reason(path, error)) from None
    check_sides(image.height, image.width, form)
    return image


def check_sides(height: int, width: int, form: PixelFormat):
    """DataError for an image that is too thin or too large."""
    if min(height, width) < 8:
        raise DataError(f"{width} x {height} pixels, a side under 8")
    if width * height > form.max_megapixels * 1e6:
        raise DataError(
            f"{width} x {height} pixels, more than {form.max_megapixels:g} million; --max-megapixels sets the limit"
        )


def _reason(path, error) -> str:
    if os.path.isdir(path):
        return "a folder, not a file"
    if not os.path.exists(path):
        return "a link to nothing" if os.path.islink(path) else "no such file"
    if os.path.getsize(path) == 0:
        return "an empty file"
    return (
        "not an image"
        if isinstance(error, (Image.UnidentifiedImageError, tifffile.TiffFileError))
        else f"unreadable: {error}"
    )


@contextmanager
def decoding_errors(path=None):
    """Whatever goes wrong while decoding becomes a DataError: decoders fail in many ways, and no way can be used. path: a file to look at for a reason."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if "imagecodecs" in str(error):
            raise DataError(
                f"unreadable without a package: {str(error).strip('<>')} (pip install imagecodecs)"
            ) from None
        raise DataError(_reason(path, error) if path else f"unreadable: {error or type(error).__name__}") from None


# ------------------------------------------------------------------------------------------------- 8 bits, by Pillow


class PillowImage:
    """8-bit pixels that Pillow decodes, upright. sides: height and width."""

    is_uint8 = True

    def __init__(self, image: Image.Image, form: PixelFormat):
        self.image, self.form = image, form
        self.turned = orientation(image) >= 5 and image.format != "TIFF"  # whose size Pillow gives as it is upright
        self.sides = image.size if self.turned else image.size[::-1]

    def draft(self, height: float, width: float):
        """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, but not below this."""
        self.image.draft(None, tuple(map(int, (height, width) if self.turned else (width, height))))

    def raw(self) -> np.ndarray:
        """Values in the file's units, with the format's channels."""
        with decoding_errors():
            return self.decoded()

    def decoded(self) -> np.ndarray:
        bands = len(self.image.getbands())
        if bands == self.form.channels and bands not in (1, 3):  # RGBA or CMYK as four channels, not as a colour
            self.image.load()
            turn = TURNS.get(orientation(self.image))
            return np.array(self.image if turn is None else self.image.transpose(turn))
        image = to_rgb(self.image)
        return (
            np.array(image.convert("L"))[..., None]
            if self.form.channels == 1
            else convert_channels(np.array(image), self.form)
        )

    def array(self) -> np.ndarray:
        return scale_to_255(self.raw(), self.form, True)


def open_with_pillow(path, form: PixelFormat) -> "PillowImage | ArrayImage":
    image = open_image(path, form)
    if form.value_range != "type":
        with decoding_errors():
            deep = reader_of_deep_image(image, path)
        if deep:
            return ArrayImage(
                lambda: convert_channels(composite_on_white(deep(), form.channels), form),
                image.size[::-1],
                form,
                turn=orientation(image),
            )
    return PillowImage(image, form)


def reader_of_deep_image(image: Image.Image, path):
    """A function that gives the (h, w, c) values of an image of more than 8 bits, which Pillow would clip, scale or cut to 8; None for others."""
    if image.format == "PNG" and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            bits = file.read(25)[24]
        return partial(png_of_16_bits, path) if bits == 16 else None
    if image.format == "PPM" and image.tile:
        decoder, _, offset, args = image.tile[0]
        if image.mode == "I" or isinstance(args, tuple) and args[-1] > 255:
            return partial(
                pnm_of_16_bits, path, offset, (image.height, image.width, len(image.getbands())), decoder == "ppm_plain"
            )
    if image.format == "JPEG2000" and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            head = file.read(4096)
        place = head.find(b"\xff\x51")
        if place >= 0 and (head[place + 40] & 127) >= 8:
            raise DataError(
                "JPEG 2000 in colour with more than 8 bits, which would be cut to 8: save it as TIFF or PNG"
            )
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return lambda: np.asarray(image)[..., None]
    return None


def pnm_of_16_bits(path, offset: int, shape: tuple, plain: bool) -> np.ndarray:
    """(h, w, c) of a PGM or PPM with values above 255, as the file has them: numbers in text (P2, P3), or two bytes each (P5, P6)."""
    with open(path, "rb") as file:
        file.seek(offset)
        values = (
            np.array(re.sub(rb"#[^\n]*", b"", file.read()).split(), np.uint16)
            if plain
            else np.frombuffer(file.read(2 * int(np.prod(shape))), ">u2")
        )
    return values.reshape(shape).astype(np.uint16)


def png_of_16_bits(path) -> np.ndarray:
    """(h, w, c) of a PNG in colour or with transparency, by torchvision: Pillow cuts it to 8 bits."""
    with warnings.catch_warnings(action="ignore"):  # torchvision's decoders are to move to another package
        try:
            from torchvision.io import ImageReadMode, decode_image, read_file
        except ImportError:
            raise DataError(
                "a PNG in colour with 16 bits, which this torchvision does not read: save it as TIFF"
            ) from None
        return rearrange(decode_image(read_file(str(path)), ImageReadMode.UNCHANGED), "c h w -> h w c").numpy()


def composite_on_white(values: np.ndarray, channels: int) -> np.ndarray:
    """16-bit values whose last of two or four channels is transparency, on white, but where as many channels are asked for."""
    if values.shape[-1] not in (2, 4) or values.shape[-1] == channels:
        return values
    share = values[..., -1:] / 65535
    return np.rint(values[..., :-1] * share + 65535 * (1 - share)).astype(np.uint16)


TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
    )
)


def apply_orientation(values: np.ndarray, turn: int) -> np.ndarray:
    """(h, w, ...) values turned as EXIF's or TIFF's number says."""
    values = values.swapaxes(0, 1) if turn >= 5 else values
    values = values[::-1] if turn in (3, 4, 7, 8) else values
    return values[:, ::-1] if turn in (2, 3, 6, 7) else values


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; from 5 on width and height change places. 1, as it lies, where the tags are in a wrong form."""
    with suppress(Exception):  # whatever a camera's odd tags lead to, the photograph can be used
        value = image.getexif().get(0x0112)
        return value if value in TURNS else 1
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: 16-bit scaled to 8, transparency on white, CMYK, palette and grey converted, first frame only.

    DataError for 32-bit values, whose range no file says: they may be in 0..1, heights or counts.
    """
    image.load()
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):  # there 16 bits at most
        kind = "float" if image.mode == "F" else "integer"
        raise DataError(f"32-bit {kind} values, whose range is not known: save the image with 8 or 16 bits a channel")
    turn = TURNS.get(orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.asarray(image, np.int64)
        image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_chw(pixels) -> torch.Tensor:
    """An image of Pillow's, or an array (h, w, c), as (c, h, w)."""
    return rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")


# ------------------------------------------------------------------------------------------------- arrays and stacks


class ArrayImage:
    """Values that are read when they are asked for. sides: height and width of the upright image.

    read() gives (h, w, c) of any real type, of the given sides and as the file stores them; turn: the number by which EXIF or TIFF says how they
    become upright."""

    def __init__(self, read, sides: tuple, form: PixelFormat, eight_bits: bool = False, turn: int = 1):
        check_sides(*sides, form)
        self.raw, self.form, self.is_uint8 = lambda: apply_orientation(read(), turn), form, eight_bits
        self.sides = tuple(sides[::-1] if turn >= 5 else sides)

    def draft(self, height: float, width: float):
        """Only photographs can be decoded smaller."""

    def array(self) -> np.ndarray:
        return scale_to_255(self.raw(), self.form, self.is_uint8)


def array_axes(shape: Sequence[int], form: PixelFormat) -> tuple[str, int]:
    """The axes of an array of a .npy file, "h w", "h w c", "c h w" or with "n" pages before them; and the number of images in it.

    Three axes: the one that is as long as the model has channels, or a last one of 3 or 4, is channels; else, with --pages images, the first is pages.
    """
    axes = {
        2: "h w",
        3: "h w c" if shape[-1] == form.channels > 1 or shape[-1] in (3, 4) or shape[-1] == 1 else "c h w",
        4: "n h w c" if shape[-1] == form.channels or shape[-1] in (1, 3, 4) else "n c h w",
    }.get(len(shape))
    if axes is None:
        raise DataError(
            f"an array of {len(shape)} axes; (h, w), (h, w, c) or (c, h, w) are read, with a first axis of pages by --pages images"
        )
    if axes == "c h w" and form.pages == "images" and shape[0] != form.channels:
        axes = "n h w"
    if axes[0] == "n" and form.pages != "images":
        raise DataError(f"an array of {' x '.join(map(str, shape))}; --pages images takes the first axis as images")
    return axes, shape[0] if axes[0] == "n" else 1


def open_array(path, page: int | None, form: PixelFormat) -> ArrayImage:
    with decoding_errors(path):
        values = load_array(path)
        axes, count = array_axes(values.shape, form)
        sides = [values.shape[axes.split().index(side)] for side in "hw"]
        if values.dtype.kind not in "buif":
            raise DataError(f"values of type {values.dtype}, which are no real numbers")

    def read():
        with decoding_errors():
            chosen = np.array(values[page or 0] if axes[0] == "n" else values)
            form_of = f"{axes.removeprefix('n ')} -> h w {'c' if 'c' in axes else '1'}"
            return convert_channels(rearrange(chosen, form_of), form)

    if axes[0] == "n" and count > 1 and page is None:
        raise DataError(f"{count} images in one file, to be named {os.path.basename(path)}#0 and so on")
    return ArrayImage(read, sides, form, values.dtype in (np.uint8, bool))


def load_array(path) -> np.ndarray:
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        if len(loaded.files) != 1:
            raise DataError(f"{len(loaded.files)} arrays ({', '.join(loaded.files[:4])}), where one is expected")
        return loaded[loaded.files[0]]
    return loaded


def pillow_reads_all(path, form: PixelFormat) -> bool:
    """Whether Pillow reads all of a TIFF: unsigned, at most 8 bits, one page or pages in colour (of which the first is taken), no bands that it would drop."""
    with suppress(Exception), Image.open(path) as image:  # whatever Pillow makes of it, tifffile may read it
        tags = image.tag_v2
        samples, bits = tags.get(277, 1), np.max(tags.get(258, (1,)))
        more = samples > {2: 3, 5: 4, 6: 3}.get(tags.get(262), 1) and not set(tags.get(338, (0,))) & {
            1,
            2,
        }  # bands beside the colours, and no transparency
        turned = tags.get(274, 1) != 1 and samples == 1 and tags.get(262) == 1  # Pillow scrambles some of these
        if (
            more
            or turned
            or bits > 8
            or np.max(tags.get(339, (1,))) > 1
            or samples == form.channels
            and samples not in (1, 3)
        ):
            return False
        return samples > 1 or image.n_frames == 1
    return False


def open_tiff(path, page: int | None, form: PixelFormat) -> ArrayImage:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        pages, shape, axes = pages_of(series)
        kind, turn = series.dtype, series.keyframe.tags.valueof(274, 1)
    if kind.kind not in "buif":
        raise DataError(f"values of type {kind}, which are no real numbers")
    stack = pages > 1 and page is None and "c" not in axes.split()  # pages of one band each, taken as channels
    if pages > 1 and page is None and not stack:
        raise DataError(f"{pages} pages of several channels each; --pages images takes each page as an image")

    def read():
        with decoding_errors():
            values = tiff_values(path, None if stack else page or 0, axes, pages)
            pattern = f"n {axes} -> {axes} n" if stack else f"{axes} -> h w {'c' if 'c' in axes.split() else '1'}"
            return convert_channels(rearrange(values, pattern), form, pages if stack else 0)

    return ArrayImage(
        read,
        [shape[axes.split().index(side)] for side in "hw"],
        form,
        kind in (np.uint8, bool),
        turn if turn in TURNS else 1,
    )


def pages_of(series) -> tuple[int, tuple, str]:
    """Pages of a TIFF's main series, and the shape and axes, "h w", "h w c" or "c h w", of one. An axis named C or S is channels, others before h w are pages."""
    names = ["h" if name == "Y" else "w" if name == "X" else "c" if name in "CS" else "n" for name in series.axes]
    kept = [k for k, name in enumerate(names) if name != "n" and not (name == "c" and series.shape[k] == 1)]
    if sorted(names[k] for k in kept) not in (["h", "w"], ["c", "h", "w"]):
        raise DataError(f"a TIFF of axes {series.axes}, of which no image can be made")
    pages = int(np.prod([size for name, size in zip(names, series.shape) if name == "n"]))
    return pages, tuple(series.shape[k] for k in kept), " ".join(names[k] for k in kept)


def tiff_values(path, page: int | None, axes: str, pages: int) -> np.ndarray:
    """One page of a TIFF's main series, or all (n, ...) for None."""
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            if page is not None and len(series.pages) == pages > 1:  # a file page for each: the others need not be read
                return (
                    series.pages[page]
                    .asarray()
                    .reshape(
                        [
                            size
                            for name, size in zip(series.axes, series.shape)
                            if name in "YXCS" and (size > 1 or name in "YX")
                        ]
                    )
                )
            values = series.asarray()
            names = ["n" if name not in "YXCS" else name for name in series.axes]
            order = sorted(range(len(names)), key=lambda k: names[k] != "n")  # pages first, the rest as it stands
            rest = [
                values.shape[k] for k in order if names[k] != "n" and not (names[k] in "CS" and values.shape[k] == 1)
            ]
            values = values.transpose(order).reshape(pages, *rest)
            return values if page is None else values[page]
    except ValueError as error:  # a codec that tifffile leaves to a package: of single bands Pillow has most
        with suppress(Exception), Image.open(path) as image:
            frames = []
            for number in range(pages) if page is None else [page]:
                image.seek(number)
                frames.append(np.asarray(image))
            if image.mode.startswith(("I;16", "F", "L")) and axes == "h w":
                return np.stack(frames) if page is None else frames[0]
        raise error


def count_pages(path, form: PixelFormat) -> int:
    """How many images are in a file; 1 where it cannot be read, which is told when it is."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        if str(path).lower().endswith(ARRAYS):
            return array_axes(load_array(path).shape, form)[1]
        if str(path).lower().endswith(TIFF):
            with tifffile.TiffFile(path) as file:
                return pages_of(file.series[0])[0]
    return 1


def expand_pages(root: Path, names: list[str], form: PixelFormat) -> list[str]:
    """Names of images: those of files, and `stack.tif#0` and so on for each page of a stack, where pages are images."""
    if form.pages != "images":
        return names
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(lambda name: count_pages(root / name, form), names))
    return [
        page
        for name, count in zip(names, counts)
        for page in ([name] if count == 1 else [f"{name}#{k}" for k in range(count)])
    ]


def file_name(name: str) -> str:
    """The file that an image of this name is in."""
    return re.sub(r"#\d+$", "", name)
