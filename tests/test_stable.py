"""What later code owes to runs of earlier code: a checkpoint of commit c25f397 goes on as that commit's own program
did.

`tests/data` holds its checkpoint at step 3, and the log, the weights and the masks of step 9, written by
`tests/data/make.py`.
Bits differ between processors and versions of torch, so numbers are held to 1e-5 here; `make test-old` runs both
programs
on one machine and compares bits.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, here, log
from kills import equal
from PIL import Image
from test_segment import grow

import encoders
import finetune
import train
from engine.optim import parameter_groups
from engine.rng import generator
from model import from_settings
from swin import Swin

DATA = Path(__file__).parent / "data"
EARLIEST = "c25f397b4a2c56528ad29d09107fcb7f0e2395a1"
BEFORE_PUBLISHED_RECIPES = "d606d353f77158de6ed20f6579297e2ac08e44b4"


def test_an_old_checkpoint_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encoders.MODELS, "toy", partial(Swin, patch=2, depths=(2, 2), heads=(1, 2), width=16))
    rng = np.random.default_rng(0)
    Path("images").mkdir()
    for k in range(60):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(f"images/{k:02}.png")
    Path("run").mkdir()
    shutil.copy(DATA / "step3.pt", "run/last.pt")
    (tmp_path / "run" / "log.jsonl").write_text(
        "".join(line + "\n" for line in (DATA / "step9.jsonl").read_text().splitlines()[:4])
    )
    words = torch.load(DATA / "step3.pt", weights_only=True)["config"]["command"].split()[1:]
    here(train.main, *words, "--max-steps", 9, "--resume", "auto")

    old, new = (torch.load(path, weights_only=True) for path in (DATA / "step3.pt", "run/last.pt"))
    end = torch.load(DATA / "step9.pt", weights_only=True)
    assert list(new["model"]) == list(old["model"]) == list(end["model"])
    for key, value in end["model"].items():
        assert (new["model"][key] - value).abs().max() < 1e-5, key
    before = [json.loads(line) for line in (DATA / "step9.jsonl").read_text().splitlines()]
    after = log("run", timings=True)
    assert [list(row) for row in after] == [list(row) for row in before]
    for a, b in zip(after, before):
        assert {k: v for k, v in a.items() if not k.startswith("time_")} == pytest.approx(
            {k: v for k, v in b.items() if not k.startswith("time_")}, rel=1e-5
        )

    model = from_settings(old["config"]["arguments"])
    shared = lambda groups: [
        {name: group[name] for name in ("names", "layer", "scale", "weight_decay")} for group in groups
    ]
    assert (
        shared(parameter_groups(model, 0.05, 0.9))
        == shared(old["optimizer"]["param_groups"])
        == shared(new["optimizer"]["param_groups"])
    )
    assert list(dict(model.named_parameters())) == [key for key in old["model"]]
    masks = torch.stack([model.draw(generator(0, "mask", step)).visible for step in range(9)])
    assert torch.equal(masks, end["masks"])


# Both programs on one machine, bit for bit: `make test-old` -----------------------------------------------------------

# Lines of the old program, or of this one in their place, that are not compared: logs and checkpoints are.
REWORDED = (
    "going on with other code",
    "resuming with another commit",
    "batch: ",
    "effective batch size ",
    "layer decay: ",
    "layer-wise ",
    "composites: ",
    "mixed images: ",
    "visible units: ",
    "visible mask units: ",
    "held out, normalised",
    "validation reconstruction error",
    "on mixed images: ",
    "pictures: ",
)


def program_of(commit, tmp_path_factory):
    """A folder with the files of a commit."""
    folder = tmp_path_factory.mktemp(commit)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    assert archive.returncode == 0, (
        f"commit {commit} is not in this clone: fetch the whole history (git fetch --unshallow)"
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


@pytest.fixture(scope="session", params=[EARLIEST, BEFORE_PUBLISHED_RECIPES], ids=lambda commit: commit[:7])
def old_root(request, tmp_path_factory):
    return program_of(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def later_root(tmp_path_factory):
    return program_of(BEFORE_PUBLISHED_RECIPES, tmp_path_factory)


def program(root, folder, script, *words, status=0):
    """Run a script of one of the two programs in `folder`; what it printed, without lines whose words have changed
    since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the demo's k-NN is later than the earliest program
    words = (
        [*words, "--knn-every", 0] if script == "train.py" and "--knn-every" in (root / script).read_text() else words
    )
    done = subprocess.run(
        [sys.executable, str(root / script), *map(str, words)],
        cwd=folder,
        env=environment() | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if not line.startswith(REWORDED) and ": loaded " not in line]


