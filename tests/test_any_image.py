"""Every program on images of other channels, depths and shapes; every encoder and method on them; weights that go to
other channels.
"""

import importlib
import json
import shutil

import numpy as np
import pytest
import safetensors
import tifffile
import torch
from helpers import here, log, make_images, pictures, run, slow
from PIL import Image
from torch import nn

import bench
import encoders
import finetune
import mixing
import show
import train
import weights
from engine import dist
from engine.errors import DataError, UserError
from images import open_train_and_val
from images.formats import PixelFormat
from images.sources import FileImages
from model import EESMM, METHODS, build

MICRO = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")


def large(module):
    """Weights large enough to matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


# encoders and methods -------------------------------------------------------------------------------------------------

EACH = [
    (name, method, *of_images)
    for name in MICRO
    for method in METHODS
    if method != "mixmae" or "swin" in name
    for of_images in ((1, (32, 48)), (5, (48, 16)))
]


@pytest.mark.parametrize(
    "name, method, channels, size",
    slow(
        EACH,
        fast=[
            ("swin_micro", "eesmm", 5, (48, 16)),
            ("vit_micro", "mae", 1, (32, 48)),
            ("twins_micro", "greenmim", 5, (48, 16)),
            ("swin_nano", "mixmae", 1, (32, 48)),
            ("swin_nano", "simmim", 5, (48, 16)),
        ],
    ),
)
def test_every_encoder_and_method_trains_on_oblong_images_of_any_channels(name, method, channels, size):
    encoder = encoders.make(name, image_size=size, channels=channels, window=4)
    network = build(method, encoder, decoder_width=32, **{"decoder_blocks": 1} if method != "simmim" else {})
    out = network(torch.randn(2, network.sources, channels, *size))
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert out.predicted_sources.shape == (2, network.sources, encoder.units, channels * encoder.unit**2)
    assert (encoder.rows * encoder.unit, encoder.columns * encoder.unit) == size == encoder.image_size
    with pytest.raises(ValueError, match=rf"images must be \(b, {network.sources}, {channels}, h, w\)"):
        network(torch.randn(2, network.sources, 3, *size))


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_an_oblong_map_of_one_unit_s_height_is_a_row(name):
    """Visible-only encoding against all tokens, with everything visible; and the transposed image where an encoder
    has no direction.
    """
    unit = encoders.make(name).unit
    encoder = large(encoders.make(name, image_size=(unit, 4 * unit), window=4).double())
    images = torch.randn(2, 3, unit, 4 * unit, dtype=torch.double)
    assert (encoder(images) - encoder(images, torch.ones(4, dtype=torch.bool))).abs().max() < 1e-10


@torch.no_grad()
def test_oblong_visible_only_is_exact_against_masked_dense_attention():
    """Swin, five channels, 160 x 96: tokens of hidden units kept, but out of everybody's attention."""
    encoder = large(encoders.make("swin_micro", image_size=(160, 96), channels=5, window=4).double())
    visible = mixing.draw_masks(1, encoder.units, 0.75, torch.Generator().manual_seed(1))[0]
    images = torch.randn(2, 5, 160, 96, dtype=torch.double)
    apart = encoder.plan(visible, partition=True)  # visible and hidden units attend each to their own kind only
    kept = encoder(images, apart)[:, visible]
    assert (encoder(images, visible) - kept).abs().max() < 1e-9


@pytest.mark.parametrize(
    "size, message",
    [("32x20", "32x20 is not a multiple of the unit, 8 pixels .*try 32x16"), ("20", "image size 20 is .*try 16")],
)
def test_sizes_that_are_not_made_of_units(size, message):
    from engine.flags import image_size

    with pytest.raises(UserError, match=message):
        encoders.make("swin_micro", image_size=image_size(size))


@pytest.mark.parametrize("text, size", [("224", 224), ("224x160", (224, 160)), ("96X96", 96)])
def test_image_sizes_on_the_command_line(text, size):
    assert train.arguments(["--image-size", text]).image_size == size


