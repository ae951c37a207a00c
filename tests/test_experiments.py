"""The study's driver at tiny size, and the page made from the logs."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import ROOT, make_images, slow
from PIL import Image
from test_notebooks import PATHS

sys.path.insert(0, str(ROOT / "experiments"))
import cifar10  # noqa: E402
import host  # noqa: E402
import nuclei  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import trees  # noqa: E402

import train  # noqa: E402
from engine import dist, loop  # noqa: E402
from engine.errors import UserError
from engine.flags import select
from model import from_settings  # noqa: E402

TINY = dict(
    model="swin_nano",
    epochs=2,
    labels=0.5,
    finetune_epochs=2,
    lr=1e-3,
    scratch_lr=1e-3,
    warmup=1 / 8,
    pretrain="--batch-size 8 --decoder-width 32 --eval-images 8 --image-size 16 --window 2",
    finetune="--batch-size 4 --warmup-epochs 0 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 --image-size 16 "
    "--window 2",
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    for part in ("train", "test"):
        make_images(tmp_path / "data" / part)
    monkeypatch.setattr(cifar10, "RESULTS", tmp_path / "results" / "cifar10")
    monkeypatch.setattr(cifar10, "IMAGES", 24)
    monkeypatch.setattr(cifar10, "SCALES", {"cpu": TINY})
    monkeypatch.setattr(
        cifar10,
        "STUDIES",
        {
            "equal epochs": cifar10.Study(["scratch", "eesmm split"], (0, 1), 0, "One."),
            "equal time": cifar10.Study(["scratch", "greenmim", "eesmm split"], (0,), 1, "Two."),
            "four times as long": cifar10.Study(["scratch"], (0,), 4, "Three."),
            "levers": cifar10.Study(["greenmim all"], (0,), 0, "Four."),
        },
    )
    (tmp_path / "results" / "cifar10").mkdir(parents=True)
    for name, rows in (("pretrain", [("eesmm", 80.0), ("greenmim", 40.0)]), ("finetune", [("dense", 12.0)])):
        (tmp_path / "results" / "cifar10" / f"speed-cpu-{name}.json").write_text(
            json.dumps(
                {
                    "command": "bench.py",
                    "machine": "one",
                    "rows": [{"method": method, "source_images_per_second": speed} for method, speed in rows],
                }
            )
        )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [
        "--data",
        str(tmp_path / "data"),
        "--cache",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "runs"),
        "--scale",
        "cpu",
        "--device",
        "cpu",
        "--quiet",
    ]


def test_equal_time_is_counted_by_the_measured_speeds(tiny):
    assert cifar10.epochs("cpu", "equal epochs", "greenmim") == (2, 2)
    assert cifar10.epochs("cpu", "equal time", "eesmm split") == (2, 2)
    assert cifar10.epochs("cpu", "equal time", "greenmim") == (1.0, 2)  # half as fast: half the epochs
    assert cifar10.epochs("cpu", "equal time", "scratch") == (
        0,
        2.6,
    )  # 2 x 24 / 80 s more, at 12 images/s: 7.2 of 12 images
    assert cifar10.epochs("cpu", "four times as long", "eesmm split") == (8, 8)
    assert cifar10.epochs("cpu", "four times as long", "scratch") == (0, 10.4)


def test_the_family_s_speeds_are_ratios_measured_in_one_run(tiny, tmp_path):
    rows = [
        ("eesmm", "swin_nano", 20.0),
        ("mixmae", "swin_nano", 5.0),
        ("mae", "vit_micro", 2.0),
        ("dense", "swin_nano", 6.0),
        ("dense", "vit_micro", 3.0),
    ]
    (tmp_path / "results" / "cifar10" / "speed-cpu-family.json").write_text(
        json.dumps(
            {
                "command": "",
                "machine": "",
                "rows": [
                    {"method": method, "model": model, "source_images_per_second": speed}
                    for method, model, speed in rows
                ],
            }
        )
    )
    assert cifar10.epochs("cpu", "equal time", "mixmae") == (0.5, 2)  # a quarter of eesmm's speed
    assert cifar10.epochs("cpu", "equal time", "mae on vit") == (0.2, 1)  # a tenth; fine-tuned at half of the speed
    assert cifar10.epochs("cpu", "equal time", "mixmae, half") == (0.25, 2.3)
    assert cifar10.epochs("cpu", "equal time", "mae on vit, half") == (0.1, 1.15)


@pytest.mark.parametrize(
    "arm, name, command",
    [("mixmae", "family", "cifar10.py --scale cpu --speeds family"), ("greenmim", "pretrain", "bench.py --no-memory")],
)
def test_speeds_that_are_missing_are_one_line(tiny, tmp_path, arm, name, command):
    path = tmp_path / "results" / "cifar10" / f"speed-cpu-{name}.json"
    path.unlink(missing_ok=True)
    with pytest.raises(UserError, match=re.escape(f"equal time needs {path}")) as error:
        cifar10.epochs("cpu", "equal time", arm)
    assert "\n" not in str(error.value) and command in str(error.value)


def test_a_validation_part_is_one_in_ten_of_the_training_images(tmp_path):
    make_images(tmp_path / "data" / "train", each=20)
    for _ in range(2):  # what is there is used
        cifar10.validation_part(tmp_path / "data", tmp_path / "part")
    parts = {part: {path.resolve() for path in (tmp_path / "part" / part).rglob("*.png")} for part in ("train", "test")}
    assert parts["train"].isdisjoint(parts["test"]) and parts["train"] | parts["test"] == set(
        (tmp_path / "data" / "train").rglob("*.png")
    )
    assert sorted(str(path.relative_to(tmp_path / "part")) for path in (tmp_path / "part" / "test").rglob("*.png")) == [
        f"test/class{c}/{k:03}.png" for c in range(2) for k in (0, 10)
    ]
    with pytest.raises(UserError, match="has no class folders in train/"):
        cifar10.validation_part(tmp_path / "elsewhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


STARTED = [(scale, arm) for scale in cifar10.SCALES for arm, flags in cifar10.VARIANTS.items() if flags]


@pytest.mark.parametrize("scale, arm", slow(STARTED, fast=STARTED[::12]))
def test_every_arm_is_a_command_that_starts(scale, arm, monkeypatch):
    monkeypatch.setattr(cifar10, "speed", lambda *of: 100.0)
    name = next(name for name, study in cifar10.STUDIES.items() if arm in study.variants)
    args = train.arguments(cifar10.steps(cifar10.arguments(["--scale", scale]), name, arm, 0)[0].command[1:])
    assert (
        loop.micro_batch_size(select(loop.LoopConfig, vars(args)), 1, args.sources, cifar10.IMAGES) == args.batch_size
    )
    assert from_settings(vars(args)).sources == args.sources


def test_a_run_with_other_settings_than_the_study_has_now_is_refused(tiny, tmp_path, monkeypatch):
    run_folder = tmp_path / "elsewhere"
    run_folder.mkdir()
    steps = cifar10.steps(cifar10.arguments(tiny), "equal epochs", "scratch", 0)
    step = replace(steps[0], folder=run_folder)
    assert step.record == tmp_path / "results" / "cifar10" / "cpu" / "scratch" / "seed0.jsonl"
    (run_folder / "config.json").write_text(json.dumps({"command": " ".join([*step.command, "--output", "elsewhere"])}))
    (run_folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert study.to_do(steps) == steps
    for _ in range(2):  # a phase made again replaces itself
        study.record(step)
        assert study.recorded(step.record)[step.phase][1] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert study.to_do(steps) == steps[1:]
    monkeypatch.setitem(cifar10.SCALES["cpu"], "scratch_lr", 5e-3)
    for program in (
        lambda: cifar10.main([*tiny, "--studies", "equal epochs"]),
        lambda: report.main(tmp_path / "results"),
    ):
        with pytest.raises(UserError, match="finetune was run with --base-lr 0.001, the study now has 0.005"):
            program()


def test_pretraining_is_repeated_only_for_a_step_that_is_still_to_do(tmp_path, monkeypatch):
    commands_run = []

    def execute(command, deadline, quiet):
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(exist_ok=True)
        commands_run.append(folder.name)
        (folder / "config.json").write_text(json.dumps({"command": " ".join(command)}))
        (folder / "log.jsonl").write_text('{"step": 1}\n')
        (folder / "last.pt").touch()

    def step(name, **options):
        return study.Step([f"{name}.py"], tmp_path / name, tmp_path / "results" / f"{name}.jsonl", **options)

    def newly_run():
        commands_run.clear()
        study.run_steps([pretraining, *dependents], 0.0, True)
        return commands_run

    monkeypatch.setattr(study, "execute", execute)
    pretraining = step("pretrain")
    dependents = [step(name, pretraining=pretraining, keep_checkpoints=False) for name in ("one", "two")]
    assert newly_run() == ["pretrain", "one", "two"]
    assert (tmp_path / "pretrain" / "last.pt").exists() and not (tmp_path / "one" / "last.pt").exists()
    (tmp_path / "pretrain" / "last.pt").unlink()  # as on another machine
    assert newly_run() == []
    dependents[1].record.unlink()
    assert newly_run() == ["pretrain", "two"]
    dependents[1].record.unlink()
    assert newly_run() == ["two"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_study_goes_on_and_repeats_nothing(tiny, tmp_path):
    results = tmp_path / "results"
    words = ["--studies", "equal epochs", "--seeds", "0"]
    assert cifar10.main([*tiny, *words, "--minutes", "0.05"]) == 75
    assert cifar10.main([*tiny, *words]) == 0
    shutil.rmtree(tmp_path / "runs" / "eesmm-split" / "seed0" / "finetune")
    path = results / "cifar10" / "cpu" / "eesmm-split" / "seed0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    starts = [k for k, line in enumerate(lines) if '"phase"' in line]  # of pretrain, finetune, linear, knn
    path.write_text("".join([*lines[: starts[1]], *lines[starts[2] :]]))
    shutil.rmtree(
        tmp_path / "runs" / "eesmm-split" / "seed0" / "pretrain"
    )  # on another machine: made again where it is needed
    assert cifar10.main([*tiny, *words]) == 0
    logs = {path: path.stat().st_mtime_ns for path in results.rglob("*.jsonl")}
    assert {str(path.relative_to(results / "cifar10" / "cpu")): set(study.recorded(path)) for path in logs} == {
        "scratch/seed0.jsonl": {"finetune", "linear", "knn"},
        "eesmm-split/seed0.jsonl": {"pretrain", "finetune", "linear", "knn"},
    }
    assert cifar10.main([*tiny, "--studies", "equal epochs", "equal time", "--seeds", "0"]) == 0
    assert logs.items() <= {path: path.stat().st_mtime_ns for path in results.rglob("*.jsonl")}.items()
    assert "knn" in study.recorded(results / "cifar10" / "cpu" / "greenmim-equal-time" / "seed0.jsonl")
    pages = []
    for _ in range(2):
        report.main(results)
        pages.append(
            [path.read_bytes() for path in sorted(results.rglob("*")) if path.suffix in (".md", ".json", ".png")]
        )
    assert pages[0] == pages[1]
    page = (results / "README.md").read_text()
    assert "| greenmim all | not run |" not in page and "### Levers\n\nFour.\n\nNot run." in page
    assert page.count("| eesmm split | 2 | 2 |") == 2
    rows = json.loads((results / "cifar10" / "summary.json").read_text())["rows"]
    assert {(row["study"], row["arm"]) for row in rows} == {
        ("equal epochs", "scratch"),
        ("equal epochs", "eesmm split"),
        ("equal time", "scratch"),
        ("equal time", "greenmim"),
        ("equal time", "eesmm split"),
    }
    top1 = {row["arm"]: row["top1"] for row in rows if row["study"] == "equal epochs"}
    assert f"| eesmm split | {top1['eesmm split'] - top1['scratch']:.2f} (1) |" in page
    assert all((results / "cifar10" / row["log"]).exists() for row in rows)


@pytest.mark.slow
def test_the_committed_page_is_made_from_the_committed_logs(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    report.main(tmp_path / "results")
    for name in ("README.md", "cifar10/summary.json"):
        assert (tmp_path / "results" / name).read_text() == (ROOT / "results" / name).read_text(), "run `make results`"


def test_quoted_numbers_are_those_of_the_results():
    page = (ROOT / "results" / "README.md").read_text()
    reading = (ROOT / "results" / "cifar10" / "README.md").read_text()
    front = (ROOT / "README.md").read_text().split("## The result")[1].split("\n## ")[0]
    for text in (reading, front):
        numbers = re.findall(r"\d+\.\d\d(?: ± \d+\.\d\d)?", text)
        assert len(numbers) > 10 and [number for number in numbers if number not in page] == []

    def rows(text):
        """Cells of a table's rows, by the first without what stands in brackets."""
        cells = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
        )
        return {first.split(" (")[0]: rest for first, *rest in cells}

    def table(name):
        return rows(page.split(f"\n### {name}\n")[1].split("\n### ")[0].split("Difference of")[0])

    equal_epochs, longer = table("Equal epochs"), table("Four times as long")
    equal_time = table("Equal time") | table("Stronger baselines") | table("Family")
    for text, columns, count in (
        (reading.split("## What it says")[0], (equal_epochs, equal_time), 10),
        (front, (equal_time, longer), 8),
        (reading.split("## The family at equal time")[1], (equal_time,), 5),
    ):
        arms = rows(text.split("\n\n|")[1])  # without its head, which has lost its first line's mark
        assert len(arms) == count
        for arm, cells in arms.items():
            assert any(cells), arm
            for cell, column in zip(cells, columns):
                assert cell in ("", "the same run") or cell == column[arm][2], arm


