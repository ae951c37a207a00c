"""The study of nuclei behind results/dense.

Does pre-training on unlabelled slices help to find nuclei in an image of another microscope?

    python experiments/nuclei.py --data data/dense               all configurations and seeds
    python experiments/nuclei.py --data data/dense --minutes 9   stop after nine minutes; the same command continues
    make results                                                 results/README.md from the logs

results/ was made with OMP_NUM_THREADS=1. --data holds nuclei/: `b_image.tif`, a stack of 60 slices, and `a_image.tif`,
one image of another microscope, both with instance labels. Networks are trained on slices of b and tested on a.
Pre-training sees all 60 slices, without labels, for equal times by the speeds of results/dense/speed-nuclei.json. The
log of each command is recorded in results/dense/nuclei/NAME.jsonl.
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile
from study import DENSE, PRETRAIN, Step, add_flags, build_folder, link, pretrain_command, run_study, slug, words

from engine.dist import run_main

SEEDS = (0, 1, 2)
SIZES = (1, 3, 10, 30)  # numbers of labelled slices
ENTRIES = 240  # of a training folder, in which slices are repeated
EPOCHS = 60  # of eesmm's pre-training
PIXELS = "--channels 1 --value-range p1,p99"
COMMON = (
    f"{PIXELS} --pages images --recipe small --model swin_nano --image-size 64 --window 8 --crop-scale 0.0625 0.25 "
    "--batch-size 20 --base-lr 3e-2 --warmup-epochs 2 --log-every 100"
)
SEGMENT = (
    f"{PIXELS} --foreground --classes 2 --model swin_nano --image-size 64 --window 8 --batch-size 16 --epochs 7 "
    "--warmup-epochs 0.7 --eval-every 7"
)
VARIANTS = {  # flags of segment.py, and the method of pre-training
    "intensity alone": ("--protocol pixels --base-lr 1", None),
    "random encoder, frozen": ("--protocol frozen --init scratch", None),
    "greenmim, frozen": ("--protocol frozen", "greenmim"),
    "eesmm, frozen": ("--protocol frozen", "eesmm"),
    "scratch": ("--protocol finetune --init scratch", None),
    "greenmim": ("--protocol finetune", "greenmim"),
    "eesmm": ("--protocol finetune", "eesmm"),
}
PAIRS = (  # that the results compare
    ("eesmm", "scratch"),
    ("greenmim", "scratch"),
    ("eesmm", "greenmim"),
    ("eesmm, frozen", "random encoder, frozen"),
    ("greenmim, frozen", "random encoder, frozen"),
)


def prepare(source: Path, target: Path):
    """Make the folders of data, mostly of links.

    pretrain/ holds the stack ten times. labelledN/ holds N labelled slices, evenly spread over those that contain
    nuclei and repeated to ENTRIES, and for validation the image of the other microscope.

    Args:
        source: folder that holds nuclei/.
        target: folder to make.
    """

    def build(building: Path):
        image, labels = (tifffile.imread(source / "nuclei" / f"b_{kind}.tif") for kind in ("image", "instances"))
        slices = [number for number in range(len(image)) if labels[number].any()]
        (building / "slices").mkdir(parents=True)
        for number in slices:
            tifffile.imwrite(building / "slices" / f"image{number:02}.tif", image[number])
            tifffile.imwrite(building / "slices" / f"mask{number:02}.tif", labels[number].astype(np.uint16))
        for repeat in range(10):
            link(source / "nuclei" / "b_image.tif", building / "pretrain" / "train" / f"r{repeat}" / "b.tif")
        link(source / "nuclei" / "a_image.tif", building / "pretrain" / "val" / "a.tif")
        for size in SIZES:
            chosen = [slices[int((k + 0.5) / size * len(slices))] for k in range(size)]
            for kind, file, original in (("images", "image", "image"), ("masks", "mask", "instances")):
                for repeat in range(ENTRIES // size):
                    train = building / f"labelled{size}" / "train" / kind / f"r{repeat}"
                    for number in chosen:  # the links lead to where the slices will be
                        link(target / "slices" / f"{file}{number:02}.tif", train / f"b{number:02}.tif")
                val = building / f"labelled{size}" / "val" / kind
                link(source / "nuclei" / f"a_{original}.tif", val / "a.tif")

    build_folder(target, build)


def run_name(variant: str, size: int, seed: int) -> str:
    return f"{slug(variant)}-{size}-seed{seed}"


def steps(args: argparse.Namespace, seed: int) -> list[Step]:
    """All steps of one seed: pre-training by each method, then every configuration on every number of slices."""

    def step(name, command, **options):
        return Step(command, args.output / name, DENSE / "nuclei" / f"{name}.jsonl", **options)

    pretraining = {
        method: step(
            f"pretrain-{method}-seed{seed}",
            pretrain_command("nuclei", args.prepared / "pretrain", COMMON, method, EPOCHS, seed),
        )
        for method in PRETRAIN
    }
    segmentation = []
    for size in SIZES:
        for variant, (flags, method) in VARIANTS.items():
            start = pretraining.get(method)
            command = words("segment.py --data", args.prepared / f"labelled{size}", SEGMENT, flags, "--seed", seed)
            if start:
                command += words("--checkpoint", start.folder / "last.pt")
            name = run_name(variant, size, seed)
            segmentation.append(step(name, command, pretraining=start, keep_checkpoints=False))
    return [*pretraining.values(), *segmentation]


def groups(args: argparse.Namespace):
    prepare(args.data, args.prepared)
    for seed in args.seeds:
        yield steps(args, seed)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/dense"), help="default: data/dense")
    parser.add_argument(
        "--prepared",
        type=Path,
        default=Path("data/nuclei"),
        help="where folders of links are made; default: %(default)s",
    )
    add_flags(parser, "runs/nuclei", SEEDS, "default: 0 1 2")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    return run_study(groups(args), args)


if __name__ == "__main__":
    run_main(main)
