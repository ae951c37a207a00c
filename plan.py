"""Which tokens a block attends over, for an encoder that computes visible tokens only. numpy only: backbone.py turns it into tensors."""

from collections.abc import Sequence

import numpy as np


def window_numbers(tokens: np.ndarray, height: int, width: int, window: int, shifted: bool) -> np.ndarray:
    """Number of the window that each token (raster number in a height x width map) lies in.

    Shifted windows are the same squares moved by window // 2, cut off at the border: the regions that Swin's cyclic shift and mask produce. An axis no longer
    than the window has one window and no shift. Where the window does not divide the map, border windows are smaller; torchvision pads the map and attends there.
    """

    def along(position, size):
        return (position + (window - window // 2 if shifted and window < size else 0)) // window

    row, column = along(tokens // width, height), along(tokens % width, width)
    return row * (width // window + 2) + column


def pack_windows(sizes: Sequence[int], slots: int, groups: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best-fit decreasing: put windows of `sizes` tokens into groups of `slots`.

    Returns the group and the first slot of each window, and the number of groups, more than `groups` where these do not hold all windows.
    """
    group, first, room = np.zeros(len(sizes), int), np.zeros(len(sizes), int), [slots] * groups
    for window in sorted(range(len(sizes)), key=lambda window: -sizes[window]):
        free, k = min(((free, k) for k, free in enumerate(room) if free >= sizes[window]), default=(slots, len(room)))
        if k == len(room):
            room.append(slots)
        group[window], first[window], room[k] = k, slots - free, free - sizes[window]
    return group, first, len(room)


def group_shape(tokens: int, window: int, share: float) -> tuple[int, int]:
    """(groups, slots) for `tokens` tokens, a `share` of the map: static for all masks with equally many visible units.

    Dense windows are full: one per group. Uneven ones go two to three into a group with 4 % of its slots spare, which nearly every random mask fits; where more
    than half is visible many are full, pack worse and get more. Up to four windows' worth of tokens make one group."""
    area = window * window
    if share == 1:
        return -(-tokens // area), min(area, tokens)
    if tokens <= 4 * area:
        return 1, tokens
    groups = -(-tokens // (2 * area))
    return groups, 4 * int(np.ceil((1.04 + 0.4 * max(0, share - 0.5)) * tokens / groups / 4))


def group_tokens(
    tokens, height, width, window, shifted, source=0
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]:
    """Groups of one kind of block: (the token in each slot, -1 for none; pairs; apart; whether the usual shape sufficed).

    Rows of both are stored in multiples of 8, which a GPU's fused attention reads without a copy. source: which image each token is of; those of
    different ones do not attend to each other, as if in different windows."""
    number = np.unique(window_numbers(tokens, height, width, window, shifted), return_inverse=True)[1]
    sizes, share = np.bincount(number), len(tokens) / (height * width)
    usual, slots = group_shape(len(tokens), window, share)
    group, first, groups = pack_windows(sizes.tolist(), slots, usual)
    source = np.broadcast_to(source, number.shape)
    if groups > 1:
        by_window = np.argsort(number, kind="stable")
        tokens, number, source = tokens[by_window], number[by_window], source[by_window]
        rank = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of a token inside its window
        slot = group[number] * slots + first[number] + rank
    else:
        slot = np.arange(len(tokens))  # plain and shifted windows then share one order, and no block moves a token
    order = np.full(groups * slots, -1)
    order[slot] = tokens
    # an empty slot is a window of its own: it attends to itself, nothing attends to it, so it gets no gradient
    owner = -1 - np.arange(groups * slots).reshape(groups, slots)
    owner.flat[slot] = 2 * number + source
    # (row difference, column difference) as one number, linear in the token's place: a table row is a subtraction
    span = 2 * window - 1
    place = np.where(order < 0, 0, order // width * span + order % width).reshape(groups, slots).astype(np.uint32)
    ahead = (window - 1) * (span + 1) + (height + width) * span * span  # never negative: twice as fast to divide
    pairs = (place[:, :, None] - place[:, None, :] + np.uint32(ahead)) % np.uint32(span * span)
    apart = owner[:, :, None] != owner[:, None, :]
    if (apart == apart[:1]).all() and (apart | (pairs == pairs[:1])).all():
        pairs, apart = pairs[:1], apart[:1]
    stored = np.zeros((2, len(pairs), slots, slots + -slots % 8), np.int32)
    stored[..., :slots] = pairs, apart
    return order, stored[0], None if share == 1 and not apart.any() else stored[1] != 0, groups == usual or share == 1


def slots_of(tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The slot of an order in which each token is; 0 for tokens that are -1."""
    at = np.zeros(max(tokens.max(), order.max()) + 2, int)
    at[order] = np.arange(len(order))
    at[-1] = 0  # what an empty slot holds does not matter
    return at[tokens]


def child_tokens(order: np.ndarray, width: int) -> np.ndarray:
    """The four tokens of the finer map (of width 2 * width) under each token, (t * 4,), as Swin's merging orders them."""
    corner = np.where(order < 0, -1, order // width * 4 * width + order % width * 2)[:, None]
    below, right = 2 * width, 1
    return np.where(corner < 0, -1, corner + np.array([0, below, right, below + right])).ravel()
