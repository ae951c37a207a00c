"""model.py: decomposition, loss and masks against plain versions of Eq. 4-7."""

from itertools import permutations

import pytest
import torch
from einops import rearrange

import mixing
import model as eesmm
import train
from engine.dist import Distributed
from swin import Swin


def tiny(**overrides):
    return Swin(**dict(image_size=32, patch=2, window=4, width=16, depths=(1, 2, 1), heads=(1, 1, 1)) | overrides)


def make(sources=2, **settings):
    torch.manual_seed(0)
    return eesmm.EESMM(tiny(), sources=sources, decoder_width=32, **settings)


def predict(model, images, masking):
    """Head outputs, Eq. 4."""
    return model.decode(model.encoder(model.mix(images, masking), masking.plan, model.mask_token), masking)


def batch(n=2, b=3):
    return torch.randn(b, n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


VISIBLE = mixing.draw_masks(1, 16, 0.75, torch.Generator().manual_seed(2))[0]


def plain_targets(images):
    units = rearrange(images, "b n c (i p) (j q) -> b n (i j) (c p q)", p=8, q=8)
    return (units - units.mean(-1, keepdim=True)) / (units.var(-1, keepdim=True) + 1e-6) ** 0.5


def test_units_round_trip():
    images = batch()
    assert torch.equal(eesmm.unpatchify(eesmm.patchify(images, 8), 8, 4), images)


def test_eq_7_counts_hidden_units_only():
    model, images = make(decomposition="split", assignment="fixed"), batch()
    out = model(images, VISIBLE)
    target = plain_targets(images)
    for k in range(2):
        plain = (out.predicted_sources[:, k] - target[:, k])[:, ~VISIBLE].square().mean()
        assert torch.allclose(out.losses[f"source_{k + 1}"], plain, rtol=1e-5)
    mix = (out.predicted_mix - target.mean(1))[:, ~VISIBLE].square().mean()
    assert torch.allclose(out.losses["mix"], mix, rtol=1e-5)
    assert torch.allclose(out.loss, sum(out.losses.values()))
    everywhere = make(decomposition="split", assignment="fixed", loss_units="all")(images, VISIBLE)
    assert torch.allclose(everywhere.losses["mix"], (out.predicted_mix - target.mean(1)).square().mean(), rtol=1e-5)
    absolute = make(decomposition="split", assignment="fixed", loss="l1", loss_weights=(0, 2, 0.5))(images, VISIBLE)
    parts = [(out.predicted_sources[:, k] - target[:, k])[:, ~VISIBLE].abs().mean() for k in range(2)]
    assert torch.allclose(absolute.loss, 2 * parts[0] + 0.5 * parts[1], rtol=1e-5)


@pytest.mark.parametrize("units, everywhere", [("hidden", False), ("all", True)])
def test_gradient_reaches_counted_units_only(units, everywhere):
    out = make(decomposition="split", loss_units=units)(batch(), VISIBLE)
    gradient = torch.autograd.grad(out.loss, out.predicted_sources)[0].abs().sum((0, 1, 3))
    assert (gradient[~VISIBLE] > 0).all() and (gradient[VISIBLE] > 0).all() == everywhere
    assert everywhere or (gradient[VISIBLE] == 0).all()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (0.2, 0.3, 0.5)])
def test_subtract_gives_no_gradient_that_loss1_does_not(weights):
    n, model = len(weights), make(len(weights), weights=weights)
    images = batch(n)
    out = model(images, VISIBLE)
    target, total = plain_targets(images), 1.0
    mixed = sum(w * target[:, k] for k, w in enumerate(weights))
    for k, weight in enumerate(weights):
        others = mixed - weight * target[:, k]
        assert torch.allclose(out.predicted_sources[:, k], (out.predicted_mix - others) / weight, atol=1e-4)
        assert torch.allclose(out.losses[f"source_{k + 1}"], out.losses["mix"] / weight**2, rtol=1e-4)
        total += 1 / weight**2
    assert torch.allclose(out.loss, out.losses["mix"] * total, rtol=1e-4)  # nine times at two equal weights
    head = lambda loss: torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0].flatten()
    for k in range(n):
        cosine = torch.cosine_similarity(head(out.losses["mix"]), head(out.losses[f"source_{k + 1}"]), dim=0)
        assert cosine > 0.9999, cosine


