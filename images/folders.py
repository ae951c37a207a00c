"""Finds the images, the training and held-out parts and the classes of a folder, and warns of what is skipped."""

import os
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from engine.errors import DataError, warn
from engine.files import run_config
from engine.rng import hash64
from images.decode import ARRAYS, EXTENSIONS, expand_pages, file_name
from images.formats import PixelFormat
from images.sources import FileImages, images_from_names

TRAIN, VAL, TEST = (
    ("train", "training", "train_set"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing", "test_set"),
)
LEFT_BEHIND = {
    "__macosx",
    "@eadir",
    "@recycle",
    "@tmp",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}  # by operating systems and network storage
NOT_READ = (
    ".heic",
    ".heif",
    ".jxl",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".dng",
    ".raw",
    ".psd",
    ".svg",
    ".exr",
    ".hdr",
    ".tga",
    ".dcm",
    *({".jfif", ".jpe", ".avif", ".jp2"} - set(EXTENSIONS)),
)


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or was left behind by an operating system."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


class ImageTree:
    """Everything below a folder that is named like an image.

    Attributes:
        paths: Sorted paths below `root`. Arrays (.npy, .npz) count only if there are no other images.
        warnings: Lines about what was skipped and may be missed.
    """

    def __init__(self, root: Path):
        self.root, self.paths, self.arrays, self.warnings, self.links = root, [], [], [], []
        self.seen, self.not_read = {}, Counter()
        self.visit(str(root), "")
        for folder, prefix in self.links:  # links come last, so that a folder is listed under its own name
            self.visit(folder, prefix)
        if self.paths:
            self.not_read.update(os.path.splitext(path)[1].lower() for path in self.arrays)
        else:
            self.paths = self.arrays
        if self.links:
            self.paths.sort(key=lambda path: path.split("/"))
        if self.not_read:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.not_read.items()))
            self.warnings.append(f"{root}: image files of kinds that are not read: {kinds}")

    def visit(self, folder: str, prefix: str):
        status = os.stat(folder)
        first = self.seen.setdefault((status.st_dev, status.st_ino), prefix)
        if first != prefix:
            target = first[:-1] or "the folder that it is in"
            self.warnings.append(f"{self.root / prefix[:-1]}: a link to {target}, which is included already; skipped")
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                self.enter(entry, prefix)

    def enter(self, entry: os.DirEntry, prefix: str):
        name = entry.name.lower()
        if is_ignored(entry.name):
            return
        if name.endswith(EXTENSIONS):
            self.paths.append(prefix + entry.name)  # a folder with such a name too, which is reported as a bad file
        elif name.endswith(ARRAYS):
            self.arrays.append(prefix + entry.name)
        elif name.endswith(NOT_READ):
            self.not_read[os.path.splitext(name)[1]] += 1
        elif entry.is_dir():
            if run_config(Path(entry.path)):
                self.warnings.append(f"{entry.path}: the folder of a run, not data; skipped")
            elif entry.is_symlink():
                self.links.append((entry.path, prefix + entry.name + "/"))
            else:
                self.visit(entry.path, prefix + entry.name + "/")


