"""The run folder and what lets a run survive: log, checkpoints, resume, signals.

A run folder holds config.json, files.txt (the training files, so that one that vanishes shifts nothing), log.jsonl,
bad_files.txt, pictures, last.pt and previous.pt. Every file is written whole or not at all; checkpoints hold plain
tensors and dicts, are read with weights_only=True, and carry a CRC for every part (a zip's own), so a torn one is known.
"""
import json
import os
import signal
import subprocess
import threading
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from engine import Launch, UserError
from images import FileImages

STOPPED = 75  # exit status of a run that a signal stopped after a whole step: resume it (sysexits' EX_TEMPFAIL)
MAY_CHANGE = {"workers", "log_every", "checkpoint_every_steps", "checkpoint_every", "batch_size", "accumulate", "resume",
              "output", "max_steps", "max_bad_share", "download", "cache"}


# ---------------------------------------------------------------------------------------------------- checkpoints

def write_whole(path: Path, write):
    """write(file) into a temporary file, sync, rename: `path` is at any time the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path):
    """Make a rename in the folder survive a power cut."""
    with suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def copy_to_host(value):
    """A nest of dicts and lists with every tensor copied to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(item) for item in value]
    return value


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: every part of the zip must have its length and CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        return f"{torn} fails its checksum" if torn else None
    except Exception as error:  # zipfile raises many types for a file that is no zip
        return str(error) or type(error).__name__


def load_checkpoint(path) -> dict:
    """A checkpoint's dict, on the CPU. UserError for a torn file, one that holds more than tensors, or a foreign one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on foreign pickles; the error below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is no checkpoint
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path}: holds pickled objects besides tensors, which could run code; refused. Save its "
                            "state dict alone and use that") from None
        raise UserError(f"{path}: not a whole checkpoint ({damage(path) or type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no dict; a checkpoint of train.py or a state dict is expected")
    return state


def newest_whole(folder: Path, say=print) -> Path | None:
    """last.pt, or previous.pt if last.pt is torn, which is said; None if there is neither."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            wrong = damage(path)
            if wrong is None:
                return path
            say(f"{path} is not whole ({wrong}): passed over")
    return None


class Checkpoints:
    """last.pt and previous.pt of a run folder, written by a thread; a full disk costs a warning, not the run."""

    def __init__(self, folder: Path, say=print):
        self.folder, self.say, self.thread = folder, say, None

    def save(self, state: dict):
        """Copy `state` now and write it off the training thread, after the write before it."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(copy_to_host(state),), name="checkpoint")
        self.thread.start()

    def write(self, state: dict):
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        try:
            new = last.with_name("new.pt")
            write_whole(new, lambda file: torch.save(state, file))
            if last.exists():
                link = previous.with_name("previous.pt.tmp")
                link.unlink(missing_ok=True)
                try:
                    os.link(last, link)  # last.pt itself stays in place until the new one replaces it
                except OSError:  # a file system without links: for a moment there is only previous.pt, which resume takes
                    link = last
                os.replace(link, previous)
            os.replace(new, last)
            sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            self.say(f"warning: checkpoint of step {state['step']} not written ({error}); the one before it stays, and the "
                     "next attempt comes with the next checkpoint")
            with suppress(OSError):
                (self.folder / "new.pt").unlink()

    def wait(self):
        if self.thread:
            self.thread.join()
            self.thread = None


# ---------------------------------------------------------------------------------------------------- run folder

class Run:
    """One run's folder on the first process; on the others the same object writes nothing.

    folder: made by `begin`, with a number appended if numbered. Lines for log.jsonl that a full disk refuses are kept
    and written later.
    """

    def __init__(self, folder: Path, launch: Launch, numbered: bool = False):
        self.folder, self.launch, self.numbered = folder, launch, numbered
        self.checkpoints = Checkpoints(folder)
        self.waiting = b""
        self.bad = {}

    def log(self, **fields):
        """One line of log.jsonl. Numbers that are not finite become null: JSON has no word for them."""
        clean = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in fields.items()}
        self.append("log.jsonl", json.dumps(clean) + "\n")

    def append(self, name: str, text: str):
        if not self.launch.first:
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
            print(f"warning: {path} not written ({error}); kept for the next line", flush=True)
            with suppress(OSError):
                os.truncate(path, size)

    def write(self, name: str, write):
        """A small file, whole or not at all; a full disk costs a warning. write(file) takes a binary file."""
        if self.launch.first:
            try:
                write_whole(self.folder / name, write)
            except OSError as error:
                print(f"warning: {self.folder / name} not written ({error})", flush=True)

    def report_bad(self, found: list[tuple[str, str]], listed: int, most: float):
        """Name unreadable files once, over all processes. UserError when they are more than `most` of those listed."""
        for name, reason in sorted({pair for part in self.launch.gather(found) for pair in part}):
            if name not in self.bad:
                self.bad[name] = reason
                self.append("bad_files.txt", f"{name}\t{reason}\n")
                self.launch.say(f"unreadable, replaced by the next image: {name} ({reason})")
        if len(self.bad) > most * listed:
            raise UserError(f"{len(self.bad)} of {listed} files cannot be read, more than --max-bad-share {most}: see "
                            f"{self.folder / 'bad_files.txt'}")

    def resume_at(self, step: int, bad: dict):
        """Cut the log back to the checkpoint's step, drop a torn last line, and restate which files were bad by then."""
        self.bad = dict(bad)
        if not self.launch.first:
            return
        path, kept = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        self.write("log.jsonl", lambda file: file.write("".join(kept).encode()))
        if bad or (self.folder / "bad_files.txt").exists():
            self.write("bad_files.txt", lambda file: file.write("".join(f"{k}\t{v}\n" for k, v in bad.items()).encode(errors="surrogateescape")))

    def rows(self) -> list[dict]:
        """The log so far."""
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_run(args, launch: Launch, prefix: str, name: str) -> tuple[Run, Path | None]:
    """The run folder, and the checkpoint to go on from. Nothing is written yet; see `begin`.

    --resume PATH goes on in that checkpoint's folder; --resume auto in --output, from its newest whole checkpoint, or
    afresh if it has none. Without --resume the folder must be new or empty.
    """
    def choose():
        if args.resume == "auto":
            if not args.output:
                raise UserError("--resume auto needs --output, the run folder to go on in")
            return args.output, newest_whole(Path(args.output))
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
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"--output {folder}: not empty; give a new folder, or --resume auto to go on in it")
            return args.output, None
        return str(Path("runs") / f"{prefix}-{name}"), None

    folder, checkpoint = launch.together(choose)
    return Run(Path(folder), launch, numbered=not (args.resume or args.output)), checkpoint


