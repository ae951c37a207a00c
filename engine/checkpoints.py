"""Checkpoints that survive a crash or a full disk, and files of weights from any source.

A checkpoint holds tensors and plain values in a zip file of torch, and is read with weights_only=True. The zip has a
CRC for every part, so a truncated or corrupt file is recognised.
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

FORMATS = (".pt", ".pth", ".bin", ".safetensors")


def copy_to_host(value):
    """Copy every tensor of a nest of dicts and lists to the CPU, so that training can continue while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(item) for item in value]
    return value


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: every part of the zip must have its length and CRC.

    Raises:
        UserError: if the file cannot be read at all, so that nothing is known about its contents.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            corrupt_part = archive.testzip()
        return f"{corrupt_part} fails its checksum" if corrupt_part else None
    except Exception as error:  # zipfile raises many types for a file that is not a zip
        # a truncated zip makes zipfile seek to a place before the file's beginning, which is EINVAL
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return str(error) or type(error).__name__


def describe_other_file(path: Path) -> str | None:
    """What a file is that is not a checkpoint, such as a failed download; None if that cannot be recognised."""
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
    """Load a checkpoint to the CPU.

    Args:
        path: the file.
        mmap: read each tensor from the file when it is used, for callers that need only some of them.

    Raises:
        UserError: if the file is missing, corrupt, holds anything that could run code, or is not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        newest = path / "last.pt"
        raise UserError(f"{path}: is a folder; give the file" + (f", {newest}" if newest.exists() else ""))
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    is_zip = zipfile.is_zipfile(path)  # old files of other programs are plain pickles
    corruption = find_corruption(path) if is_zip else None  # torch.load itself ignores a wrong checksum
    if corruption:
        raise UserError(f"{path}: not a valid checkpoint ({corruption})")
    try:
        # Published files may hold settings of yacs next to the weights; these are dicts in effect. torch's warnings
        # about pickles are left out because the errors below say the same.
        allowed = torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")])
        with warnings.catch_warnings(action="ignore"), allowed:
            state = torch.load(path, map_location="cpu", mmap=mmap and is_zip, weights_only=True)
    except Exception as error:  # torch raises many types for a file that is not a checkpoint
        other_file = describe_other_file(path)
        if not other_file and ("weights_only" in str(error) or "Unsupported" in str(error)):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: holds pickled objects besides tensors{f' ({named[1]})' if named else ''}, which could run "
                "code; refused. Save its state dict alone and use that"
            ) from None
        reason = other_file or f"not a valid checkpoint ({find_corruption(path) or type(error).__name__})"
        raise UserError(f"{path}: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: does not hold a dict; a checkpoint or a state dict is expected")
    return state


def load_tensors(path) -> dict:
    """The contents of a checkpoint or a .safetensors file, on the CPU: tensors and plain values."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return load_checkpoint(path, mmap=True)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the package raises types of its own, which differ between versions
        reason = describe_other_file(path) or f"not a valid safetensors file ({error})"
        raise UserError(f"{path}: {reason}") from None


def save_tensors(path: Path, values: dict, metadata: dict):
    """Write a dict in the format that the suffix names, one of FORMATS.

    Args:
        path: the file.
        values: the dict; for .safetensors of tensors only.
        metadata: texts by name, which .safetensors keeps besides tensors.
    """
    is_safetensors = path.suffix == ".safetensors"
    if is_safetensors:  # which wants each tensor in memory of its own
        data = safetensors.torch.save({key: value.clone().contiguous() for key, value in values.items()}, metadata)
    try:
        write_atomically(path, lambda file: file.write(data) if is_safetensors else torch.save(values, file))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def newest_valid(folder: Path, warn=warn) -> Path | None:
    """The newest valid checkpoint of a run folder: last.pt, or previous.pt with a warning if last.pt is corrupt.

    Returns:
        None if the folder has neither.

    Raises:
        UserError: if there are checkpoints but none is valid.
    """
    corrupt = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if os.path.lexists(path):
            corruption = find_corruption(path)
            if corruption is None:
                for other in corrupt:
                    warn(f"{other}: skipped")
                return path
            corrupt.append(f"{path} is not valid ({corruption})")
    if corrupt:
        raise UserError(
            f"{', '.join(corrupt)}: no checkpoint to resume from, and nothing was changed; give another --output to "
            "start from scratch"
        )
    return None


