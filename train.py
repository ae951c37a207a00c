"""Pre-training (Algorithm 1): superpose, mask, encode, decode, decompose.

    python train.py                                                 the demo, which takes minutes on a CPU
    torchrun --nproc_per_node=4 train.py --data /path/to/imagenet   the paper's run (section 4.1.1)
    python train.py --data cifar10 --download --method greenmim     another method, another data set

Where to change what: a flag is added in `arguments`, and reaches the model if an argument of `EESMM` has its name
(model.py lists what to change there). A recipe is an entry of RECIPES. A data source is a class like
`images.sources.FileImages` that `images.open_train_and_val` opens. The training step with autocast, DDP, gradient
clipping and AdamW is `TrainStep` in engine/optim.py; the learning rate schedule is `learning_rate` there, and its peak
is computed in engine/loop.py. Flags of the step, the loop and the data are fields of `StepConfig`, `LoopConfig` and
`DataConfig` in engine/.
See also `notebooks/07_loss_and_training.ipynb`.
"""

import argparse

import numpy as np
import torch
from einops import rearrange, repeat
from torch import nn

import encoders
import mixing
import show
import weights
from engine import data, dist, flags, plots, probes, report, rng, runs
from engine.checkpoints import resumed_config
from engine.dist import to_device
from engine.errors import UserError
from engine.flags import ResumeRules, non_negative, number, positive_int, select, updated
from engine.inputs import DataConfig, load_images
from engine.loop import Loop
from engine.optim import count_flops
from images.crops import format_size, normalize
from model import CHOICES, EESMM, METHODS, METHODS_TABLE, Masking, from_settings, patch_statistics

# paper, ablation: sections 4.1.1 and 4.3, as docs/paper.md reads them. mae: as published. cifar, demo: for small
# images and short runs on a CPU.
# fmt: off
RECIPES_TABLE = {
    #                  paper         ablation      cifar         demo          mae
    "model":           ("swin_base",  "swin_base",  "swin_micro", "swin_micro", "vit_base"),
    "image_size":      (224,          192,          32,           64,           224),
    "window":          (7,            6,            4,            4,            7),
    "epochs":          (800,          100,          200,          7,            800),
    "warmup_epochs":   (100,          10,           10,           1,            40),
    "base_lr":         (2e-4,         2e-4,         1e-3,         8e-3,         3e-4),   # for 512 source images
    "warmup_lr":       (1e-6,         1e-6,         1e-6,         1e-6,         0.0),
    "min_lr":          (1e-5,         1e-5,         1e-5,         1e-5,         0.0),
    "weight_decay":    (0.05,         0.05,         0.05,         0.05,         0.05),
    "betas":           ((0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.9, 0.95)),
    "layer_decay":     (0.9,          1.0,          1.0,          1.0,          1.0),
    "clip":            (5.0,          5.0,          5.0,          5.0,          0.0),
    "drop_path":       (0.0,          0.0,          0.0,          0.0,          0.0),
    "effective_batch": (256,          2048,         512,          64,           4096),   # source images
    "crop_scale":      ((0.2, 1.0),   (0.67, 1.0),  (0.2, 1.0),   (0.5, 1.0),   (0.2, 1.0)),
    "mask_ratio":      (0.75,         0.6,          0.75,         0.75,         0.75),
    "loss":            ("mse",        "l1",         "mse",        "mse",        "mse"),
    "loss_units":      ("hidden",     "hidden",     "hidden",     "all",        "hidden"),
    "decomposition":   ("subtract",   "subtract",   "subtract",   "split",      "subtract"),
    "decoder_width":   (512,          512,          192,          192,          512),
    "knn_every":       (0,            0,            0,            7,            0),
    "adam_eps":        (1e-6,         1e-6,         1e-6,         1e-6,         1e-8),
    # details of published code, which have no flag
    "norm_eps":        (None,         None,         None,         None,         1e-6),   # None: each LayerNorm's own
    "xavier":          (False,        False,        False,        False,        True),   # see model.init_xavier
    "both_orders":     (False,        False,        False,        False,        False),  # see model.MixMAE
}
# fmt: on
PAPER, ABLATION, CIFAR, DEMO, MAE = (dict(zip(RECIPES_TABLE, column)) for column in zip(*RECIPES_TABLE.values()))
RECIPES = {
    "paper": PAPER,
    "ablation": ABLATION,
    "cifar": CIFAR,
    # what was better for a small network in short runs, at the same cost; see results/README.md
    "small": CIFAR | dict(loss_units="all", decomposition="split"),
    "demo": DEMO,
    "mae": MAE,
    # as published: the same as MAE but for these
    "greenmim": MAE | dict(model="swin_base", base_lr=2e-4, effective_batch=2048),
    "mixmae": MAE
    | dict(model="mixmim_base", window=14, epochs=600, effective_batch=2048)
    | dict(mask_ratio=0.5, norm_eps=None, both_orders=True),
}
# Until 2026-11-28 these recipes differed from the published code. A run that began before then and is resumed keeps
# these values, because its checkpoint would not fit the model of the recipe as it is now.
EARLIER_RECIPES = {
    "mae": dict(adam_eps=1e-6, norm_eps=None, xavier=False),
    "greenmim": dict(adam_eps=1e-6, norm_eps=None, xavier=False),
    "mixmae": dict(adam_eps=1e-6, xavier=False, both_orders=False, model="swin_base", window=7, effective_batch=1024),
}
EVAL_MASK_RATIO, EVAL_MASKS, EVAL_BATCH = 0.75, 8, 64


