"""engine.py, loop.py, train.py, show.py: schedule, groups, the same losses however a batch is dealt out, real
command lines.
"""

import json
import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import SMALL, here, log, make_images, run, slow
from PIL import Image
from torch import nn

import train
from engine import dist, optim, rng
from engine.errors import UserError
from engine.flags import select
from model import from_settings


def test_learning_rate_at_its_corners():
    rate = lambda step: optim.learning_rate(step, steps=100, warmup_steps=10, peak=1.0, start=0.1, end=0.01)
    assert (
        rate(0) == 0.1 and rate(5) == pytest.approx(0.55) and rate(10) == 1.0
    )  # the peak is reached, and no step lower follows
    assert (
        rate(11) < 1.0
        and rate(11) > 0.999
        and rate(55) == pytest.approx((1 + 0.01) / 2)
        and rate(100) == pytest.approx(0.01)
    )
    assert all(rate(k) > rate(k + 1) for k in range(10, 100))
    assert optim.learning_rate(0, steps=10, warmup_steps=0, peak=1.0, start=0.1, end=0.0) == 1.0


def test_parameter_groups_of_swin_base():
    model = from_settings(vars(train.arguments(["--data", "x"])))
    groups = optim.parameter_groups(model, 0.05, 0.9)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_name = {name: group for group in groups for name in group["names"]}
    assert {group["layer"] for group in groups} == set(range(26)) and len(groups) == 52
    for name, group in by_name.items():
        plain = name.endswith(("bias", "table", "token")) or "norm" in name
        assert group["weight_decay"] == (0 if plain else 0.05), name
        assert group["scale"] == pytest.approx(0.9 ** (25 - model.layer_of(name)))
    assert by_name["encoder.embed.proj.weight"]["scale"] == pytest.approx(0.0718, abs=1e-4)
    assert by_name["decoder.mask_token"]["scale"] == by_name["head.weight"]["scale"] == 1
    assert [group["scale"] for group in optim.parameter_groups(model, 0.05, 1.0)] == [1, 1]


def test_paper_recipe():
    args = train.arguments(["--data", "x"])
    assert (args.recipe, args.model, args.image_size, args.window, args.epochs, args.warmup_epochs) == (
        "paper",
        "swin_base",
        224,
        7,
        800,
        100,
    )
    assert (args.base_lr, args.warmup_lr, args.min_lr, args.weight_decay, args.layer_decay) == (
        2e-4,
        1e-6,
        1e-5,
        0.05,
        0.9,
    )
    assert (args.mask_ratio, args.loss, args.decomposition, args.effective_batch, args.adam_eps, args.clip) == (
        0.75,
        "mse",
        "subtract",
        256,
        1e-6,
        5.0,
    )
    args = train.arguments(["--data", "x", "--recipe", "ablation"])
    assert (args.image_size, args.window, args.effective_batch, args.mask_ratio, args.loss) == (192, 6, 2048, 0.6, "l1")
    args = train.arguments(["--data", "x", "--method", "simmim"])
    assert (args.sources, args.decoder_blocks, args.loss, args.mask_ratio) == (1, 0, "l1", 0.6)
    assert train.arguments(["--data", "x", "--method", "simmim", "--mask-ratio", "0.75"]).mask_ratio == 0.75
    small = ["--data", "x", "--recipe", "small"]
    args = train.arguments(small)
    assert (args.decomposition, args.loss_units, args.image_size) == ("split", "all", 32)
    assert (
        train.arguments([*small, "--method", "greenmim"]).loss_units
        == "hidden"
        == train.arguments(["--data", "x"]).loss_units
    )
    with pytest.raises(UserError, match="no such run folder or checkpoint"):
        train.arguments(["--resume", "nowhere"])
    assert train.arguments([]).recipe == "demo" and train.arguments(["--data", "cifar10"]).recipe == "cifar"


@pytest.mark.parametrize("size", [27, 75, 288])
def test_the_norm_does_not_depend_on_where_a_gradient_lies_in_memory(size):
    """A view into a bucket may begin anywhere; several processes have their gradients so."""
    for values in torch.randn(50, size, generator=torch.Generator().manual_seed(0)):
        expected = optim.total_norm([values.clone()])
        assert expected == pytest.approx(values.norm().item(), rel=1e-6)
        for offset in range(1, 17):
            assert torch.equal(optim.total_norm([torch.zeros(size + offset)[offset:].copy_(values)]), expected), offset


