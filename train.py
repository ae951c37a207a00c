"""Pre-training (Algorithm 1): superpose, mask, encode, decode, decompose.

    python train.py                                                   the demo: photographs of scikit-image, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --data /path/to/imagenet     the paper's run (section 4.1.1)
    python train.py --data cifar10 --download --method greenmim       another method, another data set

The loop, step by step: `notebooks/07_loss_and_training.ipynb`.
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
from engine.flags import non_negative, number, positive_int
from engine.loop import Loop, load_images
from engine.optim import count_flops
from images.crops import normalize, to_2tuple
from model import CHOICES, EESMM, METHODS, METHODS_TABLE, Masking, from_settings, patch_statistics

RECIPE_NAMES = ("paper", "ablation", "cifar", "small", "demo", "mae", "greenmim", "mixmae")
# fmt: off
RECIPES_TABLE = {  # paper, ablation: sections 4.1.1 and 4.3, as docs/paper.md reads them; cifar, small, demo: ours; mae, greenmim, mixmae: as published.
    # small is cifar with what is ahead in short runs of a small network, at the same cost: results/README.md
    #                  paper         ablation      cifar         small         demo          mae           greenmim      mixmae
    "model":           ("swin_base",  "swin_base",  "swin_micro", "swin_micro", "swin_micro", "vit_base",   "swin_base",  "mixmim_base"),
    "image_size":      (224,          192,          32,           32,           64,           224,          224,          224),
    "window":          (7,            6,            4,            4,            4,            7,            7,            14),
    "epochs":          (800,          100,          200,          200,          7,            800,          800,          600),
    "warmup_epochs":   (100,          10,           10,           10,           1,            40,           40,           40),
    "base_lr":         (2e-4,         2e-4,         1e-3,         1e-3,         8e-3,         3e-4,         2e-4,         3e-4),
    "warmup_lr":       (1e-6,         1e-6,         1e-6,         1e-6,         1e-6,         0.0,          0.0,          0.0),
    "min_lr":          (1e-5,         1e-5,         1e-5,         1e-5,         1e-5,         0.0,          0.0,          0.0),
    "weight_decay":    (0.05,         0.05,         0.05,         0.05,         0.05,         0.05,         0.05,         0.05),
    "betas":           ((0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.9, 0.95),  (0.9, 0.95),  (0.9, 0.95)),
    "layer_decay":     (0.9,          1.0,          1.0,          1.0,          1.0,          1.0,          1.0,          1.0),
    "clip":            (5.0,          5.0,          5.0,          5.0,          5.0,          0.0,          0.0,          0.0),
    "drop_path":       (0.0,          0.0,          0.0,          0.0,          0.0,          0.0,          0.0,          0.0),
    "effective_batch": (256,          2048,         512,          512,          64,           4096,         2048,         2048),
    "crop_scale":      ((0.2, 1.0),   (0.67, 1.0),  (0.2, 1.0),   (0.2, 1.0),   (0.5, 1.0),   (0.2, 1.0),   (0.2, 1.0),   (0.2, 1.0)),
    "mask_ratio":      (0.75,         0.6,          0.75,         0.75,         0.75,         0.75,         0.75,         0.5),
    "loss":            ("mse",        "l1",         "mse",        "mse",        "mse",        "mse",        "mse",        "mse"),
    "loss_units":      ("hidden",     "hidden",     "hidden",     "all",        "all",        "hidden",     "hidden",     "hidden"),
    "decomposition":   ("subtract",   "subtract",   "subtract",   "split",      "split",      "subtract",   "subtract",   "subtract"),
    "decoder_width":   (512,          512,          192,          192,          192,          512,          512,          512),
    "knn_every":       (0,            0,            0,            0,            7,            0,            0,            0),
    "adam_eps":        (1e-6,         1e-6,         1e-6,         1e-6,         1e-6,         1e-8,         1e-8,         1e-8),
    # details of published code, which have no flag
    "norm_eps":        (None,         None,         None,         None,         None,         1e-6,         1e-6,         None),  # of every LayerNorm; None: each module's own
    "xavier":          (False,        False,        False,        False,        False,        True,         True,         True),  # see model.init_xavier
    "both_orders":     (False,        False,        False,        False,        False,        False,        False,        True),  # see model.MixMAE
}
# fmt: on
RECIPES = {recipe: {name: values[k] for name, values in RECIPES_TABLE.items()} for k, recipe in enumerate(RECIPE_NAMES)}
EARLIER = {  # what these recipes were for runs that began before 2026-11-28, which continue as they began
    "mae": dict(adam_eps=1e-6, norm_eps=None, xavier=False),
    "greenmim": dict(adam_eps=1e-6, norm_eps=None, xavier=False),
    "mixmae": dict(adam_eps=1e-6, xavier=False, both_orders=False, model="swin_base", window=7, effective_batch=1024),
}
METHOD_FLAGS = {
    method: {
        name: value for name, value in settings.items() if name not in ("dense", "normalise")
    }  # those have no flag
    for method, settings in METHODS.items()
}
EVAL_RATIO, EVAL_MASKS = 0.75, 8


def arguments(argv=None):
    parser = flags.Parser(
        description="Pre-train by superposing images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=methods_table(),
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: demo without --data, cifar for cifar10 and cifar100, paper for a folder, mae and mixmae for these methods",
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
        "--mask-ratio", type=number(float, 0, 1), help="share of units that is hidden; 0 only with --loss-units all"
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
    group.add_argument("--sources", type=positive_int, metavar="N", help="images in a composite; default: the method's")
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
        "--loss-units", choices=CHOICES["loss_units"], help="units whose error counts; Eq. 7: hidden ones"
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
        help="look at frozen features of at most 10,000 training and 2,000 held-out "
        "images, 100 and 50 a class: their k-NN accuracy, if there are labels, and their rank; 0: never",
    )
    flags.add_picture_flag(parser)
    return flags.parse_with_recipe(
        parser,
        argv,
        RECIPES,
        kind="pretrain",
        choose=choose_recipe,
        layers=[
            lambda args: (
                METHOD_FLAGS[args.method]
                | (
                    {"model": "vit_micro" if args.recipe in ("cifar", "small", "demo") else "vit_base"}
                    if args.method == "mae"
                    else {}
                )
            ),
            lambda args: EARLIER.get(args.recipe, {}) if began_earlier(args) else {},
        ],
    )


def began_earlier(args) -> bool:
    """Whether the run that --resume names began before its recipe became the published one."""
    before = resumed_config(args).get("arguments", {})
    return bool(before) and not before.get("xavier")


def choose_recipe(args) -> str:
    """The recipe where none is named."""
    if args.data is None or args.data in ("cifar10", "cifar100"):
        return "demo" if args.data is None else "cifar"
    return args.method if args.method in ("mae", "mixmae") else "paper"


def methods_table() -> str:
    """METHODS as a table."""
    rows = [["", *METHODS]] + [
        [
            name.replace("_", " "),
            *("" if method.get(name) is None else str(method[name]) for method in METHODS.values()),
        ]
        for name in METHODS_TABLE
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(
        [
            "A recipe sets the defaults, a method replaces some of them, any flag overrides both. Methods (empty: the recipe's or the",
            "flag's; dense: all tokens are encoded, hidden ones from a mask token; mixmae: each patch shows one of two images):",
            *lines,
        ]
    )


def make_views(args, images: torch.Tensor, keys) -> torch.Tensor:
    """Batches (b * n, c, h, w) as composites (b, n, c, h, w), through the four views of Eq. 3 if asked for."""
    images = rearrange(images, "(b n) c h w -> b n c h w", n=args.sources)
    if args.views == "single":
        return images
    draws = rng.uniform(5, args.seed, "views", keys[:: args.sources, 0], keys[:: args.sources, 1])
    draws = to_device(torch.from_numpy(draws).float(), images.device, non_blocking=True)
    return mixing.four_views(images, draws, args.view_angle, args.view_scale, args.view_crop)


# Algorithm 1 ------------------------------------------------------------------------------------------------------------


def train(args, distributed, loop: Loop, model: EESMM) -> int:
    """The loop of Algorithm 1; returns the exit status."""
    device, trainer, redrawn, warned = (
        distributed.device,
        loop.train_step,
        loop.progress.setdefault("masks_redrawn", 0),
        False,
    )
    watch = (
        probes.FeatureMonitor(
            distributed, MeanPooled(model.encoder), loop.crops.images, loop.held_out, args.image_size, args.seed
        )
        if args.knn_every
        else None
    )
    if watch and loop.done == 0 and watch.labelled:
        loop.progress["knn_top1_at_start"] = watch.look()["knn_top1"]
    evaluate_if_due(args, distributed, loop, model, watch)
    # one mask for all images of the step; like everything random a function of seed and step
    masks = rng.Prefetch(lambda step: model.draw(rng.generator(args.seed, "mask", step)))
    for step in loop.steps():
        masking = masks.take(step)
        redrawn += masking.redrawn
        masking = to_device(masking, device, non_blocking=True)
        if args.drop_path:
            torch.manual_seed(rng.seed(args.seed, "drop path", step, distributed.rank))

        # forward, backward, update
        for batch in loop.micro_batches():
            images = make_views(
                args, data.prepare_batch(batch, device, args.image_size, loop.form.mean, loop.form.std), batch["keys"]
            )
            out = trainer.forward(images, masking)
            trainer.backward(
                out.loss, {"loss": out.loss, **{f"loss_{name}": term for name, term in out.losses.items()}}
            )
        trainer.update()

        # log, save, evaluate
        loop.progress["masks_redrawn"] = redrawn
        loop.log(masks_redrawn=redrawn)
        warned = warned or warn_of_redrawn_masks(distributed, redrawn, loop.done)
        if loop.checkpoint():
            return runs.STOPPED
        evaluate_if_due(args, distributed, loop, model, watch)
    return 0


def evaluate_if_due(args, distributed, loop: Loop, model: EESMM, watch: probes.FeatureMonitor | None):
    """The held-out error, the features and the pictures of an epoch's end, if they are due."""
    if loop.evaluation_due():
        bad, features = {}, {}
        errors = evaluate(args, distributed, model, loop.held_out, bad)
        if watch and loop.evaluation_due(args.knn_every):
            features = watch.look() | {
                name: value for name, value in loop.progress.items() if name == "knn_top1_at_start"
            }
        loop.log_evaluation(bad, **errors, **{f"eval_{name}": value for name, value in features.items()})
        pictures(args, distributed, loop, model)


