"""From a file to a tensor: what --data names, opened as images for training and validation.

decode    a file of any kind becomes an image            formats   channels, value range, mean and standard deviation
sources   images in files or in memory                   crops     random and central crops, normalisation
folders   data sets as people keep them                  cache     a folder decoded once into one file
masks     images with a mask of class numbers each     augment   RandAugment
"""

from pathlib import Path

import numpy as np

from engine import rng
from engine.errors import DataError
from images.cache import open_cached
from images.crops import to_2tuple
from images.folders import describe, labelled_part, train_and_val
from images.formats import PixelFormat, measure_format
from images.sources import CIFAR, load_into_memory, open_cifar, photographs


def open_train_and_val(
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
        train, held = (photographs(max(to_2tuple(size)), held_out) for held_out in (False, True))
        lines = [f"{len(train)} crops of scikit-image's photographs; held out: {len(held)} from other regions"]
    elif where in CIFAR:
        train, held = open_cifar(where)
        lines = [f"{describe(train)}; held out: the {len(held)} test images"]
    elif not where:
        raise DataError("--data is empty: give a folder of images, cifar10 or cifar100")
    else:
        train, held, lines = train_and_val(Path(where), labelled, form)
    if not measured:
        form, found = once(lambda: measure_format(train, form))
        lines = lines + found
    if where is None or where in CIFAR:
        return train.converted(form), held.converted(form), lines
    train.form = held.form = form
    if cache:
        train, held = (open_cached(part, Path(cache), size) for part in (train, held))
    return (load_into_memory(train), load_into_memory(held), lines) if memory else (train, held, lines)


def open_labelled_part(where: str | None, split: str | None, size=64, form: PixelFormat = PixelFormat()):
    """The labelled images to evaluate on, and a line about them: the part of --data that is asked for; by default the whole of a folder without parts."""
    if where is None or where in CIFAR:
        train, held, _ = open_train_and_val(where, size=size, form=form)
        return (
            (train, f"{describe(train)}, the training part")
            if split == "train"
            else (held, f"{describe(held)}, the held-out part")
        )
    images = labelled_part(Path(where), split, form)
    return images, f"{describe(images)} in {images.root}"


def balanced_subset(images, part: float, seed: int):
    """At least one image of each class, the same share of all, chosen by (seed, class, place)."""
    if part == 1:
        return images
    picked = []
    for label in range(len(images.classes)):
        mine = np.flatnonzero(images.labels == label)
        order = np.argsort(rng.hash64(seed, "labels", label, np.arange(len(mine))), kind="stable")
        picked.append(mine[order[: max(1, round(part * len(mine)))]])
    return images.subset(np.sort(np.concatenate(picked)))