class Line(nn.Module):
    """One weight, so that a step can be followed by hand."""

    undecayed = ()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def layer_of(self, name):
        return 0

    def forward(self, x):
        return (self.weight * x).sum()


def trainer(*more):
    args = train.arguments(["--base-lr", "0.1", *more])
    return optim.TrainStep(
        select(optim.StepConfig, vars(args)),
        dist.Distributed(torch.device("cpu")),
        Line(),
        steps=100,
        warmup_steps=0,
        peak_lr=0.1,
    )


def one_step(t, values):
    t.set_learning_rate(0)
    for value in values:
        loss = t.forward(torch.full((2, 2), value))
        t.backward(loss, {"loss": loss})
    t.update()


def test_clipping_acts_on_the_accumulated_gradient():
    """Three steps against torch's own clipping of the mean gradient, followed by its AdamW."""
    plain = Line()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, eps=1e-6, weight_decay=0.05)
    clipped, unclipped = (trainer("--accumulate", "2", "--clip", clip, "--weight-decay", "0.05") for clip in ("1", "0"))
    for values in ([30.0, -28.0], [0.1, 0.3], [5.0, 7.0]):  # norms of the means: 2, 0.4, 12
        one_step(clipped, values)
        one_step(unclipped, values)
        plain.weight.grad = torch.full((2, 2), sum(values) / 2)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(clipped.model.weight, plain.weight, rtol=1e-5)
    assert (unclipped.model.weight - plain.weight).abs().min() > 1e-3
    assert clipped.read()["grad_norm"] == pytest.approx((2 + 0.4 + 12) / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    t, straight = trainer(), trainer()
    for value in (1.0, bad, 2.0):
        one_step(t, [value])
    for value in (1.0, 2.0):
        one_step(straight, [value])
    assert torch.equal(t.model.weight, straight.model.weight)
    a, b = t.optimizer.state_dict()["state"][0], straight.optimizer.state_dict()["state"][0]
    assert all(torch.equal(a[key], b[key]) for key in a)
    means, finite = t.read(), straight.read()
    assert means["skipped_steps"] == 1 and means["grad_norm"] == finite["grad_norm"]  # that of the steps that have one
    one_step(t, [bad])
    assert math.isnan(t.read()["grad_norm"])
    t.check_failures(3, {})


def test_a_loss_that_is_not_finite_is_found_even_if_its_gradient_is():
    t = trainer()
    t.set_learning_rate(0)
    loss = t.forward(torch.ones(2, 2)) + torch.tensor(float("inf"))
    t.backward(loss, {"loss": loss})
    t.update()
    assert torch.equal(t.model.weight, torch.ones(2, 2)) and t.read()["skipped_steps"] == 1


def test_steps_that_a_loss_scaler_skips_are_not_failures():
    t, plain = trainer(), trainer()
    t.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    one_step(t, [1.0]), one_step(plain, [1.0])
    assert torch.equal(t.model.weight, plain.model.weight)  # the scale cancels
    t.set_learning_rate(1)
    loss = t.forward(torch.ones(2, 2))
    t.backward(loss, {"loss": loss})
    t.model.weight.grad[0, 0] = float("inf")  # a gradient that overflowed at this scale
    t.update()
    assert (
        torch.equal(t.model.weight, plain.model.weight) and t.scaler.get_scale() == 8 and t.read()["skipped_steps"] == 0
    )
    one_step(t, [float("nan")])
    assert (
        torch.equal(t.model.weight, plain.model.weight) and t.read()["skipped_steps"] == 1
    )  # a loss that is not finite is one


def test_ten_failures_in_a_row_end_the_run_and_nine_do_not():
    t = trainer()
    for value in [float("nan")] * 9 + [1.0] + [float("nan")] * 9:
        one_step(t, [value])
    t.check_failures(19, t.read())
    for value in [float("nan"), 1.0]:
        one_step(t, [value])
    with pytest.raises(UserError, match="ten steps in a row.*step 21.*learning rate"):
        t.check_failures(21, t.read())


@pytest.mark.parametrize(
    "capability, built, expected",
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
    ],
)
def test_gpus_that_a_build_has_no_code_for(capability, built, expected):
    assert dist.gpu_supported(capability, built) is expected


