"""Files that are written completely or not at all, and the config.json by which a run folder is known."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError


def write_atomically(path: Path, write):
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


KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISLNK: "a symbolic link",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISBLK: "a device",
    stat.S_ISCHR: "a device",
}


def check_output(text: str, suffixes: tuple) -> Path:
    """The path of a file to write, new or in place of an ordinary one, of a format that its suffix names. UserError for any other."""
    path, listed = Path(text), ", ".join(suffixes)
    with suppress(FileNotFoundError, NotADirectoryError):
        kind = next((name for test, name in KINDS.items() if test(os.lstat(path).st_mode)), None)
        if kind:
            raise UserError(f"{text!r}: is {kind} and was left as it is; give the name of a file ({listed})")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{text!r}: the suffix names the format, one of {listed}")
    if not path.parent.is_dir():
        raise UserError(f"{text!r}: there is no folder {path.parent}")
    return path


def sync_folder(folder: Path):
    """Make a rename in the folder survive a power cut."""
    with suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def run_config(folder: Path) -> dict:
    """A run's config.json; empty where there is none, or one that no run of ours wrote."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and isinstance(config.get("arguments"), dict) and "kind" in config else {}
