"""The runner of the studies: it runs their commands in order and records each log in results/.

A study is a list of steps. A step is one command of this repository with a run folder of its own. A step that is
recorded in results/ is not run again, and one that was interrupted resumes from its newest checkpoint.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.errors import UserError  # noqa: E402
from engine.files import run_config, write_atomically  # noqa: E402

# The studies of results/dense share these pre-training methods (flags of train.py) and folders.
PRETRAIN = {"greenmim": "--method greenmim", "eesmm": "--method eesmm --decomposition split --loss-units all"}
DENSE = ROOT / "results" / "dense"


@dataclass
class Step:
    """One command of a study.

    Args:
        command: words after "python", without --output and --resume.
        folder: run folder, relative to ROOT.
        record: file in results/ that the step is recorded in, which may hold several phases of one run. A .json file
            holds the result of detect.py.
        phase: name of the step in that file.
        pretraining: the step whose last.pt the command starts from.
        resumable: whether the program saves checkpoints on the way.
        keep_checkpoints: False deletes the checkpoints once the step is recorded.
    """

    command: list[str]
    folder: Path
    record: Path
    phase: str = "run"
    pretraining: "Step | None" = None
    resumable: bool = True
    keep_checkpoints: bool = True


def words(*parts) -> list[str]:
    """The words of a command: a string is split at spaces, anything else, such as a path, is one word."""
    return [word for part in parts for word in (part.split() if isinstance(part, str) else [str(part)])]


def slug(name: str) -> str:
    """The name of a configuration or a study as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name)


# ------------------------------------------------------------------------------------------------- speeds


def read_speed(path: Path, how: str, method: str, model: str | None = None) -> float:
    """Training speed of a method, measured side by side with other methods by bench.py.

    Args:
        path: file that bench.py wrote.
        how: where to find the command that writes this file, for the error message.
        method: as in the rows of the file; "dense" is fine-tuning.
        model: name of the network; None for the first one in the file.

    Returns:
        Source images per second.

    Raises:
        UserError: if the file does not exist.
    """
    if not path.exists():
        raise UserError(f"equal time needs {path}, which holds speeds measured on this machine: {how}")
    for row in json.loads(path.read_text())["rows"]:
        if row["method"] == method and row.get("mode") != "inference" and model in (None, row.get("model")):
            return row["source_images_per_second"]
    raise UserError(f"{path}: has no speed of {method} {model or ''}: {how}")


def pretrain_command(study: str, data: Path, flags: str, method: str, epochs: int, seed: int) -> list[str]:
    """The command of a pre-training run of results/dense that takes as much time as eesmm takes.

    Args:
        study: "nuclei" or "trees", whose speeds are used.
        data: folder of images.
        flags: further flags of train.py.
        method: key of PRETRAIN.
        epochs: of eesmm.
        seed: of the run.
    """
    path, how = DENSE / f"speed-{study}.json", "results/dense/README.md has the command"
    epochs = epochs * read_speed(path, how, method) / read_speed(path, how, "eesmm")
    return words("train.py --data", data, flags, PRETRAIN[method], "--epochs", f"{epochs:.3g}", "--seed", seed)


# ------------------------------------------------------------------------------------------------- prepared data


def build_folder(target: Path, build: Callable[[Path], None]):
    """Make a folder of prepared data, completely or not at all. A complete one is used as it is.

    Args:
        target: the folder. It is complete if it holds an empty file `whole`.
        build: is called with a temporary folder and fills it.

    Raises:
        UserError: if the folder holds anything else. It is left untouched.
    """
    if (target / "whole").exists():
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and was not made by this program; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        new = Path(temporary) / target.name
        new.mkdir()
        build(new)
        (new / "whole").touch()
        new.replace(target)