class MeanPooled(nn.Module):
    """What k-NN compares: the mean of an encoder's tokens, (b, c, h, w) to (b, width)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder(images).mean(1)


def warn_of_redrawn_masks(distributed, redrawn: int, used: int) -> bool:
    """Whether more than a tenth of a run's masks, and of a hundred at least, did not fit; that is said."""
    drawn = used + redrawn
    many = drawn >= 100 and redrawn > drawn / 10
    if many:
        distributed.warn(
            f"{redrawn} of {drawn} masks were passed over because their plans do not fit the usual shapes, so the run does not "
            "see masks as they are drawn; EESMM(redraw=False) uses every mask"
        )
    return many


# the held-out error: Algorithm 1's test loop --------------------------------------------------------------------------


def eval_masks(model: EESMM) -> list[Masking]:
    """The fixed masks of the held-out error: the same for every method, run and process."""
    units, ratio = model.encoder.units, EVAL_RATIO if model.mask_ratio else 0
    return [
        model.make_masking(mixing.draw_masks(1, units, ratio, rng.generator("eval mask", k))[0]) for k in range(EVAL_MASKS)
    ]


@torch.no_grad()
def evaluate(args, distributed, model: EESMM, images, bad: dict | None = None, chunk: int = 64) -> dict:
    """The held-out error: one measure, so that runs can be compared. Algorithm 1 computes an accuracy of reconstructions, which
    is none. Here: normalised squared error on hidden units at ratio 0.75, (a) unmixed and (b) mixed, over all processes.

    (a) eval_error: every source of a composite is the same image, so the mix is that image. (b) eval_mix_error,
    eval_source_error: images are superposed; eval_mix_for_all_error is that of taking the predicted mix for every
    source. The i-th image is always hidden by mask i % 8, so results do not depend on processes or batches. simmim predicts
    raw pixels, which the true means and contrasts put on that scale: flat units weigh most in its error, and it is above
    that of methods that predict normalised units. A model that is trained without a mask is tested without one, on all units; a
    partition, whose visible units are of two images, has no (b).
    """
    model.eval()
    count = min(args.eval_images, len(images))
    total, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    masks = [to_device(masking, distributed.device) for masking in eval_masks(model)]
    chunks = [
        range(start + mask, min(count, start + EVAL_MASKS * chunk), EVAL_MASKS)
        for start in range(0, count, EVAL_MASKS * chunk)
        for mask in range(EVAL_MASKS)
    ]
    # shuffled once and for all: neighbours in a folder are alike, and superposing them would be no test
    order = torch.randperm(len(images), generator=rng.generator("held out")).tolist()
    place = {index: k for k, index in enumerate(order[:count])}
    chunks = [[order[k] for k in c] for c in chunks if len(c)]
    bad = {} if bad is None else bad
    for indices, batch in data.iterate_center_crops(
        images, chunks[distributed.rank :: distributed.world_size], args.image_size, bad, distributed.num_workers()
    ):
        masking = masks[place[indices[0]] % EVAL_MASKS]
        batch = normalize(batch.to(distributed.device).float(), images.form.mean, images.form.std)
        same = repeat(batch, "b c h w -> b n c h w", n=model.sources)
        total[0] += held_out_errors(model, distributed, same, masking)[0] * len(batch)
        counts[0] += len(batch)
        composites = len(batch) // model.sources
        if model.superposes and model.sources > 1 and composites:
            mixed = rearrange(batch[: composites * model.sources], "(b n) c h w -> b n c h w", n=model.sources)
            total[1:] += held_out_errors(model, distributed, mixed, masking) * composites
            counts[1] += composites
    total, counts = distributed.all_reduce(total), distributed.all_reduce(counts)
    if not counts[0]:
        index, reason = min(pair for part in distributed.all_gather(sorted(bad.items())) for pair in part)
        distributed.fail(f"none of the {count} held-out images can be read; {images.name(index)}: {reason}")
    model.train()
    means = [total[0] / counts[0]] + [x / counts[1] for x in total[1:]]
    names = ("eval_error", "eval_mix_error", "eval_source_error", "eval_mix_for_all_error")
    return {name: float(value) for name, value in zip(names, means) if counts[1] or name == "eval_error"}