def test_accuracies_told_in_notebooks_are_those_of_the_results():
    """Means in the text of notebooks 0 and 8, of any arm, to the decimal they give."""
    values = {}
    for row in json.loads((ROOT / "results" / "cifar10" / "summary.json").read_text())["rows"]:
        values.setdefault((row["study"], row["arm"]), []).append(row["top1"])
    means = {f"{sum(found) / len(found):.1f}" for found in values.values()}
    for name, after, least in (("00_overview", "CIFAR-10", 3), ("08_transfer", "At equal time EESMM", 2)):
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        text = next(
            "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "markdown" and after in "".join(cell["source"])
        )
        told = re.findall(r"\b[3-6]\d\.\d\b", text.split(after)[1].split("\n## ")[0])
        assert len(told) >= least and set(told) <= means, (name, told)


def test_the_host_s_work_is_counted_for_the_fields_of_a_real_step():
    words = "--recipe cifar --model swin_nano --decoder-width 32 --batch-size 4 --device cpu".split()
    threads = torch.get_num_threads()
    row = host.count(train.arguments(words), dist.initialize("cpu", "fp32"))
    torch.set_num_threads(threads)
    assert row["graphs"] == 1 and row["graph_breaks"] == 0 and row["copies"] > 0
    assert all(row[f"launches_{name}"] > 0 for name in ("forward", "backward", "update"))


