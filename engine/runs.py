"""The run folder: its log, its settings, the checkpoint to resume from; and the signals that stop a run.

A run folder holds config.json, files.txt (the list of training files, so that a file that vanishes does not shift the
others), log.jsonl, bad_files.txt, pictures, last.pt and previous.pt.
"""

import errno
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from engine import VERSION
from engine.checkpoints import Checkpoints, newest_valid
from engine.dist import Distributed
from engine.errors import UserError
from engine.files import run_config, write_atomically
from engine.plots import png
from images.formats import PixelFormat
from images.sources import FileImages

LOCK_FILE = "run.lock"
MAX_PICTURES = 24  # of one kind that a run keeps
STOPPED = 75  # exit status of a run that a signal stopped after a complete step: resume it (EX_TEMPFAIL of sysexits.h)
PER_MACHINE = {
    "workers",
    "data",
    "cache",
    "checkpoint",
    "output",
    "resume",
}  # settings that may differ between processes


class Run:
    """The folder of one run, on the main process. On other processes the same object writes nothing.

    Args:
        folder: made by `create_folder`.
        distributed: the processes of the run.
        numbered: append a number to the folder's name.

    Attributes:
        bad, bad_held_out: unreadable training and validation files, with reasons.
        evaluation: the newest log line that has validation results.
        tracker: a track.Tracker, if one is requested.
    """

    def __init__(self, folder: Path, distributed: Distributed, numbered: bool = False):
        self.folder, self.distributed, self.numbered = folder, distributed, numbered
        self.checkpoints = Checkpoints(folder, distributed.warn)
        self.unwritten_log = b""  # lines that a full disk refused; they are written later
        self.bad, self.bad_held_out = {}, {}
        self.evaluation = {}
        self.tracker = None

    def lock(self):
        """Raise UserError if another run writes to the folder. The lock ends with its process, however that ends.

        It is a lock of fcntl, which Linux also sends to the server of a folder that is shared over NFS. A file system
        without such locks causes a warning.
        """
        self.lock_file = open(self.folder / LOCK_FILE, "a+")  # stays open, because closing it would release the lock
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return self.distributed.warn(
                    f"{self.folder}: no locks on this file system ({error.strerror}), so two runs in one folder would "
                    "not be noticed"
                )
            self.lock_file.seek(0)
            owner = self.lock_file.read().strip() or "just started"
            raise UserError(
                f"{self.folder}: another run is writing there ({owner}); stop it, or give another --output"
            ) from None
        self.lock_file.truncate(0)
        self.lock_file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock_file.flush()

    def log(self, **fields):
        """Append a line to log.jsonl. Numbers that are not finite become null, because JSON cannot express them."""
        row = {}
        for name, value in fields.items():
            is_finite = not isinstance(value, float) or value - value == 0
            row[name] = value if is_finite else None
        self.append("log.jsonl", json.dumps(row) + "\n")
        self.remember_evaluation(row)
        if self.tracker:
            self.tracker.row(row)

    def remember_evaluation(self, row: dict):
        if any(name.startswith("eval_") for name in row):
            self.evaluation = row

    def append(self, name: str, text: str):
        """Append text to a file. If the disk is full, lines of log.jsonl are written with the next line."""
        if not self.distributed.is_main:
            return
        data = text.encode(errors="surrogateescape")
        is_log = name == "log.jsonl"
        if is_log:
            data = self.unwritten_log = self.unwritten_log + data
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(data)
            if is_log:
                self.unwritten_log = b""
        except OSError as error:
            self.distributed.warn(f"{path} not written ({error}); kept for the next line")
            with suppress(OSError):
                os.truncate(path, size)

    def write(self, name: str, write):
        """Write a small file atomically; a failure costs a warning. `write` is called with a binary file."""
        if self.distributed.is_main:
            try:
                (self.folder / name).parent.mkdir(exist_ok=True)
                write_atomically(self.folder / name, write)
            except Exception as error:  # a full disk, or anything that the library of a figure raises
                self.distributed.warn(f"{self.folder / name} not written ({type(error).__name__}: {error})")

    def picture(self, name: str, figure, step: int, number: int | None = None, total: int = 0):
        """Write a figure as NAME.png, and some of them as pictures/NAME-STEP.jpg.

        Args:
            name: of the picture.
            figure: a function that returns a matplotlib Figure.
            step: number of completed steps.
            number: number of this picture in the run, from 1 on. Of `total` pictures, MAX_PICTURES are kept as JPEG,
                evenly spaced. None keeps none.
            total: number of pictures that the whole run makes.
        """
        if not self.distributed.is_main:
            return
        drawn = []

        def draw(file):
            drawn.append(png(figure()))
            file.write(drawn[0])

        self.write(f"{name}.png", draw)
        if not drawn:
            return
        if number is not None:
            # each kept picture crosses the next multiple of total / MAX_PICTURES
            interval = max(total, MAX_PICTURES)
            if number * MAX_PICTURES // interval > (number - 1) * MAX_PICTURES // interval:
                self.write(
                    f"pictures/{name}-{step:08}.jpg",
                    lambda file: Image.open(io.BytesIO(drawn[0])).convert("RGB").save(file, "jpeg"),
                )
        if self.tracker and (self.folder / f"{name}.png").exists():
            self.tracker.picture(self.folder / f"{name}.png", step)

    def close(self):
        if self.tracker:
            self.tracker.close()

    def report_bad(self, unreadable: list[tuple[str, str]], files: int, max_share: float):
        """Print unreadable training files once, over all processes, and write them to bad_files.txt.

        Args:
            unreadable: (name, reason) of files that this process could not read.
            files: number of training files.
            max_share: raise UserError if a larger share of them is unreadable.
        """
        report_unreadable(
            self.distributed, unreadable, self.bad, files, max_share, "replaced by the next image", self.note_bad
        )

    def report_bad_held_out(self, unreadable: list[tuple[str, str]], files: int, max_share: float):
        """The same for validation files; unreadable ones are left out."""
        report_unreadable(self.distributed, unreadable, self.bad_held_out, files, max_share, "left out", self.note_bad)

    def note_bad(self, name: str, reason: str):
        self.append("bad_files.txt", f"{name}\t{reason}\n")

    def resume_at(self, step: int, bad: dict, bad_held_out: dict):
        """Cut the log back to the step of the checkpoint and restore which files were known as unreadable by then."""
        self.bad, self.bad_held_out = dict(bad), dict(bad_held_out)
        if not self.distributed.is_main:
            return
        path, rows, invalid = self.folder / "log.jsonl", [], 0
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                is_repeated = row["step"] == step and "warning" in row  # the resumed run prints these warnings again
                if row["step"] <= step and not is_repeated:
                    rows.append(line + "\n")
                    self.remember_evaluation(row)
            except (ValueError, TypeError, LookupError):
                invalid += number < len(lines)  # a crash may truncate the last line
        if invalid:
            self.distributed.warn(f"{path}: {invalid} lines that are not log lines, dropped")
        self.write("log.jsonl", lambda file: file.write("".join(rows).encode()))
        bad = bad | bad_held_out
        if bad or (self.folder / "bad_files.txt").exists():
            text = "".join(f"{name}\t{reason}\n" for name, reason in bad.items())
            self.write("bad_files.txt", lambda file: file.write(text.encode(errors="surrogateescape")))


