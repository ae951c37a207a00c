"""Masks and superposition: Eq. 1, 2 and 3 of the paper and the mixed image of Algorithm 1. Nothing here is learned.

    source images (b, n, c, h, w)  --superpose-->  mixed images (b, c, h, w)  --mask_pixels-->  what the encoder may see

A mask unit is a square of pixels that one final token of the encoder covers: 32 x 32 pixels in a Swin, one patch in
a ViT. Mask units are numbered in raster order. A mask is a bool tensor over mask units, and True means visible.

Axis letters: b mixed images, n source images, c channels, h w pixels, m masks, u mask units, i j rows and columns of
mask units, p q pixels inside a mask unit. See also `notebooks/01_masking.ipynb` and `notebooks/02_superposition.ipynb`.
"""

import math

import torch
import torch.nn.functional as F
from einops import repeat


def visible_count(units: int, mask_ratio: float) -> int:
    """Number of visible mask units: floor((1 - mask_ratio) * units + 0.5), for example 12 of 49 at 0.75.

    Raises:
        ValueError: If the mask ratio is not in [0, 1), or if a positive ratio masks all mask units or none.
    """
    if not 0 <= mask_ratio < 1:  # written so that nan is refused too
        raise ValueError(f"mask ratio {mask_ratio}: give a number between 0 and 1, such as 0.75")
    count = math.floor((1 - mask_ratio) * units + 0.5)
    if mask_ratio and not 0 < count < units:
        raise ValueError(
            f"mask ratio {mask_ratio} masks {units - count} of {units} mask units: at least one must be masked and one "
            f"visible, so give a ratio between {0.5 / units:.3f} and {1 - 0.5 / units:.3f}"
        )
    return count


