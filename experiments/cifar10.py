"""The study behind results/cifar10: does superposition pay, at equal epochs and at equal time?

    python experiments/cifar10.py --data data/cifar10 --scale cpu            all arms and seeds, in the order of STUDIES; results/ was made
                                                                             with OMP_NUM_THREADS=1 and --device cpu
    python experiments/cifar10.py --data data/cifar10 --scale cpu --minutes 9    as far as nine minutes lead; go on later
    python experiments/cifar10.py --scale cpu --device cpu --speeds          the speeds of the frontier's arms, taking turns; nothing else
    make results                                                             results/README.md from the logs

Equal time goes by the speeds of results/cifar10/speed-SCALE-*.json, measured side by side beforehand (results/README.md
has the commands): wall times of runs on a shared machine would say more about its other users.

Each arm is an ordinary train.py command followed by ordinary finetune.py commands, its phases. When one is complete it is
written to results/cifar10/SCALE/ARM/seedN.jsonl: a line {"phase": ..., "config": ...} (command, seed, commit, versions,
device), then its log's lines. What is there is not run again; what was interrupted goes on from its checkpoint under --output.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import train  # noqa: E402
from engine import dist, runs, timing  # noqa: E402
from engine.files import write_atomically  # noqa: E402

RESULTS = ROOT / "results" / "cifar10"
IMAGES = 50_000

SCALES = {  # what a machine can finish; equal for all arms, but for the learning rate and layer decay from scratch
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
    "eesmm split all, 3 sources": f"{SPLIT} --loss-units all --sources 3 --batch-size 126",  # a multiple of 3
    "eesmm split all, fixed 0.7 0.3": f"{SPLIT} --loss-units all --assignment fixed --weights 0.7 0.3",
    "eesmm split all, independent masks": f"{SPLIT} --loss-units all --masks independent",
    "eesmm split all, 4 sources, ratio 0": f"{SPLIT} --loss-units all --sources 4 --mask-ratio 0",
}
ABLATIONS = {  # Fig. 4 and Table 3; the overlay removed is greenmim, ratio 0.75 and one block are "eesmm split"
    **{f"eesmm split, ratio {ratio}": f"{SPLIT} --mask-ratio {ratio}" for ratio in (0.5, 0.6, 0.7, 0.8, 0.9)},
    **{f"eesmm split, {blocks} decoder blocks": f"{SPLIT} --decoder-blocks {blocks}" for blocks in (2, 4, 8)},
}
RATES = {  # half and twice the rate of all other runs
    f"{arm}, rate {rate}": f"{MAIN[arm]} --base-lr {rate}"
    for arm in ("greenmim", "eesmm split all")
    for rate in ("2e-3", "8e-3")
}
BASELINES = {  # given what might have held them back: twice the steps, at the same peak rate; from scratch twice the rate
    "greenmim, batch 64": "--method greenmim --batch-size 64 --base-lr 8e-3",
    "eesmm split all, batch 64": f"{SPLIT} --loss-units all --batch-size 64 --base-lr 8e-3",
    "scratch, rate 8e-3": None,
}
FINETUNING = {"scratch, rate 8e-3": ["--base-lr", "8e-3"]}  # further flags of finetune.py
FRONTIER = (
    {  # (sources, ratio): equal work of the encoder is equally many visible units for each source image, of the 16
        f"greenmim, ratio {ratio}": f"--method greenmim --mask-ratio {ratio}" for ratio in (0.875, 0.9375)
    }
    | {
        f"greenmim all, ratio {ratio}": f"--method greenmim --loss-units all --mask-ratio {ratio}"
        for ratio in (0.875, 0.9375)
    }
    | {
        "eesmm split all, ratio 0.875": f"{SPLIT} --loss-units all --mask-ratio 0.875",
        "eesmm split all, 3 sources, ratio 0.625": f"{SPLIT} --loss-units all --sources 3 --batch-size 126 --mask-ratio 0.625",
        "eesmm split all, 3 sources, ratio 0.8125": f"{SPLIT} --loss-units all --sources 3 --batch-size 126 --mask-ratio 0.8125",
        "eesmm split all, 4 sources, ratio 0.5": f"{SPLIT} --loss-units all --sources 4 --mask-ratio 0.5",
    }
)
LASTING = {  # four times as long, so in batches of 64: what more steps give must not be what a longer run gives
    f"{arm}, batch 64": f"{(LEVERS | FRONTIER)[arm]} --batch-size 64 --base-lr 8e-3"
    for arm in (
        "eesmm split all, ratio 0.5",
        "greenmim, ratio 0.875",
        "greenmim all, ratio 0.875",
        "eesmm split all, 4 sources, ratio 0.5",
    )
}
FAMILY = {
    "mixmae": "--method mixmae",
    "mae on vit": "--method mae --model vit_micro",
}  # the other methods, each with the encoder it was made for
SHARES = {
    "scratch": 0,
    "scratch, rate 8e-3": 0,
    "eesmm split all, half": 0.5,
    "greenmim, half": 0.5,
    "greenmim, batch 64, half": 0.5,
    "simmim, half": 0.5,
    **{f"{arm}, half": 0.5 for arm in FAMILY},
}  # of the usual time of pre-training; the rest goes to fine-tuning
ARMS = MAIN | LEVERS | ABLATIONS | RATES | BASELINES | FRONTIER | LASTING | FAMILY
ARMS |= {arm: ARMS[arm.removesuffix(", half")] for arm in SHARES}


class Study(NamedTuple):
    """A table of the results. times: 0, equal epochs, `length` times the usual ones; else all arms get as much time as so many of eesmm's usual runs.
    other: seeds of arms that have others. validation: judged on one in ten of the training images, which are not trained on."""

    arms: list[str]
    seeds: tuple[int, ...]
    times: int
    text: str
    other: dict[str, tuple[int, ...]] = {}
    length: int = 1
    validation: bool = False

    def runs(self) -> list[tuple[int, str]]:
        """(seed, arm) of every run: the whole table for one seed before the next."""
        found = [(seed, arm) for arm in self.arms for seed in self.other.get(arm, self.seeds)]
        return sorted(found, key=lambda run: run[0])


STUDIES = {  # in order of importance
    "equal epochs": Study(list(MAIN), (0, 1, 2), 0, "Every arm sees as many images."),
    "equal time": Study(
        list(MAIN),
        (0, 1, 2),
        1,
        "Every arm gets the time that eesmm takes for its pre-training and fine-tuning, by the speeds "
        "above; from scratch, all of it goes into fine-tuning. The eesmm arms are those of the table above.",
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
        "Blending against hiding more, at equal epochs: one image of which fewer units are visible, or more images in a blend. A source image "
        "has 16 units. Four of them are encoded for each in the first two arms, two in the next four, one in the four after those. The last two, with two units and one, are controls: of one image, too, the error of all units counts.",
        {
            arm: (0, 1, 2, 3, 4)
            for arm in (
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
        "Equal epochs, pre-training and fine-tuning four times as long as above, all in batches "
        "of 64. Four units of each source image are encoded in the first two arms, two in the others.",
        length=4,
    ),
    "levers": Study(
        ["greenmim", "eesmm split", "eesmm split all", *LEVERS],
        (0,),
        0,
        "What might make superposition win, one thing at a time, "
        "and controls, at equal epochs. The work of an image differs: see its column.",
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
        "Equal time, taking the speeds above for both sizes of batch. A batch counts source images, so at equal time greenmim "
        "makes fewer steps than eesmm, 987 against 1560. Batch 64: twice the steps, at the same peak rate. Half: the division of the "
        "time above. Scratch, whose rate was tuned at the length of equal epochs, also has twice that rate.",
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
                arm + half
                for arm in ("eesmm split all", "greenmim, batch 64", "mixmae", "mae on vit", "simmim")
                for half in ("", ", half")
            ),
        ],
        (0,),
        1,
        "Equal time. How each method divides it is chosen here, not on the test images: of the training images of each class one in ten is judged and not "
        "trained on. Half: half of the usual time of pre-training, the rest for fine-tuning.",
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
        "Fig. 4 and Table 3 at this scale. greenmim is the overlay removed; eesmm split has "
        "ratio 0.75 and one decoder block. At 32 px an image has 16 units: ratios 0.5 to 0.9 leave 8, 6, 5, 3, 2 visible, 0.75 four.",
    ),
    "rate of pre-training": Study(
        ["greenmim", "eesmm split all", *RATES],
        (0,),
        0,
        "Half and twice the base learning rate of pre-training that all other tables use, 4e-3.",
    ),
}


class Stopped(Exception):
    """A signal or the end of --minutes, after the running command has saved its state."""


def slug(arm: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", arm)


def folder(study: str, arm: str, seed: int) -> Path:
    """Below results/cifar10/SCALE and --output. Arms that stand in several tables with the same epochs run once."""
    times = STUDIES[study].times
    suffix = (
        f"-{slug(study)}"
        if max(times, STUDIES[study].length) > 1 or STUDIES[study].validation
        else "-equal-time"
        if times and not arm.startswith("eesmm")
        else ""
    )
    return Path(slug(arm) + suffix) / f"seed{seed}"


def speeds(scale: str, name: str, command: str) -> list[dict]:
    """The rows of speed-SCALE-NAME.json; ends with one line, which has the command that measures them, if they are missing."""
    path = RESULTS / f"speed-{scale}-{name}.json"
    if not path.exists():
        print(
            f"cifar10.py: error: equal time needs {path}, speeds measured on this machine: python {command.format(path=path)}",
            file=sys.stderr,
        )
        sys.exit(2)
    return json.loads(path.read_text())["rows"]


def speed(scale: str, method: str, model: str | None = None) -> float:
    """Source images/s of a method's training steps, measured side by side; "dense" is fine-tuning. What these two files lack (model: another
    than the scale's) has the ratio to eesmm, for "dense" to that of the scale's model, that speed-SCALE-family.json gives it."""
    if method in ("mixmae", "mae") or model not in (None, SCALES[scale]["model"]):
        rows = speeds(scale, "family", f"experiments/cifar10.py --scale {scale} --speeds family")
        usual, own = (
            next(
                row["source_images_per_second"]
                for row in rows
                if row["method"] == name and row["model"] in (of or row["model"])
            )
            for name, of in (("dense" if method == "dense" else "eesmm", SCALES[scale]["model"]), (method, model))
        )
        return speed(scale, "dense" if method == "dense" else "eesmm") * own / usual
    rows = []
    for name, flags in (("pretrain", "--no-memory"), ("finetune", "--dense")):
        rows += speeds(
            scale,
            name,
            f"bench.py {flags} --model {SCALES[scale]['model']} --image-size 32 --window 4 --batch-size N --output {{path}}",
        )
    return next(
        row["source_images_per_second"] for row in rows if row["method"] == method and row.get("mode") != "inference"
    )


def pretraining(scale: str, arm: str):
    """train.py's arguments of an arm, but for what depends on length, seed and place."""
    values = SCALES[scale]
    return train.arguments(
        ["--recipe", "cifar", "--model", values["model"], *values["pretrain"].split(), *ARMS[arm].split()]
    )


