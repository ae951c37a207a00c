"""Fine-tuning, linear probe and k-NN (sections 4.1.2, 4.3, Table 2): what pre-training is for.

python finetune.py                                          the newest pre-trained run under runs/, on the demo's photographs
python finetune.py --data DIR --checkpoint runs/x/last.pt   full fine-tuning; --protocol linear or knn for frozen features
python finetune.py --data DIR --init scratch                the baseline without pre-training, with its own recipe
python finetune.py --data DIR --checkpoint runs/y/last.pt --eval      a fine-tuned checkpoint on labelled images
python finetune.py --checkpoint runs/y/last.pt --predict DIR          its classes for images without labels
python finetune.py --data DIR --checkpoint runs/x/last.pt --protocol features     what a frozen encoder makes of each image
"""

import csv
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2

import encoders
import weights
from encoders import Encoder
from engine import data, dist, flags, plots, probes, rng, runs
from engine.checkpoints import check_kind, load_checkpoint, resumed_config
from engine.errors import UserError
from engine.files import run_config, write_atomically
from engine.flags import ResumeRules, fraction, number, positive_int, select, updated
from engine.inputs import DataConfig, load_images, resolve_format
from engine.loop import Loop, report_unreadable_val
from images import balanced_subset, open_labelled_part
from images.crops import format_size
from images.folders import all_images
from images.formats import PixelFormat, measure_format
from images.sources import FileImages

PAPER = dict(
    epochs=100,
    warmup_epochs=20,
    base_lr=1.25e-3,
    warmup_lr=2.5e-7,
    min_lr=2.5e-7,
    weight_decay=0.05,
    layer_decay=0.9,
    clip=5.0,
    drop_path=0.2,
    crop_scale=(0.08, 1.0),
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    erasing=0.25,
    randaugment=27,
    fc_norm=False,
)  # no flag: see Classifier
RECIPES = {  # sections 4.1.2, 4.3 and Table 2, as docs/paper.md reads them; micro and demo are ours
    "imagenet": PAPER | dict(image_size=224, window=7, effective_batch=1024),
    "ablation": PAPER | dict(image_size=192, window=6, effective_batch=2048, warmup_epochs=10, drop_path=0.1),
    "mae": PAPER
    | dict(
        image_size=224,
        window=7,
        effective_batch=1024,
        warmup_epochs=5,
        base_lr=1e-3,
        warmup_lr=0.0,
        min_lr=1e-6,
        layer_decay=0.65,
        drop_path=0.1,
        clip=0.0,
        fc_norm=True,
    ),  # as published for ViT-B
    "cifar": PAPER | dict(image_size=192, window=6, effective_batch=512),
    "micro": PAPER
    | dict(
        image_size=32,
        window=4,
        effective_batch=256,
        warmup_epochs=5,
        base_lr=2e-3,
        drop_path=0.1,
        crop_scale=(0.35, 1.0),
        layer_decay=0.8,
    ),
    "demo": PAPER
    | dict(
        image_size=32,
        window=4,
        effective_batch=32,
        epochs=3,
        warmup_epochs=0.5,
        base_lr=2.4e-2,
        drop_path=0.0,
        layer_decay=0.8,
        crop_scale=(0.35, 1.0),
        mixup=0.0,
        cutmix=0.0,
        randaugment=0,
        erasing=0.0,
        labels=0.2,
    ),
}
SCRATCH = dict(layer_decay=1.0)  # from scratch no layer may lag behind
SCRATCH_OF = {
    "demo": dict(base_lr=8e-3),  # the better of the rates tried in results/demo/README.md
    "imagenet": dict(base_lr=5e-4, drop_path=0.5, epochs=300),
}  # Swin-B's own (Liu et al. 2021)
# Kept in a run's config, so that a run continues with the augmentation it began with. Runs of the earliest commits have none.
AUGMENTATION, EARLIER_AUGMENTATION = (
    "rand-m9-mstd0.5-inc1, erasing by noise",
    "operations with a chance of one half, erasing by noise",
)
FILL = (124, 116, 104)  # ImageNet's mean colour, where an operation moves pixels out of the image
OF = {
    "--eval": {
        "eval",
        "checkpoint",
        "data",
        "split",
        "device",
        "precision",
        "workers",
        "download",
        "max_bad_share",
        "max_megapixels",
    },
    "--predict": {"predict", "checkpoint", "output", "device", "precision", "workers", "max_megapixels"},
}
SMALL_MODELS = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")  # not for photographs
OF_MODEL = {
    "swin_large": dict(layer_decay=0.8, drop_path=0.3),
    "twins_large": dict(layer_decay=0.9, drop_path=0.2),  # 4.1.2, in imagenet and ablation
    "mixmim_base": dict(layer_decay=0.7, window=14),
}  # MixMAE's


