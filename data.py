"""Data sets, augmentation, loaders: uint8 images out of folders, CIFAR or scikit-image's photographs.

Randomness is a function, not a history: everything random is computed from (seed, purpose, epoch, index or step) by
`hashed`, so batches do not depend on workers, processes, accumulation, or on where a run was interrupted. Images leave
the loader as uint8 and are cropped (small ones), flipped and normalised on the device by `prepare`.

Axis letters: b images, c channels, h w pixels.
"""
import math
import os
import signal
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PIXEL_LIMIT = 89_000_000  # a larger image is taken for a decompression bomb; Pillow warns from here on
Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before decoding, gives an error that names the file


class DataError(ValueError):
    """Data that cannot be used, said in one line."""


# ------------------------------------------------------------------------------------- randomness as a function

def hashed(*keys) -> np.ndarray:
    """64 well-mixed bits for any keys: SplitMix64 (Steele et al. 2014) chained over ints, int arrays and names."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key = zlib.crc32(key.encode()) if isinstance(key, str) else key
            state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(draws: int, *keys) -> np.ndarray:
    """`draws` numbers in [0, 1) for each element of the keys: (..., draws) float64."""
    keys = [np.asarray(key)[..., None] if not isinstance(key, str) else key for key in keys]
    return (hashed(*keys, np.arange(draws)) >> np.uint64(11)) * 2.0 ** -53


def generator(*keys) -> torch.Generator:
    """A CPU generator that is a function of its keys."""
    return torch.Generator().manual_seed(int(hashed(*keys) >> np.uint64(1)))


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


# ---------------------------------------------------------------------------------------------- sources of images

def open_image(path) -> Image.Image:
    """A lazily decoded image of any kind that Pillow reads; DataError for what no training should see."""
    try:
        image = Image.open(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(_reason(path, error)) from None
    if min(image.size) < 8:
        raise DataError(f"{image.width} x {image.height} pixels, a side under 8")
    if image.width * image.height > PIXEL_LIMIT:
        raise DataError(f"{image.width} x {image.height} pixels, more than {PIXEL_LIMIT:,}")
    return image


def _reason(path, error) -> str:
    if os.path.isdir(path):
        return "a folder, not a file"
    if not os.path.exists(path):
        return "a link to nothing" if os.path.islink(path) else "no such file"
    if os.path.getsize(path) == 0:
        return "an empty file"
    return "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"unreadable: {error}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: 16-bit scaled to 8, transparency on white, CMYK, palette and grey converted, first frame only."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
            values = np.asarray(image, np.int64)
            image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # decoders fail in many ways; whatever the way, the file cannot be used
        raise DataError(f"unreadable: {error or type(error).__name__}") from None


def tensor(image: Image.Image) -> torch.Tensor:
    """(3, h, w) uint8."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


@dataclass
class FileImages:
    """Images in files. names: paths below root."""
    root: Path
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def crop(self, index: int, draws: np.ndarray, size: int, scale: tuple, ratio: tuple) -> torch.Tensor:
        """A random resized crop (bicubic), (3, size, size) uint8."""
        image = open_image(self.root / self.names[index])
        turned = image.getexif().get(0x0112, 1) >= 5  # stored lying on its side; upright only once decoded
        sizes = np.array([image.size if turned else image.size[::-1]])
        top, left, h, w = crop_boxes(sizes, draws[None], scale, ratio)[0].tolist()
        box = np.array([left, top, left + w, top + h])
        upright = sizes[0, ::-1]
        # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; never below what the crop needs
        image.draft(None, tuple(math.ceil(side * size / min(h, w)) for side in image.size))
        image = to_rgb(image)
        shrunk = np.tile(np.array(image.size) / upright, 2)
        return tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=tuple((box * shrunk).tolist())))

    def centre(self, index: int, size: int, share: float = 224 / 256) -> torch.Tensor:
        """The middle of the image, (3, size, size) uint8, resized so that it spans `share` of the shorter side."""
        image = to_rgb(open_image(self.root / self.names[index]))
        side = min(image.size) * share
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


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

    def crop(self, index, draws, size, scale, ratio):
        top, left, h, w = crop_boxes(np.array([self.pixels.shape[2:]]), draws[None], scale, ratio)[0].tolist()
        image = self.pixels[index]
        return v2.functional.resized_crop(image, top, left, h, w, [size, size], 3, antialias=True)

    def centre(self, index, size):
        if self.pixels.shape[-1] == size:
            return self.pixels[index]
        return v2.functional.resize(self.pixels[index], [size, size], 3, antialias=True)