def measure_speeds(scale: str, device: str, name: str, rounds: int = 20):
    """Write speed-SCALE-NAME.json: training steps side by side of the frontier's arms, or of the family's and fine-tuning."""
    one = dist.initialize(device, "auto")
    cases = [timing.matmul_case(one)]
    for arm in STUDIES["frontier"].arms if name == "frontier" else ["eesmm split all", *FAMILY]:
        cases.append(bench.method_case(pretraining(scale, arm), one))
        cases[-1].row["arm"] = arm
    for model in (SCALES[scale]["model"], "vit_micro") if name == "family" else ():
        args = train.arguments(["--recipe", "cifar", "--model", model, "--batch-size", "64"])
        cases.append(bench.dense_cases(args, one)[0])
        cases[-1].row["arm"] = f"fine-tuning of {model}"
    timing.interleave(cases, one.device, rounds)
    result = {
        "machine": timing.describe_machine(one.device),
        **runs.provenance(sys.argv),
        "versions": dist.versions(),
        "rows": timing.finished_rows(cases),
    }
    write_atomically(
        RESULTS / f"speed-{scale}-{name}.json", lambda file: file.write((json.dumps(result, indent=1) + "\n").encode())
    )


def method(arm: str) -> str:
    return arm.split()[0].strip(",")