def report_unreadable(
    distributed: Distributed,
    unreadable: list[tuple[str, str]],
    known: dict,
    files: int,
    max_share: float,
    consequence: str,
    note=None,
):
    """Print a warning for each unreadable file that is not known yet, over all processes.

    Args:
        distributed: the processes.
        unreadable: (name, reason) of files that this process could not read.
        known: reasons by name, to which new ones are added.
        files: number of files in all.
        max_share: raise UserError if a larger share is unreadable.
        consequence: what is done about an unreadable file.
        note: called with (name, reason) of each new one.
    """
    everywhere = {pair for part in distributed.all_gather(unreadable) for pair in part}
    for name, reason in sorted(everywhere):
        if name not in known:
            known[name] = reason
            distributed.warn(f"unreadable, {consequence}: {name} ({reason})")
            if note:
                note(name, reason)
    if len(known) > max_share * files:
        first = next(iter(known))
        distributed.fail(
            f"{len(known)} of {files} files cannot be read, more than --max-bad-share {max_share}; the first: {first} "
            f"({known[first]})"
        )


def open_run(settings: dict, distributed: Distributed, prefix: str, name: str) -> tuple[Run, Path | None]:
    """Choose the run folder and the checkpoint to resume from. Nothing is written yet; see `create_folder`.

    --resume PATH continues in that checkpoint's folder. --resume auto continues in --output, from its newest valid
    checkpoint, or starts from scratch if it has none. Without --resume the folder must be new or empty.

    Args:
        settings: of the run, by the names of flags, `resume` and `output` among them.
        distributed: the processes, which must have the same settings.
        prefix, name: of the folder, which is runs/PREFIX-NAME-NUMBER without --output.

    Returns:
        The run, and the checkpoint or None.
    """
    resume, output = settings["resume"], settings["output"]

    def choose() -> tuple[str, Path | None]:
        if resume and resume != "auto":
            path = Path(resume)
            if not path.is_file():
                raise UserError(f"--resume {path}: no such checkpoint")
            if output and Path(output).resolve() != path.parent.resolve():
                raise UserError(f"--resume {path}: a run continues in its own folder; leave --output out")
            return str(path.parent), path
        if not output:
            if resume:
                raise UserError("--resume auto needs --output, the run folder to continue in")
            return str(Path("runs") / f"{prefix}-{name}"), None
        folder = Path(output)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder}: is a file; give a new folder")
        if resume:
            checkpoint = newest_valid(folder, distributed.warn)
            if not checkpoint:
                check_startable(folder)
            return output, checkpoint
        if folder_contents(folder):
            raise UserError(f"--output {folder}: not empty; give a new folder, or --resume auto to continue in it")
        return output, None

    distributed.check_same_everywhere(
        {
            f"--{setting.replace('_', '-')}": str(value)
            for setting, value in settings.items()
            if setting not in PER_MACHINE
        }
    )
    folder, checkpoint = distributed.run_on_main(choose)
    return Run(Path(folder), distributed, numbered=not (resume or output)), checkpoint


