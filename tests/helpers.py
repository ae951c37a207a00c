"""What several tests share: command lines in processes of their own, small folders of images, small runs.

Most command lines run in a child forked from a server that has torch imported (Python's own forkserver), which is what
a new
Python would run, without its start. A handful are real: `python train.py`, `torchrun train.py`.
"""

import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "swin_nano", "--image-size", "16", "--window", "2", "--decoder-width", "32", "--workers", "0"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "bench",
        "finetune",
        "show",
        "train",
        "weights",
        "segment",
        "torch.distributed",
        "skimage.data",
        "ipykernel.kernelapp",
    ]
)


def slow(cases, fast):
    """Values of a parametrisation: those in `fast` are run by `make test`, the others only by `make test-all`.

    A case that is a tuple has a value for each argument."""
    cases, fast = list(cases), list(fast)
    assert all(case in cases for case in fast), f"not among the cases: {[case for case in fast if case not in cases]}"
    return [
        case if case in fast else pytest.param(*case if isinstance(case, tuple) else [case], marks=pytest.mark.slow)
        for case in cases
    ]


# pictures -------------------------------------------------------------------------------------------------------------

DRAWING = {"on": False}


@contextmanager
def pictures():
    """Figures are drawn inside this. Elsewhere in the tests a grey square takes the place of each: drawing is four
    fifths of the time of a small run.
    """
    DRAWING["on"] = True
    try:
        yield
    finally:
        DRAWING["on"] = False


def square_or_figure(method, result):
    """A method of matplotlib's Figure that does nothing but call `result` where figures are not drawn."""

    def replacement(self, *inputs, **named):
        return method(self, *inputs, **named) if DRAWING["on"] else result(*inputs, **named)

    return replacement


def grey_square(file, format="png", **_):
    Image.new("RGB", (8, 8), "grey").save(file, format.replace("jpg", "jpeg"))


Figure.savefig = square_or_figure(Figure.savefig, grey_square)
Figure.tight_layout = square_or_figure(Figure.tight_layout, lambda: None)


# processes ------------------------------------------------------------------------------------------------------------


