"""Twins-SVT (Chu et al. 2021), dense or on visible units only, exactly: no sparse convolutions, no approximation.

    encoder = twins_large()                      # 224 px, 49 units of 32 px
    encoder(images)                              # dense:          (b, 49, 1024)
    encoder(images, visible)                     # visible units:  (b, 12, 1024) for a mask with 12 of 49 visible
    encoder(images, visible, mask_token=token)   # all tokens, masked ones replaced after the patch embedding (SimMIM)
    encoder.pyramid(images)                      # feature maps of all stages, for detection and segmentation

A *unit* is the square of pixels that one final token covers. Even blocks attend inside windows, which are packed into
groups as in plan.py and never shift. In odd blocks every token attends to summaries, one for each unit; a masked unit
has none. After the first block of a stage a 3 x 3 convolution encodes positions (conditional positional encoding);
masked tokens are zeros to it. `forward` and `pyramid` are in backbone.HierarchicalEncoder. Axis letters: b batch, t
tokens, c channels, g groups, s slots of a group, h heads, d head width, v encoded units, r tokens of a unit.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from backbone import (
    Block,
    GroupAttention,
    HierarchicalEncoder,
    drop_path_rates,
    gather_tokens,
    init_linear,
    run_block,
)
from plan import StagePlan


class GlobalAttention(nn.Module):
    """Attention of all tokens to one summary for each unit: its tokens, side by side, through a linear layer."""

    def __init__(self, width: int, heads: int, tokens: int):
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.q = nn.Linear(width, width)
        self.reduce = nn.Linear(tokens * width, width) if tokens > 1 else None
        self.norm = nn.LayerNorm(width, eps=1e-5) if tokens > 1 else None
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, to_units):
        """x: (b, t, c). to_units: the move to the tokens of each unit, (v * r) in all, unit by unit."""
        summaries = gather_tokens(x, to_units)
        if self.reduce is not None:
            summaries = rearrange(summaries, "b (v r) c -> b v (r c)", r=self.tokens)
            summaries = self.norm(self.reduce(summaries))
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(self.kv(summaries), "b v (two h d) -> two b h v d", two=2, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class PatchMerging(nn.Module):
    """Four tokens, already side by side, to one of twice the width: the patch embedding of the next stage."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=1e-5)

    def forward(self, x):
        return self.norm(self.reduction(rearrange(x, "b (t four) c -> b t (four c)", four=4)))


class Stage(nn.Module):
    def __init__(self, width: int, tokens: int, drop_paths: Sequence[float], last: bool):
        super().__init__()
        heads = width // 32
        self.blocks = nn.ModuleList()
        for number, drop_path in enumerate(drop_paths):
            attention = GlobalAttention(width, heads, tokens) if number % 2 else GroupAttention(width, heads)
            self.blocks.append(Block(width, attention, drop_path, eps=1e-6))
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.normal_(self.positions.weight, std=(2 / 9) ** 0.5)
        nn.init.zeros_(self.positions.bias)
        self.merge = None if last else PatchMerging(width)

    def forward(self, x, plan: StagePlan, checkpointing: bool):
        layout = plan.layouts[0]  # without shifted windows there is one
        bias = torch.zeros(layout.relative_position_index.shape, device=x.device)  # no relative positions
        if layout.attn_mask is not None:
            bias = torch.where(layout.attn_mask, bias, float("-inf"))
        for number, block in enumerate(self.blocks):
            x = run_block(block, checkpointing, x, plan.to_units if number % 2 else bias[None])
            if number == 0:
                x = x + self.encode_positions(x, plan)
        return x

    def encode_positions(self, x, plan):
        """Output of the convolution over the map, where masked tokens are zeros, at each token (b, t, c)."""
        grid = x.new_zeros(len(x), plan.height * plan.width, x.shape[-1])
        grid = grid.index_copy(1, plan.tokens, gather_tokens(x, plan.to_raster))
        grid = self.positions(rearrange(grid, "b (h w) c -> b c h w", h=plan.height))
        return gather_tokens(rearrange(grid, "b c h w -> b (h w) c"), plan.from_map)


class Twins(HierarchicalEncoder):
    """Twins-SVT encoder without a classifier. Heads are 32 channels wide.

    Where windows do not divide the map, border windows are smaller; timm pads with zeros and attends to them. Dense
    images of other sizes (multiples of the unit) are accepted too.

    Args:
        image_size: Pixels, a multiple of the unit, patch * 2^(stages - 1); one number for a square, or height and
            width.
        patch: Pixels per side of a patch.
        window: Tokens per side; a smaller map is one window.
        width: Channels of the first stage.
        depths: Blocks of each stage.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        channels: Of an image.
    """

    undecayed = (".positions.weight",)

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch: int = 4,
        window: int = 7,
        width: int = 64,
        depths: Sequence[int] = (2, 2, 10, 4),
        drop_path: float = 0.0,
        channels: int = 3,
    ):
        super().__init__(image_size, patch, window, width, depths, channels)
        if width % 32:
            raise ValueError(f"width {width}: give a multiple of 32, the channels of a head")
        shift, global_attention = False, True
        self.plan_settings = self.windows, self.depths, shift, global_attention
        last = len(depths) - 1
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            Stage(width * 2**i, 4 ** (last - i), list(islice(rates, depth)), i == last)
            for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.apply(init_linear)


# For images of 32 to 64 px: units of 8 px; 2.8 M parameters.
twins_micro = partial(Twins, image_size=32, patch=2, window=4, width=64, depths=(2, 4, 2))
# The published sizes, for images of 224 px: units of 32 px.
twins_small = partial(Twins, width=64, depths=(2, 2, 10, 4))
twins_base = partial(Twins, width=96, depths=(2, 2, 18, 2))
twins_large = partial(Twins, width=128, depths=(2, 2, 18, 2))

MODELS = {
    "twins_micro": twins_micro,
    "twins_small": twins_small,
    "twins_base": twins_base,
    "twins_large": twins_large,
}
