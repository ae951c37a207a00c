"""Where images come from: folders, CIFAR, scikit-image's photographs; cropped to one size, uint8, or float32 in 0-255 if they are deep.

A source of images has `len`, `labels`, `classes`, `form` (see formats.PixelFormat), `name(index)`, `open`, `crop` and `centre`: FileImages,
or MemoryImages for small ones. Axis letters: b images, c channels, h w pixels.
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
from images.crops import center_crop, center_crop_size, crop_ratio, random_crop_boxes, resized_crop, to_2tuple
from images.decode import ArrayImage, decoding_errors, open_file, open_image, to_chw, to_rgb
from images.formats import PixelFormat, convert_channels


class FileNames(Sequence):
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
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode(errors="surrogateescape")

    def __eq__(self, other):
        return list(self) == list(other)


@dataclass
class FileImages:
    """Images in files. names: paths below root, of a page `stack.tif#7`."""

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
        """The same folder by another list of names."""
        return replace(images_from_names(self.root, names, self.classes or None), form=self.form)

    def open(self, index: int):
        """The image before it is decoded, see decoding.open_file."""
        return open_file(self.root / self.names[index], self.form)

    def decode(self, index: int) -> np.ndarray:
        """The whole image, upright, (h, w, c)."""
        opened = self.open(index)
        with decoding_errors():
            return opened.array()

    def crop(self, index: int, draws: np.ndarray, size, scale: tuple, ratio: tuple) -> torch.Tensor:
        """A random resized crop (bicubic), (c, *size)."""
        opened = self.open(index)
        with decoding_errors():
            (height, width), sides = opened.sides, to_2tuple(size)
            top, left, h, w = random_crop_boxes(
                np.array([[height, width]]), draws[None], scale, crop_ratio(ratio, size)
            )[0].tolist()
            # a JPEG may be decoded smaller; never below what the crop needs
            opened.draft(
                *(max(math.ceil(side * sides[0] / h), math.ceil(side * sides[1] / w)) for side in (height, width))
            )
            pixels = to_chw(opened.array())
            y, x = pixels.shape[1] / height, pixels.shape[2] / width
            return resized_crop(pixels, (top * y, left * x, h * y, w * x), size)

    def centre(self, index: int, size, share: float = 224 / 256) -> torch.Tensor:
        """The middle of the image, see `middle`, (c, *size)."""
        return center_crop(self.decode(index), size, share)


@dataclass
class MemoryImages:
    """Small images of one size, decoded: pixels (n, c, h, w), uint8 or, if deep, float32."""

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
        """One image in a format that may be another than that of `pixels`, which are 8-bit colour then."""
        values = rearrange(self.pixels[index], "c h w -> h w c").numpy()
        return ArrayImage(
            lambda: convert_channels(values, self.form), values.shape[:2], self.form, values.dtype == np.uint8
        )

    def converted(self, form: PixelFormat) -> "MemoryImages":
        """8-bit colour images in another format."""
        if form.is_rgb8:
            return replace(self, form=form)
        source = replace(self, form=form)
        return replace(source, pixels=torch.stack([to_chw(source.open(k).array()) for k in range(len(self))]))

    def crop(self, index, draws, size, scale, ratio):
        box = random_crop_boxes(np.array([self.pixels.shape[2:]]), draws[None], scale, crop_ratio(ratio, size))[
            0
        ].tolist()
        return resized_crop(self.pixels[index], box, size)

    def centre(self, index, size, share: float = 224 / 256):
        part = functional.center_crop(
            self.pixels[index], [round(side) for side in center_crop_size(self.pixels.shape[2:], size, share)]
        )
        out = functional.resize(part, list(to_2tuple(size)), 3, antialias=True)
        return out.clamp_(0, 255) if out.is_floating_point() else out


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