def arguments(argv=None):
    parser = flags.Parser(
        description="Pre-train by superposing images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=methods_table(),
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: demo without --data, cifar for cifar10 and cifar100, paper for a folder, "
        "mae and mixmae for these methods",
    )
    parser.add_argument("--method", choices=METHODS, default="eesmm", help="see the table below; default: eesmm")
    flags.add_data_flags(parser)
    encoders.add_flags(parser)
    flags.add_training_flags(parser)
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="encoder weights to begin with, of any kind that weights.py reads; default: at random",
    )
    group = parser.add_argument_group("masks and superposition (Eq. 1-3)")
    group.add_argument(
        "--mask-ratio", type=number(float, 0, 1), help="fraction of masked units; 0 only with --loss-units all"
    )
    group.add_argument(
        "--masks",
        choices=CHOICES["masks"],
        default="shared",
        help="one mask for all sources, or one each; default: shared",
    )
    group.add_argument(
        "--unit",
        type=positive_int,
        metavar="PX",
        help="side of a masked square; default: what one final token covers, in a ViT its patch",
    )
    group.add_argument(
        "--sources", type=positive_int, metavar="N", help="source images in a mixed image; default: the method's"
    )
    group.add_argument(
        "--weights", type=non_negative, nargs="+", metavar="W", help="lambda_k, summing to 1; default: 1/n each"
    )
    group.add_argument(
        "--views",
        choices=("single", "four"),
        default="single",
        help="four: the form of Eq. 3, two views of each of two images; default: single",
    )
    group.add_argument(
        "--view-angle",
        type=number(float, 0, 180),
        default=30.0,
        metavar="DEGREES",
        help="largest rotation; default: 30",
    )
    group.add_argument(
        "--view-scale",
        type=flags.fraction,
        nargs=2,
        action=flags.Range,
        default=(0.7, 1.0),
        metavar=("LOW", "HIGH"),
        help="size of the scaled view; default: 0.7 1.0",
    )
    group.add_argument(
        "--view-crop",
        type=flags.fraction,
        nargs=2,
        action=flags.Range,
        default=(0.3, 1.0),
        metavar=("LOW", "HIGH"),
        help="area of the cropped view; default: 0.3 1.0",
    )
    group = parser.add_argument_group("decoder, decomposition and loss (Eq. 4-7)")
    group.add_argument(
        "--decomposition",
        choices=CHOICES["decomposition"],
        help="one predicted image per source, or the predicted mix minus the true others",
    )
    group.add_argument(
        "--assignment",
        choices=CHOICES["assignment"],
        default="permutation",
        help="of split's outputs to sources; default: permutation",
    )
    group.add_argument("--decoder-blocks", type=number(int, 0, 8), metavar="N", help="default: the method's")
    group.add_argument("--decoder-width", type=positive_int, metavar="C", help="a multiple of 32")
    group.add_argument("--loss", choices=CHOICES["loss"], help="error of a pixel")
    group.add_argument(
        "--loss-units", choices=CHOICES["loss_units"], help="loss on hidden (masked) units, as in Eq. 7, or on all"
    )
    group.add_argument(
        "--loss-weights",
        type=non_negative,
        nargs="+",
        metavar="W",
        help="of the mix and of each source; default: 1 each; 0 1 1 for mixmae",
    )
    group.add_argument("--adam-eps", type=number(float, 0, open_low=True), help="AdamW's epsilon")
    group.add_argument(
        "--eval-images",
        type=positive_int,
        default=5000,
        metavar="N",
        help="held-out images used for eval_error; default: 5000",
    )
    parser.add_argument(
        "--knn-every",
        type=flags.non_negative_int,
        metavar="EPOCHS",
        help="measure frozen features of at most 10,000 training and 2,000 held-out images, 100 and 50 a class: k-NN "
        "accuracy, if there are labels, and rank; 0: never",
    )
    flags.add_picture_flag(parser)
    return flags.parse_with_recipe(
        parser,
        argv,
        RECIPES,
        kind="pretrain",
        choose=choose_recipe,
        layers=[method_defaults, earlier_defaults],
    )