def assert_same_run(a, b):
    """Weights, optimiser, counters and log of two run folders are equal, but for times."""
    assert log(a) == log(b)
    saved = [torch.load(folder / "last.pt", weights_only=True) for folder in (a, b)]
    for part in ("model", "optimizer", "scaler", "failures", "meters", "step", "epoch"):
        assert equal(*(state[part] for state in saved)), part
    masks = [state["progress"].get("masks_redrawn") for state in saved]
    assert masks[0] == masks[1] and [list(state["model"]) for state in saved][0] == list(saved[1]["model"])


SMALL_RUN = [
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    1,
    "--warmup-epochs",
    0.2,
    "--log-every",
    2,
    "--eval-images",
    64,
    "--workers",
    0,
    "--loss-units",
    "hidden",
]  # the old demo's default
WAYS = {
    "subtract": ["--decomposition", "subtract"],
    "split, drop path, layer decay": ["--drop-path", 0.1, "--layer-decay", 0.9, "--unit", 16],
    "independent masks": ["--masks", "independent", "--loss-units", "all"],
    "four views": ["--views", "four", "--decomposition", "subtract"],
    "three sources, accumulated": ["--sources", 3, "--batch-size", 12, "--accumulate", 2],
    "greenmim": ["--method", "greenmim", "--mask-ratio", 0.5],
    "fixed weights": ["--weights", 0.7, 0.3, "--assignment", "fixed", "--activation-checkpointing"],
    "no mask": ["--mask-ratio", 0, "--loss-units", "all"],
    "simmim": ["--method", "simmim", "--drop-path", 0.1],
}


@pytest.mark.old
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_the_old_program_goes_on_bit_for_bit(old_root, tmp_path, way):
    """The old program's run of 8 steps, against its first 4 and 4 of the new program; and the new program's own 8."""
    words = [*SMALL_RUN, *WAYS[way], "--output", "run"]
    program(old_root, tmp_path / "old", "train.py", *words, "--max-steps", 8)
    program(old_root, tmp_path / "both", "train.py", *words, "--max-steps", 4)
    program(ROOT, tmp_path / "both", "train.py", *words, "--max-steps", 8, "--resume", "auto")
    program(ROOT, tmp_path / "new", "train.py", *words, "--max-steps", 8)
    for name in ("both", "new"):
        rows = [
            [row for row in log(tmp_path / folder / "run") if row["step"] > 4 or name == "new"]
            for folder in ("old", name)
        ]
        assert rows[0] == rows[1]
        saved = [torch.load(tmp_path / folder / "run" / "last.pt", weights_only=True) for folder in ("old", name)]
        for part in ("model", "optimizer", "scaler", "failures", "step"):
            assert equal(*(state[part] for state in saved)), part


@pytest.mark.old
@pytest.mark.timeout(1200)
def test_the_demo_and_what_follows_it_are_the_old_programs(old_root, tmp_path):
    """train.py (demo, 30 steps), finetune.py, linear and knn from one checkpoint: logs and printed lines."""
    printed = {}
    for name, root in (("old", old_root), ("new", ROOT)):
        folder = tmp_path / name
        checkpoint = ["--checkpoint", "runs/demo-eesmm-1/last.pt"]
        # the demo counts the error of all units since; said in words, the old loss is the old loss
        printed[name] = [
            program(root, folder, "train.py", "--max-steps", 30, "--loss-units", "hidden"),
            program(root, folder, "finetune.py", "--max-steps", 20),
            program(root, folder, "finetune.py", *checkpoint, "--protocol", "linear", "--output", "runs/linear"),
            program(root, folder, "finetune.py", *checkpoint, "--protocol", "knn", "--output", "runs/knn"),
            program(root, folder, "finetune.py", "--checkpoint", "runs/demo-finetune-1/last.pt", "--eval")[-1:],
        ]  # the line before names the part
        program(
            root, folder, "weights.py", "to-timm", "runs/demo-eesmm-1/last.pt", "timm.pt"
        )  # now prints the code that loads it
    assert printed["old"] == printed["new"]
    for run in ("demo-eesmm-1", "demo-finetune-1", "demo-finetune-scratch-1"):
        assert_same_run(tmp_path / "old" / "runs" / run, tmp_path / "new" / "runs" / run)
    for run in ("linear", "knn"):
        assert log(tmp_path / "old" / "runs" / run) == log(tmp_path / "new" / "runs" / run)
    for picture in (
        "demo-eesmm-1/loss.png",
        "demo-finetune-1/confusion.png",
    ):  # reconstructions.png has larger letters since
        assert (tmp_path / "old" / "runs" / picture).read_bytes() == (
            tmp_path / "new" / "runs" / picture
        ).read_bytes(), picture
    weights = [torch.load(tmp_path / name / "timm.pt", weights_only=True) for name in ("old", "new")]
    assert equal(*weights)