def folder_contents(folder: Path) -> list[str]:
    """The names in a folder, without temporary files that a killed run was writing."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if not name.endswith(".tmp") and name != LOCK_FILE)


def check_startable(folder: Path):
    """UserError if a folder without a checkpoint is not empty and does not belong to a run that has just started."""
    names = folder_contents(folder)
    if names and not run_config(folder):
        raise UserError(
            f"--output {folder}: not empty ({', '.join(names[:3])}) and not a run folder of this project, which has a "
            "checkpoint or its own config.json; nothing was changed, give another folder"
        )


def create_folder(run: Run, config: dict, file_lists: dict, is_new: bool):
    """Make the run folder, lock it, and write config.json.

    Args:
        run: its folder is updated, if it is numbered.
        config: for config.json.
        file_lists: images by the name of the file that keeps their list, such as files.txt.
        is_new: whether the run starts here; only then lists are written, for images that are files.
    """

    def make() -> str:
        try:
            if run.numbered:
                run.folder = new_numbered_folder(run.folder)
            run.folder.mkdir(parents=True, exist_ok=True)
            run.lock()
            text = json.dumps(config, indent=1) + "\n"
            write_atomically(run.folder / "config.json", lambda file: file.write(text.encode()))
            for name, images in file_lists.items():
                if is_new and isinstance(images, FileImages):
                    names = "\n".join(images.names).encode(errors="surrogateescape")
                    write_atomically(run.folder / name, lambda file: file.write(names))
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be written ({error.strerror}); give another --output") from None
        return str(run.folder)

    run.folder = run.checkpoints.folder = Path(run.distributed.run_on_main(make))


def new_numbered_folder(stem: Path) -> Path:
    """Make the first new folder of STEM-1, STEM-2, ... Runs that start at the same time get different folders."""
    for number in range(1, 10**6):
        with suppress(FileExistsError):
            folder = stem.with_name(f"{stem.name}-{number}")
            folder.mkdir(parents=True)
            return folder


def newest_run(kind: str) -> str | None:
    """The last.pt under runs/ that was written last by a run of this kind; None if there is none."""
    paths = [path for path in Path("runs").glob("*/last.pt") if run_config(path.parent).get("kind") == kind]
    return str(max(paths, key=lambda path: path.stat().st_mtime)) if paths else None


def restore_file_lists(train, held_out, checkpoint: Path | None, data: str | None, distributed: Distributed):
    """Training and validation images with the file lists that the run started with.

    Args:
        train, held_out: the images that --data names now.
        checkpoint: of the run that is resumed, or None.
        data: --data; it may be another path than the run started with, if it holds the same files.
        distributed: the processes.
    """
    if checkpoint is None:
        return train, held_out
    return (
        restore_file_list(images, checkpoint.parent / name, data, distributed)
        for images, name in ((train, "files.txt"), (held_out, "held_out.txt"))
    )


def restore_file_list(images, path: Path, data: str | None, distributed: Distributed):
    """The images that a file list of a run names: so a file that vanished since then does not shift the others."""
    old_data = run_config(path.parent).get("arguments", {}).get("data", data)
    has_list = path.exists() and isinstance(images, FileImages)
    names = path.read_bytes().decode(errors="surrogateescape").split("\n") if has_list else []
    if data != old_data:
        missing = sorted(set(names) - set(images.names)) if has_list else []
        if missing:
            raise UserError(
                f"--resume: the run started with --data {old_data}; {data} lacks {len(missing)} of its {len(names)} "
                f"files, such as {missing[0]}"
            )
        if not has_list:
            raise UserError(
                f"--resume: the run started with --data {old_data}; {data} is not a folder of the same files"
            )
    if not has_list:
        return images
    if distributed.world_size > 1:
        # where a file vanished, a cache is filled again: by one process, before the others look for it
        distributed.run_on_main(lambda: [images.relisted(names)] and None)
    return images.relisted(names)


def check_same_run(old: dict, new: dict, rules) -> list[str]:
    """Compare the config of a resumed run with the one that it started with.

    Args:
        old, new: configs.
        rules: a flags.ResumeRules.

    Returns:
        A text for each difference that is allowed but changes the results.

    Raises:
        UserError: that lists the differences that are not allowed.
    """
    if old["effective_batch"] != new["effective_batch"]:
        raise UserError(
            f"--resume: the effective batch size, processes x batch size x accumulation, was {old['effective_batch']} "
            f"source images and is now {new['effective_batch']}; it must stay equal"
        )
    allowed, refused = [], []
    for name, value in new["arguments"].items():
        if rules.ignores(name) or name not in old["arguments"]:
            continue
        old_value = old["arguments"][name]
        if json.dumps(old_value) != json.dumps(value):  # in which tuples and lists are equal
            differences = allowed if rules.warns_of(name) else refused
            differences.append(f"--{name.replace('_', '-')} was {old_value}, is {value}")
    if old["precision"] != new["precision"]:
        same_device = old["precision"].split(" on ")[-1] == new["precision"].split(" on ")[-1]
        differences = allowed if same_device else refused
        differences.append(f"the arithmetic (--precision, --device) was {old['precision']}, is {new['precision']}")
    if old["images"] != new["images"]:
        refused.append(f"the number of training images was {old['images']}, is {new['images']}")
    if "pixels" in old:  # the earliest runs did not keep it
        old_format, new_format = (PixelFormat.of(config["pixels"]) for config in (old, new))
        if old_format != new_format:
            refused.append(f"the pixel format was {old_format.to_dict()}, is {new_format.to_dict()}")
    if old.get("classes") != new.get("classes"):
        refused.append(f"the classes of --data changed ({len(old['classes'] or [])}, now {len(new['classes'] or [])})")
    if refused:
        raise UserError("--resume: a run keeps the settings that it started with: " + "; ".join(refused))
    return allowed


def commit() -> str | None:
    """The commit of these files, with a + if they differ from it; None outside of a clone."""
    with suppress(OSError):
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        output = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
        return output.strip() or None


def provenance(argv: list[str]) -> dict:
    """Command, version, commit and date of a run or a result."""
    return {
        "command": " ".join(argv),
        "version": VERSION,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


class StopSignals:
    """Signals and the clock of checkpoints, on which all processes agree at every step.

    SIGTERM, SIGUSR1 (of Slurm), SIGHUP and the first Ctrl-C request a stop after the current step. A second Ctrl-C
    stops immediately.

    Args:
        distributed: the processes.
        minutes: request a checkpoint when so much time has passed since the last one; None for never.
    """

    def __init__(self, distributed: Distributed, minutes: float | None):
        self.distributed, self.minutes, self.stop = distributed, minutes, False
        self.saved_at = time.monotonic()
        self.pending = None  # the requests of all processes that are being summed, and the handle to wait for
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(name) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        if self.stop and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.stop = True

    def all_reduce_requests(self) -> tuple[bool, bool]:
        """(stop now, save now): what was requested of any process, all do after the same step.

        The sum is taken on the CPU, so no GPU waits. With several processes the answer is one step late: it is on its
        way while the next step computes.
        """
        if self.distributed.world_size == 1:
            return self.decide(self.requests())
        decision = self.decide(self.wait_for_pending())
        requests = self.requests()
        self.pending = requests, dist.all_reduce(requests, async_op=True)
        return decision

    def requests(self) -> torch.Tensor:
        """(2,) what this process requests: a stop, a checkpoint."""
        is_due = bool(self.minutes) and time.monotonic() - self.saved_at > 60 * self.minutes
        return torch.tensor([int(self.stop), int(is_due)])

    def wait_for_pending(self) -> torch.Tensor:
        """(2,) the last requests, summed over processes; zeros before the first."""
        if self.pending is None:
            return torch.zeros(2)
        (total, handle), self.pending = self.pending, None
        handle.wait()
        return total

    def decide(self, total: torch.Tensor) -> tuple[bool, bool]:
        stop, save = total.bool().tolist()
        if stop or save:
            self.saved_at = time.monotonic()
        return stop, save
