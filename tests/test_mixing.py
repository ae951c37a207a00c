"""mixing.py: counts, commutation of masking and mixing, views."""

import math

import pytest
import torch
from einops import rearrange

import mixing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "units, ratio, expected",
    [
        (49, 0.75, 12),
        (49, 0.6, 20),
        (36, 0.6, 14),
        (16, 0.75, 4),
        (49, 0.5, 25),
        (49, 0.9, 5),
        (10, 0.95, 1),
        (49, 0, 49),
    ],
)
def test_visible_count_rounds_half_up(units, ratio, expected):
    assert mixing.visible_count(units, ratio) == expected
    masks = mixing.draw_masks(5, units, ratio, generator())
    assert masks.dtype == torch.bool and (masks.sum(1) == expected).all()


@pytest.mark.parametrize("ratio", [1, -0.5, 2, math.nan, math.inf, 0.001, 0.999])
def test_refuses_ratios_that_hide_all_or_nothing(ratio):
    with pytest.raises(ValueError, match="ratio"):
        mixing.visible_count(49, ratio)


def test_masks_are_uniform_and_follow_their_generator():
    assert torch.equal(mixing.draw_masks(2, 49, 0.75, generator(3)), mixing.draw_masks(2, 49, 0.75, generator(3)))
    masks = mixing.draw_masks(4000, 16, 0.75, generator())
    assert len({tuple(m.tolist()) for m in masks}) > 1000
    rate = masks.float().mean(0)
    assert (rate - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000), rate


def test_masking_and_mixing_commute_under_one_mask():
    images = torch.randn(3, 2, 3, 32, 32)
    weights = torch.tensor([0.3, 0.7])
    visible = mixing.draw_masks(1, 16, 0.75, generator())
    mixed_first = mixing.mask_pixels(mixing.superpose(images, weights), visible[0], 8)
    masked_first = mixing.superpose(mixing.mask_pixels(images, visible, 8), weights)
    assert torch.allclose(mixed_first, masked_first, atol=1e-6)
    plain = 0.3 * images[:, 0] + 0.7 * images[:, 1]
    assert torch.allclose(mixing.superpose(images, weights), plain, atol=1e-6)


def test_the_mix_is_not_rounded_under_autocast():
    images, weights = torch.randn(3, 2, 5, 7), torch.tensor([0.3, 0.7])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixing.superpose(images, weights)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, mixing.superpose(images, weights))


def test_mask_pixels_hides_whole_units_of_each_source():
    visible = mixing.draw_masks(2, 16, 0.5, generator())
    masked = mixing.mask_pixels(torch.ones(1, 2, 3, 32, 32), visible, 8)
    by_unit = rearrange(masked, "1 n c (i p) (j q) -> n (i j) (c p q)", p=8, q=8)
    assert torch.equal(by_unit.all(-1), visible) and torch.equal(by_unit.any(-1), visible)
    with pytest.raises(ValueError, match="cannot be divided into mask units"):
        mixing.mask_pixels(torch.ones(1, 3, 30, 32), visible, 8)


def test_seen_units_hold_the_union_and_have_a_fixed_count():
    counts = set()
    for seed in range(50):
        visible = mixing.draw_masks(3, 49, 0.75, generator(seed))
        seen = mixing.units_to_encode(visible, generator(seed))
        assert (seen | ~visible.any(0)).all()
        counts.add(int(seen.sum()))
    assert counts == {36}
    one = mixing.draw_masks(1, 49, 0.75, generator())
    assert torch.equal(mixing.units_to_encode(one, generator()), one[0])


def test_spread_mask_covers_the_same_squares():
    visible = mixing.draw_masks(1, 4, 0.5, generator())
    small = mixing.mask_pixels(torch.ones(1, 3, 32, 32), mixing.upsample_mask(visible, 2, 2)[0], 8)
    assert torch.equal(small, mixing.mask_pixels(torch.ones(1, 3, 32, 32), visible[0], 16))


def test_four_views_of_eq_3():
    images = torch.rand(4, 2, 3, 32, 32)
    views = mixing.four_views(images, torch.rand(4, 5, generator=generator()))
    assert views.shape == (4, 4, 3, 32, 32)
    assert torch.equal(views[:, 1], images[:, 0].flip(-1))
    still = mixing.four_views(images, torch.full((4, 5), 0.5), angle=30, scale=(1, 1), crop=(1, 1))
    for view, source in ((0, 0), (2, 1), (3, 1)):  # no turn, full size, whole area: the picture itself
        assert torch.allclose(still[:, view], images[:, source], atol=1e-5)
    quarter = mixing.four_views(images, torch.ones(4, 5), angle=90, scale=(1, 1), crop=(1, 1))[:, 0]
    assert torch.allclose(quarter, images[:, 0].rot90(1, (-2, -1)), atol=1e-4) or torch.allclose(
        quarter, images[:, 0].rot90(-1, (-2, -1)), atol=1e-4
    )
    weights = mixing.four_view_weights(torch.tensor([0.4, 0.6]))
    assert torch.allclose(weights, torch.tensor([0.2, 0.2, 0.3, 0.3])) and weights.sum() == 1
    cut = mixing.four_views(images, torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 4), crop=(0.25, 1))[:, 3]
    corner = torch.nn.functional.interpolate(images[:, 1, :, :16, :16], size=32, mode="bilinear", align_corners=False)
    assert torch.allclose(cut[..., 1:-1, 1:-1], corner[..., 1:-1, 1:-1], atol=1e-5)


def test_superpose_refuses_a_wrong_number_of_weights():
    with pytest.raises(ValueError, match="as many weights"):
        mixing.superpose(torch.rand(1, 3, 3, 8, 8), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="two images"):
        mixing.four_views(torch.rand(1, 3, 3, 8, 8), torch.rand(1, 5))
