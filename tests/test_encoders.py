"""encoders.py: the contract, held by every encoder and by one of twenty lines; visible-only is exact; masks whose
plans do not fit.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import here, log, make_images, slow
from torch import nn

import encoders
import finetune
import mixing
import train
from engine.errors import UserError
from model import EESMM, METHODS, build
from plan import window_numbers


@dataclass
class ToyPlan:
    ids_keep: torch.Tensor  # (v,) numbers of the units to encode
    hidden: torch.Tensor | None  # (v,) bool, units to take from the mask token
    fits: bool = True


class Toy(nn.Module):
    """A linear patch embedding and one linear layer: no attention."""

    unit, width, stem_width, undecayed, checkpointing = 8, 24, 24, (), False

    def __init__(self, image_size=32, window=1, drop_path=0.0, channels=3):
        super().__init__()
        self.image_size, self.channels = (image_size, image_size), channels
        self.rows = self.columns = image_size // 8
        self.units = self.rows * self.columns
        self.embed, self.blocks = nn.Linear(channels * 64, 24), nn.ModuleList([nn.Linear(24, 24)])

    def plan(self, visible, dense=False):
        return ToyPlan(torch.arange(self.units), ~visible) if dense else ToyPlan(visible.nonzero().flatten(), None)

    def forward(self, images, visible=None, mask_token=None):
        plan = (
            visible
            if isinstance(visible, ToyPlan)
            else self.plan(torch.ones(self.units, dtype=torch.bool) if visible is None else visible)
        )
        x = self.embed(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=8, q=8).index_select(1, plan.ids_keep))
        x = x if mask_token is None else torch.where(plan.hidden[:, None], mask_token, x)
        return self.blocks[0](x)

    def layer_of(self, name):
        return 0 if name.startswith("embed") else 1


class NeverFits(Toy):
    def plan(self, visible, dense=False):
        plan = super().plan(visible, dense)
        plan.fits = False
        return plan


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setitem(encoders.MODELS, "toy", Toy)
    monkeypatch.setitem(encoders.MODELS, "never fits", NeverFits)
    make_images(tmp_path / "data")
    return [
        "--data",
        tmp_path / "data",
        "--image-size",
        32,
        "--batch-size",
        4,
        "--workers",
        0,
        "--output",
        tmp_path / "out",
    ]


PRETRAIN = [
    "--recipe",
    "cifar",
    "--base-lr",
    1,
    "--warmup-epochs",
    1,
    "--decoder-width",
    32,
    "--epochs",
    8,
    "--log-every",
    5,
    "--eval-images",
    4,
]


@pytest.mark.parametrize(
    "method, flags",
    [
        ("eesmm", ["--decomposition", "split", "--masks", "independent"]),
        ("greenmim", []),
        ("simmim", ["--compile", "--layer-decay", 0.9, "--activation-checkpointing"]),
    ],
)
def test_any_encoder_that_keeps_the_contract_trains(words, tmp_path, monkeypatch, method, flags):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(model) or model)
    here(train.main, *words, *PRETRAIN, "--model", "toy", "--method", method, *flags)
    losses = [row["loss"] for row in log(tmp_path / "out") if "loss" in row]
    assert losses[-1] < losses[0] and len([model for model in compiled if isinstance(model, nn.Module)]) == (
        method == "simmim"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"last.pt", "reconstructions.png", "loss.png"}


def test_it_is_fine_tuned_too(words, tmp_path):
    here(finetune.main, *words, "--recipe", "micro", "--model", "toy", "--init", "scratch", "--epochs", 1)
    assert log(tmp_path / "out")[-1]["eval_top1"] >= 0


def test_an_unknown_encoder_is_refused():
    with pytest.raises(UserError, match="swin_huge: unknown; choose from swin_nano, "):
        encoders.make("swin_huge")


def test_masks_that_do_not_fit_are_drawn_again_unless_told_not_to():
    draws = [
        EESMM(NeverFits(), decoder_width=32, redraw=redraw).draw(torch.Generator().manual_seed(0))
        for redraw in (True, False)
    ]
    assert [masking.redrawn for masking in draws] == [9, 0]
    first = mixing.draw_masks(1, 16, 0.75, torch.Generator().manual_seed(0))
    assert torch.equal(draws[1].visible, first) and not torch.equal(draws[0].visible, first)


def test_a_run_says_once_that_most_masks_were_drawn_again(words, tmp_path, capsys):
    here(train.main, *words, *PRETRAIN, "--model", "never fits", "--max-steps", 12)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and "90 of 100 masks" in warnings[0] and log(tmp_path / "out")[-2]["masks_redrawn"] == 108


# every encoder --------------------------------------------------------------------------------------------------------

MICRO = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")


def large(encoder):
    """With tables, biases and positions so large that a mistake with them would show."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1 or "table" in name or "positions" in name:
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return encoder.eval()


