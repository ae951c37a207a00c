"""README.md and docs: their Python snippets run, their command lines parse, their files exist."""

import re
import shlex
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SMALL, here, make_images
from PIL import Image

import bench
import encoders
import finetune
import segment
import show
import train
import weights
from engine import rng
from engine.errors import UserError
from engine.optim import count_flops
from mixing import draw_masks
from model import build

README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "notebooks" / "README.md",
    ROOT / "notebooks" / "assignment.md",
    *sorted((ROOT / "results").glob("*/README.md")),
]
TEXT = "\n".join(path.read_text() for path in PAGES)
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = sorted(
    {
        match
        for match in re.findall(
            r"(?<!/)\b(?:train|finetune|segment|show|weights|bench)\.py[^\n`]*", " ".join(TEXT.split("\\\n"))
        )
        if ("--" in match or "to-timm" in match) and "--help" not in match
    }
)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"label": k % 2, "image": Image.new("RGB", (8, 8))} for k in range(4)]
    told = []
    tracker = SimpleNamespace(
        start_run=lambda run_name: nullcontext(), log_metrics=lambda metrics, step: told.append((metrics, step))
    )
    for name, module in (
        ("datasets", SimpleNamespace(load_dataset=lambda name, split: rows)),
        ("mlflow", tracker),
    ):  # what is not installed here
        monkeypatch.setitem(sys.modules, name, module)
    if "runs/x/" in SNIPPETS[number]:
        make_images(tmp_path / "data")
        here(
            train.main,
            "--data",
            tmp_path / "data",
            *SMALL,
            "--model",
            "swin_micro",
            "--recipe",
            "cifar",
            "--window",
            4,
            "--image-size",
            64,
            "--max-steps",
            1,
            "--batch-size",
            2,
            "--output",
            "runs/x",
        )
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), {})
    assert "mlflow" not in SNIPPETS[number] or told[0][0]["loss"] > 0 and told[0][1] == 1
    assert (
        "load_dataset" not in SNIPPETS[number] or len(list((tmp_path / "data" / "mine" / "train").glob("*/*.png"))) == 4
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    script, *words = shlex.split(command.removesuffix(" &"), comments=True)
    monkeypatch.setattr(finetune, "resolve_model", lambda args: "swin_base")
    if script == "bench.py":
        args, rest = bench.arguments(words)
        assert not rest and list(bench.settings_of(args, rest))
    elif script in ("train.py", "finetune.py", "segment.py"):
        monkeypatch.setattr(segment, "resolve_model", lambda args: "swin_base")
        {"train.py": train, "finetune.py": finetune, "segment.py": segment}[script].arguments(words)
    else:  # these stop at the missing file, having understood the rest
        with pytest.raises(UserError, match="no such|does not exist|not found"):
            {"show.py": show, "weights.py": weights}[script].main(words)


def test_files_and_links_exist():
    for path in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name}: {link}"
    listed = re.findall(r"\b\w+\.py\b", README.split("## The files")[1].split("## More")[0])
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("[!_]*.py"))


def test_functions_of_the_equation_table_exist():
    import importlib

    table = README.split("## Equations and functions")[1].split("##")[0]
    for name in re.findall(r"`((?:mixing|plan|backbone|swin|encoders|model|train|finetune)\.[\w.]+)`", table):
        module, *path = name.split(".")
        found = importlib.import_module(module)
        for part in path:
            found = getattr(found, part)


def test_the_front_page_is_short():
    assert len(README.split()) <= 1300


def test_the_counts_of_the_encoders():
    """Parameters and multiply-adds that the table tells, counted anew."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if re.match(r"\| (swin|twins|vit)_", line)
    ]
    assert len(rows) == 3
    for name, *told in rows:
        with torch.device("meta"):
            encoder = encoders.make(name)
        visible = draw_masks(1, encoder.units, 0.75, rng.generator("count"))[0]
        counts = [
            count_flops(lambda: encoder(torch.empty(1, 3, 224, 224, device="meta"), mask)) / 2e9
            for mask in (None, visible)
        ]
        network = build("eesmm", encoder).to("meta")
        found = [
            f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M",
            *(f"{count:.2f} G" for count in counts),
            f"{train.gmacs(network) / 2:.2f} G",
        ]
        assert found == told, name
