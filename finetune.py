"""Fine-tuning, linear probe and k-NN (sections 4.1.2, 4.3, Table 2): what pre-training is for.

    python finetune.py --data DIR --checkpoint runs/x/last.pt                      full fine-tuning
    python finetune.py --data DIR --checkpoint runs/x/last.pt --protocol linear    frozen features; or knn
    python finetune.py --data DIR --init scratch                                   the baseline without pre-training
    python finetune.py                 the newest pre-trained run under runs/ and the baseline, on the demo's
    photographs

With --eval, --predict and --protocol features it runs what is in predict.py. RandAugment is in images/augment.py.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import encoders
import weights
from encoders import Encoder
from engine import data, dist, flags, plots, probes, rng, runs
from engine.checkpoints import resumed_config
from engine.errors import UserError
from engine.files import run_config
from engine.flags import ResumeRules, fraction, number, positive_int, select, updated
from engine.inputs import DataConfig, load_images, resolve_format
from engine.loop import Loop, report_unreadable_val
from images import balanced_subset
from images.augment import AUGMENTATION, EARLIER_AUGMENTATION, randaugment
from images.crops import format_size
from images.sources import FileImages
from predict import Classifier, evaluate_checkpoint, export_features, run_settings, write_predictions

# fmt: off
PAPER = dict(
    epochs=100, warmup_epochs=20, base_lr=1.25e-3, warmup_lr=2.5e-7, min_lr=2.5e-7, weight_decay=0.05, layer_decay=0.9,
    clip=5.0, drop_path=0.2, crop_scale=(0.08, 1.0), mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment=27,
    labels=1.0,
    fc_norm=False,  # it has no flag: see predict.Classifier
)
RECIPES = {  # imagenet, ablation, cifar: sections 4.1.2, 4.3 and Table 2, as docs/paper.md reads them
    "imagenet": PAPER | dict(image_size=224, window=7, effective_batch=1024),
    "ablation": PAPER | dict(image_size=192, window=6, effective_batch=2048, warmup_epochs=10, drop_path=0.1),
    # MAE's, as published for ViT-B
    "mae": PAPER | dict(
        image_size=224, window=7, effective_batch=1024, warmup_epochs=5, base_lr=1e-3, warmup_lr=0.0, min_lr=1e-6,
        layer_decay=0.65, clip=0.0, drop_path=0.1, fc_norm=True,
    ),
    "cifar": PAPER | dict(image_size=192, window=6, effective_batch=512),
    # ours: for small networks on small images, and for a few minutes on a CPU
    "micro": PAPER | dict(
        image_size=32, window=4, effective_batch=256, warmup_epochs=5, base_lr=2e-3, layer_decay=0.8, drop_path=0.1,
        crop_scale=(0.35, 1.0),
    ),
    "demo": PAPER | dict(
        image_size=32, window=4, effective_batch=32, epochs=3, warmup_epochs=0.5, base_lr=2.4e-2, layer_decay=0.8,
        drop_path=0.0, crop_scale=(0.35, 1.0), mixup=0.0, cutmix=0.0, erasing=0.0, randaugment=0, labels=0.2,
    ),
}
# What replaces the settings with --init scratch: those of every recipe, then those of one
SCRATCH = dict(layer_decay=1.0)  # layer-wise decay protects pre-trained layers, and there are none
SCRATCH_OVERRIDES = {
    "imagenet": dict(base_lr=5e-4, drop_path=0.5, epochs=300),  # Swin-B's own settings (Liu et al. 2021)
    "demo": dict(base_lr=8e-3),  # the best of the rates tried in results/demo/README.md
}
# What replaces the settings of the recipes imagenet and ablation for some models
MODEL_OVERRIDES = {
    "swin_large": dict(layer_decay=0.8, drop_path=0.3),  # section 4.1.2
    "twins_large": dict(layer_decay=0.9, drop_path=0.2),  # section 4.1.2
    "mixmim_base": dict(layer_decay=0.7, window=14),  # MixMAE's
}
# fmt: on
SMALL_MODELS = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")  # for small images
FLAGS_OF_MODE = {
    "--eval": "eval checkpoint data split device precision workers download max_bad_share max_megapixels".split(),
    "--predict": "predict checkpoint output device precision workers max_megapixels".split(),
}


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
        help="train everything; a linear layer on frozen features; k nearest neighbours by frozen features; write "
        "features.npy, the features of all images of --data, which need no labels; default: finetune",
    )
    parser.add_argument(
        "--predict",
        metavar="DIR",
        help="only write predictions.csv: the classes of a folder's images, from a checkpoint of finetune.py",
    )
    parser.add_argument(
        "--eval", action="store_true", help="only evaluate a checkpoint of finetune.py, on all images of --data"
    )
    parser.add_argument(
        "--split",
        choices=("val", "test", "train"),
        help="of --eval: the part of --data; default: val, else test, else all images",
    )
    parser.add_argument(
        "--labels",
        type=number(float, 0, 1, open_low=True),
        metavar="SHARE",
        help="class-balanced share of the training images",
    )
    flags.add_data_flags(parser)
    encoders.add_flags(parser)
    flags.add_training_flags(parser)
    group = parser.add_argument_group("augmentation and loss of fine-tuning")
    group.add_argument(
        "--randaugment",
        type=number(int, 0, 30),
        metavar="M",
        help="magnitude of RandAugment's two operations, each applied with a probability of one half; 27 is timm's "
        "rand-m9-mstd0.5-inc1; 0: none",
    )
    group.add_argument("--mixup", type=flags.non_negative, metavar="ALPHA", help="mixup; 0: none")
    group.add_argument(
        "--cutmix",
        type=flags.non_negative,
        metavar="ALPHA",
        help="CutMix; 0: none; with mixup, one of the two per batch",
    )
    group.add_argument(
        "--erasing", type=fraction, metavar="P", help="probability that a rectangle of an image becomes noise"
    )
    group.add_argument("--smoothing", type=number(float, 0, 0.999), help="label smoothing")
    group.add_argument(
        "--ema",
        type=number(float, 0, 0.99999),
        metavar="DECAY",
        help="evaluate an exponential moving average of the weights",
    )
    group.add_argument(
        "--eval-every", type=positive_int, default=1, metavar="EPOCHS", help="and at the end; default: 1"
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
            non_square_size,
            lambda args: (
                MODEL_OVERRIDES.get(resolve_model(args), {}) if args.recipe in ("imagenet", "ablation") else {}
            ),
            lambda args: {"fc_norm": uses_fc_norm(args)},
            lambda args: SCRATCH | SCRATCH_OVERRIDES.get(args.recipe, {}) if args.init == "scratch" else {},
        ],
    )


def check_combination(parser, argv):
    """UserError for flags that cannot be combined."""
    args = parser.parse_args(argv)
    if args.eval or args.predict:
        mode = "--eval" if args.eval else "--predict"
        check_flags_of_mode(parser, argv, mode, FLAGS_OF_MODE[mode])
    elif args.split:
        raise UserError("--split: only with --eval")
    if args.resume and args.protocol != "finetune":
        raise UserError(f"--protocol {args.protocol} writes no checkpoint, so it cannot be combined with --resume")
    if args.protocol == "features" and not args.data:
        raise UserError("--protocol features needs --data, a folder of images")


def check_flags_of_mode(parser, argv, mode: str, allowed):
    """UserError if the command line has flags that a mode does not use.

    Args:
        mode: the flag that selects the mode, for the message.
        allowed: names of the flags that the mode uses, with underscores.
    """
    others = sorted(flags.explicit_flags(parser, argv) - set(allowed))
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UserError(f"{names}: cannot be combined with {mode}")


def choose_recipe(args) -> str:
    """The recipe if --recipe is not given."""
    if args.data is None:
        return "demo"
    model = resolve_model(args)
    if model in SMALL_MODELS:
        return "micro"
    if args.data in ("cifar10", "cifar100"):
        return "cifar"
    return "mae" if model.startswith("vit") else "imagenet"


def uses_fc_norm(args) -> bool:
    """Whether the classifier has the fc_norm of its recipe: if a ViT is fine-tuned, unless the run started before
    2026-11-28."""
    resumed = resumed_config(args.resume, args.output).get("arguments")
    if resumed and not resumed.get("fc_norm"):
        return False
    return args.fc_norm and args.protocol == "finetune" and resolve_model(args).startswith("vit")


def resolve_model(args) -> str:
    """The name of the model: --model, else the one of the resumed run, else the one whose weights the checkpoint has,
    else a default."""
    model = args.model or resumed_config(args.resume, args.output).get("arguments", {}).get("model")
    if model:
        return model
    if args.checkpoint:
        return weights.model_in(args.checkpoint)
    return "swin_micro" if args.data is None else "swin_base"


def non_square_size(args) -> dict:
    """The checkpoint's image size as an argument, if it is not square. The image sizes of the recipes are square."""
    # a resumed run has a size of its own, and its checkpoint to start from need not exist any more
    if args.resume or not args.checkpoint or not Path(args.checkpoint).exists():
        return {}
    _, _, config = weights.open_weights(args.checkpoint)
    size = config.get("arguments", {}).get("image_size")
    return {} if size is None or isinstance(size, int) else {"image_size": tuple(size)}


