"""Every encoder with every method: trained, gone on with, drawn, fine-tuned, probed; the same for two processes; compiled without growing."""
import pytest
import torch
from helpers import SMALL, here, log, make_images, run
from PIL import Image

import encoders
import finetune
import show
import train
from engine import chance
from engine.processes import to_device
from model import METHODS, build

MICRO = ("swin_nano", "swin_micro", "vit_micro", "twins_micro")
ALL = [(name, method) for name in MICRO for method in METHODS if method != "mixmae" or "swin" in name]
WORDS = [word for word in SMALL if word not in ("--model", "swin_micro")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "val", each=8, seed=1)
    make_images(folder / "train", each=16)
    return folder


@pytest.mark.parametrize("name, method", ALL)
def test_a_run_of_each(images, tmp_path, monkeypatch, name, method):
    """Interrupted and gone on with, it has the weights of the run that was not; losses fall; pictures are drawn."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", images, *WORDS, "--model", name, "--method", method, "--recipe", "cifar", "--image-size", 16, "--batch-size", 8, "--epochs", 4,
             "--warmup-epochs", 1, "--base-lr", 0.1, "--layer-decay", 0.95, "--drop-path", 0.05, "--eval-images", 16, "--decoder-blocks", int(method != "simmim"),
             "--log-every", 2]
    for folder, steps in (("whole", 16), ("both", 8), ("both", 16)):
        here(train.main, *words, "--max-steps", steps, "--output", folder, "--resume", "auto")
    saved = [torch.load(f"{folder}/last.pt", weights_only=True)["model"] for folder in ("whole", "both")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]) and log("whole") == log("both")
    rows = log("whole")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    assert all(row["eval_error"] > 0 and ("eval_mix_error" in row) == (method == "eesmm") for row in rows if "eval_error" in row)
    a, b = sorted(str(path) for path in images.glob("train/*/*.png"))[:2]
    show.main([a, *([b] if METHODS[method]["sources"] == 2 else []), "--checkpoint", "whole/last.pt", "-o", "picture.png"])
    for path in ("picture.png", "whole/reconstructions.png"):
        assert Image.open(path).convert("L").getextrema() == (0, 255), path


@pytest.mark.parametrize("name", MICRO)
def test_it_is_fine_tuned_and_probed(images, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    here(train.main, "--data", images, *WORDS, "--model", name, "--recipe", "cifar", "--batch-size", 8, "--max-steps", 2, "--eval-images", 8, "--output", "x")
    for protocol in ("linear", "knn", "finetune"):
        here(finetune.main, "--data", images, "--checkpoint", "x/last.pt", "--image-size", 16, "--window", 2, "--workers", 0, "--protocol", protocol,
             "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0, "--output", protocol)
        assert 0 <= log(protocol)[-1]["eval_top1"] <= 100
    assert f"{name}" in (tmp_path / "finetune" / "config.json").read_text()
    here(finetune.main, "--data", images, "--checkpoint", "finetune/last.pt", "--eval")
    # positions and tables of another size are interpolated
    here(finetune.main, "--data", images, "--checkpoint", "x/last.pt", "--image-size", 32, "--window", 2, "--protocol", "knn", "--workers", 0, "--output", "larger")


@pytest.mark.parametrize("name, method", [("vit_micro", "mae"), ("twins_micro", "eesmm"), ("swin_micro", "mixmae")])
def test_two_processes_compute_what_one_does(images, tmp_path, name, method):
    words = ["--data", images, *WORDS, "--model", name, "--method", method, "--recipe", "cifar", "--epochs", 1, "--warmup-epochs", 0.2, "--eval-images", 8,
             "--log-every", 1, "--decoder-blocks", 1]
    run("train.py", *words, "--batch-size", 8, "--output", "one", cwd=tmp_path)
    run("train.py", *words, "--batch-size", 4, "--output", "two", cwd=tmp_path, processes=2)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), (a, b)


@pytest.mark.parametrize("name, method", [("vit_micro", "eesmm"), ("twins_micro", "eesmm"), ("twins_micro", "simmim"), ("swin_micro", "mixmae")])
def test_compiled_blocks_of_each_do_not_recompile_for_fresh_masks(name, method):
    """With a counting backend that compiles nothing: what the first step needs is all that later ones use."""
    torch._dynamo.reset()
    network, graphs = build(method, encoders.make(name), decoder_width=32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in network.encoder.blocks:
        block.compile(dynamic=False, backend=backend)
    images = torch.randn(2, network.sources, 3, 32, 32)
    counts = []
    for step in range(6):
        network(images, to_device(network.draw(chance.generator(0, "mask", step)), "cpu")).loss.backward()
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1]
