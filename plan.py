"""The index plan of a mask: which token stands in which slot, and which slots attend to each other (section 5). numpy
only.

An encoder that computes visible tokens only leaves masked tokens out of every tensor (`make_plan` lists the tokens of
visible units). What is left of Swin's windows is uneven: some windows are full, some are empty, many are partly filled.
The windows are therefore packed into groups of equal size, and `attn_mask` lets a token attend only to tokens of its
own window: GreenMIM's group window attention (Huang et al. 2022).

The result is exactly that of dense attention restricted to visible tokens. Attention is the only layer in which tokens
meet (and merging, which joins four tokens of one unit, all visible or all masked), and each visible token attends to
all visible tokens of its window and to nothing else.

Nothing here looks at a feature, so a plan is computed once per mask, on token numbers, before the first block runs.
Shifted windows only change the numbers of windows (`window_numbers`). A dense image is the case in which every unit is
visible.

Words: a *unit* is the square of pixels that one final token covers; masks hide units. A token's *raster number* is row
* width + column on the map of its stage. Axis letters: t tokens, g groups, s slots of a group. `backbone.to_tensors`
turns a plan into tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # a numpy array here, a tensor of the same shape after `backbone.to_tensors`


@dataclass
class Permutation:
    """How to move tokens from one order to another: a permutation, apart from empty slots, whose values nobody
    reads.
    """

    index: Array  # (new slots,) the old slot that each token comes from; any slot for an empty one
    inverse: Array  # (old slots,) the new slot that each token goes to; any slot for an empty one
    unread: Array | None  # (old slots,) bool, True = this old slot is empty; None where none is


@dataclass
class Layout:
    """How one block sees its tokens."""

    # from the order of the block before, which the first block of a stage does not use; None: the order is the same
    gather_index: Permutation | None
    relative_position_index: Array  # (g or 1, s, s or more) row of the relative position bias table, for query and key
    attn_mask: Array | None  # the same shape, bool, True = may attend (same window); None: all pairs may


@dataclass
class StagePlan:
    """What the blocks of one stage need. Tokens are kept in the order of the current block's groups, so a block costs
    at most one gather.
    """

    height: int  # of the stage's map, in tokens
    width: int
    layouts: list[Layout]  # of even blocks (plain windows) and, where windows are shifted, of odd blocks
    to_raster: Permutation | None  # from the last block's order to raster order
    to_next_stage: Permutation | None = None  # to the four children of each token of the next stage; not for the last
    # the rest is for Twins only
    to_units: Permutation | None = None  # to the tokens of each unit, unit by unit
    tokens: Array | None = None  # (t,) raster numbers of the encoded tokens, ascending
    from_map: Permutation | None = None  # from the whole map in raster order to the slots


@dataclass
class Plan:
    """Everything about a mask that an encoder needs."""

    patches: Array  # (t,) raster number of the patch in each slot of the first block
    hidden: Array | None = None  # (t,) bool, slots that the mask token fills; None where masked tokens are left out
    stages: list[StagePlan] = field(default_factory=list)
    fits: bool = True  # False: an unusual mask needed more groups than others of its size, so its shapes differ


def units_of(tokens: Array, columns: int, scale: int) -> Array:
    """Number of the unit that each token lies in.

    Args:
        tokens: Raster numbers, an array or a tensor of integers.
        columns: Units per row of the map.
        scale: Tokens per side of a unit.
    """
    width = columns * scale
    row, column = tokens // width, tokens % width
    return row // scale * columns + column // scale


def window_numbers(tokens: np.ndarray, height: int, width: int, window: int, shifted: bool) -> np.ndarray:
    """Number of the window that each token lies in. The numbers have gaps; only whether two are equal matters.

    Shifted windows are the same squares moved by window // 2 and cut off at the border: the regions that Swin's cyclic
    shift and its mask produce. A side of the map that is not longer than the window has one window and no shift. Where
    the window does not divide the map, border windows are smaller; torchvision pads the map with zeros there, and
    attends to them.

    Args:
        tokens: (t,) raster numbers on a map of height x width tokens.
        height: Of the map, in tokens.
        width: Of the map, in tokens.
        window: Tokens per side of a window.
        shifted: True for the odd blocks of Swin.
    """
    offset = window - window // 2 if shifted else 0
    row = (tokens // width + (offset if window < height else 0)) // window
    column = (tokens % width + (offset if window < width else 0)) // window
    return row * (width // window + 2) + column


def pack_windows(sizes: Sequence[int], slots: int, groups: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Put windows into groups: from the largest to the smallest, each into the fullest group with room (best fit,
    decreasing).

    Args:
        sizes: Tokens in each window.
        slots: Slots of a group.
        groups: How many groups there should be.

    Returns:
        The group of each window, its first slot there, and the number of groups, which exceeds `groups` where these do
        not hold all windows.
    """
    group, first = np.zeros(len(sizes), int), np.zeros(len(sizes), int)
    room = [slots] * groups  # free slots of each group
    for window in sorted(range(len(sizes)), key=lambda window: -sizes[window]):
        fitting = [(free, k) for k, free in enumerate(room) if free >= sizes[window]]
        if not fitting:
            fitting = [(slots, len(room))]
            room.append(slots)
        free, k = min(fitting)
        group[window], first[window] = k, slots - free
        room[k] -= sizes[window]
    return group, first, len(room)


