"""The command line that train.py and finetune.py share: number types, recipes, flags."""

import argparse
import math
import os
from pathlib import Path

from engine import VERSION
from engine.checkpoints import PROGRAMS
from engine.errors import UserError
from engine.files import run_config
from engine.runs import commit
from images.formats import percentiles


class Version(argparse.Action):
    """Print the version and the commit, and exit."""

    def __init__(self, option_strings, dest, **_):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and the commit")

    def __call__(self, parser, *_):
        print(f"{parser.prog} {VERSION}, commit {commit() or 'unknown'}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse without the usage dump: an error is one line. Every program has --version."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.add_argument("--version", action=Version)

    def error(self, message):
        raise UserError(message + " (--help lists the flags)")


def number(kind=float, low=-math.inf, high=math.inf, open_low=False):
    """An argparse type: a finite number of `kind` between low and high."""

    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        if not finite or not low <= value <= high or (open_low and value == low):
            bounds = [f"above {low}" if open_low else f"at least {low}"] if low > -math.inf else []
            bounds += [f"at most {high}"] if high < math.inf else []
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {' and '.join(bounds)}".rstrip())
        return value

    return parse


class ValueRange(argparse.Action):
    """auto, LOW HIGH, or p1,p99."""

    def __call__(self, parser, namespace, values, option_string=None):
        shares = percentiles(values[0]) if len(values) == 1 else None
        try:
            found = (
                values[0]
                if values == ["auto"] or shares and shares[0] < shares[1] <= 100
                else tuple(number()(value) for value in values)
            )
        except argparse.ArgumentTypeError:
            found = ()
        if not isinstance(found, str) and (len(found) != 2 or not found[0] < found[1]):
            parser.error(
                f"argument {option_string}: {' '.join(values)}: give auto, two numbers LOW HIGH, or percentiles such as p1,p99"
            )
        setattr(namespace, self.dest, found)


class Range(argparse.Action):
    """Two numbers, 0 < LOW <= HIGH."""

    def __call__(self, parser, namespace, values, option_string=None):
        if not 0 < values[0] <= values[1]:
            parser.error(
                f"argument {option_string}: {values[0]:g} {values[1]:g}: give two numbers with 0 < LOW <= HIGH"
            )
        setattr(namespace, self.dest, values)


positive_int, non_negative_int = number(int, 1, 2**31), number(int, 0, 2**31)
non_negative, fraction = number(float, 0), number(float, 0, 1)


def image_size(text) -> int | tuple[int, int]:
    """224, or 224x160, height x width; a square is one number, in whichever way it is given."""
    sides = [number(int, 8, 2**20)(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: give 224, or 224x160 (height x width)")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def epoch_count(text) -> int | float:
    """Epochs, not necessarily whole; whole ones as int, so that 200 and 200.0 are one setting."""
    value = number(float, 0, 2**31, open_low=True)(text)
    return int(value) if value.is_integer() else value


def settings_of_run(folder: str | None, kind: str) -> dict:
    """The arguments of the run that --resume names by its folder; empty for anything but a folder."""
    if folder not in (None, "auto") and not Path(folder).exists():
        raise UserError(f"--resume {folder}: no such run folder or checkpoint")
    if not folder or not os.path.isdir(folder):
        return {}
    config = run_config(Path(folder))
    if config.get("kind") != kind:
        raise UserError(
            f"--resume {folder}: no run of {PROGRAMS[kind]}"
            + (
                f", but one of {PROGRAMS.get(config['kind'], config['kind'])}"
                if config
                else ": it has no config.json of one, or a damaged one"
            )
        )
    return config["arguments"]


def parse_with_recipe(parser: Parser, argv, recipes: dict, choose, kind: str, layers=()) -> argparse.Namespace:
    """Arguments whose defaults come from a recipe: flags beat `layers` (functions of the arguments), these the recipe.

    choose(args) names the recipe where --recipe is not given. Defaults by recipe are appended to each flag's help.
    --resume FOLDER: they come from that run, which goes on from its newest checkpoint. kind: of the program's checkpoints.
    """
    for action in parser._actions:
        values = {name: recipe[action.dest] for name, recipe in recipes.items() if action.dest in recipe}
        if values and action.help:
            same = len(set(map(str, values.values()))) == 1 and len(values) == len(recipes)
            action.help += (
                f"; default: {next(iter(values.values()))}"
                if same
                else "; default: " + ", ".join(f"{name} {value}" for name, value in values.items())
            )
    args = parser.parse_args(argv)
    kept = {
        name: value
        for name, value in settings_of_run(args.resume, kind).items()
        if name in vars(args) and name not in ("resume", "output")
    }
    recipe = args.recipe or kept.get("recipe") or choose(args)
    parser.set_defaults(**recipes[recipe] | {"recipe": recipe} | kept)
    for layer in layers:
        parser.set_defaults(**layer(parser.parse_args(argv)) | kept)
    args = parser.parse_args(argv)
    if kept:
        if args.output and Path(args.output).resolve() != Path(args.resume).resolve():
            raise UserError(f"--resume {args.resume}: a run goes on in its own folder; leave --output out")
        args.output, args.resume = args.resume, "auto"
    return args


def explicit_flags(parser: Parser, argv) -> set[str]:
    """Names of the arguments that the command line itself has."""
    unset = object()
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), unset)))
    return {name for name, value in vars(parsed).items() if value is not unset}


