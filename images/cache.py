"""A folder's images decoded once into one file, uint8 or float32, mapped into memory: for devices that eat more than cores decode.

    python train.py --data DIR --cache /fast/disk/cache

Images are stored with a shorter side of at most 256 pixels (more for larger inputs), upright, as the run's format has them, so crops of
larger photographs are slightly softer than those made from the files. A cache belongs to one list of files and one format and is made anew
when the size or modification time of a file changes. ImageNet takes about 260 kB an image; deep images four bytes a value.
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
from images.formats import resize
from images.sources import FileImages


@dataclass
class CachedImages(FileImages):
    """FileImages whose pixels come from the cache.

    path: the file of all values; places: (n, 3), first value, height and width, for a bad file 0 and the number of its reason.
    again: caches another list of files of the same folder.
    """

    path: Path
    places: np.ndarray
    reasons: list[str]
    again: Callable

    def __post_init__(self):
        super().__post_init__()
        self.pixels = self.mapped()

    def mapped(self) -> np.ndarray:
        values = np.memmap(self.path, np.uint8, "r")
        return values[:-1].view(np.float32) if self.form.is_float else values  # but for the byte at the end

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __setstate__(self, state):  # in a spawned worker, which maps the file itself
        vars(self).update(state)
        self.pixels = self.mapped()

    def subset(self, indices):
        return replace(super().subset(indices), places=self.places[indices])

    def relisted(self, names):
        number = {name: k for k, name in enumerate(self.names)}
        if number.keys() >= set(names):
            return self.subset(np.array([number[name] for name in names]))
        return self.again(super().relisted(names))

    def decode(self, index: int) -> np.ndarray:
        """The pixels of one image, (h, w, c), a view of the file."""
        start, height, width = self.places[index]
        if not height:
            raise DataError(self.reasons[width])
        return self.pixels[start : start + self.form.channels * height * width].reshape(
            height, width, self.form.channels
        )

    def crop(self, index, draws, size, scale, ratio):
        pixels = self.decode(index)
        top, left, h, w = random_crop_box(pixels.shape[:2], draws, size, scale, ratio)
        rows = to_chw(pixels[top : top + h])  # only these rows are read from the file
        return resized_crop(rows, (0, left, h, w), size)


def file_stamps(images: FileImages) -> np.ndarray:
    """(n, 2) size and modification time in nanoseconds of each file, -1 for one that is not there."""

    def stamp(numbers):
        for number in numbers:
            with suppress(OSError):
                status = os.stat(images.root / file_name(images.names[number]))
                table[number] = status.st_size, status.st_mtime_ns

    table = np.full((len(images), 2), -1, np.int64)
    with ThreadPoolExecutor() as pool:  # a file server is asked many things at once
        list(pool.map(stamp, np.array_split(np.arange(len(images)), -(-len(images) // 1024))))
    return table


def cache_key(images: FileImages, side: int) -> str:
    """A hash of everything that the pixels of a cache depend on but the contents of the files."""
    lines = [str(images.root.resolve()), str(side)]
    if not images.form.is_rgb8:
        lines.append(str(images.form).replace("is_float=", "deep="))  # the field's earlier name, for caches on disk
    text = "\n".join([*lines, *images.names])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def open_cached(images: FileImages, folder: Path, size) -> CachedImages:
    """The images from the cache in `folder`, which is filled first if it has none of them. DataError if it cannot be."""
    side = max(256, -(-max(to_2tuple(size)) * 8 // 7))
    path = folder / cache_key(images, side)
    now = file_stamps(images)
    index = saved_index(path, images.form) if path.with_suffix(".npz").exists() else {}
    if index:
        changed = int((index["stamps"] != now).any(1).sum())
        if changed:
            warn(f"{changed} of {len(images)} files changed since {path}.bin was made: it is made anew")
    if not index or changed:
        try:
            fill(images, path, side, now)
        except OSError as error:
            raise DataError(f"{folder}: the cache cannot be written ({error.strerror})") from None
        index = saved_index(path, images.form)
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


def saved_index(path: Path, form) -> dict:
    """path.npz, checked against path.bin; empty if it is of an older form, without `stamps`. DataError if one is damaged."""
    try:
        with np.load(path.with_suffix(".npz")) as saved:
            index = {name: saved[name] for name in saved.files}
        if "stamps" not in index:
            return {}
        first, height, width = index["places"].T
        end = int((first + form.channels * height * width).max())
        whole = os.path.getsize(path.with_suffix(".bin")) == end * (4 if form.is_float else 1) + 1
    except Exception as error:  # numpy and zipfile raise many types
        raise DataError(
            f"{path}.npz: a damaged cache ({type(error).__name__}); delete it, and it is made anew"
        ) from None
    if not whole:
        raise DataError(
            f"{path}.bin: a damaged cache, of another length than it was written; delete {path}.npz, and it is made anew"
        )
    return index


def fill(images: FileImages, path: Path, side: int, now: np.ndarray):
    """path.bin and path.npz, whole or not at all: the index, written last, says that the pixels are complete."""

    def read(index):
        try:
            opened = images.open(index)
            with decoding_errors():
                opened.draft(*(-(-length * side // min(opened.sides)) for length in opened.sides))
                pixels = opened.array()
                shorter = min(pixels.shape[:2])
                return (
                    resize(pixels, tuple(round(length * side / shorter) for length in pixels.shape[:2]))
                    if shorter > side
                    else pixels
                ), ""
        except DataError as error:
            return np.zeros((0, 0, images.form.channels), np.uint8), str(error)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    places, reasons, start = [], [], 0
    try:
        with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
            for block in range(0, len(images.names), 1024):  # a block at a time is in memory
                for pixels, reason in pool.map(read, range(len(images.names))[block : block + 1024]):
                    file.write(pixels.tobytes())
                    places.append((start, 0, len(reasons)) if reason else (start, *pixels.shape[:2]))
                    reasons += [reason] if reason else []
                    start += pixels.size
            file.write(b"\0")  # an empty file could not be mapped
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            path.with_suffix(".npz").unlink()  # an older index does not belong to the new pixels
        os.replace(temporary, path.with_suffix(".bin"))
        with open(temporary, "wb") as file:
            np.savez(file, places=np.array(places, np.int64), reasons=np.array(reasons, str), stamps=now)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path.with_suffix(".npz"))
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
