"""From a file to a tensor: what --data names, opened as images for training and validation.

How a file becomes a tensor:

1. `open_train_and_val` finds out what --data names. `folders.train_and_val` lists the files of a folder and chooses
   which of them are held out, and `decode.expand_pages` lists the pages of stacks. The result is a source of images for
   each part, see sources.py.
2. `formats.measure_format` reads a sample of the training images and determines the pixel format of the run: value
   range, mean and standard deviation.
3. A source's `crop` opens one file by `decode.open_file`, which reads only its header. It draws the box of a crop by
   `crops.random_crop_box`, and decodes the file by `array`. That converts the channels by `formats.convert_channels`
   and the values to 0 to 255 by `formats.scale_to_255`. `crops.resized_crop` cuts and resizes the box to a tensor
   (c, h, w). A validation image comes from `center_crop` in the same way.
4. `engine.data` makes batches of crops, and `crops.normalize` brings them to about zero mean and unit variance.

`--cache` stores the decoded images in one file (cache.py). Fine-tuning adds RandAugment (augment.py), and segmentation
has a mask of class numbers for each image (masks.py).

To add a source of data, write a class with the methods listed at the top of sources.py, and return it from
`open_train_and_val`. To add a kind of file, add its suffix to `decode.EXTENSIONS`. If Pillow does not read it, return a
`decode.ArrayImage` for it from `decode.open_file`. A line of KINDS in tests/test_pixels.py tests it, and the table in
docs/data.md lists it.
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
    """Open the training and held-out images that --data names.

    Args:
        where: A folder, "cifar10" or "cifar100"; None: scikit-image's photographs.
        memory: Decode all images at once.
        size: Size of the model's input, which is the size of the photographs' crops.
        cache: A folder to keep decoded images in.
        labelled: Refuse a folder in which a part lacks labels or classes.
        form: The pixel format of the images.
        measured: `form` is complete. If not, what it leaves open is measured on the training images.
        once: Calls a function in one process, and returns its result in all.

    Returns:
        Two sources of images, and lines to print about them, warnings among them.

    Raises:
        DataError: There are no images, or they do not fit the arguments.
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
        form, format_lines = once(lambda: measure_format(train, form))
        lines = lines + format_lines
    if where is None or where in CIFAR:
        return train.converted(form), held.converted(form), lines
    train.form = held.form = form
    if cache:
        train, held = (open_cached(part, Path(cache), size) for part in (train, held))
    return (load_into_memory(train), load_into_memory(held), lines) if memory else (train, held, lines)


def open_labelled_part(where: str | None, split: str | None, size=64, form: PixelFormat = PixelFormat()):
    """Open labelled images to evaluate on.

    Args:
        where: See `open_train_and_val`.
        split: The part of --data; None: the held-out part of a data set that has parts, or a whole folder without any.
        size, form: See `open_train_and_val`.

    Returns:
        A source of images, and a line to print about it.
    """
    if where is None or where in CIFAR:
        train, held, _ = open_train_and_val(where, size=size, form=form)
        if split == "train":
            return train, f"{describe(train)}, the training part"
        return held, f"{describe(held)}, the held-out part"
    images = labelled_part(Path(where), split, form)
    return images, f"{describe(images)} in {images.root}"


def balanced_subset(images, part: float, seed: int):
    """A random part of the images of each class, at least one image each, for experiments with few labels.

    Args:
        images: A source of labelled images.
        part: The fraction to keep.
        seed: Determines the choice, together with the class and the position of an image within it.
    """
    if part == 1:
        return images
    chosen = []
    for label in range(len(images.classes)):
        indices = np.flatnonzero(images.labels == label)
        order = np.argsort(rng.hash64(seed, "labels", label, np.arange(len(indices))), kind="stable")
        chosen.append(indices[order[: max(1, round(part * len(indices)))]])
    return images.subset(np.sort(np.concatenate(chosen)))
