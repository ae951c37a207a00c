"""experiments/detect.py: boxes of both forms, tiles, whole images from tiles, average precision by hand, bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from engine.errors import UserError
from images.formats import PixelFormat

sys.path.insert(0, str(ROOT / "experiments"))
import detect  # noqa: E402


def xml(objects, width=64, height=48):
    parts = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for name, (a, b, c, d) in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{parts}</annotation>"


def grow(folder, count=4):
    """Bright rectangles on noise; the boxes as VOC files, and as one COCO file beside the folder."""
    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "tree"}]}
    (folder / "photos").mkdir(parents=True)
    for k in range(count):
        pixels, objects = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8), []
        for _ in range(3):
            left, top = int(rng.integers(0, 48)), int(rng.integers(0, 32))
            pixels[top : top + 14, left : left + 12] = (60, 220, 60)
            objects.append(("tree", (left + 1, top + 1, left + 12, top + 14)))  # VOC counts from 1
            coco["annotations"].append({"image_id": k, "category_id": 7, "bbox": [left, top, 12, 14], "iscrowd": 0})
        Image.fromarray(pixels).save(folder / "photos" / f"{'ab'[k % 2]}{k}.png")
        (folder / "photos" / f"{'ab'[k % 2]}{k}.xml").write_text(xml(objects))
        coco["images"].append({"id": k, "file_name": f"{'ab'[k % 2]}{k}.png"})
    (folder / "boxes.json").write_text(json.dumps(coco))
    return folder


def test_both_forms_say_the_same_and_the_split_is_by_name(tmp_path):
    grow(tmp_path)
    voc, coco = (detect.read(str(tmp_path / "photos"), ["b*"], file) for file in (None, tmp_path / "boxes.json"))
    for part in (0, 1):
        assert [sample["name"] for sample in voc[part]] == [["a0.png", "a2.png"], ["b1.png", "b3.png"]][part]
        for a, b in zip(voc[part], coco[part], strict=True):
            assert (
                torch.equal(a["boxes"], b["boxes"])
                and torch.equal(a["labels"], b["labels"])
                and (a["pixels"][1, int(a["boxes"][0, 1]), int(a["boxes"][0, 0])] > 0.8)
            )
    assert voc[2] == coco[2] == ["tree"]


def test_tiles_keep_what_mostly_lies_in_them_and_flips_move_boxes_along(tmp_path):
    sample = {
        "name": "x",
        "pixels": torch.rand(3, 50, 60),
        "boxes": torch.tensor([[10.0, 10, 20, 20], [25, 10, 45, 20], [29, 0, 59, 9]]),
        "labels": torch.tensor([1, 2, 1]),
    }
    pixels, target = detect.tile_of(sample, 5, 5, 30)
    assert (
        pixels.shape == (3, 30, 30)
        and target["boxes"].tolist() == [[5, 5, 15, 15], [20, 5, 30, 15]]
        and target["labels"].tolist() == [1, 2]
    )
    grow(tmp_path)
    train = detect.read(str(tmp_path / "photos"), ["b*"])[0]
    args = detect.arguments(["--data", "x", "--test", "b*", "--output", "y", "--tile", "32", "--batch-size", "40"])
    images, targets = detect.batch_of(train, args, 3)
    assert len(images) == 40 and all(torch.equal(a, b) for a, b in zip(images, detect.batch_of(train, args, 3)[0]))
    found = 0
    for image, target in zip(images, targets):
        for left, top, right, bottom in target["boxes"].round().int().tolist():
            inside = image[1, top + 1 : bottom - 1, left + 1 : right - 1]
            assert inside.numel() == 0 or inside.min() > 0.8  # whichever way the tile was turned
            found += 1
    assert found > 20


def test_a_whole_image_is_put_together_from_tiles():
    """A detector that finds each bright square of a tile: every square is found once, where it is."""
    pixels = torch.zeros(3, 90, 110)
    places = [(5, 5), (40, 50), (70, 95), (38, 10)]
    for top, left in places:
        pixels[:, top : top + 8, left : left + 8] = 1

    def finder(images):
        (image,) = images
        found = [
            [left, top, left + 8, top + 8]
            for top in range(image.shape[1] - 7)
            for left in range(image.shape[2] - 7)
            if image[0, top : top + 8, left : left + 8].min() == 1
        ]
        return [
            {
                "boxes": torch.tensor(found, dtype=torch.float).reshape(-1, 4),
                "scores": torch.ones(len(found)),
                "labels": torch.ones(len(found), dtype=torch.long),
            }
        ]

    out = detect.detect(finder, {"pixels": pixels}, 48)
    assert sorted(out["boxes"].tolist()) == sorted([left, top, left + 8.0, top + 8.0] for top, left in places)


@pytest.mark.parametrize("tile, model", [(32, "swin_nano"), (32, "twins_micro")])
def test_the_network_learns_from_any_pyramid(tile, model):
    torch.manual_seed(0)
    encoder = detect.encoders.make(model, image_size=tile, window=4)
    network = detect.Detector(encoder, 1, tile, PixelFormat()).train()
    target = {"boxes": torch.tensor([[4.0, 4, 16, 16]]), "labels": torch.tensor([1])}
    losses = network([torch.rand(3, tile, tile)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(parameter.grad is not None for name, parameter in network.backbone.encoder.named_parameters())
    layers = [
        network.layer_of(name)
        for name in (
            "backbone.encoder.embed.proj.weight",
            "backbone.fpn.inner_blocks.0.0.weight",
            "roi_heads.box_head.fc6.weight",
        )
    ]
    assert layers[0] == 0 < layers[1] == layers[2]


BAD = {
    "outside": (
        lambda f: (f / "photos" / "a0.xml").write_text(xml([("tree", (5, 5, 80, 20))])),
        r"a0.xml: a box \[4.0, 4.0, 80.0, 20.0\] that is empty or outside a0.png, 64 x 48",
    ),
    "inverted": (lambda f: (f / "photos" / "a0.xml").write_text(xml([("tree", (20, 5, 10, 20))])), "empty or outside"),
    "empty xml": (lambda f: (f / "photos" / "a0.xml").write_text(xml([])), "a0.xml: holds no object"),
    "no xml": (lambda f: (f / "photos" / "a0.xml").write_text("boxes"), "a0.xml: not a VOC file of boxes"),
    "no numbers": (
        lambda f: (f / "photos" / "a0.xml").write_text(xml([("tree", ("a", 1, 2, 3))])),
        "not a VOC file of boxes",
    ),
    "no file": (lambda f: (f / "photos" / "a0.xml").unlink(), "a0.png: has no boxes, a0.xml is missing"),
    "a bad image": (lambda f: (f / "photos" / "a0.png").write_bytes(b"no"), "a0.png: not an image"),
    "one image": (
        lambda f: [path.unlink() for path in (f / "photos").glob("a*")],
        "matches 2 of 2 images; some must be left to train on",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(tmp_path, what):
    spoil, message = BAD[what]
    spoil(grow(tmp_path))
    with pytest.raises(UserError, match=message):
        detect.read(str(tmp_path / "photos"), ["b*"])


def test_bad_coco_files_are_one_line(tmp_path):
    grow(tmp_path)
    for text in ("no json", "{}", '{"images": [], "annotations": [{}], "categories": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json: not a COCO file of boxes"):
            detect.read(str(tmp_path / "photos"), ["b*"], tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="a0.png: is not in .*bad.json"):
        detect.read(str(tmp_path / "photos"), ["b*"], tmp_path / "bad.json")


# against pycocotools --------------------------------------------------------------------------------------


def plain_ap(samples, found, threshold):
    """One class, by hand: detections by falling score, each matched to the best free true box.

    Precision is the envelope at 101 recalls.
    """
    rows, total = [], sum(len(sample["boxes"]) for sample in samples)
    for sample, out in zip(samples, found):
        free = set(range(len(sample["boxes"])))
        for k in out["scores"].argsort(descending=True).tolist():
            a, best, taken = out["boxes"][k], threshold, None
            for j in sorted(free):
                b = sample["boxes"][j]
                inter = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
                overlap = inter / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter)
                if overlap >= best:
                    best, taken = overlap, j
            free.discard(taken)
            rows.append((float(out["scores"][k]), taken is not None))
    rows.sort(key=lambda row: -row[0])
    hits = np.cumsum([hit for _, hit in rows])
    recall, precision = hits / total, hits / np.arange(1, len(rows) + 1)
    return 100 * np.mean([precision[recall >= level].max(initial=0) for level in np.linspace(0, 1, 101)])


@pytest.mark.peers("pycocotools")
def test_average_precision_is_that_by_hand():
    rng = np.random.default_rng(0)
    samples, found = [], []
    for _ in range(4):
        corners = rng.uniform(0, 200, (12, 2))
        true = torch.tensor(np.hstack([corners, corners + rng.uniform(10, 40, (12, 2))]), dtype=torch.float)
        guess = torch.cat(
            [
                true[:9] + torch.tensor(rng.normal(0, 2.5, (9, 4)), dtype=torch.float),
                torch.tensor([[300.0, 300, 330, 330], [0, 300, 30, 330]]),
            ]
        )
        no_crowds = {"crowds": torch.zeros(0, 4), "crowd_labels": torch.zeros(0, dtype=torch.long)}
        samples.append({"boxes": true, "labels": torch.ones(12, dtype=torch.long), **no_crowds})
        found.append(
            {
                "boxes": guess,
                "scores": torch.tensor(rng.random(11), dtype=torch.float),
                "labels": torch.ones(11, dtype=torch.long),
            }
        )
    result = detect.average_precision(samples, found, ["tree"])
    assert result["ap50"] == pytest.approx(plain_ap(samples, found, 0.5), abs=0.05)
    assert result["ap"] == pytest.approx(
        np.mean([plain_ap(samples, found, threshold) for threshold in np.arange(0.5, 0.96, 0.05)]), abs=0.05
    )
    same = [{"boxes": sample["boxes"], "scores": torch.ones(12), "labels": sample["labels"]} for sample in samples]
    assert detect.average_precision(samples, same, ["tree"]) == pytest.approx({"ap50": 100, "ap": 100})


def coco_sample(case, image):
    """An image of COCO's form as `detect.read` would give it, and its detections."""

    def of(entries):
        boxes = torch.tensor(
            [
                [left, top, left + width, top + height]
                for left, top, width, height in (entry["bbox"] for entry in entries)
            ]
        ).reshape(-1, 4)
        return boxes.double(), torch.tensor([entry["category_id"] for entry in entries], dtype=torch.long)

    mine = [entry for entry in case["annotations"] if entry["image_id"] == image]
    (boxes, labels), (crowds, crowd_labels) = (
        of([entry for entry in mine if bool(entry.get("iscrowd")) is crowd]) for crowd in (False, True)
    )
    found = [entry for entry in case["results"] if entry["image_id"] == image]
    guess, kinds = of(found)
    return (
        {"boxes": boxes, "labels": labels, "crowds": crowds, "crowd_labels": crowd_labels},
        {
            "boxes": guess,
            "labels": kinds,
            "scores": torch.tensor([entry["score"] for entry in found], dtype=torch.double),
        },
    )


