"""Masks and superposition: Eq. 1-3 and the composite of Algorithm 1. No learning happens here.

    images (b, n, c, h, w)  --superpose-->  mixed (b, c, h, w)  --mask_pixels-->  what the encoder may see

A mask is a bool tensor over units, True = visible, from birth to loss. A unit is a square of `unit` x `unit`
pixels (32 at 224 px); unit number u covers row u // (w / unit), column u % (w / unit).
Axis letters: b composites, n sources, c channels, h w pixels, i j units, p q pixels inside a unit.
Seen in `notebooks/01_masking.ipynb` and `notebooks/02_superposition.ipynb`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat


def visible_count(units: int, mask_ratio: float) -> int:
    """Number of visible units, floor((1 - mask_ratio) * units + 0.5): 12 of 49 at 0.75; all at exactly 0.

    Raises ValueError where another ratio hides all or nothing, or is not a number from 0 to 1.
    """
    if not 0 <= mask_ratio < 1:  # also refuses nan
        raise ValueError(f"mask ratio {mask_ratio}: give a number between 0 and 1, such as 0.75")
    count = math.floor((1 - mask_ratio) * units + 0.5)
    if mask_ratio and not 0 < count < units:
        raise ValueError(
            f"mask ratio {mask_ratio} hides {units - count} of {units} units: at least one unit must be "
            f"hidden and one visible, so give a ratio between {0.5 / units:.3f} and {1 - 0.5 / units:.3f}"
        )
    return count


def draw_masks(count: int, units: int, mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """`count` independent masks over `units` units: (count, units) bool, each with exactly visible_count True.

    One mask (`count` = 1) shared by all sources and the whole batch is Algorithm 1's batch masking; `count` = n
    gives every source a mask of its own (M_1, M_2 of Eq. 1 and 2).
    """
    order = torch.rand(count, units, generator=generator).argsort(dim=1)
    return torch.zeros(count, units, dtype=torch.bool).scatter_(1, order[:, : visible_count(units, mask_ratio)], True)


def spread_mask(visible: torch.Tensor, rows: int, factor: int) -> torch.Tensor:
    """Masks (m, rows^2) over large units as masks (m, (rows * factor)^2) over units a `factor` smaller."""
    return repeat(visible, "m (i j) -> m (i p j q)", i=rows, p=factor, q=factor)


def units_to_encode(visible: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The units that the encoder reads, (units,) bool: those visible in any source, padded to a fixed count.

    visible: (m, units) bool; m = 1 is returned as it is. The union of m masks has no fixed size; units hidden in
    every source, which show nothing but zeros, fill it up to m times the size of one mask, so that shapes are static.
    """
    union = visible.any(dim=0)
    count = min(int(visible.sum()), union.numel())
    rank = torch.rand(union.numel(), generator=generator) - 2 * union.float()  # the union first, then at random
    return torch.zeros_like(union).scatter_(0, rank.argsort()[:count], True)


def mask_pixels(images: torch.Tensor, visible: torch.Tensor, unit: int) -> torch.Tensor:
    """Eq. 1 and 2: I_masked = I * M, with M spread from units to their pixels.

    images: (..., c, h, w) with h and w multiples of `unit`; visible: (..., units) bool, broadcast from the left.
    """
    h, w = images.shape[-2:]
    if h % unit or w % unit:
        raise ValueError(f"an image of {h} x {w} pixels is not made of whole units of {unit} pixels")
    pixels = repeat(visible, "... (i j) -> ... 1 (i p) (j q)", i=h // unit, j=w // unit, p=unit, q=unit)
    return images * pixels.to(images)


def equal_weights(n: int) -> torch.Tensor:
    """lambda_k = 1 / n for n sources, (n,). ValueError for none."""
    if n < 1:
        raise ValueError(f"{n} sources: give at least one image")
    return torch.full((n,), 1 / n)


def superpose(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and the composite of Algorithm 1: I_mixed = sum_k lambda_k I_k.

    images: (b, n, ...); weights: (n,), summing to 1. Returns (b, ...). With one mask for all sources this commutes
    with mask_pixels, so mixing first (Algorithm 1) and masking first (Eq. 1-3) are one thing.
    """
    if weights.shape != images.shape[1:2]:
        raise ValueError(f"{images.shape[1]} sources need as many weights, got {tuple(weights.shape)}")
    weights = weights.to(images).view(-1, *[1] * (images.ndim - 2))
    return reduce(
        images * weights, "b n ... -> b ...", "sum"
    )  # not einsum: autocast and TF32 would round it as a matrix product


def four_view_weights(weights: torch.Tensor) -> torch.Tensor:
    """The weights (l1/2, l1/2, l2/2, l2/2) of the four views of Eq. 3.

    As printed they are l1, l1, l2, l2 and sum to 2: a mix twice as bright as its sources.
    """
    if len(weights) != 2:
        raise ValueError(f"the four-view form of Eq. 3 takes two images, so two weights; got {len(weights)}")
    return repeat(weights / 2, "k -> (k 2)")


def four_views(
    images: torch.Tensor,
    draws: torch.Tensor,
    angle: float = 30.0,
    scale: tuple[float, float] = (0.7, 1.0),
    crop: tuple[float, float] = (0.3, 1.0),
) -> torch.Tensor:
    """The four sources of Eq. 3: Rotate(I_1, theta_1), Flip(I_1, horizontal), Scale(I_2, s_2), Crop(I_2, r_2).

    images: (b, 2, c, h, w); draws: (b, 5), numbers from [0, 1), such as torch.rand(b, 5). Returns (b, 4, c, h, w), to
    be superposed with `four_view_weights`. They set, per image: theta_1 in +-`angle` degrees; s_2 in `scale`, the size
    of the picture on a black ground; r_2 in `crop`, the share of the area that is cut out and enlarged, and where.
    Views come before masks: a mask rotated with its picture would not stay on units.
    """
    if images.shape[1] != 2:
        raise ValueError(f"the four-view form of Eq. 3 takes two images, got {images.shape[1]}")
    first, second = images.unbind(1)
    turn, size, area, x, y = draws.to(images).unbind(1)
    zero = torch.zeros_like(turn)
    side = (crop[0] + (crop[1] - crop[0]) * area).sqrt()
    return torch.stack(
        [
            _resample(first, (angle * (2 * turn - 1)).deg2rad(), zero + 1, zero, zero),
            first.flip(-1),
            _resample(second, zero, 1 / (scale[0] + (scale[1] - scale[0]) * size), zero, zero),
            _resample(second, zero, side, (1 - side) * (2 * x - 1), (1 - side) * (2 * y - 1)),
        ],
        dim=1,
    )


def _resample(images, angle, stretch, x, y):
    """Images read at a grid turned by `angle` radians, stretched and moved to centre (x, y) in [-1, 1]."""
    cos, sin = stretch * angle.cos(), stretch * angle.sin()
    ratio = images.shape[-2] / images.shape[-1]  # affine_grid's units are half sides; turn in pixels, not in half sides
    theta = rearrange([cos, -sin * ratio, x, sin / ratio, cos, y], "(r k) b -> b r k", r=2).to(images)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