def model(scale: str, arm: str) -> str:
    return pretraining(scale, arm).model if ARMS[arm] else SCALES[scale]["model"]


def epochs(scale: str, study: str, arm: str) -> tuple[float, float]:
    """(pre-training epochs, fine-tuning epochs). In equal time, what pre-training does not take of eesmm's goes to fine-tuning."""
    times, values = STUDIES[study].times, SCALES[scale]
    before, after = (max(times, 1) * STUDIES[study].length * values[name] for name in ("epochs", "finetune_epochs"))
    if not times:
        return (before if ARMS[arm] else 0), after
    seconds, share, labelled = before * IMAGES / speed(scale, "eesmm"), SHARES.get(arm, 1), values["labels"] * IMAGES
    after = (
        (after * labelled / speed(scale, "dense") + (1 - share) * seconds)
        * speed(scale, "dense", model(scale, arm))
        / labelled
    )
    return round(share * seconds * speed(scale, method(arm)) / IMAGES, 2) if share else 0, round(after, 2)


def phases(args, study: str, arm: str, seed: int):
    """(name, command) of each phase, the run folder left out."""
    scale, (before, after) = SCALES[args.scale], epochs(args.scale, study, arm)
    data = [
        "--data",
        str(args.output / "validation" if STUDIES[study].validation else args.data),
        "--in-memory",
        "--cache",
        args.cache,
        "--device",
        args.device,
        "--seed",
        str(seed),
    ]
    start, lr = ["--init", "scratch", "--model", scale["model"]], scale["scratch_lr"]
    if ARMS[arm]:
        yield (
            "pretrain",
            [
                "train.py",
                *data,
                "--recipe",
                "cifar",
                "--model",
                scale["model"],
                "--epochs",
                f"{before:g}",
                "--warmup-epochs",
                f"{scale['warmup'] * before:.4g}",
                *scale["pretrain"].split(),
                *ARMS[arm].split(),
            ],
        )
        start, lr = ["--checkpoint", str(args.output / folder(study, arm, seed) / "pretrain" / "last.pt")], scale["lr"]
    yield (
        "finetune",
        [
            "finetune.py",
            *data,
            *start,
            "--base-lr",
            f"{lr:g}",
            "--labels",
            f"{scale['labels']}",
            "--epochs",
            f"{after:g}",
            *scale["finetune"].split(),
            *FINETUNING.get(arm, []),
        ],
    )
    if not STUDIES[study].validation and (
        ARMS[arm] or not STUDIES[study].times
    ):  # random features do not depend on the time
        for protocol in ("linear", "knn"):
            yield protocol, ["finetune.py", *data, "--protocol", protocol, *start, "--labels", f"{scale['labels']}"]


