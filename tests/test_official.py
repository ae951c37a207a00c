"""Reference numbers of official implementations, computed once and kept in tests/data: the same weights and images give
the same results here.

Weights and images are made from their names, so the files hold results only (tests/data/README.md). Everything is in
float64 but the last
step of a prediction and the loss, which the model makes in float32.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

import encoders
import finetune
import model as eesmm
import train
import weights
from encoders.layouts import SWIN, VIT
from encoders.vit import ViT
from engine import probes
from engine.optim import learning_rate, parameter_groups
from engine.probes import iou_scores, pixel_confusion
from swin import Swin

DATA = Path(__file__).parent / "data"


def draw(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def official_state(file, prefix=""):
    """{official name: values} of all trained parameters, checked against their sums."""
    state = {}
    for (name, shape), total in zip(
        json.loads(str(file[f"{prefix}parameters"])), file[f"{prefix}parameter_sums"], strict=True
    ):
        values = draw(name, shape) * (0.5 if name.endswith("relative_position_bias_table") else 0.1)
        state[name] = torch.from_numpy(values + 1 if len(shape) == 1 and name.endswith(".weight") else values)
        assert abs(state[name].sum().item() - total) < 1e-10, f"{name}: this numpy draws other numbers"
    return state


def images_of(name, *shape):
    return torch.from_numpy(draw(f"images:{name}", shape))


def below(prefix, state):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}


def decoder_names(blocks, embed="decoder_embed"):
    """{official name: ours} of a decoder's parameters, but for the head's."""
    names = {"mask_token": "decoder.mask_token"}
    for part in ("weight", "bias"):
        names |= {f"{embed}.{part}": f"decoder.embed.{part}", f"decoder_norm.{part}": f"decoder.norm.{part}"}
        for k in range(blocks):
            names |= {
                f"decoder_blocks.{k}.{theirs}.{part}": f"decoder.blocks.{k}.{ours}.{part}"
                for theirs, ours in LAYERS.items()
            }
            names[f"decoder_blocks.{k}.attn.qkv.{part}"] = f"decoder.blocks.{k}.self_attn.in_proj_{part}"
    return names


def to_our_pixels(values, unit):
    """Values of a unit along the first axis, from (row, column, channel) to (channel, row, column)."""
    return rearrange(values, "(p q c) ... -> (c p q) ...", p=unit, q=unit)


def to_their_pixels(values, unit):
    return rearrange(values, "... (c p q) -> ... (p q c)", p=unit, q=unit)


def load_decoder(network, state, positions, blocks):
    ours = dict(network.named_parameters())
    for theirs, name in decoder_names(blocks).items():
        ours[name].data.copy_(state[theirs].reshape(ours[name].shape))
    unit = network.encoder.unit
    for part in ("weight", "bias"):
        ours[f"head.{part}"].data.copy_(to_our_pixels(state[f"decoder_pred.{part}"], unit))
    network.decoder.positions.copy_(torch.from_numpy(positions))


def set_eps(module, eps):
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = eps


def predict(network, latent, ids_keep):
    """Values of every unit in float64; `EESMM.decode` casts them to float32."""
    return network.head(network.decoder(latent, ids_keep))


def close(found, expected, most, what):
    found, expected = (
        torch.as_tensor(np.asarray(values.detach() if torch.is_tensor(values) else values))
        for values in (found, expected)
    )
    worst = (found - expected).abs().max().item()
    assert found.shape == expected.shape and worst < most, f"{what}: {worst}"


def check_predictions(file, case, predicted, unit, their_order=True):
    predicted = to_their_pixels(predicted, unit) if their_order else predicted
    close(predicted[..., :48], file[f"{case}predicted_first"], 1e-9, "predictions")
    probe = torch.from_numpy(draw("probe:predicted", predicted.shape[-1:]))
    close(predicted @ probe, file[f"{case}predicted_dot"], 1e-9, "predictions, all values")


def check_gradients(file, case, gradients, prefix=""):
    """gradients: {official name: gradient of the loss}, in official axes and orders."""
    parameters = json.loads(str(file[f"{prefix}parameters"]))
    assert set(gradients) == {name for name, _ in parameters}
    largest = file[f"{case}gradient_norm"].max()
    for k, (name, shape) in enumerate(parameters):
        gradient = gradients[name].reshape(shape).double()
        scale = max(file[f"{case}gradient_norm"][k], 1e-3 * largest)
        for measure, found in (
            ("norm", gradient.norm()),
            ("dot", (gradient * torch.from_numpy(draw(f"probe:{name}", shape))).sum()),
            ("sum", gradient.sum()),
        ):
            worst = abs(found.item() - file[f"{case}gradient_{measure}"][k]) / scale
            assert worst < 5e-5, f"{name}, {measure}: {worst}"


def their_gradients(network, encoder_gradients, blocks):
    """Gradients by official names: the encoder's as given, and the decoder's."""
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}
    found = {theirs: ours[name] for theirs, name in decoder_names(blocks).items()}
    found |= {
        f"decoder_pred.{part}": rearrange(
            ours[f"head.{part}"], "(c p q) ... -> (p q c) ...", p=network.encoder.unit, q=network.encoder.unit
        )
        for part in ("weight", "bias")
    }
    return found | encoder_gradients


def encoder_gradients(network, layout):
    """The encoder's gradients under the names of an export."""
    state = {name: parameter.grad for name, parameter in network.encoder.named_parameters()}
    encoder = network.encoder
    if isinstance(encoder, Swin) and not encoder.shift:  # MixMAE's, which no library holds
        encoder = Swin(
            image_size=encoder.image_size,
            window=max(encoder.windows),
            width=32,
            depths=(2, 2, 2, 2),
            heads=(1, 2, 4, 8),
        )
    return {
        name: value
        for name, value in weights.to_layout(state, encoder, layout).items()
        if value.is_floating_point() and not name.endswith("attn_mask")
    }


