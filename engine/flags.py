"""The command line that training programs share: types of values, flags, and defaults that come from a recipe."""

import argparse
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from engine import VERSION
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
    """Make a type for argparse: a finite number.

    Args:
        kind: int or float.
        low, high: bounds of the number.
        open_low: whether the number must be larger than `low`.
    """

    def parse(text):
        try:
            value = kind(text)
            is_valid = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
        except (ValueError, OverflowError):
            is_valid = False
        if not is_valid:
            bounds = []
            if low > -math.inf:
                bounds.append(f"above {low}" if open_low else f"at least {low}")
            if high < math.inf:
                bounds.append(f"at most {high}")
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {' and '.join(bounds)}".rstrip())
        return value

    return parse


class Checked(argparse.Action):
    """An argparse action that checks all values of a flag together. `convert` returns the value, or None if invalid."""

    def __call__(self, parser, namespace, values, option_string=None):
        value = self.convert(values)
        if value is None:
            parser.error(f"argument {option_string}: {' '.join(map(str, values))}: {self.advice}")
        setattr(namespace, self.dest, value)


class ValueRange(Checked):
    advice = "give auto, two numbers LOW HIGH, or percentiles such as p1,p99"

    def convert(self, values):
        percents = percentiles(values[0])
        if values == ["auto"] or len(values) == 1 and percents and percents[0] < percents[1] <= 100:
            return values[0]
        try:
            bounds = tuple(number()(value) for value in values)
        except argparse.ArgumentTypeError:
            return None
        return bounds if len(bounds) == 2 and bounds[0] < bounds[1] else None


class Range(Checked):
    advice = "give two numbers with 0 < LOW <= HIGH"

    def convert(self, values):
        return values if 0 < values[0] <= values[1] else None


class ShownChannels(Checked):
    advice = "give one channel, or three for red, green and blue, from 1 on"

    def convert(self, values):
        return values if len(values) in (1, 3) else None


positive_int, non_negative_int = number(int, 1, 2**31), number(int, 0, 2**31)
non_negative, fraction = number(float, 0), number(float, 0, 1)


