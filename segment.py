"""Semantic segmentation: a linear layer on frozen feature maps, or fine-tuning with a feature pyramid.

Images of any size are evaluated and predicted at their full resolution, by sliding windows.

    python segment.py --data DIR --checkpoint runs/x/last.pt    DIR has images/ and masks/, or train/ and val/ with them
    python segment.py --data DIR --checkpoint runs/x/last.pt --protocol finetune
    python segment.py --checkpoint runs/y/last.pt --predict FOLDER   write masks for images that have none

Axis letters: b images, c channels, h w pixels.
"""

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
from engine import data, dist, flags, plots, rng, runs
from engine.checkpoints import check_kind, load_checkpoint
from engine.data import MaskCrops
from engine.errors import DataError, UserError
from engine.files import write_atomically
from engine.flags import ResumeRules, number, positive_int, select, updated
from engine.inputs import DataConfig, resolve_format
from engine.loop import Loop
from engine.probes import iou_scores, pixel_confusion, predict_sliding
from finetune import SMALL_MODELS, check_flags_of_mode, make_encoder, non_square_size, resolve_model, resolve_start
from images.crops import format_size, normalize
from images.decode import to_chw
from images.folders import all_images
from images.formats import PixelFormat, measure_format, subsample
from images.masks import IGNORE_INDEX, train_and_val
from show import make_to_rgb

COMMON = dict(min_lr=0.0, warmup_lr=0.0, weight_decay=0.05, clip=5.0, crop_scale=(0.5, 2.0))
# ade20k: image size, learning rate, weight decay, warm-up and length of mmsegmentation's UperNet on MAE; the layer
# decay
# is that of section 4.1.2. small: our own.
RECIPES = {
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
PREDICT_FLAGS = {"predict", "checkpoint", "output", "device", "precision", "max_megapixels"}


class Segmenter(nn.Module):
    """Logits of each pixel: (b, c, h, w) to (b, classes, h, w).

    frozen: all levels of the encoder's pyramid (the last tokens, of an encoder without a pyramid) are normalised over
    their channels, resized to the stride of the finest level and concatenated; a linear layer follows. finetune: a
    feature pyramid (Lin et al. 2017), whose levels are summed at the finest stride (Kirillov et al. 2019), one
    convolution, one linear
    layer. pixels: a linear layer on the pixel itself.

    Args:
        encoder: see encoders.Encoder.
        classes: their number.
        protocol: "frozen", "finetune" or "pixels".
        width: channels of the feature pyramid.
    """

    def __init__(self, encoder, classes: int, protocol: str, width: int = 128):
        super().__init__()
        self.encoder, self.protocol, self.undecayed = encoder, protocol, encoder.undecayed
        with torch.no_grad():
            widths = [level.shape[1] for level in self.levels(torch.zeros(1, encoder.channels, *encoder.image_size))]
        if protocol == "finetune":
            self.pyramid = FeaturePyramidNetwork(widths, width)
            self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())
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
        """Training mode, in which a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.protocol != "finetune":
            self.encoder.eval()
        return self

    def forward(self, images):
        levels = self.levels(images)
        if self.protocol == "finetune":
            levels = list(self.pyramid({str(k): level for k, level in enumerate(levels)}).values())
        elif self.protocol == "frozen":
            levels = [F.layer_norm(level.movedim(1, -1), level.shape[1:2]).movedim(-1, 1) for level in levels]
        # a ViT's only level has a stride of 16, which is too coarse for masks: it is brought to a stride of 4 at least
        finest = [max(level, side // 4) for level, side in zip(levels[0].shape[-2:], images.shape[-2:])]
        levels = [resize_map(level, finest) for level in levels]
        x = self.mix(torch.stack(levels).sum(0)) if self.protocol == "finetune" else torch.cat(levels, dim=1)
        return resize_map(self.head(x).float(), images.shape[-2:])

    def layer_of(self, name: str) -> int:
        return self.encoder.layer_of(name.removeprefix("encoder."))


def resize_map(x: torch.Tensor, size) -> torch.Tensor:
    """A feature map (b, c, h, w) at another height and width, by bilinear interpolation."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear")


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
    if parser.parse_args(argv).predict:
        check_flags_of_mode(parser, argv, "--predict", PREDICT_FLAGS)
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
    """The training and validation images with their masks. One process measures what all of them use.

    Returns:
        The arguments with the pixel format and the number of classes that were measured, and both sources of images.
    """
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
    """The network of a run. resumed: the checkpoint that the run continues from, or None."""
    torch.manual_seed(args.seed)
    if args.protocol == "pixels":  # its encoder is not used
        args = updated(args, init="scratch")
    encoder, line = make_encoder(args, args.channels, resumed)
    if not resumed and args.init != "scratch":
        line += "; the head is initialised at random"
    distributed.print("no encoder" if args.protocol == "pixels" else line)
    return Segmenter(encoder, args.classes, args.protocol).to(distributed.device)