# MAE ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae():
    with np.load(DATA / "mae.npz") as file:
        return dict(file)


def our_mae(file):
    state = official_state(file)
    network = eesmm.EESMM(
        ViT(image_size=32, patch=4, width=48, depth=2, heads=3), sources=1, decoder_width=64, decoder_blocks=2
    ).double()
    encoder = {name: value for name, value in state.items() if not name.startswith("decoder") and name != "mask_token"}
    encoder["pos_embed"] = torch.from_numpy(file["fixed.pos_embed"]).double()
    network.encoder.load_state_dict(weights.from_layout(encoder, "timm"))
    load_decoder(network, state, file["fixed.decoder_pos_embed"][0, 1:], 2)  # ours does not read the class token
    set_eps(network, 1e-6)
    return network


def test_mae_with_one_mask(mae):
    network, images = our_mae(mae), images_of("mae", 2, 3, 32, 32)
    visible = torch.from_numpy(~mae["shared.mask"][0])
    latent = network.encoder(images, visible)
    raster = np.argsort(np.argsort(mae["shared.noise"][0])[:16])  # theirs is in the order of the noise
    close(latent, mae["shared.latent"][:, 1:][:, raster], 1e-9, "latent")
    predicted = predict(network, latent, visible.nonzero().flatten())
    close(to_their_pixels(predicted, 4), mae["shared.without_class.predicted"], 1e-9, "predictions")
    out = network(images[:, None], visible)
    assert out.loss.item() == pytest.approx(float(mae["shared.without_class.loss"]), rel=1e-6)
    out.loss.backward()
    gradients = encoder_gradients(network, "timm")
    gradients.pop("pos_embed")  # theirs is fixed
    check_gradients(mae, "shared.without_class.", their_gradients(network, gradients, 2))
    assert (
        abs(float(mae["shared.published.loss"]) - out.loss.item()) < 1e-3
    )  # what the class token in their decoder is worth


