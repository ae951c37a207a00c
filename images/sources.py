"""Sources of images: files in folders, CIFAR, scikit-image's photographs.

A source has `len`, `labels`, `classes`, `form` (a formats.PixelFormat), `name(index)`, `open`, `subset`, `crop` and
`center_crop`. Its pixels are uint8, or float32 if the format says so, from 0 to 255. FileImages decodes files when they
are asked for; MemoryImages holds small images of one size. Axis letters: n images, c channels, h w pixels.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torchvision
from einops import rearrange
from PIL import Image
from torchvision.transforms.v2 import functional

from engine.errors import DataError
from engine.rng import uniform
from images.crops import center_crop, center_crop_size, random_crop_box, resized_crop, to_2tuple
from images.decode import ArrayImage, decoding_errors, open_file, open_image, to_chw, to_rgb
from images.formats import PixelFormat, convert_channels


class FileNames(Sequence):
    """File names as one array of bytes, whose memory forked workers share.

    Counting references to a list of strings would copy it into each worker: 107 MB for ImageNet.
    """

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
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode(errors="surrogateescape")

    def __eq__(self, other):
        return list(self) == list(other)


@dataclass
class FileImages:
    """Images in files.

    Args:
        root: The folder.
        names: Paths below root; `stack.tif#7` is a page of a file.
        labels: (n,) class numbers, or None.
        classes: Their names.
        form: The pixel format of what `decode`, `crop` and `center_crop` return.
    """

    root: Path
    names: Sequence[str]
    labels: np.ndarray | None
    classes: list[str]
    form: PixelFormat = field(default=PixelFormat(), kw_only=True)

    def __post_init__(self):
        self.names = self.names if isinstance(self.names, FileNames) else FileNames(self.names)

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: np.ndarray) -> "FileImages":
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, names=[self.names[k] for k in indices], labels=labels)

    def relisted(self, names: list[str]) -> "FileImages":
        """Images of the same folder and format with another list of names."""
        return replace(images_from_names(self.root, names, self.classes or None), form=self.form)

    def open(self, index: int):
        """The image before it is decoded, see decode.open_file."""
        return open_file(self.root / self.names[index], self.form)

    def decode(self, index: int) -> np.ndarray:
        """The whole upright image, (h, w, c)."""
        opened = self.open(index)
        with decoding_errors():
            return opened.array()

    def crop(self, index: int, draws: np.ndarray, size, scale: tuple, ratio: tuple) -> torch.Tensor:
        """A random resized crop (bicubic), (c, *size), as a function of `draws`; see crops.random_crop_boxes."""
        opened = self.open(index)
        with decoding_errors():
            (height, width), (out_height, out_width) = opened.sides, to_2tuple(size)
            top, left, h, w = random_crop_box(opened.sides, draws, size, scale, ratio)
            # A JPEG may be decoded at a fraction of its size, but the crop must not become smaller than the result.
            opened.draft(
                *(max(math.ceil(side * out_height / h), math.ceil(side * out_width / w)) for side in (height, width))
            )
            pixels = to_chw(opened.array())
            y, x = pixels.shape[1] / height, pixels.shape[2] / width
            return resized_crop(pixels, (top * y, left * x, h * y, w * x), size)

    def center_crop(self, index: int, size, crop_pct: float = 224 / 256) -> torch.Tensor:
        """The center of the image, (c, *size), see crops.center_crop."""
        return center_crop(self.decode(index), size, crop_pct)


@dataclass
class MemoryImages:
    """Small decoded images of one size. pixels: (n, c, h, w), uint8 or float32."""

    pixels: torch.Tensor
    labels: np.ndarray | None
    classes: list[str]
    names: list[str] | None = None
    form: PixelFormat = PixelFormat()

    def __len__(self):
        return len(self.pixels)

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"image {index}"

    def subset(self, indices: np.ndarray) -> "MemoryImages":
        labels = None if self.labels is None else self.labels[indices]
        return replace(
            self,
            pixels=self.pixels[torch.from_numpy(indices)],
            labels=labels,
            names=self.names and [self.names[k] for k in indices],
        )

    def open(self, index: int) -> ArrayImage:
        """One image, converted to `form` if `pixels` are 8-bit colour and `form` is another format."""
        values = rearrange(self.pixels[index], "c h w -> h w c").numpy()
        return ArrayImage(
            lambda: convert_channels(values, self.form), values.shape[:2], self.form, values.dtype == np.uint8
        )

    def converted(self, pixel_format: PixelFormat) -> "MemoryImages":
        """8-bit colour images in another format."""
        source = replace(self, form=pixel_format)
        if pixel_format.is_rgb8:
            return source
        return replace(source, pixels=torch.stack([to_chw(source.open(k).array()) for k in range(len(self))]))

    def crop(self, index, draws, size, scale, ratio):
        box = random_crop_box(self.pixels.shape[2:], draws, size, scale, ratio)
        return resized_crop(self.pixels[index], box, size)

    def center_crop(self, index, size, crop_pct: float = 224 / 256):
        crop_size = center_crop_size(self.pixels.shape[2:], size, crop_pct)
        part = functional.center_crop(self.pixels[index], [round(side) for side in crop_size])
        return resized_crop(part, (0, 0, *part.shape[1:]), size)


def photographs(size: int = 64, held_out: bool = False) -> MemoryImages:
    """Crops of `size` pixels from the eight colour photographs in scikit-image's wheel; the class is the photograph.

    Each photograph is scaled to a height of six crops. A block of 1.5 crops' side, somewhere in it, is held out;
    training crops keep one crop's distance from it on all sides. Of the stereo pair only the left picture is used.
    """
    folder = Path(skimage.data.__file__).parent
    names = (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    )
    crops, labels = [], []
    for label, name in enumerate(names):
        image = to_rgb(open_image(folder / name))
        image = to_chw(image.resize((round(6 * size * image.width / image.height), 6 * size), Image.Resampling.BICUBIC))
        block = 3 * size // 2
        top, left = (uniform(2, "held-out block", label) * (np.array(image.shape[1:]) - block)).astype(int)
        if held_out:
            image, step = image[:, top : top + block, left : left + block], size // 16
        else:
            step = size // 4
        windows = rearrange(image.unfold(1, size, step).unfold(2, size, step), "c i j h w -> i j h w c")
        if not held_out:
            i, j = (torch.arange(count)[:, None] * step + torch.tensor([0, size]) for count in windows.shape[:2])
            apart = [
                (span[:, 0] >= low + block + size) | (span[:, 1] <= low - size) for span, low in ((i, top), (j, left))
            ]
            windows = windows[apart[0][:, None] | apart[1]]
        crops.append(rearrange(windows.reshape(-1, size, size, 3), "n h w c -> n c h w"))
        labels += [label] * len(crops[-1])
    return MemoryImages(torch.cat(crops), np.array(labels), [name.split(".")[0] for name in names])


def images_from_names(root: Path, names: list[str], classes: list[str] | None = None) -> FileImages:
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


def load_into_memory(images: FileImages) -> MemoryImages:
    """Every image decoded at once; DataError if they are not all readable and of one size."""

    def read(index):
        try:
            return to_chw(images.decode(index))
        except DataError as error:
            raise DataError(
                f"{images.root / images.names[index]}: {error}; --in-memory takes readable images only"
            ) from None

    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(read, range(len(images))))
    odd = next((k for k, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        raise DataError(
            f"{images.root / images.names[odd]}: {tuple(pixels[odd].shape[1:])} pixels where the first image "
            f"has {tuple(pixels[0].shape[1:])}; --in-memory takes images of one size"
        )
    return MemoryImages(torch.stack(pixels), images.labels, images.classes, images.names, images.form)


CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def download(name: str | None):
    """Fetch CIFAR-10 or CIFAR-100 into ./data through torchvision; the only thing here that uses the network."""
    if name not in CIFAR:
        raise DataError(f"--download fetches cifar10 or cifar100, not {name}")
    try:
        CIFAR[name]("data", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} could not be fetched: {error}") from None


def open_cifar(name: str) -> tuple[MemoryImages, MemoryImages]:
    """CIFAR-10 or CIFAR-100 from ./data."""
    try:
        parts = [CIFAR[name]("data", train=train) for train in (True, False)]
    except RuntimeError:
        raise DataError(f"{name} is not in ./data; --download fetches it") from None
    return tuple(
        MemoryImages(
            rearrange(torch.from_numpy(part.data), "n h w c -> n c h w").contiguous(),
            np.array(part.targets),
            list(part.classes),
        )
        for part in parts
    )
