"""What all encoders share: the base classes, the blocks, attention inside groups, and how tokens are moved by a plan.

`Encoder` is the contract that models and programs rely on. `HierarchicalEncoder` is the part that Swin and Twins share.
plan.py computes the plan of a mask with numpy; `to_tensors` turns it into tensors, and `gather_tokens` moves tokens by
it.

Axis letters: b batch, t tokens, c channels, g groups, s slots of a group, h heads, d head width, v encoded units.
A *unit* is the square of pixels that one final token covers.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from plan import Permutation, Plan, make_plan, units_of


def to_tensors(value, device):
    """The same nest of dataclasses and lists with a tensor on `device` in place of every numpy array; integers in 64
    bits.

    numpy computes relative position indices in 32 bits, which is faster. torch adds up gradients thirteen times as fast
    by indices of 64 bits.
    """
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(value)
        return (tensor if tensor.dtype == torch.bool else tensor.long()).to(device)
    if isinstance(value, list):
        return [to_tensors(item, device) for item in value]
    if is_dataclass(value):
        return replace(value, **{f.name: to_tensors(getattr(value, f.name), device) for f in fields(value)})
    return value


# the last plans of whole images; a dict, which torch.compile can look into, as it cannot into lru_cache
_PLAN_CACHE = {}
_PLAN_LOCK = Lock()  # masks are drawn in a thread beside the training step


def cached_plan(key: tuple, make):
    """The plan of a key, computed by make() the first time."""
    plan = _PLAN_CACHE.get(key)
    if plan is None:
        with _PLAN_LOCK, torch.inference_mode(False):  # a plan made during inference must serve training too
            plan = _PLAN_CACHE[key] = make()
            while len(_PLAN_CACHE) > 32:
                del _PLAN_CACHE[next(iter(_PLAN_CACHE))]
    return plan


class Gather(torch.autograd.Function):
    """x[:, index], whose backward pass is a gather too, by the inverse index.

    torch's own backward pass adds gradients up by index. On a GPU these are atomic additions, which are not
    deterministic, and are slow or fail when compiled in 16 bits (pytorch issues 137425 and 179418). A `Permutation`
    uses each token once, so there is nothing to add up.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, unread):
        ctx.save_for_backward(inverse, unread)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, gradient):
        inverse, unread = ctx.saved_tensors
        gradient = gradient.index_select(1, inverse)
        if unread is not None:  # an empty slot went nowhere: what stands at its inverse is another token's gradient
            gradient = gradient.masked_fill(unread[:, None], 0)
        return gradient, None, None, None


def gather_tokens(x: torch.Tensor, order: Permutation | None) -> torch.Tensor:
    """Tokens x (b, t, c) in another order; unchanged where it is None."""
    return x if order is None else Gather.apply(x, order.index, order.inverse, order.unread)