@pytest.mark.parametrize("n", [2, 3, 4])
def test_permutation_takes_the_best_order_and_ignores_that_of_the_sources(n):
    model, images = make(n, decomposition="split"), batch(n, b=6)
    out = model(images, VISIBLE)
    target = plain_targets(images)
    raw = predict(model, images, model.make_masking(VISIBLE))
    for sample in range(6):
        error = {
            order: sum((raw[sample, order[k]] - target[sample, k])[~VISIBLE].square().mean() for k in range(n))
            for order in permutations(range(n))
        }
        best = min(error, key=error.get)
        assert torch.allclose(out.predicted_sources[sample], raw[sample, list(best)], atol=1e-5)
    shuffled = torch.randperm(n)
    again = model(images[:, shuffled], VISIBLE)
    assert torch.allclose(out.loss, again.loss, rtol=1e-5)
    assert torch.allclose(out.predicted_sources[:, shuffled], again.predicted_sources, atol=1e-4)
    assert torch.allclose(out.predicted_mix, out.predicted_sources.mean(1), atol=1e-5)
    fixed = make(n, decomposition="split", assignment="fixed")(images, VISIBLE)
    assert torch.allclose(fixed.predicted_sources, raw, atol=1e-5) and fixed.loss >= out.loss - 1e-5


def test_without_a_mask_separation_is_left():
    model, images = make(decomposition="split", loss_units="all", mask_ratio=0), batch()
    masking = model.draw()
    assert masking.visible.all() and len(masking.ids_keep) == 16
    features = model.encoder(images.mean(1))  # the dense encoder of the mix
    plain = model.head(model.decoder(features, torch.arange(16)))
    out, target = model(images, masking), plain_targets(images)
    assert torch.allclose(out.losses["mix"], (sum(plain.chunk(2, -1)) / 2 - target.mean(1)).square().mean(), rtol=1e-4)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hidden_pixels_do_not_leak():
    model, images = make(decomposition="split"), batch()
    shown = mixing.mask_pixels(images, VISIBLE, 8)
    with torch.no_grad():
        full, hidden = (predict(model, x, model.make_masking(VISIBLE)) for x in (images, shown))
    assert torch.equal(full, hidden)


@pytest.mark.parametrize("dense", [False, True])
def test_independent_masks_act_on_each_source_before_the_mix(dense):
    model, images = make(decomposition="split", masks="independent", dense=dense), batch()
    masking = model.draw(torch.Generator().manual_seed(0))
    assert masking.visible.shape == (2, 16) and len(masking.ids_keep) == (
        16 if dense else 8
    )  # a dense encoder returns all units
    with torch.no_grad():
        out = model(images, masking)
        shown = mixing.mask_pixels(images, masking.visible, 8)
        assert torch.equal(predict(model, shown, masking), predict(model, images, masking))
        target = plain_targets(images)
        for k in range(2):
            plain = (out.predicted_sources[:, k] - target[:, k])[:, ~masking.visible[k]].square().mean()
            assert torch.allclose(out.losses[f"source_{k + 1}"], plain, rtol=1e-5)
        mixed = (out.predicted_mix - target.mean(1))[:, ~masking.visible.all(0)].square().mean()
        assert torch.allclose(out.losses["mix"], mixed, rtol=1e-5)


def test_greenmim_is_plain_masked_image_modelling():
    torch.manual_seed(0)
    model, images = eesmm.build("greenmim", tiny(), decoder_width=32), batch(1)
    out = model(images, VISIBLE)
    plain = (out.predicted_mix - plain_targets(images)[:, 0])[:, ~VISIBLE].square().mean()
    assert list(out.losses) == ["mix"] and torch.allclose(out.loss, plain, rtol=1e-5)
    assert torch.allclose(out.predicted_sources[:, 0], out.predicted_mix, atol=1e-5)


def test_simmim_is_l1_on_raw_pixels_from_all_tokens():
    torch.manual_seed(0)
    model, images = eesmm.build("simmim", tiny()), batch(1)
    assert model.decoder is None and int(model.draw().visible.sum()) == 6  # floor(0.4 x 16 + 0.5)
    out = model(images, VISIBLE)
    tokens = model.encoder(images[:, 0], VISIBLE, model.mask_token)
    predicted = rearrange(model.head(tokens), "b (i j) (c p q) -> b c (i p) (j q)", i=4, p=8, q=8)
    mask = mixing.mask_pixels(torch.ones(1, 3, 32, 32), ~VISIBLE, 8)
    plain = ((predicted - images[:, 0]).abs() * mask).sum() / mask.sum() / len(images)
    assert torch.allclose(out.loss, plain, rtol=1e-5)


