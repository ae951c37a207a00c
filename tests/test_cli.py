"""Every flag of every script out of range, and each class of file error: one line on stderr, exit status 2, nothing
written.
"""

import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, here, log, make_images, run

import bench
import finetune
import images
import segment
import show
import train
import weights
from engine import VERSION, dist, flags, runs
from images import sources

NAN_INF = [(flag, value) for flag in ("--mask-ratio", "--base-lr", "--weight-decay") for value in ("nan", "inf")]
TRAIN = [
    ("--epochs", "0"),
    ("--epochs", "nan"),
    ("--warmup-epochs", "-1"),
    ("--max-steps", "-1"),
    ("--batch-size", "0"),
    ("--accumulate", "0"),
    ("--base-lr", "-1"),
    ("--base-lr", "fast"),
    ("--min-lr", "-1"),
    ("--warmup-lr", "-1"),
    ("--weight-decay", "-0.1"),
    ("--layer-decay", "0"),
    ("--layer-decay", "1.1"),
    ("--clip", "-1"),
    ("--drop-path", "1"),
    ("--mask-ratio", "1.5"),
    ("--mask-ratio", "0.001"),
    ("--mask-ratio", "0.999"),
    ("--masks", "some"),
    ("--sources", "0"),
    ("--sources", "1"),
    ("--weights", "0.9 0.9"),
    ("--weights", "1"),
    ("--weights", "-1 2"),
    ("--views", "five"),
    ("--view-angle", "400"),
    ("--view-scale", "0 1"),
    ("--view-crop", "0.5"),
    ("--decomposition", "guess"),
    ("--assignment", "best"),
    ("--decoder-blocks", "9"),
    ("--decoder-blocks", "0"),
    ("--decoder-width", "100"),
    ("--loss", "l3"),
    ("--loss-units", "none"),
    ("--loss-weights", "1 1"),
    ("--precision", "int8"),
    ("--precision", "fp16"),
    ("--device", "tpu"),
    ("--device", "cuda"),
    ("--seed", "-1"),
    ("--workers", "-1"),
    ("--log-every", "0"),
    ("--checkpoint-every-steps", "0"),
    ("--checkpoint-every", "0"),
    ("--checkpoint-every", "nan"),
    ("--max-bad-share", "2"),
    ("--crop-scale", "0.5"),
    ("--crop-scale", "2 3"),
    ("--crop-scale", "0 0"),
    ("--crop-scale", "0.9 0.3"),
    ("--crop-ratio", "0 1"),
    ("--seed", "9" * 30),
    ("--epochs", "1" + "0" * 400),
    ("--image-size", "33"),
    ("--image-size", "4"),
    ("--window", "0"),
    ("--unit", "12"),
    ("--betas", "0.9 1"),
    ("--adam-eps", "0"),
    ("--eval-images", "0"),
    ("--model", "swin_huge"),
    ("--method", "beit"),
    ("--method", "greenmim --sources 2"),
    ("--recipe", "fast"),
    ("--data", "/no/such/folder"),
    ("--max-megapixels", "0"),
    ("--download", ""),
    ("--resume", "auto"),
    ("--resume", "/no/such/file.pt"),
    ("--frobnicate", "1"),
    ("--batch-size", "7"),
    ("--accumulate", "3"),
    ("--batch-size", "100000"),
    ("--sources", "6 --decomposition split"),
    ("--weights", "0.7 0.3 --decomposition split"),
    *NAN_INF,
]
FINETUNE = [
    ("--labels", "0"),
    ("--labels", "2"),
    ("--protocol", "guess"),
    ("--init", "imagenet"),
    ("--randaugment", "99"),
    ("--mixup", "-1"),
    ("--cutmix", "nan"),
    ("--erasing", "2"),
    ("--smoothing", "1"),
    ("--ema", "1"),
    ("--neighbours", "0"),
    ("--probe-lr", "0"),
    ("--checkpoint", "/no/such.pt"),
    ("--eval", ""),
    ("--init", "scratch --checkpoint x.pt"),
    ("--split", "val"),
    ("--split", "some"),
    ("--predict", "x"),
    ("--predict", "x --checkpoint y.pt --data z"),
    ("--protocol", "features"),
    ("--resume", "auto --output x --protocol knn"),
    ("--eval", "--checkpoint x.pt --labels 0.1"),
    ("--eval", "--checkpoint x.pt --model swin_tiny"),
    ("--data", "/no/such --init scratch"),
    ("--data", "cifar10 --init scratch"),
]


