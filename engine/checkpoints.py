"""Files that are whole or not there, whatever happens while they are written: checkpoints, and weights of any origin.

Every file is written under another name, synced and renamed. Checkpoints hold plain tensors and dicts, are read with
weights_only=True, and carry a CRC for every part (a zip's own), so a torn one is known.
"""

import errno
import os
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch

from engine.errors import UserError, warn
from engine.files import run_config, sync_folder, write_atomically


def copy_to_host(value):
    """A nest of dicts and lists with every tensor copied to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(item) for item in value]
    return value


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: every part of the zip must have its length and CRC.

    UserError for a file that cannot be read at all, which says nothing of what is in it.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            torn = archive.testzip()
        return f"{torn} fails its checksum" if torn else None
    except Exception as error:  # zipfile raises many types for a file that is no zip
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a place before the file's beginning
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return str(error) or type(error).__name__


def describe_other_file(path: Path) -> str | None:
    """What a file is that was fetched in place of another; None if that does not show."""
    with open(path, "rb") as file:
        beginning = file.read(200).lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"
    if beginning.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file that was asked for; download it again"
    if (
        beginning and path.suffix != ".safetensors" and beginning[:1] not in (b"p", b"\x80")
    ):  # of a zip file, of a pickle
        return "not a checkpoint; give a file such as runs/x/last.pt, or published weights"
    return None


def load_checkpoint(path, mmap: bool = False) -> dict:
    """A checkpoint's dict, on the CPU. UserError for a torn file, one that holds more than tensors, or a foreign one.

    mmap: tensors are read from the file when they are used, for who needs some of them.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; give the file" + (f", {path / 'last.pt'}" if (path / "last.pt").exists() else "")
        )
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    zipped = zipfile.is_zipfile(path)  # older files of other programs are not
    wrong = find_corruption(path) if zipped else None  # torch.load itself passes over a wrong checksum
    if wrong:
        raise UserError(f"{path}: not a whole checkpoint ({wrong})")
    try:
        # torch's remarks on foreign pickles are left out, the error below says it all; yacs' settings stand beside published weights, plain dicts in effect
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]),
        ):
            state = torch.load(path, map_location="cpu", mmap=mmap and zipped, weights_only=True)
    except Exception as error:  # torch raises many types for a file that is no checkpoint
        if not describe_other_file(path) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: holds pickled objects besides tensors{f' ({named[1]})' if named else ''}, which could run code; refused. Save its "
                "state dict alone and use that"
            ) from None
        raise UserError(
            f"{path}: {describe_other_file(path) or f'not a whole checkpoint ({find_corruption(path) or type(error).__name__})'}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no dict; a checkpoint of train.py or a state dict is expected")
    return state


def load_tensors(path) -> dict:
    """What a checkpoint or a .safetensors file holds, on the CPU: tensors and plain values, nothing that could run code."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return load_checkpoint(path, mmap=True)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the package raises its own types, which differ between versions
        raise UserError(f"{path}: {describe_other_file(path) or f'not a whole safetensors file ({error})'}") from None


FORMATS = (".pt", ".pth", ".bin", ".safetensors")


def save_tensors(path: Path, values: dict, metadata: dict | None = None):
    """A dict as .safetensors, which takes nothing but tensors, or as torch.save writes it; see FORMATS. metadata: of safetensors."""
    if path.suffix == ".safetensors":  # each tensor with memory of its own
        data = safetensors.torch.save({key: value.clone().contiguous() for key, value in values.items()}, metadata)
    try:
        write_atomically(
            path, lambda file: file.write(data) if path.suffix == ".safetensors" else torch.save(values, file)
        )
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def newest_valid(folder: Path, tell=warn) -> Path | None:
    """last.pt, or previous.pt if last.pt is torn, which is said; None if there is neither. UserError if none is whole."""
    torn = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if os.path.lexists(path):
            wrong = find_corruption(path)
            if wrong is None:
                for other in torn:
                    tell(f"{other}: passed over")
                return path
            torn.append(f"{path} is not whole ({wrong})")
    if torn:
        raise UserError(
            f"{', '.join(torn)}: nothing to go on from, and nothing was changed; give another --output to begin anew"
        )
    return None


def resumed_config(args) -> dict:
    """The config of the run that --resume names by its folder, its checkpoint, or auto; {} if there is none."""
    resume = args.resume or ""
    folder = args.output if resume == "auto" else resume if os.path.isdir(resume) else os.path.dirname(resume) or "."
    return run_config(Path(folder)) if resume and folder else {}


PROGRAMS = {
    "pretrain": "train.py",
    "finetune": "finetune.py",
    "segment": "segment.py",
}  # by the kind of their checkpoints


def check_kind(saved: dict, path, kind: str, needs: tuple = ()) -> dict:
    """`saved`, if it is a checkpoint of this kind with weights, config and what else is needed. UserError for any other."""
    if saved.get("kind") != kind:
        raise UserError(f"{path}: not a checkpoint of {PROGRAMS[kind]} (kind {saved.get('kind')!r}, needed {kind!r})")
    lacks = [name for name in ("model", "config", *needs) if name not in saved]
    if not lacks and not isinstance(getattr(saved["config"], "get", dict)("arguments"), dict):
        lacks = ["the settings of its run"]
    if lacks:
        raise UserError(f"{path}: not a whole checkpoint of {PROGRAMS[kind]}: it lacks {', '.join(lacks)}")
    return saved


class Checkpoints:
    """last.pt and previous.pt of a run folder, written by a thread; a full disk costs a warning, not the run.

    step: of the newest whole checkpoint, None before the first. unwritten: the state that could not be written, if it is the last one.
    """

    def __init__(self, folder: Path, warn):
        self.folder, self.warn, self.thread, self.step, self.unwritten = folder, warn, None, None, None

    def save(self, state: dict):
        """Copy `state` now and write it off the training thread, after the write before it."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(copy_to_host(state),), name="checkpoint")
        self.thread.start()

    def write(self, state: dict):
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        try:
            new = last.with_name("new.pt")
            write_atomically(new, lambda file: torch.save(state, file))
            if last.exists():
                link = previous.with_name("previous.pt.tmp")
                link.unlink(missing_ok=True)
                try:
                    os.link(last, link)  # last.pt itself stays in place until the new one replaces it
                except (
                    OSError
                ):  # a file system without links: for a moment there is only previous.pt, which resume takes
                    link = last
                os.replace(link, previous)
            os.replace(new, last)
            sync_folder(self.folder)
            self.step, self.unwritten = state["step"], None
        except Exception as error:  # torch's writer raises RuntimeError on a full disk
            self.unwritten = state
            self.warn(
                f"checkpoint of step {state['step']} not written ({error}); the one before it stays, and the "
                "next attempt comes with the next checkpoint"
            )
            with suppress(OSError):
                (self.folder / "new.pt").unlink()

    def wait(self):
        if self.thread:
            self.thread.join()
            self.thread = None

    def finish(self):
        """Wait for the last checkpoint; try it again if it was not written. UserError if that fails too."""
        self.wait()
        if self.unwritten:
            self.write(self.unwritten)
        if self.unwritten:
            newest = (
                "there is no whole checkpoint"
                if self.step is None
                else f"the newest whole checkpoint is of step {self.step}"
            )
            raise UserError(
                f"{self.folder}: the checkpoint of step {self.unwritten['step']} could not be written, disk full or gone: {newest}; "
                f"make room, then go on with --resume {self.folder}"
            )
