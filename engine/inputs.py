"""The images of a run: found, measured and cached by one process, then opened by all."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from engine.checkpoints import load_tensors, resumed_config
from engine.dist import Distributed
from engine.errors import DataError
from images import open_train_and_val
from images.crops import to_2tuple
from images.formats import PixelFormat
from images.sources import FileImages, download


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what their pixels are, by the names of flags. None: not given."""

    data: str | None
    image_size: int | tuple[int, int]
    max_megapixels: float
    channels: int | None
    pages: str | None
    value_range: str | tuple | None
    resume: str | None
    output: str | None
    checkpoint: str | None = None
    download: bool = False
    in_memory: bool = False
    cache: str | None = None


def load_images(config: DataConfig, distributed: Distributed, labelled: bool = False):
    """Open the training and validation images that --data names. One process downloads, measures and caches.

    Args:
        config: what to open.
        distributed: the processes.
        labelled: require images of every class in both parts.

    Returns:
        Two sources of images; their `form` is the pixel format of the run.
    """
    if config.download:
        distributed.run_on_main(lambda: download(config.data))
    pixel_format, is_measured = resolve_format(config)
    if config.cache and distributed.world_size > 1:

        def fill_cache():
            open_train_and_val(config.data, False, config.image_size, config.cache, False, pixel_format, is_measured)

        distributed.run_on_main(fill_cache)
    train, held_out, lines = open_train_and_val(
        config.data,
        config.in_memory,
        config.image_size,
        config.cache,
        labelled,
        pixel_format,
        is_measured,
        distributed.run_on_main,
    )
    if is_measured and not train.form.is_rgb8:
        source = (config.output or config.resume) if config.resume else config.checkpoint
        channels = train.form.channels
        distributed.print(
            f"pixels: {channels} channel{'s' * (channels > 1)}; value range, mean and standard deviation are those "
            f"of {source}"
        )
    distributed.print_lines(lines)
    side, needed = median_short_side(train), min(to_2tuple(config.image_size))
    if side and side < needed / 2:
        distributed.warn(
            f"the shorter side of the images is {side} pixels, less than half of the input's {needed}: a recipe for "
            "small images may be better (see --recipe)"
        )
    return train, held_out


def resolve_format(config: DataConfig) -> tuple[PixelFormat, bool]:
    """The pixel format that flags and an earlier run determine.

    A resumed run has its own format. A run that starts from a checkpoint has the checkpoint's format, unless flags
    request another one.

    Returns:
        The format, and whether its value range, mean and standard deviation are known. Otherwise they have to be
        measured.
    """
    requested = {name: getattr(config, name) for name in PixelFormat().requested}
    requested = {name: value for name, value in requested.items() if value is not None}
    limit = {"max_megapixels": config.max_megapixels}
    resumed = resumed_config(config.resume, config.output)
    if resumed:  # the earliest runs have no entry for pixels; theirs are 8-bit RGB
        return replace(PixelFormat.of(resumed.get("pixels", {})), **limit), True
    initial = checkpoint_format(config.checkpoint) if config.checkpoint else None
    if initial is None:
        return PixelFormat(**{"value_range": "auto"} | limit | requested), False
    is_same = all(requested.get(name, value) == value for name, value in initial.requested.items())
    if is_same and not initial.is_rgb8:  # nothing was measured of 8-bit RGB images, and the new images may differ
        return replace(initial, **limit), True
    inherited = {name: value for name, value in initial.requested.items() if value != "type"}
    return PixelFormat(**{"value_range": "auto"} | limit | inherited | requested), False


def checkpoint_format(path) -> PixelFormat | None:
    """The pixel format of a checkpoint's run; None for weights from elsewhere and checkpoints of the earliest runs."""
    config = None if os.path.isdir(path) else load_tensors(path).get("config")
    return PixelFormat.of(config["pixels"]) if isinstance(config, dict) and "pixels" in config else None


def median_short_side(images) -> int | None:
    """The median of the shorter side of 20 images in pixels; None for images that are not files."""
    if not isinstance(images, FileImages):
        return None
    sides = []
    for index in np.linspace(0, len(images) - 1, 20).astype(int):
        with suppress(DataError):
            sides.append(min(images.open(index).sides))
    return int(np.median(sides)) if sides else None
