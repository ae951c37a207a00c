"""The run folder: its log, its settings, the checkpoint to go on from; and the signals that stop a run.

A run folder holds config.json, files.txt (the training files, so that one that vanishes shifts nothing), log.jsonl,
bad_files.txt, pictures, last.pt and previous.pt.
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

LOCK_FILE, MAX_PICTURES = "run.lock", 24  # KEPT: pictures of a kind that a run keeps
STOPPED = 75  # exit status of a run that a signal stopped after a whole step: resume it (sysexits' EX_TEMPFAIL)
MAY_CHANGE = {
    "workers",
    "log_every",
    "checkpoint_every_steps",
    "checkpoint_every",
    "batch_size",
    "accumulate",
    "resume",
    "output",
    "max_steps",
    "max_bad_share",
    "download",
    "cache",
    "precision",
    "data",
    "show_channels",
    "knn_every",
    "track",
}
CHANGES_THE_RUN = {
    "base_lr",
    "warmup_epochs",
    "warmup_lr",
    "randaugment",
    "compile",
    "deterministic",
}  # may change too, with a warning
PER_MACHINE = {
    "workers",
    "data",
    "cache",
    "checkpoint",
    "output",
    "resume",
}  # settings that may differ between processes


class Run:
    """One run's folder on the first process; on the others the same object writes nothing.

    folder: made by `begin`, with a number appended if numbered. Lines for log.jsonl that a full disk refuses are kept
    and written later.
    """

    def __init__(self, folder: Path, distributed: Distributed, numbered: bool = False):
        self.folder, self.distributed, self.numbered = folder, distributed, numbered
        self.checkpoints = Checkpoints(folder, distributed.warn)
        self.waiting = b""
        self.bad, self.bad_held_out = {}, {}  # files of the two parts that cannot be read, with reasons
        self.evaluation = {}  # the last line of the log that has validation results
        self.tracker = None  # a track.Tracker, if one is asked for

    def lock(self):
        """Refuse a folder that another run writes to. The lock dies with its process, whatever ends it.

        It is fcntl's, which Linux also passes on to the server of a folder shared over NFS; where a file system has no
        such locks, that is said.
        """
        self.locked = open(self.folder / LOCK_FILE, "a+")  # kept open: closing it would give the lock up
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return self.distributed.warn(
                    f"{self.folder}: no locks on this file system ({error.strerror}): two runs in one folder would go unnoticed"
                )
            self.locked.seek(0)
            raise UserError(
                f"{self.folder}: another run is writing there ({self.locked.read().strip() or 'just begun'}); stop it, or "
                "give another --output"
            ) from None
        self.locked.truncate(0)
        self.locked.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.locked.flush()

    def log(self, **fields):
        """One line of log.jsonl. Numbers that are not finite become null: JSON has no word for them."""
        clean = {
            key: None if isinstance(value, float) and value - value != 0 else value for key, value in fields.items()
        }
        self.append("log.jsonl", json.dumps(clean) + "\n")
        self.remember(clean)
        if self.tracker:
            self.tracker.row(clean)

    def remember(self, row: dict):
        if any(name.startswith("eval_") for name in row):
            self.evaluation = row

    def append(self, name: str, text: str):
        if not self.distributed.is_main:
            return
        self.waiting += text.encode() if name == "log.jsonl" else b""
        data = self.waiting if name == "log.jsonl" else text.encode(errors="surrogateescape")
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(data)
            if name == "log.jsonl":
                self.waiting = b""
        except OSError as error:
            self.distributed.warn(f"{path} not written ({error}); kept for the next line")
            with suppress(OSError):
                os.truncate(path, size)

    def write(self, name: str, write):
        """A small file, whole or not at all. write(file), which takes a binary file, may fail: that costs a warning, not the run."""
        if self.distributed.is_main:
            try:
                (self.folder / name).parent.mkdir(exist_ok=True)
                write_atomically(self.folder / name, write)
            except Exception as error:  # a full disk; what a figure's library raises
                self.distributed.warn(f"{self.folder / name} not written ({type(error).__name__}: {error})")

    def picture(self, name: str, figure, step: int, number: int | None = None, of: int = 0):
        """figure(), a matplotlib Figure, as name.png; and as pictures/name-STEP.jpg where it is one of KEPT, evenly spaced over `of` in the whole run.
        number: which of these it is, from 1 on; None: it is not kept."""
        if not self.distributed.is_main:
            return
        drawn = []
        self.write(f"{name}.png", lambda file: (drawn.append(png(figure())), file.write(drawn[0])))
        if (
            drawn
            and number is not None
            and (number * MAX_PICTURES // max(of, MAX_PICTURES) > (number - 1) * MAX_PICTURES // max(of, MAX_PICTURES))
        ):
            self.write(
                f"pictures/{name}-{step:08}.jpg",
                lambda file: Image.open(io.BytesIO(drawn[0])).convert("RGB").save(file, "jpeg"),
            )
        if drawn and self.tracker and (self.folder / f"{name}.png").exists():
            self.tracker.picture(self.folder / f"{name}.png", step)

    def close(self):
        if self.tracker:
            self.tracker.close()

    def report_bad(self, unreadable: list[tuple[str, str]], listed: int, most: float):
        """Name unreadable training files once, over all processes; bad_files.txt has them. UserError when they are too many."""
        report_unreadable(
            self.distributed, unreadable, self.bad, listed, most, "replaced by the next image", self.note_bad
        )

    def report_bad_held_out(self, unreadable: list[tuple[str, str]], listed: int, most: float):
        """The same of the held-out part, whose unreadable files are left out."""
        report_unreadable(self.distributed, unreadable, self.bad_held_out, listed, most, "left out", self.note_bad)

    def note_bad(self, name: str, reason: str):
        self.append("bad_files.txt", f"{name}\t{reason}\n")

    def resume_at(self, step: int, bad: dict, bad_held_out: dict):
        """Cut the log back to the checkpoint's step, drop a torn last line, and restate which files were bad by then."""
        self.bad, self.bad_held_out = dict(bad), dict(bad_held_out)
        bad = bad | bad_held_out
        if not self.distributed.is_main:
            return
        path, kept, strange = self.folder / "log.jsonl", [], 0
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                at = row["step"]
                if at <= step and not (at == step and "warning" in row):  # that is said anew
                    kept.append(line + "\n")
                    self.remember(row)
            except (ValueError, TypeError, LookupError):
                strange += number < len(lines)  # the last may be torn
        if strange:
            self.distributed.warn(f"{path}: {strange} lines that are none of a log, dropped")
        self.write("log.jsonl", lambda file: file.write("".join(kept).encode()))
        if bad or (self.folder / "bad_files.txt").exists():
            self.write(
                "bad_files.txt",
                lambda file: file.write(
                    "".join(f"{k}\t{v}\n" for k, v in bad.items()).encode(errors="surrogateescape")
                ),
            )


