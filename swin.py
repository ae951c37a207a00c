"""Swin Transformer (section 3.1, 5; Liu et al. 2021), from scratch: dense, or on visible units only, by one code path.

    encoder = swin_base()                        # 224 px, 49 units of 32 px
    encoder(images)                              # dense:          (b, 49, 1024)
    encoder(images, visible)                     # visible units:  (b, 12, 1024) for a mask with 12 of 49 visible
    encoder(images, visible, mask_token=token)   # all tokens, hidden ones replaced after the patch embedding (SimMIM)
    encoder.pyramid(images)                      # feature maps of all stages, for detection and segmentation

Two halves: the network, then the index plan: which tokens a block attends over, settled once per mask.

Axis letters: b batch, t tokens, c channels, g groups, s slots of a group, h heads, d head width.
Seen in `notebooks/03_swin.ipynb` and `notebooks/04_visible_only.ipynb`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbone import (
    Block,
    PatchEmbedding,
    Permutation,
    attend,
    cached_plan,
    check_masked_images,
    check_visible,
    gather_tokens,
    height_and_width,
    init_linear,
    permutation,
    sincos_positions,
    with_hidden,
)
from plan import child_tokens, group_tokens


class Attention(nn.Module):
    """Window attention with a relative position table (Liu et al. 2021, Eq. 4) of (2 * window - 1)^2 rows."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.table, std=0.02)

    def bias(self, pairs: torch.Tensor, apart: torch.Tensor | None) -> torch.Tensor:
        """(h, g, s, s or more): the table's row of each pair; -inf where the windows differ."""
        bias = self.table.t().index_select(1, pairs.flatten()).unflatten(1, pairs.shape)
        return bias if apart is None else bias.masked_fill(apart, float("-inf"))

    def forward(self, x, pairs, apart):
        qkv = rearrange(self.qkv(x), "b (g s) (three h d) -> three b h g s d", three=3, h=self.heads, s=pairs.shape[-2])
        q, k, v = (
            qkv if x.is_cuda else qkv.contiguous()
        )  # on a CPU one copy serves both products, which would otherwise copy q, k and v each
        return self.proj(rearrange(attend(q, k, v, self.bias(pairs, apart)), "b h g s d -> b (g s) (h d)"))


class Merge(nn.Module):
    """Patch merging: four tokens, already side by side, to one of twice the width."""

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
            Block(width, Attention(width, heads, window), drop_path) for drop_path in drop_paths
        )
        self.merge = None if last else Merge(width)

    def forward(self, x, plan: "StagePlan", checkpointing: bool):
        for number, block in enumerate(self.blocks):
            layout = plan.layouts[number % len(plan.layouts)]
            if number:
                x = gather_tokens(x, layout.gather_index)  # the first block's order is the one in which tokens arrive
            x = (
                checkpoint(block, x, layout.pairs, layout.apart, use_reentrant=False)
                if checkpointing
                else block(x, layout.pairs, layout.apart)
            )
        return x


