"""Images with a mask of class numbers each, for segmentation. The files are paired by name:

    images/a.jpg  images/stack.tif
    masks/a.png   masks/stack.tif     page k of a stack of images has page k of the stack of masks

Masks are PNG, TIFF or .npy files of integers. The number 255 is left out of the loss and the metrics.
Axis letters: h w pixels.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from engine.errors import DataError
from images.decode import ARRAYS, TIFF, decoding_errors, file_name, load_array
from images.folders import find_images, find_splits, hold_out
from images.formats import PixelFormat
from images.sources import FileImages

IGNORE_INDEX = 255
SUFFIXES = (".png", *TIFF, ".npy")


def read_mask(path: Path, page: int | None = None) -> np.ndarray:
    """The class numbers (h, w) of a mask, or of one page of a file. DataError, with the path, for anything else."""
    try:
        with decoding_errors(path):
            if path.suffix.lower() in ARRAYS:
                values = load_array(path)
            elif path.suffix.lower() in TIFF:
                values = tifffile.imread(path)
            else:
                values = np.asarray(Image.open(path))  # a palette image gives its numbers, not its colours
            if page is not None and values.ndim < 3:
                raise DataError("one mask for a stack, which needs one for each page")
            values = np.asarray(values if page is None else values[page])
            if values.ndim != 2 or values.dtype.kind not in "bui":
                raise DataError(
                    f"a mask of shape {values.shape} and type {values.dtype}; class numbers (h, w) are expected"
                )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return values.astype(np.int64)


@dataclass
class MaskedImages(FileImages):
    """FileImages with masks.

    Args:
        masks: The path of the mask for each image file's name without its suffix.
        foreground: Masks number single objects, which all become class 1.
        count: Number of classes; None until it has been determined, see `counted`.
    """

    masks: dict[str, Path] = field(default_factory=dict, kw_only=True)
    foreground: bool = field(default=False, kw_only=True)
    count: int | None = field(default=None, kw_only=True)

    def relisted(self, names):
        return replace(self, names=names)

    def mask(self, index: int, sides: tuple | None) -> np.ndarray:
        """The class numbers (h, w) of an image.

        Args:
            sides: Height and width that the mask must have; None: any.

        Raises:
            DataError: The mask has another size, or numbers that are not classes.
        """
        name = self.names[index]
        path, page = self.masks[without_suffix(name)], name[len(file_name(name)) + 1 :]
        numbers = read_mask(path, int(page) if page else None)
        if sides and numbers.shape != tuple(sides):
            raise DataError(
                f"{path}: a mask of {numbers.shape[1]} x {numbers.shape[0]} pixels for an image of "
                f"{sides[1]} x {sides[0]}, {name}"
            )
        if self.foreground:
            return (numbers > 0).astype(np.int64)
        count = self.count or IGNORE_INDEX
        invalid = numbers[(numbers != IGNORE_INDEX) & ((numbers >= count) | (numbers < 0))]
        if invalid.size:
            raise DataError(
                f"{path}: class number {invalid.max()}, where classes are 0 to {count - 1}, and {IGNORE_INDEX} is left "
                "out; labels of single things need --foreground"
            )
        return numbers

    def counted(self) -> int:
        """The number of classes: one more than the largest number in the masks, which are all read and checked."""
        largest = -1
        for index in range(len(self)):
            sides = None
            with suppress(DataError):  # an image that cannot be read is reported when it is used
                sides = self.open(index).sides
            numbers = self.mask(index, sides)
            largest = max(largest, int(numbers[numbers != IGNORE_INDEX].max(initial=-1)))
        if largest < 1:
            raise DataError(
                f"{self.root.parent / 'masks'}: one class alone, but at least two are needed; "
                "labels of single things, and masks of 0 and 255, need --foreground"
            )
        return 2 if self.foreground else largest + 1


def without_suffix(name: str) -> str:
    """An image's name without page number and suffix."""
    return os.path.splitext(file_name(name))[0]


def paired_images(root: Path, pixel_format: PixelFormat, foreground: bool) -> MaskedImages:
    """The images of root/images with the masks of root/masks. DataError for an image without a mask, or the reverse."""
    for part in ("images", "masks"):
        if not (root / part).is_dir():
            raise DataError(
                f"{root}: has no folder {part}/; images/ and masks/ with files of the same names are expected, "
                f"in train/ and val/ or in {root} itself"
            )
    names = find_images(root / "images", pixel_format).paths
    masks = {}
    for path in sorted((root / "masks").rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            masks[str(path.relative_to(root / "masks").with_suffix(""))] = path
    stems = {without_suffix(name) for name in names}
    for lacking, kind, other in (
        (sorted(stems - set(masks)), "images", "masks"),
        (sorted(set(masks) - stems), "masks", "images"),
    ):
        if lacking:
            raise DataError(
                f"{root / kind / lacking[0]}: has no counterpart in {other}/"
                + (f", nor have {len(lacking) - 1} more" if len(lacking) > 1 else "")
            )
    return MaskedImages(root / "images", names, None, [], form=pixel_format, masks=masks, foreground=foreground)


def train_and_val(where: str, pixel_format: PixelFormat, foreground: bool) -> tuple[MaskedImages, MaskedImages, str]:
    """Open the training and held-out images of a folder.

    Without train/, about 5 % of the files are held out. These are whole files, because the pages of one stack are too
    much alike to evaluate on.

    Args:
        where: A folder with images/ and masks/, or with train/ and val/ or test/ that have them.
        pixel_format: The format of the images.
        foreground: See MaskedImages.

    Returns:
        Training images, held-out images, and a line to print.
    """
    root = Path(where)
    splits = find_splits(root)
    if "train" in splits:
        held_root = splits.get("val") or splits.get("test")
        if not held_root:
            raise DataError(f"{root}: has train/ but neither val/ nor test/")
        train, held_out = (paired_images(part, pixel_format, foreground) for part in (splits["train"], held_root))
        return train, held_out, f"{len(train)} images with masks; held out: {len(held_out)} of {held_root.name}/"
    images = paired_images(root, pixel_format, foreground)
    train_names, held_out_names = hold_out(images.names)
    if not train_names:
        raise DataError(
            f"{root}: one image alone cannot be split into training and held-out part; put another one into val/"
        )
    line = (
        f"{len(train_names)} images with masks; held out: {len(held_out_names)} of {len(images)} "
        f"(5 % of the files, no train/ in {root})"
    )
    return images.relisted(train_names), images.relisted(held_out_names), line
