"""Detection by torchvision's Faster R-CNN on an encoder's pyramid: boxes in VOC's XML beside each image, or one COCO JSON.

    python experiments/detect.py --data data/dense/trees --test "OSBS*" "SOAP*" --one-class tree --checkpoint runs/x/last.pt --output runs/trees

Trained on random tiles of the images whose names no --test pattern fits; tested on whole images of the others, by overlapping tiles. Average precision by
pycocotools (pip install pycocotools). Axis letters: c channels, h w pixels, n boxes.
"""

import argparse
import fnmatch
import io
import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import encoders  # noqa: E402
import weights  # noqa: E402
from engine import dist, plots, rng, runs  # noqa: E402
from engine.errors import DataError, UserError  # noqa: E402
from engine.files import write_atomically  # noqa: E402
from engine.inputs import checkpoint_format  # noqa: E402
from engine.optim import learning_rate, parameter_groups  # noqa: E402
from finetune import resolve_model  # noqa: E402
from images.decode import to_chw  # noqa: E402
from images.folders import all_images  # noqa: E402
from images.formats import MEAN, STD, PixelFormat  # noqa: E402

# ------------------------------------------------------------------------------------------------- boxes


def voc_boxes(path: Path) -> list[tuple[str, list[float]]]:
    """(name, [left, top, right, bottom]) of each object of a VOC file, from 0 on. UserError for what is none."""
    try:
        found = [
            (
                entry.find("name").text,
                [
                    float(entry.find(f"bndbox/{side}").text) - (side in ("xmin", "ymin"))
                    for side in ("xmin", "ymin", "xmax", "ymax")
                ],
            )
            for entry in ElementTree.parse(path).getroot().iter("object")
        ]
    except (ElementTree.ParseError, OSError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no boxes of VOC's form ({error or type(error).__name__})") from None
    if not found:
        raise UserError(
            f"{path}: holds no object; an image without any belongs among the images without a file, or out"
        )
    return found


def coco_boxes(path: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """{file name: as voc_boxes} of a COCO JSON, with whether it is a crowd as a third entry of each box."""
    try:
        file = json.loads(path.read_text())
        names, files = (
            {entry["id"]: entry[key] for entry in file[kind]}
            for kind, key in (("categories", "name"), ("images", "file_name"))
        )
        found = {name: [] for name in files.values()}
        for entry in file["annotations"]:
            left, top, width, height = entry["bbox"]
            found[files[entry["image_id"]]].append(
                (names[entry["category_id"]], [left, top, left + width, top + height], bool(entry.get("iscrowd")))
            )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no COCO file of boxes ({type(error).__name__}: {error})") from None
    return found


def read(
    where: str,
    patterns: list[str],
    coco_file: Path | None = None,
    one_class: str | None = None,
    form: PixelFormat = PixelFormat(),
) -> tuple[list[dict], list[dict], list[str]]:
    """Training and test images, those whose names fit one of `patterns`, and the classes, whose labels count from 1.

    An image is {"name", "pixels" (c, h, w) in 0-1, "boxes" (n, 4), "labels" (n,), "crowds" (m, 4), "crowd_labels" (m,)}. A crowd is a box of COCO's around
    many objects: it is not trained on, and detections inside it count neither as right nor as wrong. coco_file: in place of a VOC file beside each image.
    form: the pixel format. UserError for what does not fit together.
    """
    images, coco = all_images(where, form), coco_boxes(coco_file) if coco_file else None
    samples = []
    for index, name in enumerate(images.names):
        path = (images.root / name).with_suffix(".xml")
        if coco is None and not path.exists():
            raise UserError(f"{images.root / name}: has no boxes, {path.name} is missing")
        if coco is not None and name not in coco:
            raise UserError(f"{images.root / name}: is not in {coco_file}")
        objects = voc_boxes(path) if coco is None else coco[name]
        try:
            pixels = to_chw(images.decode(index)).float() / 255
        except DataError as error:
            raise UserError(f"{images.root / name}: {error}") from None
        boxes = torch.tensor([box for _, box, *_ in objects]).reshape(-1, 4)
        crowd = torch.tensor([any(crowd) for _, _, *crowd in objects], dtype=torch.bool)
        height, width = pixels.shape[1:]
        odd = (
            (boxes[:, :2] < -1).any(1)
            | (boxes[:, 2] > width + 1)
            | (boxes[:, 3] > height + 1)
            | (boxes[:, 2:] <= boxes[:, :2]).any(1)
        )
        if odd.any():
            raise UserError(
                f"{path if coco is None else coco_file}: a box {boxes[odd][0].tolist()} that is empty or outside {name}, {width} x {height} pixels"
            )
        samples.append(
            {
                "name": name,
                "pixels": pixels,
                "boxes": boxes,
                "crowd": crowd,
                "names": [one_class or kind for kind, *_ in objects],
            }
        )
    classes = sorted({kind for sample in samples for kind in sample["names"]})
    for sample in samples:
        labels, crowd, boxes = (
            torch.tensor([classes.index(kind) + 1 for kind in sample.pop("names")], dtype=torch.long),
            sample.pop("crowd"),
            sample["boxes"],
        )
        sample |= {
            "boxes": boxes[~crowd],
            "labels": labels[~crowd],
            "crowds": boxes[crowd],
            "crowd_labels": labels[crowd],
        }
    test = [sample for sample in samples if any(fnmatch.fnmatch(sample["name"], pattern) for pattern in patterns)]
    train = [sample for sample in samples if not any(sample is other for other in test)]
    if not test or not train:
        raise UserError(
            f"--test {' '.join(patterns)}: fits {len(test)} of {len(samples)} images; some must be left to train on, and some to test"
        )
    return train, test, classes


def tile_of(sample: dict, top: int, left: int, tile: int) -> tuple[torch.Tensor, dict]:
    """A square of an image with the boxes of which at least a third lies in it, cut at its border."""
    pixels = sample["pixels"][:, top : top + tile, left : left + tile]
    boxes = sample["boxes"] - torch.tensor([left, top, left, top])
    cut = boxes.clamp(0, tile)
    share = (cut[:, 2:] - cut[:, :2]).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep = (share >= 1 / 3) & ((cut[:, 2:] - cut[:, :2]) > 2).all(1)
    return pixels, {"boxes": cut[keep], "labels": sample["labels"][keep]}


# ------------------------------------------------------------------------------------------------- the network


class Backbone(nn.Module):
    """The maps of an encoder's pyramid through a feature pyramid network of `out_channels`, and one more by pooling: what FasterRCNN asks for."""

    def __init__(self, encoder, out_channels: int = 256):
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels
        with torch.no_grad():
            self.widths = [
                level.shape[1] for level in encoder.pyramid(torch.zeros(1, encoder.channels, *encoder.image_size))
            ]
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in self.widths)
        self.fpn = FeaturePyramidNetwork(self.widths, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images):
        maps = self.encoder.pyramid(images)
        return self.fpn(OrderedDict((str(k), norm(level)) for k, (norm, level) in enumerate(zip(self.norms, maps))))


class Detector(FasterRCNN):
    """Faster R-CNN (Ren et al. 2015) with feature pyramids (Lin et al. 2017). tile: side of its square input; classes: without background; mean, std: of
    each channel, subtracted from and divided into pixels in 0-1."""

    def __init__(
        self,
        encoder,
        classes: int,
        tile: int,
        anchor: int = 24,
        head: int = 256,
        proposals: int = 300,
        mean=MEAN,
        std=STD,
    ):
        backbone = Backbone(encoder)
        names = [str(k) for k in range(len(backbone.widths))]
        sizes = tuple((anchor * 2**k,) for k in range(len(names) + 1))
        super().__init__(
            backbone,
            None,
            min_size=tile,
            max_size=tile,
            image_mean=list(mean),
            image_std=list(std),
            size_divisible=encoder.unit,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
            box_head=TwoMLPHead(backbone.out_channels * 49, head),
            box_predictor=FastRCNNPredictor(head, classes + 1),
            box_detections_per_img=200,
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_train=proposals,
            rpn_pre_nms_top_n_test=2 * proposals,
            rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=128,
        )
        self.undecayed = encoder.undecayed

    def layer_of(self, name: str) -> int:
        return self.backbone.encoder.layer_of(name.removeprefix("backbone.encoder."))


# ------------------------------------------------------------------------------------------------- training


def batch_of(train: list[dict], args, step: int) -> tuple[list, list]:
    """Random tiles, flipped half of the time, as a function of seed and step; an image is drawn in proportion to its area."""
    areas = np.array([sample["pixels"][0].numel() for sample in train], float)
    draws, images, targets = rng.uniform(5, args.seed, "tiles", step, np.arange(args.batch_size)), [], []
    for pick, y, x, across, down in draws:
        sample = train[int(np.searchsorted(np.cumsum(areas) / areas.sum(), pick))]
        top, left = (int(draw * max(1, side - args.tile + 1)) for draw, side in zip((y, x), sample["pixels"].shape[1:]))
        pixels, target = tile_of(sample, top, left, args.tile)
        height, width = pixels.shape[1:]
        for axis, extent, flip in ((2, width, across < 0.5), (1, height, down < 0.5)):
            if flip:
                pixels, low = pixels.flip(axis), 2 - axis
                target["boxes"] = target["boxes"].clone()
                target["boxes"][:, [low, low + 2]] = extent - target["boxes"][:, [low + 2, low]]
        images.append(pixels), targets.append(target)
    return images, targets


# ------------------------------------------------------------------------------------------------- test


@torch.no_grad()
def detect(model: Detector, sample: dict, tile: int) -> dict:
    """{"boxes", "scores", "labels"} of a whole image, on the CPU, from tiles that overlap by half."""
    device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    starts = [
        sorted({*range(0, max(1, side - tile), tile // 2), max(0, side - tile)}) for side in sample["pixels"].shape[1:]
    ]
    found = []
    for top in starts[0]:
        for left in starts[1]:
            (out,) = model([sample["pixels"][:, top : top + tile, left : left + tile].to(device)])
            out = {name: values.cpu() for name, values in out.items()}
            found.append({**out, "boxes": out["boxes"] + torch.tensor([left, top, left, top])})
    boxes, scores, labels = (torch.cat([out[name] for out in found]) for name in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes, scores, labels, 0.4)
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def average_precision(samples: list[dict], found: list[dict], classes: list[str]) -> dict[str, float]:
    """ap50 and ap (mean over 0.5:0.95) in %, by pycocotools, at most 500 boxes an image and class. Crowds of a sample are passed on as such."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError("pycocotools is not installed: pip install pycocotools") from None

    def entries(items):
        return [
            {
                "id": number,
                "image_id": image,
                "category_id": int(label),
                "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]],
                "iscrowd": crowd,
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "score": score,
            }
            for number, (image, box, label, score, crowd) in enumerate(items, 1)
        ]

    truth, guess = COCO(), COCO()
    frame = {
        "images": [{"id": k} for k in range(len(samples))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
    }
    true = [
        (k, box, label, 1.0, crowd)
        for k, sample in enumerate(samples)
        for crowd, (boxes, labels) in enumerate((("boxes", "labels"), ("crowds", "crowd_labels")))
        if boxes in sample
        for box, label in zip(sample[boxes].tolist(), sample[labels])
    ]
    seen = [
        (k, box, label, float(score), 0)
        for k, out in enumerate(found)
        for box, label, score in zip(out["boxes"].tolist(), out["labels"], out["scores"])
    ]
    truth.dataset, guess.dataset = frame | {"annotations": entries(true)}, frame | {"annotations": entries(seen)}
    with redirect_stdout(io.StringIO()):
        truth.createIndex(), guess.createIndex()
        evaluation = COCOeval(truth, guess, "bbox")
        evaluation.params.maxDets = [1, 100, 500]
        evaluation.evaluate(), evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (thresholds, recalls, classes), all areas, 500 boxes
    valid = [values[values > -1] for values in (precision[0], precision)]
    return {name: 100 * float(values.mean()) if values.size else 0.0 for name, values in zip(("ap50", "ap"), valid)}


def picture(samples: list[dict], found: list[dict]):
    """Each test image with the true boxes (white) and as many of those found, by falling score (orange)."""
    figure = Figure(figsize=(5 * len(samples), 5.3), dpi=100, facecolor="white")
    for axis, sample, out in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples, found):
        shown = sample["pixels"][:3] if len(sample["pixels"]) >= 3 else sample["pixels"][:1].expand(3, -1, -1)
        (
            axis.imshow(rearrange(shown, "c h w -> h w c").numpy()),
            axis.axis("off"),
            axis.set_title(sample["name"], fontsize=10),
        )
        for boxes, colour in (
            (sample["boxes"], "white"),
            (out["boxes"][out["scores"].argsort(descending=True)[: len(sample["boxes"])]], "orange"),
        ):
            for left, top, right, bottom in boxes.tolist():
                axis.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2)
                )
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------------- the run


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder of images")
    parser.add_argument(
        "--coco", type=Path, metavar="FILE", help="boxes in COCO's form; default: NAME.xml beside each image"
    )
    parser.add_argument(
        "--test", nargs="+", required=True, metavar="PATTERN", help="names of the images to test on, such as 'OSBS*'"
    )
    parser.add_argument("--one-class", metavar="NAME", help="all boxes are of this class")
    parser.add_argument("--checkpoint", help="of train.py, or weights of any kind; default: from scratch")
    parser.add_argument("--model", default=None, help="default: the checkpoint's")
    for name, default, words in (
        ("window", 8, ""),
        ("tile", 160, "side of a square of an image, in pixels; "),
        ("steps", 300, ""),
        ("batch-size", 4, "tiles a step; "),
        ("lr", 5e-4, ""),
        ("layer-decay", 0.9, ""),
        ("seed", 0, ""),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{words}default: {default}")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto; default: auto")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder, for result.json and detections.png"
    )
    parser.set_defaults(resume=None)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    if args.output.exists():
        raise UserError(f"--output {args.output}: is there already; give a new folder")
    distributed = dist.initialize(args.device, "fp32")
    form = (checkpoint_format(args.checkpoint) if args.checkpoint else None) or PixelFormat()
    train, test, classes = read(args.data, args.test, args.coco, args.one_class, form)
    average_precision(
        test, [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}] * len(test), classes
    )  # before hours of training
    args.model = resolve_model(args)
    torch.manual_seed(args.seed)
    encoder = encoders.make(args.model, image_size=args.tile, window=args.window, channels=form.channels)
    if not hasattr(encoder, "pyramid"):
        raise UserError(f"--model {args.model}: has no pyramid of maps; give a swin_... or twins_...")
    print(weights.load(args.checkpoint, encoder) if args.checkpoint else f"{args.model} from scratch")
    print(
        f"{len(train)} images, {sum(len(sample['boxes']) for sample in train)} boxes; test: {len(test)} images, {sum(len(s['boxes']) for s in test)} boxes; "
        f"{len(classes)} classes ({', '.join(classes[:5])}); on {dist.device_name(distributed.device)}"
    )
    model = Detector(encoder, len(classes), args.tile, mean=form.mean, std=form.std).to(distributed.device).train()
    optimizer, losses, began = (
        torch.optim.AdamW(parameter_groups(model, 0.05, args.layer_decay if args.checkpoint else 1.0), lr=args.lr),
        [],
        time.perf_counter(),
    )
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, args.steps, args.steps // 20, args.lr, 0, 0)
        torch.manual_seed(rng.seed(args.seed, "proposals", step))
        images, targets = batch_of(train, args, step)
        targets = [{name: values.to(distributed.device) for name, values in target.items()} for target in targets]
        loss = sum(model([pixels.to(distributed.device) for pixels in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {args.steps}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    minutes = (time.perf_counter() - began) / 60
    found = [detect(model.eval(), sample, args.tile) for sample in test]
    result = average_precision(test, found, classes)
    args.output.mkdir(parents=True)
    log = {
        **result,
        "time_minutes": round(minutes, 2),
        "losses": [round(float(np.mean(losses[k : k + 20])), 4) for k in range(0, len(losses), 20)],
        "config": {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "versions": dist.versions(),
            **runs.provenance(sys.argv),
        },
        "boxes": {
            sample["name"]: {name: values.tolist() for name, values in out.items()} for sample, out in zip(test, found)
        },
    }
    write_atomically(args.output / "result.json", lambda file: file.write((json.dumps(log) + "\n").encode()))
    write_atomically(args.output / "detections.png", lambda file: plots.save(picture(test, found), file))
    print(
        f"AP {result['ap']:.2f}, AP at 0.5 {result['ap50']:.2f} ({len(test)} images, {minutes:.1f} min, {args.checkpoint or 'from scratch'})"
    )
    return 0


if __name__ == "__main__":
    dist.run_main(main)