def find_images(root: Path, pixel_format: PixelFormat) -> ImageTree:
    """The images below a folder, and the pages of stacks if pages are images. DataError if there are none."""
    tree = ImageTree(root)
    if not tree.paths:
        raise DataError(f"{root}: no images found (looked for {' '.join(EXTENSIONS + ARRAYS)})")
    tree.paths = expand_pages(root, tree.paths, pixel_format)
    return tree


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of a data set's parts by "train", "val" and "test". Names are compared without case.

    DataError if `root` is not a folder.
    """
    if root.is_file():
        raise DataError(f"{root}: is a file; give the folder that it is in")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes a folder of images, cifar10 or cifar100")
    folders = {name.lower(): root / name for name in sorted(os.listdir(root)) if (root / name).is_dir()}
    splits = {}
    for split, names in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        found = [folders[name] for name in names if name in folders]
        if found:
            splits[split] = found[0]
    return splits


def split_name_warnings(root: Path) -> list[str]:
    """Warnings if a folder without train/ seems to hold misspelled parts, or a data set one folder deeper."""
    folders = sorted(name for name in os.listdir(root) if (root / name).is_dir() and not is_ignored(name))
    if len(folders) == 1 and "train" in find_splits(root / folders[0]):
        return [
            f"{root}: holds {folders[0]}/ alone, with train/ in it, read as one class; "
            f"if it is the data set, give --data {root / folders[0]}"
        ]
    known = (*TRAIN, *VAL, *TEST)
    similar = [name for name in folders if get_close_matches(name.lower(), known, cutoff=0.8)]
    # Classes may be called rain and grain: warn only if all folders are similar, or one is called exactly like a part.
    if not similar or len(similar) < len(folders) and not any(name.lower() in known for name in folders):
        return []
    return [
        f"{root}: {', '.join(f'{name}/' for name in similar)} read as {'classes' if len(similar) > 1 else 'a class'}, "
        "because there is no train/; "
        "if they are parts of a data set, call the training part train/"
    ]


def hold_out(names: list[str], group=file_name) -> tuple[list[str], list[str]]:
    """Hold out about 5 % of a list of names, chosen by a hash of their position in the list.

    Args:
        names: Sorted names of images.
        group: A function of a name. Images of one group stay together; by default a group is a file with all its pages.

    Returns:
        The names for training, and at least one group of held-out names.
    """
    groups = list(dict.fromkeys(map(group, names)))
    order = np.argsort(hash64("held out", np.arange(len(groups))), kind="stable")
    held_out = {groups[k] for k in order[: max(1, round(0.05 * len(groups)))]}
    return [name for name in names if group(name) not in held_out], [name for name in names if group(name) in held_out]


def train_and_val(
    root: Path, labelled: bool = False, pixel_format: PixelFormat = PixelFormat()
) -> tuple[FileImages, FileImages, list[str]]:
    """Open the training and held-out images of a folder.

    Takes train/ with val/ or test/ (with a folder per class), train/ alone, class folders alone, or any tree of images.
    Without a held-out part, `hold_out` chooses 5 % of the files, or of the pages if there are fewer than 20 files.

    Args:
        root: The folder.
        labelled: Require images of every class in both parts. Otherwise the held-out part needs no class folders.
        pixel_format: The format of the images.

    Returns:
        Training images, held-out images, and lines to print. Lines that begin with "warning: " name what was skipped.

    Raises:
        DataError: The folder cannot be used.
    """
    splits = find_splits(root)
    train_root = splits.get("train", root)
    held_root = (splits.get("val") or splits.get("test")) if "train" in splits else None
    tree = find_images(train_root, pixel_format)
    train, warnings = images_from_names(train_root, tree.paths), tree.warnings
    if held_root:
        tree = find_images(held_root, pixel_format)
        warnings = warnings + tree.warnings
        if train.labels is not None and not labelled and not all("/" in name for name in tree.paths):
            warnings.append(
                f"{held_root}: images outside class folders, held out as they are; "
                "to fine-tune, move each into the folder of its class"
            )
        held_out = val_part(held_root, tree.paths, train, labelled)
        line = f"held out: {len(held_out)} images of {held_root.name}/"
    else:
        warnings = (split_name_warnings(root) if train_root == root else []) + warnings
        if len(tree.paths) < 2:
            raise DataError(f"{train_root}: one image alone cannot be split into training and held-out part")
        count, group = len(set(map(file_name, tree.paths))), file_name
        if count < len(tree.paths) and count < 20:
            warnings.append(
                f"{train_root}: held-out images are pages of stacks of which others are trained on, so their error "
                "says little about other stacks; keep some stacks in val/"
            )
            group = str  # single pages are held out
        train, held_out = (train.relisted(names) for names in hold_out(tree.paths, group))
        lacking = "no train/ with val/ or test/" if splits and "train" not in splits else "no val/ or test/"
        line = f"held out: {len(held_out)} of {len(tree.paths)} images (5 %, {lacking} in {root})"
    if labelled:
        check_classes(train, held_out)
    if train_root != root:
        others = {name for name in os.listdir(root) if (root / name).is_dir() and not is_ignored(name)}
        unused = sorted(name for name in others if root / name not in (train_root, held_root))
        if unused:
            line += f"; not used: {', '.join(f'{name}/' for name in unused[:5])}"
    train.form = held_out.form = pixel_format
    return train, held_out, [f"{describe(train)}; {line}", *(f"warning: {warning}" for warning in warnings)]


def all_images(where: str, pixel_format: PixelFormat = PixelFormat()) -> FileImages:
    """Every image below a folder, without labels. DataError if there are none."""
    root = Path(where)
    find_splits(root)  # raises the error for something that is not a folder
    tree = find_images(root, pixel_format)
    for warning in tree.warnings:
        warn(warning)
    return FileImages(root, tree.paths, None, [], form=pixel_format)


def labelled_part(root: Path, split: str | None, pixel_format: PixelFormat) -> FileImages:
    """All images of one part of a data set.

    Args:
        root: The folder of the data set.
        split: "train", "val" or "test"; None: val, else test, else all images of a folder without such parts.
        pixel_format: The format of the images.

    Raises:
        DataError: The part does not exist, or has no class folders.
    """
    splits = find_splits(root)
    if split and split not in splits:
        names = ", ".join(f"{folder.name}/" for folder in splits.values())
        raise DataError(f"{root}: has no part for --split {split}" + (f"; it has {names}" if names else ""))
    folder = splits[split] if split else splits.get("val") or splits.get("test") or root
    images = images_from_names(folder, find_images(folder, pixel_format).paths)
    images.form = pixel_format
    if images.labels is None:
        raise DataError(f"{folder}: images outside class folders; a folder per class is needed")
    return images


def describe(images) -> str:
    """The number of images and classes, in words."""
    if not images.classes:
        return f"{len(images)} images without classes"
    return f"{len(images)} images of {len(images.classes)} classes ({images.classes[0]} to {images.classes[-1]})"


def val_part(root: Path, names: list[str], train: FileImages, labelled: bool) -> FileImages:
    """The held-out images, with labels if all of them are in folders of the training part's classes.

    With `labelled`, images_from_names raises an error for other folders instead.
    """
    if not labelled and not {name.rpartition("/")[0].split("/")[0] for name in names} <= set(train.classes):
        return FileImages(root, names, None, [])
    return images_from_names(root, names, train.classes or None)


def check_classes(train: FileImages, held_out: FileImages):
    """DataError unless there are at least two classes and each has images in both parts."""
    for part in (train, held_out):
        if part.labels is None:
            raise DataError(
                f"{part.root}: images outside class folders; a folder per class is needed"
                + (
                    " (ImageNet's validation images come so: move each into the folder of its class)"
                    if part is held_out
                    else ""
                )
            )
    if len(train.classes) < 2:
        raise DataError(
            f"{train.root}: one class alone ({train.classes[0]}), but at least two are needed; "
            "--data takes the folder that holds the class folders"
        )
    filled = {part.root: {name.split("/")[0] for name in part.names} for part in (held_out, train)}
    if train.root == held_out.root:
        filled[train.root] |= {name.split("/")[0] for name in held_out.names}
    empty = [
        name
        for root, full in filled.items()
        for name in sorted(os.listdir(root))
        if (root / name).is_dir() and name not in full and not is_ignored(name) and not run_config(root / name)
    ]
    if empty:
        raise DataError(f"{train.root}: class folders without images: {', '.join(list(dict.fromkeys(empty))[:5])}")
    missing = [name for k, name in enumerate(train.classes) if not (held_out.labels == k).any()]
    if missing and train.root != held_out.root:
        raise DataError(
            f"{held_out.root}: no images of {len(missing)} of {len(train.classes)} classes: {', '.join(missing[:5])}"
        )
