"""weights.py: strict loads and equal logits in torchvision and timm, Microsoft's keys, refusals, files, the command
line.
"""

import argparse
import os
import re
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from helpers import run, slow
from PIL import Image
from torch import nn

import encoders
import finetune
import swin
import weights
from encoders import layouts
from engine import dist
from engine.dist import Distributed
from engine.errors import UserError

SMALL = dict(image_size=64, patch=2, window=4, width=12, depths=(2, 3, 1), heads=(1, 2, 3))
BASE = dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Truncated normals cost most of the time of building a Swin-B; threads that wait for a busy core most of the
    rest.
    """
    monkeypatch.setattr(
        nn.init, "trunc_normal_", lambda tensor, mean=0.0, std=1.0, **_: nn.init.normal_(tensor, mean, std)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder_of(settings, seed=0):
    """An encoder whose tables and biases are large enough to matter."""
    torch.manual_seed(seed)
    encoder = swin.Swin(**settings).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith(("table", "bias")):
            nn.init.normal_(parameter, std=0.5)
    return encoder


def layout_of(state):
    return layouts.detect_layout(state)[1]


def meta(**settings):
    """A Swin without numbers, whose sizes an export needs."""
    with torch.device("meta"):
        return swin.Swin(**settings)


def state_of(encoder, classes=None):
    """Plain state dict, with a random classifier if asked for."""
    head = nn.Linear(encoder.width, classes or 1)
    return encoder.state_dict() | ({f"head.{k}": v for k, v in head.state_dict().items()} if classes else {})


def same(a, b):
    return set(a) == set(b) and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def logits(encoder, state, images):
    return encoder(images).mean(1) @ state["head.weight"].T + state["head.bias"]


# ------------------------------------------------------------------------------------------------- the three layouts


@pytest.mark.parametrize("layout", weights.EXPORTS)
@pytest.mark.parametrize(
    "settings, classes",
    slow([(settings, classes) for settings in (SMALL, BASE) for classes in (None, 5)], fast=[(SMALL, 5)]),
)
def test_round_trip_is_exact(layout, classes, settings):
    with torch.device("meta" if settings is not SMALL else "cpu"):
        encoder = swin.Swin(**settings)
        sizes = state_of(encoder, classes)
    state = {
        key: torch.arange(k, k + value.numel()).float().view(value.shape)
        for k, (key, value) in enumerate(sizes.items())
    }
    there = weights.to_layout(state, encoder, layout)
    assert same(weights.from_layout(there, layout), state)
    assert layout_of(there) == layout
    assert weights.read_state({"model": there})[1] == layout
    before = dict(state)
    weights.from_layout(there, layout), weights.to_layout(state, encoder, layout)
    assert list(before) == list(state) and all(before[k] is state[k] for k in state)


@pytest.mark.parametrize("settings, name", slow([(dict(), "swin_t"), (BASE, "swin_b")], fast=[(dict(), "swin_t")]))
@torch.no_grad()
def test_torchvision_gives_equal_logits(settings, name):
    encoder = encoder_of(settings)
    state = state_of(encoder, 1000)
    with torch.device("meta"):
        peer = getattr(torchvision.models, name)(weights=None).eval()
    peer.load_state_dict(weights.to_layout(state, encoder, "torchvision"), strict=True, assign=True)
    images = torch.randn(1, 3, 224, 224)
    worst = (peer(images) - logits(encoder, state, images)).abs().max().item()
    assert worst < 1e-5, worst

    for parameter in peer.parameters():  # the way back must bring what is new; `assign` shares memory with our encoder
        parameter.data = parameter + 0.02 * torch.randn(parameter.shape[-1])
    state = weights.from_layout(peer.state_dict(), "torchvision")
    assert same(weights.to_layout(state, encoder, "torchvision"), peer.state_dict())
    assert weights.load_into(state, encoder) == f"loaded all {len(encoder.state_dict())} tensors of the encoder"
    expected = peer(images)
    worst = (expected - logits(encoder, state, images)).abs().max().item()
    assert worst < 1e-5 and expected.isfinite().all(), worst


@pytest.mark.peers("timm")
@torch.no_grad()
def test_timm_gives_equal_logits():
    import timm

    peer = timm.create_model("swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 224, 224)
    state = weights.from_layout(peer.state_dict(), "timm")
    encoder = swin.swin_tiny().eval()
    assert same(weights.to_layout(state, encoder, "timm"), peer.state_dict())
    weights.load_into(state, encoder)
    worst = (peer(images) - logits(encoder, state, images)).abs().max().item()
    assert worst < 1e-5, worst
    encoder = encoder_of(dict(width=96))
    state = state_of(encoder, 1000)
    peer.load_state_dict(weights.to_layout(state, encoder, "timm"), strict=True)
    worst = (peer(images) - logits(encoder, state, images)).abs().max().item()
    assert worst < 1e-5, worst


@pytest.mark.parametrize(
    "name, layout",
    [
        *(("swin_micro", layout) for layout in weights.EXPORTS),
        ("vit_micro", "timm"),
        ("vit_micro", "huggingface"),
        ("twins_micro", "timm"),
    ],
)
def test_no_layout_transposes_a_matrix(name, layout):
    """Each matrix of an export is one of ours, or some of its rows where a library splits query, key and value. A
    square one would fit transposed, too.
    """
    encoder = encoders.make(name, image_size=64, window=4)
    state = {key: torch.rand_like(value) for key, value in encoder.state_dict().items()}
    ours = [value for value in state.values() if value.ndim == 2]
    matrices = {
        key: value
        for key, value in weights.to_layout(state, encoder, layout).items()
        if value.is_floating_point() and value.ndim == 2
    }
    wrong = [
        key
        for key, value in matrices.items()
        if not any(
            torch.equal(value, block)
            for matrix in ours
            if matrix.shape[1] == value.shape[1]
            for block in matrix.split(len(value))
        )
    ]
    assert len(matrices) > 20 and not wrong


def microsoft_tiny():
    """{key: shape} of Microsoft's swin_tiny_patch4_window7_224, written from its modules and not from weights.py."""
    keys = {
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.proj.bias": (96,),
        "patch_embed.norm.weight": (96,),
        "patch_embed.norm.bias": (96,),
        "norm.weight": (768,),
        "norm.bias": (768,),
        "head.weight": (1000, 768),
        "head.bias": (1000,),
    }
    for stage, (depth, width, heads, windows) in enumerate(
        [(2, 96, 3, 64), (2, 192, 6, 16), (6, 384, 12, 4), (2, 768, 24, 1)]
    ):
        for block in range(depth):
            linear = {
                "norm1": (width,),
                "norm2": (width,),
                "attn.qkv": (3 * width, width),
                "attn.proj": (width, width),
                "mlp.fc1": (4 * width, width),
                "mlp.fc2": (width, 4 * width),
            }
            at = f"layers.{stage}.blocks.{block}."
            keys |= {f"{at}{name}.weight": shape for name, shape in linear.items()}
            keys |= {f"{at}{name}.bias": shape[:1] for name, shape in linear.items()}
            keys |= {
                at + "attn.relative_position_bias_table": (169, heads),
                at + "attn.relative_position_index": (49, 49),
            }
            if block % 2 and stage < 3:  # the last map is one window, which is not shifted
                keys[at + "attn_mask"] = (windows, 49, 49)
        if stage < 3:
            keys |= {
                f"layers.{stage}.downsample.norm.weight": (4 * width,),
                f"layers.{stage}.downsample.norm.bias": (4 * width,),
                f"layers.{stage}.downsample.reduction.weight": (2 * width, 4 * width),
            }
    return keys


