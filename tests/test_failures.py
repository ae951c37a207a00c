"""Nothing hangs: whatever goes wrong inside, all processes end within seconds, with the right status, and leave none
behind.
"""

import json
import os
import time

import pytest
import torch
from helpers import ROOT, SMALL, Job, here, log, make_images, run, slow, stop_leftover_processes
from kills import equal, state

import train

FAULTS = {  # where: (what a script does before it runs train.py; workers; status; what is said)
    "training": ("fail(train.EESMM, 'forward', lambda model, *inputs: model.training)", 2, 1, "RuntimeError: injected"),
    "one of the processes": (
        "fail(train.EESMM, 'forward', lambda model, *inputs: model.training and LAST)",
        2,
        1,
        "RuntimeError: injected",
    ),
    "evaluation": ("fail(train, 'evaluate', lambda *_: True)", 2, 1, "RuntimeError: injected"),
    "drawing": (
        "fail(train.show, 'picture', lambda *_: True)",
        0,
        0,
        "warning: out/reconstructions.png not written (RuntimeError: injected)",
    ),
    "the curve": (
        "fail(train.plots, 'loss_curve', lambda *_: True)",
        0,
        0,
        "warning: out/loss.png not written (RuntimeError: injected)",
    ),
    "a worker": ("fail(train.data.Crops, 'read', lambda *_: True)", 2, 1, "RuntimeError: injected"),
    "a worker's death": (
        "fail(train.data.Crops, 'read', lambda *_: os.kill(os.getpid(), 9))",
        2,
        2,
        "a data loader worker was killed",
    ),
    "the first process alone": ("fail(train.runs, 'newest_valid', lambda *_: True)", 0, 1, "RuntimeError: injected"),
    "out of memory": (
        "fail(train.EESMM, 'forward', lambda model, *inputs: model.training, torch.cuda.OutOfMemoryError)",
        2,
        2,
        "halve --batch-size",
    ),
    "a person's Ctrl-C": ("fail(train, 'evaluate', lambda *_: True, KeyboardInterrupt)", 2, 130, "stopped by Ctrl-C"),
}
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train
from engine.dist import run_main
LAST = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1

def fail(owner, name, when, kind=RuntimeError):
    whole, calls = getattr(owner, name), []
    def partly(*inputs, **named):
        calls.append(when(*inputs))
        if calls[-1] and (name != "forward" or sum(calls) >= 3):
            raise kind("injected")
        return whole(*inputs, **named)
    setattr(owner, name, partly)

{fault}
if __name__ == "__main__":
    run_main(train.main)