def test_mae_with_a_mask_for_each_image(mae):
    network, images, losses = our_mae(mae), images_of("mae", 2, 3, 32, 32), []
    for k in range(2):
        visible = torch.from_numpy(~mae["own.mask"][k])
        latent = network.encoder(images[k : k + 1], visible)
        close(latent[0], mae["own.latent"][k, 1:][np.argsort(np.argsort(mae["own.noise"][k])[:16])], 1e-9, "latent")
        close(
            to_their_pixels(predict(network, latent, visible.nonzero().flatten()), 4)[0, :, :12],
            mae["own.without_class.predicted"][k],
            1e-9,
            "predictions",
        )
        losses.append(network(images[k : k + 1, None], visible).loss.item())
    assert np.mean(losses) == pytest.approx(float(mae["own.without_class.loss"]), rel=1e-6)


# SimMIM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, size, window", [("a", 64, 4), ("b", 96, 6)])
def test_simmim(case, size, window):
    with np.load(DATA / "simmim.npz") as file:
        file = dict(file)
    state, images = official_state(file, f"{case}."), images_of(f"simmim.{case}", 2, 3, size, size)
    encoder = Swin(image_size=size, window=window, width=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8))
    network = eesmm.EESMM(encoder, sources=1, dense=True, decoder_blocks=0, normalise=False, loss="l1").double()
    network.encoder.load_state_dict(
        weights.from_layout(
            {name: value for name, value in below("encoder.", state).items() if name != "mask_token"}, "microsoft"
        )
    )
    network.mask_token.data.copy_(state["encoder.mask_token"].flatten())
    for part in ("weight", "bias"):
        getattr(network.head, part).data.copy_(state[f"decoder.0.{part}"].reshape(getattr(network.head, part).shape))
    losses, predicted, encoded = [], [], []
    for k in range(2):  # a mask for each image in case b
        visible = torch.from_numpy(~file[f"{case}.mask"][k]).flatten()
        encoded.append(network.encoder(images[k : k + 1], visible, network.mask_token))
        predicted.append(network.head(encoded[-1]))
        losses.append(network(images[k : k + 1, None], visible).loss)
    rows = size // 32
    close(rearrange(torch.cat(encoded), "b (i j) c -> b c i j", i=rows), file[f"{case}.encoded"], 1e-9, "encoded")
    check_predictions(file, f"{case}.", torch.cat(predicted), 32, their_order=False)
    loss = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(float(file[f"{case}.loss"]), rel=1e-6)
    loss.backward()
    gradients = {f"encoder.{name}": value for name, value in encoder_gradients(network, "microsoft").items()}
    gradients |= {"encoder.mask_token": network.mask_token.grad} | {
        f"decoder.0.{part}": getattr(network.head, part).grad for part in ("weight", "bias")
    }
    check_gradients(file, f"{case}.", gradients, f"{case}.")


# GreenMIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["three_quarters", "half"])
def test_greenmim_in_the_right_order(case):
    """Its published decoder puts visible tokens, which leave its encoder in raster order, at the places of the shuffled
    order. Ours puts each where it
    belongs (`restored`); given the published places, it computes what was published."""
    with np.load(DATA / "greenmim.npz") as file:
        file = dict(file)
    state, images = official_state(file), images_of("greenmim", 2, 3, 128, 128)
    network = eesmm.EESMM(
        Swin(image_size=128, window=4, width=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)), sources=1, decoder_width=64
    ).double()
    network.encoder.load_state_dict(weights.from_layout(below("encoder.", state), "microsoft"))
    load_decoder(network, state, file["fixed.decoder_pos_embed"][0], 1)
    set_eps(network, 1e-6)
    visible = torch.from_numpy(~file[f"{case}.mask"])
    latent = network.encoder(images, visible)
    close(latent, file[f"{case}.latent"], 1e-9, "latent")
    count = int(visible.sum())
    for order, ids in (
        ("restored", visible.nonzero().flatten()),
        ("published", torch.from_numpy(np.argsort(file[f"{case}.published.ids_restore"])[:count])),
    ):
        check_predictions(file, f"{case}.{order}.", predict(network, latent, ids), 32)
    out = network(images[:, None], visible)
    assert out.loss.item() == pytest.approx(float(file[f"{case}.restored.loss"]), rel=1e-6)
    assert abs(out.loss.item() - float(file[f"{case}.published.loss"])) > 1e-5
    out.loss.backward()
    gradients = {f"encoder.{name}": value for name, value in encoder_gradients(network, "microsoft").items()}
    check_gradients(file, f"{case}.restored.", their_gradients(network, gradients, 1))


