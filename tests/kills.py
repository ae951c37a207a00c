"""Kill a training run with SIGKILL many times, resume it each time, and compare it with a run that was never
interrupted.

    python tests/kills.py FOLDER --kills 200            one process
    python tests/kills.py FOLDER --kills 10 --processes 2

A kill counts only after the resumed run has logged a new step. Every third one waits for a checkpoint to be in the
middle of its write, every third for the moment after its rename; writes are slowed for that. Prints the count by kind
and whether weights, optimiser state and log (without its time_ fields) came out bit-identical; exit status 1 if not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from helpers import SMALL, descendants, environment, log, make_images  # noqa: E402

import train  # noqa: E402
from engine import checkpoints  # noqa: E402

KINDS = ("any moment", "during a write", "after the rename")


def slow_writes(marks: Path):
    """Make checkpoint writes slow and visible: a line in `marks` in the middle of each write and after each rename."""
    save, replace = torch.save, os.replace

    def mark(word):
        with open(marks, "a") as file:
            file.write(word + "\n")
        time.sleep(0.05)

    def slow_save(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)  # what a reader would find in the middle of the write
        mark(KINDS[1])
        file.seek(0)
        save(state, file)

    def slow_replace(source, target):
        replace(source, target)
        if Path(target).name == "last.pt":
            mark(KINDS[2])

    checkpoints.torch.save, checkpoints.os.replace = slow_save, slow_replace


def start(arguments, marks, processes):
    """The process (group) id of a training run."""
    if processes > 1:
        distributed = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            __file__,
            "--child",
            marks,
        ]
        with open(os.devnull, "w") as null:
            return subprocess.Popen(
                [str(x) for x in [*distributed, *arguments]],
                env=environment(),
                stdout=null,
                stderr=null,
                start_new_session=True,
            ).pid
    child = os.fork()  # torch is imported but has not run: no threads to lose
    if child == 0:
        os.setsid()
        output = os.open(f"{marks}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            status = run_child(marks, arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    return child


def run_child(marks, arguments):
    torch.set_num_threads(1)
    slow_writes(Path(marks))
    return train.main([str(argument) for argument in arguments])


def state(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    return {key: saved[key] for key in ("model", "optimizer", "step", "failures", "meters")}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def logged_steps(folder) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def wait_for_end(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1500, help="bound on the whole test")
    args = parser.parse_args()
    make_images(args.folder / "data", each=120 if args.kills > 5 else 40)
    epochs = 2 + args.kills // 10  # of 28 steps each, or 9; a kill costs the run about two
    common = [
        "--data",
        args.folder / "data",
        *SMALL[:-2],
        "--recipe",
        "cifar",
        "--epochs",
        epochs,
        "--warmup-epochs",
        1,
        "--batch-size",
        4 // args.processes,
        "--accumulate",
        2,
        "--log-every",
        1,
        "--checkpoint-every-steps",
        2,
        "--drop-path",
        0.1,
        "--eval-images",
        4,
    ]
    deadline = time.monotonic() + args.seconds
    whole = start(
        [*common, "--workers", 0, "--output", args.folder / "whole"], args.folder / "whole.marks", args.processes
    )
    assert wait_for_end(whole) == 0, "the uninterrupted run failed"

    chance, counts, out, marks = (
        random.Random(0),
        dict.fromkeys(KINDS, 0),
        args.folder / "killed",
        args.folder / "marks",
    )
    finished = False
    while sum(counts.values()) < args.kills and not finished and time.monotonic() < deadline:
        kind = KINDS[sum(counts.values()) % 3]
        marks.write_text("")
        pid = start(
            [*common, "--workers", chance.choice((0, 1)), "--output", out, "--resume", "auto"], marks, args.processes
        )
        time.sleep(0.2)
        seen, began = None, time.monotonic()
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert status == 0, (
                    f"the resumed run failed with status {os.waitstatus_to_exitcode(status)}: see {marks}.out"
                )
                finished = True
                break
            steps = logged_steps(out)
            if seen is None or steps < seen:  # the log is cut back when the run resumes
                seen = steps
            if steps > seen and (kind == KINDS[0] or kind in marks.read_text()) or time.monotonic() > deadline:
                time.sleep(chance.random() * 0.1)
                for member in descendants(pid):
                    with suppress(ProcessLookupError):
                        os.kill(member, signal.SIGKILL)
                os.waitpid(pid, 0)
                counts[kind] += steps > seen
                break
            time.sleep(0.002)
            if time.monotonic() - began > 120:
                raise SystemExit("no new step in two minutes")
    if not finished:
        assert (
            wait_for_end(start([*common, "--workers", 0, "--output", out, "--resume", "auto"], marks, args.processes))
            == 0
        )
    same = equal(state(args.folder / "whole"), state(out)), log(args.folder / "whole") == log(out)
    print(
        f"{sum(counts.values())} kills with {args.processes} process(es): "
        + ", ".join(f"{n} {kind}" for kind, n in counts.items())
        + f"; steps {state(out)['step']}; weights and optimiser identical: {same[0]}; log identical: {same[1]}"
    )
    return 0 if all(same) and (sum(counts.values()) >= args.kills) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_child(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