AP = json.loads((Path(__file__).parent / "data" / "average_precision.json").read_text())["cases"]


@pytest.mark.peers("pycocotools")
@pytest.mark.parametrize("name", AP)
def test_average_precision_of_reference_cases(name):
    """Computed by pycocotools itself from COCO files (tests/data/README.md): crowds are neither right nor wrong."""
    case = AP[name]
    pairs = [coco_sample(case, image["id"]) for image in case["images"]]
    classes = [category["name"] for category in sorted(case["categories"], key=lambda category: category["id"])]
    assert [category["id"] for category in sorted(case["categories"], key=lambda category: category["id"])] == list(
        range(1, len(classes) + 1)
    )
    result = detect.average_precision([sample for sample, _ in pairs], [found for _, found in pairs], classes)
    for measure in ("ap", "ap50"):
        assert result[measure] == pytest.approx(case["measured"]["500"][measure], abs=1e-6)


def test_crowds_are_neither_trained_on_nor_dropped(tmp_path):
    grow(tmp_path)
    coco = json.loads((tmp_path / "boxes.json").read_text())
    coco["annotations"] += [{"image_id": k, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1} for k in range(4)]
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    for part in detect.read(str(tmp_path / "photos"), ["b*"], tmp_path / "boxes.json")[:2]:
        for sample in part:
            assert len(sample["boxes"]) == len(sample["labels"]) == 3
            assert sample["crowds"].tolist() == [[0, 0, 60, 40]] and sample["crowd_labels"].tolist() == [1]
            assert len(detect.tile_of(sample, 0, 0, 48)[1]["boxes"]) <= 3