def mask_of(encoder, ratio=0.75, seed=0):
    return mixing.draw_masks(1, encoder.units, ratio, torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_the_contract(name):
    encoder = large(encoders.make(name, image_size=64, window=4, drop_path=0.1))
    images, visible = torch.randn(2, 3, 64, 64), mask_of(encoder)
    dense, seen = encoder(images), encoder(images, visible)
    assert dense.shape == (2, encoder.units, encoder.width) and seen.shape == (2, int(visible.sum()), encoder.width)
    assert encoder.rows * encoder.columns == encoder.units == (64 // encoder.unit) ** 2 and encoder.image_size == (
        64,
        64,
    )
    assert torch.equal(seen, encoder(images, encoder.plan(visible))) and encoder.plan(visible).fits
    assert torch.allclose(dense, encoder(images, torch.ones(encoder.units, dtype=torch.bool)), atol=1e-5)

    noisy = images + mixing.mask_pixels(torch.randn_like(images), ~visible, encoder.unit)
    assert torch.equal(encoder(noisy, visible), seen) and not torch.allclose(
        encoder(noisy)[:, visible], dense[:, visible], atol=1e-3
    )

    token = torch.randn(encoder.stem_width)
    masked = encoder(images, visible, mask_token=token)
    assert masked.shape == dense.shape and torch.equal(encoder(noisy, visible, mask_token=token), masked)
    assert not torch.allclose(encoder(images, visible, mask_token=-token), masked, atol=1e-3)
    assert torch.equal(masked, encoder(images, encoder.plan(visible, dense=True), token))

    assert encoder(torch.randn(1, 3, 96, 32)).shape[1] == 96 * 32 // encoder.unit**2  # dense images of other sizes
    for wrong, message in (
        (visible[1:], "bool tensor"),
        (visible.float(), "bool tensor"),
        (torch.zeros_like(visible), "nothing is left"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(images, wrong)
    for size in ((96, 96), (32, 128), (128, 32)):  # the last two have as many units
        for given in (visible, encoder.plan(visible)):
            with pytest.raises(ValueError, match="masks are for images of 64 x 64 pixels"):
                encoder(torch.randn(1, 3, *size), given)
    with pytest.raises(ValueError, match="whole units"):
        encoder(torch.randn(1, 3, 62, 64))
    with pytest.raises(UserError, match="try 64"):
        encoders.make(name, image_size=66)


@pytest.mark.parametrize("name", MICRO)
def test_layers_rise_and_blocks_are_all_there(name):
    encoder = encoders.make(name)
    layers = {key: encoder.layer_of(key) for key, _ in encoder.named_parameters()}
    assert set(layers.values()) == set(range(len(list(encoder.blocks)) + 2))
    assert layers["embed.proj.weight"] == 0 and layers["norm.weight"] == len(list(encoder.blocks)) + 1
    of_blocks = [
        {
            encoder.layer_of(key)
            for key, other in encoder.named_parameters()
            if any(other is p for p in block.parameters())
        }
        for block in encoder.blocks
    ]
    assert of_blocks == [{number + 1} for number in range(len(of_blocks))]


@pytest.mark.parametrize(
    "name, method",
    slow(
        [(name, method) for name in MICRO for method in METHODS if method != "mixmae" or "swin" in name],
        fast=[
            ("swin_nano", "eesmm"),
            ("swin_micro", "mixmae"),
            ("vit_micro", "mae"),
            ("twins_micro", "simmim"),
            ("twins_micro", "eesmm"),
            ("vit_micro", "simmim"),
        ],
    ),
)
def test_every_method_reaches_every_parameter(name, method):
    """With activation checkpointing the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = build(method, encoders.make(name, checkpointing=checkpointing), decoder_width=32)
        visible = mask_of(network.encoder)
        network(
            torch.randn(2, network.sources, 3, 32, 32, generator=torch.Generator().manual_seed(1)), visible
        ).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in network.named_parameters()})
        assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[-1].values()), [
            key for key, grad in gradients[-1].items() if grad is None or not grad.any()
        ]
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@pytest.mark.parametrize("name, size", [("swin_micro", 64), ("swin_tiny", 224)])
@torch.no_grad()
def test_a_partition_is_two_visible_only_passes_in_one(name, size):
    """MixMAE: each source's tokens come out as if it had been encoded alone, and nothing of the other reaches them."""
    encoder = large(encoders.make(name, image_size=size))
    first, second = torch.randn(2, 1, 3, size, size)
    visible = mask_of(encoder, 0.5)
    plan = encoder.plan(visible, partition=True)
    mixed = mixing.mask_pixels(first, visible, encoder.unit) + mixing.mask_pixels(second, ~visible, encoder.unit)
    both = encoder(mixed, plan)
    for image, own in ((first, visible), (second, ~visible)):
        assert (both[:, own] - encoder(image, own)).abs().max() < 1e-5
    other = encoder(mixed + mixing.mask_pixels(torch.randn_like(first), ~visible, encoder.unit), plan)
    assert torch.equal(other[:, visible], both[:, visible]) and not torch.allclose(
        other[:, ~visible], both[:, ~visible], atol=1e-2
    )


@torch.no_grad()
def test_mixmae_decodes_each_source_by_itself():
    torch.manual_seed(0)
    network = build("mixmae", encoders.make("swin_micro"), decoder_width=32, decoder_blocks=2).eval()
    images = torch.randn(2, 2, 3, 32, 32)
    masking = network.draw(torch.Generator().manual_seed(0))
    out = network(images, masking)
    assert torch.equal(masking.visible[1], ~masking.visible[0]) and masking.visible[0].sum() == 8
    other = network(torch.stack([images[:, 0], torch.randn_like(images[:, 1])], dim=1), masking)
    assert torch.equal(other.predicted_sources[:, 0], out.predicted_sources[:, 0])
    targets, hidden = network.targets(images), ~masking.visible
    for k in (0, 1):
        plain = (out.predicted_sources[:, k] - targets[:, k])[:, hidden[k]].square().mean()
        assert torch.allclose(out.losses[f"source_{k + 1}"], plain, rtol=1e-5)
    assert torch.allclose(out.loss, out.losses["source_1"] + out.losses["source_2"])
    for name, message in (("vit_micro", "only a Swin"), ("twins_micro", "only a Swin")):
        with pytest.raises(ValueError, match=message):
            build("mixmae", encoders.make(name))
    with pytest.raises(ValueError, match="needs 2 sources"):
        build("mixmae", encoders.make("swin_micro"), sources=3)


def plain_vit(encoder, images, visible):
    """All tokens, with hidden ones kept out of attention: a key of -inf."""
    x = encoder.embed(images, torch.arange(encoder.units)) + encoder.positions
    x = torch.cat([encoder.class_token.expand(len(x), 1, -1), x], dim=1)
    allowed = torch.cat([torch.tensor([True]), visible])
    for block in encoder.blocks:
        layer = block.attention
        q, k, v = rearrange(layer.qkv(block.norm1(x)), "b t (three h d) -> three b h t d", three=3, h=layer.heads)
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
        x = x + layer.proj(rearrange(scores.softmax(-1) @ v, "b h t d -> b t (h d)"))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[:, 1:][:, visible]


def plain_twins(encoder, images, visible):
    """All tokens in raster order: hidden ones are no keys, zeros to the convolution, and have no summary."""
    side = images.shape[-1] // encoder.embed.patch
    x = encoder.embed(images, torch.arange(side * side))
    for number, stage in enumerate(encoder.stages):
        cell = side // encoder.rows
        seen = visible.view(encoder.rows, -1).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        numbers = torch.from_numpy(window_numbers(np.arange(side * side), side, side, encoder.windows[number], False))
        near = (numbers[:, None] == numbers) & seen.flatten() | torch.eye(
            side * side, dtype=torch.bool
        )  # itself, so that no sum is empty
        for k, block in enumerate(stage.blocks):
            layer, y = block.attention, block.norm1(x)
            if k % 2 == 0:
                q, key, v = rearrange(layer.qkv(y), "b t (three h d) -> three b h t d", three=3, h=layer.heads)
                scores = (q @ key.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~near, float("-inf"))
            else:
                units = rearrange(y, "b (i p j q) c -> b (i j) (p q c)", p=cell, q=cell, i=encoder.rows)
                units = units if layer.reduce is None else layer.norm(layer.reduce(units))
                q = rearrange(layer.q(y), "b t (h d) -> b h t d", h=layer.heads)
                key, v = rearrange(layer.kv(units), "b v (two h d) -> two b h v d", two=2, h=layer.heads)
                scores = (q @ key.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
            x = x + layer.proj(rearrange(scores.softmax(-1) @ v, "b h t d -> b t (h d)"))
            x = x + block.mlp(block.norm2(x))
            if k == 0:
                grid = rearrange(x * seen.flatten()[:, None], "b (h w) c -> b c h w", h=side)
                x = x + rearrange(
                    F.conv2d(grid, stage.positions.weight, stage.positions.bias, padding=1, groups=x.shape[-1]),
                    "b c h w -> b (h w) c",
                )
        if stage.merge is not None:
            grid = rearrange(x, "b (i p j q) c -> b (i j) (q p) c", p=2, q=2, i=side // 2)
            x, side = stage.merge.norm(stage.merge.reduction(grid.flatten(2))), side // 2
    return encoder.norm(x)[:, visible]


DENSE = [
    *(
        case + (ratio,)
        for case in (("vit_micro", 64, plain_vit), ("twins_micro", 64, plain_twins), ("twins_micro", 80, plain_twins))
        for ratio in (0.3, 0.75, 0.95)
    ),
    ("vit_tiny", 224, plain_vit, 0.75),
    ("twins_small", 224, plain_twins, 0.75),
]


@pytest.mark.parametrize(
    "name, size, plain, ratio, dtype, most",
    slow(
        [case + of_dtype for case in DENSE for of_dtype in ((torch.float32, 1e-5), (torch.float64, 1e-9))],
        fast=[
            ("vit_micro", 64, plain_vit, 0.75, torch.float64, 1e-9),
            ("twins_micro", 80, plain_twins, 0.75, torch.float64, 1e-9),
            ("twins_micro", 64, plain_twins, 0.3, torch.float32, 1e-5),
        ],
    ),
)
@torch.no_grad()
def test_visible_only_is_dense_without_the_hidden_tokens(name, size, plain, ratio, dtype, most):
    """Swin's own test of this: tests/test_swin.py."""
    torch.manual_seed(0)
    encoder = large(encoders.make(name, image_size=size)).to(dtype)
    images, visible = torch.randn(1, 3, size, size, dtype=dtype), mask_of(encoder, ratio)
    worst = (encoder(images, visible) - plain(encoder, images, visible)).abs().max().item()
    assert worst < most, worst


@torch.no_grad()
def test_the_pyramid_of_twins():
    encoder = large(encoders.make("twins_micro", image_size=64))
    images = torch.randn(1, 3, 64, 96)
    maps = encoder.pyramid(images)
    assert [tuple(level.shape) for level in maps] == [(1, 64, 32, 48), (1, 128, 16, 24), (1, 256, 8, 12)]
    assert torch.allclose(rearrange(maps[-1], "b c h w -> b (h w) c"), encoder(images), atol=1e-5)
