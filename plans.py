"""Index plans: which tokens a Swin block attends over when only some units are visible (section 3.1 and 5).

Settled once per mask, on token *numbers*, outside the blocks. Tokens attend inside their own window; a shift only
changes the numbers of windows. Windows (all full when dense, unevenly filled when units are hidden) are packed into
groups of equal size, and a token pair whose window numbers differ is masked: GreenMIM's group window attention
(Huang et al. 2022). The residual stream is kept in the order of the current block's groups, so a block costs one
gather at the most, and dense is merely the case in which every unit is visible.

    plan = make_plan(visible, windows=(7, 7, 7, 7), depths=(2, 2, 18, 2), dense=False)

Axis letters: b batch, t tokens or slots, c channels, g groups, s slots of a group.
Drawn in `notebooks/04_visible_only.ipynb`.
"""
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache

import numpy as np
import torch


@dataclass
class Move:
    """A change of token order: x[:, index]. `inverse` leads back; `unused` are slots of the old order left behind."""
    index: torch.Tensor
    inverse: torch.Tensor
    unused: torch.Tensor


@dataclass
class Layout:
    """How one block sees its tokens: the move into its groups (None: stay) and which pairs may attend."""
    move: Move | None
    pairs: torch.Tensor  # (g or 1, s, s): row of the relative position table; its last row stands for "other window"


@dataclass
class StagePlan:
    layouts: list[Layout]  # of even blocks (plain windows) and odd blocks (shifted windows)
    leave: Move | None   # to the four children of each token of the next stage; after the last stage to raster order
    raster: Move | None  # to raster order of this stage's map


@dataclass
class Plan:
    """Everything about a mask that the blocks need, as index tensors. Built by `make_plan`, moved by `to_device`."""
    patches: torch.Tensor        # (t,) raster number of the patch in each slot of the first block
    hidden: torch.Tensor | None  # (t,) bool, slots to fill with the mask token; None where hidden units are left out
    stages: list[StagePlan]
    units: int                   # number of units returned
    fits: bool                   # False: an unusual mask needed more groups than others of its size, so its shapes differ


def to_device(value, device, non_blocking: bool = False):
    """The same nest of dataclasses and lists with every tensor on `device`."""
    if isinstance(value, torch.Tensor):
        if value.device.type == torch.device(device).type:
            return value
        if non_blocking and value.device.type == "cpu":
            value = value.pin_memory()  # a copy from pageable memory would make the host wait for the device
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, list):
        return [to_device(item, device, non_blocking) for item in value]
    if is_dataclass(value):
        return replace(value, **{f.name: to_device(getattr(value, f.name), device, non_blocking) for f in fields(value)})
    return value