def draw_masks(count: int, units: int, mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Draw random masks, each with exactly `visible_count(units, mask_ratio)` visible mask units.

    Algorithm 1 uses one mask for all source images of the whole batch (`count` = 1). Eq. 1 and 2 write a mask for
    each source image, M_1 and M_2 (`count` = n).

    Returns:
        (count, units) bool, True = visible.
    """
    # Sorting random numbers gives a random permutation of the mask units. The first few stay visible, as in MAE.
    ids_shuffle = torch.rand(count, units, generator=generator).argsort(dim=1)
    ids_keep = ids_shuffle[:, : visible_count(units, mask_ratio)]
    return torch.zeros(count, units, dtype=torch.bool).scatter_(1, ids_keep, True)


def upsample_mask(visible: torch.Tensor, rows: int, factor: int) -> torch.Tensor:
    """Turn masks over large squares, (m, rows * columns), into masks over squares with sides `factor` times shorter."""
    return repeat(visible, "m (i j) -> m (i p j q)", i=rows, p=factor, q=factor)


def units_to_encode(visible: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Choose the mask units that the encoder reads: the union of the masks, padded to a fixed number.

    The union of several random masks has no fixed size, but tensors of a fixed shape are faster and can be compiled.
    Random mask units that are masked in every source image, and so show only zeros, fill it up to m times the size
    of one mask. A single mask is returned as it is.

    Args:
        visible: (m, u) bool.
        generator: Chooses the additional mask units.

    Returns:
        (u,) bool, True = encoded.
    """
    union = visible.any(dim=0)
    count = min(int(visible.sum()), union.numel())
    # Members of the union have scores below 0 and come first. The others follow in random order.
    score = torch.rand(union.numel(), generator=generator) - 2 * union.float()
    return torch.zeros_like(union).scatter_(0, score.argsort()[:count], True)


def mask_pixels(images: torch.Tensor, visible: torch.Tensor, unit: int) -> torch.Tensor:
    """Eq. 1 and 2: I_masked = I * M, element by element, where M repeats the mask for each pixel of a mask unit.

    Training calls this for independent masks and for MixMAE. A mask that all sources share is applied by the encoder,
    which does not read masked patches.

    Args:
        images: (..., c, h, w), where h and w are multiples of `unit`.
        visible: (..., u) bool. Its leading axes broadcast against the leading axes of `images`.
        unit: Side of a mask unit in pixels.
    """
    h, w = images.shape[-2:]
    if h % unit or w % unit:
        raise ValueError(f"an image of {h} x {w} pixels cannot be divided into mask units of {unit} x {unit} pixels")
    mask = repeat(visible, "... (i j) -> ... 1 (i p) (j q)", i=h // unit, j=w // unit, p=unit, q=unit)
    return images * mask.to(images)


def equal_weights(n: int) -> torch.Tensor:
    """lambda_k = 1 / n for each of n source images: (n,)."""
    if n < 1:
        raise ValueError(f"{n} sources: give at least one image")
    return torch.full((n,), 1 / n)


def superpose(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and Algorithm 1: I_mixed = sum over k of lambda_k I_k.

    If all source images share one mask, masking and superposition commute. Algorithm 1, which superposes first, and
    Eq. 1-3, which mask first, then give the same result.

    Args:
        images: (b, n, ...).
        weights: lambda_k, (n,), which sum to 1.

    Returns:
        (b, ...).
    """
    if weights.shape != images.shape[1:2]:
        raise ValueError(f"{images.shape[1]} sources need as many weights, got {tuple(weights.shape)}")
    weights = weights.to(images).view(-1, *[1] * (images.ndim - 2))
    # An einsum would be a matrix product, which autocast and TF32 round to fewer bits.
    return (images * weights).sum(dim=1)


def four_view_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights of the four views of Eq. 3: (l1, l2) becomes (l1 / 2, l1 / 2, l2 / 2, l2 / 2).

    The paper prints l1, l1, l2, l2, which sum to 2 and would make the mixed image twice as bright as its source images.
    """
    if len(weights) != 2:
        raise ValueError(f"the four-view form of Eq. 3 takes two images, so two weights; got {len(weights)}")
    return weights.repeat_interleave(2) / 2


def four_views(
    images: torch.Tensor,
    draws: torch.Tensor,
    angle: float = 30.0,
    scale: tuple[float, float] = (0.7, 1.0),
    crop: tuple[float, float] = (0.3, 1.0),
) -> torch.Tensor:
    """The four views of Eq. 3: Rotate(I_1, theta_1), Flip(I_1, horizontal), Scale(I_2, s_2), Crop(I_2, r_2).

    Views are made before masks, because a mask that is rotated with its image would no longer consist of mask units.

    Args:
        images: (b, 2, c, h, w).
        draws: (b, 5), uniform in [0, 1), for the angle, the scale, and the crop's area and position (x, y).
        angle: theta_1 is in [-angle, angle] degrees.
        scale: s_2 is in this range. The smaller image is surrounded by zeros, which are the mean colour if images
            are normalized.
        crop: r_2, the fraction of the area that is cut out and enlarged, is in this range.

    Returns:
        (b, 4, c, h, w), to be superposed with `four_view_weights`.
    """
    if images.shape[1] != 2:
        raise ValueError(f"the four-view form of Eq. 3 takes two images, got {images.shape[1]}")
    first, second = images.unbind(1)
    angle_draw, scale_draw, area_draw, x_draw, y_draw = draws.to(images).unbind(1)
    theta = (angle * (2 * angle_draw - 1)).deg2rad()
    size = scale[0] + (scale[1] - scale[0]) * scale_draw
    side = (crop[0] + (crop[1] - crop[0]) * area_draw).sqrt()
    x, y = (1 - side) * (2 * x_draw - 1), (1 - side) * (2 * y_draw - 1)
    zero = torch.zeros_like(theta)
    rotated = _resample(first, theta, zero + 1, zero, zero)
    scaled = _resample(second, zero, 1 / size, zero, zero)
    cropped = _resample(second, zero, side, x, y)
    return torch.stack([rotated, first.flip(-1), scaled, cropped], dim=1)


def _resample(images, angle, zoom, x, y):
    """Sample images on a grid rotated by `angle` radians, scaled by `zoom` and centered at (x, y) in [-1, 1]."""
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # affine_grid measures in half sides of the image. The aspect ratio keeps rotations rigid in pixels.
    ratio = images.shape[-2] / images.shape[-1]
    theta = torch.stack([cos, -sin * ratio, x, sin / ratio, cos, y], dim=1).view(-1, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
