"""Boxes of random and center crops, crops resized to the input's size, and normalization.

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
    """Boxes of torchvision's RandomResizedCrop, as a function of random numbers and for many images at once.

    Args:
        sizes: (b, 2) heights and widths of the images.
        draws: (b, 22) uniform in [0, 1): ten attempts at the area, ten at the aspect ratio, and the position.
        scale: Smallest and largest area of a crop, as fractions of the image's area.
        ratio: Smallest and largest width over height.

    Returns:
        (b, 4) top, left, height and width. If no attempt fits, this is the largest center box of an allowed ratio.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :10])
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[:, 10:20])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.argmax(1)[:, None]  # the first attempt that fits inside the image
    w, h = np.take_along_axis(w, first, 1), np.take_along_axis(h, first, 1)
    none = ~fits.any(1, keepdims=True)
    w = np.where(none, np.minimum(width, np.rint(height * ratio[1])), w)
    h = np.where(none, np.minimum(height, np.rint(width / ratio[0])), h)
    top = np.where(none, (height - h) // 2, np.floor(draws[:, 20:21] * (height - h + 1)))
    left = np.where(none, (width - w) // 2, np.floor(draws[:, 21:] * (width - w + 1)))
    return np.concatenate([top, left, h, w], axis=1).astype(np.int64)


def random_crop_box(image_size: tuple, draws: np.ndarray, size, scale: tuple, ratio: tuple) -> list[int]:
    """The box of one image's random crop that will be resized to `size`; see `random_crop_boxes`. draws: (22,)."""
    return random_crop_boxes(np.array([image_size]), draws[None], scale, crop_ratio(ratio, size))[0].tolist()


def format_size(size) -> str:
    """An image size, or a map's, as flags take it: 224, or 224x160."""
    height, width = to_2tuple(size)
    return str(height) if height == width else f"{height}x{width}"


def crop_ratio(ratio: tuple, size) -> tuple:
    """The range of width over height for crops that are resized to `size`.

    This is the range for squares, `ratio`, times the input's own ratio.
    """
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


def center_crop_size(image_size: tuple, size, crop_pct: float) -> tuple[float, float]:
    """Height and width of a center crop in the image's own pixels, before it is resized to `size`.

    The crop is the largest one with the aspect ratio of `size`, times `crop_pct` (as in timm, 0.875 = 224 / 256).
    Of an image that is no larger than `size` the factor is 1, so that no pixels are lost.
    """
    (height, width), (h, w) = image_size, to_2tuple(size)
    crop_pct = crop_pct if height > h and width > w else 1
    if width * h <= height * w:
        return width * crop_pct * (h / w), width * crop_pct
    return height * crop_pct, height * crop_pct * (w / h)


def center_crop(pixels: np.ndarray, size, crop_pct: float) -> torch.Tensor:
    """The center crop of an image (h, w, c), see `center_crop_size`, resized (bicubic) to (c, *size)."""
    height, width = pixels.shape[:2]
    crop_height, crop_width = center_crop_size((height, width), size, crop_pct)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return to_chw(resize(pixels, to_2tuple(size), (left, top, left + crop_width, top + crop_height)))


def random_scaled_box(image_size: tuple, size: tuple, scale: tuple, draws) -> tuple[int, int, int, int]:
    """The box of a crop that has the size `size` after the image has been scaled by a random factor.

    Args:
        image_size: Height and width of the image.
        size: Height and width of the input.
        scale: Smallest and largest factor, between which it is log-uniform. A small image is scaled up to cover `size`.
        draws: At least three numbers in [0, 1), for the factor and the position.

    Returns:
        (top, left, height, width) in the image's own pixels, inside the image.
    """
    factor = np.exp(np.log(scale[0]) + (np.log(scale[1]) - np.log(scale[0])) * draws[0])
    factor = max(factor, *(needed / side for needed, side in zip(size, image_size)))
    h, w = (min(side, max(1, round(needed / factor))) for needed, side in zip(size, image_size))
    return int(draws[1] * (image_size[0] - h + 1)), int(draws[2] * (image_size[1] - w + 1)), h, w


def resized_mask_crop(mask: torch.Tensor, box: tuple, size) -> torch.Tensor:
    """The box (top, left, height, width) of a mask (h, w) of class numbers, resized to `size` by nearest neighbours."""
    top, left, h, w = box
    part = mask[None, None, top : top + h, left : left + w].float()
    return F.interpolate(part, to_2tuple(size), mode="nearest-exact")[0, 0].long()


def batched_resized_crop(images: torch.Tensor, boxes: torch.Tensor, size) -> torch.Tensor:
    """Crop and resize a batch on its device, bicubic without antialiasing: for small images, which are mostly enlarged.

    Args:
        images: (b, c, h, w) float, 0 to 255.
        boxes: (b, 4) top, left, height and width.
        size: Height and width of the result.
    """
    top, left, h, w = boxes.float().unbind(1)
    down, across = ((torch.arange(side, device=images.device) + 0.5) / side for side in to_2tuple(size))
    y = (top[:, None] + h[:, None] * down) / images.shape[2] * 2 - 1
    x = (left[:, None] + w[:, None] * across) / images.shape[3] * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False).clamp(0, 255)


@lru_cache(maxsize=8)
def _channel_constant(values: tuple, device: torch.device) -> torch.Tensor:
    # Cached, because a copy to a GPU in each step would make it wait.
    return torch.tensor(values, device=device)[:, None, None]


def normalize(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Bring float images (..., c, h, w) from 0 to 255 to about zero mean and unit variance per channel."""
    return (images / 255 - _channel_constant(tuple(mean), images.device)) / _channel_constant(tuple(std), images.device)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize` for 8-bit photographs, (..., c, h, w) from 0 to 1, for pictures."""
    return (images * _channel_constant(STD, images.device) + _channel_constant(MEAN, images.device)).clamp(0, 1)
