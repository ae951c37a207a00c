"""bench.py through its command line at tiny size; what a step must not do; plans under compilation."""
import json

import pytest
import torch
from helpers import SMALL, here, make_images, run

import bench
import swin
import train
from engine import chance, optim, processes
from engine.errors import DataError, UserError
from engine.processes import to_device
from model import build, from_settings

TINY = ["--model", "swin_nano", "--image-size", 16, "--window", 2, "--decoder-width", 32, "--batch-size", 8, "--steps", 2, "--device", "cpu"]
NEEDED = {"method", "model", "image_size", "precision", "compiled", "source_images_per_step", "source_images_per_second",
          "peak_memory_bytes", "gmacs_per_source_image", "share_of_matmul_rate"}


def rows(path):
    found = json.loads(path.read_text())
    assert {"machine", "versions", "rows"} <= found.keys()
    return found["rows"]


def test_the_three_methods_side_by_side(tmp_path):
    out = run("bench.py", *TINY, cwd=tmp_path, real=True).stdout
    found = rows(tmp_path / "bench.json")
    assert [row["method"] for row in found] == ["eesmm", "greenmim", "simmim"]
    for row in found:
        assert NEEDED <= row.keys() and row["peak_memory_bytes"] > 0 and row["steps"] >= 2
        assert row["source_images_per_second"] == pytest.approx(8e3 / row["ms_per_step"])
        assert row["composites_per_second"] * row["sources"] == pytest.approx(row["source_images_per_second"])
    for line in ("visible units only (fp32, 8 images a step): greenmim / simmim = ", "superposition (", "peak memory ("):
        assert line in out
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_work_is_counted_as_it_runs():
    """A linear layer's product, and the two of its backward pass, each of 4 x 8 x 16 multiply-accumulates."""
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert optim.counted(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_parts_dense_and_loader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here(bench.main, *TINY, "--parts", "--methods", "eesmm", "--output", "parts.json")
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]["eesmm"]
    assert {"mask and plan", "forward", "backward", "clip, optimiser, metrics"} <= parts.keys() and min(parts.values()) >= 0
    here(bench.main, *TINY, "--dense", "--output", "dense.json")
    found = rows(tmp_path / "dense.json")
    assert {(row["method"], row["mode"]) for row in found} >= {(m, k) for m in ("dense", "torchvision") for k in ("training", "inference")}
    work = {row["method"]: row["gmacs_per_source_image"] for row in found}
    assert work["dense"] == pytest.approx(work["torchvision"], rel=1e-6)
    make_images(tmp_path / "data", each=40)
    here(bench.main, *TINY, "--loader", tmp_path / "data", "--cache", tmp_path / "cache", "--output", "loader.json")
    found = rows(tmp_path / "loader.json")
    assert [row.get("pipeline") for row in found] == ["ImageFolder, PIL, float", "ours", "ours, cached", None, None]
    assert [row["mode"].split(",")[0] for row in found[3:]] == ["synthetic", "fed"]


def test_peer_of_timm_sees_the_same_task(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    here(bench.main, *TINY, "--methods", "simmim", "--peer", "timm", "--no-memory")
    ours, peer = rows(tmp_path / "bench.json")
    assert peer["method"] == "simmim on timm"


@pytest.mark.parametrize("words, message", [
    (["--output", "x.txt"], ".json"), (["--output", "nowhere/x.json"], "no folder nowhere"),
    (["--batch-size", "7"], "not a multiple of 2"), (["--model", "swin_huge"], "unknown"), (["--nonsense"], "unrecognized"),
    (["--loader", "nowhere"], "no such folder")])
def test_bad_command_lines(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, DataError), match=message):
        bench.main([*map(str, TINY), *words])


def masks(model, count, device):
    return [to_device(model.draw(chance.generator(0, "mask", k)), device) for k in range(count)]


def test_compiled_blocks_do_not_recompile_for_fresh_masks():
    torch._dynamo.reset()
    model = build("eesmm", swin.swin_nano(image_size=64), decomposition="split", decoder_width=32)
    images = torch.randn(2, 2, 3, 64, 64)
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    torch._dynamo.config.recompile_limit = 64
    for block in model.encoder.blocks:
        block.compile(dynamic=False, backend=backend)
    first, *others = masks(model, 11, "cpu")
    with torch.no_grad():
        model(images, first)
        warm = len(compiled)
        assert 0 < warm <= sum(model.encoder.depths)
        for masking in others:
            assert masking.plan.fits
            model(images, masking)
    assert len(compiled) == warm


def test_blocks_that_differ_in_drop_path_alone_share_their_code():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    encoder = swin.Swin(image_size=32, patch=2, window=4, width=16, depths=(6,), heads=(1,), drop_path=0.3)
    for block in encoder.stages[0].blocks:
        block.compile(dynamic=False, backend=backend)
    encoder(torch.randn(2, 3, 32, 32))
    assert len(compiled) <= 4  # the first block drops nothing; two kinds of windows


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    args = train.arguments([*SMALL, "--recipe", "cifar", "--device", "cuda"])
    launch = processes.launch("cuda", "auto")
    model = from_settings(vars(args)).to(launch.device)
    trainer = optim.Trainer(args, launch, model, 100, 0, 1e-4)
    images = torch.randn(4, 2, 3, 16, 16, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step fills caches
        try:
            trainer.set_learning_rate(step)
            out = trainer.forward(images, to_device(model.draw(chance.generator(0, "mask", step)), launch.device, non_blocking=True))
            trainer.backward(out.loss, {"loss": out.loss})
            trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model", ["swin_micro", "vit_micro", "twins_micro"])
def test_the_peer_does_the_same_work(model, tmp_path):
    """A SimMIM on timm's encoder counts as many multiply-adds as ours: the comparison is one of speed alone."""
    pytest.importorskip("timm")
    here(bench.main, "--model", model, "--methods", "simmim", "--image-size", 32, "--window", 4, "--batch-size", 2, "--steps", 1, "--no-memory",
         "--peer", "timm", "--output", tmp_path / "bench.json")
    ours, theirs = (row["gmacs_per_source_image"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"] if "method" in row)
    assert theirs == pytest.approx(ours, rel=0.02)