def group_shape(tokens: int, window: int, share: float) -> tuple[int, int]:
    """Number of groups and slots of a group. The same for all masks with equally many visible units, so shapes are
    static.

    Dense windows are full, so each is a group. Uneven windows go two to three into a group with 4 % of its slots spare,
    which nearly every random mask fits. Where more than half of the tokens are visible, many windows are full and pack
    worse, so more slots are spare. Up to four windows' worth of tokens make one group.

    Args:
        tokens: Number of visible tokens.
        window: Tokens per side of a window.
        share: Fraction of the map's tokens that are visible.
    """
    area = window * window
    if share == 1:
        return -(-tokens // area), min(area, tokens)
    if tokens <= 4 * area:
        return 1, tokens
    groups = -(-tokens // (2 * area))
    slots = (1.04 + 0.4 * max(0, share - 0.5)) * tokens / groups
    return groups, 4 * int(np.ceil(slots / 4))


def group_tokens(
    tokens: np.ndarray, height: int, width: int, window: int, shifted: bool, source: np.ndarray | int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]:
    """Pack the windows of one kind of block into groups.

    Args:
        tokens: (t,) raster numbers of the tokens to encode, ascending.
        height: Of the map, in tokens.
        width: Of the map, in tokens.
        window: Tokens per side of a window.
        shifted: Whether the windows are shifted.
        source: (t,) which image each token shows; tokens of different images do not attend to each other (MixMAE).

    Returns:
        The token in each slot (g * s,), -1 for an empty slot; `relative_position_index` and `attn_mask` of a `Layout`,
        whose last axis is padded to a multiple of 8, which a GPU's fused attention reads without a copy; and whether
        the usual number of groups sufficed.
    """
    number = np.unique(window_numbers(tokens, height, width, window, shifted), return_inverse=True)[1]
    sizes = np.bincount(number)  # visible tokens of each window
    share = len(tokens) / (height * width)
    usual_groups, slots = group_shape(len(tokens), window, share)
    group, first, groups = pack_windows(sizes.tolist(), slots, usual_groups)

    # With one group, plain and shifted windows share the order, and no block moves a token.
    slot = position = np.arange(len(tokens))
    if groups > 1:
        starts = np.cumsum(sizes) - sizes  # of each window, if tokens are sorted by window
        rank = np.empty(len(tokens), int)  # place of a token inside its window
        rank[np.argsort(number, kind="stable")] = position - np.repeat(starts, sizes)
        slot = group[number] * slots + first[number] + rank
    order = np.full(groups * slots, -1)
    order[slot] = tokens

    # An empty slot is a window of its own: it attends to itself, and nothing attends to it, so it gets no gradient.
    owner = -1 - np.arange(groups * slots).reshape(groups, slots)
    owner.flat[slot] = 2 * number + source
    padding = (0, 0), (0, -slots % 8)
    keys = np.pad(owner, padding, constant_values=-1 - groups * slots)  # nothing attends to the padding
    attn_mask = owner[:, :, None] == keys[:, None, :]
    grouped = np.maximum(order, 0).reshape(groups, slots)
    index = position_index(grouped, np.pad(grouped, padding), width, window)
    # Where all groups look alike, as in dense images, one set of biases serves them all.
    if (attn_mask == attn_mask[:1]).all() and ((index == index[:1]) | ~attn_mask).all():
        index, attn_mask = index[:1], attn_mask[:1]
    if share == 1 and attn_mask[..., :slots].all():
        attn_mask = None
    return order, index, attn_mask, groups == usual_groups or share == 1


def position_index(queries: np.ndarray, keys: np.ndarray, width: int, window: int) -> np.ndarray:
    """Swin's relative position index: the row of the bias table (2 * window - 1)^2 for each query and key of a group.

    Args:
        queries: (g, s) raster numbers.
        keys: (g, s or more) raster numbers.
        width: Of the map, in tokens.
        window: Tokens per side of a window.

    Returns:
        (g, s, s or more) integers. Pairs of different windows may not attend, so any row does for them.
    """
    differences = 2 * window - 1  # inside a window, rows and columns differ by -(window - 1) ... window - 1
    queries, keys = queries.astype(np.uint32)[:, :, None], keys.astype(np.uint32)[:, None, :]
    row_difference = (queries // width + (window - 1)) - keys // width  # counted from 0
    column_difference = (queries % width + (window - 1)) - keys % width
    index = row_difference * differences + column_difference
    # The remainder changes no pair of one window. It brings the other pairs into the table, spread over its rows and
    # not all at one: in the backward pass a GPU adds up the gradients of one row serially. Integers are unsigned (a
    # negative difference wraps around, and any row will do for it), because their remainder takes half the time.
    return (index % np.uint32(differences**2)).view(np.int32)


def slots_of(tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The slot of an order in which each token is; 0 for tokens that are -1."""
    slot = np.zeros(max(tokens.max(), order.max()) + 2, int)
    slot[order] = np.arange(len(order))
    slot[-1] = 0  # what an empty slot holds does not matter
    return slot[tokens]


def permutation(old: np.ndarray, new: np.ndarray) -> Permutation | None:
    """The move from one order to another, both given as the token in each slot (-1: empty); None where they are the
    same.
    """
    if np.array_equal(old, new):
        return None
    unread = old < 0
    return Permutation(slots_of(new, old), slots_of(old, new), unread if unread.any() else None)


def child_tokens(order: np.ndarray, width: int) -> np.ndarray:
    """The four tokens of the finer map under each token of a map of `width` columns, (t * 4,), in the order of Swin's
    patch merging.
    """
    finer_width = 2 * width
    corner = 2 * (order // width) * finer_width + 2 * (order % width)
    children = corner[:, None] + np.array([0, finer_width, 1, finer_width + 1])
    return np.where(order[:, None] < 0, -1, children).ravel()


def make_plan(
    visible: np.ndarray,
    windows: Sequence[int],
    depths: Sequence[int],
    shift: bool = True,
    global_attention: bool = False,
    partition: bool = False,
) -> Plan:
    """The plan of a mask, for Swin and Twins. The tokens per side of a unit halve from stage to stage, down to 1.

    Args:
        visible: (rows, columns) bool over units, True = visible.
        windows: Tokens per side of a window, for each stage.
        depths: Number of blocks of each stage.
        shift: Whether odd blocks have shifted windows.
        global_attention: Whether to add what Twins' global attention and its convolution need.
        partition: Encode the tokens of masked units too; visible and masked ones each attend to their own kind only
            (MixMAE).
    """
    rows, columns = visible.shape
    encoded = np.ones_like(visible) if partition else visible
    stages, fits, order = [], True, None
    for number, (window, depth) in enumerate(zip(windows, depths)):
        scale = 2 ** (len(windows) - 1 - number)  # tokens per side of a unit
        height, width = rows * scale, columns * scale
        tokens = np.flatnonzero(encoded.repeat(scale, 0).repeat(scale, 1))  # masked tokens are left out here
        units = units_of(tokens, columns, scale)
        source = visible.ravel()[units] if partition else 0

        plain, index, attn_mask, plain_fits = group_tokens(tokens, height, width, window, False, source)
        layouts = [Layout(None, index, attn_mask)]
        if stages:
            stages[-1].to_next_stage = permutation(order, child_tokens(plain, width))
        else:
            patches = np.maximum(plain, 0)
        order = plain  # after the last block
        fits &= plain_fits
        if shift and window < max(height, width):
            shifted, index, attn_mask, shifted_fits = group_tokens(tokens, height, width, window, True, source)
            layouts[0].gather_index = permutation(shifted, plain)
            layouts.append(Layout(permutation(plain, shifted), index, attn_mask))
            order = plain if depth % 2 else shifted
            fits &= shifted_fits
        stages.append(StagePlan(height, width, layouts, permutation(order, tokens)))
        if global_attention:
            grid = np.full(height * width, -1)
            grid[tokens] = tokens
            stages[-1].to_units = permutation(order, tokens[np.argsort(units, kind="stable")])
            stages[-1].tokens = tokens
            stages[-1].from_map = permutation(grid, order)
    return Plan(patches, None, stages, fits)