@pytest.mark.parametrize(
    "words",
    [
        ["--image-size", "12x"],
        ["--image-size", "4"],
        ["--image-size", "8x8x8"],
        ["--value-range", "9", "3"],
        ["--value-range", "p9"],
        ["--value-range", "p60,p40"],
        ["--value-range", "1", "2", "3"],
        ["--channels", "0"],
        ["--show-channels", "1", "2"],
        ["--pages", "both"],
        ["--knn-every", "-1"],
        ["--track", "paper"],
    ],
)
def test_flags_that_say_nothing_are_one_line(words):
    with pytest.raises(UserError, match=f"argument {words[0]}"):
        train.arguments(words)


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [(3, 1), (3, 5), (1, 3), (4, 3), (3, 3)])
@torch.no_grad()
def test_weights_of_other_channels_load_by_timms_rule(old, new):
    source = large(encoders.make("swin_micro", channels=old))
    target = encoders.make("swin_micro", channels=new)
    line = weights.load_into(source.state_dict(), target, channels=old)
    kernel = source.state_dict()["embed.proj.weight"].reshape(96, old, 2, 2)
    expected = kernel.sum(1, keepdim=True) if new == 1 else torch.cat([kernel] * 9, dim=1)[:, :new] * (old / new)
    assert torch.allclose(target.state_dict()["embed.proj.weight"].reshape(96, new, 2, 2), expected) or old == new
    assert ("patch embedding from" in line) == (old != new) and (f"from {old} to {new} channels" in line or old == new)
    if new == 1:  # a grey image has the tokens that it has as three equal channels
        grey = torch.randn(2, 1, 32, 32)
        assert torch.allclose(target(grey), source(grey.expand(-1, old, -1, -1)), atol=1e-3)


@pytest.mark.peers("timm")
def test_timms_own_function_makes_the_same_weights():
    adapt = importlib.import_module("timm.models._manipulate").adapt_input_conv
    weight = torch.randn(8, 3, 2, 2)
    for new in (1, 2, 4, 5, 8):
        mine = weights.to_channels(weight.reshape(8, -1), 3, new).reshape(8, new, 2, 2)
        assert torch.allclose(mine, adapt(new, weight), atol=1e-6)


def test_a_patch_is_not_taken_for_channels():
    """48 values are 3 channels of 4 x 4 and 12 of 2 x 2: a Swin of the other patch is refused."""
    fine, coarse = (encoders.make("swin_nano", patch=patch, channels=channels) for patch, channels in ((2, 3), (4, 3)))
    with pytest.raises(UserError, match="48 values, which are not 3 channels of the model's patch of 2 x 2"):
        weights.load_into(coarse.state_dict(), fine)
    twelve = encoders.make("swin_nano", patch=2, channels=12)
    assert "adapted the patch embedding from 12 to 3 channels" in weights.load_into(
        twelve.state_dict(), fine, channels=12
    )


@pytest.mark.parametrize("name", ["vit_micro", "swin_micro"])
def test_positions_of_an_oblong_map_are_told_by_the_checkpoint(tmp_path, name):
    encoder = large(encoders.make(name, image_size=(32, 48), channels=5, window=4))
    torch.save(
        {
            "kind": "pretrain",
            "model": {f"encoder.{key}": value for key, value in encoder.state_dict().items()},
            "config": {"arguments": {"image_size": [32, 48], "channels": 5, "window": 4}},
        },
        tmp_path / "last.pt",
    )
    same = encoders.make(name, image_size=(32, 48), channels=5, window=4)
    assert "interpolated" not in weights.load(tmp_path / "last.pt", same)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in same.state_dict().items())
    line = weights.load(tmp_path / "last.pt", encoders.make(name, image_size=32, channels=5, window=4))
    assert (
        ("interpolated the position embedding (8 x 12 to 8 x 8)" in line)
        == (name == "vit_micro")
        == ("interpolated" in line)
    )
    assert weights.model_in(tmp_path / "last.pt") == name


@pytest.mark.parametrize(
    "size, layout, message",
    [
        ((64, 32), "timm", None),
        ((64, 16), "timm", "do not divide the map of 8x2"),
        ((64, 32), "microsoft", "does not shift at all"),
        ((128, 64), "microsoft", None),
    ],
)
def test_oblong_maps_that_others_compute_differently_are_refused(size, layout, message):
    encoder = encoders.make("swin_micro", image_size=size, window=4)
    if message:
        with pytest.raises(UserError, match=message):
            weights.to_layout(encoder.state_dict(), encoder, layout)
    else:
        weights.to_layout(encoder.state_dict(), encoder, layout)