class Swin(nn.Module):
    """Swin Transformer encoder without a classifier.

    image_size: pixels, a multiple of the unit, patch * 2^(stages - 1), what one final token covers; one number, or height and width.
    window: tokens per side; a stage whose map is smaller shrinks window and position table to its longer side and does not
    shift along a side of one window, as in Microsoft's and timm's code. drop_path: stochastic depth of the last block, rising linearly from 0.
    shift: odd blocks attend inside shifted windows; without it all blocks attend inside the same ones. positions: add fixed sine-cosine positions
    after the patch embedding. MixMAE's network has no shift and has positions (Liu et al. 2023).
    Dense images of other sizes (multiples of the unit, not necessarily square) are taken too. What else may be asked of an
    encoder: encoders.Encoder.
    """

    undecayed = (".table",)  # the relative position tables
    partitions = True  # see `plan`

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
        super().__init__()
        self.unit = patch * 2 ** (len(depths) - 1)
        self.image_size = height_and_width(
            image_size,
            self.unit,
            f"the unit, {self.unit} pixels (patch {patch} x 2^{len(depths) - 1} for {len(depths)} stages)",
        )
        if len(heads) != len(depths) or any(width * 2**i % h for i, h in enumerate(heads)):
            raise ValueError(
                f"heads {tuple(heads)}: one number per stage, dividing the stage's width {width} x 2^stage"
            )
        if window < 1:
            raise ValueError(f"window {window}: give at least 1 token")
        self.depths, self.channels, self.shift = tuple(depths), channels, shift
        self.rows, self.columns = (side // self.unit for side in self.image_size)
        self.units = self.rows * self.columns
        self.width, self.stem_width = width * 2 ** (len(depths) - 1), width
        self.windows = tuple(min(window, max(self.image_size) // patch // 2**i) for i in range(len(depths)))
        self.checkpointing = False  # recompute each block in the backward pass instead of storing it
        self.embed = PatchEmbedding(patch, width, channels=channels)
        table = self.position_table(*(side // patch for side in self.image_size)) if positions else None
        self.register_buffer("positions", table, persistent=False)
        rates = iter(drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            Stage(width * 2**i, heads[i], self.windows[i], [next(rates) for _ in range(depth)], i == len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-5)
        self.apply(init_linear)

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they compute; what activation checkpointing wraps."""
        return [block for stage in self.stages for block in stage.blocks]

    def plan(self, visible: torch.Tensor, dense: bool = False, device="cpu", partition: bool = False) -> "Plan":
        """The index plan of a mask (units,) bool; `dense` for use with a mask token; `partition`: all units, attention within each kind.
        Raises ValueError for a mask of another length or type, or one that leaves nothing visible."""
        check_visible(visible, self.units)
        if dense:  # all tokens are there: only which of them are hidden is the mask's
            return with_hidden(
                self.whole_plan(self.rows, self.columns, device),
                visible.to(device),
                self.columns,
                2 ** (len(self.depths) - 1),
            )
        return make_plan(
            rearrange(visible.cpu(), "(i j) -> i j", i=self.rows).numpy(),
            self.windows,
            self.depths,
            device,
            partition,
            self.shift,
        )

    def position_table(self, rows: int, columns: int) -> torch.Tensor:
        """Sine-cosine positions of a map, (rows * columns, stem width). The column comes first, as in MAE's and MixMAE's code."""
        return sincos_positions(rows, columns, self.stem_width).roll(self.stem_width // 2, 1)

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter for layer-wise learning rates (BEiT's, as Swin's authors number it): 0 is the patch embedding, then one number
        per block; a merging layer counts with the last block of the stage that it closes, the final norm comes last: 0-25 for Swin-B."""
        kind, *rest = name.split(".")
        if kind == "embed":
            return 0
        if kind == "stages":
            stage = int(rest[0])
            before = sum(self.depths[:stage])
            return before + (int(rest[2]) + 1 if rest[1] == "blocks" else self.depths[stage])
        return sum(self.depths) + 1

    def tokens(self, images: torch.Tensor, plan: "Plan", mask_token: torch.Tensor | None = None):
        """Patch tokens in the order of the first block, hidden ones replaced by `mask_token` (c,)."""
        x = self.embed(images, plan.patches)
        if mask_token is not None and plan.hidden is not None:
            x = torch.where(plan.hidden[:, None], mask_token.to(x.dtype), x)
        if self.positions is None:
            return x
        rows, columns = (side // self.embed.patch for side in images.shape[-2:])
        own_size = tuple(images.shape[-2:]) == self.image_size
        table = self.positions if own_size else self.position_table(rows, columns).to(self.positions)
        return x + table.index_select(0, plan.patches)

    def forward(
        self, images: torch.Tensor, visible: "torch.Tensor | Plan | None" = None, mask_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final-stage tokens after the final norm, (b, units, width), in raster order of the units encoded.

        images: (b, channels, h, w), normalised. visible: None, all units; else a bool mask (units,) or a plan of it on the images' device (built
        with `dense` if a mask token goes with it). mask_token: (stem_width,); with it all units are encoded, hidden ones from the token.
        Raises ValueError for a mask with images of another size than `image_size`.
        """
        if visible is None:
            plan = self.dense_plan(images)
        else:
            check_masked_images(images, self.image_size)
            plan = visible if isinstance(visible, Plan) else self.plan(visible, mask_token is not None, images.device)
        x = self.tokens(images, plan, mask_token)
        for stage, stage_plan in zip(self.stages, plan.stages):
            x = gather_tokens(stage(x, stage_plan, self.checkpointing and self.training), stage_plan.leave)
            x = x if stage.merge is None else stage.merge(x)
        return self.norm(x)

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of all stages, dense, [(b, c, h / 4, w / 4), (b, 2c, h / 8, w / 8), ...] for patch 4: what each stage's last block returns,
        the last one's after the final norm."""
        plan, maps = self.dense_plan(images), []
        x = self.tokens(images, plan)
        for number, (stage, stage_plan) in enumerate(zip(self.stages, plan.stages)):
            x = stage(x, stage_plan, self.checkpointing and self.training)
            out = gather_tokens(x, stage_plan.raster)
            out = self.norm(out) if stage.merge is None else out
            maps.append(rearrange(out, "b (h w) c -> b c h w", h=images.shape[-2] // self.embed.patch // 2**number))
            x = x if stage.merge is None else stage.merge(gather_tokens(x, stage_plan.leave))
        return maps

    def dense_plan(self, images: torch.Tensor) -> "Plan":
        """The plan for whole images of any size that units divide."""
        h, w = images.shape[-2:]
        if h % self.unit or w % self.unit:
            raise ValueError(f"an image of {h} x {w} pixels is not made of whole units of {self.unit} pixels")
        return self.whole_plan(h // self.unit, w // self.unit, images.device)

    def whole_plan(self, rows: int, columns: int, device) -> "Plan":
        """The plan of so many units without hidden ones."""
        return cached_plan(
            ("swin", rows, columns, self.windows, self.depths, self.shift, str(device)),
            lambda: make_plan(np.ones((rows, columns), bool), self.windows, self.depths, device, shift=self.shift),
        )


def swin_nano(**overrides) -> Swin:
    """For studies of 32 px images on a CPU: patch 4, two stages, units of 8 px; 2.1 M parameters."""
    return Swin(**dict(image_size=32, patch=4, window=4, width=96, depths=(2, 4), heads=(3, 6)) | overrides)


def swin_micro(**overrides) -> Swin:
    """For images of 32 to 64 px: patch 2, three stages, units of 8 px; 5.9 M parameters."""
    return Swin(**dict(image_size=32, patch=2, window=4, width=96, depths=(2, 4, 2), heads=(3, 6, 12)) | overrides)


def swin_tiny(**overrides) -> Swin:
    return Swin(**dict(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)) | overrides)


def swin_small(**overrides) -> Swin:
    return Swin(**dict(width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)) | overrides)


def swin_base(**overrides) -> Swin:
    return Swin(**dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)) | overrides)


def swin_large(**overrides) -> Swin:
    return Swin(**dict(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)) | overrides)


def mixmim_base(**overrides) -> Swin:
    """MixMAE's network, by the name in its code: Swin-B with windows of 14, no shift, and positions (Liu et al. 2023)."""
    return swin_base(**dict(window=14, shift=False, positions=True) | overrides)


MODELS = {f.__name__: f for f in (swin_nano, swin_micro, swin_tiny, swin_small, swin_base, swin_large, mixmim_base)}


# The index plan. Settled once per mask, on token *numbers*, outside the blocks. Tokens attend inside their own window; a shift only changes the numbers of
# windows. Windows (all full when dense, unevenly filled when units are hidden) are packed into groups of equal size, and a token pair whose window numbers
# differ is masked: GreenMIM's group window attention (Huang et al. 2022). The residual stream is kept in the order of the current block's groups, so a block
# costs one gather at the most, and dense is merely the case in which every unit is visible.


@dataclass
class Layout:
    """How one block sees its tokens: the move that brings them into its groups (None: they stay), and which pairs may attend."""

    gather_index: Permutation | None  # from the order of the block before
    pairs: torch.Tensor  # (g or 1, s, s or more): row of the relative position table; apart any row, for a GPU adds up gradients of one row in turn
    apart: torch.Tensor | None  # the same shape, bool: in different windows; None where a window is a group


@dataclass
class StagePlan:
    layouts: list[Layout]  # of even blocks (plain windows) and odd blocks (shifted windows)
    leave: (
        Permutation | None
    )  # to the four children of each token of the next stage; after the last stage to raster order
    raster: Permutation | None  # to raster order of this stage's map


@dataclass
class Plan:
    """Everything about a mask that the blocks need, as index tensors. Built by `make_plan`."""

    patches: torch.Tensor  # (t,) raster number of the patch in each slot of the first block
    hidden: torch.Tensor | None  # (t,) bool, slots to fill with the mask token; None where hidden units are left out
    stages: list[StagePlan]
    fits: bool  # False: an unusual mask needed more groups than others of its size, so its shapes differ


def make_plan(
    visible: np.ndarray,
    windows: Sequence[int],
    depths: Sequence[int],
    device="cpu",
    partition: bool = False,
    shift: bool = True,
) -> Plan:
    """The plan for a mask (rows, columns), bool over units, on `device`. windows, depths: of each stage.

    partition: the tokens of hidden units are kept too, and each kind attends to its own only (MixMAE). shift: odd blocks have shifted windows.
    The number of tokens per side of a unit halves from stage to stage, down to 1.
    """

    def tensor(index):
        # pairs are counted in 32 bits, which is faster to build; used in 64, whose gradient torch adds up thirteen times as fast
        return (
            None
            if index is None
            else torch.from_numpy(index if index.dtype == bool else index.astype(np.int64)).to(device)
        )

    rows, columns = visible.shape
    kept = np.ones_like(visible) if partition else visible
    stages, fits, last = [], True, None
    for number, (window, depth) in enumerate(zip(windows, depths)):
        cell = 2 ** (len(windows) - 1 - number)
        height, width = rows * cell, columns * cell
        raster = np.flatnonzero(kept.repeat(cell, 0).repeat(cell, 1))
        source = visible.ravel()[raster // width // cell * columns + raster % width // cell] if partition else 0
        plain, pairs, apart, plain_fits = group_tokens(raster, height, width, window, False, source)
        layouts = [Layout(None, tensor(pairs), tensor(apart))]
        if stages:
            stages[-1].leave = permutation(last, child_tokens(plain, width), device)
        else:
            patches = np.maximum(plain, 0)
        last = plain
        if shift and window < max(height, width):
            shifted, pairs, apart, shifted_fits = group_tokens(raster, height, width, window, True, source)
            layouts[0].gather_index = permutation(shifted, plain, device)
            layouts.append(Layout(permutation(plain, shifted, device), tensor(pairs), tensor(apart)))
            fits, last = fits and shifted_fits, shifted if depth % 2 == 0 else plain
        fits = fits and plain_fits
        stages.append(StagePlan(layouts, None, permutation(last, raster, device)))
    stages[-1].leave = stages[-1].raster
    return Plan(tensor(patches), None, stages, fits)