def resolve_start(args, required: bool = True) -> Namespace:
    """What training starts from.

    Args:
        required: whether the program needs a checkpoint or --init scratch.

    Returns:
        a copy of the arguments with `model` and `checkpoint` filled in. Without --data the default checkpoint is the
        newest pre-training run under runs/.

    Raises:
        UserError: --checkpoint and --init scratch are both given, or one of them is missing.
    """
    checkpoint, scratch = args.checkpoint, args.init == "scratch"
    if checkpoint and scratch:
        raise UserError("--init scratch cannot be combined with --checkpoint: leave one of them out")
    if required and not checkpoint and not scratch:
        if args.data is not None:
            raise UserError("give --checkpoint, pre-trained weights to start from, or --init scratch")
        checkpoint = runs.newest_run("pretrain")
        if not checkpoint:
            raise UserError(
                "no pre-training run under runs/: run train.py first, or give --checkpoint or --init scratch"
            )
    args = updated(args, checkpoint=checkpoint)
    return updated(args, model=resolve_model(args))


# Set-up ---------------------------------------------------------------------------------------------------------------


def make_encoder(args, channels: int, resumed: Path | None = None) -> tuple[Encoder, str]:
    """The encoder that the flags describe.

    Args:
        channels: of the images.
        resumed: the checkpoint of a resumed run, from which the weights will be loaded later.

    Returns:
        the encoder, with the weights of --checkpoint unless --init scratch is given, and a line that says where they
        are from.
    """
    torch.manual_seed(args.seed)
    encoder = encoders.make(
        args.model,
        args.activation_checkpointing,
        image_size=args.image_size,
        window=args.window,
        drop_path=args.drop_path,
        channels=channels,
    )
    if resumed:
        return encoder, f"{args.model}, weights from {resumed}"
    if args.init == "scratch":
        return encoder, f"{args.model} from scratch, all weights at random"
    return encoder, weights.load(args.checkpoint, encoder, geometric=args.recipe == "ablation")