"""


def broken(folder, fault, *words, processes=1):
    """(status, stdout, stderr, seconds) of train.py with a fault; none of its processes is left."""
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT), fault=fault))
    began = time.monotonic()
    job = Job(folder / "script.py", *words, processes=processes, cwd=folder)
    done = job.wait(timeout=120)
    assert not stop_leftover_processes()
    return job.statuses, done.stdout, done.stderr, time.monotonic() - began


@pytest.mark.parametrize(
    "where, processes",
    slow(
        [(where, processes) for where in FAULTS for processes in (1, 2)],
        fast=[
            ("training", 1),
            ("one of the processes", 2),
            ("evaluation", 2),
            ("drawing", 1),
            ("a worker's death", 1),
            ("out of memory", 1),
        ],
    ),
)
def test_a_fault_ends_all_processes(tmp_path, where, processes):
    fault, workers, status, said = FAULTS[where]
    make_images(tmp_path / "data")
    words = [
        "--data",
        "data",
        *SMALL[:-1],
        workers,
        "--recipe",
        "cifar",
        "--epochs",
        2,
        "--warmup-epochs",
        0,
        "--batch-size",
        8 // processes,
        "--output",
        "out",
        "--resume",
        "auto",
    ]
    statuses, _, error, _ = broken(tmp_path, fault, *words, processes=processes)
    assert said in error and (
        statuses == [0] * processes if status == 0 else status in statuses and 0 not in statuses
    ), (statuses, error[-2000:])
    if "injected" in said and status == 1:
        assert "Traceback" in error  # an error of ours is told whole
    else:
        assert (
            "Traceback" not in error
            and len([line for line in error.splitlines() if line.startswith("script.py: error")]) <= processes
        )


@pytest.mark.slow
def test_torchrun_notices_a_fault_in_one_process(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), fault=FAULTS["one of the processes"][0]))
    make_images(tmp_path / "data")
    words = [
        "--data",
        "data",
        *SMALL[:-1],
        2,
        "--recipe",
        "cifar",
        "--epochs",
        2,
        "--warmup-epochs",
        0,
        "--batch-size",
        4,
        "--output",
        "out",
    ]
    done = run(tmp_path / "script.py", *words, processes=2, cwd=tmp_path, real=True, status=1)
    assert "RuntimeError: injected" in done.stderr


def test_a_compiler_that_is_missing_is_told_before_anything_is_written(tmp_path):
    make_images(tmp_path / "data")
    done = run(
        "train.py",
        "--data",
        "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--batch-size",
        8,
        "--output",
        "out",
        "--compile",
        cwd=tmp_path,
        status=2,
        variables={"PATH": "/empty"},
    )
    assert (
        "torch.compile does not work here" in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not (tmp_path / "out").exists()
    )


# evaluation comes after the checkpoint, and is made up for ------------------------------------------------------------

KILLING = """
import threading
CALLS = []

def killing(*_):
    CALLS.append(1)
    if len(CALLS) == 2:
        [thread.join() for thread in threading.enumerate() if thread.name == "checkpoint"]
        os.kill(os.getpid(), 9)