def test_results_hold_no_path_of_a_machine():
    for path in (ROOT / "results").rglob("*.json*"):
        assert not PATHS.search(path.read_text()), path


def test_a_folder_of_somebody_is_never_emptied(tmp_path):
    """--prepared DIR of the studies: a folder without their mark is refused and left untouched.

    A build that fails half-way leaves no folder.
    """
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    source = tmp_path / "dense" / "nuclei"
    source.mkdir(parents=True)
    for kind in ("image", "instances"):
        tifffile.imwrite(source / f"b_{kind}.tif", np.ones((30, 8, 8), np.uint16))
        tifffile.imwrite(source / f"a_{kind}.tif", np.ones((8, 8), np.uint16))
    Image.new("RGB", (600, 300)).save(tmp_path / "x_YELL_1.png")
    for prepare in (
        lambda folder: nuclei.prepare(tmp_path / "dense", folder),
        lambda folder: trees.prepare(tmp_path, tmp_path / "none", folder),
    ):
        with pytest.raises(UserError, match="^.*mine already exists and was not made by this program.*$"):
            prepare(tmp_path / "mine")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
        (tmp_path / "new").mkdir()  # an empty one is as good as none
        for _ in range(2):  # what is complete is used
            prepare(tmp_path / "new")
        assert (tmp_path / "new" / "whole").exists() and len(list((tmp_path / "new").rglob("*"))) >= 5
        assert all(path.exists() for path in (tmp_path / "new").rglob("*")), "a link that leads nowhere"
        shutil.rmtree(tmp_path / "new")

    def broken(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.build_folder(tmp_path / "half", broken)
    assert not list(tmp_path.glob("*half*")) and not list(tmp_path.glob(".*"))