def refused(main, arguments, capsys, monkeypatch, tmp_path, writes=False):
    """Run a program in this process; hold it to one line on stderr, status 2 and an untouched folder."""

    def accepted(*_):
        raise AssertionError("accepted")

    def few(size, held_out=False):
        return sources.MemoryImages(torch.zeros(2800, 3, size, size, dtype=torch.uint8), np.zeros(2800, int), ["one"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "create_folder", accepted) if not writes else None
    monkeypatch.setattr(images, "photographs", few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "stdout", sys.stdout), monkeypatch.setattr(sys, "stderr", sys.stderr)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        dist.run_main(lambda: main(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    lines = [line for line in error.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and "error: " in error and "Traceback" not in error, error
    assert sorted(tmp_path.rglob("*")) == before
    return error


@pytest.mark.parametrize("flag, value", TRAIN, ids=lambda x: x or "alone")
def test_train_refuses(flag, value, capsys, monkeypatch, tmp_path):
    refused(train.main, [flag, *value.split()], capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("flag, value", FINETUNE, ids=lambda x: x or "alone")
def test_finetune_refuses(flag, value, capsys, monkeypatch, tmp_path):
    refused(finetune.main, [flag, *value.split()], capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("main, words", [(train.main, []), (finetune.main, ["--init", "scratch"])])
def test_data_that_is_empty_is_refused(main, words, capsys, monkeypatch, tmp_path):
    assert "--data is empty" in refused(main, ["--data", "", *words], capsys, monkeypatch, tmp_path)


def test_output_that_is_not_empty_or_not_writable(capsys, monkeypatch, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "cannot be written" in refused(
        train.main, ["--output", "/proc/nothing/x"], capsys, monkeypatch, tmp_path, writes=True
    )
    assert "not empty" in refused(train.main, ["--output", "full"], capsys, monkeypatch, tmp_path)
    assert "is a file" in refused(train.main, ["--output", "full/x"], capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        lambda out: (weights.main, "to-timm", "w.pt", out),
        lambda out: (show.main, "a.jpg", "b.jpg", "--checkpoint", "w.pt", "-o", out),
        lambda out: (bench.main, "--output", out),
    ],
    ids=["weights", "show", "bench"],
)
def test_outputs_that_are_never_replaced(capsys, monkeypatch, tmp_path, program):
    suffix = program("x")[0] is weights.main and ".pt" or program("x")[0] is show.main and ".png" or ".json"
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"link{suffix}").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for out, said in (
        (f"folder{suffix}", "is a folder"),
        ("/", "is a folder"),
        ("", "is a folder"),
        (f"pipe{suffix}", "is a pipe"),
        ("/dev/null", "is a device"),
        (f"link{suffix}", "is a symbolic link"),
        ("file.xyz", "the suffix names the format"),
        ("file", "the suffix names"),
        (f"nowhere/x{suffix}", "there is no folder nowhere"),
        (f"file/x{suffix}", "there is no folder file"),
    ):
        main, *words = program(out)
        assert said in refused(main, words, capsys, monkeypatch, tmp_path)
    assert (tmp_path / f"link{suffix}").is_symlink()


@pytest.mark.parametrize("main", [train.main, finetune.main, segment.main, show.main, weights.main, bench.main])
def test_every_program_says_its_version(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(
        rf"\S+ {re.escape(VERSION)}, commit ([0-9a-f]{{40}}\+?|unknown)\n", capsys.readouterr().out
    )
    assert f"version: {VERSION}" in (ROOT / "CITATION.cff").read_text()


def test_checkpoints_of_another_kind(capsys, monkeypatch, tmp_path):
    make_images(tmp_path / "data")
    here(
        train.main,
        "--data",
        tmp_path / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--max-steps",
        1,
        "--batch-size",
        8,
        "--output",
        tmp_path / "run",
    )
    capsys.readouterr()
    last = str(tmp_path / "run" / "last.pt")
    check = lambda main, *words: refused(main, [str(word) for word in words], capsys, monkeypatch, tmp_path)
    assert "not a checkpoint of kind 'finetune'" in check(
        finetune.main, "--data", tmp_path / "data", "--checkpoint", last, "--eval"
    )
    assert (
        "last.pt: holds swin_nano; the tensors do not fit a Swin Transformer of patch 4, channels 3, width 96, "
        "depths (2, 2, 6, 2)"
        in check(finetune.main, "--data", tmp_path / "data", "--checkpoint", last, "--model", "swin_tiny")
    )
    saved = torch.load(last, weights_only=True)
    saved["model"].pop("head.bias")
    torch.save(saved, tmp_path / "broken.pt")
    assert "does not fit" in check(show.main, "a.jpg", "b.jpg", "--checkpoint", tmp_path / "broken.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    assert "not a checkpoint of kind 'pretrain'" in check(
        show.main, "a.jpg", "b.jpg", "--checkpoint", tmp_path / "other.pt"
    )
    check(weights.main, "to-torchvision", tmp_path / "other.pt", tmp_path / "out.pt")
    check(finetune.main, "--data", tmp_path / "data", "--checkpoint", tmp_path / "other.pt")
    assert f"is a folder; give the file, {last}" in check(
        finetune.main, "--data", tmp_path / "data", "--checkpoint", tmp_path / "run"
    )
    assert "is a file; give the folder" in check(train.main, "--data", tmp_path / "other.pt")


def test_out_of_memory_suggests_what_helps(capsys, monkeypatch, tmp_path):
    def full(arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    error = refused(full, [], capsys, monkeypatch, tmp_path)
    assert all(word in error for word in ("--batch-size", "--accumulate", "--activation-checkpointing"))


@pytest.mark.parametrize(
    "script, words, expected",
    [
        ("train.py", ["--mask-ratio", "1.0"], "mask ratio"),
        ("train.py", ["--data", "nowhere"], "no such folder"),
        ("finetune.py", ["--labels", "7"], "--labels"),
        ("show.py", ["a.jpg"], "--checkpoint"),
        ("weights.py", ["to-nowhere", "a", "b"], "invalid choice"),
    ],
)
def test_real_command_lines(script, words, expected, tmp_path):
    done = run(script, *words, cwd=tmp_path, status=2)
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir()), (
        done.stderr
    )


@pytest.mark.parametrize("program", [train, finetune, show, weights])
def test_help_explains_every_flag(program, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("program", [train, finetune])
def test_every_flag_has_a_help_line(program, monkeypatch):
    seen = {}
    monkeypatch.setattr(flags, "parse_with_recipe", lambda parser, *a, **k: seen.update(parser=parser))
    program.arguments([])
    assert [action.option_strings for action in seen["parser"]._actions if not action.help] == []


def test_epochs_need_not_be_whole(tmp_path):
    assert (
        flags.epoch_count("2.5") == 2.5
        and flags.epoch_count("200.0") == 200
        and isinstance(flags.epoch_count("200.0"), int)
    )
    make_images(tmp_path / "data", each=21)  # 40 training images, 10 steps an epoch
    here(
        train.main,
        "--data",
        tmp_path / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--batch-size",
        4,
        "--epochs",
        0.5,
        "--output",
        tmp_path / "x",
    )
    assert log(tmp_path / "x")[-1]["step"] == 5
