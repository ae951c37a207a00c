"""Equal numbers in timm and Hugging Face, with weights that went there by weights.py."""

import pytest
import torch
from helpers import here
from torch import nn

import encoders
import finetune
import weights
from engine.errors import UserError

timm = pytest.importorskip("timm", minversion="1.0", reason="timm is not installed")
pytestmark = pytest.mark.peers("timm", "transformers")
SHAPES = {  # model: (settings, timm's name, size, size of images)
    "swin_tiny": ({}, "swin_tiny_patch4_window7_224"),
    "vit_tiny": ({}, "vit_tiny_patch16_224"),
    "vit_base": ({}, "vit_base_patch16_224"),
    "twins_small": ({}, "twins_svt_small"),
    "twins_large": ({}, "twins_svt_large"),
}


def random_encoder(name, **settings):
    """An encoder whose biases, tables and norms are large enough to matter."""
    torch.manual_seed(0)
    encoder = encoders.make(name, **settings).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def classifier_state(encoder, classes=7):
    head = nn.Linear(encoder.width, classes)
    return encoder.state_dict() | {"head.weight": head.weight.data, "head.bias": head.bias.data}


def logits(encoder, state, images):
    return encoder(images).mean(1) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_timm_gives_equal_logits_and_the_way_back_is_exact(name):
    encoder = random_encoder(name)
    state, images = classifier_state(encoder), torch.randn(2, 3, 224, 224)
    more = dict(global_pool="avg", fc_norm=False) if name.startswith("vit") else {}
    peer = timm.create_model(SHAPES[name][1], num_classes=7, **more).eval()
    peer.load_state_dict(weights.to_layout(state, encoder, "timm"))
    worst = (peer(images) - logits(encoder, state, images)).abs().max().item()
    assert worst < 1e-5, worst
    back = weights.from_layout(peer.state_dict(), "timm")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    double = (
        (
            peer.double()(images.double())
            - logits(encoder.double(), {key: value.double() for key, value in state.items()}, images.double())
        )
        .abs()
        .max()
    )
    assert double < 1e-9, double


@torch.no_grad()
def test_a_vit_of_timm_is_read_with_the_positions_of_its_class_token():
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    assert peer.pos_embed[0, 0].abs().max() > 0
    encoder, images = encoders.make("vit_tiny").eval(), torch.randn(2, 3, 224, 224)
    weights.load_into(weights.from_layout(peer.state_dict(), "timm"), encoder)
    assert (encoder(images) - peer.forward_features(images)[:, 1:]).abs().max() < 1e-5


@torch.no_grad()
def test_maes_file_is_read(tmp_path):
    """Its layout: timm's names, with the decoder and a mask token beside them."""
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    file = {
        "model": peer.state_dict()
        | {
            "mask_token": torch.zeros(1, 1, 512),
            "decoder_embed.weight": torch.zeros(512, 192),
            "decoder_blocks.0.attn.qkv.weight": torch.zeros(3, 3),
        }
    }
    torch.save(file, tmp_path / "mae.pth")
    state, head, layout = weights.read(tmp_path / "mae.pth")
    encoder, images = encoders.make("vit_tiny").eval(), torch.randn(1, 3, 224, 224)
    weights.load_into(state, encoder)
    assert (
        layout == "timm"
        and head is None
        and (encoder(images) - peer.forward_features(images)[:, 1:]).abs().max() < 1e-5
    )


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("twins_micro", dict(image_size=48), "do not divide"),
        ("vit_micro", dict(image_size=64), "give the image size of the encoder"),
    ],
)
def test_what_timm_would_compute_differently_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        weights.to_layout(
            encoders.make(name, **settings).state_dict(),
            encoders.make(name, image_size=48 if "twins" in name else 32),
            "timm",
        )