@pytest.mark.parametrize(
    "flags",
    slow(
        [[], ["--decomposition", "split", "--loss-units", "all"], ["--views", "four"], ["--masks", "independent"]],
        fast=[[]],
    ),
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_losses_do_not_depend_on_how_the_batch_is_dealt_out(tmp_path, flags):
    make_images(tmp_path / "data", each=20)
    common = [
        "--data",
        tmp_path / "data",
        *SMALL,
        *flags,
        "--recipe",
        "cifar",
        "--max-steps",
        5,
        "--epochs",
        4,
        "--warmup-epochs",
        0,
        "--log-every",
        1,
        "--layer-decay",
        0.9,
    ]
    ways = [(1, 16, 1), (1, 8, 2)] + ([(2, 8, 1), (2, 4, 2)] if not flags else [])
    logs = []
    for k, (ranks, batch, accumulate) in enumerate(ways):
        out = tmp_path / str(k)
        arguments = [*common, "--batch-size", batch, "--accumulate", accumulate, "--output", out]
        run("train.py", *arguments, processes=ranks, real=accumulate > 1) if ranks > 1 else here(train.main, *arguments)
        logs.append([row for row in log(out) if "loss" in row])
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5]
    for other in logs[1:]:
        for a, b in zip(logs[0], other, strict=True):
            for name in ("loss", "loss_mix", "loss_source_1", "loss_source_2", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a, b)


THREE_SOURCES = ["--sources", 3, "--decomposition", "split"]


