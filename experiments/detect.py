r"""Detection by torchvision's Faster R-CNN on the feature pyramid of an encoder.

    python experiments/detect.py --data data/dense/trees --test "OSBS*" "SOAP*" --one-class tree \
        --checkpoint runs/x/last.pt --output runs/trees

Boxes are in a VOC file (XML) for each image, or in one COCO file (JSON). The detector is trained on random tiles of
the images whose names match no --test pattern, and tested on the others, whole images, by overlapping tiles. Average
precision is computed by pycocotools (pip install pycocotools). Axis letters: c channels, h w pixels, n boxes.
"""

import argparse
import fnmatch
import importlib.util
import io
import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from contextlib import redirect_stdout
from itertools import product
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
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, box_area, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import encoders  # noqa: E402
import weights  # noqa: E402
from engine import dist, plots, rng, runs  # noqa: E402
from engine.errors import DataError, UserError  # noqa: E402
from engine.files import write_atomically  # noqa: E402
from engine.flags import updated  # noqa: E402
from engine.inputs import checkpoint_format  # noqa: E402
from engine.optim import learning_rate, parameter_groups  # noqa: E402
from finetune import resolve_model  # noqa: E402
from images.decode import to_chw  # noqa: E402
from images.folders import all_images  # noqa: E402
from images.formats import PixelFormat  # noqa: E402

# ------------------------------------------------------------------------------------------------- boxes

Objects = list[tuple[str, list[float], bool]]  # class name, [left, top, right, bottom] in pixels, whether it is a crowd