def build_folder(target: Path, build):
    """A folder of prepared data: build(new folder) fills it, and it takes its name only when it is complete and marked by an empty file `whole`.

    A folder with the mark is used as it is. One line on stderr and exit status 2 for any other folder that holds something: nothing in it is touched.
    """
    if (target / "whole").exists():
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        print(
            f"{Path(sys.argv[0]).name}: error: {target} already exists and was not made by this program; give a new folder",
            file=sys.stderr,
        )
        sys.exit(2)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as place:
        new = Path(place) / target.name
        new.mkdir()
        build(new)
        (new / "whole").touch()
        new.replace(target)


def validation_part(data: Path, folder: Path):
    """A folder of links for the choice of settings: test/ is one in ten of the training images of each class, train/ are the others."""
    if folder.exists():
        return
    classes = sorted(path for path in (data / "train").glob("*") if path.is_dir())
    if not classes:
        print(
            f"cifar10.py: error: {data} has no class folders in train/, of which a part could be held out for validation",
            file=sys.stderr,
        )
        sys.exit(2)

    def build(new: Path):
        for of in classes:
            for k, path in enumerate(sorted(of.iterdir())):
                link = new / ("train" if k % 10 else "test") / of.name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())

    build_folder(folder, build)


def settings(words: list[str]) -> dict[str, list[str]]:
    """The flags of a command and their values, but for those that say where things are."""
    found = {}
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        elif found:
            found[name].append(word)
    return {
        name: values
        for name, values in found.items()
        if name not in ("--data", "--cache", "--device", "--output", "--resume", "--checkpoint")
    }


