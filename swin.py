"""Swin Transformer (section 3.1, 5; Liu et al. 2021), dense or on visible units only, by the same code.

    encoder = swin_base()                        # 224 px, 49 units of 32 px
    encoder(images)                              # dense:          (b, 49, 1024)
    encoder(images, visible)                     # visible units:  (b, 12, 1024) for a mask with 12 of 49 visible
    encoder(images, visible, mask_token=token)   # all units, masked ones replaced after the patch embedding (SimMIM)
    encoder.pyramid(images)                      # feature maps of all stages, for detection and segmentation

A *unit* is the square of pixels that one final token covers.

Where to look: `plan.py` decides once per mask which tokens each block attends over. Masked tokens are left out in
`plan.make_plan`: they are not listed in `Plan.patches`, so the patch embedding never reads them. Shifted windows are
other window numbers (`plan.window_numbers`); the layout of odd blocks comes from these. A `Layout` has `attn_mask`,
True = may attend: both tokens are in the same window. Window attention on visible tokens is therefore exactly dense
window attention in which masked tokens are no keys; tests/test_swin.py compares the two. `forward` and `pyramid` are in
backbone.HierarchicalEncoder.

Axis letters: b batch, t tokens, c channels, g groups, s slots of a group, h heads, d head width.
Seen in `notebooks/03_swin.ipynb` and `notebooks/04_visible_only.ipynb`.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch
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
    sincos_positions,
)
from plan import StagePlan


class WindowAttention(GroupAttention):
    """Window attention with a relative position bias table (Liu et al. 2021, Eq. 4) of (2 * window - 1)^2 rows."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__(width, heads)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x, relative_position_index, attn_mask):
        """Self-attention inside the groups of a plan.

        Args:
            x: (b, g * s, c).
            relative_position_index: (g or 1, s, s or more), see `plan.Layout`. The last axis, of keys, is padded.
            attn_mask: The same shape, bool, True = may attend; None: all pairs may. It becomes a bias of 0 or -inf.
        """
        shape = relative_position_index.shape
        bias = self.table.t().index_select(1, relative_position_index.flatten()).unflatten(1, shape)  # (h, *shape)
        if attn_mask is not None:
            bias = torch.where(attn_mask, bias, float("-inf"))
        return super().forward(x, bias)


class PatchMerging(nn.Module):
    """Four tokens, already side by side, to one of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=1e-5)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(rearrange(x, "b (t four) c -> b t (four c)", four=4)))


class Stage(nn.Module):
    def __init__(self, width: int, heads: int, window: int, drop_paths: Sequence[float], last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, WindowAttention(width, heads, window), drop_path) for drop_path in drop_paths
        )
        self.merge = None if last else PatchMerging(width)

    def forward(self, x, plan: StagePlan, checkpointing: bool):
        for number, block in enumerate(self.blocks):
            # Even blocks have plain windows, odd ones shifted windows. Without a shift there is one layout for both.
            layout = plan.layouts[number % len(plan.layouts)]
            if number:  # the tokens arrive in the order of the first block
                x = gather_tokens(x, layout.gather_index)
            x = run_block(block, checkpointing, x, layout.relative_position_index, layout.attn_mask)
        return x


class Swin(HierarchicalEncoder):
    """Swin Transformer encoder without a classifier.

    Dense images of other sizes are accepted too (multiples of the unit, not necessarily square).

    Args:
        image_size: Pixels, a multiple of the unit, patch * 2^(stages - 1); one number for a square, or height and
            width.
        patch: Pixels per side of a patch.
        window: Tokens per side. A stage whose map is smaller shrinks window and position table to its longer side, and
            does not shift along a side of one window; on square maps as in Microsoft's and timm's code.
        width: Channels of the first stage.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        channels: Of an image.
        shift: Odd blocks attend inside shifted windows. Without it all blocks attend inside the same windows (MixMAE).
        positions: Add fixed sine-cosine positions after the patch embedding (MixMAE; Liu et al. 2023).
    """

    undecayed = (".table",)  # the relative position bias tables
    partitions = True

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch: int = 4,
        window: int = 7,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        drop_path: float = 0.0,
        channels: int = 3,
        shift: bool = True,
        positions: bool = False,
    ):
        super().__init__(image_size, patch, window, width, depths, channels)
        if len(heads) != len(depths) or any(width * 2**i % h for i, h in enumerate(heads)):
            raise ValueError(
                f"heads {tuple(heads)}: one number per stage, dividing the stage's width {width} x 2^stage"
            )
        self.shift = shift
        self.plan_settings = self.windows, self.depths, shift
        map_size = [side // patch for side in self.image_size]
        self.register_buffer("positions", self.sincos(*map_size) if positions else None, persistent=False)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            Stage(width * 2**i, heads[i], self.windows[i], list(islice(rates, depth)), i == len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-5)
        self.apply(init_linear)

    def sincos(self, rows: int, columns: int) -> torch.Tensor:
        """Sine-cosine positions, (rows * columns, stem_width). The column comes first, as in MAE's and MixMAE's
        code.
        """
        return sincos_positions(rows, columns, self.stem_width).roll(self.stem_width // 2, 1)

    def position_table(self, rows: int, columns: int) -> torch.Tensor | None:
        own_size = (rows * self.embed.patch, columns * self.embed.patch) == self.image_size
        if self.positions is None or own_size:
            return self.positions
        return self.sincos(rows, columns).to(self.positions)


# For studies of 32 px images on a CPU: units of 8 px; 2.1 M parameters.
swin_nano = partial(Swin, image_size=32, patch=4, window=4, width=96, depths=(2, 4), heads=(3, 6))
# For images of 32 to 64 px: units of 8 px; 5.9 M parameters.
swin_micro = partial(Swin, image_size=32, patch=2, window=4, width=96, depths=(2, 4, 2), heads=(3, 6, 12))
# The published sizes, for images of 224 px: units of 32 px.
swin_tiny = partial(Swin, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
swin_small = partial(Swin, width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
swin_base = partial(Swin, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
swin_large = partial(Swin, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))
# MixMAE's network, by the name in its code: Swin-B with windows of 14, no shift, and positions (Liu et al. 2023).
mixmim_base = partial(swin_base, window=14, shift=False, positions=True)

MODELS = {
    "swin_nano": swin_nano,
    "swin_micro": swin_micro,
    "swin_tiny": swin_tiny,
    "swin_small": swin_small,
    "swin_base": swin_base,
    "swin_large": swin_large,
    "mixmim_base": mixmim_base,
}
