"""Randomness as a function, not a history: every draw of a run is computed from (seed, purpose, epoch, index or step).

So batches, crops and masks do not depend on workers, processes or accumulation, nor on where a run was interrupted.
"""
import zlib

import numpy as np
import torch


def hashed(*keys) -> np.ndarray:
    """64 well-mixed bits for any keys: SplitMix64 (Steele et al. 2014) chained over ints, int arrays and names."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key = zlib.crc32(key.encode()) if isinstance(key, str) else key
            state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(draws: int, *keys) -> np.ndarray:
    """`draws` numbers in [0, 1) for each element of the keys: (..., draws) float64."""
    keys = [np.asarray(key)[..., None] if not isinstance(key, str) else key for key in keys]
    return (hashed(*keys, np.arange(draws)) >> np.uint64(11)) * 2.0 ** -53


def generator(*keys) -> torch.Generator:
    """A CPU generator that is a function of its keys."""
    return torch.Generator().manual_seed(int(hashed(*keys) >> np.uint64(1)))


def crop_boxes(sizes: np.ndarray, draws: np.ndarray, scale: tuple, ratio: tuple) -> np.ndarray:
    """Boxes (b, 4) = top, left, height, width of torchvision's RandomResizedCrop, as a function of `draws`.

    sizes: (b, 2) heights and widths; draws: (b, 22) in [0, 1), ten tries of area and aspect ratio, then the place.
    Where no try fits, the largest central box of an allowed ratio.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :10])
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[:, 10:20])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    pick = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, pick, 1), np.take_along_axis(h, pick, 1)
    none = ~fits.any(1, keepdims=True)
    w = np.where(none, np.minimum(width, np.rint(height * ratio[1])), w)
    h = np.where(none, np.minimum(height, np.rint(width / ratio[0])), h)
    top = np.where(none, (height - h) // 2, np.floor(draws[:, 20:21] * (height - h + 1)))
    left = np.where(none, (width - w) // 2, np.floor(draws[:, 21:] * (width - w + 1)))
    return np.concatenate([top, left, h, w], axis=1).astype(np.int64)
