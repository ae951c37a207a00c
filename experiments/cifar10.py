"""The study behind results/cifar10: does superposition pay, at equal epochs and at equal time?

    python experiments/cifar10.py --data data/cifar10 --scale cpu                all tables, in the order of STUDIES
    python experiments/cifar10.py --data data/cifar10 --scale cpu --minutes 9    stop after nine minutes
    python experiments/cifar10.py --scale cpu --device cpu --speeds              only measure the speeds of the frontier
    make results                                                                 results/README.md from the logs

The same command continues a study that was stopped. results/ was made with OMP_NUM_THREADS=1 and --device cpu. Equal
time is computed from the speeds of results/cifar10/speed-SCALE-*.json, which were measured side by side beforehand
(results/README.md has the commands). The wall times of runs on a shared machine depend on its other users.

Each configuration is a train.py command and then finetune.py commands, its phases. A complete phase is recorded in
results/cifar10/SCALE/CONFIGURATION/seedN.jsonl: a line {"phase": ..., "config": ...} with command, seed, commit,
versions and device, then the lines of its log.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from study import ROOT, Step, add_flags, build_folder, link, read_speed, run_study, slug, to_do, words

import bench
import train
from engine import dist, runs, timing
from engine.errors import UserError
from engine.files import write_atomically

RESULTS = ROOT / "results" / "cifar10"
IMAGES = 50_000

# Sizes of the study. All configurations share the settings, except that runs from scratch have their own learning rate
# and no layer decay.
SCALES = {
    "cpu": dict(
        model="swin_nano",
        epochs=4,
        pretrain="--batch-size 128 --base-lr 4e-3 --decoder-width 128 --eval-images 1024",
        warmup=1 / 8,
        labels=0.2,
        finetune="--batch-size 64 --warmup-epochs 0.5 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 "
        "--drop-path 0 --eval-every 99 --log-every 20",
        finetune_epochs=5,
        lr=8e-3,
        scratch_lr=4e-3,
    ),
    "gpu": dict(
        model="swin_micro",
        epochs=100,
        pretrain="--batch-size 512 --base-lr 2e-3 --eval-images 2000",
        warmup=1 / 20,
        labels=0.2,
        finetune="--batch-size 256 --warmup-epochs 5 --randaugment 0 --eval-every 10",
        finetune_epochs=50,
        lr=2e-3,
        scratch_lr=2e-3,
    ),
}
SPLIT = "--method eesmm --decomposition split"
THREE = f"{SPLIT} --loss-units all --sources 3 --batch-size 126"  # the batch is a multiple of 3
MAIN = {  # flags of train.py; None: no pre-training
    "scratch": None,
    "greenmim": "--method greenmim",
    "eesmm split all": f"{SPLIT} --loss-units all",
    "eesmm split": SPLIT,
    "eesmm subtract": "--method eesmm --decomposition subtract",
    "simmim": "--method simmim",
}
LEVERS = {  # what might make superposition win, and controls
    "greenmim all": "--method greenmim --loss-units all",
    "eesmm subtract all": "--method eesmm --decomposition subtract --loss-units all",
    "eesmm split all, ratio 0.5": f"{SPLIT} --loss-units all --mask-ratio 0.5",
    "eesmm split all, ratio 0": f"{SPLIT} --loss-units all --mask-ratio 0",
    "eesmm split all, 4 sources": f"{SPLIT} --loss-units all --sources 4",
    "eesmm split all, 3 sources": THREE,
    "eesmm split all, fixed 0.7 0.3": f"{SPLIT} --loss-units all --assignment fixed --weights 0.7 0.3",
    "eesmm split all, independent masks": f"{SPLIT} --loss-units all --masks independent",
    "eesmm split all, 4 sources, ratio 0": f"{SPLIT} --loss-units all --sources 4 --mask-ratio 0",
}
ABLATIONS = {  # Fig. 4 and Table 3; the overlay removed is greenmim, ratio 0.75 and one block are "eesmm split"
    **{f"eesmm split, ratio {ratio}": f"{SPLIT} --mask-ratio {ratio}" for ratio in (0.5, 0.6, 0.7, 0.8, 0.9)},
    **{f"eesmm split, {blocks} decoder blocks": f"{SPLIT} --decoder-blocks {blocks}" for blocks in (2, 4, 8)},
}
RATES = {  # half and twice the learning rate of all other runs
    f"{variant}, rate {rate}": f"{MAIN[variant]} --base-lr {rate}"
    for variant in ("greenmim", "eesmm split all")
    for rate in ("2e-3", "8e-3")
}
# Changes that might help the baselines: twice the steps at the same peak learning rate; from scratch twice the rate.
BASELINES = {
    "greenmim, batch 64": "--method greenmim --batch-size 64 --base-lr 8e-3",
    "eesmm split all, batch 64": f"{SPLIT} --loss-units all --batch-size 64 --base-lr 8e-3",
    "scratch, rate 8e-3": None,
}
FINETUNE_FLAGS = {"scratch, rate 8e-3": "--base-lr 8e-3"}  # further flags of finetune.py
# Images in a superposition and mask ratio. Configurations that leave equally many visible units for each source image,
# of its 16, cost the encoder equally much.
FRONTIER = {
    **{f"greenmim, ratio {ratio}": f"--method greenmim --mask-ratio {ratio}" for ratio in (0.875, 0.9375)},
    **{
        f"greenmim all, ratio {ratio}": f"--method greenmim --loss-units all --mask-ratio {ratio}"
        for ratio in (0.875, 0.9375)
    },
    "eesmm split all, ratio 0.875": f"{SPLIT} --loss-units all --mask-ratio 0.875",
    "eesmm split all, 3 sources, ratio 0.625": f"{THREE} --mask-ratio 0.625",
    "eesmm split all, 3 sources, ratio 0.8125": f"{THREE} --mask-ratio 0.8125",
    "eesmm split all, 4 sources, ratio 0.5": f"{SPLIT} --loss-units all --sources 4 --mask-ratio 0.5",
}
# These runs are four times as long, so they use batches of 64: otherwise the effects of more steps and of longer
# training could not be separated.
LONGER = {
    f"{variant}, batch 64": f"{(LEVERS | FRONTIER)[variant]} --batch-size 64 --base-lr 8e-3"
    for variant in (
        "eesmm split all, ratio 0.5",
        "greenmim, ratio 0.875",
        "greenmim all, ratio 0.875",
        "eesmm split all, 4 sources, ratio 0.5",
    )
}
# The other methods, each with the encoder that it was made for.
FAMILY = {"mixmae": "--method mixmae", "mae on vit": "--method mae --model vit_micro"}
# Share of the usual time of pre-training that a configuration uses; the rest goes to fine-tuning.
PRETRAIN_SHARE = {
    "scratch": 0,
    "scratch, rate 8e-3": 0,
    "eesmm split all, half": 0.5,
    "greenmim, half": 0.5,
    "greenmim, batch 64, half": 0.5,
    "simmim, half": 0.5,
    **{f"{variant}, half": 0.5 for variant in FAMILY},
}
VARIANTS = MAIN | LEVERS | ABLATIONS | RATES | BASELINES | FRONTIER | LONGER | FAMILY
VARIANTS |= {variant: VARIANTS[variant.removesuffix(", half")] for variant in PRETRAIN_SHARE}


class Study(NamedTuple):
    """One table of the results.

    Args:
        variants: names of configurations.
        seeds: of every configuration.
        budget: 0 for equal epochs. Otherwise all configurations get the time of this many of eesmm's usual runs.
        text: what the results say about the table.
        other_seeds: of configurations that have others.
        length: factor on the usual epochs, where the budget is 0.
        validation: whether the configurations are tested on one in ten of the training images, which they are not
            trained on.
    """

    variants: list[str]
    seeds: tuple[int, ...]
    budget: int
    text: str
    other_seeds: dict[str, tuple[int, ...]] = {}
    length: int = 1
    validation: bool = False

    def runs(self) -> list[tuple[int, str]]:
        """The seed and the configuration of every run: the whole table for one seed before the next."""
        runs = [(seed, variant) for variant in self.variants for seed in self.other_seeds.get(variant, self.seeds)]
        return sorted(runs, key=lambda run: run[0])


STUDIES = {  # in order of importance
    "equal epochs": Study(list(MAIN), (0, 1, 2), 0, "Every arm sees as many images."),
    "equal time": Study(
        list(MAIN),
        (0, 1, 2),
        1,
        "Every arm gets the time that eesmm takes for its pre-training and fine-tuning, by the speeds above; from "
        "scratch, all of it goes into fine-tuning. The eesmm arms are those of the table above.",
    ),
    "frontier": Study(
        [
            "greenmim",
            "eesmm split all, ratio 0.5",
            "greenmim, ratio 0.875",
            "eesmm split all",
            "eesmm split all, 3 sources, ratio 0.625",
            "eesmm split all, 4 sources, ratio 0.5",
            "greenmim, ratio 0.9375",
            "eesmm split all, ratio 0.875",
            "eesmm split all, 3 sources, ratio 0.8125",
            "eesmm split all, 4 sources",
            "greenmim all, ratio 0.875",
            "greenmim all, ratio 0.9375",
        ],
        (0, 1, 2),
        0,
        "Blending against hiding more, at equal epochs: one image of which fewer units are visible, or more images in "
        "a blend. A source image has 16 units. Four of them are encoded for each in the first two arms, two in the "
        "next four, one in the four after those. The last two, with two units and one, are controls: of one image, "
        "too, the error of all units counts.",
        {
            variant: (0, 1, 2, 3, 4)
            for variant in (
                "greenmim, ratio 0.875",
                "eesmm split all",
                "greenmim all, ratio 0.875",
                "greenmim all, ratio 0.9375",
                "eesmm split all, ratio 0.875",
                "eesmm split all, 3 sources, ratio 0.8125",
                "eesmm split all, 4 sources",
            )
        },
    ),
    "does it last": Study(
        [
            "greenmim, batch 64",
            "eesmm split all, ratio 0.5, batch 64",
            "greenmim, ratio 0.875, batch 64",
            "greenmim all, ratio 0.875, batch 64",
            "eesmm split all, batch 64",
            "eesmm split all, 4 sources, ratio 0.5, batch 64",
        ],
        (0, 1, 2),
        0,
        "Equal epochs, pre-training and fine-tuning four times as long as above, all in batches of 64. Four units of "
        "each source image are encoded in the first two arms, two in the others.",
        length=4,
    ),
    "levers": Study(
        ["greenmim", "eesmm split", "eesmm split all", *LEVERS],
        (0,),
        0,
        "What might make superposition win, one thing at a time, and controls, at equal epochs. The work of an image "
        "differs: see its column.",
    ),
    "division of the time": Study(
        ["scratch", "greenmim", "greenmim, half", "eesmm split all", "eesmm split all, half"],
        (0, 1, 2),
        1,
        "Equal time, half as much of it for pre-training as above, the rest for fine-tuning.",
    ),
    "stronger baselines": Study(
        [
            "scratch",
            "scratch, rate 8e-3",
            "greenmim",
            "greenmim, batch 64",
            "greenmim, batch 64, half",
            "eesmm split all",
            "eesmm split all, batch 64",
            "eesmm split all, half",
        ],
        (0, 1, 2),
        1,
        "Equal time, taking the speeds above for both sizes of batch. A batch counts source images, so at equal time "
        "greenmim makes fewer steps than eesmm, 987 against 1560. Batch 64: twice the steps, at the same peak rate. "
        "Half: the division of the time above. Scratch, whose rate was tuned at the length of equal epochs, also has "
        "twice that rate.",
    ),
    "four times as long": Study(
        ["eesmm split all", "greenmim", "greenmim, batch 64", "scratch"],
        (0, 1, 2),
        4,
        "Equal time again, pre-training and fine-tuning four times as long.",
        {"greenmim, batch 64": (0,)},
    ),
    "division by validation": Study(
        [
            "scratch",
            "scratch, rate 8e-3",
            *(
                variant + half
                for variant in ("eesmm split all", "greenmim, batch 64", "mixmae", "mae on vit", "simmim")
                for half in ("", ", half")
            ),
        ],
        (0,),
        1,
        "Equal time. How each method divides it is chosen here, not on the test images: of the training images of "
        "each class one in ten is used for validation instead of training. Half: half of the usual time of "
        "pre-training, the rest for fine-tuning.",
        validation=True,
    ),
    "family": Study(
        ["scratch", "simmim, half", "greenmim, batch 64", "mixmae, half", "mae on vit, half", "eesmm split all, half"],
        (0, 1, 2),
        1,
        "Equal time, each as the table above chose for it; judged on the test images.",
    ),
    "ablations": Study(
        ["greenmim", "eesmm split", *ABLATIONS],
        (0,),
        0,
        "Fig. 4 and Table 3 at this scale. greenmim is the overlay removed; eesmm split has ratio 0.75 and one "
        "decoder block. At 32 px an image has 16 units: ratios 0.5 to 0.9 leave 8, 6, 5, 3, 2 visible, 0.75 four.",
    ),
    "rate of pre-training": Study(
        ["greenmim", "eesmm split all", *RATES],
        (0,),
        0,
        "Half and twice the base learning rate of pre-training that all other tables use, 4e-3.",
    ),
}


# ------------------------------------------------------------------------------------------------- speeds


def speed(scale: str, method: str, model: str | None = None) -> float:
    """Training speed of a method, measured side by side with the others.

    Methods and networks that the study's main files lack get the speed of eesmm, or of fine-tuning, times the ratio
    that speed-SCALE-family.json gives.

    Args:
        scale: key of SCALES.
        method: "dense" is fine-tuning.
        model: name of the network; None for the usual one of the method.

    Returns:
        Source images per second.
    """
    usual_model, is_finetuning = SCALES[scale]["model"], method == "dense"
    if method in ("mixmae", "mae") or model not in (None, usual_model):
        path = RESULTS / f"speed-{scale}-family.json"
        how = f"python experiments/cifar10.py --scale {scale} --speeds family"
        reference = "dense" if is_finetuning else "eesmm"
        own_speed, usual_speed = read_speed(path, how, method, model), read_speed(path, how, reference, usual_model)
        return speed(scale, reference) * own_speed / usual_speed
    path = RESULTS / f"speed-{scale}-{'finetune' if is_finetuning else 'pretrain'}.json"
    how = (
        f"python bench.py {'--dense' if is_finetuning else '--no-memory'} --model {usual_model} --image-size 32 "
        f"--window 4 --batch-size N --output {path}"
    )
    return read_speed(path, how, method)


def measure_speeds(scale: str, device: str, name: str, rounds: int = 20):
    """Measure training steps side by side and write speed-SCALE-NAME.json.

    Args:
        scale: key of SCALES.
        device: value of --device.
        name: "frontier" for the configurations of that table, "family" for the other methods and for fine-tuning.
        rounds: of the measurement.
    """
    distributed = dist.initialize(device, "auto")
    cases = [timing.matmul_case(distributed)]
    for variant in STUDIES["frontier"].variants if name == "frontier" else ["eesmm split all", *FAMILY]:
        cases.append(bench.method_case(pretraining(scale, variant), distributed))
        cases[-1].row["arm"] = variant
    for model in (SCALES[scale]["model"], "vit_micro") if name == "family" else ():
        args = train.arguments(["--recipe", "cifar", "--model", model, "--batch-size", "64"])
        cases.append(bench.dense_cases(args, distributed)[0])
        cases[-1].row["arm"] = f"fine-tuning of {model}"
    timing.interleave(cases, distributed.device, rounds)
    result = {
        "machine": timing.describe_machine(distributed.device),
        **runs.provenance(sys.argv),
        "versions": dist.versions(),
        "rows": timing.finished_rows(cases),
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(RESULTS / f"speed-{scale}-{name}.json", lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------------------- configurations


def pretraining(scale: str, variant: str) -> argparse.Namespace:
    """The arguments of train.py for a configuration, without those for its length, seed and folders."""
    values = SCALES[scale]
    return train.arguments(words("--recipe cifar --model", values["model"], values["pretrain"], VARIANTS[variant]))


def method(variant: str) -> str:
    return variant.split()[0].strip(",")


def model(scale: str, variant: str) -> str:
    return pretraining(scale, variant).model if VARIANTS[variant] else SCALES[scale]["model"]


def epochs(scale: str, study: str, variant: str) -> tuple[float, float]:
    """Epochs of pre-training and of fine-tuning.

    At equal time, fine-tuning gets the time of eesmm's pre-training that a configuration does not use.
    """
    table, values = STUDIES[study], SCALES[scale]
    factor = max(table.budget, 1) * table.length
    pretrain_epochs, finetune_epochs = factor * values["epochs"], factor * values["finetune_epochs"]
    if not table.budget:
        return (pretrain_epochs if VARIANTS[variant] else 0), finetune_epochs
    share, labelled_images = PRETRAIN_SHARE.get(variant, 1), values["labels"] * IMAGES
    seconds = pretrain_epochs * IMAGES / speed(scale, "eesmm")
    finetune_seconds = finetune_epochs * labelled_images / speed(scale, "dense") + (1 - share) * seconds
    finetune_epochs = finetune_seconds * speed(scale, "dense", model(scale, variant)) / labelled_images
    pretrain_epochs = share * seconds * speed(scale, method(variant)) / IMAGES if share else 0
    return round(pretrain_epochs, 2), round(finetune_epochs, 2)


def folder(study: str, variant: str, seed: int) -> Path:
    """Folder of a run, below results/cifar10/SCALE and --output.

    A configuration that several tables have with the same epochs runs once, so it has one folder.
    """
    table, suffix = STUDIES[study], ""
    if table.budget > 1 or table.length > 1 or table.validation:
        suffix = f"-{slug(study)}"
    elif table.budget and not variant.startswith("eesmm"):  # eesmm's time is the budget
        suffix = "-equal-time"
    return Path(slug(variant) + suffix) / f"seed{seed}"


def steps(args: argparse.Namespace, study: str, variant: str, seed: int) -> list[Step]:
    """The phases of a run: pre-training, unless it starts from scratch, fine-tuning, and two probes."""
    scale, table, flags = SCALES[args.scale], STUDIES[study], VARIANTS[variant]
    pretrain_epochs, finetune_epochs = epochs(args.scale, study, variant)
    run = folder(study, variant, seed)
    data = args.output / "validation" if table.validation else args.data
    common = ("--data", data, "--in-memory --cache", args.cache, "--device", args.device, "--seed", seed)

    def step(phase, *command, **options):
        return Step(words(*command), args.output / run / phase, RESULTS / args.scale / f"{run}.jsonl", phase, **options)

    found, first = [], None
    start, lr = ("--init scratch --model", scale["model"]), scale["scratch_lr"]
    if flags:
        length = f"--epochs {pretrain_epochs:g} --warmup-epochs {scale['warmup'] * pretrain_epochs:.4g}"
        network = f"--recipe cifar --model {scale['model']}"
        first = step("pretrain", "train.py", *common, network, length, scale["pretrain"], flags)
        found, start, lr = [first], ("--checkpoint", first.folder / "last.pt"), scale["lr"]
    labels = f"--labels {scale['labels']}"
    length = f"--base-lr {lr:g} {labels} --epochs {finetune_epochs:g}"
    more = FINETUNE_FLAGS.get(variant, "")
    finetune = ("finetune.py", *common, *start)
    found.append(step("finetune", *finetune, length, scale["finetune"], more, pretraining=first))
    if not table.validation and (flags or not table.budget):  # random features do not depend on the time
        for protocol in ("linear", "knn"):
            probe = (f"--protocol {protocol}", labels)
            found.append(step(protocol, *finetune, *probe, pretraining=first, resumable=False))
    return found


# ------------------------------------------------------------------------------------------------- the study


def validation_part(data: Path, folder: Path):
    """Make a folder of links for the choice of settings.

    test/ has one in ten of the training images of each class, train/ the others.

    Args:
        data: folder of the images.
        folder: folder to make.
    """
    if folder.exists():
        return
    classes = sorted(path for path in (data / "train").glob("*") if path.is_dir())
    if not classes:
        raise UserError(f"{data} has no class folders in train/, of which a part could be held out for validation")

    def build(building: Path):
        for class_folder in classes:
            for k, path in enumerate(sorted(class_folder.iterdir())):
                link(path.resolve(), building / ("train" if k % 10 else "test") / class_folder.name / path.name)

    build_folder(folder, build)


def groups(args: argparse.Namespace):
    """The steps of each run of the chosen tables, in order."""
    for study in args.studies:
        for seed, variant in STUDIES[study].runs():
            if variant in args.arms and seed in (args.seeds or (seed,)):
                run = steps(args, study, variant, seed)
                if STUDIES[study].validation and to_do(run):
                    validation_part(ROOT / args.data, ROOT / args.output / "validation")
                yield run


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/cifar10"),
        help="CIFAR-10 as class folders of images, or cifar10 if downloaded before; default: data/cifar10",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("data/cache"), help="where decoded images are kept; default: data/cache"
    )
    parser.add_argument("--scale", choices=SCALES, required=True, help="size of the study, for this machine")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all, in order")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="ARM",
        help="only these configurations of each study; default: all",
    )
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument(
        "--speeds",
        nargs="?",
        const="frontier",
        choices=("frontier", "family"),
        help="only measure the training speed of the configurations of the frontier, or of the other methods",
    )
    add_flags(parser, "runs/cifar10", None, "only these of each study; default: all")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    if args.speeds:
        measure_speeds(args.scale, args.device, args.speeds)
        return 0
    return run_study(groups(args), args)


if __name__ == "__main__":
    dist.run_main(main)
