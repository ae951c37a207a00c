"""A folder's images decoded once into one uint8 file, mapped into memory: for devices that eat more than cores decode.

    python train.py --data DIR --cache /fast/disk/cache

Images are stored with a shorter side of at most 256 pixels (more for larger inputs), upright RGB, so crops of larger
photographs are slightly softer than those made from the files. A cache belongs to one list of files and is not
renewed when a file's content changes: delete it then. ImageNet takes about 260 kB an image.
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
import torch
from einops import rearrange
from PIL import Image

from engine.errors import DataError
from engine.images import FileImages, crop_boxes, crop_of, open_image, readable, square_centre, to_rgb


@dataclass
class CachedImages(FileImages):
    """FileImages whose pixels come from the cache.

    pixels: all bytes; places: (n, 3), first byte, height and width, 0 for a bad file; reasons: why it is bad, else "".
    again: caches another list of files of the same folder.
    """
    pixels: np.ndarray
    places: np.ndarray
    reasons: list[str]
    again: Callable

    def subset(self, indices):
        return replace(super().subset(indices), places=self.places[indices], reasons=[self.reasons[k] for k in indices])

    def relisted(self, names):
        number = {name: k for k, name in enumerate(self.names)}
        if number.keys() >= set(names):
            return self.subset(np.array([number[name] for name in names]))
        return self.again(super().relisted(names))

    def at(self, index: int) -> np.ndarray:
        """The pixels of one image, (h, w, 3) uint8, a view of the file."""
        start, height, width = self.places[index]
        if not height:
            raise DataError(self.reasons[index])
        return self.pixels[start:start + 3 * height * width].reshape(height, width, 3)

    def decode(self, index: int) -> Image.Image:
        return Image.fromarray(self.at(index))

    def crop(self, index, draws, size, scale, ratio):
        pixels = self.at(index)
        top, left, h, w = box = crop_boxes(np.array([pixels.shape[:2]]), draws[None], scale, ratio)[0].tolist()
        part = rearrange(torch.from_numpy(pixels[top:top + h].copy()), "h w c -> c h w")  # only these rows leave the file
        return crop_of(part, (0, *box[1:]), size)

    def centre(self, index, size, share: float = 224 / 256):
        return square_centre(self.decode(index), size, share)


def cached(images: FileImages, folder: Path, size: int) -> CachedImages:
    """The images from the cache in `folder`, which is filled first if it has none of them. DataError if it cannot be."""
    side = max(256, -(-size * 8 // 7))
    names = "\n".join([str(images.root.resolve()), str(side), *images.names]).encode(errors="surrogateescape")
    path = folder / hashlib.sha256(names).hexdigest()[:16]
    index = path.with_suffix(".npz")
    if not index.exists():
        try:
            fill(images, path, side)
        except OSError as error:
            raise DataError(f"{folder}: the cache cannot be written ({error.strerror})") from None
    with np.load(index) as saved:
        places, reasons = saved["places"], saved["reasons"].tolist()
    pixels = np.memmap(path.with_suffix(".bin"), np.uint8, "r")
    return CachedImages(images.root, images.names, images.labels, images.classes, pixels, places, reasons,
                        partial(cached, folder=folder, size=size))


def fill(images: FileImages, path: Path, side: int):
    """path.bin and path.npz, whole or not at all: the index, written last, says that the pixels are complete."""
    def read(name):
        try:
            image = open_image(images.root / name)
            with readable():
                image.draft(None, tuple(-(-length * side // min(image.size)) for length in image.size))
                image = to_rgb(image)
                if min(image.size) > side:
                    image = image.resize([round(length * side / min(image.size)) for length in image.size], Image.Resampling.BICUBIC)
                return np.array(image), ""
        except DataError as error:
            return np.zeros((0, 0, 3), np.uint8), str(error)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    places, reasons, start = [], [], 0
    try:
        with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
            for block in range(0, len(images.names), 1024):  # a block at a time is in memory
                for pixels, reason in pool.map(read, images.names[block:block + 1024]):
                    file.write(pixels.tobytes())
                    places.append((start, *pixels.shape[:2]))
                    reasons.append(reason)
                    start += pixels.size
            file.write(b"\0")  # an empty file could not be mapped
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path.with_suffix(".bin"))
        with open(temporary, "wb") as file:
            np.savez(file, places=np.array(places, np.int64), reasons=np.array(reasons))
        os.replace(temporary, path.with_suffix(".npz"))
    finally:
        with suppress(OSError):
            temporary.unlink()