# ---------------------------------------------------------------------------------------------------- the test


@torch.no_grad()
def predict_images(distributed, model: Segmenter, images, bad: dict[int, str]):
    """Yield (index, image, classes) of each readable image that is this process's part, at full resolution.

    Args:
        distributed: see engine.dist.Distributed.
        model: in evaluation mode.
        images: a source with `decode` and `form`.
        bad: gets the indices of unreadable images, with the reasons.

    Yields:
        The index; the normalised image (c, h, w) on the device; the predicted class numbers (h, w) on the CPU.
    """
    for index in range(distributed.rank, len(images), distributed.world_size):
        try:
            pixels = to_chw(images.decode(index)).to(distributed.device).float()
        except DataError as error:
            bad[index] = str(error)
            continue
        image = normalize(pixels, images.form.mean, images.form.std)
        probabilities = predict_sliding(distributed, model, image, model.encoder.image_size)
        yield index, image, probabilities.argmax(0).cpu()


def evaluate(args, distributed, model: Segmenter, held_out, bad: dict[int, str]) -> tuple[dict, list]:
    """Test on all validation images, at full resolution.

    Args:
        args: have `classes`.
        distributed, model, bad: see `predict_images`.
        held_out: the validation images with their masks.

    Returns:
        probes.iou_scores over all processes, and (image, true classes, predicted classes) of up to three images.
    """
    model.eval()
    confusion, pictures = torch.zeros(args.classes, args.classes, dtype=torch.long), []
    drawn = ((np.arange(3) + 0.5) / 3 * len(held_out)).astype(int)  # evenly spread, because folders are sorted
    for index, image, predicted in predict_images(distributed, model, held_out, bad):
        truth = torch.from_numpy(held_out.mask(index, tuple(predicted.shape)))
        confusion += pixel_confusion(predicted, truth, args.classes)
        if index in drawn:
            pictures.append((image.cpu(), truth, predicted))
    model.train()
    confusion = distributed.all_reduce(confusion)
    if not confusion.sum():
        distributed.fail(
            f"none of the {len(held_out)} validation images can be read, or none of their pixels has a class"
        )
    return iou_scores(confusion), pictures


def picture(pictures: list, form: PixelFormat, classes: int):
    """A matplotlib figure with a row for each of `pictures`: image, true classes, predicted classes.

    Args:
        pictures: from `evaluate`.
        form: the pixel format of the images.
        classes: their number, which fixes the colours.
    """
    colormap = colormaps["tab20" if classes > 2 else "gray"]
    columns = {"image": [], "truth": [], "prediction": []}
    for image, truth, predicted in pictures:
        image = torch.from_numpy(subsample(image.movedim(0, -1).numpy(), 250_000)).movedim(-1, 0)
        to_rgb, _ = make_to_rgb(image[None, None], form, None)
        columns["image"].append(rearrange(to_rgb(image[None])[0], "c h w -> h w c").numpy())
        for name, labels in (("truth", truth), ("prediction", predicted)):
            labels = np.ma.masked_equal(subsample(labels.numpy(), 250_000), IGNORE_INDEX)
            columns[name].append(colormap(labels / max(1, classes - 1)))
    height = 3 * sum(image.shape[0] / image.shape[1] for image in columns["image"]) + 0.5
    figure = Figure(figsize=(9, height), dpi=100, facecolor="white")
    plots.tile_images(figure.add_axes((0.01, 0.01, 0.98, 0.98 - 0.35 / height)), list(columns.items()), 12)
    return figure


# ---------------------------------------------------------------------------------------------------- the run


