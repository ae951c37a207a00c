"""Images that have boxes: VOC's XML beside each image, or one COCO JSON; squares cut out of them. Axis letters: c channels, h w pixels, n boxes."""
import fnmatch
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from engine.decoding import tensor
from engine.errors import DataError, UserError
from engine.folders import everything


def voc_boxes(path: Path) -> list[tuple[str, list[float]]]:
    """(name, [left, top, right, bottom]) of each object of a VOC file, from 0 on. UserError for what is none."""
    try:
        found = [(entry.find("name").text, [float(entry.find(f"bndbox/{side}").text) - (side in ("xmin", "ymin")) for side in ("xmin", "ymin", "xmax", "ymax")])
                 for entry in ElementTree.parse(path).getroot().iter("object")]
    except (ElementTree.ParseError, OSError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no boxes of VOC's form ({error or type(error).__name__})") from None
    if not found:
        raise UserError(f"{path}: holds no object; an image without any belongs among the images without a file, or out")
    return found


def coco_boxes(path: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """{file name: as voc_boxes} of a COCO JSON; crowds are left out."""
    try:
        file = json.loads(path.read_text())
        names, files = ({entry["id"]: entry[key] for entry in file[kind]} for kind, key in (("categories", "name"), ("images", "file_name")))
        found = {name: [] for name in files.values()}
        for entry in file["annotations"]:
            if not entry.get("iscrowd"):
                left, top, width, height = entry["bbox"]
                found[files[entry["image_id"]]].append((names[entry["category_id"]], [left, top, left + width, top + height]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no COCO file of boxes ({type(error).__name__}: {error})") from None
    return found


def read(where: str, patterns: list[str], coco_file: Path | None = None, one_class: str | None = None) -> tuple[list[dict], list[dict], list[str]]:
    """Training and test images, those whose names fit one of `patterns`, each {"name", "pixels" (3, h, w) in 0-1, "boxes" (n, 4), "labels" (n,)}; and the
    classes, whose labels count from 1. coco_file: in place of a VOC file beside each image. UserError for what does not fit together."""
    images, coco = everything(where), coco_boxes(coco_file) if coco_file else None
    samples = []
    for index, name in enumerate(images.names):
        path = (images.root / name).with_suffix(".xml")
        if coco is None and not path.exists():
            raise UserError(f"{images.root / name}: has no boxes, {path.name} is missing")
        if coco is not None and name not in coco:
            raise UserError(f"{images.root / name}: is not in {coco_file}")
        objects = voc_boxes(path) if coco is None else coco[name]
        try:
            pixels = tensor(images.decode(index)).float() / 255
        except DataError as error:
            raise UserError(f"{images.root / name}: {error}") from None
        boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4)
        height, width = pixels.shape[1:]
        odd = (boxes[:, :2] < -1).any(1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if odd.any():
            raise UserError(f"{path if coco is None else coco_file}: a box {boxes[odd][0].tolist()} that is empty or outside {name}, {width} x {height} pixels")
        samples.append({"name": name, "pixels": pixels, "boxes": boxes, "names": [one_class or kind for kind, _ in objects]})
    classes = sorted({kind for sample in samples for kind in sample["names"]})
    for sample in samples:
        sample["labels"] = torch.tensor([classes.index(kind) + 1 for kind in sample["names"]])
    test = [sample for sample in samples if any(fnmatch.fnmatch(sample["name"], pattern) for pattern in patterns)]
    train = [sample for sample in samples if not any(sample is other for other in test)]
    if not test or not train:
        raise UserError(f"--test {' '.join(patterns)}: fits {len(test)} of {len(samples)} images; some must be left to train on, and some to test")
    return train, test, classes


def tile_of(sample: dict, top: int, left: int, tile: int) -> tuple[torch.Tensor, dict]:
    """A square of an image with the boxes of which at least a third lies in it, cut at its border."""
    pixels = sample["pixels"][:, top:top + tile, left:left + tile]
    boxes = sample["boxes"] - torch.tensor([left, top, left, top])
    cut = boxes.clamp(0, tile)
    share = (cut[:, 2:] - cut[:, :2]).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep = (share >= 1 / 3) & ((cut[:, 2:] - cut[:, :2]) > 2).all(1)
    return pixels, {"boxes": cut[keep], "labels": sample["labels"][keep]}
