"""bench.py through its command line at tiny size; what a step must not do; plans under compilation."""

import json

import pytest
import torch
from helpers import SMALL, here, make_images, run, slow

import bench
import train
from engine import dist, optim, rng
from engine.dist import to_device
from engine.errors import DataError, UserError
from engine.flags import select
from experiments import host
from model import from_settings

TINY = [
    "--model",
    "swin_nano",
    "--image-size",
    16,
    "--window",
    2,
    "--decoder-width",
    32,
    "--batch-size",
    8,
    "--steps",
    2,
    "--device",
    "cpu",
]
NEEDED = {
    "method",
    "model",
    "image_size",
    "precision",
    "compiled",
    "source_images_per_step",
    "source_images_per_second",
    "peak_memory_bytes",
    "gmacs_per_source_image",
    "share_of_matmul_rate",
}


def rows(path):
    found = json.loads(path.read_text())
    assert {"machine", "versions", "rows"} <= found.keys()
    return found["rows"]


@pytest.mark.parametrize("memory", slow([True, False], fast=[False]), ids=["with memory", "speed"])
def test_the_three_methods_side_by_side(tmp_path, drawn, memory):
    """Peak memory is measured in a new process for each method."""
    out = run("bench.py", *TINY, *[] if memory else ["--no-memory"], cwd=tmp_path).stdout
    found = rows(tmp_path / "bench.json")
    assert [row["method"] for row in found] == ["eesmm", "greenmim", "simmim"]
    for row in found:
        assert NEEDED - ({"peak_memory_bytes"} if not memory else set()) <= row.keys() and row["steps"] >= 2
        assert not memory or row["peak_memory_bytes"] > 0
        assert row["source_images_per_second"] == pytest.approx(8e3 / row["ms_per_step"])
        assert row["composites_per_second"] * row["sources"] == pytest.approx(row["source_images_per_second"])
    for line in (
        "visible units only (fp32, 8 images a step): greenmim / simmim = ",
        "superposition (",
        *["peak memory ("] * memory,
    ):
        assert line in out
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_work_is_counted_as_it_runs():
    """A linear layer's product, and the two of its backward pass, each of 4 x 8 x 16 multiply-accumulates."""
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert optim.count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_parts_dense_and_loader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here(bench.main, *TINY, "--parts", "--methods", "eesmm", "--output", "parts.json")
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]["eesmm"]
    assert {"mask and plan", "forward", "backward", "clip, optimiser, metrics"} <= parts.keys() and min(
        parts.values()
    ) >= 0
    here(bench.main, *TINY, "--dense", "--output", "dense.json")
    found = rows(tmp_path / "dense.json")
    assert {(row["method"], row["mode"]) for row in found} >= {
        (m, k) for m in ("dense", "torchvision") for k in ("training", "inference")
    }
    work = {row["method"]: row["gmacs_per_source_image"] for row in found}
    assert work["dense"] == pytest.approx(work["torchvision"], rel=1e-6)
    make_images(tmp_path / "data", each=40)
    here(bench.main, *TINY, "--loader", tmp_path / "data", "--cache", tmp_path / "cache", "--output", "loader.json")
    found = rows(tmp_path / "loader.json")
    assert [row.get("pipeline") for row in found] == ["ImageFolder, PIL, float", "ours", "ours, cached", None, None]
    assert [row["mode"].split(",")[0] for row in found[3:]] == ["synthetic", "fed"]


@pytest.mark.peers("timm")
def test_peer_of_timm_sees_the_same_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here(bench.main, *TINY, "--methods", "simmim", "--peer", "timm", "--no-memory")
    ours, peer = rows(tmp_path / "bench.json")
    assert peer["method"] == "simmim on timm"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output", "x.txt"], ".json"),
        (["--output", "nowhere/x.json"], "no folder nowhere"),
        (["--batch-size", "7"], "not a multiple of 2"),
        (["--model", "swin_huge"], "unknown"),
        (["--nonsense"], "unrecognized"),
        (["--loader", "nowhere"], "no such folder"),
    ],
)
def test_bad_command_lines(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, DataError), match=message):
        bench.main([*map(str, TINY), *words])


@pytest.mark.slow
def test_the_host_is_counted_without_a_gpu(tmp_path, monkeypatch):
    """Launches of a network of known parts, one graph, and no number of the host's time that is not there."""
    monkeypatch.chdir(tmp_path)
    here(bench.main, *TINY, "--host", "--methods", "eesmm", "simmim", "--layer-decay", 0.5)
    ours, theirs = json.loads((tmp_path / "bench.json").read_text())["host"]
    for row in (ours, theirs):
        assert row["graphs"] == 1 and row["graph_breaks"] == 0 and row["parameter_groups"] == 2 * 8
        assert (
            row["launches_update"] < 3 * row["parameter_groups"] + 40
            and min(value for name, value in row.items() if name.startswith("ms_")) > 0
        )
    assert ours["launches_forward"] > theirs["launches_forward"]  # a decoder's block


@pytest.mark.slow
def test_the_compilers_launches_are_counted_and_nothing_is_run():
    class Layers(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(count))

        def forward(self, x):
            for layer in self.layers:
                x = torch.sin(2 * torch.nn.functional.gelu(layer(x)))
            return x.sum()

    # for each layer: casts, the product, all that follows in one; three more backward
    assert host.compiled(Layers(2), (torch.full((4, 8), torch.nan),)) == 12


def test_a_launch_is_a_kernel_and_not_a_view():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x):
            x = self.norm(self.linear(x)).view(2, 2, 4, 4).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()

    model = Two()
    with host.pretended(model), torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(8, 8)
        with host.Launches() as forward:
            loss = model(x)
        with host.Launches() as copies:
            x.to("meta"), x.to(torch.float64)
    # three casts to 16 bits, the product, a cast to 32 bits, the norm, attention, a sum, whose input is cast
    assert (
        forward.counts["copies"] == 0 and forward.counts["launches"] - forward.counts["casts"] == 4 and loss.shape == ()
    )
    assert copies.counts["copies"] == copies.counts["casts"] == copies.counts["launches"] == 1


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    args = train.arguments([*SMALL, "--recipe", "cifar", "--device", "cuda"])
    distributed = dist.initialize("cuda", "auto")
    model = from_settings(vars(args)).to(distributed.device)
    trainer = optim.TrainStep(select(optim.StepConfig, vars(args)), distributed, model, 100, 0, 1e-4)
    images = torch.randn(4, 2, 3, 16, 16, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step fills caches
        try:
            trainer.set_learning_rate(step)
            out = trainer.forward(
                images, to_device(model.draw(rng.generator(0, "mask", step)), distributed.device, non_blocking=True)
            )
            trainer.backward(out.loss, {"loss": out.loss})
            trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.peers("timm")
@pytest.mark.parametrize("model", ["swin_micro", "vit_micro", "twins_micro"])
def test_the_peer_does_the_same_work(model, tmp_path):
    """A SimMIM on timm's encoder counts as many multiply-adds as ours: the comparison is one of speed alone."""
    here(
        bench.main,
        "--model",
        model,
        "--methods",
        "simmim",
        "--image-size",
        32,
        "--window",
        4,
        "--batch-size",
        2,
        "--steps",
        1,
        "--no-memory",
        "--peer",
        "timm",
        "--output",
        tmp_path / "bench.json",
    )
    ours, theirs = (
        row["gmacs_per_source_image"]
        for row in json.loads((tmp_path / "bench.json").read_text())["rows"]
        if "method" in row
    )
    assert theirs == pytest.approx(ours, rel=0.02)
