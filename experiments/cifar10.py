"""The study behind results/cifar10: does superposition pay, at equal epochs and at equal time?

    python experiments/cifar10.py --data data/cifar10 --scale cpu            all arms and seeds, in the order of STUDIES
    python experiments/cifar10.py --data data/cifar10 --scale cpu --minutes 9    as far as nine minutes lead; go on later
    make results                                                             results/README.md from the logs

Equal time, and equal time four times as long, go by the speeds of results/cifar10/speed-SCALE-*.json,
measured side by side beforehand (results/README.md has the commands): wall times of runs on a shared machine would say
more about its other users.

Each arm is an ordinary train.py command followed by ordinary finetune.py commands; their log.jsonl and config.json (which
holds command, seed, commit, versions, device) are copied to results/cifar10/ARM/seedN/PHASE when the phase is complete.
What is there is not run again; what was interrupted goes on from its checkpoint under --output.
"""
import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "cifar10"
IMAGES = 50_000

SCALES = {  # what a machine can finish; everything is equal for all arms but the learning rate from scratch
    "cpu": dict(model="swin_nano", epochs=4,
                pretrain="--batch-size 128 --base-lr 4e-3 --warmup-epochs 0.5 --decoder-width 128 --eval-images 1024",
                labels=0.2, finetune="--batch-size 64 --warmup-epochs 0.5 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 "
                         "--drop-path 0 --eval-every 99 --log-every 20",
                finetune_epochs=5, lr=8e-3, scratch_lr=4e-3),
    "gpu": dict(model="swin_micro", epochs=100,
                pretrain="--batch-size 512 --base-lr 2e-3 --warmup-epochs 5 --eval-images 2000",
                labels=0.2, finetune="--batch-size 256 --warmup-epochs 5 --randaugment 0 --eval-every 10",
                finetune_epochs=50, lr=2e-3, scratch_lr=2e-3),
}
SPLIT = "--method eesmm --decomposition split"
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
    "eesmm split all, 3 sources": f"{SPLIT} --loss-units all --sources 3",
    "eesmm split all, fixed 0.7 0.3": f"{SPLIT} --loss-units all --assignment fixed --weights 0.7 0.3",
    "eesmm split all, independent masks": f"{SPLIT} --loss-units all --masks independent",
    "eesmm split all, 4 sources, ratio 0": f"{SPLIT} --loss-units all --sources 4 --mask-ratio 0",
}
ABLATIONS = {  # Fig. 4 and Table 3; the overlay removed is greenmim, ratio 0.75 and one block are "eesmm split"
    **{f"eesmm split, ratio {ratio}": f"{SPLIT} --mask-ratio {ratio}" for ratio in (0.5, 0.6, 0.7, 0.8, 0.9)},
    **{f"eesmm split, {blocks} decoder blocks": f"{SPLIT} --decoder-blocks {blocks}" for blocks in (2, 4, 8)},
}
ARMS = MAIN | LEVERS | ABLATIONS
STUDIES = {  # (arms, seeds), in order of importance
    "equal epochs": (list(MAIN), (0, 1, 2)),
    "equal time": (["greenmim", "scratch", "simmim"], (0, 1, 2)),
    "four times as long": (["eesmm split all", "greenmim", "scratch"], (0,)),
    "levers": (list(LEVERS), (0,)),
    "ablations": (list(ABLATIONS), (0,)),
}
TIMED = {"equal time": 1, "four times as long": 4}  # studies that give all arms one time: eesmm's, so many times


class Stopped(Exception):
    """A signal or the end of --minutes, after the running command has saved its state."""


