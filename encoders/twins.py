"""Twins-SVT (Chu et al. 2021), dense or on visible units only, exactly: no sparse convolutions, no approximation.

    encoder = twins_large()                      # 224 px, 49 units of 32 px
    encoder(images)                              # dense:          (b, 49, 1024)
    encoder(images, visible)                     # visible units:  (b, 12, 1024) for a mask with 12 of 49 visible
    encoder(images, visible, mask_token=token)   # all tokens, hidden ones replaced after the patch embedding (SimMIM)
    encoder.pyramid(images)                      # feature maps of all stages, for detection and segmentation

Blocks take turns. Even ones attend inside windows, packed into groups as in swin.py; they never shift. In odd ones every token
attends to summaries, one for each unit: a hidden unit has none. After the first block of a stage a 3 x 3 convolution tells
tokens where they are; hidden tokens are zeros to it. Axis letters: those of swin.py; v units encoded, r tokens of a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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
    with_hidden,
)
from plan import child_tokens, group_tokens


class LocalAttention(nn.Module):
    """Attention inside windows, without positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias):
        """x (b, g * s, c); bias (g or 1, s, s or more): 0 within a window, -inf between windows."""
        qkv = rearrange(self.qkv(x), "b (g s) (three h d) -> three b h g s d", three=3, h=self.heads, s=bias.shape[-2])
        q, k, v = qkv if x.is_cuda else qkv.contiguous()
        return self.proj(rearrange(attend(q, k, v, bias[None]), "b h g s d -> b (g s) (h d)"))


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

    def forward(self, x, units):
        """x (b, t, c); units: the move to the tokens of each unit, (v * r) in all, unit by unit."""
        y = gather_tokens(x, units)
        if self.reduce is not None:
            y = self.norm(self.reduce(rearrange(y, "b (v r) c -> b v (r c)", r=self.tokens)))
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(self.kv(y), "b v (two h d) -> two b h v d", two=2, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class Merge(nn.Module):
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
        self.blocks = nn.ModuleList(
            Block(
                width,
                GlobalAttention(width, heads, tokens) if number % 2 else LocalAttention(width, heads),
                drop_path,
                eps=1e-6,
            )
            for number, drop_path in enumerate(drop_paths)
        )
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.normal_(self.positions.weight, std=(2 / 9) ** 0.5)
        nn.init.zeros_(self.positions.bias)
        self.merge = None if last else Merge(width)

    def forward(self, x, plan: "StagePlan", height: int, width: int, checkpointing: bool):
        for number, block in enumerate(self.blocks):
            layout = plan.units if number % 2 else plan.bias
            x = checkpoint(block, x, layout, use_reentrant=False) if checkpointing else block(x, layout)
            if number == 0:
                x = x + self.place(x, plan, height, width)
        return x

    def place(self, x, plan, height, width):
        """What the convolution over the map, where hidden tokens are zeros, says to each token (b, t, c)."""
        grid = x.new_zeros(len(x), height * width, x.shape[-1]).index_copy(
            1, plan.tokens.long(), gather_tokens(x, plan.raster)
        )
        grid = self.positions(rearrange(grid, "b (h w) c -> b c h w", h=height))
        grid = rearrange(grid, "b c h w -> b (h w) c")
        return gather_tokens(grid, plan.places)


class Twins(nn.Module):
    """Twins-SVT encoder without a classifier. Heads are 32 channels wide.

    image_size: pixels, a multiple of the unit, patch * 2^(stages - 1) pixels, what one final token covers and one summary stands
    for: one number for a square, or height and width. channels: of an image. window: tokens per side; a smaller map is one window. Where windows do not divide the map, border
    windows are smaller; timm pads with zeros and attends to them. drop_path: stochastic depth of the last block, rising
    linearly from 0. Dense images of other sizes (multiples of the unit) are taken too. What else may be asked: encoders.Encoder.
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
        super().__init__()
        last = len(depths) - 1
        self.unit = patch * 2**last
        self.image_size = height_and_width(
            image_size, self.unit, f"the unit, {self.unit} pixels (patch {patch} x 2^{last} for {len(depths)} stages)"
        )
        if width % 32:
            raise ValueError(f"width {width}: give a multiple of 32, the channels of a head")
        if window < 1:
            raise ValueError(f"window {window}: give at least 1 token")
        self.depths, self.patch, self.channels = tuple(depths), patch, channels
        self.rows, self.columns = (side // self.unit for side in self.image_size)
        self.units = self.rows * self.columns
        self.width, self.stem_width = width * 2**last, width
        self.windows = tuple(min(window, max(self.image_size) // patch // 2**i) for i in range(len(depths)))
        self.checkpointing = False  # recompute each block in the backward pass instead of storing it

        self.embed = PatchEmbedding(patch, width, channels=channels)
        rates = iter(drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            Stage(width * 2**i, 4 ** (last - i), [next(rates) for _ in range(depth)], i == last)
            for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.apply(init_linear)

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they compute."""
        return [block for stage in self.stages for block in stage.blocks]

    def plan(self, visible: torch.Tensor, dense: bool = False, device="cpu") -> "Plan":
        """The plan of a mask (units,) bool; `dense` for use with a mask token. ValueError for what is no such mask."""
        check_visible(visible, self.units)
        if dense:  # all tokens are there: only which of them are hidden is the mask's
            return with_hidden(
                self.whole_plan(self.rows, self.columns, device),
                visible.to(device),
                self.columns,
                2 ** (len(self.depths) - 1),
            )
        return make_plan(rearrange(visible.cpu(), "(i j) -> i j", i=self.rows).numpy(), self.windows, device)

    def layer_of(self, name: str) -> int:
        """0 is the patch embedding, then one number per block; positions count with the first block of their stage, a merging layer
        with the last; the final norm comes last."""
        kind, *rest = name.split(".")
        if kind == "embed":
            return 0
        if kind == "stages":
            stage, before = int(rest[0]), sum(self.depths[: int(rest[0])])
            return (
                before
                + {
                    "blocks": int(rest[2]) + 1 if rest[1] == "blocks" else 0,
                    "positions": 1,
                    "merge": self.depths[stage],
                }[rest[1]]
            )
        return sum(self.depths) + 1

    def forward(
        self, images: torch.Tensor, visible: "torch.Tensor | Plan | None" = None, mask_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens after the final norm, (b, units encoded, width), in raster order; the arguments are those of encoders.Encoder."""
        if visible is None:
            plan = self.dense_plan(images)
        else:
            check_masked_images(images, self.image_size)
            plan = visible if isinstance(visible, Plan) else self.plan(visible, mask_token is not None, images.device)
        x = self.embed(images, plan.patches)
        if mask_token is not None and plan.hidden is not None:
            x = torch.where(plan.hidden[:, None], mask_token.to(x.dtype), x)
        for stage, stage_plan, x in self.run(images, x, plan):
            pass
        return self.norm(gather_tokens(x, stage_plan.raster))

    def run(self, images, x, plan):
        """Stage after stage: (stage, its plan, what its last block returns)."""
        height, width = (side // self.patch for side in images.shape[-2:])
        for number, (stage, stage_plan) in enumerate(zip(self.stages, plan.stages)):
            x = stage(x, stage_plan, height // 2**number, width // 2**number, self.checkpointing and self.training)
            yield stage, stage_plan, x
            x = x if stage.merge is None else stage.merge(gather_tokens(x, stage_plan.leave))

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of all stages, dense, [(b, c, h / 4, w / 4), (b, 2c, h / 8, w / 8), ...] for patch 4.

        Each map is what its stage's last block returns; the final norm is applied to the last one only.
        """
        plan, maps = self.dense_plan(images), []
        for stage, stage_plan, x in self.run(images, self.embed(images, plan.patches), plan):
            out = gather_tokens(x, stage_plan.raster)
            out = self.norm(out) if stage.merge is None else out
            maps.append(rearrange(out, "b (h w) c -> b c h w", h=images.shape[-2] // self.patch // 2 ** len(maps)))
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
            ("twins", rows, columns, self.windows, str(device)),
            lambda: make_plan(np.ones((rows, columns), bool), self.windows, device),
        )


def twins_micro(**overrides) -> Twins:
    """For images of 32 to 64 px: patch 2, three stages, units of 8 px; 2.8 M parameters."""
    return Twins(**dict(image_size=32, patch=2, window=4, width=64, depths=(2, 4, 2)) | overrides)


def twins_small(**overrides) -> Twins:
    return Twins(**dict(width=64, depths=(2, 2, 10, 4)) | overrides)


def twins_base(**overrides) -> Twins:
    return Twins(**dict(width=96, depths=(2, 2, 18, 2)) | overrides)


def twins_large(**overrides) -> Twins:
    return Twins(**dict(width=128, depths=(2, 2, 18, 2)) | overrides)


MODELS = {f.__name__: f for f in (twins_micro, twins_small, twins_base, twins_large)}


# ======================================================================================================================
# The index plan: that of swin.py without shifts, so that a stage has one order of tokens.
# ======================================================================================================================


@dataclass
class StagePlan:
    bias: torch.Tensor  # (g or 1, s, s or more, stored as swin.Layout's pairs): 0 within a window, -inf between windows
    units: Permutation | None  # to the tokens of each unit, (v * r) in all, unit by unit
    tokens: torch.Tensor  # (v * r,) raster numbers of the tokens there are, rising
    raster: Permutation | None  # to that order
    places: Permutation | None  # from the whole map, in raster order, to the slots
    leave: Permutation | None  # to the four children of each token of the next stage


@dataclass
class Plan:
    """Everything about a mask that the network needs, as index tensors."""

    patches: torch.Tensor  # (t,) raster number of the patch in each slot
    hidden: torch.Tensor | None  # (t,) bool, slots to fill with the mask token; None where hidden units are left out
    stages: list[StagePlan]
    fits: bool  # see swin.Plan


def make_plan(visible: np.ndarray, windows: Sequence[int], device="cpu") -> Plan:
    """The plan for a mask (rows, columns) over units, on `device`. windows: of each stage."""

    def tensor(index):
        return torch.from_numpy(index).long().to(device)

    stages, fits, last = [], True, None
    for number, window in enumerate(windows):
        cell = 2 ** (len(windows) - 1 - number)
        width = visible.shape[1] * cell
        tokens = np.flatnonzero(visible.repeat(cell, 0).repeat(cell, 1))
        order, pairs, apart, fit = group_tokens(tokens, visible.shape[0] * cell, width, window, False)
        if last is not None:
            stages[-1].leave = permutation(last, child_tokens(order, width), device)
        owner = tokens // width // cell * visible.shape[1] + tokens % width // cell  # the unit of each token
        grid = np.full(visible.size * cell * cell, -1)
        grid[tokens] = tokens
        bias = torch.from_numpy(
            np.where(np.zeros_like(pairs, bool) if apart is None else apart, -np.inf, 0).astype(np.float32)
        )
        stages.append(
            StagePlan(
                bias.to(device),
                permutation(order, tokens[np.argsort(owner, kind="stable")], device),
                tensor(tokens),
                permutation(order, tokens, device),
                permutation(grid, order, device),
                None,
            )
        )
        fits, last = fits and fit, order
        if number == 0:
            patches = np.maximum(order, 0)
    return Plan(tensor(patches), None, stages, fits)