def voc_boxes(path: Path) -> Objects:
    """The objects of a VOC file, with coordinates from 0 on. UserError for an invalid or empty file."""
    objects = []
    try:
        for entry in ElementTree.parse(path).getroot().iter("object"):
            box = [float(entry.find(f"bndbox/{side}").text) for side in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = box  # VOC counts pixels from 1, and the last one belongs to the box
            objects.append((entry.find("name").text, [left - 1, top - 1, right, bottom], False))
    except (ElementTree.ParseError, OSError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a VOC file of boxes ({error or type(error).__name__})") from None
    if not objects:
        raise UserError(f"{path}: holds no object; remove the image, or give the boxes of all images in a COCO file")
    return objects


def coco_boxes(path: Path) -> dict[str, Objects]:
    """The objects of each image of a COCO file, by the name of the image. UserError for a file that is not valid."""
    try:
        file = json.loads(path.read_text())
        class_names = {entry["id"]: entry["name"] for entry in file["categories"]}
        file_names = {entry["id"]: entry["file_name"] for entry in file["images"]}
        objects = {name: [] for name in file_names.values()}
        for entry in file["annotations"]:
            left, top, width, height = entry["bbox"]
            name, box = class_names[entry["category_id"]], [left, top, left + width, top + height]
            objects[file_names[entry["image_id"]]].append((name, box, bool(entry.get("iscrowd"))))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a COCO file of boxes ({type(error).__name__}: {error})") from None
    return objects


def read(
    folder: str,
    patterns: list[str],
    coco_file: Path | None = None,
    one_class: str | None = None,
    form: PixelFormat = PixelFormat(),
) -> tuple[list[dict], list[dict], list[str]]:
    """Read images and boxes.

    Args:
        folder: of images.
        patterns: names of the test images, such as "OSBS*".
        coco_file: of all boxes; None for a VOC file next to each image.
        one_class: name of a class that all boxes get; None for their own.
        form: the pixel format.

    Returns:
        Training images, test images, and the names of the classes, whose labels count from 1. An image is {"name",
        "pixels" (c, h, w) in 0-1, "boxes" (n, 4), "labels" (n,), "crowds" (m, 4), "crowd_labels" (m,)}. A crowd is a
        box of COCO's around many objects: it is not trained on, and detections inside it count neither as right nor as
        wrong.

    Raises:
        UserError: for images, boxes and patterns that do not fit together.
    """
    images, coco = all_images(folder, form), coco_boxes(coco_file) if coco_file else None
    objects, sources = {}, {}
    for name in images.names:
        source = sources[name] = coco_file or (images.root / name).with_suffix(".xml")
        if coco is None and not source.exists():
            raise UserError(f"{images.root / name}: has no boxes, {source.name} is missing")
        if coco is not None and name not in coco:
            raise UserError(f"{images.root / name}: is not in {coco_file}")
        objects[name] = voc_boxes(source) if coco is None else coco[name]
    classes = sorted({one_class or kind for entries in objects.values() for kind, _, _ in entries})
    train, test = [], []
    for index, name in enumerate(images.names):
        try:
            pixels = to_chw(images.decode(index)).float() / 255
        except DataError as error:
            raise UserError(f"{images.root / name}: {error}") from None
        boxes = torch.tensor([box for _, box, _ in objects[name]]).reshape(-1, 4)
        labels = torch.tensor([classes.index(one_class or kind) + 1 for kind, _, _ in objects[name]], dtype=torch.long)
        crowd = torch.tensor([is_crowd for _, _, is_crowd in objects[name]], dtype=torch.bool)
        height, width = pixels.shape[1:]
        is_outside = (boxes < -1) | (boxes > torch.tensor([width, height, width, height]) + 1)
        is_invalid = is_outside.any(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if is_invalid.any():
            raise UserError(
                f"{sources[name]}: a box {boxes[is_invalid][0].tolist()} that is empty or outside {name}, "
                f"{width} x {height} pixels"
            )
        sample = {"name": name, "pixels": pixels, "boxes": boxes[~crowd], "labels": labels[~crowd]}
        sample |= {"crowds": boxes[crowd], "crowd_labels": labels[crowd]}
        is_test = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        (test if is_test else train).append(sample)
    if not test or not train:
        raise UserError(
            f"--test {' '.join(patterns)}: matches {len(test)} of {len(images.names)} images; some must be left to "
            "train on, and some to test"
        )
    return train, test, classes


def tile_of(sample: dict, top: int, left: int, tile: int) -> tuple[torch.Tensor, dict]:
    """Cut a square from an image, with the boxes of which at least a third of the area lies in it, cut at its border.

    Args:
        sample: image as `read` returns it.
        top, left: corner of the square in pixels.
        tile: side of the square in pixels; it may be smaller at the border of the image.

    Returns:
        Pixels (c, h, w), and {"boxes" (n, 4), "labels" (n,)} in coordinates of the tile.
    """
    pixels = sample["pixels"][:, top : top + tile, left : left + tile]
    boxes = sample["boxes"] - torch.tensor([left, top, left, top])
    clipped = boxes.clamp(0, tile)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (sides.prod(1) / box_area(boxes) >= 1 / 3) & (sides > 2).all(1)
    return pixels, {"boxes": clipped[keep], "labels": sample["labels"][keep]}


# ------------------------------------------------------------------------------------------------- the network


class Backbone(nn.Module):
    """A feature pyramid network (Lin et al. 2017) on the maps of an encoder's pyramid, in the form of FasterRCNN."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.out_channels = encoder, 256
        with torch.no_grad():
            maps = encoder.pyramid(torch.zeros(1, encoder.channels, *encoder.image_size))
        widths = [level.shape[1] for level in maps]
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images):
        maps = self.encoder.pyramid(images)
        return self.fpn(OrderedDict((str(k), norm(level)) for k, (norm, level) in enumerate(zip(self.norms, maps))))


class Detector(FasterRCNN):
    """Faster R-CNN (Ren et al. 2015) with a feature pyramid.

    Args:
        encoder: with a pyramid of maps.
        classes: number of classes, without background.
        tile: side of the square input, in pixels.
        form: pixel format, whose mean and standard deviation normalize the input.
    """

    def __init__(self, encoder, classes: int, tile: int, form: PixelFormat):
        backbone, proposals = Backbone(encoder), 300
        levels = [str(k) for k in range(len(backbone.norms))]
        anchor_sizes = tuple((24 * 2**k,) for k in range(len(levels) + 1))  # of small objects, such as crowns of trees
        super().__init__(
            backbone,
            None,
            min_size=tile,
            max_size=tile,
            image_mean=list(form.mean),
            image_std=list(form.std),
            size_divisible=encoder.unit,
            rpn_anchor_generator=AnchorGenerator(anchor_sizes, ((0.5, 1.0, 2.0),) * len(anchor_sizes)),
            box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
            box_head=TwoMLPHead(backbone.out_channels * 49, 256),
            box_predictor=FastRCNNPredictor(256, classes + 1),
            box_detections_per_img=200,
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_train=proposals,
            rpn_pre_nms_top_n_test=2 * proposals,
            rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=128,
        )
        self.undecayed = encoder.undecayed

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer decay."""
        return self.backbone.encoder.layer_of(name.removeprefix("backbone.encoder."))


# ------------------------------------------------------------------------------------------------- training


def batch_of(samples: list[dict], args: argparse.Namespace, step: int) -> tuple[list, list]:
    """Draw random tiles, flipped along each axis half of the time, as a function of seed and step.

    Args:
        samples: training images. An image is drawn in proportion to its area.
        args: with seed, batch_size and tile.
        step: number of the step.

    Returns:
        Tiles and their targets, as `tile_of` returns them.
    """
    areas = np.array([sample["pixels"][0].numel() for sample in samples], float)
    cumulative_share = np.cumsum(areas) / areas.sum()
    images, targets = [], []
    for pick, y, x, flip_x, flip_y in rng.uniform(5, args.seed, "tiles", step, np.arange(args.batch_size)):
        sample = samples[int(np.searchsorted(cumulative_share, pick))]
        top, left = (int(draw * max(1, side - args.tile + 1)) for draw, side in zip((y, x), sample["pixels"].shape[1:]))
        pixels, target = tile_of(sample, top, left, args.tile)
        boxes, (height, width) = target["boxes"], pixels.shape[1:]
        if flip_x < 0.5:
            pixels = pixels.flip(2)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if flip_y < 0.5:
            pixels = pixels.flip(1)
            boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        images.append(pixels)
        targets.append(target)
    return images, targets


def train_detector(model: Detector, samples: list[dict], args: argparse.Namespace, device) -> list[float]:
    """Train on random tiles with AdamW. Returns the loss of each step."""
    layer_decay = args.layer_decay if args.checkpoint else 1.0
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, layer_decay), lr=args.lr)
    losses = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, args.steps, args.steps // 20, args.lr, 0, 0)
        torch.manual_seed(rng.seed(args.seed, "proposals", step))
        images, targets = batch_of(samples, args, step)
        targets = [{name: values.to(device) for name, values in target.items()} for target in targets]
        loss = sum(model([pixels.to(device) for pixels in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {args.steps}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return losses


# ------------------------------------------------------------------------------------------------- test


@torch.no_grad()
def detect(model, sample: dict, tile: int, device="cpu") -> dict:
    """Detect objects in a whole image, from tiles that overlap by half.

    Args:
        model: a detector in evaluation mode.
        sample: image as `read` returns it.
        tile: side of a tile in pixels.
        device: of the model.

    Returns:
        {"boxes" (n, 4), "scores" (n,), "labels" (n,)} on the CPU.
    """
    rows, columns = (
        sorted({*range(0, max(1, side - tile), tile // 2), max(0, side - tile)}) for side in sample["pixels"].shape[1:]
    )
    outputs = []
    for top, left in product(rows, columns):
        (output,) = model([sample["pixels"][:, top : top + tile, left : left + tile].to(device)])
        output = {name: values.cpu() for name, values in output.items()}
        outputs.append(output | {"boxes": output["boxes"] + torch.tensor([left, top, left, top])})
    merged = {name: torch.cat([output[name] for output in outputs]) for name in ("boxes", "scores", "labels")}
    keep = batched_nms(merged["boxes"], merged["scores"], merged["labels"], 0.4)
    return {name: values[keep] for name, values in merged.items()}


def average_precision(samples: list[dict], detections: list[dict], classes: list[str]) -> dict[str, float]:
    """Average precision as COCO defines it, with at most 500 boxes for each image and class.

    Args:
        samples: test images as `read` returns them.
        detections: of each image, as `detect` returns them.
        classes: their names.

    Returns:
        "ap50" at an IoU of 0.5, and "ap", the mean over 0.5 to 0.95, in %.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def dataset(annotations):
        """COCO's object of annotations: tuples of image index, boxes, labels, scores, and whether they are crowds."""
        entries = []
        for image, boxes, labels, scores, crowd in annotations:
            sizes = box_convert(boxes.double(), "xyxy", "xywh").tolist()
            for box, label, score in zip(sizes, labels.tolist(), scores.tolist()):
                entry = {"id": len(entries) + 1, "image_id": image, "category_id": label, "bbox": box, "score": score}
                entries.append(entry | {"area": box[2] * box[3], "iscrowd": crowd})
        coco = COCO()
        coco.dataset = {
            "images": [{"id": k} for k in range(len(samples))],
            "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
            "annotations": entries,
        }
        coco.createIndex()
        return coco

    truth = []
    for k, sample in enumerate(samples):
        for crowd, boxes, labels in ((0, "boxes", "labels"), (1, "crowds", "crowd_labels")):
            truth.append((k, sample[boxes], sample[labels], sample[labels], crowd))  # a score that is not used
    found = [(k, output["boxes"], output["labels"], output["scores"], 0) for k, output in enumerate(detections)]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset(truth), dataset(found), "bbox")
        evaluation.params.maxDets = [1, 100, 500]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (thresholds, recalls, classes), all areas, 500 boxes
    result = {}
    for name, values in (("ap50", precision[0]), ("ap", precision)):
        valid = values[values > -1]  # -1: a class without boxes
        result[name] = 100 * float(valid.mean()) if valid.size else 0.0
    return result


def picture(samples: list[dict], detections: list[dict]) -> Figure:
    """Each test image with the true boxes (white) and as many detections, those of the highest scores (orange)."""
    figure = Figure(figsize=(5 * len(samples), 5.3), dpi=100, facecolor="white")
    for axes, sample, output in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples, detections):
        pixels = sample["pixels"] if len(sample["pixels"]) >= 3 else sample["pixels"][:1].expand(3, -1, -1)
        axes.imshow(rearrange(pixels[:3], "c h w -> h w c").numpy())
        axes.axis("off")
        axes.set_title(sample["name"], fontsize=10)
        best = output["scores"].argsort(descending=True)[: len(sample["boxes"])]
        for boxes, colour in ((sample["boxes"], "white"), (output["boxes"][best], "orange")):
            for left, top, width, height in box_convert(boxes, "xyxy", "xywh").tolist():
                axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.2))
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------------- the program


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder of images")
    parser.add_argument(
        "--coco", type=Path, metavar="FILE", help="COCO file of the boxes; default: NAME.xml next to each image"
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
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output}: already exists; give a new folder")
    if not importlib.util.find_spec("pycocotools"):  # before hours of training
        raise UserError("pycocotools is not installed: pip install pycocotools")
    device = dist.initialize(args.device, "fp32").device
    form = (checkpoint_format(args.checkpoint) if args.checkpoint else None) or PixelFormat()
    train, test, classes = read(args.data, args.test, args.coco, args.one_class, form)
    args = updated(args, model=resolve_model(args))
    torch.manual_seed(args.seed)
    encoder = encoders.make(args.model, image_size=args.tile, window=args.window, channels=form.channels)
    if not hasattr(encoder, "pyramid"):
        raise UserError(f"--model {args.model}: has no pyramid of maps; give a swin_... or twins_...")
    print(weights.load(args.checkpoint, encoder) if args.checkpoint else f"{args.model} from scratch")
    train_boxes, test_boxes = (sum(len(sample["boxes"]) for sample in samples) for samples in (train, test))
    print(
        f"{len(train)} images, {train_boxes} boxes; test: {len(test)} images, {test_boxes} boxes; {len(classes)} "
        f"classes ({', '.join(classes[:5])}); on {dist.device_name(device)}"
    )
    model = Detector(encoder, len(classes), args.tile, form).to(device).train()
    start = time.perf_counter()
    losses = train_detector(model, train, args, device)
    minutes = (time.perf_counter() - start) / 60
    detections = [detect(model.eval(), sample, args.tile, device) for sample in test]
    result = average_precision(test, detections, classes)
    args.output.mkdir(parents=True, exist_ok=True)
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
            sample["name"]: {name: values.tolist() for name, values in output.items()}
            for sample, output in zip(test, detections)
        },
    }
    write_atomically(args.output / "result.json", lambda file: file.write((json.dumps(log) + "\n").encode()))
    write_atomically(args.output / "detections.png", lambda file: plots.save(picture(test, detections), file))
    print(
        f"AP {result['ap']:.2f}, AP at 0.5 {result['ap50']:.2f} ({len(test)} images, {minutes:.1f} min, "
        f"{args.checkpoint or 'from scratch'})"
    )
    return 0


if __name__ == "__main__":
    dist.run_main(main)
