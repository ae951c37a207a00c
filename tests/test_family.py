"""Every encoder with every method: trained, gone on with, drawn, fine-tuned, probed; the same for two processes;
compiled without growing.
"""

import pytest
import torch
from helpers import SMALL, here, log, make_images, pictures, run, slow
from PIL import Image

import finetune
import show
import train
from engine import dist, optim, rng
from engine.flags import select
from images.sources import MemoryImages
from model import METHODS, from_settings

MICRO = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")
ALL = [(name, method) for name in MICRO for method in METHODS if method != "mixmae" or "swin" in name]
WORDS = SMALL[2:]  # without --model


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "val", each=8, seed=1)
    make_images(folder / "train", each=16)
    return folder


@pytest.mark.parametrize(
    "name, method",
    slow(
        ALL, fast=[("swin_nano", "eesmm"), ("vit_micro", "mae"), ("twins_micro", "greenmim"), ("swin_nano", "mixmae")]
    ),
)
def test_a_run_of_each(images, tmp_path, monkeypatch, name, method):
    """Interrupted and gone on with, it has the weights of the run that was not; losses fall; pictures are drawn."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        images,
        *WORDS,
        "--model",
        name,
        "--method",
        method,
        "--recipe",
        "cifar",
        "--image-size",
        16,
        "--batch-size",
        8,
        "--epochs",
        4,
        "--warmup-epochs",
        1,
        "--base-lr",
        0.1,
        "--layer-decay",
        0.95,
        "--drop-path",
        0.05,
        "--eval-images",
        16,
        "--decoder-blocks",
        int(method != "simmim"),
        "--log-every",
        2,
    ]
    with pictures():
        here(train.main, *words, "--max-steps", 16, "--output", "whole")
    for steps in (8, 16):
        here(train.main, *words, "--max-steps", steps, "--output", "both", "--resume", "auto")
    saved = [torch.load(f"{folder}/last.pt", weights_only=True)["model"] for folder in ("whole", "both")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]) and log("whole") == log("both")
    rows = log("whole")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    assert all(
        row["eval_error"] > 0 and ("eval_mix_error" in row) == (method == "eesmm")
        for row in rows
        if "eval_error" in row
    )
    a, b = sorted(str(path) for path in images.glob("train/*/*.png"))[:2]
    with pictures():
        show.main(
            [a, *([b] if METHODS[method]["sources"] == 2 else []), "--checkpoint", "whole/last.pt", "-o", "picture.png"]
        )
    for path in ("picture.png", "whole/reconstructions.png"):
        assert Image.open(path).convert("L").getextrema() == (0, 255), path


@pytest.mark.parametrize("name", slow(MICRO, fast=["vit_micro"]))
def test_it_is_fine_tuned_and_probed(images, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    here(
        train.main,
        "--data",
        images,
        *WORDS,
        "--model",
        name,
        "--recipe",
        "cifar",
        "--batch-size",
        8,
        "--max-steps",
        2,
        "--eval-images",
        8,
        "--output",
        "x",
    )
    for protocol in ("linear", "knn", "finetune"):
        here(
            finetune.main,
            "--data",
            images,
            "--checkpoint",
            "x/last.pt",
            "--image-size",
            16,
            "--window",
            2,
            "--workers",
            0,
            "--protocol",
            protocol,
            "--batch-size",
            8,
            "--epochs",
            2,
            "--warmup-epochs",
            0,
            "--output",
            protocol,
        )
        assert 0 <= log(protocol)[-1]["eval_top1"] <= 100
    assert f"{name}" in (tmp_path / "finetune" / "config.json").read_text()
    here(finetune.main, "--data", images, "--checkpoint", "finetune/last.pt", "--eval")
    # positions and tables of another size are interpolated
    here(
        finetune.main,
        "--data",
        images,
        "--checkpoint",
        "x/last.pt",
        "--image-size",
        32,
        "--window",
        2,
        "--protocol",
        "knn",
        "--workers",
        0,
        "--output",
        "larger",
    )


@pytest.mark.parametrize(
    "name, method",
    slow([("vit_micro", "mae"), ("twins_micro", "eesmm"), ("swin_micro", "mixmae")], fast=[("twins_micro", "eesmm")]),
)
def test_two_processes_compute_what_one_does(images, tmp_path, name, method):
    words = [
        "--data",
        images,
        *WORDS,
        "--model",
        name,
        "--method",
        method,
        "--recipe",
        "cifar",
        "--epochs",
        1,
        "--warmup-epochs",
        0.2,
        "--eval-images",
        8,
        "--log-every",
        1,
        "--decoder-blocks",
        1,
    ]
    run("train.py", *words, "--batch-size", 8, "--output", "one", cwd=tmp_path)
    run("train.py", *words, "--batch-size", 4, "--output", "two", cwd=tmp_path, processes=2)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), (a, b)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that torch.compile makes, by a backend that counts and compiles nothing. At the end there must be no
    break.
    """
    found, compile_of_torch = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic: compile_of_torch(model, dynamic=dynamic, backend=backend)
    )
    yield found
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    assert not breaks


