"""What is looked at while a run trains changes nothing of it: k-NN and rank of features, trackers, kept pictures,
the page.
"""

import base64
import json
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SMALL, here, log, make_images, run
from kills import equal

import show
import train
from engine import probes, report, runs
from engine.dist import Distributed
from engine.errors import UserError

WORDS = [
    *SMALL,
    "--recipe",
    "cifar",
    "--batch-size",
    8,
    "--epochs",
    4,
    "--warmup-epochs",
    1,
    "--log-every",
    1,
    "--drop-path",
    0.1,
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    make_images(folder / "train", each=12)
    make_images(folder / "val", each=6, seed=1)
    return folder


def without_features(rows):
    return [{name: value for name, value in row.items() if "knn" not in name and "rank" not in name} for row in rows]


def same_runs(*folders):
    saved = [torch.load(folder / "last.pt", weights_only=True) for folder in folders]
    assert all(
        equal(saved[0][part], other[part]) for other in saved[1:] for part in ("model", "optimizer", "step", "failures")
    )
    assert all(without_features(log(folders[0])) == without_features(log(folder)) for folder in folders[1:])


class Fake:
    """wandb, as far as it is used: what it was told."""

    def __init__(self, fails_at=None):
        self.told, self.opened, self.fails_at, self.finished = [], [], fails_at, 0

    def init(self, **settings):
        self.opened.append(settings)
        return self

    def define_metric(self, *_, **__): ...

    def log(self, row):
        if self.fails_at == row["step"]:
            raise ConnectionError("no network")
        self.told.append(row)

    def Image(self, path):
        return path

    def finish(self):
        self.finished += 1


def test_a_run_is_the_same_with_and_without_all_that_looks_on(images, tmp_path, monkeypatch):
    """Plain; with k-NN and a tracker; the same, stopped half-way and gone on with; a page made in between."""
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    words = ["--data", images, *WORDS]
    here(train.main, *words, "--output", tmp_path / "plain")
    watched = [*words, "--knn-every", 2, "--track", "wandb"]
    here(train.main, *watched, "--output", tmp_path / "watched")
    here(train.main, *watched, "--output", tmp_path / "both", "--max-steps", 6)
    report.write(tmp_path / "both", show.METRIC_LABELS)
    here(train.main, *watched, "--output", tmp_path / "both", "--resume", "auto")
    same_runs(tmp_path / "plain", tmp_path / "watched", tmp_path / "both")
    assert log(tmp_path / "watched") == log(tmp_path / "both")

    rows = [row for row in log(tmp_path / "watched") if "eval_error" in row]
    assert ["eval_knn_top1" in row for row in rows] == [False, True, False, True]
    assert all(
        0 <= row["eval_knn_top1"] <= 100
        and 1 <= row["eval_feature_rank"] <= 24
        and row["eval_knn_top1_at_start"] == rows[1]["eval_knn_top1_at_start"]
        for row in rows
        if "eval_knn_top1" in row
    )
    assert len(fake.opened) == 3 and fake.finished == 3
    first, *same = [settings["id"] for settings in fake.opened]
    assert same[0] == same[1] != first and fake.opened[0]["resume"] == "allow"
    told = [
        row
        for row in fake.told
        if "reconstructions" not in row and "loss" not in row or isinstance(row.get("loss"), float)
    ]
    assert [row["loss"] for row in told if "loss" in row][:12] == [
        row["loss"] for row in log(tmp_path / "watched") if "loss" in row
    ]
    assert [row["eval_error"] for row in told if "eval_error" in row][:4] == [row["eval_error"] for row in rows]
    assert sum("reconstructions" in row for row in fake.told) >= 8


def test_a_tracker_that_fails_warns_and_the_run_goes_on(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Fake(fails_at=3))
    here(train.main, "--data", images, *WORDS, "--output", tmp_path / "out", "--track", "wandb", "--max-steps", 6)
    said = capsys.readouterr().err
    assert said.count("warning: --track wandb: ConnectionError: no network; this run is not tracked any further") == 1
    assert log(tmp_path / "out")[-1]["step"] == 6


def test_a_tracker_that_is_not_installed_is_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--track wandb: .*; pip install wandb, or leave --track out"):
        train.main([str(word) for word in ["--data", images, *WORDS, "--output", tmp_path / "out", "--track", "wandb"]])
    assert not (tmp_path / "out").exists()


@pytest.mark.peers("tensorboard")
def test_tensorboard_s_files_read_back(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--data", images, *WORDS, "--output", tmp_path / "out", "--track", "tensorboard"]
    here(train.main, *words, "--max-steps", 7)  # the last checkpoint is of step 7; then the log is cut back to it
    here(train.main, *words, "--resume", "auto")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    rows = [row for row in log(tmp_path / "out") if "loss" in row]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows
    ]
    assert events.Images("reconstructions")[-1].step == 12


# features -------------------------------------------------------------------------------------------------------------


def test_rank_of_features_falls_where_they_collapse():
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    spread, flat = torch.ones(64), torch.cat([torch.ones(4), torch.zeros(60)])
    assert abs(probes.effective_rank(basis * spread) - 64) < 0.1 and abs(probes.effective_rank(basis * flat) - 4) < 0.1
    assert probes.effective_rank(torch.randn(200, 1) @ torch.randn(1, 32)) < 1.01
    shares = torch.tensor([0.5, 0.25, 0.25])  # by hand: exp(0.5 ln 2 + 0.5 ln 4) = 2^1.5
    assert abs(probes.effective_rank(torch.diag(shares)) - 2**1.5) < 1e-3


def test_the_watch_says_what_the_knn_protocol_says(images, tmp_path, monkeypatch, capsys):
    import finetune

    here(train.main, "--data", images, *WORDS, "--output", tmp_path / "out", "--knn-every", 1, "--max-steps", 6)
    row = next(row for row in reversed(log(tmp_path / "out")) if "eval_knn_top1" in row)
    assert "frozen features: k-NN top-1" in capsys.readouterr().out
    here(
        finetune.main,
        "--data",
        images,
        "--checkpoint",
        tmp_path / "out" / "last.pt",
        "--image-size",
        16,
        "--window",
        2,
        "--protocol",
        "knn",
        "--output",
        tmp_path / "knn",
    )
    assert log(tmp_path / "knn")[-1]["eval_top1"] == row["eval_knn_top1"]


def test_samples_have_a_limit_and_no_labels_leave_the_rank(images, tmp_path):
    class Source(SimpleNamespace):
        def __len__(self):
            return 30

    source = Source(subset=lambda chosen: chosen.tolist())
    chosen = probes.sample_images(source, 7, 0, "k-NN train")
    assert (
        len(set(chosen)) == 7
        and chosen == sorted(chosen)
        and chosen != probes.sample_images(source, 7, 1, "k-NN train")
    )
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, path in enumerate(sorted(images.glob("train/*/*.png"))):
        (flat / f"{k}.png").write_bytes(path.read_bytes())
    here(train.main, "--data", flat, *WORDS, "--output", tmp_path / "out", "--knn-every", 1, "--max-steps", 4)
    row = log(tmp_path / "out")[-1]
    assert 1 <= row["eval_feature_rank"] <= 23 and "eval_knn_top1" not in row


@pytest.mark.slow
def test_two_processes_look_as_one_does(images, tmp_path):
    words = [
        "train.py",
        "--data",
        images,
        *SMALL,
        "--recipe",
        "cifar",
        "--epochs",
        1,
        "--warmup-epochs",
        0.2,
        "--knn-every",
        1,
    ]
    run(*words, "--batch-size", 8, "--output", "one", cwd=tmp_path)
    run(*words, "--batch-size", 4, "--output", "two", cwd=tmp_path, processes=2)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), (a, b)


