"""Where images come from: folders, CIFAR, scikit-image's photographs; decoded to uint8, whatever their kind.

A source of images has `len`, `labels`, `classes`, `name(index)`, `crop` and `centre`: FileImages, or MemoryImages for
small ones. Axis letters: b images, c channels, h w pixels.
"""
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torchvision
from einops import rearrange
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2 import functional

from engine.chance import uniform
from engine.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
              *(suffix for suffix in (".jfif", ".jpe", ".avif", ".jp2") if suffix in Image.registered_extensions()))
LARGEST = {"megapixels": 89}  # a larger image is taken for a decompression bomb; Pillow warns from here on; --max-megapixels
Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before decoding, gives an error that names the file
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a photograph may carry long texts


def both_sides(size) -> tuple[int, int]:
    """Height and width of an image size: both, or one number for a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def open_image(path) -> Image.Image:
    """A lazily decoded image of any kind that Pillow reads; DataError for what no training should see."""
    try:
        image = Image.open(path)
    except Exception as error:  # plugins raise whatever a corrupt header leads them to
        raise DataError(_reason(path, error)) from None
    if min(image.size) < 8:
        raise DataError(f"{image.width} x {image.height} pixels, a side under 8")
    if image.width * image.height > LARGEST["megapixels"] * 1e6:
        raise DataError(f"{image.width} x {image.height} pixels, more than {LARGEST['megapixels']:g} million; --max-megapixels sets the limit")
    return image


def _reason(path, error) -> str:
    if os.path.isdir(path):
        return "a folder, not a file"
    if not os.path.exists(path):
        return "a link to nothing" if os.path.islink(path) else "no such file"
    if os.path.getsize(path) == 0:
        return "an empty file"
    return "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"unreadable: {error}"


@contextmanager
def readable():
    """Whatever goes wrong while decoding becomes a DataError: decoders fail in many ways, and no way can be used."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"unreadable: {error or type(error).__name__}") from None


TURNS = dict(zip(range(2, 9), (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                               Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


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


def tensor(image: Image.Image) -> torch.Tensor:
    """(3, h, w) uint8."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def crop_boxes(sizes: np.ndarray, draws: np.ndarray, scale: tuple, ratio: tuple) -> np.ndarray:
    """Boxes (b, 4) = top, left, height, width of torchvision's RandomResizedCrop, as a function of `draws`.

    sizes: (b, 2) heights and widths; draws: (b, 22) in [0, 1), ten tries of area and aspect ratio, then the place.
    Where no try fits, the largest central box of an allowed ratio.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :10])
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[:, 10:20])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    pick = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, pick, 1), np.take_along_axis(h, pick, 1)
    none = ~fits.any(1, keepdims=True)
    w = np.where(none, np.minimum(width, np.rint(height * ratio[1])), w)
    h = np.where(none, np.minimum(height, np.rint(width / ratio[0])), h)
    top = np.where(none, (height - h) // 2, np.floor(draws[:, 20:21] * (height - h + 1)))
    left = np.where(none, (width - w) // 2, np.floor(draws[:, 21:] * (width - w + 1)))
    return np.concatenate([top, left, h, w], axis=1).astype(np.int64)


def crop_of(pixels: torch.Tensor, box, size: int) -> torch.Tensor:
    """The box (top, left, height, width) of an image resized to (3, size, size), bicubic with antialiasing."""
    top, left, h, w = (round(value) for value in box)
    return functional.resized_crop(pixels, top, left, max(1, h), max(1, w), [size, size], functional.InterpolationMode.BICUBIC, antialias=True)


def square_centre(image: Image.Image, size: int, share: float) -> torch.Tensor:
    """The middle square, `share` of the shorter side, resized (bicubic) to (3, size, size) uint8; small images whole."""
    side = min(image.size) * (share if min(image.size) > size else 1)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


class Names(Sequence):
    """File names as one array of bytes, whose memory forked workers share. Of a list of strings each worker gets a copy of its own as
    it counts references: 107 MB for ImageNet's."""

    def __init__(self, names):
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        if isinstance(index, range):
            return [self[k] for k in index]
        return self.bytes[self.ends[index]:self.ends[index + 1]].tobytes().decode(errors="surrogateescape")

    def __eq__(self, other):
        return list(self) == list(other)


@dataclass
class FileImages:
    """Images in files. names: paths below root."""
    root: Path
    names: Sequence[str]
    labels: np.ndarray | None
    classes: list[str]

    def __post_init__(self):
        self.names = self.names if isinstance(self.names, Names) else Names(self.names)

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: np.ndarray) -> "FileImages":
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, names=[self.names[k] for k in indices], labels=labels)

    def relisted(self, names: list[str]) -> "FileImages":
        """The same folder by another list of names."""
        return from_names(self.root, names, self.classes or None)

    def decode(self, index: int) -> Image.Image:
        """The whole image, upright RGB."""
        image = open_image(self.root / self.names[index])
        with readable():
            return to_rgb(image)

    def crop(self, index: int, draws: np.ndarray, size: int, scale: tuple, ratio: tuple) -> torch.Tensor:
        """A random resized crop (bicubic), (3, size, size) uint8."""
        image = open_image(self.root / self.names[index])
        with readable():
            upright = image.size[::-1] if orientation(image) >= 5 else image.size
            top, left, h, w = crop_boxes(np.array([upright[::-1]]), draws[None], scale, ratio)[0].tolist()
            # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; never below what the crop needs
            image.draft(None, tuple(math.ceil(side * size / min(h, w)) for side in image.size))
            pixels = tensor(to_rgb(image))
            y, x = pixels.shape[1] / upright[1], pixels.shape[2] / upright[0]
            return crop_of(pixels, (top * y, left * x, h * y, w * x), size)

    def centre(self, index: int, size: int, share: float = 224 / 256) -> torch.Tensor:
        """The middle square of the image, `share` of the shorter side unless that is small, as (3, size, size) uint8."""
        return square_centre(self.decode(index), size, share)