def held_out_errors(model, distributed, images, masking) -> torch.Tensor:
    """(mix, sources, mix taken for every source): normalised squared errors on hidden units, whatever was trained for."""
    with distributed.autocast():
        out = model(images, masking)
    targets, mix, sources = model.targets(images), out.predicted_mix, out.predicted_sources
    hidden = ~out.visible[0] if model.mask_ratio else out.visible[0]
    pairs = ((mix, model.combine(targets, masking)), (sources, targets), (mix[:, None], targets))
    if not model.normalise:  # raw pixels, such as SimMIM's: in standard deviations of what each is compared with
        pairs = [[value / patch_statistics(target)[1] for value in (predicted, target)] for predicted, target in pairs]
    return torch.stack([(a - b)[..., hidden, :].square().mean() for a, b in pairs]).cpu().double()


# pictures, and the run ------------------------------------------------------------------------------------------------


def pictures(args, distributed, loop: Loop, model: EESMM):
    """loss.png and reconstructions.png, from the log and from three held-out composites."""
    if not distributed.is_main:
        return
    # spread over the list, which is often sorted by class, and so dealt that the sources of a row lie far apart
    count = 3 * args.sources
    indices = rearrange(((np.arange(count) + 0.5) / count * len(loop.held_out)).astype(int), "(n b) -> (b n)", b=3)

    def reconstructions(images):
        images = normalize(images.to(distributed.device).float(), loop.form.mean, loop.form.std)
        images = make_views(args, images, np.zeros((len(images), 2), int))
        masking = to_device(model.draw(rng.generator("picture")), distributed.device)
        return show.picture(
            model,
            images,
            masking,
            f"{args.method}, held-out images after step {loop.done}",
            loop.form,
            args.show_channels,
        )

    for _, images in data.iterate_center_crops(loop.held_out, [indices], args.image_size):
        images = images[: len(images) // args.sources * args.sources]
        if len(images):
            number, of = -(-loop.done // loop.per_epoch), -(-loop.total // loop.per_epoch)
            loop.run.picture("reconstructions", lambda: reconstructions(images), loop.done, number, of)
    loop.run.picture(
        "loss",
        lambda: plots.loss_curve(report.subsample_rows(report.read_log(loop.run.folder / "log.jsonl"))),
        loop.done,
    )


def gmacs(model: EESMM, image_size, device) -> float:
    """Multiply-accumulates of a forward pass of one composite, in units of 10^9, counted while it runs."""
    images = torch.zeros(1, model.sources, model.encoder.channels, *to_2tuple(image_size), device=device)
    with torch.no_grad():
        return count_flops(lambda: model(images, model.draw(rng.generator(0)))) / 2e9


def start_up_lines(args, distributed, model: EESMM, loop: Loop) -> list[str]:
    """Derived quantities as equations."""
    visible = model.draw(rng.generator(0)).visible[0]
    total, of_encoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.encoder))
    work = gmacs(model, args.image_size, distributed.device)
    first, *rest = loop.lines()
    return [
        f"method {args.method}, {first}",
        *rest,
        f"mixed images: {loop.batches.batch} source images / {args.sources} = {loop.batches.batch // args.sources} a step"
        + (", each in two views" if args.views == "four" else "")
        + (f", each pair in both orders: {2 * (loop.batches.batch // args.sources)}" if model.both_orders else ""),
        f"visible mask units: floor((1 - {args.mask_ratio:g}) x {len(visible)} + 0.5) = {int(visible.sum())} of {len(visible)}, "
        f"{model.encoder.unit} px each" + (f", masked in squares of {args.unit} px" if args.unit else ""),
        f"parameters: encoder {of_encoder:.2f} M + rest {total - of_encoder:.2f} M",
        f"forward pass: {work:.3f} GMACs / {args.sources} sources = {work / args.sources:.3f} per source image",
    ]