# MixMAE ---------------------------------------------------------------------------------------------------------------


def test_mixmae():
    """Its network has no shifted windows and fixed positions. Mixed image i is made of image i and image 3 - i, so
    each pair is used in both orders.
    """
    with np.load(DATA / "mixmae.npz") as file:
        file = dict(file)
    state, images = official_state(file), images_of("mixmae", 4, 3, 96, 96)
    encoder = Swin(
        image_size=96, window=6, width=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), shift=False, positions=True
    )
    close(encoder.positions, file["fixed.absolute_pos_embed"][0], 1e-6, "positions")
    hidden = file["mask"]  # of the first image of a pair
    # theirs is the mean over all patches, of which 4 are of first images and 5 of second ones
    network = eesmm.MixMAE(
        encoder, both_orders=True, loss_weights=(0, 4 / 9, 5 / 9), decoder_width=64, decoder_blocks=2
    ).double()
    network.encoder.load_state_dict(
        weights.from_layout(
            {name: value for name, value in state.items() if name.startswith(("patch_embed", "layers", "norm."))},
            "microsoft",
        )
    )
    load_decoder(network, state, file["fixed.decoder_pos_embed"][0], 2)
    network.encoder.positions.copy_(torch.from_numpy(file["fixed.absolute_pos_embed"][0]))
    pairs, order = (
        images[torch.tensor([[0, 3], [1, 2]])],
        [0, 1, 3, 2],
    )  # order: the first images of the four mixed images
    masking = network.make_masking(torch.from_numpy(~hidden))
    latent = network.encoder(network.mix(torch.cat([pairs, pairs.flip(1)]), masking), masking.plan)
    close(latent, file["latent"][order], 1e-9, "latent")
    for k, units in enumerate(masking.ids_keep):
        predicted = to_their_pixels(predict(network, latent[:, units], units), 32)
        close(predicted[..., :48], file["predicted_first"][4 * k :][order], 1e-9, f"predictions of source {k + 1}")
        close(
            predicted @ torch.from_numpy(draw("probe:predicted", predicted.shape[-1:])),
            file["predicted_dot"][4 * k :][order],
            1e-9,
            "predictions, all values",
        )
    out = network(pairs, masking)
    assert len(out.predicted_sources) == 4 and len(network.eval()(pairs, masking).predicted_sources) == 2
    assert out.loss.item() == pytest.approx(float(file["loss"]), rel=1e-6)
    out.loss.backward()
    check_gradients(file, "", their_gradients(network, encoder_gradients(network, "microsoft"), 2))


# published recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, model", [("mae", "vit_micro"), ("greenmim", "swin_nano"), ("mixmae", "swin_nano"), ("small", "swin_nano")]
)
def test_a_published_recipe_has_the_details_of_its_code(recipe, model):
    method = recipe if recipe in eesmm.METHODS else "eesmm"
    args = train.arguments(
        [
            "--recipe",
            recipe,
            "--method",
            method,
            "--model",
            model,
            "--image-size",
            "32",
            "--window",
            "4",
            "--decoder-width",
            "64",
        ]
    )
    network, published = eesmm.from_settings(vars(args)), recipe != "small"
    assert args.adam_eps == (1e-8 if published else 1e-6)
    own = {1e-6} if recipe in ("mae", "greenmim") else {1e-5}
    assert {layer.eps for layer in network.modules() if isinstance(layer, nn.LayerNorm)} == own
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    for layer in linear:
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # a Xavier-uniform matrix stays within it, and comes close to it
        assert (0.95 * bound < layer.weight.abs().max() <= bound) or not published, layer
    assert all(not layer.bias.any() for layer in linear if layer.bias is not None) == published
    assert network.both_orders == (recipe == "mixmae")


