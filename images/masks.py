"""Images that have a mask of class numbers each: pairs by name, random crops of both together, whole ones for a test.

    images/a.jpg  images/stack.tif    masks/a.png  masks/stack.tif    a page of a stack has the mask's page of its number

Masks are PNG, TIFF or .npy files of whole numbers; 255 is left out of loss and measures. Axis letters: b images, c channels, h w pixels.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from engine import rng
from engine.errors import DataError
from images.decode import ARRAYS, TIFF, decoding_errors, file_name, load_array
from images.folders import find_images, find_splits
from images.formats import PixelFormat
from images.sources import FileImages

IGNORE_INDEX = 255
SUFFIXES = (".png", *TIFF, ".npy")


def read_mask(path: Path, page: int | None = None) -> np.ndarray:
    """(h, w) whole numbers of a mask. DataError, with its path, for what is none."""
    try:
        with decoding_errors(path):
            if path.suffix.lower() in ARRAYS:
                values = load_array(path)
            elif path.suffix.lower() in TIFF:
                values = tifffile.imread(path)
            else:
                values = np.asarray(Image.open(path))  # of a palette image its numbers, not its colours
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
    """FileImages with masks. masks: a mask's path for each file's name without its suffix. foreground: labels are of things, and all are class 1.

    count: classes; None until `counted`."""

    masks: dict[str, Path] = field(default_factory=dict, kw_only=True)
    foreground: bool = field(default=False, kw_only=True)
    count: int | None = field(default=None, kw_only=True)

    def relisted(self, names):
        return replace(self, names=names)

    def mask(self, index: int, sides: tuple | None) -> np.ndarray:
        """(h, w) class numbers for an image of these sides. DataError for one that does not fit it or has numbers that are no class."""
        name = self.names[index]
        path, page = self.masks[without_suffix(name)], name[len(file_name(name)) + 1 :]
        numbers = read_mask(path, int(page) if page else None)
        if sides and numbers.shape != tuple(sides):
            raise DataError(
                f"{path}: a mask of {numbers.shape[1]} x {numbers.shape[0]} pixels for an image of {sides[1]} x {sides[0]}, {name}"
            )
        if self.foreground:
            return (numbers > 0).astype(np.int64)
        beyond = numbers[(numbers != IGNORE_INDEX) & ((numbers >= (self.count or IGNORE_INDEX)) | (numbers < 0))]
        if beyond.size:
            raise DataError(
                f"{path}: class number {beyond.max()}, where classes are 0 to {(self.count or IGNORE_INDEX) - 1}, and {IGNORE_INDEX} is left out; "
                "labels of single things need --foreground"
            )
        return numbers

    def counted(self) -> int:
        """One more than the largest class number of all masks, each of which is read and checked."""
        largest = -1
        for index in range(len(self)):
            sides = None
            with suppress(DataError):  # of an image that cannot be read, which is told when it is asked for
                sides = self.open(index).sides
            numbers = self.mask(index, sides)
            largest = max(largest, int(numbers[numbers != IGNORE_INDEX].max(initial=-1)))
        if largest < 1:
            raise DataError(
                f"{self.root.parent / 'masks'}: one class alone, nothing to tell apart; labels of single things, and masks of 0 and 255, need --foreground"
            )
        return 2 if self.foreground else largest + 1


def without_suffix(name: str) -> str:
    return os.path.splitext(file_name(name))[0]


def paired_images(root: Path, form: PixelFormat, foreground: bool) -> MaskedImages:
    """The images of root/images with the masks of root/masks. DataError for an image without a mask, or the reverse."""
    for part in ("images", "masks"):
        if not (root / part).is_dir():
            raise DataError(
                f"{root}: has no folder {part}/; images/ and masks/ with files of the same names are expected, in train/ and val/ or in {root} itself"
            )
    names = find_images(root / "images", form).paths
    masks = {}
    for path in sorted(
        path
        for path in (root / "masks").rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ):
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
    return MaskedImages(root / "images", names, None, [], form=form, masks=masks, foreground=foreground)


def train_and_val(where: str, form: PixelFormat, foreground: bool) -> tuple[MaskedImages, MaskedImages, str]:
    """Training and held-out images, and a line that says which are which. Without val/ or test/ every twentieth file, at least one, is held out: whole
    files, for parts of one image, or pages of one stack, are too alike to test on."""
    root = Path(where)
    named = find_splits(root)
    if "train" in named:
        held_root = named.get("val") or named.get("test")
        if not held_root:
            raise DataError(f"{root}: has train/ but neither val/ nor test/")
        train, held = paired_images(named["train"], form, foreground), paired_images(held_root, form, foreground)
        return train, held, f"{len(train)} images with masks; held out: {len(held)} of {held_root.name}/"
    whole = paired_images(root, form, foreground)
    files = list(dict.fromkeys(map(file_name, whole.names)))
    if len(files) < 2:
        raise DataError(
            f"{root}: one image alone cannot be split into training and held-out part; put another one into val/"
        )
    order = np.argsort(rng.hash64("held out", np.arange(len(files))), kind="stable")
    chosen = {files[k] for k in order[: max(1, round(0.05 * len(files)))]}
    train, held = (
        whole.relisted([name for name in whole.names if (file_name(name) in chosen) == out]) for out in (False, True)
    )
    return (
        train,
        held,
        f"{len(train)} images with masks; held out: {len(held)} of {len(whole)} (5 % of the files, no train/ in {root})",
    )
