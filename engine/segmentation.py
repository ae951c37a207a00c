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
import torch
import torch.nn.functional as F
from PIL import Image

from engine import chance, data
from engine.decoding import ARRAYS, TIFF, file_of, load_array, readable, tensor
from engine.errors import DataError
from engine.folders import images_below, parts
from engine.formats import PixelFormat
from engine.images import FileImages, both_sides, crop_of

IGNORED = 255
SUFFIXES = (".png", *TIFF, ".npy")


def class_numbers(path: Path, page: int | None = None) -> np.ndarray:
    """(h, w) whole numbers of a mask. DataError, with its path, for what is none."""
    try:
        with readable(path):
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
        path, page = self.masks[stem(name)], name[len(file_of(name)) + 1 :]
        numbers = class_numbers(path, int(page) if page else None)
        if sides and numbers.shape != tuple(sides):
            raise DataError(
                f"{path}: a mask of {numbers.shape[1]} x {numbers.shape[0]} pixels for an image of {sides[1]} x {sides[0]}, {name}"
            )
        if self.foreground:
            return (numbers > 0).astype(np.int64)
        beyond = numbers[(numbers != IGNORED) & ((numbers >= (self.count or IGNORED)) | (numbers < 0))]
        if beyond.size:
            raise DataError(
                f"{path}: class number {beyond.max()}, where classes are 0 to {(self.count or IGNORED) - 1}, and {IGNORED} is left out; "
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
            largest = max(largest, int(numbers[numbers != IGNORED].max(initial=-1)))
        if largest < 1:
            raise DataError(
                f"{self.root.parent / 'masks'}: one class alone, nothing to tell apart; labels of single things, and masks of 0 and 255, need --foreground"
            )
        return 2 if self.foreground else largest + 1


def stem(name: str) -> str:
    return os.path.splitext(file_of(name))[0]


def pairs(root: Path, form: PixelFormat, foreground: bool) -> MaskedImages:
    """The images of root/images with the masks of root/masks. DataError for an image without a mask, or the reverse."""
    for part in ("images", "masks"):
        if not (root / part).is_dir():
            raise DataError(
                f"{root}: has no folder {part}/; images/ and masks/ with files of the same names are expected, in train/ and val/ or in {root} itself"
            )
    names = images_below(root / "images", form).paths
    masks = {}
    for path in sorted(
        path
        for path in (root / "masks").rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ):
        masks[str(path.relative_to(root / "masks").with_suffix(""))] = path
    stems = {stem(name) for name in names}
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


def load(where: str, form: PixelFormat, foreground: bool) -> tuple[MaskedImages, MaskedImages, str]:
    """Training and held-out images, and a line that says which are which. Without val/ or test/ every twentieth file, at least one, is held out: whole
    files, for parts of one image, or pages of one stack, are too alike to test on."""
    root = Path(where)
    named = parts(root)
    if "train" in named:
        held_root = named.get("val") or named.get("test")
        if not held_root:
            raise DataError(f"{root}: has train/ but neither val/ nor test/")
        train, held = pairs(named["train"], form, foreground), pairs(held_root, form, foreground)
        return train, held, f"{len(train)} images with masks; held out: {len(held)} of {held_root.name}/"
    whole = pairs(root, form, foreground)
    files = list(dict.fromkeys(map(file_of, whole.names)))
    if len(files) < 2:
        raise DataError(
            f"{root}: one image alone cannot be split into training and held-out part; put another one into val/"
        )
    order = np.argsort(chance.hashed("held out", np.arange(len(files))), kind="stable")
    chosen = {files[k] for k in order[: max(1, round(0.05 * len(files)))]}
    train, held = (
        whole.relisted([name for name in whole.names if (file_of(name) in chosen) == out]) for out in (False, True)
    )
    return (
        train,
        held,
        f"{len(train)} images with masks; held out: {len(held)} of {len(whole)} (5 % of the files, no train/ in {root})",
    )


class MaskCrops(data.Crops):
    """Random crops of images with their masks: as large as the input, from an image scaled by `scale`, flipped half of the time.

    A function of (seed, epoch, index). An unreadable image is replaced by the next readable one; a mask that does not do is an error.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = np.array(keys).T
        draws = chance.uniform(4, self.seed, "mask crop", epochs, indices)
        batch = {"keys": np.array(keys), "flip": torch.from_numpy(draws[:, 3] < 0.5), "bad": []}
        items = [self.pair(int(index), draw, batch["bad"]) for index, draw in zip(indices, draws)]
        batch["images"], batch["masks"] = (torch.stack(part) for part in zip(*items))
        return batch

    def pair(self, index: int, draws, bad: list) -> tuple[torch.Tensor, torch.Tensor]:
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                pixels = tensor(self.images.decode(place))
                break
            except DataError as error:
                bad.append((place, str(error)))
        else:
            raise DataError(
                f"none of the {len(self.images)} images can be read; {self.images.name(index)}: {bad[-1][1]}"
            )
        box = crop_box(pixels.shape[1:], both_sides(self.size), self.scale, draws)
        numbers = torch.from_numpy(self.images.mask(place, tuple(pixels.shape[1:])))
        return crop_of(pixels, box, self.size), crop_of_mask(numbers, box, self.size)


def crop_box(sides: tuple, size: tuple, scale: tuple, draws) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop that becomes `size` when the image is scaled by a factor from `scale`, log-uniform; it lies inside the image."""
    times = np.exp(np.log(scale[0]) + (np.log(scale[1]) - np.log(scale[0])) * draws[0])
    times = max(times, *(needed / side for needed, side in zip(size, sides)))
    h, w = (min(side, max(1, round(needed / times))) for needed, side in zip(size, sides))
    return int(draws[1] * (sides[0] - h + 1)), int(draws[2] * (sides[1] - w + 1)), h, w


def crop_of_mask(numbers: torch.Tensor, box: tuple, size) -> torch.Tensor:
    """The box of a mask (h, w), each pixel of the result, of `size`, that of the nearest one."""
    top, left, h, w = box
    part = numbers[None, None, top : top + h, left : left + w].float()
    return F.interpolate(part, both_sides(size), mode="nearest-exact")[0, 0].long()


def confusion_of(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """(classes, classes) counts of pixels, rows true, columns predicted; 255 left out."""
    asked = truth != IGNORED
    return torch.bincount(truth[asked] * classes + predicted[asked], minlength=classes**2).view(classes, classes)


@torch.no_grad()
def sliding(launch, model, image: torch.Tensor, size) -> torch.Tensor:
    """Class probabilities (classes, h, w) of an image (c, h, w), normalised and of any size, by windows of `size` that overlap by a third.

    model: (b, c, *size) to logits (b, classes, *size). A smaller image is continued by its border.
    """
    (height, width), (_, h, w) = both_sides(size), image.shape
    padded = F.pad(image[None], (0, max(0, width - w), 0, max(0, height - h)), mode="replicate")[0]
    starts = [
        sorted({*range(0, side - window, max(1, window * 2 // 3)), side - window})
        for side, window in zip(padded.shape[1:], (height, width))
    ]
    places, total, times = (
        [(top, left) for top in starts[0] for left in starts[1]],
        0,
        padded.new_zeros(padded.shape[1:]),
    )
    for block in range(0, len(places), 16):
        with launch.autocast():
            logits = model(
                torch.stack(
                    [padded[:, top : top + height, left : left + width] for top, left in places[block : block + 16]]
                )
            )
        if block == 0:
            total = padded.new_zeros(logits.shape[1], *padded.shape[1:])
        for (top, left), share in zip(places[block : block + 16], logits.float().softmax(1)):
            total[:, top : top + height, left : left + width] += share
            times[top : top + height, left : left + width] += 1
    return (total / times)[:, :h, :w]


def measures(confusion: torch.Tensor) -> dict:
    """mean IoU in % over classes that occur in truth or prediction, IoU of each (nan where it does not), pixel accuracy in %."""
    right, confusion = confusion.diag().double(), confusion.double()
    union = confusion.sum(0) + confusion.sum(1) - right
    each = torch.where(union > 0, 100 * right / union, torch.nan)
    return {
        "miou": each.nanmean().item(),
        "iou": each.tolist(),
        "pixel_accuracy": (100 * right.sum() / confusion.sum()).item(),
    }