@pytest.mark.peers("timm")
@pytest.mark.parametrize(
    "name, channels, size, settings",
    [
        ("swin_micro", 5, (96, 160), {}),
        ("swin_tiny", 5, (256, 128), dict(window=4)),
        ("vit_micro", 5, (96, 160), {}),
        ("twins_micro", 1, (64, 32), {}),
    ],
)
@torch.no_grad()
def test_timm_gives_equal_logits_for_oblong_images_of_any_channels(
    tmp_path, capsys, monkeypatch, name, channels, size, settings
):
    """By the code that weights.py prints."""
    monkeypatch.chdir(tmp_path)
    encoder = large(encoders.make(name, image_size=size, channels=channels, **{"window": 4} | settings))
    head, images = nn.Linear(encoder.width, 3), torch.randn(2, channels, *size)
    model = {f"encoder.{key}": value for key, value in encoder.state_dict().items()} | {
        "head.weight": head.weight,
        "head.bias": head.bias,
    }
    config = {
        "arguments": {"image_size": list(size), "window": 4, "channels": channels},
        "classes": ["a", "b", "c"],
        "pixels": PixelFormat(
            channels, value_range=(0, 9), is_float=True, mean=(0.5,) * channels, std=(0.1,) * channels
        ).to_dict(),
    }
    torch.save(
        {"kind": "finetune", "model": {key: value.detach().clone() for key, value in model.items()}, "config": config},
        "last.pt",
    )
    assert weights.main(["to-timm", "last.pt", "there.pt"]) == 0
    assert PixelFormat.of(json.loads((tmp_path / "there.pt.pixels.json").read_text())).mean == (0.5,) * channels
    names = {}
    exec(capsys.readouterr().out.split("load it: ")[1].splitlines()[0], names)
    ours = head(encoder(images).mean(1))
    assert (names["model"].eval()(images) - ours).abs().max() < 1e-5 * ours.abs().max().clamp(min=1)


