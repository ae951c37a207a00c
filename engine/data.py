"""Batches: which images each step takes, their crops, and what the device does with them.

Images leave the loader as uint8, or float32 in 0-255 if they are deep, and are cropped (small ones), flipped and normalised on the
device by `prepare`.
Axis letters: b images, c channels, h w pixels.
"""

import ctypes
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from engine import chance
from engine.cache import cached
from engine.errors import DataError
from engine.folders import described, folder, whole
from engine.formats import MEAN, STD, PixelFormat, measure
from engine.images import CIFAR, MemoryImages, both_sides, cifar, crop_boxes, crop_ratio, in_memory, photographs
from engine.processes import to_device


def load(
    where: str | None,
    memory: bool = False,
    size=64,
    cache: str | None = None,
    labelled: bool = False,
    form: PixelFormat = PixelFormat(),
    measured: bool = True,
    once=lambda work: work(),
):
    """The training and held-out images that --data names, and lines about them, warnings among them.

    memory: decode all at once; size: of a crop of the photographs; cache: a folder to keep decoded images in; labelled: refuse a folder whose
    classes are not whole. form: of pixels; if not `measured`, what it leaves open is measured on training images, by once(work), which runs
    it on one process for all.
    """
    if where is None:
        train, held = (photographs(max(both_sides(size)), held_out) for held_out in (False, True))
        lines = [f"{len(train)} crops of scikit-image's photographs; held out: {len(held)} from other regions"]
    elif where in CIFAR:
        train, held = cifar(where)
        lines = [f"{described(train)}; held out: the {len(held)} test images"]
    elif not where:
        raise DataError("--data is empty: give a folder of images, cifar10 or cifar100")
    else:
        train, held, lines = folder(Path(where), labelled, form)
    if not measured:
        form, found = once(lambda: measure(train, form))
        lines = lines + found
    if where is None or where in CIFAR:
        return train.converted(form), held.converted(form), lines
    train.form = held.form = form
    if cache:
        train, held = (cached(part, Path(cache), size) for part in (train, held))
    return (in_memory(train), in_memory(held), lines) if memory else (train, held, lines)


def load_part(where: str | None, split: str | None, size=64, form: PixelFormat = PixelFormat()):
    """The labelled images to evaluate on, and a line about them: the part of --data that is asked for; by default the whole of a folder without parts."""
    if where is None or where in CIFAR:
        train, held, _ = load(where, size=size, form=form)
        return (
            (train, f"{described(train)}, the training part")
            if split == "train"
            else (held, f"{described(held)}, the held-out part")
        )
    images = whole(Path(where), split, form)
    return images, f"{described(images)} in {images.root}"


