"""The study of trees behind results/dense.

Does pre-training help to find tree crowns at sites that were not trained on?

    python experiments/trees.py --data data/dense/trees --more data/imagenet-samples    all configurations and seeds
    make results                                                                        results/README.md from the logs

results/ was made with OMP_NUM_THREADS=1. There are four aerial photographs with boxes: detectors are trained on the
two of site YELL and tested on the two of OSBS and SOAP. Pre-training sees the training photographs, in tiles, and the
photographs below --more, for equal times by the speeds of results/dense/speed-trees.json. A detector that --minutes
interrupts starts from scratch, because detect.py saves no checkpoints.
"""

import argparse
from pathlib import Path

from PIL import Image
from study import DENSE, Step, add_flags, build_folder, link, pretrain_command, run_study, words

from engine.dist import run_main

SEEDS = (0, 1, 2)
EPOCHS = 40  # of eesmm's pre-training
TILE = 256  # side of a tile of a training photograph, in pixels
COMMON = (
    "--recipe small --model swin_nano --image-size 64 --window 8 --crop-scale 0.05 0.3 --batch-size 20 --base-lr 3e-2 "
    "--warmup-epochs 2 --log-every 100 --eval-images 32"
)
DETECT = "--test OSBS* SOAP* --one-class tree --window 8 --tile 160 --steps 200 --batch-size 4"
VARIANTS = {"scratch": None, "greenmim": "greenmim", "eesmm": "eesmm"}  # the method of pre-training


def prepare(photographs: Path, more: Path, target: Path):
    """Make the folder of pre-training.

    train/ holds tiles of the training photographs and links to the photographs below `more`; val/ links to the test
    photographs.

    Args:
        photographs: folder of the aerial photographs.
        more: folder of other photographs.
        target: folder to make.
    """

    def build(building: Path):
        tiles = building / "train" / "tiles"
        tiles.mkdir(parents=True)
        for path in sorted(photographs.glob("*YELL*.png")):
            image = Image.open(path).convert("RGB")
            for top in range(0, image.height - TILE + 1, TILE):
                for left in range(0, image.width - TILE + 1, TILE):
                    tile = image.crop((left, top, left + TILE, top + TILE))
                    tile.save(tiles / f"{path.stem}-{top}-{left}.png")
        for path in more.rglob("*"):
            if path.suffix.lower() in (".jpg", ".jpeg"):
                link(path, building / "train" / "more" / path.name)
        for path in photographs.glob("*.png"):
            if "YELL" not in path.name:
                link(path, building / "val" / "photographs" / path.name)

    build_folder(target, build)


def steps(args: argparse.Namespace, variant: str, seed: int) -> list[Step]:
    """Pre-training, if the configuration has any, and detection."""
    method, name, start = VARIANTS[variant], f"{variant}-seed{seed}", None
    if method:
        command = pretrain_command("trees", args.prepared, COMMON, method, EPOCHS, seed)
        start = Step(command, args.output / f"pretrain-{name}", DENSE / "trees" / f"pretrain-{name}.jsonl")
    network = ("--checkpoint", start.folder / "last.pt") if start else ("--model swin_nano",)
    command = words("experiments/detect.py --data", args.data, DETECT, *network, "--seed", seed)
    record = DENSE / "trees" / f"{name}.json"
    detection = Step(command, args.output / name, record, pretraining=start, resumable=False)
    return [start, detection] if start else [detection]


def groups(args: argparse.Namespace):
    prepare(args.data, args.more, args.prepared)
    for seed in args.seeds:
        for variant in args.arms:
            yield steps(args, variant, seed)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default, text in (
        ("--data", "data/dense/trees", ""),
        ("--more", "data/imagenet-samples", ""),
        ("--prepared", "data/trees", "where tiles and links are made; "),
    ):
        parser.add_argument(flag, type=Path, default=Path(default), help=f"{text}default: {default}")
    parser.add_argument("--arms", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add_flags(parser, "runs/trees", SEEDS, "default: 0 1 2")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    return run_study(groups(args), args)


if __name__ == "__main__":
    run_main(main)
