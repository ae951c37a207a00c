"""segment.py: pairs of images and masks, crops of both together, whole images in the test, measures by hand and by
scikit-image, bad input.
"""

import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from helpers import SMALL, here, log, run, slow
from kills import equal
from PIL import Image
from skimage.metrics import contingency_table

import encoders
import segment
import show
import train
import weights
from engine import report
from engine.data import MaskCrops
from engine.dist import Distributed
from engine.errors import DataError, UserError
from engine.probes import iou_scores, pixel_confusion, predict_sliding
from images import masks
from images.crops import random_scaled_box
from images.formats import PixelFormat

CPU = Distributed(torch.device("cpu"))


def disc(rng, sides=(40, 48)):
    """A bright disc on dark noise, and where it is."""
    rows, columns = np.mgrid[0 : sides[0], 0 : sides[1]]
    inside = (rows - rng.uniform(8, sides[0] - 8)) ** 2 + (columns - rng.uniform(8, sides[1] - 8)) ** 2 < rng.uniform(
        30, 90
    )
    return np.clip(60 + 120 * inside + rng.normal(0, 25, sides), 0, 255).astype(np.uint8), inside


def grow(root, parts=("train", "val"), each=8):
    rng = np.random.default_rng(0)
    for part in parts:
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            pixels, inside = disc(rng)
            Image.fromarray(pixels).convert("RGB").save(root / part / "images" / f"{k}.jpg", quality=95)
            Image.fromarray(inside.astype(np.uint8)).save(root / part / "masks" / f"{k}.png")
    return root


WORDS = [
    "--image-size",
    16,
    "--window",
    2,
    "--workers",
    0,
    "--batch-size",
    4,
    "--log-every",
    2,
    "--model",
    "swin_nano",
    "--eval-every",
    2,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    grow(folder / "data")
    here(
        train.main,
        "--data",
        folder / "data" / "train" / "images",
        *SMALL,
        "--recipe",
        "cifar",
        "--batch-size",
        4,
        "--max-steps",
        1,
        "--output",
        folder / "pre",
    )
    return folder


@pytest.mark.parametrize(
    "protocol, rate, most",
    slow([("frozen", 2, 90), ("finetune", 0.3, 90), ("pixels", 8, 60)], fast=[("frozen", 2, 90)]),
)
def test_every_protocol_learns_discs_and_goes_on_exactly(
    trained, tmp_path, monkeypatch, capsys, drawn, protocol, rate, most
):
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        trained / "data",
        "--checkpoint",
        trained / "pre" / "last.pt",
        *WORDS,
        "--protocol",
        protocol,
        "--base-lr",
        rate,
        "--epochs",
        12,
        "--warmup-epochs",
        1,
        "--eval-every",
        6,
    ]
    here(segment.main, *words, "--output", "whole")
    here(segment.main, *words, "--output", "both", "--max-steps", 10)
    here(segment.main, "--resume", "both", "--max-steps", 24)
    saved = [torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "both")]
    assert equal(saved[0]["model"], saved[1]["model"]) and log("whole")[-1] == log("both")[-1]
    row = log("whole")[-1]
    assert row["eval_miou"] > 60 and row["eval_pixel_accuracy"] > most, row
    assert "mean IoU" in capsys.readouterr().out
    frozen = [key for key, value in saved[0]["model"].items() if key.startswith("encoder.")]
    before = torch.load(trained / "pre" / "last.pt", weights_only=True)["model"]
    changed = (
        any(not torch.equal(saved[0]["model"][key], before[key]) for key in frozen if key in before)
        if protocol != "pixels"
        else False
    )
    assert changed == (protocol == "finetune")
    assert (
        Image.open("whole/segmentation.png").size[0] == 900
        and len(list((tmp_path / "whole" / "pictures").glob("segmentation-*.jpg"))) > 1
    )
    assert report.write(tmp_path / "whole", show.METRIC_LABELS).stat().st_size > 10_000
    here(
        segment.main,
        "--checkpoint",
        "whole/last.pt",
        "--predict",
        trained / "data" / "val" / "images",
        "--output",
        "predicted",
    )
    confusion = torch.zeros(2, 2, dtype=torch.long)
    for k in range(8):
        found, truth = (
            torch.from_numpy(np.array(Image.open(path)).astype(int))
            for path in (f"predicted/masks/{k}.jpg.png", trained / "data" / "val" / "masks" / f"{k}.png")
        )
        confusion += pixel_confusion(found, truth, 2)
    assert iou_scores(confusion)["miou"] == pytest.approx(row["eval_miou"], abs=1e-9)