# ---------------------------------------------------------------------------------------------------------- layers


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v inside each group.

    Args:
        q: (b, h, g, s, d), as k and v.
        bias: (h or 1, g or 1, s, s or more), -inf for pairs that may not attend. The last axis may be padded.
    """
    if q.is_cuda:
        return attend_fused(q, k, v, bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # on a CPU this is faster than torch's fused attention
    return scores.add_(bias[..., : q.shape[-2]]).softmax(-1) @ v


def attend_fused(q, k, v, bias):
    """`attend` by torch's fused kernels, which take four axes and do not store the (s, s) scores for the backward
    pass.
    """
    heads, groups, slots = q.shape[1:4]
    bias = bias.to(q.dtype)
    if bias.shape[-1] > slots:  # a slice of everything would cost a copy in the backward pass
        bias = bias[..., :slots]
    if bias.shape[1] == 1:  # all groups have the same bias: they join the batch, and nothing is copied
        q, k, v = (rearrange(x, "b h g s d -> (b g) h s d") for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None, :, 0])
        return rearrange(out, "(b g) h s d -> b h g s d", g=groups)
    bias = bias.expand(heads, -1, -1, -1).flatten(0, 1)[None]  # groups with biases of their own count as heads
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(1, (heads, groups))


class Attention(nn.Module):
    """Multi-head self-attention of all tokens to all, without positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class GroupAttention(Attention):
    """Multi-head self-attention inside the groups of a plan."""

    def forward(self, x, bias):
        """x: (b, g * s, c). bias: (h or 1, g or 1, s, s or more), added to the scores; -inf between windows."""
        qkv = rearrange(self.qkv(x), "b (g s) (three h d) -> three b h g s d", three=3, h=self.heads, s=bias.shape[-2])
        # On a CPU one copy serves both matrix products, which would otherwise copy q, k and v each.
        q, k, v = qkv if x.is_cuda else qkv.contiguous()
        return self.proj(rearrange(attend(q, k, v, bias), "b h g s d -> b (g s) (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention, x + MLP, each on normalized input; with stochastic depth per sample (Huang et al. 2016).

    Args:
        width: Channels of a token.
        attention: A module of (x, *layout), where `layout` is what the block is called with besides x.
        drop_path: Probability that a sample skips a residual branch in training.
        eps: Of the layer norms.
    """

    def __init__(self, width: int, attention: nn.Module, drop_path: float, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width)
        self.keep_prob = 1 - drop_path

    def forward(self, x, *layout):
        x = x + self.drop(self.attention(self.norm1(x), *layout))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x):
        if self.keep_prob == 1 or not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) < self.keep_prob) / self.keep_prob


def run_block(block: Block, checkpointing: bool, x: torch.Tensor, *layout) -> torch.Tensor:
    """block(x, *layout). checkpointing: recompute it in the backward pass instead of storing what is inside."""
    return checkpoint(block, x, *layout, use_reentrant=False) if checkpointing else block(x, *layout)


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """Stochastic depth of each block: from 0, linearly, to `drop_path` for the last one."""
    return [drop_path * i / max(1, depth - 1) for i in range(depth)]


class PatchEmbedding(nn.Module):
    """Pixels of each patch to one token: a strided convolution, written as a linear layer; normalized in Swin and
    Twins.
    """

    def __init__(self, patch: int, width: int, norm: bool = True, channels: int = 3):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.proj = nn.Linear(channels * patch * patch, width)
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm else nn.Identity()

    def forward(self, images, patches, hidden=None, mask_token=None):
        """Tokens (b, t, width) of some patches.

        Args:
            images: (b, channels, height, width).
            patches: (t,) raster numbers of patches. Patches that are not listed are never read: this is how masked ones
                are left out.
            hidden: (t,) bool, True = the mask token replaces this token.
            mask_token: (width,). Without it or without `hidden`, every token is computed from its pixels.
        """
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        x = self.norm(self.proj(x.index_select(1, patches)))
        if hidden is None or mask_token is None:
            return x
        return torch.where(hidden[:, None], mask_token.to(x.dtype), x)


def init_linear(module: nn.Module):
    """Initialize a linear layer as in Swin's, timm's and Twins' code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions, as in MAE (rows * columns, width).

    The first half of the channels is for the row, the second for the column. MAE's code has the column first.
    """
    rate = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = [torch.arange(count)[:, None] * rate for count in (rows, columns)]
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)  # (rows or columns, width / 2)
    return torch.cat([repeat(row, "i d -> (i j) d", j=columns), repeat(column, "j d -> (i j) d", i=rows)], dim=1)


# ---------------------------------------------------------------------------------------------------------- encoders


def height_and_width(image_size: int | Sequence[int], unit: int) -> tuple[int, int]:
    """Height and width in pixels of an image size, which is both, or one number for a square.

    Raises:
        ValueError: If a side is not a multiple of the unit.
    """
    sides = [image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) > 2 or any(side < unit or side % unit for side in sides):
        near = "x".join(str(max(1, round(side / unit)) * unit) for side in sides)
        size = "x".join(map(str, sides))
        raise ValueError(
            f"image size {size} is not a multiple of the unit, {unit} pixels that one final token covers: try {near}"
        )
    return sides[0], sides[-1]


class Encoder(nn.Module):
    """What a model, a training program and the figures may ask of an encoder, and what all encoders share.

    A subclass sets `norm`, and defines `blocks`, `encode` and `layer_of`, which returns the last number for names that
    it does not know. If its tokens do not all attend to each other, it also defines `make_plan` and `plan_settings`.
    Its constructor takes `image_size`, `window`, `drop_path` and `channels`, used or not. An encoder that is no
    subclass works too if it has the public attributes, `plan`, `forward` and `layer_of`. Optional are `partitions` and
    `pyramid(images)`, feature maps of all stages.

    Attributes:
        image_size: Height and width in pixels of the images that masks are for.
        channels: Of an image.
        unit: Pixels per side of a unit.
        rows, columns, units: Units per column and per row, and rows * columns.
        width: Channels of final tokens.
        stem_width: Channels of tokens as they leave the patch embedding.
        blocks: In the order in which they compute; what activation checkpointing wraps.
        checkpointing: Set by a program: recompute each block in the backward pass, which takes less memory and more
            time.
        undecayed: Endings of names of parameters without weight decay, besides those of one axis.
        partitions: True where `plan` takes partition=True: all units, with attention inside the visible ones and inside
            the masked ones (MixMAE).
    """

    undecayed: tuple[str, ...] = ()
    partitions = False
    plan_settings: tuple = ()  # what a plan depends on besides the mask

    def __init__(self, image_size: int | Sequence[int], embed: PatchEmbedding, stages: int = 1):
        """stages: between two of them, merging halves the map and doubles the width."""
        super().__init__()
        self.scale = 2 ** (stages - 1)  # patches per side of a unit
        self.unit, self.channels = embed.patch * self.scale, embed.channels
        self.image_size = height_and_width(image_size, self.unit)
        self.rows, self.columns = (side // self.unit for side in self.image_size)
        self.units = self.rows * self.columns
        self.stem_width = embed.proj.out_features
        self.width = self.stem_width * self.scale
        self.checkpointing = False
        self.embed = embed

    def encode(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Final tokens after the final norm, (b, v, width), from patch tokens x (b, t, stem_width) with positions."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter for layer-wise learning rates: 0 is the patch embedding, the last is the final
        norm.
        """
        raise NotImplementedError

    def position_table(self, rows: int, columns: int) -> torch.Tensor | None:
        """Positions (rows * columns, stem_width) that are added to the tokens of so many patches; None: there are
        none.
        """

    def make_plan(self, visible: np.ndarray) -> Plan:
        """The plan in numpy of a mask (rows, columns), bool. This one serves encoders whose tokens all attend to each
        other.
        """
        return Plan(np.flatnonzero(visible))

    def plan(self, visible: torch.Tensor, dense: bool = False, device="cpu", **options) -> Plan:
        """The plan of a mask.

        Its attribute `fits` is False where a mask needs other shapes than most masks of its size. The result is correct
        then too, and only slower where the network is compiled; see model.EESMM.draw.

        Args:
            visible: (units,) bool, True = visible.
            dense: For use with a mask token: all units are encoded, and the mask only says which are masked.
            device: Of the plan's tensors.
            options: Of `make_plan`: a Swin takes `partition`.

        Raises:
            ValueError: For a mask of another length or type, or one that leaves nothing visible.
        """
        if visible.dtype != torch.bool or visible.shape != (self.units,):
            raise ValueError(
                f"visible must be a bool tensor of {self.units} units, True = visible; "
                f"got {visible.dtype} of shape {tuple(visible.shape)}"
            )
        if not visible.any():
            raise ValueError("every unit is masked: nothing is left to encode")
        if not dense:
            mask = rearrange(visible.cpu(), "(i j) -> i j", i=self.rows).numpy()
            return to_tensors(self.make_plan(mask, **options), device)
        plan = self.whole_plan(self.rows, self.columns, device)
        if visible.all():
            return plan
        return replace(plan, hidden=~visible.to(device)[units_of(plan.patches, self.columns, self.scale)])

    def whole_plan(self, rows: int, columns: int, device) -> Plan:
        """The plan of so many units, all visible."""
        return cached_plan(
            (type(self).__name__, *self.plan_settings, rows, columns, str(device)),
            lambda: to_tensors(self.make_plan(np.ones((rows, columns), bool)), device),
        )

    def dense_plan(self, images: torch.Tensor) -> Plan:
        """The plan of whole images of any size that is a multiple of the unit, not necessarily `image_size`."""
        h, w = images.shape[-2:]
        if h % self.unit or w % self.unit:
            raise ValueError(f"an image of {h} x {w} pixels is not made of whole units of {self.unit} pixels")
        return self.whole_plan(h // self.unit, w // self.unit, images.device)

    def tokens(self, images: torch.Tensor, plan: Plan, mask_token: torch.Tensor | None = None) -> torch.Tensor:
        """Patch tokens with positions (b, t, stem_width), in the order of the first block."""
        x = self.embed(images, plan.patches, plan.hidden, mask_token)
        positions = self.position_table(*(side // self.embed.patch for side in images.shape[-2:]))
        return x if positions is None else x + positions.index_select(0, plan.patches)

    def forward(
        self, images: torch.Tensor, visible: torch.Tensor | Plan | None = None, mask_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final tokens after the final norm, (b, v, width), in raster order of the units encoded.

        Args:
            images: (b, channels, h, w), normalized.
            visible: None: encode all units. Else a mask (units,), bool, or its plan on the images' device (built with
                `dense` for a mask token).
            mask_token: (stem_width,). With it all units are encoded, and it replaces masked patches after the embedding
                (SimMIM).

        Raises:
            ValueError: For a mask with images of another size than `image_size`, where its units would be other ones.
        """
        if visible is None:
            plan = self.dense_plan(images)
        elif tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"masks are for images of {self.image_size[0]} x {self.image_size[1]} pixels, got images of "
                f"{images.shape[-2]} x {images.shape[-1]}: "
                "build the encoder with this image_size, or encode without a mask"
            )
        elif isinstance(visible, torch.Tensor):
            plan = self.plan(visible, mask_token is not None, images.device)
        else:
            plan = visible
        return self.encode(self.tokens(images, plan, mask_token), plan)


class HierarchicalEncoder(Encoder):
    """What Swin and Twins share: windows, and stages with a merging layer between two of them.

    A subclass sets `stages` and `norm`. A stage is a module of (x, stage_plan, checkpointing), with `blocks`, and
    `merge`, None in the last one.

    Args:
        image_size: Pixels, a multiple of the unit, patch * 2^(stages - 1); one number for a square, or height and
            width.
        patch: Pixels per side of a patch.
        window: Tokens per side. A stage whose map is smaller shrinks the window to its longer side.
        width: Channels of the first stage.
        depths: Blocks of each stage.
        channels: Of an image.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch: int,
        window: int,
        width: int,
        depths: Sequence[int],
        channels: int,
    ):
        if window < 1:
            raise ValueError(f"window {window}: give at least 1 token")
        super().__init__(image_size, PatchEmbedding(patch, width, channels=channels), len(depths))
        self.depths = tuple(depths)
        self.windows = tuple(min(window, max(self.image_size) // patch // 2**i) for i in range(len(depths)))

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def make_plan(self, visible: np.ndarray, **options) -> Plan:
        return make_plan(visible, *self.plan_settings, **options)

    def run_stages(self, x, plan):
        """Yields what the last block of each stage returns (b, t, c), with the stage's plan."""
        for stage, stage_plan in zip(self.stages, plan.stages):
            x = stage(x, stage_plan, self.checkpointing and self.training)
            yield x, stage_plan
            if stage.merge is not None:
                x = stage.merge(gather_tokens(x, stage_plan.to_next_stage))

    def encode(self, x, plan):
        for x, stage_plan in self.run_stages(x, plan):
            pass  # run all stages; the tokens of the last one are returned
        return self.norm(gather_tokens(x, stage_plan.to_raster))

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of all stages for dense images, [(b, c, h / 4, w / 4), (b, 2c, h / 8, w / 8), ...] for patch 4.

        Each is what the last block of its stage returns; only the last map has passed the final norm.
        """
        plan, maps = self.dense_plan(images), []
        for x, stage_plan in self.run_stages(self.tokens(images, plan), plan):
            x = gather_tokens(x, stage_plan.to_raster)
            x = self.norm(x) if len(maps) == len(self.stages) - 1 else x
            maps.append(rearrange(x, "b (h w) c -> b c h w", h=stage_plan.height))
        return maps

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter, as the authors of BEiT and Swin count: 0 is the patch embedding, then one number
        per block; 0-25 for Swin-B.

        A merging layer counts with the last block of the stage that it closes, Twins' positions with the first block of
        their stage.
        """
        kind, *rest = name.split(".")
        if kind == "embed":
            return 0
        if kind != "stages":
            return sum(self.depths) + 1
        stage, part = int(rest[0]), rest[1]
        before = sum(self.depths[:stage])
        if part == "blocks":
            return before + int(rest[2]) + 1
        return before + (self.depths[stage] if part == "merge" else 1)