def resumed_config(resume: str | None, output: str | None) -> dict:
    """The config of the run that --resume names by its folder, its checkpoint, or auto; {} if there is none.

    Args:
        resume: value of --resume.
        output: value of --output, the run folder for --resume auto.
    """
    if not resume:
        return {}
    if resume == "auto":
        folder = output
    else:
        folder = resume if os.path.isdir(resume) else os.path.dirname(resume) or "."
    return run_config(Path(folder)) if folder else {}


def check_kind(saved: dict, path, kind: str, needs: tuple = ()) -> dict:
    """Return `saved` if it is a complete checkpoint of a kind.

    Args:
        saved: contents of a checkpoint.
        path: its file, for the message.
        kind: what wrote it: "pretrain", "finetune" or another training program's kind.
        needs: entries that it must have besides weights and config.

    Raises:
        UserError: for any other checkpoint.
    """
    if saved.get("kind") != kind:
        raise UserError(f"{path}: not a checkpoint of kind {kind!r} (its kind is {saved.get('kind')!r})")
    missing = [name for name in ("model", "config", *needs) if name not in saved]
    if not missing:
        config = saved["config"]
        if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
            missing = ["the settings of its run"]
    if missing:
        raise UserError(f"{path}: not a complete checkpoint of kind {kind!r}: it lacks {', '.join(missing)}")
    return saved


class Checkpoints:
    """last.pt and previous.pt of a run folder, written by a thread. A full disk costs a warning, not the run.

    Attributes:
        step: of the newest valid checkpoint; None before the first.
        unwritten: the newest state if it could not be written, else None.
    """

    def __init__(self, folder: Path, warn):
        self.folder, self.warn = folder, warn
        self.thread, self.step, self.unwritten = None, None, None

    def save(self, state: dict):
        """Copy `state` now and write it in a thread, after the write before it."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(copy_to_host(state),), name="checkpoint")
        self.thread.start()

    def write(self, state: dict):
        last, previous, new = (self.folder / name for name in ("last.pt", "previous.pt", "new.pt"))
        try:
            write_atomically(new, lambda file: torch.save(state, file))
            if last.exists():
                link = self.folder / "previous.pt.tmp"
                link.unlink(missing_ok=True)
                try:
                    os.link(last, link)  # so that last.pt stays in place until the new one replaces it
                except (
                    OSError
                ):  # a file system without links: for a moment there is only previous.pt, which resume takes
                    link = last
                os.replace(link, previous)
            os.replace(new, last)
            sync_folder(self.folder)
            self.step, self.unwritten = state["step"], None
        except Exception as error:  # torch raises RuntimeError on a full disk
            self.unwritten = state
            self.warn(
                f"the checkpoint of step {state['step']} was not written ({error}); the previous one stays, and the "
                "next attempt is made with the next checkpoint"
            )
            with suppress(OSError):
                new.unlink()

    def wait(self):
        if self.thread:
            self.thread.join()
            self.thread = None

    def finish(self):
        """Wait for the last checkpoint, and try again if it was not written. UserError if that fails too."""
        self.wait()
        if self.unwritten:
            self.write(self.unwritten)
        if self.unwritten:
            if self.step is None:
                newest = "there is no valid checkpoint"
            else:
                newest = f"the newest valid checkpoint is of step {self.step}"
            raise UserError(
                f"{self.folder}: the checkpoint of step {self.unwritten['step']} could not be written, because the "
                f"disk is full or missing: {newest}; make room, then continue with --resume {self.folder}"
            )
