"""What --resume goes on with, by a folder alone or with other settings, and what it refuses and leaves as it is."""

import os
import shutil
import signal
import time

import kills
import pytest
import torch
from helpers import SMALL, Job, here, log, make_images, run, slow
from test_runs import arguments

import train
from engine import report, runs


def test_rates_and_precision_may_change_and_the_log_keeps_it(tmp_path, capfd):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=2))
    capfd.readouterr()
    words = arguments(
        tmp_path, max_steps=4, resume="auto", base_lr=1e-4, warmup_epochs=0, warmup_lr=1e-7, precision="bf16"
    )
    here(train.main, *words)
    warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    kept = [row["warning"] for row in log(tmp_path / "out") if "warning" in row]
    assert len(warned) == 4 and warned == [f"warning: resuming with another setting: {words}" for words in kept]
    assert kept[-1] == "the arithmetic (--precision, --device) was torch.float32 on cpu, is torch.bfloat16 on cpu"
    assert log(tmp_path / "out")[-2]["lr"] < 1e-5
    here(train.main, *words, "--max-steps", 5)  # nothing is new any more
    assert (
        "another setting" not in capfd.readouterr().err
        and [row["warning"] for row in log(tmp_path / "out") if "warning" in row] == kept
    )


@pytest.mark.parametrize("program", slow(["train.py", "finetune.py"], fast=["train.py"]))
def test_a_run_goes_on_by_its_folder_alone(tmp_path, program):
    make_images(tmp_path / "data")
    before = [
        "--data",
        "data",
        *SMALL[:6],
        "--workers",
        0,
        "--recipe",
        "cifar",
        "--epochs",
        3,
        "--warmup-epochs",
        0.5,
        "--batch-size",
        8,
        "--seed",
        3,
        "--betas",
        0.9,
        0.95,
        "--crop-scale",
        0.5,
        1.0,
    ]
    if program == "train.py":
        before += ["--decoder-width", 32, "--decomposition", "split", "--loss-weights", 1, 2, 3]
    else:
        run(
            "train.py",
            "--data",
            "data",
            *SMALL,
            "--recipe",
            "cifar",
            "--batch-size",
            8,
            "--max-steps",
            1,
            "--epochs",
            1,
            "--warmup-epochs",
            0,
            "--output",
            "pre",
            cwd=tmp_path,
        )
        before += ["--checkpoint", "pre/last.pt", "--labels", 0.8, "--ema", 0.9]
    run(program, *before, "--output", "whole", cwd=tmp_path)
    run(program, *before, "--output", "out", "--max-steps", 4, cwd=tmp_path)
    if program == "finetune.py":  # what it began from is not needed any more
        shutil.rmtree(tmp_path / "pre")
    (tmp_path / "data").rename(tmp_path / "moved")
    run(program, "--resume", "out", "--data", "moved", "--max-steps", 1000, cwd=tmp_path)
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    assert kills.equal(kills.state(tmp_path / "out"), kills.state(tmp_path / "whole"))
    for words, said in (
        (["--resume", "out", "--seed", 4], "--seed was 3, is 4"),
        (["--resume", "moved"], "not a run folder"),
        (["--resume", "out", "--output", "x"], "leave --output out"),
        (["--resume", "out", "--data", "whole"], "whole"),
    ):
        assert said in run(program, *words, cwd=tmp_path, status=2).stderr.splitlines()[-1]
    other = "finetune.py" if program == "train.py" else "train.py"
    kind = "pretrain" if program == "train.py" else "finetune"
    assert f"a run of kind {kind!r}, where" in run(other, "--resume", "out", cwd=tmp_path, status=2).stderr
    (tmp_path / "moved" / "class0" / "003.png").rename(tmp_path / "moved" / "class0" / "x.png")
    assert (
        "lacks 1 of its" in run(program, "--resume", "out", "--data", tmp_path / "moved", cwd=tmp_path, status=2).stderr
    )


def test_compilation_may_change_on_resume_and_the_log_says_so(tmp_path, monkeypatch, capfd):
    """Compiled code draws other random numbers for stochastic depth. The setting is kept with the run."""
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=2))
    here(train.main, *arguments(tmp_path, max_steps=4, resume="auto"), "--compile")
    assert "warning: resuming with another setting: --compile was False, is True" in capfd.readouterr().err
    assert "--compile was False, is True" in [row["warning"] for row in log(tmp_path / "out") if "warning" in row]
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["config"]["arguments"]["compile"] is True
    here(train.main, "--resume", tmp_path / "out", "--max-steps", 5)
    assert "another setting" not in capfd.readouterr().err


def test_deterministic_algorithms_give_the_same_run_on_a_cpu(tmp_path):
    make_images(tmp_path / "data")
    for name in ("plain", "fixed"):
        here(train.main, *arguments(tmp_path, name, max_steps=3), *["--deterministic"] * (name == "fixed"))
        assert torch.are_deterministic_algorithms_enabled() == (name == "fixed")
    torch.use_deterministic_algorithms(False)
    assert log(tmp_path / "plain") == log(tmp_path / "fixed")