PUBLISHED = [
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    1,
    "--warmup-epochs",
    0.2,
    "--log-every",
    2,
    "--eval-images",
    64,
    "--workers",
    0,
]
RECIPES = {
    "mae": ["--model", "vit_micro", "--decoder-blocks", 1],
    "greenmim": ["--model", "swin_nano", "--window", 4],
    "mixmae": ["--model", "swin_nano", "--window", 4, "--decoder-blocks", 1],
}
TUNED = [
    "--init",
    "scratch",
    "--image-size",
    32,
    "--batch-size",
    16,
    "--epochs",
    1,
    "--warmup-epochs",
    0.1,
    "--log-every",
    2,
    "--workers",
    0,
]
# what has other settings or other random numbers in new runs since: a run that began earlier continues as it began
CHANGED = {
    **{
        f"pre-training {recipe}": ["train.py", "--recipe", recipe, "--method", recipe, *PUBLISHED, *words]
        for recipe, words in RECIPES.items()
    },
    "fine-tuning mae": ["finetune.py", *TUNED, "--recipe", "mae", "--model", "vit_micro"],
    "fine-tuning micro": ["finetune.py", *TUNED, "--recipe", "micro", "--model", "swin_nano"],
}


@pytest.mark.old
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", [*CHANGED, "segmentation"])
def test_a_run_from_before_the_published_recipes_goes_on_bit_for_bit(later_root, tmp_path, way):
    """The old program's run of 8 steps, against its first 4 and 4 of the new program. Segmentation in one process is
    the same in a new run, too.
    """
    script, *words = CHANGED.get(
        way,
        [
            "segment.py",
            "--data",
            tmp_path / "data",
            "--init",
            "scratch",
            "--model",
            "swin_nano",
            "--image-size",
            16,
            "--window",
            2,
            "--batch-size",
            4,
            "--epochs",
            4,
            "--warmup-epochs",
            1,
            "--log-every",
            2,
            "--workers",
            0,
        ],
    )
    if way == "segmentation":
        grow(tmp_path / "data")
    words += ["--output", "run"]
    program(later_root, tmp_path / "old", script, *words, "--max-steps", 8)
    program(later_root, tmp_path / "both", script, *words, "--max-steps", 4)
    program(ROOT, tmp_path / "both", script, *words, "--max-steps", 8, "--resume", "auto")
    names = ["both"]
    if way == "segmentation":
        program(ROOT, tmp_path / "new", script, *words, "--max-steps", 8)
        names.append("new")
    for name in names:
        saved = [torch.load(tmp_path / folder / "run" / "last.pt", weights_only=True) for folder in ("old", name)]
        for part in ("model", "optimizer", "scaler", "failures", "step"):
            assert equal(*(state[part] for state in saved)), (name, part)
        assert log(tmp_path / "old" / "run")[-1] == log(tmp_path / name / "run")[-1]


def test_a_resumed_run_has_the_recipe_that_it_began_with(tmp_path):
    """By all three forms of --resume; a new run has the published one."""
    words = ["--data", "x", "--method", "mixmae"]
    new = train.arguments(words)
    assert (new.recipe, new.model, new.window, new.effective_batch, new.adam_eps, new.xavier, new.both_orders) == (
        "mixmae",
        "mixmim_base",
        14,
        2048,
        1e-8,
        True,
        True,
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.pt").touch()
    kept = {
        name: value
        for name, value in vars(
            train.arguments([*words, "--model", "swin_base", "--window", "7", "--adam-eps", "1e-6"])
        ).items()
        if name not in ("xavier", "both_orders", "norm_eps")
    } | {"effective_batch": 1024}
    (run / "config.json").write_text(json.dumps({"kind": "pretrain", "arguments": kept}))
    for resume in (["--output", run, "--resume", "auto"], ["--resume", run / "last.pt"], ["--resume", run]):
        args = train.arguments([*([] if resume == ["--resume", run] else words), *map(str, resume)])
        assert (args.model, args.window, args.effective_batch, args.adam_eps, args.xavier, args.both_orders) == (
            "swin_base",
            7,
            1024,
            1e-6,
            False,
            False,
        ), resume
    (run / "config.json").write_text(json.dumps({"kind": "pretrain", "arguments": vars(new)}))
    args = train.arguments([*words, "--output", str(run), "--resume", "auto"])
    assert (args.model, args.xavier, args.both_orders) == ("mixmim_base", True, True)

    tuned = ["--data", "x", "--init", "scratch", "--model", "vit_base"]
    new = finetune.arguments(tuned)
    assert (
        new.recipe == "mae"
        and new.fc_norm
        and not finetune.arguments([*tuned[:-1], "swin_base", "--recipe", "mae"]).fc_norm
    )
    for before, expected in (
        (vars(new), True),
        ({name: value for name, value in vars(new).items() if name != "fc_norm"}, False),
    ):
        (run / "config.json").write_text(json.dumps({"kind": "finetune", "arguments": before}))
        assert finetune.arguments([*tuned, "--output", str(run), "--resume", "auto"]).fc_norm == expected
        assert finetune.arguments(["--resume", str(run)]).fc_norm == expected
