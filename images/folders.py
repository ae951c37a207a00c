"""Folders of images as people have them: which part is for training, which is held out, what is passed over and named."""

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
    """Whether a file or folder is none of a person's data: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


class ImageTree:
    """paths: sorted, below `root`, of everything named like an image; arrays (.npy, .npz) are images where there are no others.
    warnings: what was passed over that somebody may miss."""

    def __init__(self, root: Path):
        self.root, self.paths, self.arrays, self.warnings, self.links = root, [], [], [], []
        self.seen, self.not_read = {}, Counter()
        self.visit(str(root), "")
        for place, prefix in self.links:  # after what is really there, so that a folder is known by its own name
            self.visit(place, prefix)
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
        place = os.stat(folder)
        known = self.seen.setdefault((place.st_dev, place.st_ino), prefix)
        if known != prefix:
            self.warnings.append(
                f"{self.root / prefix[:-1]}: a link to {known[:-1] or 'the folder that it is in'}, which is in already; passed over"
            )
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                self.enter(entry, prefix)

    def enter(self, entry: os.DirEntry, prefix: str):
        name = entry.name.lower()
        if is_ignored(entry.name):
            return
        if name.endswith(EXTENSIONS):
            self.paths.append(prefix + entry.name)  # a folder named like an image too: it will be reported as bad
        elif name.endswith(ARRAYS):
            self.arrays.append(prefix + entry.name)
        elif name.endswith(NOT_READ):
            self.not_read[os.path.splitext(name)[1]] += 1
        elif entry.is_dir():
            if run_config(Path(entry.path)):
                self.warnings.append(f"{entry.path}: the folder of a run, not data; passed over")
            elif entry.is_symlink():
                self.links.append((entry.path, prefix + entry.name + "/"))
            else:
                self.visit(entry.path, prefix + entry.name + "/")


def find_images(root: Path, form: PixelFormat) -> ImageTree:
    """DataError if there are none."""
    tree = ImageTree(root)
    if not tree.paths:
        raise DataError(f"{root}: no images found (looked for {' '.join(EXTENSIONS + ARRAYS)})")
    tree.paths = expand_pages(root, tree.paths, form)
    return tree


def find_splits(root: Path) -> dict[str, Path]:
    """Folders that are a part of a data set, by "train", "val" and "test"; names in any case."""
    if root.is_file():
        raise DataError(f"{root}: is a file; give the folder that it is in")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes a folder of images, cifar10 or cifar100")
    there = {name.lower(): root / name for name in sorted(os.listdir(root)) if (root / name).is_dir()}
    named = {
        part: next((there[name] for name in names if name in there), None)
        for part, names in (("train", TRAIN), ("val", VAL), ("test", TEST))
    }
    return {part: folder for part, folder in named.items() if folder}


def split_name_warnings(root: Path) -> list[str]:
    """Warnings about a folder without a training part whose parts may be called otherwise, or lie one folder deeper."""
    there = sorted(name for name in os.listdir(root) if (root / name).is_dir() and not is_ignored(name))
    if len(there) == 1 and "train" in find_splits(root / there[0]):
        return [
            f"{root}: holds {there[0]}/ alone, with train/ in it, read as one class; if it is the data set, give --data {root / there[0]}"
        ]
    known = [name for names in (TRAIN, VAL, TEST) for name in names]
    likes = [name for name in there if get_close_matches(name.lower(), known, cutoff=0.8)]
    if (
        not likes or len(likes) < len(there) and not any(name.lower() in known for name in there)
    ):  # classes may be called rain and grain
        return []
    return [
        f"{root}: {', '.join(f'{name}/' for name in likes)} read as {'classes' if len(likes) > 1 else 'a class'}, because there is no train/; "
        "if they are parts of a data set, call the training part train/"
    ]


def train_and_val(
    root: Path, labelled: bool = False, form: PixelFormat = PixelFormat()
) -> tuple[FileImages, FileImages, list[str]]:
    """Training part, held-out part and lines that say which is which; those that begin with "warning: " tell what was passed over.

    Takes train/ with val/ or test/ (ImageFolder form), train/ alone, class folders alone, or any tree of images;
    without a held-out part, 5 % of the files, chosen by a hash of their place in the sorted list, are held out; of fewer than 20 stacks
    single pages, though pages of a stack are alike.
    labelled: both parts must have images of every class. Otherwise the held-out part needs no class folders.
    """
    named = find_splits(root)
    train_root = named.get("train", root)
    held_root = (named.get("val") or named.get("test")) if "train" in named else None
    tree = find_images(train_root, form)
    whole, warnings = images_from_names(train_root, tree.paths), tree.warnings
    if held_root:
        tree = find_images(held_root, form)
        train, held = whole, val_part(held_root, tree.paths, whole, labelled)
        warnings = warnings + tree.warnings
        if whole.labels is not None and not labelled and not all("/" in name for name in tree.paths):
            warnings.append(
                f"{held_root}: images outside class folders, held out as they are; to fine-tune, move each into the folder of its class"
            )
        line = f"held out: {len(held)} images of {held_root.name}/"
    else:
        warnings = (split_name_warnings(root) if train_root == root else []) + warnings
        if len(tree.paths) < 2:
            raise DataError(f"{train_root}: one image alone cannot be split into training and held-out part")
        files = list(dict.fromkeys(map(file_name, tree.paths)))
        if len(files) < len(tree.paths) and len(files) < 20:
            warnings.append(
                f"{train_root}: held-out images are pages of stacks of which others are trained on, so their error says little of other "
                "stacks; keep some apart in val/"
            )
            files = tree.paths
        order = np.argsort(hash64("held out", np.arange(len(files))), kind="stable")
        chosen = {files[k] for k in order[: max(1, round(0.05 * len(files)))]}
        train, held = (
            images_from_names(
                train_root,
                [name for name in tree.paths if (name in chosen or file_name(name) in chosen) == out],
                whole.classes or None,
            )
            for out in (False, True)
        )
        line = f"held out: {len(held)} of {len(tree.paths)} images (5 %, {'no train/ with val/ or test/' if named and 'train' not in named else 'no val/ or test/'} in {root})"
    if labelled:
        check_classes(train, held)
    used = {train_root, held_root}
    unused = (
        []
        if train_root == root
        else sorted(
            name
            for name in os.listdir(root)
            if not is_ignored(name) and root / name not in used and (root / name).is_dir()
        )
    )
    line += f"; not used: {', '.join(f'{name}/' for name in unused[:5])}" if unused else ""
    train.form = held.form = form
    return train, held, [f"{describe(train)}; {line}", *(f"warning: {warning}" for warning in warnings)]


def all_images(where: str, form: PixelFormat = PixelFormat()) -> FileImages:
    """Every image below a folder, whatever it is called and without labels. DataError if there are none."""
    root = Path(where)
    find_splits(root)  # for its error
    tree = find_images(root, form)
    for warning in tree.warnings:
        warn(warning)
    return FileImages(root, tree.paths, None, [], form=form)


def labelled_part(root: Path, split: str | None, form: PixelFormat = PixelFormat()) -> FileImages:
    """All images of a part ("train", "val", "test"; default val, else test), or of a folder that has none. DataError without class folders."""
    named = find_splits(root)
    if split and split not in named:
        raise DataError(
            f"{root}: has no part for --split {split}"
            + (f"; it has {', '.join(f'{folder.name}/' for folder in named.values())}" if named else "")
        )
    place = named.get(split or "val") or (named.get("test") if not split else None) or root
    images = images_from_names(place, find_images(place, form).paths)
    images.form = form
    if images.labels is None:
        raise DataError(f"{place}: images outside class folders; a folder per class is needed")
    return images


def describe(images) -> str:
    """How many images and classes, and which."""
    if not images.classes:
        return f"{len(images)} images without classes"
    return f"{len(images)} images of {len(images.classes)} classes ({images.classes[0]} to {images.classes[-1]})"


def val_part(root: Path, names: list[str], train: FileImages, labelled: bool) -> FileImages:
    """The held-out images; with the labels of the training part's classes where they are in its class folders."""
    inside = all("/" in name for name in names)
    if not labelled and not (inside and {name.split("/")[0] for name in names} <= set(train.classes)):
        return FileImages(root, names, None, [])
    return images_from_names(root, names, train.classes or None)


def check_classes(train: FileImages, held_out: FileImages):
    """DataError unless there are two classes and each has images in both parts, so that an accuracy means what it says."""
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
            f"{train.root}: one class alone ({train.classes[0]}), nothing to tell apart; --data takes the folder that holds the class folders"
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