def photographs(size: int = 64, held_out: bool = False) -> MemoryImages:
    """Crops of `size` pixels from the eight colour photographs in scikit-image's wheel; the class is the photograph.

    The left seven tenths of each (shrunk to 256 pixels' height) are for training; the held-out rest begins one crop
    further on, so that no pixel is in both. Of the stereo pair only the left picture is used.
    """
    import skimage.data  # here: only this data set needs it

    folder = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
             "retina.jpg", "rocket.jpg")
    crops, labels = [], []
    for label, name in enumerate(names):
        image = to_rgb(open_image(folder / name))
        image = tensor(image.resize((round(256 * image.width / image.height), 256), Image.Resampling.BICUBIC))
        edge = min(round(0.7 * (image.shape[-1] - size)), image.shape[-1] - 2 * size)
        part = image[..., edge + size:] if held_out else image[..., :edge]
        windows = rearrange(part.unfold(1, size, 8).unfold(2, size, 8), "c i j h w -> (i j) c h w")
        crops.append(windows)
        labels += [label] * len(windows)
    return MemoryImages(torch.cat(crops), np.array(labels), [name.split(".")[0] for name in names])


def walk(root: Path) -> list[str]:
    """Sorted paths below root of everything named like an image; links to folders are followed, loops are not."""
    found, seen = [], set()

    def visit(folder, prefix):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            return
        seen.add((place.st_dev, place.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.lower().endswith(EXTENSIONS):
                    found.append(prefix + entry.name)  # a folder named like an image too: it will be reported as bad
                elif entry.is_dir():
                    visit(entry.path, prefix + entry.name + "/")

    visit(root, "")
    return found


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


def folder(root: Path) -> tuple[FileImages, FileImages, str]:
    """Training part, held-out part and a line that says which is which.

    Takes train/ with val/ or test/ (ImageFolder form), train/ alone, class folders alone, or any tree of images;
    without a held-out part, 5 % of the files, chosen by a hash of their place in the sorted list, are held out.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes a folder of images, cifar10 or cifar100")
    train_root = root / "train" if (root / "train").is_dir() else root
    held_root = next((root / name for name in ("val", "test") if train_root != root and (root / name).is_dir()), None)
    names = walk(train_root)
    if not names:
        raise DataError(f"{train_root}: no images found (looked for {' '.join(EXTENSIONS)})")
    if held_root:
        held = walk(held_root)
        if not held:
            raise DataError(f"{held_root}: no images found (looked for {' '.join(EXTENSIONS)})")
        train = from_names(train_root, names)
        return train, from_names(held_root, held, train.classes or None), f"held out: {len(held)} images of {held_root.name}/"
    if len(names) < 2:
        raise DataError(f"{train_root}: one image alone cannot be split into training and held-out part")
    order = np.argsort(hashed("held out", np.arange(len(names))), kind="stable")
    held = set(order[:max(1, round(0.05 * len(names)))].tolist())
    whole = from_names(train_root, names)
    parts = [[name for k, name in enumerate(names) if (k in held) == out] for out in (False, True)]
    train, test = (from_names(train_root, part, whole.classes or None) for part in parts)
    return train, test, f"held out: {len(held)} of {len(names)} images (5 %, no val/ or test/ in {root})"


def in_memory(images: FileImages) -> MemoryImages:
    """Every image decoded at once; DataError if they are not all readable and of one size."""
    from concurrent.futures import ThreadPoolExecutor

    def read(name):
        try:
            return tensor(to_rgb(open_image(images.root / name)))
        except DataError as error:
            raise DataError(f"{images.root / name}: {error}; --in-memory takes readable images only") from None

    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(read, images.names))
    odd = next((k for k, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        raise DataError(f"{images.root / images.names[odd]}: {tuple(pixels[odd].shape[1:])} pixels where the first image "
                        f"has {tuple(pixels[0].shape[1:])}; --in-memory takes images of one size")
    return MemoryImages(torch.stack(pixels), images.labels, images.classes, images.names)


def cifar(name: str, download: bool, root: str = "data") -> tuple[MemoryImages, MemoryImages]:
    """CIFAR-10 or CIFAR-100 through torchvision, from ./data."""
    make = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        parts = [make(root, train=train, download=download) for train in (True, False)]
    except RuntimeError:
        raise DataError(f"{name} is not in ./{root}; --download fetches it") from None
    return tuple(MemoryImages(rearrange(torch.from_numpy(part.data), "n h w c -> n c h w").contiguous(),
                              np.array(part.targets), list(part.classes)) for part in parts)


def load(data: str | None, download: bool = False, memory: bool = False, size: int = 64):
    """The training and held-out images that --data names, and a line about them."""
    if data is None:
        train, held = photographs(size), photographs(size, held_out=True)
        return train, held, f"{len(train)} crops of scikit-image's photographs, held out: {len(held)} from other regions"
    if data in ("cifar10", "cifar100"):
        train, held = cifar(data, download)
        return train, held, f"held out: the {len(held)} test images"
    train, held, line = folder(Path(data))
    return (in_memory(train), in_memory(held), line) if memory else (train, held, line)


# ---------------------------------------------------------------------------------------------------- batches

class Crops:
    """Random crops of images, asked for in batches of (epoch, index) pairs; what a DataLoader's worker runs.

    augment: an optional function of one uint8 image; while it runs, torch's generator is seeded by
    (seed, epoch, index). An unreadable image is replaced by the next readable one of the list and reported.
    """

    def __init__(self, images, size: int, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip: bool = True, seed: int = 0,
                 augment=None):
        self.images, self.size, self.scale, self.ratio, self.flip, self.seed = images, size, scale, ratio, flip, seed
        self.augment = augment

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = np.array(keys).T
        draws = uniform(24, self.seed, "crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy((draws[:, 23] < 0.5) & self.flip), "bad": []}
        if isinstance(self.images, MemoryImages) and not self.augment:  # cropped on the device, all at once
            sizes = np.tile(self.images.pixels.shape[2:], (len(indices), 1))
            batch["boxes"] = torch.from_numpy(crop_boxes(sizes, draws[:, :22], self.scale, self.ratio))
            batch["images"] = self.images.pixels[torch.from_numpy(indices)]
        else:
            items = [self.read(int(e), int(i), d, batch["bad"]) for e, i, d in zip(epochs, indices, draws)]
            batch["images"] = torch.stack([image for image, _ in items])
            indices = np.array([index for _, index in items])
        if self.images.labels is not None:
            batch["labels"] = torch.from_numpy(self.images.labels[indices])
        return batch

    def read(self, epoch, index, draws, bad):
        """(image, index) of the first readable image from `index` on."""
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                image = self.images.crop(place, draws[:22], self.size, self.scale, self.ratio)
                break
            except DataError as error:
                bad.append((place, str(error)))
        else:
            raise DataError(f"none of the {len(self.images)} images can be read")
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hashed(self.seed, "augment", epoch, index) >> np.uint64(1)))
                image = self.augment(image)
        return image, place


@dataclass
class Batches:
    """Which images each step takes: READING of randomness as a function of (seed, epoch, index).

    An epoch's order is a permutation by (seed, epoch); step s takes the s-th `batch` of them, `group` neighbours form
    a composite, and the composites are dealt out in one piece per process and micro-step. A last partial batch is
    dropped. Iterating yields one list of (epoch, index) per micro-step, from step `start` to `stop`, for one rank.
    """
    count: int
    batch: int
    seed: int
    start: int
    stop: int
    rank: int = 0
    parts: int = 1      # processes
    accumulate: int = 1
    _order: tuple = field(default=(-1, None), repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, indices) of all images of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(self.count, generator=generator(self.seed, "order", epoch)).numpy()
        return epoch, self._order[1][place * self.batch:(place + 1) * self.batch]

    def __iter__(self):
        size = self.batch // (self.parts * self.accumulate)
        for step in range(self.start, self.stop):
            epoch, indices = self.global_batch(step)
            for micro in range(self.accumulate):
                part = micro * self.parts + self.rank
                yield [(epoch, int(index)) for index in indices[part * size:(part + 1) * size]]

    def __len__(self):
        return (self.stop - self.start) * self.accumulate


def loader(crops: Crops, batches: Batches, workers: int, pin: bool) -> DataLoader:
    """One DataLoader for the whole rest of the run; its workers never restart."""
    return DataLoader(crops, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin,
                      generator=torch.Generator().manual_seed(0),  # unused by us; the default would draw a seed from torch's
                      prefetch_factor=4 if workers else None, worker_init_fn=_worker)


def _as_it_is(batch):
    return batch


def _worker(number):
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # sent to the whole process group; the training process decides what they mean


def prepare(batch: dict, device, size: int, mean=MEAN, std=STD) -> torch.Tensor:
    """A loader's batch as normalised float images (b, 3, size, size) on the device: crop if still due, flip, scale."""
    images = batch["images"].to(device, non_blocking=True).float()
    flip = batch["flip"].to(device, non_blocking=True)
    if "boxes" in batch:
        images = resized_crop(images, batch["boxes"].to(device, non_blocking=True), size)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return normalise(images, mean, std)


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Each image's box (top, left, height, width) resized to size x size, bicubic without antialiasing: for small
    images, which are enlarged rather than shrunk. images: (b, 3, h, w) float in 0-255."""
    top, left, h, w = boxes.float().unbind(1)
    centre = (torch.arange(size, device=images.device) + 0.5) / size
    y = (top[:, None] + h[:, None] * centre) / images.shape[2] * 2 - 1
    x = (left[:, None] + w[:, None] * centre) / images.shape[3] * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False).clamp(0, 255)


@lru_cache(maxsize=8)
def _channels(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # kept: a copy to a GPU each step would make it wait


def normalise(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Float images (..., 3, h, w) from 0-255 to about zero mean and unit variance per channel."""
    return (images / 255 - _channels(tuple(mean), images.device)) / _channels(tuple(std), images.device)


def denormalise(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """The way back, (..., 3, h, w) in 0-1, for pictures."""
    return (images * _channels(tuple(std), images.device) + _channels(tuple(mean), images.device)).clamp(0, 1)
