"""Vision Transformer (Dosovitskiy et al. 2021), dense or on visible patches only, as in MAE (He et al. 2022).

    encoder = vit_base()                         # 224 px, 196 units of 16 px
    encoder(images)                              # dense:          (b, 196, 768)
    encoder(images, visible)                     # visible units:  (b, 49, 768) for a mask with 49 of 196 visible
    encoder(images, visible, mask_token=token)   # all tokens, masked ones replaced after the patch embedding (SimMIM)

Every token attends to every other, so masked tokens are simply left out. A *unit*, the square of pixels that one final
token covers, is a patch; `--unit 32` masks larger squares. Axis letters: b batch, t tokens, c channels, h heads, d head
width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from backbone import (
    Attention,
    Block,
    Encoder,
    PatchEmbedding,
    drop_path_rates,
    init_linear,
    run_block,
    sincos_positions,
)


def resize_positions(positions: torch.Tensor, old_rows: int, rows: int, columns: int) -> torch.Tensor:
    """Positions of a map of `old_rows` rows for a map of rows x columns: bicubic, with antialiasing, as in timm."""
    grid = rearrange(positions.float(), "(r c) k -> 1 k r c", r=old_rows)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
    return rearrange(grid, "1 k r c -> (r c) k").to(positions.dtype)


class ViT(Encoder):
    """Vision Transformer encoder without a classifier.

    Positions are learnt, start as sines and cosines, and are interpolated for dense images of other sizes. The class
    token takes part in attention, holds its own position, and is not returned: classifiers average the tokens.

    Args:
        image_size: Pixels, a multiple of `patch`; one number for a square, or height and width.
        patch: Pixels per side of a patch.
        width: Channels of a token.
        depth: Number of blocks.
        heads: Attention heads.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        window: Ignored. It is accepted so that every encoder is constructed alike.
        channels: Of an image.
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
        super().__init__(image_size, PatchEmbedding(patch, width, norm=False, channels=channels))
        if width % heads or width % 4:
            raise ValueError(f"width {width}: give a multiple of 4 and of the {heads} heads")
        self.depth = depth
        self.positions = nn.Parameter(sincos_positions(self.rows, self.columns, width))
        self.class_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads), rate, eps=1e-6) for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)

    def layer_of(self, name: str) -> int:
        """0 is the patch embedding with positions and class token, then one number per block; the final norm comes
        last.
        """
        kind, *rest = name.split(".")
        if kind == "blocks":
            return int(rest[0]) + 1
        return 0 if kind in ("embed", "positions", "class_token") else self.depth + 1

    def position_table(self, rows: int, columns: int) -> torch.Tensor:
        if (rows, columns) == (self.rows, self.columns):
            return self.positions
        return resize_positions(self.positions, self.rows, rows, columns)

    def encode(self, x, plan):
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = run_block(block, self.checkpointing and self.training, x)
        return self.norm(x)[:, 1:]


# For images of 32 to 64 px; 2.7 M parameters.
vit_micro = partial(ViT, image_size=32, patch=4, width=192, depth=6, heads=3)
# The published sizes, for images of 224 px.
vit_tiny = partial(ViT, width=192, depth=12, heads=3)
vit_small = partial(ViT, width=384, depth=12, heads=6)
vit_base = partial(ViT, width=768, depth=12, heads=12)
vit_large = partial(ViT, width=1024, depth=24, heads=16)

MODELS = {
    "vit_micro": vit_micro,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
}