def report_unreadable(
    distributed: Distributed,
    unreadable: list[tuple[str, str]],
    known: dict,
    listed: int,
    most: float,
    done: str,
    note=None,
):
    """Name the files that were not `known`, over all processes; they are known from now on, and note(name, reason) gets each.

    UserError when the known ones are more than `most` of those listed. done: what was done about them.
    """
    for name, reason in sorted({pair for part in distributed.all_gather(unreadable) for pair in part}):
        if name not in known:
            known[name] = reason
            distributed.warn(f"unreadable, {done}: {name} ({reason})")
            if note:
                note(name, reason)
    if len(known) > most * listed:
        first = next(iter(known))
        distributed.fail(
            f"{len(known)} of {listed} files cannot be read, more than --max-bad-share {most}; the first: {first} ({known[first]})"
        )


def open_run(args, distributed: Distributed, prefix: str, name: str) -> tuple[Run, Path | None]:
    """The run folder, and the checkpoint to go on from. Nothing is written yet; see `begin`.

    --resume PATH goes on in that checkpoint's folder; --resume auto in --output, from its newest whole checkpoint, or
    afresh if it has none. Without --resume the folder must be new or empty.
    """

    def choose():
        if args.resume == "auto":
            if not args.output:
                raise UserError("--resume auto needs --output, the run folder to go on in")
            folder = Path(args.output)
            checkpoint = newest_valid(folder, distributed.warn)
            if not checkpoint:
                check_startable(folder)
            return args.output, checkpoint
        if args.resume:
            path = Path(args.resume)
            if not path.is_file():
                raise UserError(f"--resume {path}: no such checkpoint")
            if args.output and Path(args.output).resolve() != path.parent.resolve():
                raise UserError(f"--resume {path}: a run goes on in its own folder; leave --output out")
            return str(path.parent), path
        if args.output:
            folder = Path(args.output)
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--output {folder}: is a file; give a new folder")
            if folder_contents(folder):
                raise UserError(f"--output {folder}: not empty; give a new folder, or --resume auto to go on in it")
            return args.output, None
        return str(Path("runs") / f"{prefix}-{name}"), None

    distributed.check_same_everywhere(
        {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in PER_MACHINE}
    )
    folder, checkpoint = distributed.run_on_main(choose)
    return Run(Path(folder), distributed, numbered=not (args.resume or args.output)), checkpoint


