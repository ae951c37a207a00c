"""Batches: which images each step takes, their crops, and what the device does with them.

BatchSampler yields lists of (epoch, index), Crops reads and crops these images in the loader's workers, and
`prepare_batch` flips and normalizes them on the device, where it also crops images that are held in memory.
Images leave the loader as uint8 or float32, from 0 to 255. Axis letters: b images, c channels, h w pixels.
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
    """A dataset of random crops that takes batches of (epoch, index) pairs.

    An unreadable image is reported and replaced by the next readable one of the list.

    Args:
        images: A source of images, see images/sources.py.
        size: Height and width of the crops.
        scale: Smallest and largest area of a crop, as fractions of the image's area.
        ratio: Smallest and largest width over height.
        seed: Crops are a function of (seed, epoch, index).
        augment: A function of one crop (c, *size), or None. torch's generator is seeded by (seed, epoch, index) for it.
    """

    def __init__(self, images, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), seed: int = 0, augment=None):
        self.images, self.size, self.scale, self.ratio = images, size, scale, ratio
        self.seed, self.augment = seed, augment

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """A batch: images (b, c, h, w), flip (b,), keys (b, 2), bad [(index, reason)], labels (b,) if there are any.

        Images in memory come uncropped, with the boxes (b, 4) by which the device crops them.
        """
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
        """The crop of the first readable image from `index` on, and that image's index."""

        def crop(k):
            return self.images.crop(k, draws[:22], self.size, self.scale, self.ratio)

        image, index_read = self.first_readable(index, crop, bad)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(rng.seed(self.seed, "augment", epoch, index))
                image = self.augment(image)
        return image, index_read

    def first_readable(self, index: int, load, bad: list):
        """load(k) of the first readable image k from `index` on, and k.

        Args:
            load: A function of an index that raises DataError for an unreadable image.
            bad: A list to which (index, reason) of each unreadable image is appended.

        Raises:
            DataError: None of the images can be read.
        """
        for k in (*range(index, len(self.images)), *range(index)):
            try:
                return load(k), k
            except DataError as error:
                bad.append((k, str(error)))
        name, (_, reason) = self.images.name(index), bad[-len(self.images)]
        raise DataError(f"none of the {len(self.images)} images can be read; {name}: {reason}")


@dataclass
class BatchSampler:
    """Which images each step takes, as a function of (seed, step).

    The order of an epoch is a permutation that depends on (seed, epoch). Each step takes the next `batch` images, which
    are divided into contiguous pieces, one for each micro-step and process. A last partial batch is dropped.
    Iterating yields one list of (epoch, index) for each micro-step of one process.

    Args:
        count: Number of images.
        batch: Effective batch size, over all processes and micro-steps.
        seed: The seed of the order.
        start, stop: First step, and the step after the last.
        rank, world_size: This process, and the number of processes.
        accumulate: Micro-steps per step.
    """

    count: int
    batch: int
    seed: int
    start: int
    stop: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    _order: tuple = field(default=(-1, None), repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, indices) of all images of a step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:  # an epoch's permutation is computed once
            generator = rng.generator(self.seed, "order", epoch)
            self._order = epoch, torch.randperm(self.count, generator=generator).numpy()
        return epoch, self._order[1][step * self.batch : (step + 1) * self.batch]

    def __iter__(self):
        size = self.batch // (self.world_size * self.accumulate)
        for step in range(self.start, self.stop):
            epoch, indices = self.global_batch(step)
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                yield [(epoch, int(index)) for index in indices[part * size : (part + 1) * size]]