@pytest.mark.peers("pycocotools")
def test_a_checkpoint_s_pixel_format_is_used(tmp_path, capsys):
    """One channel of 16 bits: the detector reads, scales and normalises images as pre-training did."""
    rng = np.random.default_rng(0)
    for name in ("a0", "a1", "b0", "b1"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 900, (48, 64), dtype=np.uint16)).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.xml").write_text(xml([("tree", (5, 5, 20, 20))]))
    form = PixelFormat(1, "channels", (0, 900), (0.0,), (900.0,), True, (0.4,), (0.2,))
    encoder = detect.encoders.make("swin_nano", channels=1)
    torch.save(
        {
            "kind": "pretrain",
            "model": {f"encoder.{key}": value for key, value in encoder.state_dict().items()},
            "config": {
                "arguments": {"image_size": 32, "channels": 1, "window": 4, "model": "swin_nano"},
                "pixels": form.to_dict(),
            },
        },
        tmp_path / "last.pt",
    )
    train, _, _ = detect.read(str(tmp_path / "photos"), ["b*"], form=form)
    raw = np.asarray(Image.open(tmp_path / "photos" / "a0.png"))
    assert train[0]["pixels"].shape == (1, 48, 64) and np.abs(train[0]["pixels"][0].numpy() - raw / 900).max() < 1e-5
    words = [
        "--data",
        str(tmp_path / "photos"),
        "--test",
        "b*",
        "--checkpoint",
        str(tmp_path / "last.pt"),
        "--tile",
        "32",
        "--window",
        "4",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert detect.main(words) == 0
    assert "on cpu" in capsys.readouterr().out


@pytest.mark.peers("pycocotools")
def test_a_run_from_files_to_picture(tmp_path, capsys, drawn):
    grow(tmp_path, 6)
    words = [
        "--data",
        str(tmp_path / "photos"),
        "--test",
        "b*",
        "--model",
        "swin_nano",
        "--tile",
        "32",
        "--window",
        "4",
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--output",
    ]
    assert detect.main([*words, str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 <= result["ap"] <= result["ap50"] <= 100 and set(result["boxes"]) == {"b1.png", "b3.png", "b5.png"}
    assert Image.open(tmp_path / "out" / "detections.png").size[1] == 530 and "AP at 0.5" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists"):
        detect.main([*words, str(tmp_path / "out")])