def parents() -> dict[int, int]:
    """The parent of every process that runs on this machine; those that have ended but are not collected yet
    (zombies) are left out.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            found |= {int(path.parent.name): int(parent)} if state != "Z" else {}
    return found


def descendants(pid) -> list[int]:
    """The process and all that it or they started. torchrun's workers are in sessions of their own, so a process
    group would not do.
    """
    table, found = parents(), [pid]
    for member in found:
        found += [child for child, parent in table.items() if parent == member]
    return found


def leftover_processes() -> dict[int, str]:
    """Process ids and command lines of what this test process started and still runs, without Python's own fork
    server and resource tracker.
    """
    own, table, found = os.getpid(), parents(), {}
    token, helpers = (
        f"EESMM_TEST_PROCESS={own}".encode(),
        (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker"),
    )
    below = descendants(own)
    for pid in table.keys() - {own}:
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            ours = pid in below or token in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if ours and not (table[pid] == own and any(name in words for name in helpers)):
                found[pid] = f"{pid}: " + words.replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def stop_leftover_processes(patience=5.0) -> list[str]:
    """Kill what still runs after `patience` seconds; returns what was killed."""
    deadline = time.monotonic() + patience
    while (left := leftover_processes()) and time.monotonic() < deadline:
        gc.collect()  # a loader that nobody refers to stops its workers
        time.sleep(0.05)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(left.values())


def stop_fork_server():
    """Its children's CPU time counts among this process's own only if it is waited for. Python has no public call
    for that.
    """
    multiprocessing.forkserver._forkserver._stop()


def environment(threads=1):
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def as_main(script, words, folder, streams, variables, drawing):
    """In a child of the server: the script as __main__, with its own folder, stdin, stdout, stderr and environment."""
    DRAWING["on"] = drawing
    multiprocessing.set_start_method(None, force=True)  # the usual one, as of a new Python, for its loader's workers
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY), number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, "w" if number else "r", buffering=1) for number in range(3))
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def as_kernel(words, folder, variables):
    """In a child of the server: an IPython kernel, in a process group of its own, as jupyter starts it."""
    os.setpgid(0, 0)
    sys.modules.pop("helpers")  # the notebooks have a module of this name
    sys.path = [path for path in sys.path if Path(path) != Path(__file__).parent]
    DRAWING["on"] = True
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=words[words.index("-f") :])


class ForkedKernel:
    """A kernel in a child of the server, with what jupyter_client asks of a subprocess.Popen. For jupyter_client's
    `launch_kernel`.
    """

    stdin = stdout = stderr = None

    def __init__(self, words, cwd=None, env=None, **_):
        self.child = SERVER.Process(target=as_kernel, args=(words, cwd, env))
        self.child.start()
        self.pid = self.child.pid
        while self.child.is_alive() and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)

    def poll(self):
        return self.child.exitcode

    def wait(self):
        self.child.join()
        return self.child.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class Job:
    """A script running in `processes` children, with what torchrun would tell them; stdout and stderr are read at its
    end.

    variables: of the environment. After `wait`, `statuses` has each child's."""

    def __init__(self, script, *words, processes=1, cwd=None, variables=None):
        self.script, self.folder, self.children = script, Path(tempfile.mkdtemp(prefix="streams-")), []
        variables = variables or {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                variables |= {
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": free.getsockname()[1],
                }
        for rank in range(processes):
            own = {
                name: str(value)
                for name, value in (
                    variables | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else variables
                ).items()
            }
            streams = [os.devnull, str(self.folder / "out"), str(self.folder / "err")]
            child = SERVER.Process(
                target=as_main,
                args=(
                    ROOT / script,
                    [str(word) for word in words],
                    str(cwd or Path.cwd()),
                    streams,
                    own,
                    DRAWING["on"],
                ),
            )
            child.start()
            self.children.append(child)

    def send_signal(self, number):
        for child in self.children:
            os.kill(child.pid, number)

    def wait(self, timeout=300):
        """returncode, stdout and stderr, as subprocess names them. The status is the first that is not 0."""
        for child in self.children:
            child.join(timeout)
            assert child.exitcode is not None, f"{self.script} still runs after {timeout} s"
        self.statuses = [child.exitcode for child in self.children]
        out, err = (
            (self.folder / name).read_text() if (self.folder / name).exists() else "" for name in ("out", "err")
        )
        shutil.rmtree(self.folder)
        return SimpleNamespace(returncode=next(filter(None, self.statuses), 0), stdout=out, stderr=err)


def command(script, *arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, processes=1, cwd=None, status=0, real=False, variables=None):
    """Run a script to its end and hold its exit status against `status`; returns what it printed.

    real: by `python` or `torchrun` itself.
    """
    if real:
        done = subprocess.run(
            command(script, *arguments, processes=processes), cwd=cwd, env=environment(), capture_output=True, text=True
        )
    else:
        done = Job(script, *arguments, processes=processes, cwd=cwd, variables=variables).wait()
    assert done.returncode == status, (
        f"status {done.returncode}, expected {status}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )
    return done


def here(main, *arguments):
    """The same command line without a process of its own, for what does not need one: main(arguments) in this
    process.
    """
    assert main([str(argument) for argument in arguments]) == 0


def make_images(folder, classes=2, each=12, size=16, seed=0):
    """Class folders of small smooth random images."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
        for k in range(each):
            small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            small[..., c % 3] = 255 - small[..., c % 3] // 4  # learnable: a class has its colour
            Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(
                folder / f"class{c}" / f"{k:03}.png"
            )
    return folder


def log(folder, timings=False):
    """Lines of log.jsonl, without the fields that differ from run to run."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return rows if timings else [{k: v for k, v in row.items() if not k.startswith("time_")} for row in rows]