@pytest.mark.parametrize("name", slow(["vit_micro", "twins_micro"], fast=["vit_micro"]))
def test_other_encoders_and_bands(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
        pairs = [disc(rng) for _ in range(6)]
        tifffile.imwrite(
            f"data/{part}/images/stack.tif",
            np.stack([20 * pixels.astype(np.uint16) for pixels, _ in pairs]),
            photometric="minisblack",
        )
        tifffile.imwrite(
            f"data/{part}/masks/stack.tif",
            np.stack([7 * inside.astype(np.uint16) for _, inside in pairs]),
            photometric="minisblack",
        )
    for protocol in ("frozen", "finetune"):
        here(
            segment.main,
            "--data",
            "data",
            "--init",
            "scratch",
            *WORDS,
            "--model",
            name,
            "--image-size",
            "16x24",
            "--channels",
            1,
            "--pages",
            "images",
            "--value-range",
            "p1,p99",
            "--foreground",
            "--protocol",
            protocol,
            "--epochs",
            2,
            "--warmup-epochs",
            0,
            "--output",
            protocol,
            "--drop-path",
            0.1,
            "--train-images",
            5,
        )
        assert 0 < log(protocol)[-1]["eval_miou"] <= 100
    assert (tmp_path / "frozen" / "files.txt").read_text().splitlines() == [f"stack.tif#{k}" for k in (0, 1, 3, 4, 5)]
    assert weights.read("finetune/last.pt")[2] == "segment" and weights.model_in("finetune/last.pt") == name


def test_the_loss_does_not_depend_on_how_a_batch_is_divided(trained, tmp_path):
    """Masks of which very different shares have labels: one process, two micro-steps, two processes. They test the
    same, too.
    """
    shutil.copytree(trained / "data", tmp_path / "data")
    for k, path in enumerate(sorted((tmp_path / "data" / "train" / "masks").iterdir())):
        mask = np.array(Image.open(path))
        mask[:, 5 * k :] = 255  # not labelled
        Image.fromarray(mask).save(path)
    words = [
        "segment.py",
        "--data",
        tmp_path / "data",
        "--init",
        "scratch",
        *WORDS,
        "--log-every",
        1,
        "--epochs",
        4,
        "--warmup-epochs",
        0,
        "--protocol",
        "finetune",
    ]
    run(*words, "--batch-size", 4, "--output", "one", cwd=tmp_path)
    run(*words, "--batch-size", 2, "--accumulate", 2, "--output", "micro", cwd=tmp_path)
    run(*words, "--batch-size", 2, "--output", "two", cwd=tmp_path, processes=2)
    for name in ("micro", "two"):
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / name), strict=True):
            assert a == pytest.approx(b, rel=1e-3), (name, a, b)


# measures -------------------------------------------------------------------------------------------------------------


def test_mean_iou_by_hand_on_a_four_by_four_map():
    """Class 0: 6 in both, 8 and 8 in each: 6 / 10. Class 1: 4 in both, 5 and 6: 4 / 7. Class 2: 1 in both, 2 and 1:
    1 / 2. One pixel has no class.
    """
    truth = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 2, 2, 255]])
    found = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2]])
    result = iou_scores(pixel_confusion(found, truth, 4))
    assert result["iou"][:3] == pytest.approx([60, 400 / 7, 50]) and np.isnan(result["iou"][3])
    assert result["miou"] == pytest.approx((60 + 400 / 7 + 50) / 3) and result["pixel_accuracy"] == pytest.approx(
        100 * 11 / 15
    )


