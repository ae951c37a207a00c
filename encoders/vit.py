"""Vision Transformer (Dosovitskiy et al. 2021), dense or on visible patches only, as in MAE (He et al. 2022).

    encoder = vit_base()                         # 224 px, 196 units of 16 px
    encoder(images)                              # dense:          (b, 196, 768)
    encoder(images, visible)                     # visible units:  (b, 49, 768) for a mask with 49 of 196 visible
    encoder(images, visible, mask_token=token)   # all tokens, hidden ones replaced after the patch embedding (SimMIM)

Every token attends to every other, so hidden tokens are simply left out. A unit is a patch; `--unit 32` hides squares of patches.
Axis letters: b batch, t tokens, c channels, h heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbone import (
    Block,
    PatchEmbedding,
    check_masked_images,
    check_visible,
    height_and_width,
    init_linear,
    sincos_positions,
)


def resize_positions(positions: torch.Tensor, old_rows: int, rows: int, columns: int) -> torch.Tensor:
    """Positions of a map of `old_rows` rows for one of rows x columns: bicubic, with antialiasing, as in timm."""
    grid = rearrange(positions.float(), "(r c) k -> 1 k r c", r=old_rows)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
    return rearrange(grid, "1 k r c -> (r c) k").to(positions.dtype)


@dataclass
class Plan:
    """What a mask means for a plain transformer: which patches are tokens."""

    patches: torch.Tensor  # (t,) raster numbers
    hidden: torch.Tensor | None  # (t,) bool, those to take from the mask token; None where hidden units are left out
    fits: bool = True  # every mask with equally many visible units has the same shapes


class Attention(nn.Module):
    """Multi-head attention of all tokens to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class ViT(nn.Module):
    """Vision Transformer encoder without a classifier.

    image_size: pixels, a multiple of `patch`, one number for a square, or height and width. channels: of an image. drop_path: stochastic depth of the last block, rising linearly from 0.
    window: taken, so that every encoder is made alike, and ignored. Positions are learnt, begin as sines and cosines, and are
    interpolated for dense images of other sizes. The class token takes part in attention, holds its own position, and is not
    returned: classifiers average the tokens. What else may be asked of an encoder: encoders.Encoder.
    """

    undecayed = ("positions",)

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.0,
        window: int | None = None,
        channels: int = 3,
    ):
        super().__init__()
        self.image_size = height_and_width(image_size, patch, f"the patch, {patch} pixels")
        if width % heads or width % 4:
            raise ValueError(f"width {width}: give a multiple of 4 and of the {heads} heads")
        self.unit, self.depth, self.channels = patch, depth, channels
        self.rows, self.columns = (side // patch for side in self.image_size)
        self.units, self.width, self.stem_width = self.rows * self.columns, width, width
        self.checkpointing = False  # recompute each block in the backward pass instead of storing it
        self.embed = PatchEmbedding(patch, width, norm=False, channels=channels)
        self.positions = nn.Parameter(sincos_positions(self.rows, self.columns, width))
        self.class_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads), drop_path * i / max(1, depth - 1), eps=1e-6) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)

    def plan(self, visible: torch.Tensor, dense: bool = False, device="cpu") -> Plan:
        """The plan of a mask (units,) bool; `dense` for use with a mask token. ValueError for what is no such mask."""
        check_visible(visible, self.units)
        if dense:
            return Plan(torch.arange(self.units, device=device), ~visible.to(device))
        return Plan(visible.nonzero().flatten().to(device), None)

    def layer_of(self, name: str) -> int:
        """0 is the patch embedding with positions and class token, then one number per block; the final norm comes last, and what is above it."""
        kind, *rest = name.split(".")
        return (
            int(rest[0]) + 1
            if kind == "blocks"
            else 0
            if kind in ("embed", "positions", "class_token")
            else self.depth + 1
        )

    def position_table(self, rows: int, columns: int) -> torch.Tensor:
        """Positions of a map of rows x columns patches, (rows * columns, width)."""
        same = (rows, columns) == (self.rows, self.columns)
        return self.positions if same else resize_positions(self.positions, self.rows, rows, columns)

    def forward(
        self, images: torch.Tensor, visible: "torch.Tensor | Plan | None" = None, mask_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens after the final norm, (b, units encoded, width), in raster order; the arguments are those of encoders.Encoder.

        Without a mask, images may have any size that is made of whole patches.
        """
        rows, columns = images.shape[-2] // self.unit, images.shape[-1] // self.unit
        if visible is None:
            if images.shape[-2] % self.unit or images.shape[-1] % self.unit:
                raise ValueError(
                    f"an image of {images.shape[-2]} x {images.shape[-1]} pixels is not made of whole units of {self.unit} pixels"
                )
            plan = Plan(torch.arange(rows * columns, device=images.device), None)
        else:
            check_masked_images(images, self.image_size)
            plan = visible if isinstance(visible, Plan) else self.plan(visible, mask_token is not None, images.device)
        x = self.embed(images, plan.patches)
        if mask_token is not None and plan.hidden is not None:
            x = torch.where(plan.hidden[:, None], mask_token.to(x.dtype), x)
        x = x + self.position_table(rows, columns).index_select(0, plan.patches)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x)[:, 1:]


def vit_micro(**overrides) -> ViT:
    """For images of 32 to 64 px: patch 4; 2.7 M parameters."""
    return ViT(**dict(image_size=32, patch=4, width=192, depth=6, heads=3) | overrides)


def vit_tiny(**overrides) -> ViT:
    return ViT(**dict(width=192, depth=12, heads=3) | overrides)


def vit_small(**overrides) -> ViT:
    return ViT(**dict(width=384, depth=12, heads=6) | overrides)


def vit_base(**overrides) -> ViT:
    return ViT(**dict(width=768, depth=12, heads=12) | overrides)


def vit_large(**overrides) -> ViT:
    return ViT(**dict(width=1024, depth=24, heads=16) | overrides)


MODELS = {f.__name__: f for f in (vit_micro, vit_tiny, vit_small, vit_base, vit_large)}