# parameter groups and schedules ---------------------------------------------------------------------------------------

GROUPS = json.loads((DATA / "groups.json").read_text())


@pytest.mark.parametrize(
    "name, family, layout, layer_decay", [("swin_base", SWIN, "microsoft", 0.9), ("vit_base", VIT, "timm", 0.65)]
)
def test_parameter_groups_of_fine_tuning(name, family, layout, layer_decay):
    """Scale of the learning rate and weight decay of every parameter."""
    official = GROUPS[f"{name}_finetune"]
    with torch.device("meta"):
        network = finetune.Classifier(encoders.make(name), 10, fc_norm=family is VIT)
    depths = network.encoder.depths if family is SWIN else (network.encoder.depth,)
    theirs = {ours: key for ours, ([key], _) in family.names(layout, depths, {"head", "norm"}).items()}
    found = {
        key if key.startswith("fc_norm") else theirs[key.removeprefix("encoder.")]: [
            group["scale"],
            group["weight_decay"],
        ]
        for group in parameter_groups(network, 0.05, layer_decay)
        for key in group["names"]
    }
    expected = official["parameters"]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-9), key


@pytest.mark.parametrize(
    "name, warmup, settings",
    [
        ("mae.pretrain", 20, dict(peak=1e-3, start=0.0, end=0.0)),
        ("mae.finetune", 10, dict(peak=1e-3, start=0.0, end=1e-6)),
        ("swin.pretrain.of_step", 10, dict(peak=8e-4, start=4e-6, end=4e-5)),
        ("swin.finetune.of_step", 20, dict(peak=5e-3, start=1e-6, end=1e-6)),
    ],
)
def test_learning_rates_of_every_step(name, warmup, settings):
    """The top group's. SimMIM's cosine runs under its warm-up from step 0, and is another (docs/paper.md)."""
    with np.load(DATA / "schedules.npz") as file:
        expected = file[name][0]
    found = [learning_rate(step, steps=100, warmup_steps=warmup, **settings) for step in range(100)]
    assert np.abs(found - expected).max() < 1e-12


# k-NN and mean IoU ----------------------------------------------------------------------------------------------------

MEASURES = json.loads((DATA / "knn_iou.json").read_text())


@pytest.mark.parametrize("number", range(len(MEASURES["knn"]["results"])))
def test_nearest_neighbours_vote_as_dino_s(number):
    given, expected = MEASURES["knn"], MEASURES["knn"]["results"][number]
    train, test = (torch.tensor(given[part], dtype=torch.double) for part in ("train", "test"))
    scores = probes.nearest_neighbours(
        train,
        torch.tensor(given["train_labels"]),
        test,
        given["classes"],
        k=expected["k"],
        temperature=expected["temperature"],
    )
    found = probes.topk_accuracy(scores, torch.tensor(given["test_labels"]))
    assert (
        found["top1"] == pytest.approx(expected["top1"])
        and expected["top5_least"] - 1e-6 <= found["top5"] <= expected["top5_most"] + 1e-6
    )


@pytest.mark.parametrize("name", MEASURES["iou"]["cases"])
def test_mean_iou_of_reference_cases(name):
    case, confusion = (
        MEASURES["iou"]["cases"][name],
        torch.zeros(MEASURES["iou"]["classes"], MEASURES["iou"]["classes"], dtype=torch.long),
    )
    for truth, predicted in zip(case["truth"], case["predicted"]):
        confusion += pixel_confusion(torch.tensor(predicted), torch.tensor(truth), MEASURES["iou"]["classes"])
    assert confusion.tolist() == case["confusion"]
    assert iou_scores(confusion)["miou"] == pytest.approx(case["mean_iou"], abs=1e-4)