def slug(arm: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", arm)


def folder(study: str, arm: str, seed: int) -> Path:
    """Below results/cifar10 and --output. eesmm's equal-time arms are its equal-epochs arms."""
    return Path(slug(arm) + (f"-{slug(study)}" if study in TIMED else "")) / f"seed{seed}"


def speed(scale: str, method: str) -> float:
    """Source images/s of a method's training steps, measured side by side (commands at the top); "dense" is fine-tuning."""
    rows = [row for name in ("pretrain", "finetune") for row in json.loads((RESULTS / f"speed-{scale}-{name}.json").read_text())["rows"]]
    return next(row["source_images_per_second"] for row in rows if row["method"] == method and row.get("mode") != "inference")


def epochs(args, study: str, arm: str) -> tuple[float, float]:
    """(pre-training epochs, fine-tuning epochs). In equal time, each gets what eesmm's pre-training takes."""
    scale = SCALES[args.scale]
    before, after = (TIMED.get(study, 1) * scale[name] for name in ("epochs", "finetune_epochs"))
    if study not in TIMED:
        return (0 if arm == "scratch" else before), after
    seconds = before * IMAGES / speed(args.scale, "eesmm")
    if arm != "scratch":
        return round(seconds * speed(args.scale, arm.split()[0]) / IMAGES, 2), after
    return 0, round(after + seconds * speed(args.scale, "dense") / (scale["labels"] * IMAGES), 2)


def phases(args, study: str, arm: str, seed: int):
    """(name, command) of each phase, the run folder left out."""
    scale, (before, after) = SCALES[args.scale], epochs(args, study, arm)
    data = ["--data", args.data, "--in-memory", "--cache", args.cache, "--device", args.device, "--seed", str(seed)]
    start = ["--init", "scratch", "--model", scale["model"], "--base-lr", f"{scale['scratch_lr']:g}"]
    if ARMS[arm]:
        yield "pretrain", ["train.py", *data, "--recipe", "cifar", "--model", scale["model"], "--epochs", f"{before:g}",
                           *scale["pretrain"].split(), *ARMS[arm].split()]
        start = ["--checkpoint", str(args.output / folder(study, arm, seed) / "pretrain" / "last.pt"), "--base-lr", f"{scale['lr']:g}"]
    yield "finetune", ["finetune.py", *data, *start, "--labels", f"{scale['labels']}", "--epochs", f"{after:g}", *scale["finetune"].split()]
    if ARMS[arm] and study not in TIMED:
        for protocol in ("linear", "knn"):
            yield protocol, ["finetune.py", *data, "--protocol", protocol, *start[:2], "--labels", f"{scale['labels']}"]


def execute(command: list[str], deadline: float, quiet: bool):
    """Run to the end, or until the deadline, when the command is asked to save and stop."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None)
    try:
        status = process.wait(max(1.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Stopped):
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise Stopped from None
    if status == 75:
        raise Stopped
    if status:
        sys.exit(f"status {status}: {' '.join(command)}")


def run(args, study: str, arm: str, seed: int, deadline: float):
    """All phases of one arm and seed that are not in results/ yet."""
    where = folder(study, arm, seed)
    for name, command in phases(args, study, arm, seed):
        output, target = args.output / where / name, RESULTS / where / name
        if (target / "log.jsonl").exists():
            continue
        if name in ("linear", "knn"):  # they save nothing on the way
            shutil.rmtree(ROOT / output, ignore_errors=True)
        print(f"{time.strftime('%H:%M:%S')} {study}: {where / name}", flush=True)
        execute([*command, "--output", str(output), *(["--resume", "auto"] if name in ("pretrain", "finetune") else [])], deadline, args.quiet)
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "log.jsonl"):  # the log last: it says that the phase is complete
            shutil.copy(ROOT / output / file, target / file)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/cifar10", help="CIFAR-10 as class folders of images; default: data/cifar10")
    parser.add_argument("--cache", default="data/cache", help="decoded images are kept there; default: data/cache")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"), help="run folders; default: runs/cifar10")
    parser.add_argument("--scale", choices=SCALES, required=True, help="what the machine can finish")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all, in order")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="only these of each study; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of each study")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then, after saving; default: never")
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(Stopped()))
    try:
        for study in args.studies:
            arms, seeds = STUDIES[study]
            for seed in args.seeds or seeds:  # a whole table for one seed before the next
                for arm in filter(args.arms.__contains__, arms):
                    run(args, study, arm, seed, deadline)
    except Stopped:
        print("stopped; the same command goes on from here")
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