def train(args, distributed) -> tuple[int, dict]:
    """Train a segmenter; returns the exit status and the last measures."""
    if not args.data:
        raise UserError("give --data, a folder with images/ and masks/, or --predict FOLDER with --checkpoint")
    args = resolve_start(args, required=args.protocol != "pixels")
    args, images, held_out = load_images(args, distributed)
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

    def evaluate_if_due():
        """The scores at the end of an epoch if they are due, else the last ones."""
        if not loop.evaluation_due(args.eval_every):
            return result
        bad = {}
        scores, pictures = evaluate(args, distributed, model, held_out, bad)
        loop.log_evaluation(
            bad,
            eval_miou=scores["miou"],
            eval_pixel_accuracy=scores["pixel_accuracy"],
            **{f"eval_iou_{k}": iou for k, iou in enumerate(scores["iou"])},
        )
        if pictures:
            loop.picture("segmentation", lambda: picture(pictures, held_out.form, args.classes), keep=True)
        return scores

    result = evaluate_if_due()
    for step in loop.steps():
        torch.manual_seed(rng.seed(args.seed, "drop path", step, distributed.rank))
        batches = list(loop.micro_batches())
        # The loss is the mean over all labelled pixels of the step. Gradients are averaged over processes and
        # micro-steps, each of which has its own number of labelled pixels, so each sum is divided by the mean of these
        # numbers.
        labelled = distributed.all_reduce(sum((batch["masks"] != IGNORE_INDEX).sum() for batch in batches)).clamp(min=1)
        labelled = (labelled / (distributed.world_size * args.accumulate)).to(distributed.device)
        for batch in batches:
            pixels = data.prepare_batch(batch, distributed.device, args.image_size, loop.form.mean, loop.form.std)
            truth = batch["masks"].to(distributed.device, non_blocking=True)
            truth = torch.where(batch["flip"].to(distributed.device)[:, None, None], truth.flip(-1), truth)
            logits = loop.train_step.forward(pixels)
            loss = F.cross_entropy(logits, truth, ignore_index=IGNORE_INDEX, reduction="sum") / labelled
            loop.train_step.backward(loss, {"loss": loss})
        loop.train_step.update()
        loop.log()
        if loop.checkpoint():
            return runs.STOPPED, result
        result = evaluate_if_due()
    return 0, result or evaluate(args, distributed, model, held_out, {})[0]


def predict(args, distributed) -> int:
    """Write masks/NAME.png, class numbers, for every image of a folder; returns the exit status."""
    if not args.checkpoint:
        raise UserError("--predict needs --checkpoint, a checkpoint of segment.py")
    saved = check_kind(load_checkpoint(args.checkpoint), args.checkpoint, "segment")
    trained = saved["config"]["arguments"]
    form = replace(PixelFormat.of(saved["config"]["pixels"]), max_megapixels=args.max_megapixels)
    encoder = encoders.make(
        trained["model"], image_size=trained["image_size"], window=trained["window"], channels=form.channels
    )
    model = Segmenter(encoder, trained["classes"], trained["protocol"]).to(distributed.device).eval()
    model.load_state_dict(saved["model"])
    images, bad = all_images(args.predict, form), {}
    run, _ = runs.open_run(vars(args), distributed, "predict", Path(args.predict).resolve().name)
    runs.create_folder(
        run,
        {"kind": "predict", "arguments": vars(args), "pixels": form.to_dict(), **runs.provenance(sys.argv)},
        {},
        is_new=True,
    )
    for index, _, predicted in predict_images(distributed, model, images, bad):
        target = run.folder / "masks" / f"{images.name(index)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(predicted.numpy().astype(np.uint8))
        write_atomically(target, lambda file: mask.save(file, "PNG"))
    run.report_bad_held_out([(images.name(index), reason) for index, reason in bad.items()], len(images), max_share=1.0)
    distributed.print(f"wrote {run.folder / 'masks'}: {len(images) - len(run.bad_held_out)} masks")
    return 0


def main(argv=None) -> int:
    args = arguments(argv)
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    if args.predict:
        return predict(args, distributed)
    status, result = train(args, distributed)
    if not status:
        each = json.dumps([None if iou != iou else round(iou, 2) for iou in result["iou"]])
        distributed.print(
            f"mean IoU {result['miou']:.2f}, pixel accuracy {result['pixel_accuracy']:.2f} (IoU of each class: {each}; "
            f"{args.checkpoint or 'no checkpoint'})"
        )
    return status


if __name__ == "__main__":
    dist.run_main(main)