REGULARISED = ["--drop-path", 0.2, "--activation-checkpointing"]


@pytest.mark.parametrize(
    "name, method, words",
    slow(
        [
            *((name, method, REGULARISED) for name, method in ALL if name != "swin_micro"),
            *((name, "eesmm", ["--masks", "independent"]) for name in MICRO if name != "swin_micro"),
        ],
        fast=[("swin_nano", "eesmm", REGULARISED)],
    ),
)
def test_a_whole_step_is_one_graph(graphs, name, method, words):
    """From masks to loss, for any mask; evaluation adds none."""
    args = train.arguments(
        [
            *map(str, words),
            "--compile",
            "--recipe",
            "cifar",
            "--model",
            name,
            "--method",
            method,
            "--image-size",
            "32",
            "--window",
            "2",
            "--decoder-width",
            "32",
            "--eval-images",
            "16",
            "--epochs",
            "1",
        ]
    )
    distributed = dist.initialize("cpu", "auto")
    network = from_settings(vars(args))
    trainer, pictures = (
        optim.TrainStep(select(optim.StepConfig, vars(args)), distributed, network, 20, 1, 1e-3),
        torch.randn(2, network.sources, 3, 32, 32),
    )
    for step in range(10):
        masking = network.draw(rng.generator(0, "mask", step))
        assert masking.plan.fits if hasattr(masking.plan, "fits") else True
        out = trainer.forward(pictures, masking)
        trainer.backward(out.loss, {"loss": out.loss})
        trainer.update()
        assert len(graphs) == 1, f"mask {step}"
    held_out = MemoryImages(torch.zeros(16, 3, 32, 32, dtype=torch.uint8), None, [])
    train.evaluate(distributed, network, held_out, args.eval_images)
    assert len(graphs) == 1


def test_fine_tuning_is_one_graph(graphs, images, tmp_path, monkeypatch):
    """With its evaluation, of the weights' average, on parts of batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.loop.check_compiler", lambda device: None)
    here(
        finetune.main,
        "--data",
        images,
        "--model",
        "swin_nano",
        "--recipe",
        "micro",
        "--init",
        "scratch",
        "--compile",
        "--drop-path",
        0.1,
        "--ema",
        0.9,
        "--image-size",
        32,
        "--window",
        2,
        "--workers",
        0,
        "--batch-size",
        4,
        "--epochs",
        2,
        "--output",
        "y",
    )
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", [[], ["--activation-checkpointing"]], ids=["plain", "checkpointing"])
def test_two_compiled_processes_compute_what_one_does(images, tmp_path, words):
    """DDP splits the compiled graph at its buckets; the losses are those of one process, and no gradient has
    unexpected strides.
    """
    words = [
        "--data",
        images,
        *WORDS,
        "--model",
        "swin_nano",
        "--recipe",
        "cifar",
        "--epochs",
        1,
        "--warmup-epochs",
        0.2,
        "--eval-images",
        8,
        "--log-every",
        1,
        *words,
    ]
    run("train.py", *words, "--batch-size", 8, "--output", "one", cwd=tmp_path)
    done = run("train.py", *words, "--compile", "--batch-size", 4, "--output", "two", cwd=tmp_path, processes=2)
    assert "stride" not in done.stderr, done.stderr
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), (a, b)
