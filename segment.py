"""Semantic segmentation: a linear layer on frozen feature maps, or fine-tuning with a feature pyramid; whole images in the test.

    python segment.py --data DIR --checkpoint runs/x/last.pt                       DIR: images/ and masks/, or train/ and val/ with them
    python segment.py --data DIR --checkpoint runs/x/last.pt --protocol finetune
    python segment.py --checkpoint runs/y/last.pt --predict FOLDER                 masks of images without any

Axis letters: b images, c channels, h w pixels.
"""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import encoders
import weights
from engine import data, dist, flags, plots, rng, runs
from engine.checkpoints import check_kind, load_checkpoint
from engine.data import MaskCrops
from engine.errors import DataError, UserError
from engine.files import write_atomically
from engine.flags import ResumeRules, number, positive_int, select, updated
from engine.inputs import DataConfig, resolve_format
from engine.loop import Loop
from engine.probes import iou_scores, pixel_confusion, predict_sliding
from finetune import SMALL_MODELS, non_square_size, resolve_model
from images.crops import format_size, normalize
from images.decode import to_chw
from images.folders import all_images
from images.formats import PixelFormat, measure_format, subsample
from images.masks import IGNORE_INDEX, train_and_val
from show import colours

COMMON = dict(min_lr=0.0, warmup_lr=0.0, weight_decay=0.05, clip=5.0, crop_scale=(0.5, 2.0))
RECIPES = {  # ade20k: size, rate, decay, warm-up and length of mmsegmentation's UperNet on MAE, layer decay as in 4.1.2; small: ours
    "ade20k": COMMON
    | dict(
        image_size=512,
        window=7,
        effective_batch=16,
        epochs=127,
        warmup_epochs=1.2,
        base_lr=3.2e-3,
        layer_decay=0.9,
        drop_path=0.1,
    ),
    "small": COMMON
    | dict(
        image_size=64,
        window=4,
        effective_batch=16,
        epochs=100,
        warmup_epochs=5,
        base_lr=3.2e-2,
        layer_decay=0.8,
        drop_path=0.0,
    ),
}
OF_PREDICT = {"predict", "checkpoint", "output", "device", "precision", "max_megapixels"}