def method_defaults(args) -> dict:
    """What the method sets in place of the recipe: its settings that have a flag, and a ViT for MAE."""
    defaults = {name: value for name, value in METHODS[args.method].items() if name in vars(args)}
    if args.method == "mae":
        defaults["model"] = "vit_micro" if args.recipe in ("cifar", "small", "demo") else "vit_base"
    return defaults


def earlier_defaults(args) -> dict:
    """The recipe's earlier values if --resume names a run that began with them: its config has no xavier, or False."""
    earlier = resumed_config(args.resume, args.output).get("arguments", {})
    return EARLIER_RECIPES.get(args.recipe, {}) if earlier and not earlier.get("xavier") else {}


def choose_recipe(args) -> str:
    """The recipe of a command line without --recipe. EESMM, GreenMIM and SimMIM share one, to be comparable."""
    if args.data is None or args.data in ("cifar10", "cifar100"):
        return "demo" if args.data is None else "cifar"
    return args.method if args.method in ("mae", "mixmae") else "paper"


def methods_table() -> str:
    """METHODS_TABLE for --help."""
    rows = {"": METHODS} | METHODS_TABLE
    lines = [
        "A recipe sets the defaults, a method replaces some of them, and a flag overrides both. An empty cell",
        "means that the recipe or the flag decides. dense: masked tokens are encoded too. mixmae: a patch shows one",
        "image.",
    ]
    for name, values in rows.items():
        cells = "".join(f"{'' if value is None else str(value):10}" for value in values)
        lines.append(f"  {name.replace('_', ' '):16}{cells}".rstrip())
    return "\n".join(lines)


def make_views(args, images: torch.Tensor, keys) -> torch.Tensor:
    """Group images (b * n, c, h, w) into the sources of mixed images (b, n, c, h, w); four views with --views four
    (Eq. 3).

    Args:
        keys: (b * n, 2), epoch and index of each image. The random views are a function of seed and keys.
    """
    images = rearrange(images, "(b n) c h w -> b n c h w", n=args.sources)
    if args.views == "single":
        return images
    draws = rng.uniform(5, args.seed, "views", keys[:: args.sources, 0], keys[:: args.sources, 1])
    draws = to_device(torch.from_numpy(draws).float(), images.device, non_blocking=True)
    return mixing.four_views(images, draws, args.view_angle, args.view_scale, args.view_crop)


# Algorithm 1


def train(args, distributed, loop: Loop, model: EESMM) -> int:
    """The training loop of Algorithm 1. Returns the exit status."""
    monitor = None
    if args.knn_every:
        features = MeanPooled(model.encoder)
        monitor = probes.FeatureMonitor(
            distributed, features, loop.crops.images, loop.held_out, args.image_size, args.seed
        )
        if loop.done == 0 and monitor.labelled:
            loop.progress["knn_top1_at_start"] = monitor.measure()["knn_top1"]
    evaluate_if_due(args, distributed, loop, model, monitor)  # if the run was killed before its last evaluation
    # One mask for all images of a step, drawn ahead by a thread. All randomness is a function of seed and step, so
    # that a resumed run is bit-identical.
    masks = rng.Prefetch(lambda step: model.draw(rng.generator(args.seed, "mask", step)))
    redrawn, warned = loop.progress.setdefault("masks_redrawn", 0), False
    for step in loop.steps():  # sets the learning rate of the step, see engine/loop.py and engine.optim.learning_rate
        masking = masks.take(step)
        redrawn += masking.redrawn
        masking = to_device(masking, distributed.device, non_blocking=True)
        if args.drop_path:
            torch.manual_seed(rng.seed(args.seed, "drop path", step, distributed.rank))

        # Forward and backward. Autocast, DDP, torch.compile, the loss scaler and AdamW are in engine/optim.py,
        # TrainStep.
        for batch in loop.micro_batches():
            images = data.prepare_batch(batch, distributed.device, args.image_size, loop.form.mean, loop.form.std)
            out = loop.train_step.forward(make_views(args, images, batch["keys"]), masking)
            terms = {f"loss_{name}": term for name, term in out.losses.items()}
            loop.train_step.backward(out.loss, {"loss": out.loss} | terms)
        loop.train_step.update()  # gradient clipping and AdamW, also in engine/optim.py

        # log, save, evaluate
        loop.progress["masks_redrawn"] = redrawn
        loop.log(masks_redrawn=redrawn)
        drawn = loop.done + redrawn
        if not warned and drawn >= 100 and redrawn > drawn / 10:
            warned = True
            distributed.warn(
                f"{redrawn} of {drawn} masks were rejected because their plans do not have the usual shapes, so the "
                "run does not see masks as they are drawn; EESMM(redraw=False) uses every mask"
            )
        if loop.checkpoint():
            return runs.STOPPED
        evaluate_if_due(args, distributed, loop, model, monitor)
    return 0