def add_data_flags(parser: Parser):
    """Where images come from and how they are cropped."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="WHERE",
        help="a folder of images (train/ with val/ or test/, class folders, or "
        "any tree), cifar10, or cifar100; default: scikit-image's photographs",
    )
    group.add_argument(
        "--download", action="store_true", help="fetch cifar10 or cifar100 into ./data if it is not there"
    )
    group.add_argument(
        "--in-memory", action="store_true", help="decode a folder of small images of one size once, into memory"
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="keep the decoded images of a folder there, as one memory-mapped file; "
        "all machines of a run must see the same DIR",
    )
    group.add_argument(
        "--crop-scale",
        type=fraction,
        nargs=2,
        action=Range,
        metavar=("LOW", "HIGH"),
        help="area of a random crop, share of the image",
    )
    group.add_argument(
        "--crop-ratio",
        type=non_negative,
        nargs=2,
        action=Range,
        default=(3 / 4, 4 / 3),
        metavar=("LOW", "HIGH"),
        help="width over height of a random crop; default: 0.75 1.333",
    )
    add_pixel_flags(group)


def add_pixel_flags(group):
    """What becomes of images on their way in, whatever they are for."""
    group.add_argument(
        "--image-size", type=image_size, metavar="PX", help="of the input, in pixels: 224, or 224x160 (height x width)"
    )
    group.add_argument(
        "--channels",
        type=positive_int,
        metavar="N",
        help="of an image: 1 from colour by luma, 3 from grey by repetition, else as the files "
        "have them; default: 3, or the checkpoint's",
    )
    group.add_argument(
        "--value-range",
        nargs="+",
        action=ValueRange,
        metavar="RANGE",
        help="auto: 8-bit files as they are, others by what a sample of the "
        "training files holds; LOW HIGH; p1,p99: each image by its own percentiles; default: auto, or the checkpoint's",
    )
    group.add_argument(
        "--pages",
        choices=("channels", "images"),
        help="what the pages of a stack are; default: channels, or the checkpoint's",
    )
    group.add_argument(
        "--workers",
        type=non_negative_int,
        help="loader processes per process, in training and evaluation; default: 0 for "
        "training images in memory, else the cores at hand, at most 16",
    )
    group.add_argument(
        "--max-megapixels",
        type=number(float, 0, open_low=True),
        default=89.0,
        metavar="M",
        help="a larger image is taken for a bad file; default: 89",
    )
    group.add_argument(
        "--max-bad-share",
        type=fraction,
        default=0.05,
        help="stop when more than this share of the listed files proves unreadable; default: 0.05",
    )


class ShownChannels(argparse.Action):
    """One number, or three, from 1 on."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) not in (1, 3):
            parser.error(
                f"argument {option_string}: {len(values)} numbers: give one channel, or three for red, green and blue, from 1 on"
            )
        setattr(namespace, self.dest, values)


def add_picture_flag(parser):
    parser.add_argument(
        "--show-channels",
        type=positive_int,
        nargs="+",
        action=ShownChannels,
        metavar="K",
        help="of pictures, such as 3 2 1; default: the first "
        "three; all but 8-bit colour is stretched, each channel between its percentiles 1 and 99",
    )


def add_training_flags(parser: Parser):
    """Schedule, optimiser, machine and the run folder."""
    parser.set_defaults(effective_batch=None)  # a recipe's
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=epoch_count, help="passes over the training images, not necessarily whole")
    group.add_argument("--warmup-epochs", type=non_negative, help="epochs of linear warm-up")
    group.add_argument(
        "--max-steps", type=non_negative_int, metavar="N", help="stop after step N of the unchanged schedule"
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="source images per process and micro-step; "
        "default: the recipe's effective batch over processes and accumulation",
    )
    group.add_argument(
        "--accumulate", type=positive_int, default=1, metavar="N", help="micro-steps per optimiser step; default: 1"
    )
    group.add_argument("--base-lr", type=non_negative, help="learning rate at an effective batch of 512 source images")
    group.add_argument("--min-lr", type=non_negative, help="learning rate at the end, absolute")
    group.add_argument("--warmup-lr", type=non_negative, help="learning rate at the start, absolute")
    group.add_argument(
        "--weight-decay", type=non_negative, help="AdamW's; not on biases, norms, tokens and position tables"
    )
    group.add_argument(
        "--layer-decay",
        type=number(float, 0, 1, open_low=True),
        help="factor on the learning rate from each layer to the one below",
    )
    group.add_argument(
        "--betas",
        type=number(float, 0, 0.99999),
        nargs=2,
        default=(0.9, 0.999),
        help="AdamW's; 0.9 0.999 unless a recipe says otherwise",
    )
    group.add_argument("--clip", type=non_negative, help="largest norm of the whole gradient; 0: no clipping")
    group.add_argument(
        "--seed", type=non_negative_int, default=0, help="of weights, order, crops and masks; default: 0"
    )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one; default: auto"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 on a GPU that has it, else fp16 with loss scaling; fp32 on a CPU. fp32 on a GPU multiplies matrices in TF32",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the network, as one graph where there is one process"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="use torch's deterministic algorithms, slower on a GPU; an operation that has none ends the run",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="DIR", help="the run folder; default: a new one under runs/")
    group.add_argument(
        "--resume",
        metavar="FOLDER|PATH|auto",
        help="a run to go on with, by its folder: all settings are its own; or a checkpoint; "
        "auto: the newest whole one in --output, or a fresh start if there is none",
    )
    group.add_argument(
        "--track", choices=("tensorboard", "wandb"), help="tell a tracker, too, what log.jsonl and the pictures say"
    )
    group.add_argument("--log-every", type=positive_int, default=20, metavar="STEPS", help="default: 20")
    group.add_argument("--checkpoint-every-steps", type=positive_int, metavar="N", help="besides every epoch")
    group.add_argument(
        "--checkpoint-every", type=number(float, 0, open_low=True), metavar="MINUTES", help="besides every epoch"
    )