def make_model(args, classes: int, channels: int, distributed, resumed: Path | None = None) -> Classifier:
    """The classifier that the flags describe, on the device. Without classes it has no linear layer."""
    encoder, line = make_encoder(args, channels, resumed)
    if classes and not resumed and args.init != "scratch":
        line += "; the classifier is initialised at random"
    distributed.print(line)
    return Classifier(encoder, classes, args.fc_norm).to(distributed.device)


def setup(args, distributed):
    """Everything that is checked before anything is written.

    Returns:
        The arguments with the pixel format, training images, validation images, the run, the checkpoint to resume from
        or None, and the classifier, which has no linear layer if its features stay frozen.
    """
    train, held_out = load_images(select(DataConfig, vars(args)), distributed, labelled=True)
    args = updated(args, **train.form.requested)
    kind = args.protocol if args.init != "scratch" else f"{args.protocol}-scratch"
    run, resumed = runs.open_run(vars(args), distributed, args.recipe, kind)
    train, held_out = runs.restore_file_lists(train, held_out, resumed, args.data, distributed)
    if not (resumed and isinstance(train, FileImages)):  # the file list of a resumed run is the subset already
        train = balanced_subset(train, args.labels, args.seed)
    classes = len(train.classes) if args.protocol == "finetune" else 0
    model = make_model(args, classes, train.form.channels, distributed, resumed)
    return args, train, held_out, run, resumed, model


