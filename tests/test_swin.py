"""swin.py against torchvision's Swin, and its visible-only path against its dense path with hidden tokens kept out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from einops import rearrange
from helpers import slow

import encoders
import mixing
import swin
from backbone import _PLAN_CACHE, Block, attend, attend_fused, cached_plan, gather_tokens
from plan import window_numbers


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def copy_from_torchvision(peer, ours):
    """torchvision's weights into our encoder, by position: both list modules in the same order."""
    theirs = {k: v for k, v in peer.state_dict().items() if not k.startswith("head") and "position_index" not in k}
    sizes = {k: v.shape for k, v in ours.state_dict().items()}
    names = []
    for stage in range(len(ours.depths)):
        for block in range(ours.depths[stage]):
            for a, b in [
                ("norm1", "norm1"),
                ("attention.qkv", "attn.qkv"),
                ("attention.proj", "attn.proj"),
                ("norm2", "norm2"),
                ("mlp.up", "mlp.0"),
                ("mlp.down", "mlp.3"),
            ]:
                names += [
                    (f"stages.{stage}.blocks.{block}.{a}.{x}", f"features.{2 * stage + 1}.{block}.{b}.{x}")
                    for x in ("weight", "bias")
                ]
            names.append(
                (
                    f"stages.{stage}.blocks.{block}.attention.table",
                    f"features.{2 * stage + 1}.{block}.attn.relative_position_bias_table",
                )
            )
        if stage < len(ours.depths) - 1:
            names += [
                (f"stages.{stage}.merge.{a}", f"features.{2 * stage + 2}.{a}")
                for a in ("norm.weight", "norm.bias", "reduction.weight")
            ]
    for x in ("weight", "bias"):
        names += [
            (f"embed.proj.{x}", f"features.0.0.{x}"),
            (f"embed.norm.{x}", f"features.0.2.{x}"),
            (f"norm.{x}", f"norm.{x}"),
        ]
    assert {b for _, b in names} == set(theirs)
    ours.load_state_dict({a: theirs[b].reshape(sizes[a]) for a, b in names})


@pytest.mark.parametrize(
    "name, peer", slow([("swin_tiny", "swin_t"), ("swin_base", "swin_b")], fast=[("swin_tiny", "swin_t")])
)
def test_equals_torchvision(name, peer):
    torch.manual_seed(0)
    peer = getattr(torchvision.models, peer)(weights=None).eval()
    ours = swin.MODELS[name]().eval()
    for module in peer.modules():  # tables large enough to matter
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.normal_(module.relative_position_bias_table)
    copy_from_torchvision(peer, ours)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = peer.norm(peer.features(images))
        worst = (rearrange(expected, "b h w c -> b (h w) c") - ours(images)).abs().max().item()
        assert worst < 1e-5, worst
        maps = [peer.features[: 2 * k + 2](images) for k in range(4)]
        maps[-1] = expected
        for ours_map, their_map in zip(ours.pyramid(images), maps):
            assert difference(ours_map, rearrange(their_map, "b h w c -> b c h w")) < 1e-5