def image_size(text) -> int | tuple[int, int]:
    """224, or 224x160 (height x width). A square is one number, in whichever way it is given."""
    sides = [number(int, 8, 2**20)(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size: give 224, or 224x160 (height x width)")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def epoch_count(text) -> int | float:
    """A number of epochs, not necessarily whole. 200 and 200.0 are the same setting, an int."""
    value = number(float, 0, 2**31, open_low=True)(text)
    return int(value) if value.is_integer() else value


def select(config_class, settings: dict):
    """A dataclass of those settings that it has fields for."""
    names = {field.name for field in fields(config_class)}
    return config_class(**{name: value for name, value in settings.items() if name in names})


def updated(args: argparse.Namespace, **values) -> argparse.Namespace:
    """A copy of the arguments with other values."""
    return argparse.Namespace(**vars(args) | values)


@dataclass(frozen=True)
class ResumeRules:
    """Which settings a resumed run may change, by the names of their flags.

    Args:
        may_change: settings of this program that do not change results, besides those that all programs share.
        changes_results: settings of this program that do, so that a change prints a warning.
    """

    may_change: frozenset = frozenset()
    changes_results: frozenset = frozenset()

    # fmt: off
    SHARED_MAY_CHANGE = frozenset((
        "workers", "log_every", "checkpoint_every_steps", "checkpoint_every", "batch_size", "accumulate", "resume",
        "output", "max_steps", "max_bad_share", "download", "cache", "precision", "data", "show_channels", "track",
    ))
    SHARED_CHANGES_RESULTS = frozenset(("base_lr", "warmup_epochs", "warmup_lr", "compile", "deterministic"))
    # fmt: on

    def ignores(self, name: str) -> bool:
        return name in self.may_change | self.SHARED_MAY_CHANGE

    def warns_of(self, name: str) -> bool:
        return name in self.changes_results | self.SHARED_CHANGES_RESULTS


def settings_of_run(resume: str | None, kind: str) -> dict:
    """The settings of the run that --resume names by its folder; {} for a checkpoint, "auto" and None.

    Args:
        resume: value of --resume.
        kind: of the program's checkpoints.
    """
    if resume not in (None, "auto") and not Path(resume).exists():
        raise UserError(f"--resume {resume}: no such run folder or checkpoint")
    if not resume or not os.path.isdir(resume):
        return {}
    config = run_config(Path(resume))
    if not config:
        raise UserError(f"--resume {resume}: not a run folder, because it has no valid config.json of a run")
    if config["kind"] != kind:
        raise UserError(f"--resume {resume}: a run of kind {config['kind']!r}, where one of kind {kind!r} is needed")
    return config["arguments"]


def parse_with_recipe(parser: Parser, argv, recipes: dict, choose, kind: str, layers=()) -> argparse.Namespace:
    """Parse a command line whose defaults come from a recipe, which is shown in each flag's help.

    With --resume FOLDER the defaults come from that run, which continues from its newest checkpoint.

    Args:
        parser: with all flags.
        argv: the command line; None for sys.argv.
        recipes: defaults by the names of flags, by the name of the recipe.
        choose: function of the arguments that names the recipe where --recipe is not given.
        kind: of the program's checkpoints.
        layers: functions of the arguments so far that return defaults which replace those of the recipe.
    """
    for action in parser._actions:
        defaults = {name: recipe[action.dest] for name, recipe in recipes.items() if action.dest in recipe}
        if defaults and action.help:
            if len(defaults) == len(recipes) and len(set(map(str, defaults.values()))) == 1:
                words = str(next(iter(defaults.values())))
            else:
                words = ", ".join(f"{name} {value}" for name, value in defaults.items())
            action.help += f"; default: {words}"
    args = parser.parse_args(argv)
    resumed = {
        name: value
        for name, value in settings_of_run(args.resume, kind).items()
        if name in vars(args) and name not in ("resume", "output")
    }
    recipe = args.recipe or resumed.get("recipe") or choose(args)
    parser.set_defaults(**recipes[recipe] | {"recipe": recipe} | resumed)
    for layer in layers:
        parser.set_defaults(**layer(parser.parse_args(argv)) | resumed)
    args = parser.parse_args(argv)
    if resumed:
        if args.output and Path(args.output).resolve() != Path(args.resume).resolve():
            raise UserError(f"--resume {args.resume}: a run continues in its own folder; leave --output out")
        args = updated(args, output=args.resume, resume="auto")
    return args


def explicit_flags(parser: Parser, argv) -> set[str]:
    """Names of the arguments that the command line itself gives."""
    unset = object()
    names = vars(parser.parse_args(argv))
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(parsed).items() if value is not unset}


def add_data_flags(parser: Parser):
    """Add flags for where images come from and how they are cropped."""
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
    """Add flags for how image files become tensors."""
    group.add_argument(
        "--image-size", type=image_size, metavar="PX", help="of the input, in pixels: 224, or 224x160 (height x width)"
    )
    group.add_argument(
        "--channels",
        type=positive_int,
        metavar="N",
        help="of an image: 1 is computed from colour by luma, 3 from grey by repetition; other numbers must be those "
        "of the files; default: 3, or the checkpoint's",
    )
    group.add_argument(
        "--value-range",
        nargs="+",
        action=ValueRange,
        metavar="RANGE",
        help="auto: 0 to 255 for 8-bit files, the range of a sample of training files for others; LOW HIGH; p1,p99: "
        "each image by its own percentiles; default: auto, or the checkpoint's",
    )
    group.add_argument(
        "--pages",
        choices=("channels", "images"),
        help="what the pages of a stack are; default: channels, or the checkpoint's",
    )
    group.add_argument(
        "--workers",
        type=non_negative_int,
        help="data loader workers per process, in training and evaluation; default: 0 for training images in memory, "
        "else one per core, at most 16",
    )
    group.add_argument(
        "--max-megapixels",
        type=number(float, 0, open_low=True),
        default=89.0,
        metavar="M",
        help="a larger image is treated as unreadable; default: 89",
    )
    group.add_argument(
        "--max-bad-share",
        type=fraction,
        default=0.05,
        help="stop if a larger share of the files is unreadable; default: 0.05",
    )


def add_picture_flag(parser):
    parser.add_argument(
        "--show-channels",
        type=positive_int,
        nargs="+",
        action=ShownChannels,
        metavar="K",
        help="channels that pictures show, such as 3 2 1; default: the first three. Other images than 8-bit colour are "
        "stretched, each channel between its percentiles 1 and 99",
    )


def add_training_flags(parser: Parser):
    """Add flags for schedule, optimiser, machine and run folder."""
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
        help="auto: bf16 on a GPU that has it, else fp16 with loss scaling; fp32 on a CPU. With fp32, a GPU multiplies "
        "matrices in TF32",
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
        help="continue a run. FOLDER: a run folder, with all its settings; PATH: a checkpoint; auto: the newest valid "
        "checkpoint in --output, or a start from scratch if there is none",
    )
    group.add_argument("--track", choices=("tensorboard", "wandb"), help="send log lines and pictures to a tracker too")
    group.add_argument("--log-every", type=positive_int, default=20, metavar="STEPS", help="default: 20")
    group.add_argument("--checkpoint-every-steps", type=positive_int, metavar="N", help="besides every epoch")
    group.add_argument(
        "--checkpoint-every", type=number(float, 0, open_low=True), metavar="MINUTES", help="besides every epoch"
    )
