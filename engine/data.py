"""Batches: which images each step takes, their crops, and what the device does with them.

Images leave the loader as uint8, or float32 in 0-255 if they are deep, and are cropped (small ones), flipped and normalised on the
device by `prepare`.
Axis letters: b images, c channels, h w pixels.
"""

import ctypes
import signal
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine import rng
from engine.dist import to_device
from engine.errors import DataError
from images.crops import (
    batched_resized_crop,
    crop_ratio,
    normalize,
    random_crop_boxes,
    random_scaled_box,
    resized_crop,
    resized_mask_crop,
    to_2tuple,
)
from images.decode import to_chw
from images.formats import MEAN, STD
from images.sources import MemoryImages


class Crops:
    """Random crops of images, asked for in batches of (epoch, index) pairs; what a DataLoader's worker runs.

    augment: an optional function of one image, as sources give it; while it runs, torch's generator is seeded by
    (seed, epoch, index). An unreadable image is replaced by the next readable one of the list and reported.
    """

    def __init__(self, images, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), seed: int = 0, augment=None):
        self.images, self.size, self.scale, self.ratio, self.seed, self.augment = (
            images,
            size,
            scale,
            ratio,
            seed,
            augment,
        )

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = np.array(keys).T
        draws = rng.uniform(24, self.seed, "crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy(draws[:, 23] < 0.5), "bad": []}
        if isinstance(self.images, MemoryImages) and not self.augment:  # cropped on the device, all at once
            sizes = np.tile(self.images.pixels.shape[2:], (len(indices), 1))
            batch["boxes"] = torch.from_numpy(
                random_crop_boxes(sizes, draws[:, :22], self.scale, crop_ratio(self.ratio, self.size))
            )
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
            raise DataError(
                f"none of the {len(self.images)} images can be read; {self.images.name(index)}: {bad[-len(self.images)][1]}"
            )
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(rng.seed(self.seed, "augment", epoch, index))
                image = self.augment(image)
        return image, place


@dataclass
class Batches:
    """Which images each step takes, as a function of (seed, step).

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
    parts: int = 1  # processes
    accumulate: int = 1
    _order: tuple = field(default=(-1, None), repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, indices) of all images of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (
                epoch,
                torch.randperm(self.count, generator=rng.generator(self.seed, "order", epoch)).numpy(),
            )
        return epoch, self._order[1][place * self.batch : (place + 1) * self.batch]

    def __iter__(self):
        size = self.batch // (self.parts * self.accumulate)
        for step in range(self.start, self.stop):
            epoch, indices = self.global_batch(step)
            for micro in range(self.accumulate):
                part = micro * self.parts + self.rank
                yield [(epoch, int(index)) for index in indices[part * size : (part + 1) * size]]


def make_loader(items, batches, workers: int, pin: bool) -> DataLoader:
    """A DataLoader of items.__getitems__(batch) for each of `batches`, in their order."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # unused by us; the default would draw a seed from torch's
        worker_init_fn=_init_worker,
    )


def _identity(batch):
    return batch


def _init_worker(number):
    torch.set_num_threads(1)
    with suppress(
        AttributeError, OSError
    ):  # Linux: PR_SET_PDEATHSIG; elsewhere torch's watchdog sees it within seconds
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(
            name, signal.SIG_IGN
        )  # sent to the whole process group; the training process decides what they mean


def prepare_batch(batch: dict, device, size, mean=MEAN, std=STD) -> torch.Tensor:
    """A loader's batch as normalised float images (b, c, *size) on the device: crop if still due, flip, scale."""
    images = batch["images"].to(device, non_blocking=True).float()
    flip = batch["flip"].to(device, non_blocking=True)
    if "boxes" in batch:
        images = batched_resized_crop(images, batch["boxes"].to(device, non_blocking=True), size)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return normalize(images, mean, std)


def random_erasing(images: torch.Tensor, keys: np.ndarray, share: float, seed: int, step: int) -> torch.Tensor:
    """Random erasing (Zhong et al. 2020): in a `share` of normalised images (b, c, h, w) a rectangle becomes noise, N(0, 1) in each pixel.

    Rectangles (2 to 33 % of the area, sides 0.3 to 3.3) are a function of seed and keys (b, 2), epoch and index. They are cut out of one
    image of noise a step, a function of seed and step, so that nothing depends on how a batch is dealt out.
    """
    draws = rng.uniform(23, seed, "erasing", keys[:, 0], keys[:, 1])
    boxes = random_crop_boxes(
        np.tile(images.shape[2:], (len(images), 1)), draws[:, :22], (0.02, 1 / 3), (0.3, 1 / 0.3)
    ) * (draws[:, 22:] < share)
    noise = torch.randn(images.shape[1:], generator=rng.generator(seed, "erasing noise", step))
    boxes, noise = to_device([torch.from_numpy(boxes), noise], images.device, non_blocking=True)
    top, left, h, w = boxes[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((row >= top) & (row < top + h))[:, None, :, None] & ((column >= left) & (column < left + w))[
        :, None, None, :
    ]
    return torch.where(inside, noise, images)


class CenterCrops:
    """The centres of images; what a DataLoader's worker runs."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitems__(self, indices) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
        """The readable ones among `indices`, their centres, and why the others cannot be read."""
        good, centres, bad = [], [], {}
        for index in map(int, indices):
            try:
                centres.append(self.images.center_crop(index, self.size))
                good.append(index)
            except DataError as error:
                bad[index] = str(error)
        return good, torch.stack(centres) if centres else None, bad


def iterate_center_crops(images, chunks: list, size, bad: dict | None = None, workers: int = 0):
    """For each list of indices in `chunks`: (the readable ones among them, their centres (b, c, *size), uint8 or float32).

    Unreadable files are left out, for every run alike; bad: gets their indices with reasons. workers: at most so many processes read ahead.
    """
    for good, centres, reasons in make_loader(
        CenterCrops(images, size), chunks, min(workers, max(0, len(chunks) - 1)), pin=False
    ):
        if bad is not None:
            bad.update(reasons)
        if good:
            yield good, centres


class MaskCrops(Crops):
    """Random crops of images with their masks: as large as the input, from an image scaled by `scale`, flipped half of the time.

    A function of (seed, epoch, index). An unreadable image is replaced by the next readable one; a mask that does not do is an error.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = np.array(keys).T
        draws = rng.uniform(4, self.seed, "mask crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy(draws[:, 3] < 0.5), "bad": []}
        items = [self.pair(int(index), draw, batch["bad"]) for index, draw in zip(indices, draws)]
        batch["images"], batch["masks"] = (torch.stack(part) for part in zip(*items))
        return batch

    def pair(self, index: int, draws, bad: list) -> tuple[torch.Tensor, torch.Tensor]:
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                pixels = to_chw(self.images.decode(place))
                break
            except DataError as error:
                bad.append((place, str(error)))
        else:
            raise DataError(
                f"none of the {len(self.images)} images can be read; {self.images.name(index)}: {bad[-1][1]}"
            )
        box = random_scaled_box(pixels.shape[1:], to_2tuple(self.size), self.scale, draws)
        numbers = torch.from_numpy(self.images.mask(place, tuple(pixels.shape[1:])))
        return resized_crop(pixels, box, self.size), resized_mask_crop(numbers, box, self.size)