"""


def killed_in(folder, name, *words):
    """The run with `name`, a function that train.py or finetune.py calls, killing the process in its second call,
    once the checkpoint is written.
    """
    program = "finetune" if "--init" in words else "train"
    owner, _, name = f"program.{name}".rpartition(".")
    fault = f"import {program} as program\nfail({owner}, {name!r}, killing)"
    script = SCRIPT.format(root=str(ROOT), fault=KILLING + fault).replace(
        "run_main(train.main)", "run_main(program.main)"
    )
    (folder / "script.py").write_text(script)
    job = Job(folder / "script.py", *words, cwd=folder)
    job.wait()
    assert job.statuses == [-9]


@pytest.mark.parametrize("program", slow(["train.py", "finetune.py"], fast=["train.py"]))
def test_a_run_whose_evaluation_is_killed_makes_up_for_it(tmp_path, program):
    make_images(tmp_path / "data")
    words = [
        "--data",
        "data",
        *SMALL[:6],
        *SMALL[-2:],
        "--recipe",
        "cifar",
        "--epochs",
        3,
        "--warmup-epochs",
        0,
        "--batch-size",
        8,
    ]
    words += ["--init", "scratch", "--mixup", 0] if program == "finetune.py" else ["--decoder-width", 32]
    run(program, *words, "--output", "whole", cwd=tmp_path)
    killed_in(tmp_path, "evaluate" if program == "train.py" else "probes.evaluate", *words, "--output", "out")
    rows = log(tmp_path / "out")
    assert rows[-1]["step"] == torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] and not any(
        "eval" in name for name in rows[-1]
    )
    run(program, *words, "--output", "out", "--resume", "auto", cwd=tmp_path)
    assert log(tmp_path / "out") == log(tmp_path / "whole") and equal(
        state(tmp_path / "out"), state(tmp_path / "whole")
    )


def test_an_evaluation_is_made_once(tmp_path):
    make_images(tmp_path / "data")
    words = [
        "--data",
        tmp_path / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--epochs",
        2,
        "--warmup-epochs",
        0,
        "--batch-size",
        8,
        "--output",
        tmp_path / "out",
    ]
    here(train.main, *words)
    before = log(tmp_path / "out")
    here(train.main, *words, "--resume", "auto")  # nothing is left to do
    assert log(tmp_path / "out") == before


# processes that do not agree, launchers that are none -----------------------------------------------------------------

DIFFERENT = {
    "another seed": ("sys.argv += ['--seed', '5'] if LAST else []", "--seed is 0 on process 0, 5 on process 1"),
    "another step": (
        "done = train.Loop.begin\ntrain.Loop.begin = lambda loop, lines: (setattr(loop, 'done', int(LAST)), "
        "done(loop, lines))",
        "the step is 0 on process 0, 1 on process 1",
    ),
    "another file": (
        "if LAST: sys.argv[sys.argv.index('data')] = 'renamed'",
        "the list of training images is 23 of checksum",
    ),
    "another class": ("if LAST: sys.argv[sys.argv.index('data')] = 'sorted'", "the classes is 2 of checksum"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_do_not_agree_end_in_one_line(tmp_path, what):
    fault, said = DIFFERENT[what]
    for name in ("data", "renamed", "sorted"):
        make_images(tmp_path / name)
    (tmp_path / "renamed" / "class0" / "003.png").rename(tmp_path / "renamed" / "class0" / "other.png")
    (tmp_path / "sorted" / "class1").rename(tmp_path / "sorted" / "class2")
    words = ["--data", "data", *SMALL, "--recipe", "cifar", "--epochs", 1, "--batch-size", 4, "--output", "out"]
    statuses, _, error, _ = broken(tmp_path, fault, *words, processes=2)
    assert (
        statuses == [2, 2]
        and said in error
        and len(error.strip().splitlines()) == 1
        and not (tmp_path / "out").exists()
    ), error


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"WORLD_SIZE": 4}, "WORLD_SIZE is 4, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a number"),
    ],
)
def test_a_launcher_that_is_none(tmp_path, variables, said):
    error = run("train.py", cwd=tmp_path, status=2, variables=variables).stderr
    assert said in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


# Ctrl-C where no run is there yet to stop -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, words",
    [
        # once: a second interrupt may come while the first one's clean-up runs
        (
            "import itertools\nfrom images import decode\ncalls = itertools.count()\nfail(decode, 'to_rgb', "
            "lambda *_: next(calls) == 0 and os.kill(os.getpid(), 2))",
            ["--cache", "cache"],
        ),
        (
            "import finetune as train\nfail(train.probes, 'nearest_neighbours', lambda *_: os.kill(os.getpid(), 2))",
            ["--init", "scratch", "--protocol", "knn", "--model", "swin_nano", "--image-size", 16, "--window", 2],
        ),
    ],
    ids=["cache", "knn"],
)
def test_ctrl_c_during_a_long_call_is_one_line(tmp_path, fault, words):
    make_images(tmp_path / "data")
    statuses, _, error, _ = broken(tmp_path, fault, "--data", "data", *words, "--output", "out")
    assert (statuses, error) == ([130], "script.py: error: stopped by Ctrl-C\n")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("cache/*.npz"))


def test_classes_of_any_name_are_drawn_and_resumed(tmp_path, drawn):
    make_images(tmp_path / "data")
    (tmp_path / "data" / "class0").rename(tmp_path / "data" / "$5_$10")
    os.rename(tmp_path / "data" / "class1", os.fsencode(tmp_path / "data") + b"/c\xe4t ^_\\")
    words = [
        "--data",
        "data",
        *SMALL[:6],
        "--recipe",
        "cifar",
        "--epochs",
        2,
        "--warmup-epochs",
        0,
        "--batch-size",
        8,
        "--init",
        "scratch",
        "--output",
        "out",
    ]
    done = run("finetune.py", *words, "--max-steps", 2, cwd=tmp_path)
    assert "warning" not in done.stderr and (tmp_path / "out" / "confusion.png").stat().st_size > 5000
    run("finetune.py", *words, "--resume", "auto", cwd=tmp_path)
    assert len(json.loads((tmp_path / "out" / "per_class.json").read_text())) == 2