# pictures and the page ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "srcset", "action", "data", "poster")
        ]


def test_the_page_of_a_run_stands_alone(images, tmp_path, capsys, drawn):
    (tmp_path / "data").mkdir()
    make_images(tmp_path / "data", each=20)
    (tmp_path / "data" / "class0" / "<b>.png").write_bytes(b"")
    here(
        train.main,
        "--data",
        tmp_path / "data",
        *WORDS,
        "--output",
        tmp_path / "out",
        "--knn-every",
        1,
        "--max-bad-share",
        0.3,
    )
    show.main(["--run", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (
        all(address.startswith("data:image/") for address in page.addresses)
        and len(page.addresses) == len(pictures) == 4 + 2
    )
    assert "http:" not in text and "https:" not in text and "//" not in text.split("<script>")[1].split("</script>")[0]
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert base64.b64decode(page.addresses[-1].split(",")[1])[:4] == b"\x89PNG"
    steps = [attributes for attributes in pictures if attributes.get("class") == "step"]
    assert [("hidden" in attributes) for attributes in steps] == [True, True, True, False]
    slider = dict(page.tags)["input"]
    assert slider["type"] == "range" and slider["max"] == "3"
    assert "&lt;b&gt;.png" in text and "<b>.png" not in text and "Bad files: 1" in text
    for words in ("eval_knn_top1", "base_lr", "source images a second", "swin_nano"):
        assert words in text
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out


def test_the_page_of_no_run_and_of_a_young_one(images, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        show.main(["--run", str(tmp_path)])
    with pytest.raises(UserError, match="--run takes no other argument"):
        show.main(["--run", str(tmp_path), "--seed", "1"])
    with pytest.raises(UserError, match="give images and --checkpoint, or --run DIR"):
        show.main([])
    here(train.main, "--data", images, *WORDS, "--output", tmp_path / "out", "--max-steps", 0)
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1, "lo')
    assert report.write(tmp_path / "out", show.METRIC_LABELS).stat().st_size > 1000


@pytest.mark.parametrize("evaluations", [3, 24, 25, 100, 1000])
def test_at_most_24_pictures_are_kept_evenly(tmp_path, evaluations):
    kept_run = runs.Run(tmp_path, Distributed(torch.device("cpu")))
    kept = []
    kept_run.write = lambda name, write: (
        kept.append(name) if name.startswith("pictures/") else write(open(tmp_path / "x", "wb"))
    )
    figure = SimpleNamespace(savefig=lambda *_, **__: None)
    for number in range(1, evaluations + 1):
        kept_run.picture("reconstructions", lambda: figure, number, number, evaluations)
    steps = [int(name[-12:-4]) for name in kept]
    assert len(steps) == min(evaluations, 24) and steps[-1] == evaluations and np.ptp(np.diff([0, *steps])) <= 1
    assert json.dumps(steps)
