"""The study of trees behind results/dense: does pre-training help to find tree crowns at sites that were not trained on?

    python experiments/trees.py --data data/dense/trees --more data/imagenet-samples    all arms and seeds; results/ was made with OMP_NUM_THREADS=1
    make results                                                                        results/README.md from the logs

Four aerial photographs with boxes: trained on the two of site YELL, tested on the two of OSBS and SOAP. Pre-training sees the training photographs, in tiles, and the
photographs below --more, for equal times by the speeds of results/dense/speed-trees.json. What is in results/dense/trees is not run again.
"""

import argparse
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cifar10 import Stopped, build_folder, execute, record, stop, to_do  # noqa: E402
from nuclei import PRETRAIN, RESULTS, link, speed  # noqa: E402

from engine.files import write_atomically  # noqa: E402

SEEDS, EPOCHS, TILE = (0, 1, 2), 40, 256
COMMON = (
    "--recipe small --model swin_nano --image-size 64 --window 8 --crop-scale 0.05 0.3 --batch-size 20 --base-lr 3e-2 --warmup-epochs 2 --log-every 100 "
    "--eval-images 32"
)
DETECT = "--test OSBS* SOAP* --one-class tree --window 8 --tile 160 --steps 200 --batch-size 4"
ARMS = {"scratch": None, "greenmim": "greenmim", "eesmm": "eesmm"}


def prepare(photographs: Path, more: Path, target: Path):
    """train/: tiles of the training photographs, and links to the photographs below `more`; val/: the test photographs."""
    build_folder(target, lambda new: fill(photographs, more, new))


def fill(photographs: Path, more: Path, target: Path):
    for path in sorted(photographs.glob("*YELL*.png")):
        image = Image.open(path).convert("RGB")
        for top in range(0, image.height - TILE + 1, TILE):
            for left in range(0, image.width - TILE + 1, TILE):
                place = target / "train" / "tiles" / f"{path.stem}-{top}-{left}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                image.crop((left, top, left + TILE, top + TILE)).save(place)
    for path in sorted(path for path in more.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        link(path, target / "train" / "more" / path.name)
    for path in sorted(photographs.glob("*.png")):
        if "YELL" not in path.name:
            link(path, target / "val" / "photographs" / path.name)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/dense/trees"), help="default: data/dense/trees")
    parser.add_argument(
        "--more", type=Path, default=Path("data/imagenet-samples"), help="default: data/imagenet-samples"
    )
    parser.add_argument(
        "--prepared", type=Path, default=Path("data/trees"), help="tiles and links are made there; default: data/trees"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/trees"), help="run folders; default: runs/trees")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="stop then; a detector that is not done begins anew; default: never"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, stop)
    prepare(args.data, args.more, args.prepared)
    try:
        for seed in args.seeds:
            for arm in args.arms:
                method, name = ARMS[arm], f"{arm}-seed{seed}"
                before, result = args.output / f"pretrain-{name}", RESULTS / "trees" / f"{name}.json"
                if method:
                    command = [
                        "train.py",
                        "--data",
                        str(args.prepared),
                        *COMMON.split(),
                        *PRETRAIN[method].split(),
                        "--epochs",
                        f"{EPOCHS * speed(method, 'trees') / speed('eesmm', 'trees'):.3g}",
                        "--seed",
                        str(seed),
                    ]
                    log = RESULTS / "trees" / f"pretrain-{name}.jsonl"
                    if (
                        to_do(log, [("run", command)])
                        or not result.exists()
                        and not (ROOT / before / "last.pt").exists()
                    ):
                        print(f"{time.strftime('%H:%M:%S')} pretrain-{name}", flush=True)
                        execute([*command, "--output", str(before), "--resume", "auto"], deadline, args.quiet)
                        record(log, "run", ROOT / before)
                if not result.exists():
                    print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
                    start = ["--checkpoint", str(before / "last.pt")] if method else ["--model", "swin_nano"]
                    if not (ROOT / args.output / name / "result.json").exists():
                        with suppress(
                            OSError
                        ):  # detect.py writes at its end: a folder that it left unfinished is empty
                            (ROOT / args.output / name).rmdir()
                        execute(
                            [
                                "experiments/detect.py",
                                "--data",
                                str(args.data),
                                *DETECT.split(),
                                *start,
                                "--seed",
                                str(seed),
                                "--output",
                                str(args.output / name),
                            ],
                            deadline,
                            args.quiet,
                        )
                    found = json.loads((ROOT / args.output / name / "result.json").read_text())
                    result.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(
                        result,
                        lambda file: file.write(
                            (
                                json.dumps({key: value for key, value in found.items() if key != "boxes"}, indent=1)
                                + "\n"
                            ).encode()
                        ),
                    )
    except Stopped:
        print("stopped; the same command goes on from here")
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