def folder_contents(folder: Path) -> list[str]:
    """What is in a folder, but for what a killed run was about to write."""
    return (
        sorted(name for name in os.listdir(folder) if not name.endswith(".tmp") and name != LOCK_FILE)
        if folder.is_dir()
        else []
    )


def check_startable(folder: Path):
    """UserError unless the folder, which has no checkpoint, may be a run's: a new one, or one killed before its first checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a new folder")
    inside = folder_contents(folder)
    if inside and not run_config(folder):
        raise UserError(
            f"--output {folder}: not empty ({', '.join(inside[:3])}) and no run of ours, which has a checkpoint or its own "
            "config.json; nothing was changed, give another folder"
        )


def create_folder(run: Run, config: dict, lists: dict, fresh: bool):
    """Make the folder; write config.json and, for images in files, the file lists that the run keeps to its end."""

    def make():
        try:
            if run.numbered:
                run.folder = new_numbered_folder(run.folder)
            run.folder.mkdir(parents=True, exist_ok=True)
            run.lock()
            write_atomically(
                run.folder / "config.json", lambda file: file.write((json.dumps(config, indent=1) + "\n").encode())
            )
            for name, images in lists.items():
                if fresh and isinstance(images, FileImages):
                    write_atomically(
                        run.folder / name,
                        lambda file: file.write("\n".join(images.names).encode(errors="surrogateescape")),
                    )
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be written ({error.strerror}); give another --output") from None
        return str(run.folder)

    run.folder = run.checkpoints.folder = Path(run.distributed.run_on_main(make))


def new_numbered_folder(stem: Path) -> Path:
    """A new folder STEM-1, STEM-2, ...; of two runs that begin at once each gets its own."""
    for number in range(1, 10**6):
        with suppress(FileExistsError):
            folder = stem.with_name(f"{stem.name}-{number}")
            folder.mkdir(parents=True)
            return folder


def newest_run(kind: str) -> str:
    """last.pt of the run of a kind under runs/ that was written last. UserError if there is none."""
    written = [path for path in Path("runs").glob("*/last.pt") if run_config(path.parent).get("kind") == kind]
    if not written:
        raise UserError("no pre-training run under runs/: run train.py first, or give --checkpoint or --init scratch")
    return str(max(written, key=lambda path: path.stat().st_mtime))


def restore_file_list(images, checkpoint: Path | None, name: str, where: str | None, distributed: Distributed):
    """The images of the file list that a run began with, so that a file that vanished since shifts no index.

    where: --data, which may be another path than the run began with if it holds the same files. UserError if not.
    """
    if checkpoint is None:
        return images
    path, before = checkpoint.parent / name, run_config(checkpoint.parent).get("arguments", {}).get("data", where)
    moved, listed = where != before, path.exists() and isinstance(images, FileImages)
    names = path.read_bytes().decode(errors="surrogateescape").split("\n") if listed else []
    gone = sorted(set(names) - set(images.names)) if listed and moved else []
    if moved and (not listed or gone):
        raise UserError(
            f"--resume: the run began with --data {before}; {where} "
            + (
                f"lacks {len(gone)} of its {len(names)} files, such as {gone[0]}"
                if gone
                else "is not a folder of the same files"
            )
        )
    if (
        listed and distributed.world_size > 1
    ):  # where a file vanished, a cache is filled again: by one process, before the others look for it
        distributed.run_on_main(lambda: [images.relisted(names)] and None)
    return images.relisted(names) if listed else images


def check_same_run(old: dict, new: dict, effective_batch: int, config: dict) -> list[str]:
    """UserError that names every setting in which a resumed run differs from the one that began; those that may, but change it, are returned."""
    if old["effective_batch"] != effective_batch:
        raise UserError(
            f"--resume: processes x batch x accumulation was {old['effective_batch']} source images, is "
            f"{effective_batch}; it must stay equal"
        )
    differ = {
        key: f"--{key.replace('_', '-')} was {old['arguments'][key]}, is {value}"
        for key, value in new.items()
        if key not in MAY_CHANGE and key in old["arguments"] and json.dumps(old["arguments"][key]) != json.dumps(value)
    }  # tuples are lists there
    told, changed = (
        [words for key, words in differ.items() if (key in CHANGES_THE_RUN) == may] for may in (True, False)
    )
    if old["precision"] != config["precision"]:  # on another device it would not have been asked for
        alike = old["precision"].split(" on ")[-1] == config["precision"].split(" on ")[-1]
        (told if alike else changed).append(
            f"the arithmetic (--precision, --device) was {old['precision']}, is {config['precision']}"
        )
    if old["images"] != config["images"]:
        changed.append(f"the number of training images was {old['images']}, is {config['images']}")
    forms = [
        PixelFormat.of(settings["pixels"]) for settings in (old, config) if "pixels" in settings
    ]  # the earliest runs did not keep theirs
    if len(set(forms)) > 1:
        changed.append("the pixel format was " + ", is ".join(str(form.to_dict()) for form in forms))
    if old.get("classes") != config.get("classes"):
        changed.append(
            f"the classes of --data changed ({len(old['classes'] or [])}, now {len(config['classes'] or [])})"
        )
    if changed:
        raise UserError("--resume: a run goes on with the settings it began with: " + "; ".join(changed))
    return told


def commit() -> str | None:
    """The commit of these files, with a + if they differ from it; None outside of a clone."""
    with suppress(OSError):
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        return described.stdout.strip() or None


def provenance(argv: list[str]) -> dict:
    """Command, version, commit and date of a run or a result."""
    return {"command": " ".join(argv), "version": VERSION, "commit": commit(), "date": time.strftime("%Y-%m-%d")}


class StopSignals:
    """Signals and the checkpoint clock, on which all processes agree at every step.

    SIGTERM, SIGUSR1 (Slurm's), SIGHUP and the first Ctrl-C ask for an orderly stop; a second Ctrl-C stops at once.
    """

    def __init__(self, distributed: Distributed, minutes: float | None):
        self.distributed, self.minutes, self.stop = distributed, minutes, False
        self.saved, self.requested = (
            time.monotonic(),
            None,
        )  # asked: the sum under way over all processes, and what it is waited for with
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(name) != signal.SIG_IGN:  # as nohup has it
                    signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        if self.stop and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.stop = True

    def agree(self) -> tuple[bool, bool]:
        """(stop now, save now). What any process was asked, all do, after the same step; on the CPU, so no GPU waits. With several
        processes one step late: the answer to this step's question is on its way while the next step computes."""
        if self.distributed.world_size == 1:
            return self.heed(self.wishes())
        answer = self.heed(self.answer())
        wishes = self.wishes()
        self.requested = wishes, dist.all_reduce(wishes, async_op=True)
        return answer

    def wishes(self) -> torch.Tensor:
        due = bool(self.minutes) and time.monotonic() - self.saved > 60 * self.minutes
        return torch.tensor([int(self.stop), int(due)])

    def answer(self) -> torch.Tensor:
        """What was asked last, over all processes; nothing before the first question."""
        if self.requested is None:
            return torch.zeros(2)
        (total, work), self.requested = self.requested, None
        work.wait()
        return total

    def heed(self, total: torch.Tensor) -> tuple[bool, bool]:
        stop, save = total.bool().tolist()
        if stop or save:
            self.saved = time.monotonic()
        return stop, save
