"""Use after training: classes of unlabelled images, features, pre-training that goes on from given weights."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, here, make_images, run

import finetune
import weights
from images import sources
from images.crops import normalize

TUNE = [
    "--recipe",
    "cifar",
    *SMALL[:6],
    "--workers",
    0,
    "--batch-size",
    8,
    "--epochs",
    4,
    "--warmup-epochs",
    1,
    "--base-lr",
    0.2,
    "--mixup",
    0,
    "--cutmix",
    0,
    "--randaugment",
    0,
    "--erasing",
    0,
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    make_images(folder / "data", classes=3, each=20)
    here(finetune.main, "--data", folder / "data", *TUNE, "--init", "scratch", "--output", folder / "run")
    photos = folder / "photos" / "deep"
    photos.mkdir(parents=True)
    for c in range(3):
        for k in range(3):
            shutil.copy(folder / "data" / f"class{c}" / f"{k:03}.png", photos / f"{c}{k}.png")
    (photos.parent / "bad.jpg").write_bytes(b"")
    return folder


def classifier(folder):
    saved = torch.load(folder / "run" / "last.pt", weights_only=True)
    model = finetune.Classifier(finetune.encoders.make("swin_nano", image_size=16, window=2), 3)
    model.load_state_dict(saved["model"])
    return model.eval(), saved["config"]["classes"]


def pixels(folder, name):
    image = sources.FileImages(folder, [name], None, []).center_crop(0, 16)[None]
    return normalize(image.float())


@pytest.mark.parametrize("processes", [1, 2])
def test_predictions_of_unlabelled_images(tuned, tmp_path, processes):
    done = run(
        "finetune.py",
        "--checkpoint",
        tuned / "run" / "last.pt",
        "--predict",
        tuned / "photos",
        "--output",
        tmp_path / "out",
        processes=processes,
    )
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        "warning: unreadable, left out: bad.jpg (an empty file)" in done.stderr
        and "predictions.csv: 9 images" in done.stdout
    )
    assert [row["file"] for row in rows] == sorted(f"deep/{c}{k}.png" for c in range(3) for k in range(3))
    model, classes = classifier(tuned)
    for row in rows:
        with torch.no_grad():
            shares, order = model(pixels(tuned / "photos", row["file"])).softmax(1)[0].sort(descending=True)
        assert [row["class"], row["class_2"], row["class_3"]] == [classes[k] for k in order] and "class_4" not in row
        assert [float(row[name]) for name in ("probability", "probability_2", "probability_3")] == pytest.approx(
            shares.tolist(), abs=1e-4
        )


def test_features_of_every_image(tuned, tmp_path):
    run(
        "finetune.py",
        "--data",
        tuned / "photos",
        "--checkpoint",
        tuned / "run" / "last.pt",
        "--protocol",
        "features",
        "--image-size",
        16,
        "--window",
        2,
        "--output",
        tmp_path / "out",
    )
    values, names = (
        np.load(tmp_path / "out" / "features.npy"),
        (tmp_path / "out" / "names.txt").read_text().splitlines(),
    )
    assert values.dtype == np.float32 and values.shape == (9, 192) and len(names) == 9
    model, _ = classifier(tuned)
    with torch.no_grad():
        assert np.allclose(values[4], model.encoder(pixels(tuned / "photos", names[4])).mean(1)[0].numpy(), atol=1e-5)


def test_pretraining_begins_with_given_weights(tuned, tmp_path):
    weights.main(["to-timm", str(tuned / "run" / "last.pt"), str(tmp_path / "timm.pt")])
    words = [
        "--data",
        tuned / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--batch-size",
        8,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--max-steps",
        2,
        "--base-lr",
        0,
        "--min-lr",
        0,
        "--warmup-lr",
        0,
    ]
    done = run("train.py", *words, "--init", tmp_path / "timm.pt", "--output", tmp_path / "out")
    assert re.search(
        r"timm.pt \(timm\): loaded all \d+ tensors of the encoder; the decoder is initialised at random\n", done.stdout
    )
    begun, given = (weights.read(path)[0] for path in (tmp_path / "out" / "last.pt", tuned / "run" / "last.pt"))
    assert all(torch.equal(begun[key], given[key]) for key in given)  # at a learning rate of 0
    (tmp_path / "timm.pt").unlink()
    run(
        "train.py", *words, "--init", tmp_path / "timm.pt", "--output", tmp_path / "out", "--resume", "auto"
    )  # not needed any more
    assert (
        "no such checkpoint"
        in run("train.py", *words, "--init", tmp_path / "timm.pt", "--output", tmp_path / "new", status=2).stderr
    )
