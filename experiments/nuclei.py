"""The study of nuclei behind results/dense: does pre-training on unlabelled slices help to find nuclei in another microscope's image?

    python experiments/nuclei.py --data data/dense               all arms and seeds; results/ was made with OMP_NUM_THREADS=1
    python experiments/nuclei.py --data data/dense --minutes 9   as far as nine minutes lead; go on later
    make results                                                 results/README.md from the logs

--data holds nuclei/: `b_image.tif`, a stack of 60 slices, and `a_image.tif`, one image of another microscope, both with instance labels. Trained on slices of
b, tested on a. Pre-training sees all 60 slices, without labels, for equal times by the speeds of results/dense/speed-nuclei.json. Each command's log is written
to results/dense/nuclei/NAME.jsonl once it is complete; what is there is not run again.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cifar10 import Stopped, build_folder, execute, record, stop, to_do  # noqa: E402

RESULTS = ROOT / "results" / "dense"
SEEDS, SIZES, ENTRIES, EPOCHS = (
    (0, 1, 2),
    (1, 3, 10, 30),
    240,
    60,
)  # ENTRIES: of a training folder, slices repeated; EPOCHS: of eesmm's pre-training
PIXELS = "--channels 1 --value-range p1,p99"
PRETRAIN = {"greenmim": "--method greenmim", "eesmm": "--method eesmm --decomposition split --loss-units all"}
COMMON = (
    f"{PIXELS} --pages images --recipe small --model swin_nano --image-size 64 --window 8 --crop-scale 0.0625 0.25 --batch-size 20 --base-lr 3e-2 "
    "--warmup-epochs 2 --log-every 100"
)
SEGMENT = f"{PIXELS} --foreground --classes 2 --model swin_nano --image-size 64 --window 8 --batch-size 16 --epochs 7 --warmup-epochs 0.7 --eval-every 7"
ARMS = {  # of segmentation: (flags, the arm of pre-training)
    "intensity alone": ("--protocol pixels --base-lr 1", None),
    "random encoder, frozen": ("--protocol frozen --init scratch", None),
    "greenmim, frozen": ("--protocol frozen", "greenmim"),
    "eesmm, frozen": ("--protocol frozen", "eesmm"),
    "scratch": ("--protocol finetune --init scratch", None),
    "greenmim": ("--protocol finetune", "greenmim"),
    "eesmm": ("--protocol finetune", "eesmm"),
}


PAIRS = (
    ("eesmm", "scratch"),
    ("greenmim", "scratch"),
    ("eesmm", "greenmim"),
    ("eesmm, frozen", "random encoder, frozen"),
    ("greenmim, frozen", "random encoder, frozen"),
)


def slug(arm: str) -> str:
    return arm.replace(",", "").replace(" ", "-")


def speed(method: str, study: str = "nuclei") -> float:
    """Source images/s of a method's training steps, measured side by side for a study."""
    rows = json.loads((RESULTS / f"speed-{study}.json").read_text())["rows"]
    return next(row["source_images_per_second"] for row in rows if row["method"] == method)


def prepare(source: Path, target: Path):
    """Folders of links: the stack ten times for pre-training; for each size so many labelled slices, evenly spread over those that hold nuclei, repeated to
    ENTRIES; the other microscope's image held out."""
    build_folder(target, lambda building: fill(source, target, building))


def fill(source: Path, target: Path, building: Path):
    """`prepare`'s folders in `building`, with links to where it will be."""
    image, labels = (tifffile.imread(source / "nuclei" / f"b_{kind}.tif") for kind in ("image", "instances"))
    held = [number for number in range(len(image)) if labels[number].any()]
    (building / "slices").mkdir(parents=True)
    for number in held:
        tifffile.imwrite(building / "slices" / f"image{number:02}.tif", image[number])
        tifffile.imwrite(building / "slices" / f"mask{number:02}.tif", labels[number].astype(np.uint16))
    for repeat in range(10):
        link(source / "nuclei" / "b_image.tif", building / "pretrain" / "train" / f"r{repeat}" / "b.tif")
    link(source / "nuclei" / "a_image.tif", building / "pretrain" / "val" / "a.tif")
    for size in SIZES:
        chosen = [held[int((k + 0.5) / size * len(held))] for k in range(size)]
        for kind, file in (("images", "image"), ("masks", "mask")):
            for repeat in range(ENTRIES // size):
                for number in chosen:
                    link(
                        target / "slices" / f"{file}{number:02}.tif",
                        building / f"labelled{size}" / "train" / kind / f"r{repeat}" / f"b{number:02}.tif",
                    )
            link(
                source / "nuclei" / f"a_{'image' if kind == 'images' else 'instances'}.tif",
                building / f"labelled{size}" / "val" / kind / "a.tif",
            )


def link(source: Path, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(source.absolute())


def commands(args) -> list[tuple[str, list[str]]]:
    """(name, command) of everything, the run folder left out, in order."""
    found = []
    for seed in args.seeds:
        for method, flags in PRETRAIN.items():
            epochs = EPOCHS * speed(method) / speed("eesmm")
            found.append(
                (
                    f"pretrain-{method}-seed{seed}",
                    [
                        "train.py",
                        "--data",
                        str(args.prepared / "pretrain"),
                        *COMMON.split(),
                        *flags.split(),
                        "--epochs",
                        f"{epochs:.3g}",
                        "--seed",
                        str(seed),
                    ],
                )
            )
        for size in SIZES:
            for arm, (flags, before) in ARMS.items():
                start = (
                    ["--checkpoint", str(args.output / f"pretrain-{before}-seed{seed}" / "last.pt")] if before else []
                )
                found.append(
                    (
                        f"{slug(arm)}-{size}-seed{seed}",
                        [
                            "segment.py",
                            "--data",
                            str(args.prepared / f"labelled{size}"),
                            *SEGMENT.split(),
                            *flags.split(),
                            *start,
                            "--seed",
                            str(seed),
                        ],
                    )
                )
    return found


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/dense"), help="default: data/dense")
    parser.add_argument(
        "--prepared",
        type=Path,
        default=Path("data/nuclei"),
        help="folders of links are made there; default: data/nuclei",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/nuclei"), help="run folders; default: runs/nuclei")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then, after saving; default: never")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, stop)
    prepare(args.data, args.prepared)
    try:
        for name, command in commands(args):
            path = RESULTS / "nuclei" / f"{name}.jsonl"
            again = (
                name.startswith("pretrain") and not (ROOT / args.output / name / "last.pt").exists()
            )  # its log is here, its weights are on another machine
            if not to_do(path, [("run", command)]) and not again:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            execute([*command, "--output", str(args.output / name), "--resume", "auto"], deadline, args.quiet)
            record(path, "run", ROOT / args.output / name)
            if not name.startswith("pretrain"):
                for file in ("last.pt", "previous.pt"):
                    (ROOT / args.output / name / file).unlink(missing_ok=True)
    except Stopped:
        print("stopped; the same command goes on from here")
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