def link(source: Path, path: Path):
    """Make `path` a symbolic link to `source`, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(source.absolute())


# ------------------------------------------------------------------------------------------------- records


def recorded(path: Path) -> dict[str, tuple[dict, list[dict]]]:
    """The config and the log of each phase that a file in results/ holds, by the name of the phase."""
    if not path.exists():
        return {}
    if path.suffix == ".json":
        result = json.loads(path.read_text())
        return {"run": (result["config"], [result])}
    phases = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if "phase" in row:
            config, log = phases[row["phase"]] = row["config"], []
        else:
            log.append(row)
    return phases


def record(step: Step):
    """Write a complete step from its run folder into its file in results/. A step that is there is replaced."""
    folder = ROOT / step.folder
    if step.record.suffix == ".json":
        result = json.loads((folder / "result.json").read_text())
        del result["boxes"]
        text = json.dumps(result, indent=1) + "\n"
    else:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        config = json.loads((folder / "config.json").read_text())
        phases = recorded(step.record) | {step.phase: (config, log)}
        lines = []
        for phase, (config, log) in phases.items():
            lines += [{"phase": phase, "config": config}, *log]
        text = "".join(json.dumps(line) + "\n" for line in lines)
    step.record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(step.record, lambda file: file.write(text.encode()))


def settings(command: list[str]) -> dict[str, str]:
    """The flags of a command and their values, without flags that say where things are."""
    values = {}
    for word in command:
        if word.startswith("--"):
            name = word
            values[name] = []
        elif values:
            values[name].append(word)
    places = ("--data", "--cache", "--device", "--output", "--resume", "--checkpoint")
    return {name: " ".join(value) for name, value in values.items() if name not in places}


def check_settings(step: Step, config: dict):
    """UserError if a recorded step was run with other settings than the study has now.

    Args:
        step: as the study has it now.
        config: of the recorded run.
    """
    before, now = settings(config["command"].split()), settings(step.command)
    for name in before | now:
        old, new = before.get(name, "unset"), now.get(name, "unset")
        if old != new:
            raise UserError(
                f"{step.record}: {step.phase} was run with {name} {old}, the study now has {new}; "
                "move the file away to run it again"
            )


def to_do(steps: Iterable[Step]) -> list[Step]:
    """The steps that are not recorded. UserError if a recorded one was run with other settings."""
    missing = []
    for step in steps:
        phases = recorded(step.record)
        if step.phase in phases:
            check_settings(step, phases[step.phase][0])
        else:
            missing.append(step)
    return missing


# ------------------------------------------------------------------------------------------------- running


class Stopped(Exception):
    """SIGTERM, Ctrl-C or the end of --minutes, after the running command has saved its state."""


def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    raise Stopped


def execute(command: list[str], deadline: float, quiet: bool):
    """Run a command to its end.

    Args:
        command: words after "python".
        deadline: of time.monotonic(). SIGTERM then asks the command to save and stop.
        quiet: hide its stderr, which has the progress bars.

    Raises:
        Stopped: if the command was stopped before its end.
        UserError: if it failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=errors if quiet else None)
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt, Stopped):
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise Stopped from None
        if status == 75:  # it was stopped by a signal of somebody else
            raise Stopped
        if status:
            errors.seek(0)
            last_lines = errors.read().splitlines()[-1:]
            raise UserError(" ".join([*last_lines, f"(status {status} of {' '.join(command)})"]))


def run_steps(steps: Iterable[Step], deadline: float, quiet: bool):
    """Run the steps of one group that are not recorded, in order, and record them.

    A recorded pre-training step is run again only if its checkpoint is missing, because it was made on another machine,
    and a step that starts from it is still to do.
    """
    steps = list(steps)
    missing = to_do(steps)
    needed = [step.pretraining for step in missing if step.pretraining]
    for step in steps:
        folder = ROOT / step.folder
        if step not in missing and (step not in needed or (folder / "last.pt").exists()):
            continue
        print(f"{time.strftime('%H:%M:%S')} {step.folder}", flush=True)
        if not step.resumable and run_config(folder).get("kind") == step.phase:
            shutil.rmtree(folder)  # an interrupted run
        if not (folder / "result.json").exists():  # detect.py was stopped after its end, before it was recorded
            resume = ["--resume", "auto"] if step.resumable else []
            execute([*step.command, "--output", str(step.folder), *resume], deadline, quiet)
        record(step)
        if not step.keep_checkpoints:
            for name in ("last.pt", "previous.pt"):
                (folder / name).unlink(missing_ok=True)


def add_flags(parser: argparse.ArgumentParser, output: str, seeds: tuple | None, seeds_help: str):
    """Add the flags that all studies share.

    Args:
        parser: of the study.
        output: default of --output.
        seeds: default of --seeds.
        seeds_help: help of --seeds.
    """
    parser.add_argument("--output", type=Path, default=Path(output), help=f"run folders; default: {output}")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=seeds_help)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then, after saving; default: never")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run_study(groups: Iterable[Iterable[Step]], args: argparse.Namespace) -> int:
    """Run a study until its end, until --minutes have passed, or until SIGTERM.

    Args:
        groups: of steps; a pre-training step is in the same group as the steps that start from it.
        args: of `add_flags`.

    Returns:
        The exit status: 0, or 75 if the study was stopped before its end.
    """
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, stop)
    try:
        for steps in groups:
            run_steps(steps, deadline, args.quiet)
    except Stopped:
        print("stopped; the same command continues the study")
        return 75
    return 0