def test_measures_against_scikit_image():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (60, 70)), rng.integers(0, 5, (60, 70))
    truth[rng.random(truth.shape) < 0.1] = 255
    table = contingency_table(truth, found, ignore_labels=[255]).toarray()[:5, :5] * truth.size
    mine = pixel_confusion(torch.from_numpy(found), torch.from_numpy(truth), 5).numpy()
    shares = mine / mine.sum()
    assert np.allclose(table / table.sum(), shares)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert iou_scores(torch.from_numpy(mine))["miou"] == pytest.approx(100 * (table.diagonal() / union).mean())


# crops and windows ----------------------------------------------------------------------------------------------------


def test_image_and_mask_are_cropped_together(tmp_path):
    """The image is its own mask: after any crop they still agree."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        coarse = np.kron(rng.integers(0, 4, (6, 8)), np.ones((12, 12))).astype(np.uint8)
        Image.fromarray(coarse * 60).save(tmp_path / "images" / f"{k}.png")
        Image.fromarray(coarse).save(tmp_path / "masks" / f"{k}.png")
    source = masks.paired_images(tmp_path, PixelFormat(1, value_range="auto"), False)
    assert source.counted() == 4
    crops = MaskCrops(source, (24, 32), (0.5, 2.0), seed=3)
    batch = crops.__getitems__([(e, k) for e in range(20) for k in range(3)])
    agree = ((batch["images"][:, 0].float() / 60).round() == batch["masks"]).float()
    assert agree.mean() > 0.9 and agree.flatten(1).mean(1).min() > 0.75  # bicubic edges
    assert torch.equal(batch["images"], crops.__getitems__([(e, k) for e in range(20) for k in range(3)])["images"])
    (tmp_path / "images" / "1.png").write_bytes(b"no image")  # the next one takes its place, with a mask of its own
    batch = crops.__getitems__([(e, 1) for e in range(20)])
    assert {index for index, _ in batch["bad"]} == {1}
    assert ((batch["images"][:, 0].float() / 60).round() == batch["masks"]).float().flatten(1).mean(1).min() > 0.75
    for k in (0, 2):
        (tmp_path / "images" / f"{k}.png").write_bytes(b"")  # the error names the image that was requested
    with pytest.raises(DataError, match="none of the 3 images can be read; 1.png: not an image"):
        crops.__getitems__([(0, 1)])
    factors = [
        random_scaled_box((72, 96), (24, 32), (0.5, 2.0), np.random.default_rng(s).random(4)) for s in range(400)
    ]
    heights = np.array([h for _, _, h, _ in factors])
    assert (
        heights.min() >= 12 and heights.max() <= 48 and all(t + h <= 72 and left + w <= 96 for t, left, h, w in factors)
    )
    assert abs(np.log(24 / heights).mean()) < 0.1


@pytest.mark.parametrize("sides", [(16, 16), (40, 52), (9, 30), (17, 16)])
def test_windows_cover_an_image_of_any_size(sides):
    """A model that knows each pixel's own value gives it back wherever it is."""
    image = torch.rand(1, *sides)
    model = lambda batch: torch.cat([batch, 1 - batch], dim=1).log()
    shares = predict_sliding(CPU, model, image, 16)
    assert shares.shape == (2, *sides) and torch.allclose(shares[0], image[0], atol=1e-5)