def mixup_or_cutmix(args, classes: int):
    """A transform of a batch's images and labels that draws mixup or CutMix each time; None if neither is used."""
    transforms = [
        transform(alpha=alpha, num_classes=classes)
        for transform, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
        if alpha
    ]
    return v2.RandomChoice(transforms) if transforms else None


# Protocols ------------------------------------------------------------------------------------------------------------


def finetune(args, distributed) -> tuple[int, dict]:
    """Train the encoder and the linear layer; returns the exit status and the last accuracy, see `probes.evaluate`."""
    args, train, held_out, run, resumed, model = setup(args, distributed)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    kind = run_config(resumed.parent).get("augmentation", EARLIER_AUGMENTATION) if resumed else AUGMENTATION
    crops = data.Crops(
        train,
        args.image_size,
        args.crop_scale,
        args.crop_ratio,
        seed=args.seed,
        augment=randaugment(args.randaugment, train.form, kind),
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
    lines = loop.lines(f"recipe {args.recipe}, {args.model} at {format_size(args.image_size)} px")
    if args.randaugment and not train.form.is_rgb8:
        lines.append(
            "RandAugment without operations on colour, which need three 8-bit channels: rotation, translation and shear"
        )
    loop.begin(lines)
    mix, result = mixup_or_cutmix(args, len(train.classes)), {}

    def evaluate(bad: dict) -> dict:
        return probes.evaluate(distributed, ema.module if ema else model, held_out, args.image_size, bad)

    def evaluate_if_due() -> dict:
        """The accuracy at the end of an epoch, if an evaluation is due, else the last one."""
        if not loop.evaluation_due(args.eval_every):
            return result
        bad = {}
        accuracy = evaluate(bad)
        loop.log_evaluation(bad, eval_top1=accuracy["top1"], eval_top5=accuracy["top5"])
        report(run, accuracy, train.classes)
        return accuracy

    result = evaluate_if_due()
    for step in loop.steps():
        torch.manual_seed(rng.seed(args.seed, "drop path and mixup", step, distributed.rank))

        # forward, backward, update
        for batch in loop.micro_batches():
            images = data.prepare_batch(batch, distributed.device, args.image_size, loop.form.mean, loop.form.std)
            labels = batch["labels"].to(distributed.device, non_blocking=True)
            if args.erasing:
                images = data.random_erasing(images, batch["keys"], args.erasing, args.seed, step)
            if mix:
                images, labels = mix(images, labels)
            logits = loop.train_step.forward(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=args.smoothing)
            loop.train_step.backward(loss, {"loss": loss})
        loop.train_step.update()
        if ema:
            ema.update_parameters(model)

        # log, save, evaluate
        loop.log()
        if loop.checkpoint():
            return runs.STOPPED, result
        result = evaluate_if_due()
    return 0, result or evaluate({})


def evaluate_frozen_features(args, distributed) -> dict:
    """Linear probe or k-NN on the features of central crops; returns the accuracy, see `probes.topk_accuracy`."""
    args, train, held_out, run, _, model = setup(args, distributed)
    config = run_settings(args.protocol, vars(args), train.classes, train.form, distributed)
    runs.create_folder(run, config, {}, is_new=True)
    dtype = torch.float16 if distributed.device.type == "cuda" else torch.float32
    bad_train, bad_val = {}, {}
    gathered = [
        probes.extract_features(distributed, model, images, args.image_size, bad, dtype)
        for images, bad in ((train, bad_train), (held_out, bad_val))
    ]
    run.report_bad([(train.name(index), reason) for index, reason in bad_train.items()], len(train), args.max_bad_share)
    report_unreadable_val(run, train, held_out, bad_val, args.max_bad_share)

    def accuracy() -> dict:
        (train_features, train_indices), (features, indices) = gathered
        train_labels, labels = torch.from_numpy(train.labels)[train_indices], torch.from_numpy(held_out.labels)[indices]
        classes = len(train.classes)
        probes.check_every_class(train, train_labels.bincount(minlength=classes), "training")
        probes.check_every_class(held_out, labels.bincount(minlength=classes), "held-out")
        inputs = train_features, train_labels, features.to(distributed.device), classes
        if args.protocol == "knn":
            scores = probes.nearest_neighbours(*inputs, args.neighbours)
        else:
            scores = probes.linear_probe(
                *inputs, args.epochs, lr=args.probe_lr, seed=args.seed, max_steps=args.max_steps
            )
        return probes.topk_accuracy(scores.cpu(), labels)

    result = distributed.run_on_main(accuracy)
    run.log(step=0, epoch=0, eval_top1=result["top1"], eval_top5=result["top5"])
    report(run, result, train.classes)
    return result


def report(run, result: dict, classes: list[str]):
    """Write confusion.png and per_class.json into the run folder."""
    confusion = result["confusion"]
    images = confusion.sum(1)
    accuracy = (confusion.diag() / images.clamp(min=1)).tolist()
    per_class = {
        name: {"accuracy": round(100 * accuracy[k], 2), "images": int(images[k])} for k, name in enumerate(classes)
    }
    run.write("per_class.json", lambda file: file.write((json.dumps(per_class, indent=1) + "\n").encode()))
    run.write("confusion.png", lambda file: plots.save(plots.confusion_matrix(confusion, classes), file))


def compare_with_scratch(args, argv: list[str], distributed) -> tuple[int, dict]:
    """Fine-tune from scratch, then from the checkpoint, each into a run of its own.

    Args:
        args: as `resolve_start` returns them.
        argv: the command line.

    Returns:
        the exit status and the accuracy of the pre-trained network.
    """
    accuracies = []
    for init in ("scratch", "pretrained"):
        words = [*argv, "--checkpoint", args.checkpoint, "--model", args.model, "--init", init]
        if args.output:
            words += ["--output", f"{args.output}/{init}"]
        status, result = finetune(arguments(words), distributed)
        if status:
            return status, result
        accuracies.append(result["top1"])
    distributed.print(
        f"the same network from scratch: top-1 {accuracies[0]:.2f}; pre-trained: top-1 {accuracies[1]:.2f}"
    )
    return 0, result


# The run --------------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    distributed = dist.initialize(args.device, args.precision, args.workers, args.deterministic)
    if args.predict:
        return write_predictions(args, distributed)
    status = 0
    if args.eval:
        result = evaluate_checkpoint(args, distributed)
    else:
        args = resolve_start(args)
        if args.protocol == "features":
            form, measured = resolve_format(select(DataConfig, vars(args)))
            model = make_model(args, 0, form.channels, distributed)
            return export_features(args, distributed, model, form, measured)
        if args.protocol != "finetune":
            result = evaluate_frozen_features(args, distributed)
        elif args.data is None and args.init is None:
            status, result = compare_with_scratch(args, argv, distributed)
        else:
            status, result = finetune(args, distributed)
    if status == 0:
        distributed.print(
            f"top-1 {result['top1']:.2f} top-5 {result['top5']:.2f} ({result['images']} images, "
            f"{args.checkpoint or 'from scratch'})"
        )
    return status


if __name__ == "__main__":
    dist.run_main(main)