def window_numbers(tokens: np.ndarray, height: int, width: int, window: int, shifted: bool) -> np.ndarray:
    """Number of the window that each token (raster number in a height x width map) lies in.

    Shifted windows are the same squares moved by window // 2, cut off at the border: the regions that Swin's cyclic
    shift and mask produce. An axis no longer than the window has one window and no shift. Where the window does not
    divide the map, border windows are smaller; torchvision pads the map with zeros instead and attends to them.
    """
    def along(position, size):
        return (position + (window - window // 2 if shifted and window < size else 0)) // window

    row, column = along(tokens // width, height), along(tokens % width, width)
    return row * (width // window + 2) + column


def pack(sizes: Sequence[int], slots: int, groups: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best-fit decreasing: put windows of `sizes` tokens into groups of `slots`.

    Returns the group and the first slot of each window, and the number of groups, more than `groups` where these
    do not hold all windows.
    """
    group, first = np.zeros(len(sizes), int), np.zeros(len(sizes), int)
    room = [(slots, k) for k in range(groups)]  # kept sorted, so the tightest fit is found by bisection
    for window in sorted(range(len(sizes)), key=lambda window: -sizes[window]):
        size = sizes[window]
        k = bisect_left(room, (size, -1))
        if k == len(room):
            room.append((slots, groups))
            groups += 1
        free, group[window] = room.pop(k)
        first[window] = slots - free
        insort(room, (free - size, int(group[window])))
    return group, first, groups


def group_shape(tokens: int, window: int, share: float) -> tuple[int, int]:
    """(groups, slots) for `tokens` tokens, a `share` of the map: static for all masks with equally many visible units.

    Dense windows are full: one per group. Uneven ones go two to three into a group with 4 % of its slots spare, which
    nearly every random mask fits; where more than half is visible many windows are full, pack worse and get more. Up
    to four windows' worth of tokens make one group without a spare slot.
    """
    area = window * window
    if share == 1:
        return -(-tokens // area), min(area, tokens)
    if tokens <= 4 * area:
        return 1, tokens
    groups = -(-tokens // (2 * area))
    return groups, 4 * int(np.ceil((1.04 + 0.4 * max(0, share - 0.5)) * tokens / groups / 4))


def _arrange(tokens, height, width, window, shifted):
    """Groups of one kind of block: (the token in each slot, -1 for none; pairs; whether the usual shape sufficed)."""
    number = np.unique(window_numbers(tokens, height, width, window, shifted), return_inverse=True)[1]
    sizes = np.bincount(number)
    share = len(tokens) / (height * width)
    usual, slots = group_shape(len(tokens), window, share)
    group, first, groups = pack(sizes.tolist(), slots, usual)
    if groups > 1:
        by_window = np.argsort(number, kind="stable")
        tokens, number = tokens[by_window], number[by_window]
        rank = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of a token inside its window
        slot = group[number] * slots + first[number] + rank
    else:
        slot = np.arange(len(tokens))  # plain and shifted windows then share one order, and no block moves a token

    order = np.full(groups * slots, -1)
    order[slot] = tokens
    # an empty slot is a window of its own: it attends to itself, nothing attends to it, so it gets no gradient
    owner = -1 - np.arange(groups * slots)
    owner[slot] = number
    # (row difference, column difference) as one number, linear in the token's place: a table row is a subtraction
    span = 2 * window - 1
    place = np.where(order < 0, 0, order // width * span + order % width).reshape(groups, slots).astype(np.int32)
    owner = owner.reshape(groups, slots)
    pairs = np.where(owner[:, :, None] == owner[:, None, :],
                     place[:, :, None] - place[:, None, :] + np.int32((window - 1) * (span + 1)), np.int32(span * span))
    if (pairs == pairs[:1]).all():
        pairs = pairs[:1]
    # counted in 32 bits, which is faster to build; used in 64, whose gradient torch adds up thirteen times as fast
    return order, torch.from_numpy(pairs).long(), groups == usual or share == 1


def _move(old: np.ndarray, new: np.ndarray) -> Move | None:
    """The move between two orders, given as the token in each slot (-1: empty); None where they are the same."""
    if np.array_equal(old, new):
        return None
    index, inverse = np.zeros(len(new), int), np.zeros(len(old), int)
    at = np.zeros(max(old.max(), new.max()) + 1, int)
    at[old[old >= 0]] = np.flatnonzero(old >= 0)
    index[new >= 0] = at[new[new >= 0]]
    at[new[new >= 0]] = np.flatnonzero(new >= 0)
    inverse[old >= 0] = at[old[old >= 0]]
    return Move(*(torch.from_numpy(x) for x in (index, inverse, np.flatnonzero(old < 0))))


def _children(order: np.ndarray, width: int) -> np.ndarray:
    """The four tokens of the finer map (of width 2 * width) under each token, (t * 4,), as Swin's merging orders them."""
    corner = np.where(order < 0, -1, order // width * 4 * width + order % width * 2)[:, None]
    below, right = 2 * width, 1
    return np.where(corner < 0, -1, corner + np.array([0, below, right, below + right])).ravel()


def make_plan(visible: np.ndarray, windows: Sequence[int], depths: Sequence[int], dense: bool) -> Plan:
    """The plan for a mask.

    visible: (rows, columns) bool over units; windows, depths: of each stage. dense: keep the tokens of hidden units
    and mark them in `Plan.hidden`. Tokens per side of a unit halve from stage to stage, down to 1.
    """
    rows, columns = visible.shape
    kept = np.ones_like(visible) if dense else visible
    stages, fits, last = [], True, None
    for number, (window, depth) in enumerate(zip(windows, depths)):
        cell = 2 ** (len(windows) - 1 - number)
        height, width = rows * cell, columns * cell
        raster = np.flatnonzero(kept.repeat(cell, 0).repeat(cell, 1))
        plain, pairs, plain_fits = _arrange(raster, height, width, window, False)
        layouts = [Layout(None, pairs)]
        if stages:
            stages[-1].leave = _move(last, _children(plain, width))
        else:
            patches = np.maximum(plain, 0)
            hidden = ~visible.ravel()[patches // width // cell * columns + patches % width // cell]
        last = plain
        if window < max(height, width):
            shifted, pairs, shifted_fits = _arrange(raster, height, width, window, True)
            layouts[0].move = _move(shifted, plain)
            layouts.append(Layout(_move(plain, shifted), pairs))
            fits, last = fits and shifted_fits, shifted if depth % 2 == 0 else plain
        fits = fits and plain_fits
        stages.append(StagePlan(layouts, None, _move(last, raster)))
    stages[-1].leave = stages[-1].raster
    return Plan(torch.from_numpy(patches), torch.from_numpy(hidden) if hidden.any() else None, stages,
                int(kept.sum()), fits)


@lru_cache(maxsize=32)
def dense_plan(rows: int, columns: int, windows: tuple, depths: tuple, device: torch.device) -> Plan:
    """The plan of a map without hidden units; those last used are kept."""
    with torch.inference_mode(False):  # a plan made while inferring serves training too
        return to_device(make_plan(np.ones((rows, columns), bool), windows, depths, True), device)


class _Reorder(torch.autograd.Function):
    """x[:, index] whose gradient is read back by the inverse order: a gather, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx, x, index, inverse, unused):
        ctx.save_for_backward(inverse, unused)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, gradient):
        inverse, unused = ctx.saved_tensors
        return gradient.index_select(1, inverse).index_fill_(1, unused, 0), None, None, None


def reorder(x: torch.Tensor, move: Move | None) -> torch.Tensor:
    """Tokens x (b, t, c) in the order that `move` leads to."""
    return x if move is None else _Reorder.apply(x, move.index, move.inverse, move.unused)