@pytest.mark.parametrize("name, size", [("vit_micro", 64), ("twins_micro", 64), ("swin_micro", 64)])
@pytest.mark.parametrize("classes", [None, 3])
def test_the_printed_code_loads_the_file(tmp_path, monkeypatch, capsys, name, size, classes):
    monkeypatch.chdir(tmp_path)
    encoder, images = random_encoder(name, image_size=size), torch.randn(2, 3, size, size)
    state = classifier_state(encoder, classes) if classes else encoder.state_dict()
    key = "model" if classes is None else "classifier"
    model = {f"encoder.{k}" if not k.startswith("head.") else k: value for k, value in state.items()}
    config = {"arguments": {"image_size": size, "window": 4}, "classes": ["a", "b", "c"]}
    torch.save({"kind": "finetune" if classes else "pretrain", "model": model, "config": config}, f"{key}.pt")
    here(weights.main, "to-timm", f"{key}.pt", "there.pt")
    names = {}
    exec(capsys.readouterr().out.splitlines()[-1].removeprefix("load it: "), names)
    with torch.no_grad():
        theirs = names["model"].eval()(images)
        ours = logits(encoder, state, images) if classes else encoder(images).mean(1)
        assert (theirs - ours).abs().max() < 1e-5
    here(weights.main, "from-timm", "there.pt", "back.pt")
    back = torch.load("back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@torch.no_grad()
def test_timm_gives_maes_classifier_equal_logits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = finetune.Classifier(random_encoder("vit_micro"), 3, fc_norm=True).eval()
    for parameter in (*network.fc_norm.parameters(), *network.head.parameters()):
        parameter.data += torch.randn_like(parameter)
    torch.save(
        {
            "kind": "finetune",
            "model": network.state_dict(),
            "config": {"arguments": {"model": "vit_micro", "image_size": 32, "fc_norm": True}},
        },
        "last.pt",
    )
    here(weights.main, "to-timm", "last.pt", "there.pt")
    names, images = {}, torch.randn(2, 3, 32, 32)
    exec(capsys.readouterr().out.splitlines()[-1].removeprefix("load it: "), names)
    worst = (names["model"].eval()(images) - network(images)).abs().max().item()
    assert worst < 1e-5, worst


# Hugging Face ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, classes",
    [("swin_tiny", 224, None), ("swin_tiny", 224, 3), ("vit_tiny", 224, None), ("vit_micro", 64, None)],
)
@torch.no_grad()
def test_hugging_face_gives_equal_numbers(tmp_path, monkeypatch, capsys, name, size, classes):
    monkeypatch.chdir(tmp_path)
    encoder, images = random_encoder(name, image_size=size), torch.randn(2, 3, size, size)
    state = classifier_state(encoder, classes) if classes else encoder.state_dict()
    torch.save(state, "ours.pt")
    here(weights.main, "to-huggingface", "ours.pt", "there", "--image-size", size)
    names = {}
    exec(capsys.readouterr().out.splitlines()[-1].removeprefix("load it: "), names)
    out = names["model"].eval()(images)
    theirs = out.logits if classes else out.last_hidden_state
    ours = logits(encoder, state, images) if classes else encoder(images)
    worst = (theirs[:, -ours.shape[1] :] - ours).abs().max().item()  # a ViT's class token comes first
    assert worst < 1e-5, worst
    here(weights.main, "from-huggingface", "there", "back.pt")
    back = torch.load("back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    names["model"].save_pretrained("theirs")  # as the library itself writes it
    read, head, layout = weights.read("theirs")
    assert layout == "huggingface" and all(torch.equal(value, state[key]) for key, value in read.items())


@torch.no_grad()
def test_hugging_faces_mae_sees_the_same_under_the_same_mask(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=64,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    peer, encoder = (
        transformers.ViTMAEModel(config).eval(),
        encoders.make("vit_micro", image_size=64, patch=8, depth=3).eval(),
    )
    noise, images = torch.rand(1, 64), torch.randn(1, 3, 64, 64)
    out = peer(images, noise=noise)
    peer.save_pretrained(tmp_path / "mae")
    weights.load_into(weights.read(tmp_path / "mae")[0], encoder)
    order = noise[0].argsort()[:16]
    visible = torch.zeros(64, dtype=torch.bool).scatter(0, order, True)
    theirs = out.last_hidden_state[0, 1:][order.argsort()]
    assert (encoder(images, visible)[0] - theirs).abs().max() < 1e-5
