"""Boxes of random and central crops, crops resized to the input, and normalisation.

Axis letters: b images, c channels, h w pixels.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

from images.decode import to_chw
from images.formats import MEAN, STD, resize


def to_2tuple(size) -> tuple[int, int]:
    """Height and width of an image size: both, or one number for a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def random_crop_boxes(sizes: np.ndarray, draws: np.ndarray, scale: tuple, ratio: tuple) -> np.ndarray:
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


def format_size(size) -> str:
    """An image size, or a map's, as flags take it: 224, or 224x160."""
    height, width = to_2tuple(size)
    return str(height) if height == width else f"{height}x{width}"


def crop_ratio(ratio: tuple, size) -> tuple:
    """Width over height of a crop that becomes oblong: a square's range, times the input's own."""
    height, width = to_2tuple(size)
    return ratio if height == width else tuple(bound * width / height for bound in ratio)


def resized_crop(pixels: torch.Tensor, box, size) -> torch.Tensor:
    """The box (top, left, height, width) of an image (c, h, w) resized to (c, *size), bicubic with antialiasing."""
    top, left, h, w = (round(value) for value in box)
    out = functional.resized_crop(
        pixels,
        top,
        left,
        max(1, h),
        max(1, w),
        list(to_2tuple(size)),
        functional.InterpolationMode.BICUBIC,
        antialias=True,
    )
    return out.clamp_(0, 255) if out.is_floating_point() else out  # bicubic weights overshoot


def center_crop_size(sides: tuple, size, share: float) -> tuple[float, float]:
    """Height and width of the largest part of an image that is formed like `size`, times `share`; of small images the whole of it."""
    (height, width), (h, w) = sides, to_2tuple(size)
    share = share if height > h and width > w else 1
    if width * h <= height * w:
        return width * share * (h / w), width * share
    return height * share, height * share * (w / h)


def center_crop(pixels: np.ndarray, size, share: float) -> torch.Tensor:
    """The `inner` part of an image (h, w, c) in its middle, resized (bicubic) to (c, *size)."""
    (height, width), (down, across) = pixels.shape[:2], center_crop_size(pixels.shape[:2], size, share)
    left, top = (width - across) / 2, (height - down) / 2
    return to_chw(resize(pixels, to_2tuple(size), (left, top, left + across, top + down)))


def random_scaled_box(sides: tuple, size: tuple, scale: tuple, draws) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop that becomes `size` when the image is scaled by a factor from `scale`, log-uniform; it lies inside the image."""
    times = np.exp(np.log(scale[0]) + (np.log(scale[1]) - np.log(scale[0])) * draws[0])
    times = max(times, *(needed / side for needed, side in zip(size, sides)))
    h, w = (min(side, max(1, round(needed / times))) for needed, side in zip(size, sides))
    return int(draws[1] * (sides[0] - h + 1)), int(draws[2] * (sides[1] - w + 1)), h, w


def resized_mask_crop(numbers: torch.Tensor, box: tuple, size) -> torch.Tensor:
    """The box of a mask (h, w), each pixel of the result, of `size`, that of the nearest one."""
    top, left, h, w = box
    part = numbers[None, None, top : top + h, left : left + w].float()
    return F.interpolate(part, to_2tuple(size), mode="nearest-exact")[0, 0].long()


def batched_resized_crop(images: torch.Tensor, boxes: torch.Tensor, size) -> torch.Tensor:
    """Each image's box (top, left, height, width) resized to `size`, bicubic without antialiasing: for small
    images, which are enlarged rather than shrunk. images: (b, c, h, w) float in 0-255."""
    top, left, h, w = boxes.float().unbind(1)
    down, across = ((torch.arange(side, device=images.device) + 0.5) / side for side in to_2tuple(size))
    y = (top[:, None] + h[:, None] * down) / images.shape[2] * 2 - 1
    x = (left[:, None] + w[:, None] * across) / images.shape[3] * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False).clamp(0, 255)


@lru_cache(maxsize=8)
def _channel_constant(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # kept: a copy to a GPU each step would make it wait


def normalize(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Float images (..., c, h, w) from 0-255 to about zero mean and unit variance per channel."""
    return (images / 255 - _channel_constant(tuple(mean), images.device)) / _channel_constant(tuple(std), images.device)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The way back of 8-bit photographs, (..., c, h, w) in 0-1, for pictures."""
    return (images * _channel_constant(STD, images.device) + _channel_constant(MEAN, images.device)).clamp(0, 1)