def evaluate_if_due(args, distributed, loop: Loop, model: EESMM, monitor: probes.FeatureMonitor | None):
    """At the end of an epoch, log the validation errors and the quality of features, and draw pictures."""
    if not loop.evaluation_due():
        return
    unreadable = {}
    fields = evaluate(distributed, model, loop.held_out, args.eval_images, unreadable)
    if monitor and loop.evaluation_due(args.knn_every):
        fields |= {f"eval_{name}": value for name, value in monitor.measure().items()}
        if "knn_top1_at_start" in loop.progress:
            fields["eval_knn_top1_at_start"] = loop.progress["knn_top1_at_start"]
    loop.log_evaluation(unreadable, **fields)
    save_pictures(args, distributed, loop, model)


class MeanPooled(nn.Module):
    """The features that k-NN compares: the mean over final tokens, (b, c, h, w) to (b, width)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder(images).mean(1)


# validation: the test loop of Algorithm 1


def eval_masks(model: EESMM) -> list[Masking]:
    """The fixed masks of validation, which are the same for every method, run and process."""
    mask_ratio = EVAL_MASK_RATIO if model.mask_ratio else 0
    generators = [rng.generator("eval mask", k) for k in range(EVAL_MASKS)]
    return [model.make_masking(mixing.draw_masks(1, model.encoder.units, mask_ratio, g)[0]) for g in generators]


@torch.no_grad()
def evaluate(distributed, model: EESMM, images, max_images: int, unreadable: dict | None = None) -> dict:
    """Measure validation reconstruction errors: normalized mean squared errors on masked patches, over all processes.

    Algorithm 1 computes an accuracy here, which a reconstruction does not have. All methods are compared by the same
    measure: a squared error in standard deviations of the target patch, under the same eight masks of ratio 0.75. The
    i-th image always has mask i % 8, so that results do not depend on the number of processes or on batches.

    eval_error is measured on unmixed images: all sources of a mixed image are the same image. Predicting the mean of
    each patch scores about 1. The other three are measured on mixed images. eval_mix_error is the error of the
    predicted mixed image and eval_source_error that of the predicted sources. eval_mix_for_all_error is the score of
    a trivial separation, which takes the predicted mixed image for every source.

    SimMIM predicts raw pixels, whose errors are divided by the true standard deviations. Flat patches therefore
    weigh most, and its error is higher than that of methods that predict normalized pixels. A model that is trained
    without masks is evaluated without masks, on all patches. MixMAE has eval_error only, because its mixed image is
    not a weighted sum.

    Args:
        images: A source of validation images; `max_images` of them are used.
        unreadable: Gets the indices of unreadable images, with reasons.
    """
    model.eval()
    unreadable = {} if unreadable is None else unreadable
    masks = [to_device(masking, distributed.device) for masking in eval_masks(model)]
    # Shuffled, because neighbors in a folder are alike and easy to confuse when they are superposed. The order is
    # fixed.
    order = torch.randperm(len(images), generator=rng.generator("held out")).tolist()[:max_images]
    mask_of_image = {index: i % EVAL_MASKS for i, index in enumerate(order)}
    # Images of a batch share a mask: every eighth image of a block of the order.
    block = EVAL_MASKS * EVAL_BATCH
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    batches = [part[k::EVAL_MASKS] for part in blocks for k in range(EVAL_MASKS) if k < len(part)]
    batches = batches[distributed.rank :: distributed.world_size]

    # of the unmixed error and of the three errors on mixed images
    sums, counts = torch.zeros(2, 4, dtype=torch.float64)
    for indices, batch in data.iterate_center_crops(
        images, batches, model.encoder.image_size, unreadable, distributed.num_workers()
    ):
        masking = masks[mask_of_image[indices[0]]]
        batch = normalize(batch.to(distributed.device).float(), images.form.mean, images.form.std)
        unmixed = repeat(batch, "b c h w -> b n c h w", n=model.sources)
        sums[0] += reconstruction_errors(model, distributed, unmixed, masking)[0] * len(batch)
        counts[0] += len(batch)
        mixed = len(batch) // model.sources
        if model.superposes and model.sources > 1 and mixed:
            sources = rearrange(batch[: mixed * model.sources], "(b n) c h w -> b n c h w", n=model.sources)
            sums[1:] += reconstruction_errors(model, distributed, sources, masking) * mixed
            counts[1:] += mixed
    sums, counts = distributed.all_reduce(torch.stack([sums, counts]))
    if not counts[0]:
        index, reason = min(pair for pairs in distributed.all_gather(list(unreadable.items())) for pair in pairs)
        distributed.fail(f"none of the {len(order)} validation images can be read; {images.name(index)}: {reason}")
    model.train()
    names = ("eval_error", "eval_mix_error", "eval_source_error", "eval_mix_for_all_error")
    return {name: float(total / count) for name, total, count in zip(names, sums, counts) if count}


def reconstruction_errors(model, distributed, images, masking) -> torch.Tensor:
    """Normalized squared errors on masked units, whatever the training loss is.

    Returns:
        (3,): error of the mixed image, of the sources, and of the predicted mixed image taken for every source.
    """
    with distributed.autocast():
        out = model(images, masking)
    targets, mix, sources = model.targets(images), out.predicted_mix, out.predicted_sources
    evaluated = ~out.visible[0] if model.mask_ratio else out.visible[0]
    pairs = ((mix, model.combine(targets, masking)), (sources, targets), (mix[:, None], targets))
    if not model.normalise:  # raw pixels, such as SimMIM's, are divided by the standard deviation of their target
        pairs = [(pred / patch_statistics(true)[1], true / patch_statistics(true)[1]) for pred, true in pairs]
    return torch.stack([(pred - true)[..., evaluated, :].square().mean() for pred, true in pairs]).cpu().double()


# pictures, and the run


def save_pictures(args, distributed, loop: Loop, model: EESMM):
    """Write loss.png from the log, and reconstructions.png from three mixed validation images."""
    if not distributed.is_main:
        return
    # Images are taken evenly from the list, which is often sorted by class, and the sources of a row lie far apart
    # in it.
    count = 3 * args.sources
    indices = ((np.arange(count) + 0.5) / count * len(loop.held_out)).astype(int)
    indices = rearrange(indices, "(n b) -> (b n)", b=3)

    def reconstructions(images):
        images = normalize(images.to(distributed.device).float(), loop.form.mean, loop.form.std)
        images = make_views(args, images, np.zeros((len(images), 2), int))
        masking = to_device(model.draw(rng.generator("picture")), distributed.device)
        title = f"{args.method}, held-out images after step {loop.done}"
        return show.picture(model, images, masking, title, loop.form, args.show_channels)

    for _, images in data.iterate_center_crops(loop.held_out, [indices], args.image_size):
        images = images[: len(images) // args.sources * args.sources]
        if len(images):
            loop.picture("reconstructions", lambda: reconstructions(images), keep=True)
    log = loop.run.folder / "log.jsonl"
    loop.picture("loss", lambda: plots.loss_curve(report.subsample_rows(report.read_log(log)), show.METRIC_LABELS))


def gmacs(model: EESMM) -> float:
    """Multiply-accumulate operations of a forward pass in units of 10^9, for the sources of one mixed image.

    MixMAE with `both_orders` makes two mixed images of them in training.
    """
    images = torch.zeros(1, model.sources, model.encoder.channels, *model.encoder.image_size)
    images = images.to(model.head.weight.device)
    with torch.no_grad():
        return count_flops(lambda: model(images, model.draw(rng.generator(0)))) / 2e9


def start_up_lines(args, model: EESMM, loop: Loop) -> list[str]:
    """What a run prints at its start: derived quantities, as equations."""
    units_per_square = (model.unit // model.encoder.unit) ** 2
    visible = model.draw(rng.generator(0)).visible[0]
    squares, visible_squares = len(visible) // units_per_square, int(visible.sum()) // units_per_square
    parameters, encoder_parameters = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.encoder))
    macs = gmacs(model)
    batch = loop.batch_size
    mixed = batch // args.sources
    views = ", each in two views" if args.views == "four" else ""
    orders = f", each pair in both orders: {2 * mixed}" if model.both_orders else ""
    first, *rest = loop.lines(f"recipe {args.recipe}, {args.model} at {format_size(args.image_size)} px")
    return [
        f"method {args.method}, {first}",
        *rest,
        f"mixed images: {batch} source images / {args.sources} = {mixed} a step{views}{orders}",
        f"visible mask units: floor((1 - {args.mask_ratio:g}) x {squares} + 0.5) = {visible_squares} of {squares}, "
        f"{model.unit} px each",
        f"parameters: encoder {encoder_parameters:.2f} M + rest {parameters - encoder_parameters:.2f} M",
        f"forward pass: {macs:.3f} GMACs / {args.sources} sources = {macs / args.sources:.3f} per source image",
    ]


def setup(args, distributed) -> tuple[argparse.Namespace, Loop, EESMM]:
    """Open data, model and loop. All of them are checked before anything is written."""
    train_images, held_out = load_images(select(DataConfig, vars(args)), distributed)
    args = updated(args, **train_images.form.requested)
    if max(args.show_channels or [1]) > args.channels:
        raise UserError(f"--show-channels {' '.join(map(str, args.show_channels))}: the images have {args.channels}")
    run, checkpoint = runs.open_run(vars(args), distributed, args.recipe, args.method)
    train_images, held_out = runs.restore_file_lists(train_images, held_out, checkpoint, args.data, distributed)
    torch.manual_seed(args.seed)
    model = from_settings(vars(args))
    if args.init and not checkpoint:
        distributed.print(f"{weights.load(args.init, model.encoder)}; the decoder is initialised at random")
    model = model.to(distributed.device)
    crops = data.Crops(train_images, args.image_size, args.crop_scale, args.crop_ratio, seed=args.seed)
    rules = ResumeRules(may_change=frozenset(("knn_every",)))
    group = args.sources
    loop = Loop("pretrain", vars(args), distributed, run, checkpoint, model, crops, held_out, rules, group)
    return args, loop, model


def result_lines(args, model: EESMM, evaluation: dict) -> list[str]:
    """The last validation results in words, next to trivial predictors. evaluation: a log line, or {}."""
    measures = {name: value for name, value in evaluation.items() if value is not None}
    lines = []
    if "eval_error" in measures:
        patches = "masked patches" if args.mask_ratio else "all patches"
        mean = ", where predicting the mean of each patch gives about 1" if model.normalise else ""
        lines.append(
            f"validation reconstruction error, a normalised mean squared error on {patches}{mean}: "
            f"{measures['eval_error']:.4f}"
        )
    if "eval_mix_error" in measures:
        lines.append(
            f"on mixed images: {measures['eval_mix_error']:.4f} for the mixed image, "
            f"{measures['eval_source_error']:.4f} for its source images, where taking the predicted mixed image for "
            f"each of them gives {measures['eval_mix_for_all_error']:.4f}"
        )
    if "eval_feature_rank" in measures:
        knn = f"k-NN top-1 {measures['eval_knn_top1']:.2f}" if "eval_knn_top1" in measures else ""
        if "eval_knn_top1_at_start" in measures:
            knn += f" (the network at the start: {measures['eval_knn_top1_at_start']:.2f})"
        rank = f"rank {measures['eval_feature_rank']:.1f} of {model.encoder.width}"
        lines.append("frozen features: " + (f"{knn}, {rank}" if knn else rank))
    return lines


def main(argv=None) -> int:
    args = arguments(argv)
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    args, loop, model = setup(args, distributed)
    loop.begin(start_up_lines(args, model, loop))
    status = train(args, distributed, loop, model)
    checkpoint = loop.run.folder / "last.pt"
    if status == 0 and distributed.is_main and checkpoint.exists():
        source = f" --data {args.data}" if args.data else ""
        results = result_lines(args, model, loop.run.evaluation)
        print(*results, f"pictures: {loop.run.folder}", sep="\n")
        print(f"next: python finetune.py{source} --checkpoint {checkpoint}")
    return status


if __name__ == "__main__":
    dist.run_main(main)