def reference(encoder, images, visible):
    """Dense Swin written plainly, on maps, in which hidden tokens are kept out of attention: an oracle without
    plans.
    """
    x = encoder.embed(images, torch.arange((images.shape[-1] // encoder.embed.patch) ** 2))
    side = images.shape[-1] // encoder.embed.patch
    for number, stage in enumerate(encoder.stages):
        window, cell = encoder.windows[number], side // encoder.rows
        seen = rearrange(visible, "(i j) -> i j", i=encoder.rows).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        r, c = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        alone = torch.eye(side * side, dtype=torch.bool)  # a hidden token attends to itself, so that softmax is defined
        for k, block in enumerate(stage.blocks):
            shift = window // 2 if k % 2 and window < side else 0
            wr, wc = (
                torch.div(r - shift, window, rounding_mode="floor"),
                torch.div(c - shift, window, rounding_mode="floor"),
            )
            together = (wr[:, None] == wr) & (wc[:, None] == wc) & seen.flatten() | alone
            dr, dc = r[:, None] - r, c[:, None] - c
            row = ((dr + window - 1) * (2 * window - 1) + dc + window - 1).clamp(0, len(block.attention.table) - 1)
            bias = block.attention.table[row].permute(2, 0, 1).masked_fill(~together, float("-inf"))
            h = block.norm1(x)
            q, k_, v = rearrange(block.attention.qkv(h), "b t (n h d) -> n b h t d", n=3, h=block.attention.heads)
            a = (q @ k_.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v
            x = x + block.attention.proj(rearrange(a, "b h t d -> b t (h d)"))
            x = x + block.mlp(block.norm2(x))
        if stage.merge is not None:
            m = rearrange(x, "b (h w) c -> b h w c", h=side)
            m = torch.cat([m[:, 0::2, 0::2], m[:, 1::2, 0::2], m[:, 0::2, 1::2], m[:, 1::2, 1::2]], -1)
            x = stage.merge.reduction(stage.merge.norm(rearrange(m, "b h w c -> b (h w) c")))
            side //= 2
    return encoder.norm(x)[:, visible]


CASES = [
    dict(image_size=96, patch=2, window=6, depths=(2, 1, 2), heads=(1, 2, 4)),  # window divides no map evenly
    dict(image_size=112, patch=4, window=7, depths=(2, 3), heads=(1, 2)),
    dict(image_size=112, patch=4, window=14, depths=(2, 2, 2), heads=(1, 2, 4)),
    dict(image_size=64, patch=2, window=4, depths=(2, 2, 2), heads=(1, 2, 4)),
    dict(image_size=160, patch=4, window=7, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)),
]  # borders of more than half a window


@pytest.mark.parametrize(
    "case, dtype, limit",
    slow(
        [(case, *of_dtype) for case in CASES for of_dtype in ((torch.float64, 1e-9), (torch.float32, 1e-5))],
        fast=[(CASES[1], torch.float64, 1e-9), (CASES[4], torch.float64, 1e-9)],
    ),
    ids=lambda value: f"{value['image_size']}px-window{value['window']}" if isinstance(value, dict) else None,
)
def test_visible_only_equals_dense_without_hidden_tokens(case, dtype, limit):
    torch.manual_seed(1)
    encoder = swin.Swin(width=16, **case).to(dtype)
    for name, parameter in encoder.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, case["image_size"], case["image_size"], dtype=dtype)
    for seed, ratio in enumerate([0.75, 0.5, 0.9]):
        visible = mixing.draw_masks(1, encoder.units, ratio, torch.Generator().manual_seed(seed))[0]
        both = []
        for path in (encoder(images, visible), reference(encoder, images, visible)):
            weight = torch.linspace(-1, 1, path.numel(), dtype=dtype).view_as(path)
            gradients = torch.autograd.grad((path * weight).sum(), list(encoder.parameters()))
            both.append([path, torch.cat([gradient.flatten() for gradient in gradients])])
        for ours, expected in zip(*both):
            assert difference(ours, expected) < limit


@pytest.mark.parametrize(
    "window, image_size, ratio",
    slow(
        [(*of_map, ratio) for of_map in ((6, 192), (7, 224), (14, 224)) for ratio in (None, 0.6, 0.75, 0.9)],
        fast=[(6, 192, 0.6), (7, 224, 0.75), (14, 224, None)],
    ),
)
def test_plan_moves_every_visible_token_exactly_once(window, image_size, ratio):
    encoder = swin.Swin(image_size=image_size, window=window, width=8, heads=(1, 1, 1, 1), depths=(2, 2, 3, 2))
    for seed in range(10 if ratio else 1):
        visible = (
            mixing.draw_masks(1, encoder.units, ratio, torch.Generator().manual_seed(seed))[0]
            if ratio
            else torch.ones(encoder.units, dtype=torch.bool)
        )
        plan = encoder.plan(visible)
        track = plan.patches  # follow raster numbers of tokens through all moves; empty slots carry any number
        for number, stage in enumerate(plan.stages):
            cell = 8 // 2**number
            side = encoder.rows * cell
            seen = visible.view(encoder.rows, encoder.rows).numpy().repeat(cell, 0).repeat(cell, 1)
            follow = lambda move: track if move is None else track[move.index]
            for block in range(encoder.depths[number]):
                layout = stage.layouts[block % len(stage.layouts)]
                track = follow(layout.gather_index) if block else track
                check_layout(layout, track, seen, side, encoder.windows[number], shifted=block % 2 == 1)
            assert np.array_equal(follow(stage.to_raster), np.flatnonzero(seen))
            if number < 3:
                children = follow(stage.to_next_stage).view(-1, 4)
                row, column = children[:, :1] // side, children[:, :1] % side
                track = row[:, 0] // 2 * (side // 2) + column[:, 0] // 2
                held = seen.ravel()[children].all(1) & (row[:, 0] % 2 == 0).numpy() & (column[:, 0] % 2 == 0).numpy()
                corners = row * side + column + torch.tensor([0, side, 1, side + 1])
                assert (children == corners)[torch.from_numpy(held)].all()
                assert set(np.flatnonzero(seen)) == set(children[torch.from_numpy(held)].flatten().tolist())


def check_layout(layout, track, seen, side, window, shifted):
    """Every visible token sits in one slot, whose pairs that may attend are exactly the tokens of its window."""
    slots, rows = layout.relative_position_index.shape[1], layout.relative_position_index.shape[2]
    assert (
        rows == -(-slots // 8) * 8
        and layout.relative_position_index.min() >= 0
        and layout.relative_position_index.max() < (2 * window - 1) ** 2
    )
    index = layout.relative_position_index
    attn_mask = torch.ones_like(index, dtype=torch.bool) if layout.attn_mask is None else layout.attn_mask
    other = ~attn_mask[..., :slots].expand(len(track) // slots, -1, -1)
    numbers = track.view(len(other), -1)
    empty = (~other).sum(-1) == 1  # attends to itself alone: empty, or a window with one visible token
    tokens = np.flatnonzero(seen)
    windows = dict(zip(tokens, window_numbers(tokens, side, side, window, shifted)))
    held = []
    for g in range(len(other)):
        for window_of_slot in {tuple((~other[g, s]).nonzero().flatten().tolist()) for s in range(slots)}:
            held.append(frozenset(numbers[g, list(window_of_slot)].tolist()))
    expected = {}
    for token, number in windows.items():
        expected.setdefault(number, set()).add(token)
    assert set(map(frozenset, expected.values())) <= set(held)
    assert len(held) - len(expected) == len(track) - len(tokens)  # the rest are empty slots, each by itself
    assert empty.sum() >= len(track) - len(tokens)


def test_plan_shapes_are_static_and_nearly_full():
    encoder = swin.Swin(width=8, heads=(1, 1, 1, 1))
    shapes, fits = set(), 0
    for seed in range(200):
        plan = encoder.plan(mixing.draw_masks(1, 49, 0.75, torch.Generator().manual_seed(seed))[0])
        fits += plan.fits
        if plan.fits:
            shapes.add(
                tuple(tuple(layout.relative_position_index.shape) for stage in plan.stages for layout in stage.layouts)
            )
    assert len(shapes) == 1 and fits >= 190, (shapes, fits)
    groups, slots = shapes.pop()[0][:2]
    assert groups * slots <= 1.1 * 12 * 64


def test_a_plan_has_the_same_parts_for_every_mask_of_a_size():
    """Even where all visible tokens happen to share a window: another part would be another graph for torch.compile."""
    encoder = swin.swin_nano()
    corner, spread = torch.zeros(2, 16, dtype=torch.bool)
    corner[[0, 1, 4, 5]] = spread[[0, 3, 10, 12]] = True
    parts = [
        [
            (layout.gather_index is None, layout.attn_mask is None)
            for stage in encoder.plan(visible).stages
            for layout in stage.layouts
        ]
        for visible in (corner, spread)
    ]
    assert parts[0] == parts[1]
    assert encoder.dense_plan(torch.zeros(1, 3, 32, 32)).stages[0].layouts[0].attn_mask is None


def test_groups_that_are_alike_share_one_bias():
    """swin_micro's units are whole windows of its first stage: two to a group, and the index of pairs that may not
    attend must not distinguish groups.
    """
    visible = mixing.draw_masks(1, 16, 0.5, torch.Generator().manual_seed(0))[0]
    layout = swin.swin_micro().plan(visible).stages[0].layouts[0]
    assert (
        layout.relative_position_index.shape == layout.attn_mask.shape == (1, 36, 40)
        and not layout.attn_mask[..., :36].all()
    )  # of four groups, with spare slots


def test_mask_token_replaces_hidden_tokens():
    encoder = swin.swin_micro().eval()
    visible = mixing.draw_masks(1, 16, 0.5, torch.Generator().manual_seed(0))[0]
    token, a = torch.randn(96), torch.randn(1, 3, 32, 32)
    b = torch.where(mixing.mask_pixels(torch.ones(1, 3, 32, 32), visible, 8) > 0, a, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(encoder(a, visible, token), encoder(b, visible, token))
        assert difference(encoder(a, visible, token.flip(0)), encoder(a, visible, token)) > 1e-3
        assert difference(encoder(a, torch.ones(16, dtype=torch.bool), token), encoder(a)) < 1e-6


def test_windows_shrink_to_small_maps_without_shift():
    encoder = swin.Swin(image_size=192, window=14, width=8, heads=(1, 1, 1, 1))
    assert encoder.windows == (14, 14, 12, 6)
    assert [len(s.layouts) for s in encoder.plan(torch.ones(36, dtype=torch.bool)).stages] == [2, 2, 1, 1]
    assert encoder.stages[3].blocks[0].attention.table.shape == (11**2, 1)


@pytest.mark.parametrize("heads, groups", [(3, 4), (3, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("stored", [5, 8])
def test_fused_attention_of_gpus_equals_the_plain_one(heads, groups, stored):
    """Biases of each head and group, or the same for all, in rows as long as needed or longer."""
    inputs = [*torch.randn(3, 2, 3, 4, 5, 8), torch.randn(heads, 1, 5, stored)]
    hidden = torch.rand(heads, groups, 5, stored) < 0.5
    hidden.diagonal(dim1=-2, dim2=-1).fill_(False)
    found = []
    for function in (attend, attend_fused):
        q, k, v, table = (value.detach().requires_grad_() for value in inputs)
        out = function(q, k, v, table.expand(-1, groups, -1, -1).masked_fill(hidden, float("-inf")))
        out.square().sum().backward()
        found.append([out, *(value.grad for value in (q, k, v, table))])
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    encoder, images = swin.swin_micro(), torch.randn(2, 3, 32, 32)
    gradients = []
    for encoder.checkpointing in (False, True):
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        gradients.append(encoder.embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_evaluation_is_deterministic_and_drop_path_is_not():
    encoder, images = swin.swin_micro(drop_path=0.5), torch.randn(4, 3, 32, 32)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    block = Block(8, swin.WindowAttention(8, 1, 4), drop_path=0.25)
    x = block.drop(torch.ones(20000, 3, 8))
    assert torch.equal(x, x[:, :1, :1].expand_as(x)) and x.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(x.mean() - 1) < 5 * (0.25 / 0.75 / 20000) ** 0.5
    assert torch.equal(block.eval().drop(x), x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(image_size=100), "multiple of the unit"),
        (dict(heads=(3, 6, 12)), "one number per stage"),
        (dict(window=0), "at least 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        swin.swin_tiny(**arguments)


def test_refuses_masks_of_another_kind():
    encoder = swin.swin_micro()
    for visible in (torch.ones(15, dtype=torch.bool), torch.ones(16), torch.zeros(16, dtype=torch.bool)):
        with pytest.raises(ValueError):
            encoder.plan(visible)


def test_plans_of_whole_images_are_kept_for_several_threads():
    """More sizes than are kept, from eight threads: each gets the plan of its own size, and none meets one that is
    gone.
    """

    def plans(offset):
        return all(
            cached_plan(("test", (k + offset) % 60), lambda: (k + offset) % 60) == (k + offset) % 60
            for k in range(2000)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(plans, range(0, 56, 7)))
    assert len(_PLAN_CACHE) <= 32


@pytest.mark.parametrize("ratio", [0, 0.75])
def test_a_move_s_gradient_is_that_of_an_index(ratio):
    """Of every move of a plan: equal to torch's own index, with zeros for what an empty slot gives and receives, and
    no addition by index in the graph.
    """
    plan = swin.Swin(width=8, heads=(1, 1, 1, 1)).plan(
        mixing.draw_masks(1, 49, ratio, torch.Generator().manual_seed(0))[0]
    )
    moves = [
        move
        for stage in plan.stages
        for move in (stage.to_next_stage, stage.to_raster, *(layout.gather_index for layout in stage.layouts))
        if move is not None
    ]
    assert len(moves) > 3
    for move in moves:
        x = torch.randn(2, len(move.inverse), 3, requires_grad=True)
        used = torch.zeros(len(move.index), dtype=torch.bool)  # slots of the new order that hold a token
        read = torch.ones(len(move.inverse), dtype=torch.bool) if move.unread is None else ~move.unread
        used[move.inverse[read]] = True
        weight = torch.randn(2, len(move.index), 3) * used[:, None]  # nobody reads an empty slot
        (ours,) = torch.autograd.grad((gather_tokens(x, move) * weight).sum(), x)
        (theirs,) = torch.autograd.grad((x[:, move.index] * weight).sum(), x)
        assert torch.equal(ours, theirs) and not ours[:, ~read].any()
        garbage = torch.autograd.grad((gather_tokens(x, move) * torch.randn(2, len(move.index), 3)).sum(), x)[0]
        assert not garbage[:, ~read].any()


@pytest.mark.parametrize("name", ["swin_micro", "twins_micro"])
def test_moves_add_nothing_up_by_index(name):
    """Additions by index in a training step, in eager mode: the tables of relative positions are what is left."""
    encoder = encoders.make(name, image_size=64, window=4)
    visible = mixing.draw_masks(1, encoder.units, 0.75, torch.Generator().manual_seed(0))[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        encoder(torch.randn(2, 3, 64, 64), visible).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    tables = sum(hasattr(block.attention, "table") for block in encoder.blocks)
    assert (
        calls.get("aten::index_add_", 0) + calls.get("aten::index_add", 0) + calls.get("aten::_index_put_impl_", 0)
        == tables
    )