def begin(run: Run, config: dict, lists: dict, fresh: bool):
    """Make the folder; write config.json and, for images in files, the file lists that the run keeps to its end."""
    def make():
        try:
            if run.numbered:
                run.folder = claim(run.folder)
            run.folder.mkdir(parents=True, exist_ok=True)
            write_whole(run.folder / "config.json", lambda file: file.write((json.dumps(config, indent=1) + "\n").encode()))
            for name, images in lists.items():
                if fresh and isinstance(images, FileImages):
                    write_whole(run.folder / name, lambda file: file.write("\n".join(images.names).encode(errors="surrogateescape")))
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be written ({error.strerror}); give another --output") from None
        return str(run.folder)
    run.folder = run.checkpoints.folder = Path(run.launch.together(make))


def claim(stem: Path) -> Path:
    """A new folder STEM-1, STEM-2, ...; of two runs that begin at once each gets its own."""
    for number in range(1, 10 ** 6):
        with suppress(FileExistsError):
            folder = stem.with_name(f"{stem.name}-{number}")
            folder.mkdir(parents=True)
            return folder


def as_listed(images, checkpoint: Path | None, name: str):
    """The images of the file list that a run began with, so that a file that vanished since shifts no index."""
    path = checkpoint.parent / name if checkpoint else None
    if path is None or not path.exists() or not isinstance(images, FileImages):
        return images
    return images.relisted(path.read_bytes().decode(errors="surrogateescape").split("\n"))


def check_same_run(old: dict, new: dict, effective_batch: int, config: dict):
    """UserError that names every setting in which a resumed run differs from the one that began."""
    if old["effective_batch"] != effective_batch:
        raise UserError(f"--resume: processes x batch x accumulation was {old['effective_batch']} source images, is "
                        f"{effective_batch}; it must stay equal")
    changed = [f"--{key.replace('_', '-')} was {old['arguments'].get(key)}, is {value}" for key, value in new.items()
               if key not in MAY_CHANGE and key in old["arguments"] and json.dumps(old["arguments"].get(key)) != json.dumps(value)]  # tuples are lists there
    changed += [f"{name} was {old[key]}, is {config[key]}" for key, name in
                (("precision", "the arithmetic (--precision, --device)"), ("images", "the number of training images"))
                if old[key] != config[key]]
    if old.get("classes") != config.get("classes"):
        changed.append(f"the classes of --data changed ({len(old['classes'] or [])}, now {len(config['classes'] or [])})")
    if changed:
        raise UserError("--resume: a run goes on with the settings it began with: " + "; ".join(changed))


def provenance(argv: list[str]) -> dict:
    """Command, commit (with a + if files differ from it) and date, to stand beside every result."""
    commit = None
    with suppress(OSError):
        found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = found.stdout.strip() or None
    return {"command": " ".join(argv), "commit": commit, "date": time.strftime("%Y-%m-%d")}


# ---------------------------------------------------------------------------------------------------- signals, clock

class Control:
    """Signals and the checkpoint clock, on which all processes agree at every step.

    SIGTERM, SIGUSR1 (Slurm's) and the first Ctrl-C ask for an orderly stop; a second Ctrl-C stops at once.
    """

    def __init__(self, launch: Launch, minutes: float | None):
        self.launch, self.minutes, self.stop = launch, minutes, False
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(name, self.asked)

    def asked(self, number, frame):
        if self.stop and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.stop = True

    def agree(self) -> tuple[bool, bool]:
        """(stop now, save now). What any process was asked, all do, after the same step; on the CPU, so no GPU waits."""
        due = bool(self.minutes) and time.monotonic() - self.saved > 60 * self.minutes
        stop, save = (int(x) for x in self.launch.sum(torch.tensor([int(self.stop), int(due)])))
        if stop or save:
            self.saved = time.monotonic()
        return bool(stop), bool(save)