def recorded(path: Path) -> dict[str, tuple[dict, list[dict]]]:
    """{phase: (its config, its log)} of one arm and seed, as far as they are complete."""
    phases = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "phase" in row:
            config, rows = phases[row["phase"]] = row["config"], []
        else:
            rows.append(row)
    return phases


def record(path: Path, phase: str, run_folder: Path):
    """Write a complete phase, from its run folder, into the file of its arm and seed; whole or not at all."""
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    phases = recorded(path) | {phase: (json.loads((run_folder / "config.json").read_text()), log)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path,
        lambda file: [
            file.write((json.dumps(line) + "\n").encode())
            for name, (config, rows) in phases.items()
            for line in ({"phase": name, "config": config}, *rows)
        ],
    )


def same_settings(path: Path, phase: str, config: dict, command: list[str]):
    """Ends with one line if a recorded phase was run with other settings than the study has now."""
    before, now = settings(config["command"].split()), settings(command)
    for name in before | now:
        if before.get(name) != now.get(name):
            was, is_ = (" ".join(values.get(name, ["unset"])) for values in (before, now))
            print(
                f"{Path(sys.argv[0]).name}: error: {path}: {phase} was run with {name} {was}, the study now has {is_}; move the file away to run it again",
                file=sys.stderr,
            )
            sys.exit(2)


def to_do(path: Path, phases) -> list[tuple[str, list[str]]]:
    """Those (name, command) of `phases` that are not recorded; recorded ones must have been run with these commands."""
    done, missing = recorded(path), []
    for name, command in phases:
        if name in done:
            same_settings(path, name, done[name][0], command)
        else:
            missing.append((name, command))
    return missing


def execute(command: list[str], deadline: float, quiet: bool):
    """Run to the end, or until the deadline, when the command is asked to save and stop."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=errors if quiet else None)
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt, Stopped):
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise Stopped from None
        if status == 75:
            raise Stopped
        if status:
            errors.seek(0)
            sys.exit("\n".join([*errors.read().splitlines()[-1:], f"status {status}: {' '.join(command)}"]))


def run(args, study: str, arm: str, seed: int, deadline: float):
    """All phases of one arm and seed that are not in results/ yet."""
    where = folder(study, arm, seed)
    path = RESULTS / args.scale / f"{where}.jsonl"
    todo = to_do(path, phases(args, study, arm, seed))
    if todo and STUDIES[study].validation:
        validation_part(ROOT / args.data, ROOT / args.output / "validation")
    if (
        todo
        and todo[0][0] != "pretrain"
        and ARMS[arm]
        and not (ROOT / args.output / where / "pretrain" / "last.pt").exists()
    ):
        todo.insert(0, next(phases(args, study, arm, seed)))  # its log is here, its weights are on another machine
    for name, command in todo:
        output = args.output / where / name
        if (
            name in ("linear", "knn") and runs.run_config(ROOT / output).get("kind") == name
        ):  # they save nothing on the way
            shutil.rmtree(ROOT / output, ignore_errors=True)
        print(f"{time.strftime('%H:%M:%S')} {study}: {where / name}", flush=True)
        execute(
            [*command, "--output", str(output), *(["--resume", "auto"] if name in ("pretrain", "finetune") else [])],
            deadline,
            args.quiet,
        )
        record(path, name, ROOT / output)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        default="data/cifar10",
        help="CIFAR-10 as class folders of images, or cifar10 if downloaded before; default: data/cifar10",
    )
    parser.add_argument("--cache", default="data/cache", help="decoded images are kept there; default: data/cache")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"), help="run folders; default: runs/cifar10")
    parser.add_argument("--scale", choices=SCALES, required=True, help="what the machine can finish")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all, in order")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help="only these of each study; default: all",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of each study; default: all")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then, after saving; default: never")
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument(
        "--speeds",
        nargs="?",
        const="frontier",
        choices=("frontier", "family"),
        help="only measure how fast the frontier's arms are trained here, or the family's",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Stopped


def main(argv=None) -> int:
    args = arguments(argv)
    if args.speeds:
        measure_speeds(args.scale, args.device, args.speeds)
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, stop)
    try:
        for study in args.studies:
            for seed, arm in STUDIES[study].runs():
                if arm in args.arms and seed in (args.seeds or (seed,)):
                    run(args, study, arm, seed, deadline)
    except Stopped:
        print("stopped; the same command goes on from here")
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