def test_larger_units():
    model = make(unit=16)
    visible = model.draw(torch.Generator().manual_seed(0)).visible
    squares = rearrange(visible[0], "(i p j q) -> (i j) (p q)", i=2, p=2, q=2)
    assert torch.equal(squares.any(1), squares.all(1)) and squares.all(1).sum() == 1


def test_positions_tell_all_places_apart():
    positions = eesmm.sincos_positions(7, 7, 512)
    assert positions.shape == (49, 512) and torch.cdist(positions, positions).add(torch.eye(49)).min() > 0.5
    assert torch.equal(positions[0, :256], positions[6, :256])  # same row


def test_every_parameter_is_trained():
    for model, n in ((make(decomposition="split"), 2), (make(), 2), (eesmm.build("simmim", tiny()), 1)):
        model(batch(n)).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_layer_numbers_of_swin_base():
    from swin import swin_base

    with torch.device("meta"):
        encoder = swin_base()
    number = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert set(number.values()) == set(range(26))
    assert number["embed.proj.weight"] == number["embed.norm.bias"] == 0
    assert number["stages.0.blocks.0.attention.table"] == 1 and number["stages.0.merge.reduction.weight"] == 2
    assert number["stages.2.blocks.17.mlp.up.weight"] == number["stages.2.merge.norm.weight"] == 22
    assert number["stages.3.blocks.1.norm1.weight"] == 24 and number["norm.weight"] == 25


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(weights=(0.7, 0.3), decomposition="split"), "assignment fixed"),
        (dict(sources=6, decomposition="split"), "beyond 5"),
        (dict(decoder_blocks=0), "at least 1 decoder block"),
        (dict(weights=(0.7, 0.7)), "sum to 1"),
        (dict(sources=3, weights=(0.5, 0.5)), "3 positive numbers"),
        (dict(unit=12), "multiple of the encoder's unit"),
        (dict(loss_weights=(1, 1)), "3 numbers"),
        (dict(mask_ratio=0.99), "mask ratio"),
        (dict(mask_ratio=0), "loss units all"),
        (dict(mask_ratio=0, loss_units="all", dense=True), "visible units only"),
        (dict(sources=0), "at least one image"),
        *[({name: "other"}, f"{name} 'other': choose from {choices[0]}") for name, choices in eesmm.CHOICES.items()],
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refuses_wrong_inputs():
    model = make()
    for images, visible in (
        (batch(3), VISIBLE),
        (batch()[:, 0], VISIBLE),
        (batch(), VISIBLE[:10]),
        (batch(), torch.ones(16, dtype=torch.bool)),
        (batch(), VISIBLE.expand(3, -1)),
    ):
        with pytest.raises(ValueError):
            model(images, visible)


def test_a_term_of_a_fork_that_has_no_error_is_not_dropped():
    for sources in (1, 2):
        network = make(sources)
        network(batch(sources), VISIBLE)
        network.terms.append("contrast")
        with pytest.raises(ValueError, match="zip"):
            network(batch(sources), VISIBLE)


@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_validation_errors_are_in_standard_deviations_of_what_they_compare_with(normalise):
    """Two superposed images with normalised and with raw targets: the mixed image has standard deviations of its
    own.
    """
    network = make(decomposition="split", normalise=normalise)
    masking = network.draw(torch.Generator().manual_seed(0))
    images = batch() * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1)  # contrasts that differ
    out = network(images, masking)
    hidden = ~masking.visible[0]
    expected = []
    for predicted, true in (
        (out.predicted_mix, network.combine(network.targets(images), masking)),
        (out.predicted_sources, network.targets(images)),
        (out.predicted_mix[:, None], network.targets(images)),
    ):
        scale = 1 if normalise else (true.var(-1, keepdim=True) + 1e-6).sqrt()
        expected.append((((predicted - true) / scale)[..., hidden, :]).square().mean())
    found = train.reconstruction_errors(network, Distributed(torch.device("cpu")), images, masking)
    assert torch.allclose(found.float(), torch.stack(expected), rtol=1e-5)