@dataclass
class MemoryImages:
    """Small images of one size, decoded: pixels (n, 3, h, w) uint8."""
    pixels: torch.Tensor
    labels: np.ndarray | None
    classes: list[str]
    names: list[str] | None = None

    def __len__(self):
        return len(self.pixels)

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"image {index}"

    def subset(self, indices: np.ndarray) -> "MemoryImages":
        return replace(self, pixels=self.pixels[torch.from_numpy(indices)], labels=self.labels[indices],
                       names=self.names and [self.names[k] for k in indices])

    def crop(self, index, draws, size, scale, ratio):
        return crop_of(self.pixels[index], crop_boxes(np.array([self.pixels.shape[2:]]), draws[None], scale, ratio)[0].tolist(), size)

    def centre(self, index, size, share: float = 224 / 256):
        image = self.pixels[index]
        side = min(image.shape[1:])
        side = round(side * share) if side > size else side
        return functional.resize(functional.center_crop(image, [side, side]), [size, size], 3, antialias=True)


def photographs(size: int = 64, held_out: bool = False) -> MemoryImages:
    """Crops of `size` pixels from the eight colour photographs in scikit-image's wheel; the class is the photograph.

    Each photograph is scaled to a height of six crops. A block of 1.5 crops' side, somewhere in it, is held out;
    training crops keep one crop's distance from it on all sides. Of the stereo pair only the left picture is used.
    """
    folder = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
             "retina.jpg", "rocket.jpg")
    crops, labels = [], []
    for label, name in enumerate(names):
        image = to_rgb(open_image(folder / name))
        image = tensor(image.resize((round(6 * size * image.width / image.height), 6 * size), Image.Resampling.BICUBIC))
        block = 3 * size // 2
        top, left = (uniform(2, "held-out block", label) * (np.array(image.shape[1:]) - block)).astype(int)
        if held_out:
            image, step = image[:, top:top + block, left:left + block], size // 16
        else:
            step = size // 4
        windows = rearrange(image.unfold(1, size, step).unfold(2, size, step), "c i j h w -> i j h w c")
        if not held_out:
            i, j = (torch.arange(count)[:, None] * step + torch.tensor([0, size]) for count in windows.shape[:2])
            apart = [(span[:, 0] >= low + block + size) | (span[:, 1] <= low - size) for span, low in ((i, top), (j, left))]
            windows = windows[apart[0][:, None] | apart[1]]
        crops.append(rearrange(windows.reshape(-1, size, size, 3), "n h w c -> n c h w"))
        labels += [label] * len(crops[-1])
    return MemoryImages(torch.cat(crops), np.array(labels), [name.split(".")[0] for name in names])


def from_names(root: Path, names: list[str], classes: list[str] | None = None) -> FileImages:
    """Images by their paths; the class is the first folder below root, if all are in folders."""
    folders = [name.split("/")[0] for name in names]
    if not all("/" in name for name in names):
        return FileImages(root, names, None, [])
    classes = sorted(set(folders)) if classes is None else classes
    unknown = sorted(set(folders) - set(classes))
    if unknown:
        raise DataError(f"{root} has class folders that the training part lacks: {', '.join(unknown[:5])}")
    number = {name: k for k, name in enumerate(classes)}
    return FileImages(root, names, np.array([number[folder] for folder in folders]), classes)


def in_memory(images: FileImages) -> MemoryImages:
    """Every image decoded at once; DataError if they are not all readable and of one size."""
    def read(index):
        try:
            return tensor(images.decode(index))
        except DataError as error:
            raise DataError(f"{images.root / images.names[index]}: {error}; --in-memory takes readable images only") from None

    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(read, range(len(images))))
    odd = next((k for k, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        raise DataError(f"{images.root / images.names[odd]}: {tuple(pixels[odd].shape[1:])} pixels where the first image "
                        f"has {tuple(pixels[0].shape[1:])}; --in-memory takes images of one size")
    return MemoryImages(torch.stack(pixels), images.labels, images.classes, images.names)


CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def download(name: str | None, root: str = "data"):
    """Fetch CIFAR-10 or CIFAR-100 into ./data through torchvision; the only thing here that uses the network."""
    if name not in CIFAR:
        raise DataError(f"--download fetches cifar10 or cifar100, not {name}")
    try:
        CIFAR[name](root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} could not be fetched: {error}") from None


def cifar(name: str, root: str = "data") -> tuple[MemoryImages, MemoryImages]:
    """CIFAR-10 or CIFAR-100 from ./data."""
    try:
        parts = [CIFAR[name](root, train=train) for train in (True, False)]
    except RuntimeError:
        raise DataError(f"{name} is not in ./{root}; --download fetches it") from None
    return tuple(MemoryImages(rearrange(torch.from_numpy(part.data), "n h w c -> n c h w").contiguous(),
                              np.array(part.targets), list(part.classes)) for part in parts)
