"""A folder's images decoded once into one memory-mapped file, for runs that wait for the decoding of files.

    python train.py --data DIR --cache /fast/disk/cache

The file holds upright images in the pixel format of the run, uint8 or float32, with a shorter side of at most 256
pixels (more for larger inputs). So crops of larger photographs are slightly softer than crops from the files. A cache
belongs to one list of files and one format, and is rebuilt when the size or modification time of a file changes.
ImageNet takes about 260 kB an image. Float images take four bytes a value.

A cache is two files: KEY.bin has the pixels of one image after the other, and KEY.npz the index:
    places   (n, 3) for each image the position of its first value, height and width;
             for an unreadable one height is 0, and the last number is the position of its message in reasons
    reasons  messages of unreadable images
    stamps   (n, 2) size and modification time of each file
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from engine.errors import DataError, warn
from engine.files import sync_folder
from images.crops import random_crop_box, resized_crop, to_2tuple
from images.decode import decoding_errors, file_name, to_chw
from images.formats import PixelFormat, resize
from images.sources import FileImages

BLOCK = 1024  # images whose pixels are in memory at once while a cache is written, and files per thread


@dataclass
class CachedImages(FileImages):
    """FileImages whose pixels come from a cache.

    Args:
        path: The file of pixels.
        places: (n, 3), see the top of this file.
        reasons: Messages of unreadable images.
        open_again: Opens a cache for another list of files of the same folder.
    """

    path: Path
    places: np.ndarray
    reasons: list[str]
    open_again: Callable

    def __post_init__(self):
        super().__post_init__()
        values = np.memmap(self.path, np.uint8, "r")
        self.pixels = values[:-1].view(np.float32) if self.form.is_float else values  # without the byte at the end

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __setstate__(self, state):  # in a spawned worker, which maps the file itself
        vars(self).update(state)
        self.__post_init__()

    def subset(self, indices):
        return replace(super().subset(indices), places=self.places[indices])

    def relisted(self, names):
        position = {name: k for k, name in enumerate(self.names)}
        if position.keys() >= set(names):
            return self.subset(np.array([position[name] for name in names]))
        return self.open_again(super().relisted(names))

    def decode(self, index: int) -> np.ndarray:
        """The pixels of one image, (h, w, c), a view of the file."""
        start, height, width = self.places[index]
        if not height:
            raise DataError(self.reasons[width])
        shape = height, width, self.form.channels
        return self.pixels[start : start + np.prod(shape)].reshape(shape)

    def crop(self, index, draws, size, scale, ratio):
        pixels = self.decode(index)
        top, left, h, w = random_crop_box(pixels.shape[:2], draws, size, scale, ratio)
        rows = to_chw(pixels[top : top + h])  # only these rows are read from the file
        return resized_crop(rows, (0, left, h, w), size)


def file_stamps(images: FileImages) -> np.ndarray:
    """(n, 2) size and modification time in nanoseconds of each file, -1 if there is no such file."""
    stamps = np.full((len(images), 2), -1, np.int64)

    def read_stamps(indices):
        for index in indices:
            with suppress(OSError):
                status = os.stat(images.root / file_name(images.names[index]))
                stamps[index] = status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor() as pool:  # a file server answers many requests at once
        list(pool.map(read_stamps, np.array_split(np.arange(len(images)), -(-len(images) // BLOCK))))
    return stamps


def cache_key(images: FileImages, side: int) -> str:
    """A hash of everything that the pixels of a cache depend on, except the contents of the files."""
    lines = [str(images.root.resolve()), str(side)]
    if not images.form.is_rgb8:
        lines.append(str(images.form).replace("is_float=", "deep="))  # the field's earlier name, for caches on disk
    text = "\n".join([*lines, *images.names])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def open_cached(images: FileImages, folder: Path, size) -> CachedImages:
    """Open images from a cache, which is written first if there is none or if files have changed.

    Args:
        images: The images in files.
        folder: Where caches are kept.
        size: Size of the model's input, which determines the size of the cached images.

    Raises:
        DataError: The cache is damaged, or cannot be written.
    """
    side = max(256, -(-max(to_2tuple(size)) * 8 // 7))
    path = folder / cache_key(images, side)
    stamps = file_stamps(images)
    index = read_index(path, images.form)
    changed = int((index["stamps"] != stamps).any(1).sum()) if index else 0
    if changed:
        warn(f"{changed} of {len(images)} files changed since {path}.bin was written: it is rebuilt")
    if not index or changed:
        try:
            fill(images, path, side, stamps)
        except OSError as error:
            raise DataError(f"{folder}: the cache cannot be written ({error.strerror})") from None
        index = read_index(path, images.form)
    return CachedImages(
        images.root,
        images.names,
        images.labels,
        images.classes,
        path.with_suffix(".bin"),
        index["places"],
        index["reasons"].tolist(),
        partial(open_cached, folder=folder, size=size),
        form=images.form,
    )


def read_index(path: Path, pixel_format: PixelFormat) -> dict:
    """Read the index of a cache.

    Args:
        path: Path of the cache without a suffix.
        pixel_format: The pixel format of the cache.

    Returns:
        The arrays in path.npz; empty if there is no such file, or one of an earlier version without `stamps`.

    Raises:
        DataError: The index cannot be read, or path.bin has not the length that the index implies.
    """
    if not path.with_suffix(".npz").exists():
        return {}
    try:
        with np.load(path.with_suffix(".npz")) as arrays:
            index = dict(arrays)
        if "stamps" not in index:
            return {}
        start, height, width = index["places"].T
        values = int((start + pixel_format.channels * height * width).max())
        is_complete = os.path.getsize(path.with_suffix(".bin")) == values * (4 if pixel_format.is_float else 1) + 1
    except Exception as error:  # numpy and zipfile raise many types
        raise DataError(
            f"{path}.npz: a damaged cache ({type(error).__name__}); delete it, and it will be rebuilt"
        ) from None
    if not is_complete:
        raise DataError(
            f"{path}.bin: a damaged cache, of another length than it was written; delete {path}.npz, and it will be "
            "rebuilt"
        )
    return index


def fill(images: FileImages, path: Path, side: int, stamps: np.ndarray):
    """Write path.bin and then path.npz, so that an index always belongs to complete pixels.

    Args:
        images: The images in files.
        path: Path of the cache without a suffix.
        side: Longest allowed shorter side of a cached image.
        stamps: (n, 2), see `file_stamps`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # other runs may write the same cache at the same time
    places, reasons, start = [], [], 0
    try:
        with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
            for first in range(0, len(images), BLOCK):
                block = range(len(images))[first : first + BLOCK]
                for pixels in pool.map(lambda index: decode_resized(images, index, side), block):
                    if isinstance(pixels, str):
                        places.append((start, 0, len(reasons)))
                        reasons.append(pixels)
                    else:
                        file.write(pixels.tobytes())
                        places.append((start, *pixels.shape[:2]))
                        start += pixels.size
            file.write(b"\0")  # an empty file could not be mapped
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".npz").unlink(missing_ok=True)  # an older index does not belong to the new pixels
        os.replace(temporary, path.with_suffix(".bin"))
        with open(temporary, "wb") as file:
            np.savez(file, places=np.array(places, np.int64), reasons=np.array(reasons, str), stamps=stamps)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path.with_suffix(".npz"))
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def decode_resized(images: FileImages, index: int, side: int) -> np.ndarray | str:
    """One image, (h, w, c), reduced to a shorter side of at most `side` pixels; for an unreadable one the reason."""
    try:
        opened = images.open(index)
        with decoding_errors():
            opened.draft(*(-(-length * side // min(opened.sides)) for length in opened.sides))
            pixels = opened.array()
            shorter = min(pixels.shape[:2])
            if shorter <= side:
                return pixels
            return resize(pixels, tuple(round(length * side / shorter) for length in pixels.shape[:2]))
    except DataError as error:
        return str(error)