def make_loader(items, batches, workers: int, pin: bool) -> DataLoader:
    """A DataLoader of items.__getitems__(batch) for each of `batches`, in their order."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin,
        # Not used here, but the default would draw a seed from torch's global generator.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_init_worker,
    )


def _identity(batch):
    return batch


def _init_worker(number):
    torch.set_num_threads(1)
    # PR_SET_PDEATHSIG of Linux ends a worker with its parent; elsewhere torch's watchdog does so within seconds.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # These signals reach the whole process group, but only the training process decides what they mean.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def prepare_batch(batch: dict, device, size, mean=MEAN, std=STD) -> torch.Tensor:
    """Bring a batch of `Crops` to the device as float images (b, c, *size): crop if it has boxes, flip, normalize."""
    images = batch["images"].to(device, non_blocking=True).float()
    flip = batch["flip"].to(device, non_blocking=True)
    if "boxes" in batch:
        images = batched_resized_crop(images, batch["boxes"].to(device, non_blocking=True), size)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return normalize(images, mean, std)


def random_erasing(images: torch.Tensor, keys: np.ndarray, probability: float, seed: int, step: int) -> torch.Tensor:
    """Random erasing (Zhong et al. 2020): a rectangle of an image is replaced by noise, N(0, 1) in each pixel.

    A rectangle has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3, and is a function of (seed, epoch, index).
    The noise of a step is one image, a function of (seed, step), from which all rectangles are cut. So nothing depends
    on how a batch is distributed over processes.

    Args:
        images: (b, c, h, w), normalized.
        keys: (b, 2) epochs and indices of the images.
        probability: Of an image to have a rectangle.
    """
    draws = rng.uniform(23, seed, "erasing", keys[:, 0], keys[:, 1])
    boxes = random_crop_boxes(
        np.tile(images.shape[2:], (len(images), 1)), draws[:, :22], (0.02, 1 / 3), (0.3, 1 / 0.3)
    ) * (draws[:, 22:] < probability)
    noise = torch.randn(images.shape[1:], generator=rng.generator(seed, "erasing noise", step))
    boxes, noise = to_device([torch.from_numpy(boxes), noise], images.device, non_blocking=True)
    top, left, h, w = boxes[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((row >= top) & (row < top + h))[:, None, :, None] & ((column >= left) & (column < left + w))[
        :, None, None, :
    ]
    return torch.where(inside, noise, images)


class CenterCrops:
    """A dataset of center crops that takes batches of indices."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitems__(self, indices) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
        """The readable images' indices and crops (b, c, *size), or None, and the others' indices with reasons."""
        readable, crops, bad = [], [], {}
        for index in map(int, indices):
            try:
                crops.append(self.images.center_crop(index, self.size))
                readable.append(index)
            except DataError as error:
                bad[index] = str(error)
        return readable, torch.stack(crops) if crops else None, bad


def iterate_center_crops(images, chunks: list, size, bad: dict | None = None, workers: int = 0):
    """Iterate over the center crops of images, without those that cannot be read.

    Args:
        images: A source of images.
        size: Height and width of the crops.
        chunks: Lists of indices.
        bad: A dictionary that gets the indices of unreadable images with reasons, or None.
        workers: Largest number of processes that read ahead.

    Yields:
        For each chunk with a readable image, the indices of these and their crops (b, c, *size), uint8 or float32.
    """
    workers = min(workers, max(0, len(chunks) - 1))
    for readable, crops, reasons in make_loader(CenterCrops(images, size), chunks, workers, pin=False):
        if bad is not None:
            bad.update(reasons)
        if readable:
            yield readable, crops


class MaskCrops(Crops):
    """Random crops of images with their masks, as a function of (seed, epoch, index); see crops.random_scaled_box.

    An unreadable image is replaced by the next readable one, but an unusable mask is an error.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = np.array(keys).T
        draws = rng.uniform(4, self.seed, "mask crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy(draws[:, 3] < 0.5), "bad": []}
        items = [self.pair(int(index), draw, batch["bad"]) for index, draw in zip(indices, draws)]
        batch["images"], batch["masks"] = (torch.stack(part) for part in zip(*items))
        return batch

    def pair(self, index: int, draws, bad: list) -> tuple[torch.Tensor, torch.Tensor]:
        """The crop (c, *size) of the first readable image from `index` on, and that of its mask (*size)."""
        pixels, index_read = self.first_readable(index, lambda k: to_chw(self.images.decode(k)), bad)
        image_size = tuple(pixels.shape[1:])
        mask = torch.from_numpy(self.images.mask(index_read, image_size))
        box = random_scaled_box(image_size, to_2tuple(self.size), self.scale, draws)
        return resized_crop(pixels, box, self.size), resized_mask_crop(mask, box, self.size)