class Classifier(nn.Module):
    """Average-pooled encoder tokens and a linear layer (section 4.1.2). (b, c, h, w) to (b, classes).

    fc_norm: as MAE fine-tunes a ViT. The mean is taken of tokens before the final norm, and goes through a norm of its own that is trained from the
    start; the last layer begins near zero.
    """

    def __init__(self, encoder: Encoder, classes: int, fc_norm: bool = False):
        super().__init__()
        self.encoder, self.undecayed = encoder, encoder.undecayed
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5 if fc_norm else 0.02)
        nn.init.zeros_(self.head.bias)
        self.fc_norm = None
        if fc_norm:
            self.fc_norm, encoder.norm = nn.LayerNorm(encoder.width, eps=encoder.norm.eps), nn.Identity()

    def features(self, images):
        pooled = self.encoder(images).mean(1)
        return pooled if self.fc_norm is None else self.fc_norm(pooled)

    def forward(self, images):
        return self.head(self.features(images))

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter: the encoder's; the head and its norm go with the final norm."""
        return self.encoder.layer_of(name.removeprefix("encoder."))


def arguments(argv=None):
    parser = flags.Parser(
        description="Fine-tune, probe or evaluate an encoder.",
        epilog="A recipe sets the defaults; any flag overrides it.",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: demo without --data; micro for swin_nano, swin_micro, vit_micro and twins_micro; "
        "cifar for cifar10 and cifar100; for a folder mae with a ViT, else imagenet",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="a run of train.py or finetune.py, or weights in torchvision's, timm's, "
        "Microsoft's or Hugging Face's layout; default without --data: the newest pre-training run under runs/",
    )
    parser.add_argument(
        "--init",
        choices=("pretrained", "scratch"),
        help="default: pretrained; without --data both, one after the other",
    )
    parser.add_argument(
        "--protocol",
        choices=("finetune", "linear", "knn", "features"),
        default="finetune",
        help="train everything; a linear layer on frozen features; weighted neighbours of frozen features; features.npy of every image "
        "of --data, no labels needed; default: finetune",
    )
    parser.add_argument(
        "--predict",
        metavar="DIR",
        help="only write predictions.csv, the classes of a folder's images, by a checkpoint of finetune.py",
    )
    parser.add_argument(
        "--eval", action="store_true", help="only evaluate a checkpoint of finetune.py, on the whole of --data"
    )
    parser.add_argument(
        "--split",
        choices=("val", "test", "train"),
        help="of --eval: the part of --data; default: val, else test, else all that is there",
    )
    parser.add_argument(
        "--labels",
        type=number(float, 0, 1, open_low=True),
        metavar="SHARE",
        help="class-balanced share of the training images; default: 1",
    )
    flags.add_data_flags(parser)
    encoders.add_flags(parser)
    flags.add_training_flags(parser)
    group = parser.add_argument_group("augmentation and loss of fine-tuning")
    group.add_argument(
        "--randaugment",
        type=number(int, 0, 30),
        metavar="M",
        help="magnitude of RandAugment's two operations, each applied with a probability of one half; 27 is timm's rand-m9-mstd0.5-inc1; 0: none",
    )
    group.add_argument("--mixup", type=flags.non_negative, metavar="ALPHA", help="0: none")
    group.add_argument(
        "--cutmix", type=flags.non_negative, metavar="ALPHA", help="0: none; with both, one of the two per batch"
    )
    group.add_argument("--erasing", type=fraction, metavar="P", help="chance that a rectangle becomes noise")
    group.add_argument("--smoothing", type=number(float, 0, 0.999), help="label smoothing")
    group.add_argument(
        "--ema", type=number(float, 0, 0.99999), metavar="DECAY", help="evaluate an exponential average of the weights"
    )
    group.add_argument(
        "--eval-every", type=positive_int, default=1, metavar="EPOCHS", help="besides at the end; default: 1"
    )
    group.add_argument(
        "--adam-eps", type=number(float, 0, open_low=True), default=1e-8, help="AdamW's epsilon; default: 1e-8"
    )
    group.add_argument("--neighbours", type=positive_int, default=20, metavar="K", help="of knn; default: 20")
    group.add_argument(
        "--probe-lr",
        type=number(float, 0, open_low=True),
        default=0.1,
        help="of linear, at a batch of 256; default: 0.1",
    )
    check_combination(parser, argv)
    return flags.parse_with_recipe(
        parser,
        argv,
        RECIPES,
        choose=choose_recipe,
        kind="finetune",
        layers=[
            lambda args: {"labels": args.labels or 1.0} | oblong_size(args),
            lambda args: OF_MODEL.get(resolve_model(args), {}) if args.recipe in ("imagenet", "ablation") else {},
            lambda args: {} if uses_fc_norm(args) else {"fc_norm": False},
            lambda args: SCRATCH | SCRATCH_OF.get(args.recipe, {}) if args.init == "scratch" else {},
        ],
    )