def balanced_share(images, part: float, seed: int):
    """At least one image of each class, the same share of all, chosen by (seed, class, place)."""
    if part == 1:
        return images
    picked = []
    for label in range(len(images.classes)):
        mine = np.flatnonzero(images.labels == label)
        order = np.argsort(chance.hashed(seed, "labels", label, np.arange(len(mine))), kind="stable")
        picked.append(mine[order[: max(1, round(part * len(mine)))]])
    return images.subset(np.sort(np.concatenate(picked)))


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
        draws = chance.uniform(24, self.seed, "crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy(draws[:, 23] < 0.5), "bad": []}
        if isinstance(self.images, MemoryImages) and not self.augment:  # cropped on the device, all at once
            sizes = np.tile(self.images.pixels.shape[2:], (len(indices), 1))
            batch["boxes"] = torch.from_numpy(
                crop_boxes(sizes, draws[:, :22], self.scale, crop_ratio(self.ratio, self.size))
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
                torch.default_generator.manual_seed(chance.seed(self.seed, "augment", epoch, index))
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
                torch.randperm(self.count, generator=chance.generator(self.seed, "order", epoch)).numpy(),
            )
        return epoch, self._order[1][place * self.batch : (place + 1) * self.batch]

    def __iter__(self):
        size = self.batch // (self.parts * self.accumulate)
        for step in range(self.start, self.stop):
            epoch, indices = self.global_batch(step)
            for micro in range(self.accumulate):
                part = micro * self.parts + self.rank
                yield [(epoch, int(index)) for index in indices[part * size : (part + 1) * size]]


def loader(items, batches, workers: int, pin: bool) -> DataLoader:
    """A DataLoader of items.__getitems__(batch) for each of `batches`, in their order."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # unused by us; the default would draw a seed from torch's
        worker_init_fn=_worker,
    )


def _as_it_is(batch):
    return batch


def _worker(number):
    torch.set_num_threads(1)
    with suppress(
        AttributeError, OSError
    ):  # Linux: PR_SET_PDEATHSIG; elsewhere torch's watchdog sees it within seconds
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(
            name, signal.SIG_IGN
        )  # sent to the whole process group; the training process decides what they mean


def prepare(batch: dict, device, size, mean=MEAN, std=STD) -> torch.Tensor:
    """A loader's batch as normalised float images (b, c, *size) on the device: crop if still due, flip, scale."""
    images = batch["images"].to(device, non_blocking=True).float()
    flip = batch["flip"].to(device, non_blocking=True)
    if "boxes" in batch:
        images = resized_crop(images, batch["boxes"].to(device, non_blocking=True), size)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return normalise(images, mean, std)


def erase(images: torch.Tensor, keys: np.ndarray, share: float, seed: int, step: int) -> torch.Tensor:
    """Random erasing (Zhong et al. 2020): in a `share` of normalised images (b, c, h, w) a rectangle becomes noise, N(0, 1) in each pixel.

    Rectangles (2 to 33 % of the area, sides 0.3 to 3.3) are a function of seed and keys (b, 2), epoch and index. They are cut out of one
    image of noise a step, a function of seed and step, so that nothing depends on how a batch is dealt out.
    """
    draws = chance.uniform(23, seed, "erasing", keys[:, 0], keys[:, 1])
    boxes = crop_boxes(np.tile(images.shape[2:], (len(images), 1)), draws[:, :22], (0.02, 1 / 3), (0.3, 1 / 0.3)) * (
        draws[:, 22:] < share
    )
    noise = torch.randn(images.shape[1:], generator=chance.generator(seed, "erasing noise", step))
    boxes, noise = to_device([torch.from_numpy(boxes), noise], images.device, non_blocking=True)
    top, left, h, w = boxes[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((row >= top) & (row < top + h))[:, None, :, None] & ((column >= left) & (column < left + w))[
        :, None, None, :
    ]
    return torch.where(inside, noise, images)


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, size) -> torch.Tensor:
    """Each image's box (top, left, height, width) resized to `size`, bicubic without antialiasing: for small
    images, which are enlarged rather than shrunk. images: (b, c, h, w) float in 0-255."""
    top, left, h, w = boxes.float().unbind(1)
    down, across = ((torch.arange(side, device=images.device) + 0.5) / side for side in both_sides(size))
    y = (top[:, None] + h[:, None] * down) / images.shape[2] * 2 - 1
    x = (left[:, None] + w[:, None] * across) / images.shape[3] * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False).clamp(0, 255)


@lru_cache(maxsize=8)
def _channels(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # kept: a copy to a GPU each step would make it wait


def normalise(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Float images (..., c, h, w) from 0-255 to about zero mean and unit variance per channel."""
    return (images / 255 - _channels(tuple(mean), images.device)) / _channels(tuple(std), images.device)


def denormalise(images: torch.Tensor) -> torch.Tensor:
    """The way back of 8-bit photographs, (..., c, h, w) in 0-1, for pictures."""
    return (images * _channels(STD, images.device) + _channels(MEAN, images.device)).clamp(0, 1)


class Centres:
    """The centres of images; what a DataLoader's worker runs."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitems__(self, indices) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
        """The readable ones among `indices`, their centres, and why the others cannot be read."""
        good, centres, bad = [], [], {}
        for index in map(int, indices):
            try:
                centres.append(self.images.centre(index, self.size))
                good.append(index)
            except DataError as error:
                bad[index] = str(error)
        return good, torch.stack(centres) if centres else None, bad


def held_out(images, chunks: list, size, bad: dict | None = None, workers: int = 0):
    """For each list of indices in `chunks`: (the readable ones among them, their centres (b, c, *size), uint8 or float32).

    Unreadable files are left out, for every run alike; bad: gets their indices with reasons. workers: at most so many processes read ahead.
    """
    for good, centres, reasons in loader(
        Centres(images, size), chunks, min(workers, max(0, len(chunks) - 1)), pin=False
    ):
        if bad is not None:
            bad.update(reasons)
        if good:
            yield good, centres