@pytest.mark.parametrize(
    "method, flags",
    slow(
        [
            ("eesmm", THREE_SOURCES),
            ("greenmim", []),
            ("eesmm", ["--decomposition", "split", "--loss-units", "all", "--mask-ratio", 0]),
            ("simmim", []),
            (
                "eesmm",
                [
                    "--weights",
                    0.7,
                    0.3,
                    "--decomposition",
                    "split",
                    "--assignment",
                    "fixed",
                    "--activation-checkpointing",
                    "--drop-path",
                    0.1,
                ],
            ),
        ],
        fast=[("eesmm", THREE_SOURCES), ("simmim", [])],
    ),
)
def test_methods_run_and_fill_their_folder(tmp_path, capsys, drawn, method, flags):
    make_images(tmp_path / "data" / "train")
    make_images(tmp_path / "data" / "val", each=15, seed=1)
    here(
        train.main,
        "--data",
        tmp_path / "data",
        "--method",
        method,
        *SMALL,
        *flags,
        "--recipe",
        "cifar",
        "--epochs",
        2,
        "--warmup-epochs",
        1,
        "--batch-size",
        12,
        "--output",
        tmp_path / "out",
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "files.txt",
        "held_out.txt",
        "log.jsonl",
        "last.pt",
        "previous.pt",
        "loss.png",
        "reconstructions.png",
        "run.lock",
        "pictures",
    }
    out = capsys.readouterr().out
    assert (
        out.strip().splitlines()[-1]
        == f"next: python finetune.py --data {tmp_path / 'data'} --checkpoint {tmp_path / 'out' / 'last.pt'}"
    )
    for line in (
        "effective batch size 12 = 1 process x 12 x 1 accumulation step\n",
        "visible mask units: floor",
        "validation reconstruction error, a normalised mean squared error on ",
    ):
        assert line in out
    assert "layer-wise" not in out and ("for its source images" in out) == (method == "eesmm")
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert {"kind", "model", "optimizer", "step", "epoch", "config"} <= set(saved)
    assert (saved["kind"], saved["step"], saved["epoch"], saved["config"]["classes"]) == (
        "pretrain",
        4,
        2,
        ["class0", "class1"],
    )
    assert saved["config"]["image_size"] == 16 and len(saved["config"]["mean"]) == len(saved["config"]["std"]) == 3
    rows = log(tmp_path / "out", timings=True)
    training, evaluation = [row for row in rows if "loss" in row], [row for row in rows if "eval_error" in row]
    assert [row["step"] for row in training] == [2, 4] and [row["epoch"] for row in evaluation] == [1, 2]
    assert all(math.isfinite(value) for name, value in evaluation[-1].items() if name.startswith("eval_"))
    assert ("eval_source_error" in evaluation[0]) == (method == "eesmm") and all(
        key.startswith("time_") for key in training[0] if "second" in key
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["arguments"]["method"] == method
    for name in ("loss.png", "reconstructions.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 5


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    make_images(tmp_path / "data")
    logs = []
    for k, seed in enumerate((3, 3, 4)):
        here(
            train.main,
            "--data",
            tmp_path / "data",
            *SMALL,
            "--recipe",
            "cifar",
            "--max-steps",
            2,
            "--batch-size",
            8,
            "--seed",
            seed,
            "--log-every",
            1,
            "--output",
            tmp_path / str(k),
        )
        logs.append(log(tmp_path / str(k)))
    assert logs[0] == logs[1] != logs[2]


def test_max_steps_stops_early_on_the_unchanged_schedule(tmp_path):
    make_images(tmp_path / "data")
    common = [
        "--data",
        tmp_path / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--epochs",
        3,
        "--warmup-epochs",
        1,
        "--batch-size",
        4,
        "--log-every",
        1,
    ]
    here(train.main, *common, "--output", tmp_path / "whole", "--method", "greenmim")
    here(train.main, *common, "--output", tmp_path / "part", "--method", "greenmim", "--max-steps", 3)
    rates = lambda name: [row["lr"] for row in log(tmp_path / name) if "lr" in row]
    assert len(rates("part")) == 3 and rates("part") == rates("whole")[:3]


def test_show_draws_ones_own_photographs(tmp_path, drawn):
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
        tmp_path / "out",
    )
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.jpg")
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "b.jpg")
    done = run(
        "show.py",
        tmp_path / "a.jpg",
        tmp_path / "b.jpg",
        "--checkpoint",
        tmp_path / "out" / "last.pt",
        "-o",
        tmp_path / "p.png",
    )
    assert Image.open(tmp_path / "p.png").size[0] > 800 and done.stdout.startswith("wrote")
    alone = run("show.py", tmp_path / "a.jpg", "--checkpoint", tmp_path / "out" / "last.pt", "-o", tmp_path / "q.png")
    assert alone.stderr.startswith("warning: one image for 2 sources: it is superposed on itself")
    wrong = run(
        "show.py", tmp_path / "a.jpg", tmp_path / "none.jpg", "--checkpoint", tmp_path / "out" / "last.pt", status=2
    )
    assert "none.jpg: no such file" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1


# the host's work ------------------------------------------------------------------------------------------------------


def test_ahead_computes_the_same_and_only_what_is_asked_for():
    seen = []

    def function(step):
        seen.append((step, threading.current_thread() is threading.main_thread()))
        if step == 7:
            raise ValueError("seven")
        return step * step

    ahead = rng.Prefetch(function)
    assert not seen and [ahead.take(step) for step in (3, 4, 5)] == [9, 16, 25]
    assert ahead.take(20) == 400 and ahead.take(21) == 441  # out of turn
    assert {step for step, here in seen if here} == {3, 20}
    ahead = rng.Prefetch(function)
    assert ahead.take(6) == 36
    with pytest.raises(ValueError, match="seven"):
        ahead.take(7)


def test_every_tensor_of_a_nest_goes_to_the_device():
    @dataclass
    class Nest:
        bits: torch.Tensor
        parts: list
        none: None = None
        word: str = "x"

    value = Nest(torch.tensor([True, False, True]), [torch.arange(5), torch.rand(2, 3).t()])
    away = dist.to_device(value, "meta")
    assert away.word == "x" and away.none is None and all(tensor.is_meta for tensor in (away.bits, *away.parts))
    assert [tensor.shape for tensor in away.parts] == [tensor.shape for tensor in value.parts] and away.parts[
        0
    ].dtype == torch.int64
    assert dist.to_device(away, "meta") is away and dist.to_device(value, "cpu") is value
