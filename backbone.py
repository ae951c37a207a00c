"""What all encoders share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from plan import slots_of


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v inside each group. q, k, v: (b, h, g, s, d); bias: (h or 1, g or 1, s, s or more)."""
    if q.is_cuda:
        return attend_fused(q, k, v, bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # on a CPU the plain form is the faster one
    return scores.add_(bias[..., : q.shape[-2]]).softmax(-1) @ v


def attend_fused(q, k, v, bias):
    """The same by torch's fused kernels, which take four axes, and do not keep the (s, s) scores for the backward pass."""
    bias = bias.to(q.dtype)
    bias = (
        bias if bias.shape[-1] == q.shape[-2] else bias[..., : q.shape[-2]]
    )  # a slice of all would cost a copy in the backward pass
    if bias.shape[1] == 1:  # groups join the batch, and nothing is copied
        out = F.scaled_dot_product_attention(
            *(rearrange(x, "b h g s d -> (b g) h s d") for x in (q, k, v)), attn_mask=bias[None, :, 0]
        )
        return rearrange(out, "(b g) h s d -> b h g s d", g=q.shape[2])
    bias = bias.expand(q.shape[1], -1, -1, -1).flatten(0, 1)[None]  # groups with biases of their own count as heads
    return F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=bias).unflatten(
        1, q.shape[1:3]
    )


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention, x + MLP, each on normalised input; with stochastic depth per sample (Huang et al. 2016).

    attention: a module of (x, *layout), where `layout` is what the block is called with besides x; here, pairs and apart of a `Layout`.
    """

    def __init__(self, width: int, attention: nn.Module, drop_path: float, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width)
        self.kept = 1 - drop_path

    def forward(self, x, *layout):
        x = x + self.drop(self.attention(self.norm1(x), *layout))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x):
        if self.kept == 1 or not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) < self.kept) / self.kept


class PatchEmbedding(nn.Module):
    """Pixels of each patch to one token: a strided convolution, written as a linear layer; normalised in Swin and Twins."""

    def __init__(self, patch: int, width: int, norm: bool = True, channels: int = 3):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, width)
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm else nn.Identity()

    def forward(self, images, patches):
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return self.norm(self.proj(x.index_select(1, patches)))


def init_linear(module: nn.Module):
    """Linear layers begin as in Swin's, timm's and Twins' code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions (rows * columns, width): half of the width for the row, half for the column (MAE)."""
    rate = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = [torch.arange(count)[:, None] * rate for count in (rows, columns)]
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)  # (rows or columns, width / 2)
    return torch.cat([repeat(row, "i d -> (i j) d", j=columns), repeat(column, "j d -> (i j) d", i=rows)], dim=1)


def height_and_width(image_size: int | Sequence[int], unit: int, means: str) -> tuple[int, int]:
    """Height and width of an image size: both, or one number for a square. ValueError where it is not made of whole units. means: what a unit is."""
    given = [image_size] if isinstance(image_size, int) else list(image_size)
    if len(given) > 2 or any(side < unit or side % unit for side in given):
        near = "x".join(str(max(1, round(side / unit)) * unit) for side in given)
        raise ValueError(f"image size {'x'.join(map(str, given))} is not a multiple of {means}: try {near}")
    return given[0], given[-1]


def check_visible(visible: torch.Tensor, units: int):
    """ValueError for a mask of another length or type than (units,) bool, or one that leaves nothing visible."""
    if visible.dtype != torch.bool or visible.shape != (units,):
        raise ValueError(
            f"visible must be a bool tensor of {units} units, True = visible; got {visible.dtype} of shape {tuple(visible.shape)}"
        )
    if not visible.any():
        raise ValueError("every unit is hidden: nothing is left to encode")


def check_masked_images(images: torch.Tensor, image_size: tuple[int, int]):
    """ValueError for images (b, c, h, w) of another size than masks are for: a mask's patches would be others there."""
    if tuple(images.shape[-2:]) != tuple(image_size):
        raise ValueError(
            f"masks are for images of {image_size[0]} x {image_size[1]} pixels, got images of {images.shape[-2]} x {images.shape[-1]}: "
            "build the encoder with this image_size, or encode without a mask"
        )


@dataclass
class Permutation:
    """Tokens from one order to another: a permutation, apart from empty slots, whose values nobody reads. See `reorder`."""

    index: torch.Tensor  # (new slots,) the slot that each token comes from; any slot for an empty one
    inverse: torch.Tensor  # (old slots,) the slot that each token goes to; any slot for an empty one
    unread: torch.Tensor | None  # (old slots,) bool, the empty slots of the old order; None where there are none


def permutation(old: np.ndarray, new: np.ndarray, device="cpu") -> Permutation | None:
    """The move from one order to another, both given as the token in each slot (-1: empty); None where they are the same."""
    if np.array_equal(old, new):
        return None
    unread = torch.from_numpy(old < 0).to(device) if (old < 0).any() else None
    return Permutation(
        *(torch.from_numpy(slots_of(tokens, order)).to(device) for tokens, order in ((new, old), (old, new))), unread
    )


def with_hidden(whole, visible: torch.Tensor, columns: int, cell: int):
    """A plan of all tokens in which those of hidden units are marked. visible: (units,) in rows of `columns`, on the plan's device; cell: tokens per side of a unit."""
    patches, width = whole.patches, columns * cell
    return (
        whole
        if visible.all()
        else replace(whole, hidden=~visible[patches // width // cell * columns + patches % width // cell])
    )


_PLAN_CACHE = {}  # the last plans of whole images; a dict, which torch.compile can look into, as it cannot into lru_cache


_PLAN_LOCK = Lock()  # masks are drawn in a thread beside the training step


def cached_plan(key: tuple, make):
    """The plan of a key, made by make() the first time."""
    plan = _PLAN_CACHE.get(key)
    if plan is None:
        with _PLAN_LOCK, torch.inference_mode(False):  # a plan made while inferring serves training too
            plan = _PLAN_CACHE[key] = make()
            while len(_PLAN_CACHE) > 32:
                del _PLAN_CACHE[next(iter(_PLAN_CACHE))]
    return plan


class Gather(torch.autograd.Function):
    """x[:, index], whose backward pass is a gather too. torch's own adds gradients up by index, with atomic additions on a GPU: not deterministic, and slow
    or failing when compiled in 16 bits (pytorch issues 137425, 179418)."""

    @staticmethod
    def forward(ctx, x, index, inverse, unread):
        ctx.save_for_backward(inverse, unread)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, gradient):
        inverse, unread = ctx.saved_tensors
        gradient = gradient.index_select(1, inverse)
        return gradient if unread is None else gradient.masked_fill(unread[:, None], 0), None, None, None


def gather_tokens(x: torch.Tensor, order: Permutation | None) -> torch.Tensor:
    """Tokens x (b, t, c) in another order; as they are where it is None."""
    return x if order is None else Gather.apply(x, order.index, order.inverse, order.unread)