def setup(args, distributed) -> tuple[Loop, EESMM]:
    """Data, model and loop, all checked before anything is written."""
    train_images, held_out = load_images(args, distributed)
    if max(args.show_channels or [1]) > args.channels:
        raise UserError(f"--show-channels {' '.join(map(str, args.show_channels))}: the images have {args.channels}")
    run, checkpoint = runs.open_run(args, distributed, args.recipe, args.method)
    train_images = runs.restore_file_list(train_images, checkpoint, "files.txt", args.data, distributed)
    held_out = runs.restore_file_list(held_out, checkpoint, "held_out.txt", args.data, distributed)
    torch.manual_seed(args.seed)
    model = from_settings(vars(args))
    if args.init and not checkpoint:
        distributed.print(f"{weights.load(args.init, model.encoder)}; the decoder is initialised at random")
    model = model.to(distributed.device)
    crops = data.Crops(train_images, args.image_size, args.crop_scale, args.crop_ratio, seed=args.seed)
    return Loop("pretrain", args, distributed, run, checkpoint, model, crops, held_out, args.sources), model


def error_lines(args, model: EESMM, measures: dict) -> list[str]:
    """The last validation errors in words, with what they compare with. measures: of `evaluate`, without "eval_"; empty before the first evaluation."""
    patches = "masked patches" if args.mask_ratio else "all patches"
    mean = ", where predicting the mean of each patch gives about 1" if model.normalise else ""
    lines = []
    if "error" in measures:
        lines.append(
            f"validation reconstruction error, a normalised mean squared error on {patches}{mean}: {measures['error']:.4f}"
        )
    if "mix_error" in measures:
        lines.append(
            f"on mixed images: {measures['mix_error']:.4f} for the mixed image, {measures['source_error']:.4f} for its source images, where "
            f"taking the predicted mixed image for each of them gives {measures['mix_for_all_error']:.4f}"
        )
    return lines


def main(argv=None) -> int:
    args = arguments(argv)
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    loop, model = setup(args, distributed)
    loop.begin(start_up_lines(args, distributed, model, loop))
    status = train(args, distributed, loop, model)
    if status == 0 and distributed.is_main and (loop.run.folder / "last.pt").exists():
        measures = {
            name.removeprefix("eval_"): value
            for name, value in loop.run.evaluation.items()
            if name.startswith("eval_") and value is not None
        }
        print("\n".join([*error_lines(args, model, measures), f"pictures: {loop.run.folder}"]))
        if "feature_rank" in measures:
            of_start = (
                f" (the network at the start: {measures['knn_top1_at_start']:.2f})"
                if "knn_top1_at_start" in measures
                else ""
            )
            print(
                (
                    f"frozen features: k-NN top-1 {measures['knn_top1']:.2f}{of_start}, "
                    if "knn_top1" in measures
                    else "frozen features: "
                )
                + f"rank {measures['feature_rank']:.1f} of {model.encoder.width}"
            )
        source = f" --data {args.data}" if args.data else ""
        print(f"next: python finetune.py{source} --checkpoint {loop.run.folder / 'last.pt'}")
    return status


if __name__ == "__main__":
    dist.run_main(main)
