"""Files that are written completely or not at all, and the config.json by which a run folder is recognised."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError


def write_atomically(path: Path, write):
    """Write a file so that `path` is at any time either the old file or the new one.

    Args:
        path: the file to write or replace.
        write: called with a binary file, which is a temporary one that is then synced and renamed.
    """
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
    """Make a rename inside the folder survive a power failure."""
    with suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


SPECIAL_FILES = {
    stat.S_ISDIR: "a folder",
    stat.S_ISLNK: "a symbolic link",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISBLK: "a device",
    stat.S_ISCHR: "a device",
}


def check_output(text: str, suffixes: tuple) -> Path:
    """The path of a file to write, which is new or replaces an ordinary file.

    Args:
        text: the path that the user gave.
        suffixes: the suffixes that name a file format, such as (".png", ".pdf").

    Raises:
        UserError: for a suffix that is not listed, a missing folder, and anything that is not an ordinary file.
    """
    path, formats = Path(text), ", ".join(suffixes)
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        kind = next((name for is_kind, name in SPECIAL_FILES.items() if is_kind(mode)), None)
        if kind:
            raise UserError(f"{text!r}: is {kind} and was left as it is; give the name of a file ({formats})")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{text!r}: the suffix names the format, one of {formats}")
    if not path.parent.is_dir():
        raise UserError(f"{text!r}: there is no folder {path.parent}")
    return path


def run_config(folder: Path) -> dict:
    """The config.json of a run folder; {} if there is none, or if it is not the config of a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    is_run = isinstance(config, dict) and isinstance(config.get("arguments"), dict) and "kind" in config
    return config if is_run else {}