def snapshot(folder):
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


FOREIGN = {  # what a folder holds before --resume auto: (files, what is said)
    "somebody's config": ({"config.json": b'{"name": "mine"}'}, "not a run folder of this project"),
    "a damaged config": (
        {"config.json": b'{"kind": "pre', "log.jsonl": b'{"step": 1, "loss": 1.0}\n'},
        "not a run folder of this project",
    ),
    "another log": ({"log.jsonl": b'{"event": "start"}\n'}, "not a run folder of this project"),
    "notes": ({"notes.txt": b"keep"}, "not a run folder of this project"),
    "torn checkpoints": (
        {"last.pt": b"half", "previous.pt": b"", "config.json": b"{}"},
        "no checkpoint to resume from",
    ),
    "a folder for a checkpoint": ({"last.pt/x": b""}, "cannot be read (Is a directory)"),
    "a link in a circle": (
        {"last.pt": "last.pt", "previous.pt": b"half"},
        "cannot be read (Too many levels of symbolic links)",
    ),
    "a link to nothing": ({"last.pt": "gone/last.pt"}, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_resume_auto_never_destroys(tmp_path, what):
    files, said = FOREIGN[what]
    make_images(tmp_path / "data")
    for name, content in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)
    before = snapshot(tmp_path / "out")
    error = run("train.py", *arguments(tmp_path, resume="auto"), status=2).stderr
    assert said in error and len(error.splitlines()) == 1 and snapshot(tmp_path / "out") == before, error


@pytest.mark.parametrize(
    "part", slow(["config", "optimizer", "step", "arguments", "model"], fast=["arguments", "model"])
)
def test_a_checkpoint_that_lacks_a_part_is_named(tmp_path, part):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=2))
    last = tmp_path / "out" / "last.pt"
    saved = torch.load(last, weights_only=True)
    (saved["config"] if part == "arguments" else saved).pop(part)
    torch.save(saved, last)
    error = run("train.py", *arguments(tmp_path, resume="auto"), status=2).stderr
    assert (
        f"{last}: not a complete checkpoint of kind 'pretrain': it lacks "
        f"{'the settings of its run' if part == 'arguments' else part}" in error
    )
    if part in ("config", "model", "arguments"):
        for words in (
            ("show.py", "a.jpg", "b.jpg", "--checkpoint", last),
            ("weights.py", "to-timm", last, tmp_path / "w.pt"),
            ("finetune.py", "--data", tmp_path / "data", "--checkpoint", last),
        ):
            error = run(*words, status=2).stderr
            assert "not a complete checkpoint of kind 'pretrain'" in error and len(error.splitlines()) == 1


def test_lines_that_are_none_of_a_log_are_dropped_and_told(tmp_path, capfd):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, "whole"))
    here(train.main, *arguments(tmp_path, max_steps=4))
    path = tmp_path / "out" / "log.jsonl"
    path.write_bytes(b"{}\n[1]\n\x00\xff\n" + path.read_bytes() + b'{"step": "x"}\n{"ste')
    here(train.main, *arguments(tmp_path, resume="auto"))
    assert "log.jsonl: 4 lines that are not log lines, dropped" in capfd.readouterr().err
    assert [row for row in log(tmp_path / "out") if row["step"] != 4] == [
        row for row in log(tmp_path / "whole") if row["step"] != 4
    ]


def test_a_damaged_config_among_runs_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, config in (("a", '{"kind": "pretrain", "arguments": {}}'), ("b", "{}"), ("c", "[]"), ("d", "\x00")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(config)
        (tmp_path / "runs" / name / "last.pt").write_text("")
    assert runs.newest_run("pretrain") == "runs/a/last.pt"


def test_two_runs_in_one_folder(tmp_path):
    make_images(tmp_path / "data", each=40)
    first = Job("train.py", *arguments(tmp_path, epochs=1000))
    path, deadline = tmp_path / "out" / "last.pt", time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    error = run("train.py", *arguments(tmp_path, epochs=1000, resume="auto"), status=2).stderr
    assert f"another run is writing there (process {first.children[0].pid} on " in error
    first.send_signal(signal.SIGKILL)
    first.wait()
    run("train.py", *arguments(tmp_path, epochs=1000, resume="auto", max_steps=1))  # the lock died with it


def test_a_picture_of_a_run_is_drawn_from_at_most_2000_lines():
    for count in (1, 1999, 2000, 2001, 20000):
        steps = report.subsample_rows(list(range(1, count + 1)))
        assert len(steps) <= 2000 and steps[-1] == count and len({b - a for a, b in zip(steps, steps[1:])}) <= 1