def test_mean_and_range_go_along_with_what_is_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    form = PixelFormat(5, "channels", "auto", tuple(range(5)), tuple(range(5, 10)), True, (0.5,) * 5, (0.1,) * 5)
    encoder = encoders.make("swin_micro", image_size=64, channels=5, window=4)
    torch.save(
        {
            "kind": "pretrain",
            "model": {f"encoder.{key}": value for key, value in encoder.state_dict().items()},
            "config": {"arguments": {"image_size": 64, "channels": 5, "window": 4}, "pixels": form.to_dict()},
        },
        "last.pt",
    )
    for command, target in (("to-timm", "a.safetensors"), ("to-timm", "a.pt"), ("to-huggingface", "folder")):
        assert weights.main([command, "last.pt", target]) == 0
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["pixels"])
    beside, prepared = (
        json.loads((tmp_path / name).read_text()) for name in ("a.pt.pixels.json", "folder/preprocessor_config.json")
    )
    assert all(PixelFormat.of(saved) == form for saved in (metadata, beside, prepared["pixels"]))
    assert prepared["image_mean"] == [0.5] * 5 and prepared["size"] == {"height": 64, "width": 64}
    assert (
        "its images: 5 channels, values (0, 1, 2, 3, 4) to (5, 6, 7, 8, 9) as 0 to 1, minus (0.5,"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["num_channels"] == 5


# programs -------------------------------------------------------------------------------------------------------------


def make_bands(folder, each=10, channels=5, size=(26, 40)):
    """Class folders of float TIFFs with bands of very different ranges."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] / 8
    for part, count in (("train", each), ("val", each // 2)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True, exist_ok=True)
            for k in range(count):
                bands = [
                    10.0 ** (band - 1)
                    * (np.sin((1 + label) * (rows + band * columns) + rng.uniform(0, 6)) + (band == label))
                    for band in range(channels)
                ]
                tifffile.imwrite(
                    folder / part / f"class{label}" / f"{k}.tif",
                    np.float32(bands),
                    planarconfig="separate",
                    photometric="minisblack",
                )
    return folder


WORDS = [
    "--channels",
    5,
    "--image-size",
    "16x24",
    "--window",
    2,
    "--model",
    "swin_nano",
    "--workers",
    0,
    "--batch-size",
    4,
]
PRETRAIN = [
    *WORDS,
    "--recipe",
    "cifar",
    "--decoder-width",
    32,
    "--epochs",
    2,
    "--warmup-epochs",
    1,
    "--eval-images",
    8,
    "--log-every",
    2,
    "--knn-every",
    1,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands")
    make_bands(folder / "data")
    with pictures():
        here(train.main, "--data", folder / "data", *PRETRAIN, "--show-channels", 3, 2, 1, "--output", folder / "run")
    return folder


def test_a_run_on_bands_is_measured_once_and_goes_on(trained, tmp_path):
    saved = torch.load(trained / "run" / "last.pt", weights_only=True)
    form = PixelFormat.of(saved["config"]["pixels"])
    files = FileImages(
        trained / "data" / "train", [f"class{c}/{k}.tif" for c in range(2) for k in range(10)], None, [], form=form
    )
    raw = np.stack([np.moveaxis(tifffile.imread(trained / "data" / "train" / name), 0, -1) for name in files.names])
    assert np.allclose(form.low, raw.min((0, 1, 2))) and np.allclose(form.high, raw.max((0, 1, 2)))
    share = (raw - raw.min((0, 1, 2))) / np.ptp(raw, axis=(0, 1, 2))
    assert np.allclose(form.mean, share.mean((0, 1, 2)), atol=1e-4) and np.allclose(
        form.std, share.std((0, 1, 2)), atol=1e-4
    )
    assert saved["config"]["mean"] == list(form.mean) and saved["config"]["arguments"]["channels"] == 5
    assert len(Image.open(trained / "run" / "reconstructions.png").convert("RGB").getcolors(10**6)) > 100

    words = ["--data", trained / "data", *PRETRAIN]
    here(train.main, *words, "--max-steps", 6, "--output", tmp_path / "both")
    tifffile.imwrite(
        trained / "data" / "train" / "class0" / "new.tif",
        np.full((5, 26, 40), 1e9, np.float32),
        planarconfig="separate",
        photometric="minisblack",
    )
    try:  # a file that is new neither enters the run nor its range
        here(train.main, *words, "--resume", "auto", "--output", tmp_path / "both")
    finally:
        (trained / "data" / "train" / "class0" / "new.tif").unlink()
    again = torch.load(tmp_path / "both" / "last.pt", weights_only=True)
    assert (
        all(torch.equal(again["model"][key], value) for key, value in saved["model"].items())
        and again["config"]["pixels"] == saved["config"]["pixels"]
    )
    assert [row for row in log(tmp_path / "both") if row["step"] > 6] == [
        row for row in log(trained / "run") if row["step"] > 6
    ]


def test_a_run_resumed_from_inside_its_folder_keeps_its_pixel_format(trained, tmp_path, monkeypatch, capsys):
    """`--resume last.pt` in the run folder: nothing is measured again, although the files have other values by now."""
    words = ["--data", tmp_path / "data", *PRETRAIN]
    shutil.copytree(trained / "data", tmp_path / "data")
    here(train.main, *words, "--max-steps", 5, "--output", tmp_path / "run")
    before = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["config"]["pixels"]
    tifffile.imwrite(
        tmp_path / "data" / "train" / "class0" / "0.tif",
        np.full((5, 26, 40), 1e9, np.float32),
        planarconfig="separate",
        photometric="minisblack",
    )
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    here(train.main, *words, "--max-steps", 6, "--resume", "last.pt")
    assert (
        torch.load("last.pt", weights_only=True)["config"]["pixels"] == before
        and "measured" not in capsys.readouterr().out
    )
    monkeypatch.chdir(tmp_path)
    (
        tmp_path / "run" / "config.json"
    ).unlink()  # without it the images are measured again, and the checkpoint's own format differs
    with pytest.raises(UserError, match="the pixel format was .*, is .*1000000000"):
        train.main([str(word) for word in [*words, "--max-steps", 7, "--resume", "run/last.pt"]])


@pytest.mark.parametrize("more", [["--cache", "cache"], ["--in-memory"], ["--workers", 1]])
def test_cache_memory_and_workers_change_no_number(trained, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    here(train.main, "--data", trained / "data", *PRETRAIN, *more, "--output", "out")
    if more[0] == "--in-memory":  # cropped on the device, without antialiasing
        assert log("out")[-1]["eval_error"] == pytest.approx(log(trained / "run")[-1]["eval_error"], rel=0.2)
    else:
        assert log("out") == log(trained / "run")


def test_two_processes_measure_and_train_as_one_does(trained, tmp_path):
    words = [word for word in PRETRAIN if word not in ("--batch-size", 4)]
    run("train.py", "--data", trained / "data", *words, "--batch-size", 2, "--output", "two", cwd=tmp_path, processes=2)
    for a, b in zip(log(trained / "run"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), (a, b)


@pytest.mark.parametrize("name", slow(["vit_micro", "twins_micro"], fast=["twins_micro"]))
def test_the_other_encoders_go_the_same_way(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    here(train.main, "--data", trained / "data", *PRETRAIN, "--model", name, "--max-steps", 3, "--output", "run")
    here(
        finetune.main,
        "--data",
        trained / "data",
        "--checkpoint",
        "run/last.pt",
        "--window",
        2,
        "--workers",
        0,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--output",
        "tuned",
    )
    here(finetune.main, "--data", trained / "data", "--checkpoint", "tuned/last.pt", "--eval")


def test_what_follows_pre_training_has_its_pixels(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = ["--data", trained / "data", "--checkpoint", trained / "run" / "last.pt"]
    tune = ["--window", 2, "--workers", 0, "--batch-size", 4, "--epochs", 4, "--warmup-epochs", 0]
    here(finetune.main, *where, *tune, "--max-steps", 7, "--output", "tuned")
    said = capsys.readouterr().out
    assert (
        "swin_nano at 16x24 px" in said
        and "RandAugment without operations on colour" in said
        and "pixels: 5 channels; value range" in said
    )
    here(finetune.main, "--resume", "tuned", "--max-steps", 20)
    here(finetune.main, *where, *tune, "--output", "whole")
    assert log("tuned")[-1] == log("whole")[-1]
    before, after = (
        torch.load(path, weights_only=True)["config"]["pixels"]
        for path in (trained / "run" / "last.pt", "tuned/last.pt")
    )
    assert before == after
    here(finetune.main, "--data", trained / "data", "--checkpoint", "tuned/last.pt", "--eval")
    for protocol in ("linear", "knn", "features"):
        here(
            finetune.main,
            *where,
            "--protocol",
            protocol,
            "--output",
            protocol,
            *([] if protocol == "features" else ["--window", 2]),
        )
    assert np.load("features/features.npy").shape == (30, 192)
    here(finetune.main, "--checkpoint", "tuned/last.pt", "--predict", trained / "data" / "val", "--output", "predicted")
    assert len((tmp_path / "predicted" / "predictions.csv").read_text().splitlines()) == 11
    pair = [trained / "data" / "val" / f"class{k}" / "0.tif" for k in range(2)]
    for channels in ([], ["--show-channels", "5"], ["--show-channels", "3", "2", "1"]):
        with pictures():
            show.main(
                [*map(str, pair), "--checkpoint", str(trained / "run" / "last.pt"), "-o", "picture.png", *channels]
            )
        low, high = Image.open("picture.png").convert("L").getextrema()
        assert (low, high) == (0, 255)
    with pytest.raises(UserError, match="--show-channels 6: the model's images have 5"):
        show.main([*map(str, pair), "--checkpoint", str(trained / "run" / "last.pt"), "--show-channels", "6"])


def test_fine_tuning_on_other_channels_adapts_and_measures_anew(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(2):
            (tmp_path / "grey" / part / f"c{label}").mkdir(parents=True)
            for k in range(6):
                Image.fromarray(rng.integers(0, 900 * (1 + label), (20, 30), dtype=np.uint16)).save(
                    tmp_path / "grey" / part / f"c{label}" / f"{k}.png"
                )
    words = [
        "--data",
        "grey",
        "--checkpoint",
        trained / "run" / "last.pt",
        "--window",
        2,
        "--workers",
        0,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
    ]
    here(finetune.main, *words, "--channels", 1, "--output", "out")
    said = capsys.readouterr().out
    assert "patch embedding from 5 to 1 channels (their sum)" in said and "pixels: 1 channel, values 0 to 17" in said
    with pytest.raises(DataError, match=r"1 channel, where --channels is 5"):
        finetune.main([str(word) for word in [*words, "--output", "no"]])
    here(
        train.main,
        "--data",
        "grey",
        "--init",
        trained / "run" / "last.pt",
        *PRETRAIN,
        "--channels",
        3,
        "--max-steps",
        1,
        "--output",
        "more",
    )
    assert "patch embedding from 5 to 3 channels (repeated, times 5 / 3)" in capsys.readouterr().out


def test_deep_images_after_ordinary_ones_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photographs")
    here(
        train.main,
        "--data",
        "photographs",
        *[word for word in PRETRAIN if word not in ("--channels", 5)],
        "--max-steps",
        1,
        "--output",
        "run",
    )
    for label in range(2):
        (tmp_path / "deep" / f"c{label}").mkdir(parents=True)
        for k in range(20):
            Image.fromarray(np.full((20, 30), 100 * k + label, np.uint16)).save(
                tmp_path / "deep" / f"c{label}" / f"{k}.png"
            )
    here(
        finetune.main,
        "--data",
        "deep",
        "--checkpoint",
        "run/last.pt",
        "--window",
        2,
        "--workers",
        0,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--output",
        "out",
    )
    assert "pixels: 3 channels, values 0 to 1901 (measured on 38 of 38 images)" in capsys.readouterr().out


def test_bad_files_among_bands_are_named_and_too_many_end_the_run(trained, tmp_path):
    folder = make_bands(tmp_path / "data")
    (folder / "train" / "class0" / "3.tif").write_bytes(b"no image")
    tifffile.imwrite(
        folder / "train" / "class1" / "4.tif",
        np.zeros((3, 26, 40), np.float32),
        planarconfig="separate",
        photometric="minisblack",
    )
    words = ["train.py", "--data", "data", *PRETRAIN, "--max-steps", 5]
    done = run(*words, "--max-bad-share", 0.2, "--output", "out", cwd=tmp_path)
    listed = dict(line.split("\t") for line in (tmp_path / "out" / "bad_files.txt").read_text().splitlines())
    assert (
        "3 channels, where --channels is 5" in listed["class1/4.tif"]
        and "class0/3.tif" in listed
        and "warning: unreadable" in done.stderr
    )
    error = run(*words, "--output", "again", cwd=tmp_path, status=2).stderr.splitlines()[-1]
    assert "2 of 20 files cannot be read" in error
    for path in (folder / "train").glob("*/*.tif"):
        path.write_bytes(b"no image")
    error = run(*words, "--output", "third", cwd=tmp_path, status=2).stderr.splitlines()[-1]
    assert (
        error.startswith("train.py: error: none of 20 images can be read; class0/0.tif: ")
        and not (tmp_path / "third").exists()
    )


def test_pages_of_a_stack_are_trained_on_and_shown(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    for part, pages in (("train", 12), ("val", 4)):
        tifffile.imwrite(
            f"data/{part}/stack.tif", rng.integers(0, 235, (pages, 20, 20)).astype(np.uint16), photometric="minisblack"
        )
    words = [word for word in PRETRAIN if word not in ("--channels", 5)]
    here(
        train.main,
        "--data",
        "data",
        *words,
        "--channels",
        1,
        "--pages",
        "images",
        "--value-range",
        "p1,p99",
        "--image-size",
        16,
        "--output",
        "run",
    )
    assert (tmp_path / "run" / "files.txt").read_text().splitlines() == [f"stack.tif#{k}" for k in range(12)]
    assert log("run")[-1]["eval_feature_rank"] >= 1
    show.main(["data/val/stack.tif#0", "data/val/stack.tif#3", "--checkpoint", "run/last.pt", "-o", "picture.png"])
    image = np.asarray(Image.open("picture.png").convert("RGB")).astype(int)
    assert np.ptp(image, axis=2).max() == 0  # one channel is grey


def test_photographs_of_memory_take_other_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_part, held, lines = open_train_and_val(None, size=32, form=PixelFormat(1, "channels", "auto"), measured=False)
    assert (
        train_part.pixels.shape[1:] == (1, 32, 32)
        and train_part.pixels.dtype == torch.uint8
        and "pixels: 1 channel, values 0 to 255" in lines[1]
    )
    stretched = open_train_and_val(None, size=32, form=PixelFormat(3, "channels", "p5,p95"), measured=False)[0]
    assert stretched.pixels.dtype == torch.float32 and 0.4 < stretched.form.mean[0] < 0.6
    with pytest.raises(DataError, match="3 channels, where --channels is 4"):
        open_train_and_val(None, size=32, form=PixelFormat(4, "channels", "auto"), measured=False)


def test_bench_runs_on_oblong_images_of_any_channels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here(
        bench.main,
        "--model",
        "swin_micro",
        "--image-size",
        "16x24",
        "--channels",
        5,
        "--window",
        2,
        "--batch-size",
        4,
        "--steps",
        1,
        "--methods",
        "eesmm",
        "simmim",
        "--decoder-width",
        32,
        "--no-memory",
        "--output",
        "bench.json",
    )
    assert "16x24" in capsys.readouterr().out or (tmp_path / "bench.json").exists()


def test_four_views_of_oblong_images(trained, tmp_path):
    here(
        train.main,
        "--data",
        trained / "data",
        *PRETRAIN,
        "--views",
        "four",
        "--max-steps",
        1,
        "--output",
        tmp_path / "out",
    )
    assert isinstance(EESMM(encoders.make("swin_micro", image_size=(16, 24))).encoder.image_size, tuple)
    assert dist.versions()["torch"]