class Segmenter(nn.Module):
    """Logits of each pixel, (b, c, h, w) to (b, classes, h, w). protocol: "frozen", "finetune", or "pixels", a linear layer on the pixel itself.

    frozen: all levels of the encoder's pyramid (of one without, its last tokens), normalised over channels, at the finest one's stride, side by
    side, into one linear layer. finetune: a feature pyramid (Lin et al. 2017) of `width` channels, its levels summed at the finest stride
    (Kirillov et al. 2019), one convolution, one linear layer.
    """

    def __init__(self, encoder, classes: int, protocol: str, width: int = 128):
        super().__init__()
        self.encoder, self.protocol, self.undecayed = encoder, protocol, encoder.undecayed
        with torch.no_grad():
            widths = [level.shape[1] for level in self.levels(torch.zeros(1, encoder.channels, *encoder.image_size))]
        if protocol == "finetune":
            self.pyramid, self.mix = (
                FeaturePyramidNetwork(widths, width),
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()),
            )
        else:
            encoder.requires_grad_(False)
        self.head = nn.Conv2d(width if protocol == "finetune" else sum(widths), classes, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def levels(self, images) -> list[torch.Tensor]:
        """Feature maps, the finest first."""
        if self.protocol == "pixels":
            return [images]
        if hasattr(self.encoder, "pyramid"):
            return self.encoder.pyramid(images)
        return [rearrange(self.encoder(images), "b (i j) c -> b c i j", i=images.shape[-2] // self.encoder.unit)]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.protocol != "finetune":
            self.encoder.eval()
        return self

    def forward(self, images):
        maps, trained = self.levels(images), self.protocol == "finetune"
        if trained:
            maps = list(self.pyramid({str(k): level for k, level in enumerate(maps)}).values())
        elif self.protocol == "frozen":
            maps = [F.layer_norm(level.movedim(1, -1), level.shape[1:2]).movedim(-1, 1) for level in maps]
        finest = [min(side, max(level, side // 4)) for side, level in zip(images.shape[-2:], maps[0].shape[-2:])]
        maps = [
            level if list(level.shape[-2:]) == finest else F.interpolate(level, finest, mode="bilinear")
            for level in maps
        ]
        x = self.mix(torch.stack(maps).sum(0)) if trained else torch.cat(maps, dim=1)
        logits = self.head(x).float()
        return (
            logits
            if logits.shape[-2:] == images.shape[-2:]
            else F.interpolate(logits, images.shape[-2:], mode="bilinear")
        )

    def layer_of(self, name: str) -> int:
        return self.encoder.layer_of(name.removeprefix("encoder."))


def arguments(argv=None):
    parser = flags.Parser(
        description="Train and test semantic segmentation.", epilog="A recipe sets the defaults; any flag overrides it."
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: small for swin_nano, swin_micro, vit_micro and twins_micro, else ade20k, which was not run",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="a run of train.py or finetune.py, or weights of any kind that weights.py reads",
    )
    parser.add_argument("--init", choices=("pretrained", "scratch"), help="default: pretrained")
    parser.add_argument(
        "--protocol",
        choices=("frozen", "finetune", "pixels"),
        default="frozen",
        help="a linear layer on frozen feature maps; everything, with a "
        "feature pyramid; a linear layer on the pixel alone, without an encoder; default: frozen",
    )
    parser.add_argument(
        "--predict", metavar="DIR", help="only write the masks of a folder's images, by a checkpoint of this program"
    )
    parser.add_argument(
        "--classes",
        type=number(int, 2, 255),
        metavar="N",
        help="default: one more than the largest number in the training masks, which are all read",
    )
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="masks hold labels of single things: all of them are class 1, the rest is class 0",
    )
    parser.add_argument(
        "--train-images",
        type=positive_int,
        metavar="N",
        help="only so many of the training images, evenly spread; default: all",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="images/ and masks/ with files of the same names, or train/ and val/ or test/ that have them",
    )
    flags.add_pixel_flags(group)
    group.add_argument(
        "--crop-scale",
        type=number(float, 0, open_low=True),
        nargs=2,
        action=flags.Range,
        metavar=("LOW", "HIGH"),
        help="factor by which an image is scaled before it is cropped",
    )
    encoders.add_flags(parser)
    flags.add_training_flags(parser)
    parser.add_argument(
        "--eval-every", type=positive_int, default=10, metavar="EPOCHS", help="besides at the end; default: 10"
    )
    parser.add_argument(
        "--adam-eps", type=number(float, 0, open_low=True), default=1e-8, help="AdamW's epsilon; default: 1e-8"
    )
    named = flags.explicit_flags(parser, argv)
    if parser.parse_args(argv).predict and named - OF_PREDICT:
        raise UserError(
            f"{', '.join(sorted('--' + name.replace('_', '-') for name in named - OF_PREDICT))}: has no say in --predict; leave it out"
        )
    return flags.parse_with_recipe(
        parser,
        argv,
        RECIPES,
        kind="segment",
        choose=lambda args: "small" if resolve_model(args) in SMALL_MODELS else "ade20k",
        layers=[non_square_size],
    )


# ---------------------------------------------------------------------------------------------------- data and model


def load_images(args, distributed):
    """Training and held-out images with masks, whose number of classes and format of pixels are settled; one process measures for all."""
    form, measured = resolve_format(select(DataConfig, vars(args)))
    train, held_out, line = train_and_val(args.data, form, args.foreground)
    distributed.print(line)
    if not measured:
        form, lines = distributed.run_on_main(lambda: measure_format(train, form))
        distributed.print_lines(lines)
    train.form = held_out.form = form
    classes = args.classes or distributed.run_on_main(train.counted)
    train.count = held_out.count = classes
    if args.train_images:
        if args.train_images > len(train):
            raise UserError(f"--train-images {args.train_images}: there are {len(train)}")
        train = train.subset(((np.arange(args.train_images) + 0.5) / args.train_images * len(train)).astype(int))
    return updated(args, classes=classes, **form.requested), train, held_out


def make_model(args, distributed, resumed) -> Segmenter:
    torch.manual_seed(args.seed)
    encoder = encoders.make(
        args.model,
        args.activation_checkpointing,
        image_size=args.image_size,
        window=args.window,
        drop_path=args.drop_path,
        channels=args.channels,
    )
    if resumed or args.init == "scratch" or args.protocol == "pixels":
        distributed.print(
            f"{args.model}, weights from {resumed}"
            if resumed
            else "no encoder"
            if args.protocol == "pixels"
            else f"{args.model} from scratch"
        )
    else:
        distributed.print(weights.load(args.checkpoint, encoder) + "; the head is initialised at random")
    return Segmenter(encoder, args.classes, args.protocol).to(distributed.device)


# ---------------------------------------------------------------------------------------------------- the test


@torch.no_grad()
def evaluate(args, distributed, model, held_out, bad: dict) -> tuple[dict, list]:
    """segmentation.measures over whole held-out images, at full resolution; and (image, truth, prediction) of up to three. bad: unreadable images with reasons."""
    model.eval()
    confusion, pictures = torch.zeros(args.classes, args.classes, dtype=torch.long), []
    drawn = set(((np.arange(3) + 0.5) / 3 * len(held_out)).astype(int).tolist())
    for index in range(distributed.rank, len(held_out), distributed.world_size):
        try:
            pixels = to_chw(held_out.decode(index))
        except DataError as error:
            bad[index] = str(error)
            continue
        image = normalize(pixels.to(distributed.device).float(), held_out.form.mean, held_out.form.std)
        truth = torch.from_numpy(held_out.mask(index, tuple(pixels.shape[1:])))
        predicted = predict_sliding(distributed, model, image, model.encoder.image_size).argmax(0).cpu()
        confusion += pixel_confusion(predicted, truth, args.classes)
        pictures += [(image.cpu(), truth, predicted)] if index in drawn else []
    model.train()
    confusion = distributed.all_reduce(confusion)
    if not confusion.sum():
        distributed.fail(f"none of the {len(held_out)} held-out images can be read, or no pixel of them has a class")
    return iou_scores(confusion), pictures


def picture(pictures: list, form: PixelFormat, classes: int):
    """Image, truth and prediction, a row each."""
    colour = colormaps["tab20" if classes > 2 else "gray"]
    columns = {"image": [], "truth": [], "prediction": []}
    for image, *numbers in pictures:
        image = torch.from_numpy(subsample(image.movedim(0, -1).numpy(), 250_000)).movedim(-1, 0)
        columns["image"].append(
            rearrange(colours(image[None, None], form, None)[0](image[None])[0], "c h w -> h w c").numpy()
        )
        for name, labels in zip(("truth", "prediction"), numbers):
            columns[name].append(
                colour(np.ma.masked_equal(subsample(labels.numpy(), 250_000), IGNORE_INDEX) / max(1, classes - 1))
            )
    high = 3 * sum(image.shape[0] / image.shape[1] for image in columns["image"]) + 0.5
    figure = Figure(figsize=(9, high), dpi=100, facecolor="white")
    plots.tile_images(figure.add_axes((0.01, 0.01, 0.98, 0.98 - 0.35 / high)), list(columns.items()), 12)
    return figure


# ---------------------------------------------------------------------------------------------------- the run


def train(args, distributed) -> tuple[int, dict]:
    """Train a segmenter; returns the exit status and the last measures."""
    if not args.data:
        raise UserError("give --data, a folder with images/ and masks/, or --predict FOLDER with --checkpoint")
    if not args.checkpoint and args.init != "scratch" and args.protocol != "pixels":
        raise UserError("give --checkpoint, pre-trained weights to start from, or --init scratch")
    args, images, held_out = load_images(updated(args, model=resolve_model(args)), distributed)
    run, resumed = runs.open_run(vars(args), distributed, args.recipe, f"segment-{args.protocol}")
    images, held_out = runs.restore_file_lists(images, held_out, resumed, args.data, distributed)
    model = make_model(args, distributed, resumed)
    loop = Loop(
        "segment",
        vars(args),
        distributed,
        run,
        resumed,
        model,
        MaskCrops(images, args.image_size, args.crop_scale, seed=args.seed),
        held_out,
        ResumeRules(),
    )
    name = f"recipe {args.recipe}, {args.model} at {format_size(args.image_size)} px"
    loop.begin([*loop.lines(name), f"{args.classes} classes"])
    result = {}

    def look():
        if not loop.evaluation_due(args.eval_every):
            return result
        bad = {}
        found, pictures = evaluate(args, distributed, model, held_out, bad)
        loop.log_evaluation(
            bad,
            eval_miou=found["miou"],
            eval_pixel_accuracy=found["pixel_accuracy"],
            **{f"eval_iou_{k}": iou for k, iou in enumerate(found["iou"])},
        )
        if pictures:
            loop.picture("segmentation", lambda: picture(pictures, held_out.form, args.classes), keep=True)
        return found

    result = look()
    for step in loop.steps():
        torch.manual_seed(rng.seed(args.seed, "drop path", step, distributed.rank))
        batches = list(loop.micro_batches())
        # the mean over all labelled pixels of the step, however it is divided into micro-steps and processes, whose gradients are averaged
        parts = distributed.world_size * args.accumulate
        labelled = (
            distributed.all_reduce(sum((batch["masks"] != IGNORE_INDEX).sum() for batch in batches)).clamp(min=1)
            / parts
        )
        for batch in batches:
            pixels = data.prepare_batch(batch, distributed.device, args.image_size, loop.form.mean, loop.form.std)
            truth = batch["masks"].to(distributed.device, non_blocking=True)
            truth = torch.where(batch["flip"].to(distributed.device)[:, None, None], truth.flip(-1), truth)
            loss = F.cross_entropy(
                loop.train_step.forward(pixels), truth, ignore_index=IGNORE_INDEX, reduction="sum"
            ) / labelled.to(distributed.device)
            loop.train_step.backward(loss, {"loss": loss})
        loop.train_step.update()
        loop.log()
        if loop.checkpoint():
            return runs.STOPPED, result
        result = look()
    return 0, result or evaluate(args, distributed, model, held_out, {})[0]


def predict(args, distributed) -> int:
    """masks/NAME.png, class numbers, of every image of a folder."""
    if not args.checkpoint:
        raise UserError("--predict needs --checkpoint, a checkpoint of segment.py")
    saved = check_kind(load_checkpoint(args.checkpoint), args.checkpoint, "segment")
    given, form = (
        saved["config"]["arguments"],
        replace(PixelFormat.of(saved["config"]["pixels"]), max_megapixels=args.max_megapixels),
    )
    encoder = encoders.make(
        given["model"], image_size=given["image_size"], window=given["window"], channels=form.channels
    )
    model = Segmenter(encoder, given["classes"], given["protocol"]).to(distributed.device).eval()
    model.load_state_dict(saved["model"])
    images, bad = all_images(args.predict, form), {}
    run, _ = runs.open_run(vars(args), distributed, "predict", Path(args.predict).resolve().name)
    runs.create_folder(
        run,
        {"kind": "predict", "arguments": vars(args), "pixels": form.to_dict(), **runs.provenance(sys.argv)},
        {},
        is_new=True,
    )
    for index in range(distributed.rank, len(images), distributed.world_size):
        try:
            image = normalize(to_chw(images.decode(index)).to(distributed.device).float(), form.mean, form.std)
        except DataError as error:
            bad[index] = str(error)
            continue
        file, target = io.BytesIO(), run.folder / "masks" / f"{images.name(index)}.png"
        Image.fromarray(
            predict_sliding(distributed, model, image, model.encoder.image_size)
            .argmax(0)
            .cpu()
            .numpy()
            .astype(np.uint8)
        ).save(file, "PNG")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda out: out.write(file.getvalue()))
    run.report_bad_held_out([(images.name(index), reason) for index, reason in bad.items()], len(images), max_share=1.0)
    distributed.print(f"wrote {run.folder / 'masks'}: {len(images) - len(run.bad_held_out)} masks")
    return 0


def main(argv=None) -> int:
    args = arguments(argv)
    if args.init == "scratch" and args.checkpoint:
        raise UserError("--init scratch takes no --checkpoint: leave one of them out")
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    if args.predict:
        return predict(args, distributed)
    status, result = train(args, distributed)
    if not status:
        each = json.dumps([None if iou != iou else round(iou, 2) for iou in result["iou"]])
        distributed.print(
            f"mean IoU {result['miou']:.2f}, pixel accuracy {result['pixel_accuracy']:.2f} (IoU of each class: {each}; {args.checkpoint or 'no checkpoint'})"
        )
    return status


if __name__ == "__main__":
    dist.run_main(main)