def uses_fc_norm(args) -> bool:
    """Whether the classifier has the fc_norm of its recipe: in fine-tuning of a ViT, unless the run began before 2026-11-28."""
    before = resumed_config(args.resume, args.output).get("arguments", {})
    return (
        args.fc_norm
        and args.protocol == "finetune"
        and resolve_model(args).startswith("vit")
        and before.get("fc_norm", not before)
    )


def check_combination(parser, argv):
    """UserError for flags that have no say in what is asked for."""
    args, named = parser.parse_args(argv), flags.explicit_flags(parser, argv)
    does = "--eval" if args.eval else "--predict" if args.predict else None
    ignored = sorted(named - OF[does] if does else named & {"split"})
    if ignored:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise UserError(f"{words}: has no say in {does}; leave it out" if does else f"{words}: only with --eval")
    if args.resume and args.protocol != "finetune":
        raise UserError(f"--protocol {args.protocol} keeps no checkpoint: there is nothing to --resume")


def choose_recipe(args) -> str:
    if args.data is None:
        return "demo"
    model = resolve_model(args)
    if model in SMALL_MODELS or args.data in ("cifar10", "cifar100"):
        return "micro" if model in SMALL_MODELS else "cifar"
    return "mae" if model.startswith("vit") else "imagenet"


def resolve_model(args) -> str:
    """--model, else that of the run that is resumed, else the model whose weights the checkpoint has, else a default."""
    model = args.model or resumed_config(args.resume, args.output).get("arguments", {}).get("model")
    if model or not args.checkpoint:
        return model or ("swin_micro" if args.data is None else "swin_base")
    return weights.model_in(args.checkpoint)


def oblong_size(args) -> dict:
    """The checkpoint's image size where it is no square, which every recipe's is."""
    begins = (
        args.checkpoint and not args.resume and Path(args.checkpoint).exists()
    )  # a run that goes on has its own, and needs no file
    size = weights.open_weights(args.checkpoint)[2].get("arguments", {}).get("image_size") if begins else None
    return {} if size is None or isinstance(size, int) else {"image_size": tuple(size)}


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Pillow's affine transformation: (a, b, c, d, e, f) reads the pixel (x, y) at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def enhance(kind):
    """An operation that scales one property of an image by 1 + 0.9 times the signed level, at least 0.1."""
    return lambda image, level: kind(image).enhance(max(0.1, 1 + 0.9 * level))


def posterize(image, level):
    bits = 4 - int(4 * level)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