def test_frozen_features_do_not_move_and_levels_are_side_by_side():
    encoder = encoders.make("swin_micro", image_size=32)
    network = segment.Segmenter(encoder, 3, "frozen").train()
    assert (
        not encoder.training
        and network.head.in_channels == 96 + 192 + 384
        and network(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    )
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    tuned = segment.Segmenter(encoders.make("vit_micro", image_size=32), 3, "finetune")
    tuned(torch.randn(2, 3, 32, 32)).sum().backward()
    lacking = [name for name, parameter in tuned.named_parameters() if parameter.grad is None]
    assert not lacking and tuned.layer_of("head.weight") == tuned.layer_of("mix.0.weight") == 7 > tuned.layer_of(
        "encoder.blocks.5.norm1.weight"
    )


# bad input ------------------------------------------------------------------------------------------------------------


def spoil(kind):
    def other_size(root):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(root / "train" / "masks" / "3.png")

    def beyond(root):
        Image.fromarray(np.full((40, 48), 9, np.uint8)).save(root / "train" / "masks" / "3.png")

    def colour(root):
        Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(root / "train" / "masks" / "3.png")

    return {
        "a mask of another size": other_size,
        "a class beyond": beyond,
        "a mask in colour": colour,
        "no mask": lambda root: (root / "train" / "masks" / "3.png").unlink(),
        "no image": lambda root: (root / "val" / "images" / "3.jpg").unlink(),
        "no masks at all": lambda root: (
            [path.unlink() for path in (root / "train" / "masks").iterdir()] and (root / "train" / "masks").rmdir()
        ),
        "a torn mask": lambda root: (root / "train" / "masks" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
        "a train/ alone": lambda root: (
            [path.unlink() for path in (root / "val").rglob("*.*")]
            and [(root / "val" / k).rmdir() for k in ("images", "masks")]
            and (root / "val").rmdir()
        ),
    }[kind]


BAD = {
    "a mask of another size": r"masks/3.png: a mask of 40 x 40 pixels for an image of 48 x 40, 3.jpg",
    "a class beyond": "masks/3.png: class number 9, where classes are 0 to 1",
    "a mask in colour": r"masks/3.png: a mask of shape \(40, 48, 3\)",
    "no mask": "train/images/3: has no counterpart in masks/",
    "no image": "val/masks/3: has no counterpart in images/",
    "no masks at all": "has no folder masks/",
    "a torn mask": "masks/3.png: unreadable|masks/3.png: not an image",
    "a train/ alone": "neither val/ nor test/",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    spoil(kind)(grow(tmp_path / "data", each=4))
    words = [
        "--data",
        "data",
        "--init",
        "scratch",
        *WORDS,
        "--max-steps",
        3,
        *(["--classes", "2"] if kind == "a class beyond" else []),
        "--output",
        "out",
    ]
    with pytest.raises((DataError, UserError), match=BAD[kind]) as raised:
        segment.main([str(word) for word in words])
    assert "\n" not in str(raised.value)


def test_other_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grow(tmp_path / "one", parts=(".",), each=1)
    more = ["--init", "scratch", *map(str, WORDS), "--max-steps", "1", "--output", "out"]
    with pytest.raises(DataError, match="one image alone cannot be split"):
        segment.main(["--data", "one", *more])
    grow(tmp_path / "data", each=4)
    with pytest.raises(UserError, match="--train-images 9: there are 4"):
        segment.main(["--data", "data", *more, "--train-images", "9"])
    for path in (tmp_path / "data" / "train" / "masks").iterdir():
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(path)
    with pytest.raises(DataError, match="one class alone"):
        segment.main(["--data", "data", *more])
    for path in (tmp_path / "data" / "train" / "masks").iterdir():
        Image.fromarray(np.eye(40, 48, dtype=np.uint8) * 255).save(path)
    with pytest.raises(DataError, match="masks of 0 and 255, need --foreground"):
        segment.main(["--data", "data", *more])
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((9, 9), np.uint8))
    with pytest.raises(DataError, match="one.tif: one mask for a stack"):
        masks.read_mask(tmp_path / "one.tif", 3)
    with pytest.raises(UserError, match="--predict needs --checkpoint"):
        segment.main(["--predict", "data"])
    with pytest.raises(UserError, match="--data: cannot be combined with --predict"):
        segment.main(["--predict", "data", "--data", "data"])
    with pytest.raises(UserError, match="give --checkpoint"):
        segment.main(["--data", "data"])


def test_bad_images_are_replaced_named_and_left_out(tmp_path):
    grow(tmp_path / "data")
    for part in ("train", "val"):
        (tmp_path / "data" / part / "images" / "2.jpg").write_bytes(b"no image")
    words = ["segment.py", "--data", "data", "--init", "scratch", *WORDS, "--max-steps", 4]
    done = run(*words, "--max-bad-share", 0.2, "--output", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "bad_files.txt").read_text().splitlines() == [
        "2.jpg\tnot an image",
        "images/2.jpg\tnot an image",
    ] or "2.jpg" in done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kind"] == "segment"
    assert "files cannot be read" in run(*words, "--output", "again", cwd=tmp_path, status=2).stderr