def test_microsoft_keys_and_shapes():
    out = weights.to_layout(state_of(swin.swin_tiny(), 1000), swin.swin_tiny(), "microsoft")
    assert {key: tuple(value.shape) for key, value in out.items()} == microsoft_tiny()
    peer = torchvision.models.swin_t(weights=None)
    index = out["layers.0.blocks.0.attn.relative_position_index"]
    assert index.dtype == torch.int64 and torch.equal(index.flatten(), peer.features[1][0].attn.relative_position_index)
    for side, window in [(14, 7), (8, 4), (12, 3)]:
        assert torch.equal(weights.attention_mask(side, side, window), mask_by_loop(side, window))


def mask_by_loop(side, window):
    """Cyclic shift spelled out: two tokens of a rolled window attend if neither axis wrapped between them."""
    shift, per_side = window // 2, side // window
    mask = torch.zeros(per_side**2, window**2, window**2)
    for number in range(per_side**2):
        for a in range(window**2):
            for b in range(window**2):
                rows = [(number // per_side) * window + t // window + shift for t in (a, b)]
                columns = [(number % per_side) * window + t % window + shift for t in (a, b)]
                if any((x[0] >= side) != (x[1] >= side) for x in (rows, columns)):
                    mask[number, a, b] = -100
    return mask


# ------------------------------------------------------------------------------------------------- refusals


def test_wrong_keys_are_listed():
    out = weights.to_layout(state_of(encoder_of(SMALL), 3), meta(**SMALL), "microsoft")
    del out["layers.1.blocks.2.mlp.fc1.bias"]
    out["absolute_pos_embed"] = torch.zeros(1)
    message = "missing keys: 1 (layers.1.blocks.2.mlp.fc1.bias); keys that do not belong: 1 (absolute_pos_embed)"
    with pytest.raises(UserError, match=re.escape(message)):
        weights.from_layout(out, "microsoft")
    for lost in (
        "head.bias",
        "norm.weight",
        "layers.0.downsample.reduction.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ):
        out = weights.to_layout(state_of(encoder_of(SMALL), 3), meta(**SMALL), "microsoft")
        del out[lost]
        with pytest.raises(UserError, match=re.escape(lost)):
            weights.from_layout(out, "microsoft")
    out = weights.to_layout(state_of(encoder_of(SMALL)), meta(**SMALL), "microsoft")
    out = {key: value for key, value in out.items() if not key.startswith("layers.1.")}
    with pytest.raises(UserError, match=r"missing keys: \d+ \(layers\.1.*\.\.\."):
        weights.from_layout(out, "microsoft")
    with pytest.raises(UserError, match="its keys: 1 .a"):
        layout_of({"a": 1})


@pytest.mark.parametrize(
    "key, shape",
    [
        ("stages.0.merge.reduction.weight", (20, 48)),
        ("stages.1.blocks.0.mlp.up.weight", (48, 24)),
        ("head.weight", (3, 47)),
        ("stages.1.blocks.1.attention.table", (25, 2)),
        ("stages.2.blocks.0.attention.table", (48, 3)),
        ("embed.proj.weight", (12, 13)),
        ("stages.0.blocks.0.attention.table", (49,)),
        ("stages.0.blocks.0.attention.table", (49, 0)),
        ("stages.0.blocks.0.attention.table", (49, 5)),
    ],
)
def test_other_shapes_are_refused(key, shape):
    state = state_of(encoder_of(SMALL), 3) | {key: torch.zeros(shape)}
    with pytest.raises(UserError, match="Swin Transformer"):
        weights.to_layout(state, meta(**SMALL), "timm")


def test_what_a_peer_cannot_compute_is_refused():
    small = meta(**SMALL | dict(image_size=16))  # maps of 8, 4 and 2 tokens
    assert small.windows == (4, 4, 2)
    shrunken = state_of(swin.Swin(**SMALL | dict(image_size=16)))
    with pytest.raises(UserError, match="pads small maps"):
        weights.to_layout(shrunken, small, "torchvision")
    for layout in ("timm", "microsoft"):
        assert weights.to_layout(shrunken, small, layout)
        with pytest.raises(UserError, match="--image-size"):
            weights.to_layout(shrunken, meta(**SMALL), layout)
    tiny = dict(width=6, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    for layout in weights.EXPORTS:
        assert weights.to_layout(state_of(swin.Swin(**tiny)), meta(**tiny), layout)
        with pytest.raises(UserError, match="do not divide the map of 64"):
            weights.to_layout(state_of(swin.Swin(**tiny)), meta(**tiny, image_size=256), layout)
        for settings in (dict(shift=False), dict(positions=True)):
            with pytest.raises(UserError, match="such as mixmim_base"):
                weights.to_layout(state_of(swin.Swin(**tiny)), meta(**tiny, **settings), layout)


# ------------------------------------------------------------------------------------------------- other windows


@pytest.mark.parametrize("old, new", [(6, 7), (7, 14), (7, 6)])
def test_tables_are_interpolated(old, new):
    a, b = 2 * old - 1, 2 * new - 1
    rows = torch.arange(a).repeat_interleave(a)
    table = torch.stack([torch.full((a * a,), 3.0), rows.float(), torch.randn(a * a)], dim=1)
    out = weights.resize_table(table, new).view(b, b, 3)
    assert torch.allclose(out[..., 0], torch.tensor(3.0), atol=1e-6)
    expected = (torch.arange(b) + 0.5) * a / b - 0.5  # align_corners=False: pixel centres
    inside = (expected >= 1) & (expected <= a - 2)
    error = (out[..., 1] - expected[:, None])[inside].abs().max().item()
    assert error < 0.06, error  # of one step: the cubic kernel with a = -0.75 does not keep a ramp exactly
    assert (out[1:, :, 1] > out[:-1, :, 1]).all()
    assert torch.allclose(out[new - 1, :, 1], torch.tensor(old - 1.0), atol=1e-5)  # offset 0 stays in the middle
    table[:, 2] = 0
    assert torch.equal(weights.resize_table(table, new).view(b, b, 3)[..., :2], out[..., :2])


@pytest.mark.parametrize("window", [7, 8, 12, 14])
def test_tables_of_window_6_are_resized_as_by_official_code(window):
    """Reference values of Microsoft's bicubic rule and of SimMIM's geometric one (tests/data/README.md)."""
    with np.load(Path(__file__).parent / "data" / "position_tables.npz") as file:
        for name in ("smooth", "random"):
            table = torch.from_numpy(file[name])
            for function, rule in ((weights.resize_table, "bicubic"), (weights.resize_table_geometric, "geometric")):
                expected = torch.from_numpy(file[f"{name}.{window}.{rule}"]).float()
                worst = (function(table, window) - expected).abs().max().item()
                assert worst < 1e-5, (name, rule, worst)
    assert torch.equal(weights.resize_table_geometric(table, 5), weights.resize_table(table, 5))


def test_the_ablation_recipe_fine_tunes_with_geometric_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = encoder_of(dict(image_size=192, window=6))
    torch.save({f"encoder.{key}": value for key, value in source.state_dict().items()}, "w.pt")
    for recipe, function in (("ablation", weights.resize_table_geometric), ("imagenet", weights.resize_table)):
        args = finetune.arguments(
            [
                "--data",
                "x",
                "--checkpoint",
                "w.pt",
                "--model",
                "swin_tiny",
                "--recipe",
                recipe,
                "--image-size",
                "224",
                "--window",
                "7",
            ]
        )
        model = finetune.make_model(args, 2, 3, Distributed(torch.device("cpu")))
        table = source.stages[1].blocks[0].attention.table.detach()
        assert torch.equal(model.encoder.stages[1].blocks[0].attention.table, function(table, 7))


def test_fit_to_another_window():
    source = state_of(encoder_of(dict(image_size=192, window=6, width=12, depths=(2, 2, 3, 2), heads=(1, 2, 3, 4))), 3)
    target = swin.Swin(width=12, depths=(2, 2, 3, 2), heads=(1, 2, 3, 4)).eval()
    line = weights.load_into(source, target)
    assert line == "loaded all 132 tensors of the encoder; interpolated 9 relative position bias tables (window 6 to 7)"
    assert all(torch.equal(value, source[key]) for key, value in target.state_dict().items() if "table" not in key)
    with torch.no_grad():
        assert target(torch.randn(1, 3, 224, 224)).isfinite().all()
    small = swin.Swin(image_size=96, window=6, width=12, depths=(2, 2, 3, 2), heads=(1, 2, 3, 4))
    assert "interpolated 2 relative position bias tables (window 6 to 3)" in weights.load_into(source, small)
    for wrong, message in (
        (
            dict(width=24),
            r"Swin Transformer of patch 4, channels 3, width 24.*embed.norm.bias \(12,\) where \(24,\) is expected",
        ),
        (dict(depths=(2, 2, 2, 2)), r"stages.2.blocks.2.norm1.weight \(48,\) where nothing is expected"),
        (dict(depths=(2, 2, 4, 2)), r"stages.2.blocks.3.norm1.weight missing where \(48,\) is expected"),
        (dict(patch=2), "48 values, which are not 3 channels of the model's patch of 2 x 2"),
        (dict(heads=(1, 2, 3, 6)), r"stages.3.blocks.0.attention.table \(169, 4\) where \(169, 6\) is expected"),
    ):
        model = swin.Swin(**dict(width=12, depths=(2, 2, 3, 2), heads=(1, 2, 3, 4)) | wrong)
        with pytest.raises(UserError, match=message):
            weights.load_into(source, model)


# ------------------------------------------------------------------------------------------------- files


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice_was_run",)


def test_read(tmp_path):
    encoder = encoder_of(SMALL)
    plain, full = state_of(encoder), state_of(encoder, 3)
    head = {key: value for key, value in full.items() if key.startswith("head.")}
    model = {f"encoder.{key}": value for key, value in plain.items()}
    config = {"config": {"arguments": {"image_size": 64}}}
    average = {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in (model | head).items()}
    pixels = {"head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7), "decoder.norm.bias": torch.zeros(2)}
    files = {
        "encoder": (full, head),
        "pretrain": ({"kind": "pretrain", "model": model | pixels} | config, None),
        "finetune": ({"kind": "finetune", "model": model | head} | config, head),
        "torchvision": ({"state_dict": weights.to_layout(full, encoder, "torchvision")}, head),
        "timm": (weights.to_layout(plain, encoder, "timm"), None),
        "microsoft": ({"model": weights.to_layout(full, encoder, "microsoft"), "epoch": 3}, head),
    }
    stale = {"model": {key: torch.zeros_like(value) for key, value in (model | head).items()}}
    for layout, (file, expected) in [
        *files.items(),
        ("finetune", ({"kind": "finetune", "ema": average} | stale | config, head)),
    ]:
        torch.save(file, tmp_path / "file.pt")
        state, found_head, found = weights.read(tmp_path / "file.pt")
        assert found == layout and same(state, plain) and same(found_head or {}, expected or {}), layout
        weights.load_into(state, encoder)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malice()}, "malice.pt")
    Path("torn.pt").write_bytes(b"PK\3\4 torn")
    Image.new("RGB", (8, 8)).save("photograph.jpg")
    Path("torn.safetensors").write_bytes(b"torn")
    torch.save({"a": torch.zeros(1)}, "foreign.pt")
    for name, message in [
        ("malice.pt", "could run code"),
        ("torn.pt", "not a valid"),
        ("torn.safetensors", "safetensors"),
        ("photograph.jpg", "not a checkpoint"),
        ("foreign.pt", "its keys: 1"),
        ("absent.pt", "no such"),
        ("absent.safetensors", "no such"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            weights.read(name)
        assert str(error.value).count(name) == 1 and "\n" not in str(error.value)
    assert not Path("malice_was_run").exists()


def test_safetensors(tmp_path, monkeypatch):
    state = state_of(encoder_of(SMALL), 3)
    out = weights.to_layout(state, meta(**SMALL), "microsoft")
    monkeypatch.setitem(encoders.MODELS, "small", partial(swin.Swin, **SMALL))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "weights.py",
            "to-microsoft",
            *(str(tmp_path / name) for name in ("ours.pt", "a.safetensors")),
            "--image-size",
            "64",
        ],
    )
    torch.save(state, tmp_path / "ours.pt")
    assert weights.main() == 0
    assert same(safetensors.torch.load_file(tmp_path / "a.safetensors"), out)
    encoder, head, layout = weights.read(tmp_path / "a.safetensors")
    assert layout == "microsoft" and same(encoder | head, state)


def test_command_line(tmp_path):
    encoder = swin.swin_micro(image_size=64)
    torch.save(
        {
            "kind": "pretrain",
            "model": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
            "config": {"arguments": {"image_size": 64}},
        },
        tmp_path / "last.pt",
    )
    done = run("weights.py", "to-microsoft", "last.pt", "there.pt", cwd=tmp_path)
    assert done.stdout == (
        "wrote there.pt: 128 tensors of a Swin Transformer of patch 2, channels 3, width 96, depths (2, 4, 2), "
        "heads (3, 6, 12), windows (4, 4, 4)\n"
        "load it: import torch; from models.swin_transformer import SwinTransformer; model = "
        "SwinTransformer(img_size=64, patch_size=2, window_size=4, "
        "embed_dim=96, depths=(2, 4, 2), num_heads=(3, 6, 12), num_classes=0); "
        "model.load_state_dict(torch.load('there.pt', weights_only=True)['model'])\n"
    )
    there = torch.load(tmp_path / "there.pt", weights_only=True)["model"]
    assert there["layers.0.blocks.1.attn_mask"].shape == (64, 16, 16)  # at the checkpoint's own 64 px
    assert same(weights.from_layout(there, "microsoft"), encoder.state_dict())


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(weights.to_layout(state_of(encoder_of(SMALL)), meta(**SMALL), "microsoft"), "there.pt")
    monkeypatch.setattr(sys, "argv", ["weights.py", "from-timm", "there.pt", "back.pt"])
    with pytest.raises(SystemExit) as ended:
        dist.run_main(weights.main)
    assert ended.value.code == 2 and not Path("back.pt").exists()
    assert capsys.readouterr() == ("", "weights.py: error: there.pt: holds Microsoft's layout, not timm's layout\n")


def test_main(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encoders.MODELS, "small", partial(swin.Swin, **SMALL))
    state = state_of(encoder_of(SMALL), 3)
    torch.save(state, "a.pt")
    for layout in weights.EXPORTS:
        there = "b" if layout == "huggingface" else "b.pt"
        assert weights.main([f"to-{layout}", "a.pt", there, "--image-size", "64"]) == 0
        assert weights.main([f"from-{layout}", there, "c.pt"]) == 0
        assert same(torch.load("c.pt", weights_only=True), state)
    assert "classifier" not in capsys.readouterr().out
    with pytest.raises(UserError, match="b: holds something already"):
        weights.main(["to-huggingface", "a.pt", "b", "--image-size", "64"])
    with pytest.raises(UserError, match="overwrite"):
        weights.main(["to-timm", "a.pt", "./a.pt"])
    with pytest.raises(UserError, match="no folder absent"):
        weights.main(["to-timm", "a.pt", "absent/b.pt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b", "b.pt", "c.pt"]


@pytest.mark.parametrize(
    "size", [(96, 160), (32, 128), (128, 32)]
)  # 6 x 10 patches of 16 px are no square; 8 x 32 patches of 4 px are as many as 16 x 16
@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_a_rectangular_vit_survives_an_export(tmp_path, monkeypatch, capsys, layout, size):
    monkeypatch.chdir(tmp_path)
    name = "vit_tiny" if size == (96, 160) else "vit_micro"
    encoder = encoders.make(name, image_size=size)
    nn.init.normal_(encoder.positions)
    torch.save(
        {
            "kind": "pretrain",
            "model": under("encoder.", encoder.state_dict()),
            "config": {"arguments": {"model": name, "image_size": list(size)}},
        },
        "last.pt",
    )
    there, told = "there" if layout == "huggingface" else "there.pt", f"{size[0]}x{size[1]}"
    assert weights.main([f"to-{layout}", "last.pt", there]) == 0
    assert layout == "huggingface" or f"img_size={size}" in capsys.readouterr().out
    assert weights.main([f"from-{layout}", there, "back.pt", "--image-size", told]) == 0
    for path in ("last.pt", there, "back.pt"):
        again = encoders.make(name, image_size=size)
        weights.load(path, again)
        assert torch.equal(again.positions, encoder.positions), path
        assert ("warning: the file does not say" in capsys.readouterr().err) == (
            path not in ("last.pt", "there") and size != (96, 160)
        )
    if layout == "huggingface":
        Path("there/config.json").write_text("{")
        with pytest.raises(UserError, match="there/config.json: is not Hugging Face's"):
            weights.open_weights("there")
    larger = encoders.make(name, image_size=tuple(2 * side for side in size))
    assert weights.load("last.pt", larger).endswith(
        f"({encoder.rows} x {encoder.columns} to {larger.rows} x {larger.columns})"
    )
    if size == (96, 160):  # of the same shape, so the map is known
        assert "interpolated the position embedding (6 x 10 to 12 x 20)" in weights.load("back.pt", larger)
        with pytest.raises(UserError, match=r"positions of 60 patches .* give that size \(--image-size\)"):
            weights.load("back.pt", encoders.make(name))
        with pytest.raises(UserError, match=r"positions of 60 patches .* give that size \(--image-size\)"):
            weights.main(["to-timm", "back.pt", "again.pt"])
    assert weights.main(["to-timm", "back.pt", "again.pt", "--image-size", told]) == 0


def test_maes_classifier_goes_to_timm_and_back(tmp_path, monkeypatch, capsys):
    """Its norm of the mean token is timm's fc_norm; an encoder that is read from it begins with a new final norm."""
    monkeypatch.chdir(tmp_path)
    network = finetune.Classifier(encoders.make("vit_micro"), 3, fc_norm=True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(
        {
            "kind": "finetune",
            "model": network.state_dict(),
            "config": {"arguments": {"model": "vit_micro", "image_size": 32, "fc_norm": True}},
        },
        "last.pt",
    )
    assert weights.main(["to-timm", "last.pt", "there.pt"]) == 0
    assert "fc_norm=True" in capsys.readouterr().out
    there = torch.load("there.pt", weights_only=True)
    assert torch.equal(there["fc_norm.weight"], network.fc_norm.weight) and "norm.weight" not in there
    assert weights.main(["from-timm", "there.pt", "back.pt"]) == 0
    assert same(
        torch.load("back.pt", weights_only=True),
        {key.removeprefix("encoder."): value for key, value in network.state_dict().items()},
    )
    encoder = encoders.make("vit_micro")
    assert "the final norm is initialised" in weights.load("back.pt", encoder)
    assert torch.equal(encoder.norm.weight, torch.ones(192)) and torch.equal(
        encoder.positions, network.encoder.positions
    )
    assert weights.model_in("back.pt") == "vit_micro"
    torch.save(
        {key: value for key, value in torch.load("back.pt", weights_only=True).items() if not key.startswith("head.")},
        "without_head.pt",
    )
    for path in ("last.pt", "without_head.pt"):  # the second has no final norm, which Hugging Face's encoder needs
        with pytest.raises(UserError, match="classifies by its class token"):
            weights.main(["to-huggingface", path, "folder"])


def test_mixmaes_network_is_told_from_a_swin(tmp_path, monkeypatch):
    """Its tensors have the same names and shapes."""
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        state = {
            f"encoder.{key}": torch.zeros(1).expand(value.shape)
            for key, value in encoders.make("mixmim_base").state_dict().items()
        }
    arguments = {"model": "mixmim_base", "image_size": 224, "window": 14}
    monkeypatch.setattr(
        weights,
        "open_weights",
        lambda path: weights.read_state({"kind": "pretrain", "model": state, "config": {"arguments": arguments}}),
    )
    assert weights.model_in("last.pt") == "mixmim_base" and weights.encoder_of("last.pt").windows == (14, 14, 14, 7)
    with pytest.raises(UserError, match="no Swin without shifted windows or with positions"):
        weights.main(["to-timm", "last.pt", "there.pt"])


# files as other programs write them -----------------------------------------------------------------------------------


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def yacs():
    """A class that pickles as yacs.config.CfgNode does: a dict of settings with its own flags beside them."""
    if "yacs.config" not in sys.modules:
        sys.modules.update({name: types.ModuleType(name) for name in ("yacs", "yacs.config")})
        sys.modules["yacs.config"].CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = sys.modules["yacs.config"]
    node = module.CfgNode(MODEL=module.CfgNode(NAME="simmim"))
    node.__dict__["__immutable__"] = True
    return node


def openmmlab(state, head=()):
    """A state dict in OpenMMLab's names and merging order, written out by hand, with a norm for each stage as its
    detectors have them.
    """
    out = {}
    for key, value in weights.to_layout(state, meta(**SMALL), "microsoft").items():
        if key.endswith("attn_mask"):
            continue
        if "downsample" in key:
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        for old, new in (
            ("patch_embed.proj.", "patch_embed.projection."),
            ("layers.", "stages."),
            (".attn.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
        ):
            key = key.replace(old, new)
        out["norm2" + key[4:] if key.startswith("norm.") else key] = value
    return out | {f"norm{i}.{part}": torch.zeros(12 * 2**i) for i in range(2) for part in ("weight", "bias")}


def wrappings(state):
    """{what it is: (file, layout)}."""
    there, decoder = (
        weights.to_layout(state, meta(**SMALL), "microsoft"),
        {"decoder.0.weight": torch.zeros(7), "decoder.0.bias": torch.zeros(7)},
    )
    timm, here = weights.to_layout(state, meta(**SMALL), "timm"), dict(state)
    return {
        "Microsoft's": ({"model": there, "optimizer": {}, "config": yacs()}, "microsoft"),
        "SimMIM's": (
            {
                "model": under("encoder.", there) | {"encoder.mask_token": torch.zeros(1, 1, 12)} | decoder,
                "config": yacs(),
                "epoch": 7,
            },
            "microsoft",
        ),
        "MoBY's": (
            {
                "model": under("encoder.", there)
                | under("encoder_k.", there)
                | {"projector.linear1.weight": torch.zeros(3), "queue1": torch.zeros(2)},
                "config": yacs(),
            },
            "microsoft",
        ),
        "Lightning's": (
            {"state_dict": under("model.", timm), "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2"},
            "timm",
        ),
        "Lightning's, a backbone in a model": (
            {"state_dict": under("model.backbone.", timm) | {"model.head.weight": torch.zeros(2)}},
            "timm",
        ),
        "data parallel": (under("module.", here), "encoder"),
        "compiled whole": (under("_orig_mod.", here), "encoder"),
        "compiled by block": (
            {re.sub(r"(blocks\.\d+)", r"\1._orig_mod", key): value for key, value in here.items()},
            "encoder",
        ),
        "data parallel, compiled": ({"model": under("module._orig_mod.", timm)}, "timm"),
        "a teacher": ({"teacher": under("backbone.", timm), "student": under("module.", timm)}, "timm"),
        "OpenMMLab's detector": (
            {"meta": {}, "state_dict": under("backbone.", openmmlab(state)) | {"bbox_head.weight": torch.zeros(3)}},
            "openmmlab",
        ),
        "OpenMMLab's backbone": (openmmlab(state), "openmmlab"),
        "an encoder of ours in a model": ({"model": under("encoder.", here) | decoder}, "encoder"),
    }


@pytest.mark.parametrize("what", wrappings(state_of(encoder_of(SMALL))))
def test_weights_as_they_come(tmp_path, what):
    state = state_of(encoder_of(SMALL))
    file, layout = wrappings(state)[what]
    torch.save(file, tmp_path / "file.pth")
    for name in ("yacs", "yacs.config"):
        sys.modules.pop(name, None)  # a reader need not have it
    read, head, found = weights.read(tmp_path / "file.pth")
    assert found == layout and same(read, state) and head is None


def test_openmmlabs_merging_is_ours():
    """Its PatchMerging unfolds 2 x 2 tokens, channels first; the same numbers come out."""
    state = state_of(encoder_of(SMALL))
    theirs, x = openmmlab(state), torch.randn(1, 12, 4, 4)
    width = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (1, 4, 4 * 12)
    norm = torch.nn.functional.layer_norm(
        width, (48,), theirs["stages.0.downsample.norm.weight"], theirs["stages.0.downsample.norm.bias"]
    )
    out = norm @ theirs["stages.0.downsample.reduction.weight"].T
    merge = encoder_of(SMALL).stages[0].merge
    merge.load_state_dict(
        {
            key.removeprefix("stages.0.merge."): value
            for key, value in state.items()
            if key.startswith("stages.0.merge.")
        }
    )
    children = [x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    ours = merge(
        torch.stack(children, dim=-1).permute(0, 2, 3, 4, 1).reshape(1, 16, 12)
    )  # four children of each token in a row
    torch.testing.assert_close(ours, out)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "a web page, not the file that was asked for"),
        ({"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(1)}, "timm.s layout, but missing keys"),
        (
            {
                "model": {
                    "layers.0.blocks.0.attn.logit_scale": torch.zeros(1),
                    "patch_embed.proj.weight": torch.zeros(1),
                }
            },
            "a Swin Transformer V2",
        ),
        ({"model": {}, "args": argparse.Namespace(lr=1)}, r"objects besides tensors \(argparse.Namespace\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_weights_is_told(tmp_path, content, message, suffix):
    path = tmp_path / f"file{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif suffix == ".pth":
        torch.save(content, path)
    else:
        return
    with pytest.raises(UserError, match=message):
        weights.read(path)


class Microsofts(torch.nn.Module):
    """The original code's constructor and keys; what is in its modules does not matter to a strict load."""

    def __init__(self, img_size, patch_size, window_size, embed_dim, depths, num_heads, num_classes):
        super().__init__()
        encoder = swin.Swin(
            image_size=img_size, patch=patch_size, window=window_size, width=embed_dim, depths=depths, heads=num_heads
        )
        self.state = weights.to_layout(state_of(encoder, num_classes or None), encoder, "microsoft")

    def load_state_dict(self, state):
        assert state.keys() == self.state.keys() and all(state[key].shape == self.state[key].shape for key in state)
        self.state = state


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(
    "layout", ["torchvision", pytest.param("timm", marks=pytest.mark.peers("timm")), "microsoft"]
)  # Hugging Face's: test_peers.py
def test_the_printed_code_loads_the_file(tmp_path, monkeypatch, capsys, layout, classes):
    monkeypatch.chdir(tmp_path)
    original = types.ModuleType("models.swin_transformer")
    original.SwinTransformer = Microsofts
    (
        monkeypatch.setitem(sys.modules, "models", types.ModuleType("models")),
        monkeypatch.setitem(sys.modules, "models.swin_transformer", original),
    )
    monkeypatch.setitem(encoders.MODELS, "small", partial(swin.Swin, **SMALL))
    torch.save(state_of(encoder_of(SMALL), classes), "a.pt")
    assert weights.main([f"to-{layout}", "a.pt", "b.pt", "--image-size", "64"]) == 0
    code = capsys.readouterr().out.splitlines()[-1].removeprefix("load it: ")
    names = {}
    exec(code, names)  # every key, strictly
    loaded = names["model"].state if layout == "microsoft" else names["model"].state_dict()
    written = torch.load("b.pt", weights_only=True)
    assert same(
        {key: loaded[key] for key in loaded if not key.endswith("index")} if layout == "timm" else loaded,
        written["model"] if layout == "microsoft" else written,
    )