# The operations of timm's "increasing" RandAugment (Cubuk et al. 2020), each of an image and a level from 0 to 1; in the second table from -1 to 1.
UNSIGNED = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": lambda image, level: ImageOps.solarize(image, 256 - int(256 * level)),
    "SolarizeAdd": lambda image, level: image.point(
        [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)] * 3
    ),
}
SIGNED = {
    "Rotate": lambda image, level: image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=FILL),
    "ColorIncreasing": enhance(ImageEnhance.Color),
    "ContrastIncreasing": enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: affine(image, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level: affine(image, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda image, level: affine(image, 1, 0, 0.45 * level * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, level: affine(image, 1, 0, 0, 0, 1, 0.45 * level * image.height),
}


class RandAugment(nn.Module):
    """timm's rand-m9-mstd0.5-inc1 at magnitude 27: twice, one of fifteen operations with a chance of one half.

    magnitude: from 0 to 30. Each operation draws its own level from a normal distribution around magnitude / 30, with a standard deviation of 0.05.
    """

    def __init__(self, magnitude: int):
        super().__init__()
        self.magnitude, self.names = magnitude, [*UNSIGNED, *SIGNED]

    def forward(self, image: Image.Image) -> Image.Image:
        for _ in range(2):
            name, (skip, sign) = self.names[int(torch.randint(len(self.names), ()))], torch.rand(2).tolist()
            level = min(1.0, max(0.0, self.magnitude / 30 + 0.05 * torch.randn(()).item()))
            if skip < 0.5:
                image = (
                    UNSIGNED[name](image, level)
                    if name in UNSIGNED
                    else SIGNED[name](image, level if sign < 0.5 else -level)
                )
        return image


def augmentation(args, form: PixelFormat, kind: str = AUGMENTATION):
    """What a worker does to each crop (c, h, w), uint8 or float32; None if nothing.

    RandAugment for 8-bit colour; of other images only operations that move pixels, by up to RandAugment's angles and shares. kind: EARLIER_AUGMENTATION
    for a run that began with it: torchvision's operations, which change pixels by a fifth less on average.
    """
    if not args.randaugment:
        return None
    if not form.is_rgb8:
        part, more = (
            args.randaugment / 30,
            dict(interpolation=InterpolationMode.BILINEAR, fill=[255 * mean for mean in form.mean]),
        )
        shear = math.degrees(math.atan(0.3 * part))
        moves = [
            v2.RandomAffine(30 * part, **more),
            v2.RandomAffine(0, translate=(0.45 * part, 0.45 * part), **more),
            v2.RandomAffine(0, shear=(-shear, shear, -shear, shear), **more),
            v2.Identity(),
        ]
        operation = v2.RandomApply([v2.RandomChoice(moves)], 0.5)
        return v2.Compose([operation, operation])
    if kind == AUGMENTATION:
        return v2.Compose([v2.ToPILImage(), RandAugment(args.randaugment), v2.PILToTensor()])
    operation = v2.RandomApply(
        [v2.RandAugment(1, args.randaugment, interpolation=InterpolationMode.BILINEAR, fill=list(FILL))], 0.5
    )
    return v2.Compose([v2.ToPILImage(), operation, operation, v2.PILToTensor()])


def mixing_of_labels(args, classes: int):
    """mixup or CutMix of a batch, one of the two at random; None if neither."""
    kinds = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
        if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else None


# ---------------------------------------------------------------------------------------------------- set-up


def make_model(args, classes: int, distributed, resumed=None) -> tuple[Classifier, str]:
    """The classifier, with pre-trained weights if asked for, and a line that says what was loaded. resumed: a checkpoint that has its weights."""
    torch.manual_seed(args.seed)
    encoder = encoders.make(
        args.model,
        args.activation_checkpointing,
        image_size=args.image_size,
        window=args.window,
        drop_path=args.drop_path,
        channels=args.channels,
    )
    line = f"{args.model} from scratch, all weights at random"
    if resumed:
        line = f"{args.model}, weights from {resumed}"
    elif args.init != "scratch":
        line = f"{weights.load(args.checkpoint, encoder, geometric=args.recipe == 'ablation')}; the classifier is initialised at random"
    return Classifier(encoder, classes, args.fc_norm).to(distributed.device), line


def newest_pretraining() -> str:
    """The checkpoint of the newest pre-training run under runs/. UserError if there is none."""
    path = runs.newest_run("pretrain")
    if not path:
        raise UserError("no pre-training run under runs/: run train.py first, or give --checkpoint or --init scratch")
    return path


def setup(args, distributed):
    """Images, run folder, model; all checked before anything is written."""
    if args.init != "scratch" and not args.checkpoint:
        raise UserError("give --checkpoint, pre-trained weights to start from, or --init scratch")
    args = updated(args, model=resolve_model(args))
    train, held_out = load_images(select(DataConfig, vars(args)), distributed, labelled=True)
    args = updated(args, **train.form.requested)
    kind = args.protocol if args.init != "scratch" else f"{args.protocol}-scratch"
    run, resumed = runs.open_run(vars(args), distributed, args.recipe, kind)
    train, held_out = runs.restore_file_lists(train, held_out, resumed, args.data, distributed)
    if not (resumed and isinstance(train, FileImages)):  # the file list of a resumed run is the share already
        train = balanced_subset(train, args.labels, args.seed)
    model, line = make_model(args, len(train.classes), distributed, resumed)
    distributed.print(line)
    return args, train, held_out, run, resumed, model


# ---------------------------------------------------------------------------------------------------- protocols


def finetune(args, distributed) -> tuple[int, dict]:
    """Train the whole classifier; returns the exit status and the last accuracy."""
    args, train, held_out, run, resumed, model = setup(args, distributed)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    kind = run_config(resumed.parent).get("augmentation", EARLIER_AUGMENTATION) if resumed else AUGMENTATION
    crops = data.Crops(
        train,
        args.image_size,
        args.crop_scale,
        args.crop_ratio,
        seed=args.seed,
        augment=augmentation(args, train.form, kind),
    )
    loop = Loop(
        "finetune",
        vars(args),
        distributed,
        run,
        resumed,
        model,
        crops,
        held_out,
        ResumeRules(changes_results=frozenset(("randaugment",))),
        state={"ema": ema} if ema else None,
        labelled=True,
    )
    loop.config["augmentation"] = kind
    if resumed and (args.randaugment or args.erasing) and "augmentation" not in loop.old_config:
        loop.changed.append(f"RandAugment and erasing were those of an earlier commit, are {kind}")
    moves_only = bool(args.randaugment) and not train.form.is_rgb8
    loop.begin(
        loop.lines(f"recipe {args.recipe}, {args.model} at {format_size(args.image_size)} px")
        + ["RandAugment without operations on colour, which need three 8-bit channels: rotation, translation and shear"]
        * moves_only
    )
    mix, result = mixing_of_labels(args, len(train.classes)), {}

    def look():
        """The accuracy of an epoch's end, if it is due; else that of the last one."""
        if not loop.evaluation_due(args.eval_every):
            return result
        bad = {}
        accuracy = probes.evaluate(distributed, ema.module if ema else model, held_out, args.image_size, bad)
        loop.log_evaluation(bad, eval_top1=accuracy["top1"], eval_top5=accuracy["top5"])
        report(run, accuracy, train.classes)
        return accuracy

    result = look()
    for step in loop.steps():
        torch.manual_seed(rng.seed(args.seed, "drop path and mixup", step, distributed.rank))

        # forward, backward, update
        for batch in loop.micro_batches():
            images = data.prepare_batch(batch, distributed.device, args.image_size, loop.form.mean, loop.form.std)
            images = (
                data.random_erasing(images, batch["keys"], args.erasing, args.seed, step) if args.erasing else images
            )
            labels = batch["labels"].to(distributed.device, non_blocking=True)
            images, labels = mix(images, labels) if mix else (images, labels)
            loss = F.cross_entropy(loop.train_step.forward(images).float(), labels, label_smoothing=args.smoothing)
            loop.train_step.backward(loss, {"loss": loss})
        loop.train_step.update()
        if ema:
            ema.update_parameters(model)

        # log, save, evaluate
        loop.log()
        if loop.checkpoint():
            return runs.STOPPED, result
        result = look()
    return 0, result or probes.evaluate(distributed, ema.module if ema else model, held_out, args.image_size)


def frozen(args, distributed) -> tuple[int, dict]:
    """Linear probe or k-NN on the features of centre crops, which are kept in 16 bits on a GPU."""
    args, train, held_out, run, _, model = setup(args, distributed)
    config = {
        "kind": args.protocol,
        "arguments": vars(args),
        "classes": train.classes,
        "pixels": train.form.to_dict(),
        "versions": dist.versions(),
        "device": dist.device_name(distributed.device),
        **runs.provenance(sys.argv),
    }
    runs.create_folder(run, config, {}, is_new=True)
    model.forward = model.features
    bad, kept = ({}, {}), torch.float16 if distributed.device.type == "cuda" else torch.float32
    outputs = [
        probes.extract_features(distributed, model, images, args.image_size, which, kept)
        for images, which in zip((train, held_out), bad)
    ]
    run.report_bad([(train.name(index), reason) for index, reason in bad[0].items()], len(train), args.max_bad_share)
    report_unreadable_val(run, train, held_out, bad[1], args.max_bad_share)

    def accuracy():
        (x, i), (y, j) = (probes.joined(part) for part in outputs)
        labels, truth = torch.from_numpy(train.labels)[i], torch.from_numpy(held_out.labels)[j]
        classes = len(train.classes)
        for images, read, where in ((train, labels, "training"), (held_out, truth, "held-out")):
            probes.check_every_class(images, read.bincount(minlength=classes), where)
        y = y.to(distributed.device)
        if args.protocol == "knn":
            scores = probes.nearest_neighbours(x, labels, y, classes, args.neighbours)
        else:
            scores = probes.linear_probe(
                x, labels, y, classes, args.epochs, lr=args.probe_lr, seed=args.seed, most=args.max_steps
            )
        return probes.topk_accuracy(scores.cpu(), truth)

    result = distributed.run_on_main(accuracy)
    run.log(step=0, epoch=0, eval_top1=result["top1"], eval_top5=result["top5"])
    report(run, result, train.classes)
    return 0, result


def classifier_of(args, distributed) -> tuple[Classifier, list[str], PixelFormat]:
    """The network of a checkpoint of this program, its classes and format of pixels; `args` get its model and image size."""
    if not args.checkpoint:
        raise UserError(f"{'--eval' if args.eval else '--predict'} needs --checkpoint, a checkpoint of finetune.py")
    saved = check_kind(load_checkpoint(args.checkpoint), args.checkpoint, "finetune")
    settings = {name: saved["config"]["arguments"][name] for name in ("model", "image_size", "window")}
    args = updated(args, **settings)
    classes, form = (
        saved["config"]["classes"],
        replace(PixelFormat.of(saved["config"].get("pixels", {})), max_megapixels=args.max_megapixels),
    )
    encoder = encoders.make(args.model, image_size=args.image_size, window=args.window, channels=form.channels)
    model = Classifier(encoder, len(classes), saved["config"]["arguments"].get("fc_norm", False))
    model.load_state_dict(
        {key.removeprefix("module."): value for key, value in saved["ema"].items() if key != "n_averaged"}
        if "ema" in saved
        else saved["model"]
    )
    return args, model.to(distributed.device), classes, form


def evaluate_checkpoint(args, distributed) -> tuple[int, dict]:
    """Accuracy of a checkpoint of this program; its classes must be those of the folder, in the same order."""
    args, model, classes, form = classifier_of(args, distributed)
    held_out, line = open_labelled_part(args.data, args.split, args.image_size, form)
    distributed.print(line)
    if held_out.classes != classes:
        odd = next(((a, b) for a, b in zip(held_out.classes, classes) if a != b), None)
        raise UserError(
            f"{args.checkpoint} knows {len(classes)} classes, {args.data or 'the photographs'} has "
            f"{len(held_out.classes)}" + (f"; the first that differ: {odd[1]!r} and {odd[0]!r}" if odd else "")
        )
    bad = {}
    result = probes.evaluate(distributed, model, held_out, args.image_size, bad)
    runs.report_unreadable(
        distributed,
        [(held_out.name(index), reason) for index, reason in bad.items()],
        {},
        len(held_out),
        args.max_bad_share,
        "left out",
    )
    return 0, result


def of_every_image(
    args,
    distributed,
    model,
    form: PixelFormat,
    where: str,
    kind: str,
    write,
    measured: bool = True,
    classes: list[str] | None = None,
) -> int:
    """write(run folder, names, model(image) as (n, d)) of the readable images of a folder, whatever its form, on the first process."""
    images = all_images(where, form)
    if not measured:
        images.form, lines = distributed.run_on_main(lambda: measure_format(images, form))
        distributed.print_lines(lines)
    run, _ = runs.open_run(vars(args), distributed, kind, Path(where).resolve().name)
    runs.create_folder(
        run,
        {
            "kind": kind,
            "arguments": vars(args),
            "classes": classes,
            "pixels": images.form.to_dict(),
            "versions": dist.versions(),
            "device": dist.device_name(distributed.device),
            **runs.provenance(sys.argv),
        },
        {},
        is_new=True,
    )
    distributed.print(f"{len(images)} images in {where}; run folder: {run.folder}")
    bad = {}
    outputs = probes.extract_features(distributed, model, images, args.image_size, bad=bad)
    run.report_bad_held_out([(images.name(index), reason) for index, reason in bad.items()], len(images), max_share=1.0)

    def finish():
        values, indices = probes.joined(outputs)
        print(write(run.folder, [images.name(index) for index in indices.tolist()], values))

    distributed.run_on_main(finish)
    return 0


def predict(args, distributed) -> int:
    """predictions.csv: each file's class with its probability, and the next four."""
    args, model, classes, form = classifier_of(args, distributed)

    def write(folder, names, scores) -> str:
        shares, order = scores.softmax(1).topk(min(5, len(classes)), dim=1)
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(
            [
                "file",
                "class",
                "probability",
                *(word for k in range(2, shares.shape[1] + 1) for word in (f"class_{k}", f"probability_{k}")),
            ]
        )
        for name, row, chosen in zip(names, shares.tolist(), order.tolist()):
            writer.writerow([name, *(word for share, k in zip(row, chosen) for word in (classes[k], f"{share:.4f}"))])
        write_atomically(
            folder / "predictions.csv", lambda file: file.write(table.getvalue().encode(errors="surrogateescape"))
        )
        return f"wrote {folder / 'predictions.csv'}: {len(names)} images"

    return of_every_image(args, distributed, model, form, args.predict, "predict", write, classes=classes)


def features(args, distributed) -> int:
    """features.npy (n, d), float32, of centre crops, and names.txt, a line for each row."""
    if not args.data or (args.init != "scratch" and not args.checkpoint):
        raise UserError("--protocol features needs --data, a folder of images, and --checkpoint or --init scratch")
    form, measured = resolve_format(select(DataConfig, vars(args)))
    args = updated(args, model=resolve_model(args), channels=form.channels)
    model, line = make_model(args, 1, distributed)
    distributed.print(line)
    model.forward = model.features

    def write(folder, names, values) -> str:
        write_atomically(folder / "features.npy", lambda file: np.save(file, values.numpy()))
        write_atomically(
            folder / "names.txt", lambda file: file.write("\n".join([*names, ""]).encode(errors="surrogateescape"))
        )
        return f"wrote {folder / 'features.npy'}: {len(names)} images x {values.shape[1]}"

    return of_every_image(args, distributed, model, form, args.data, "features", write, measured)


def report(run, result: dict, classes: list[str]):
    """confusion.png and per_class.json."""
    confusion = result["confusion"]
    share = (confusion.diag() / confusion.sum(1).clamp(min=1)).tolist()
    table = {
        name: {"accuracy": round(100 * share[k], 2), "images": int(confusion[k].sum())}
        for k, name in enumerate(classes)
    }
    run.write("per_class.json", lambda file: file.write((json.dumps(table, indent=1) + "\n").encode()))
    run.write("confusion.png", lambda file: plots.save(plots.confusion_matrix(confusion, classes), file))


# ---------------------------------------------------------------------------------------------------- the run


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    if args.init == "scratch" and args.checkpoint:
        raise UserError("--init scratch takes no --checkpoint: leave one of them out")
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    if args.predict or args.protocol == "features" and not args.eval:
        return (predict if args.predict else features)(args, distributed)
    if args.data is None and args.init != "scratch" and not args.checkpoint and not args.eval:
        args = updated(args, checkpoint=newest_pretraining())
    if args.data is None and args.init is None and args.protocol == "finetune" and not args.eval:
        argv += ["--checkpoint", args.checkpoint]
        folder = [["--output", f"{args.output}/{init}"] if args.output else [] for init in ("scratch", "pretrained")]
        status, scratch = finetune(arguments([*argv, "--init", "scratch", *folder[0]]), distributed)
        if status:
            return status
        args = arguments([*argv, "--init", "pretrained", *folder[1]])
        status, result = finetune(args, distributed)
        if not status:
            distributed.print(
                f"the same network from scratch: top-1 {scratch['top1']:.2f}; pre-trained: top-1 {result['top1']:.2f}"
            )
    elif args.eval:
        status, result = evaluate_checkpoint(args, distributed)
    else:
        status, result = (finetune if args.protocol == "finetune" else frozen)(args, distributed)
    if not status:
        distributed.print(
            f"top-1 {result['top1']:.2f} top-5 {result['top5']:.2f} ({result['images']} images, "
            f"{args.checkpoint or 'from scratch'})"
        )
    return status


if __name__ == "__main__":
    dist.run_main(main)
