"""finetune.py, probes.py: accuracy, protocols, the same result on one and two processes, checkpoints that fit and do
not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from helpers import SMALL, here, log, make_images, run, slow
from PIL import Image
from torchvision.transforms import v2

import finetune
import images
import swin
import train
import weights
from engine import data, dist, optim, probes, rng
from engine.errors import DataError, UserError
from images import augment, balanced_subset, sources
from images.formats import PixelFormat

TUNE = [
    "--recipe",
    "micro",
    "--image-size",
    16,
    "--window",
    2,
    "--workers",
    0,
    "--warmup-epochs",
    0,
    "--batch-size",
    12,
    "--drop-path",
    0.1,
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    make_images(folder / "data" / "train", classes=3, each=12)
    make_images(folder / "data" / "val", classes=3, each=7, seed=1)  # 21: two processes do not divide it
    here(
        train.main,
        "--data",
        folder / "data",
        *SMALL,
        "--recipe",
        "cifar",
        "--max-steps",
        2,
        "--batch-size",
        12,
        "--output",
        folder / "run",
    )
    return folder


def last_line(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_recipes_of_the_paper(monkeypatch):
    args = finetune.arguments(["--data", "x", "--model", "swin_base"])
    assert (args.recipe, args.image_size, args.window, args.effective_batch, args.epochs, args.warmup_epochs) == (
        "imagenet",
        224,
        7,
        1024,
        100,
        20,
    )
    assert (args.base_lr, args.layer_decay, args.drop_path, args.mixup, args.cutmix, args.smoothing, args.erasing) == (
        1.25e-3,
        0.9,
        0.2,
        0.8,
        1.0,
        0.1,
        0.25,
    )
    assert args.randaugment == 27
    args = finetune.arguments(["--data", "x", "--model", "swin_base", "--init", "scratch"])
    assert (args.base_lr, args.drop_path, args.epochs, args.layer_decay) == (5e-4, 0.5, 300, 1.0)
    args = finetune.arguments(["--data", "cifar10", "--model", "swin_base"])
    assert (args.recipe, args.image_size, args.window, args.effective_batch) == ("cifar", 192, 6, 512)
    args = finetune.arguments(["--data", "x", "--model", "swin_large"])
    assert (args.layer_decay, args.drop_path) == (0.8, 0.3)
    monkeypatch.setattr(weights, "model_in", lambda checkpoint: "swin_large")
    args = finetune.arguments(["--data", "x", "--checkpoint", "large.pt"])  # not named, but found in the file
    assert (args.layer_decay, args.drop_path) == (0.8, 0.3)
    assert finetune.arguments(["--data", "x", "--model", "swin_large", "--init", "scratch"]).layer_decay == 1.0
    assert finetune.arguments(["--data", "x", "--model", "swin_base", "--init", "scratch"]).layer_decay == 1.0
    assert finetune.arguments(["--data", "x", "--model", "swin_micro"]).recipe == "micro"


def test_table_2_costs_11_3_gmacs():
    encoder = swin.swin_base(image_size=192, window=6)
    with torch.no_grad():
        assert optim.count_flops(lambda: encoder(torch.zeros(1, 3, 192, 192))) / 2e9 == pytest.approx(11.3, abs=0.1)


def test_layer_ids_and_scales_of_the_classifier():
    model = finetune.Classifier(swin.swin_base(), 10)
    groups = optim.parameter_groups(model, 0.05, 0.9)
    by_name = {name: group for group in groups for name in group["names"]}
    assert {group["layer"] for group in groups} == set(range(26)) and len(groups) == 52
    assert (
        by_name["head.weight"]["layer"] == by_name["encoder.norm.weight"]["layer"] == 25
        and by_name["head.weight"]["scale"] == 1
    )
    assert (
        by_name["encoder.stages.0.merge.reduction.weight"]["layer"]
        == by_name["encoder.stages.0.blocks.1.mlp.up.weight"]["layer"]
        == 2
    )
    assert by_name["encoder.embed.proj.weight"]["scale"] == pytest.approx(0.9**25)


def test_accuracy_against_a_plain_count():
    torch.manual_seed(0)
    scores, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    found = probes.topk_accuracy(scores, labels)
    order = scores.argsort(1, descending=True)
    assert found["top1"] == pytest.approx(100 * np.mean([order[k, 0] == labels[k] for k in range(200)]))
    assert found["top5"] == pytest.approx(100 * np.mean([labels[k] in order[k, :5] for k in range(200)]))
    plain = torch.zeros(7, 7, dtype=torch.long)
    for k in range(200):
        plain[labels[k], order[k, 0]] += 1
    assert torch.equal(found["confusion"], plain)
    assert probes.topk_accuracy(torch.eye(3), torch.arange(3))["top5"] == 100


def test_nearest_neighbours_against_a_plain_loop():
    torch.manual_seed(0)
    train_x, labels, test_x = torch.randn(50, 8), torch.randint(0, 4, (50,)), torch.randn(9, 8)
    scores = probes.nearest_neighbours(train_x, labels, test_x, 4, k=5, temperature=0.1)
    for row in range(9):
        cosine = torch.cosine_similarity(test_x[row], train_x, dim=1)
        votes = torch.zeros(4)
        for index in cosine.argsort(descending=True)[:5]:
            votes[labels[index]] += torch.exp(cosine[index] / 0.1)
        assert torch.allclose(scores[row] / scores[row].sum(), votes / votes.sum(), rtol=1e-4)
    nearest = torch.nn.functional.normalize(test_x) @ torch.nn.functional.normalize(train_x).t()
    cold = probes.nearest_neighbours(train_x, labels, test_x, 4, k=5, temperature=1e-3)  # exp(1 / 1e-3) overflows
    assert torch.equal(cold.argmax(1), labels[nearest.argmax(1)])


def test_linear_probe_separates_what_is_linear_whatever_its_scale():
    torch.manual_seed(0)
    x, labels = torch.randn(400, 6), torch.randint(0, 3, (400,))
    x[torch.arange(400), labels] += 4
    x = x * torch.tensor([1e-3, 1, 1e3, 1, 1, 1]) + 100
    assert (
        probes.topk_accuracy(probes.linear_probe(x[:300], labels[:300], x[300:], 3, epochs=20), labels[300:])["top1"]
        > 95
    )


def test_balanced_share_of_labels():
    labels = np.repeat([0, 1, 2], [100, 50, 4])
    source = sources.MemoryImages(torch.zeros(154, 3, 8, 8, dtype=torch.uint8), labels, ["a", "b", "c"])
    part = balanced_subset(source, 0.1, seed=0)
    assert np.bincount(part.labels).tolist() == [10, 5, 1] and len(part) == 16


def test_neighbours_in_blocks_are_those_of_all_at_once():
    torch.manual_seed(0)
    train_x, labels, test_x = torch.randn(300, 8), torch.randint(0, 4, (300,)), torch.randn(1100, 8)
    whole = probes.nearest_neighbours(train_x, labels, test_x, 4, k=20)
    for block in (7, 64, 299, 300):
        assert torch.allclose(
            probes.nearest_neighbours(train_x, labels, test_x, 4, k=20, block=block), whole, atol=1e-6
        )


def test_a_linear_probe_against_a_plain_loop():
    torch.manual_seed(0)
    train_x, labels, test_x = (
        torch.randn(300, 70) * torch.linspace(0.1, 9, 70),
        torch.randint(0, 4, (300,)),
        torch.randn(50, 70),
    )
    whole = probes.linear_probe(train_x, labels, test_x, 4, epochs=3, batch=32)
    plain = [torch.zeros(4, 70, requires_grad=True), torch.zeros(4, requires_grad=True)]
    optimizer, x = torch.optim.SGD(plain, lr=0.1 * 32 / 256, momentum=0.9), (train_x - train_x.mean(0)) / train_x.std(0)
    for step in range(27):
        optimizer.param_groups[0]["lr"] = 0.1 * 32 / 256 * (1 + np.cos(np.pi * step / 27)) / 2
        picks = torch.randperm(300, generator=rng.generator(0, "probe", step // 9))[step % 9 * 32 :][:32]
        torch.nn.functional.cross_entropy(x[picks] @ plain[0].t() + plain[1], labels[picks]).backward()
        optimizer.step(), optimizer.zero_grad()
    assert torch.allclose(whole, ((test_x - train_x.mean(0)) / train_x.std(0)) @ plain[0].t() + plain[1], atol=1e-5)


def test_features_kept_in_16_bits_give_nearly_the_same_scores():
    torch.manual_seed(0)
    train_x, labels, test_x = torch.randn(300, 70), torch.randint(0, 4, (300,)), torch.randn(50, 70)
    for protocol in (probes.linear_probe, probes.nearest_neighbours):
        full, half = protocol(train_x, labels, test_x, 4), protocol(train_x.half(), labels, test_x.half(), 4)
        assert (
            half.dtype == torch.float32
            and not torch.equal(full, half)
            and torch.allclose(full, half, rtol=1e-2, atol=1e-2)
        )


def test_counts_of_chunks_are_those_of_all_outputs(monkeypatch):
    torch.manual_seed(0)
    source = sources.MemoryImages(
        torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8), np.arange(150) % 3, ["a", "b", "c"]
    )
    model, distributed = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)),
        dist.initialize("cpu", "fp32"),
    )
    scores, indices = probes.extract_features(distributed, model, source, 8)
    one = probes.topk_accuracy(scores, torch.from_numpy(source.labels)[indices])
    found = probes.evaluate(distributed, model, source, 8)
    assert torch.equal(found.pop("confusion"), one.pop("confusion")) and found == one and one["images"] == 150
    monkeypatch.setattr(
        type(distributed), "all_reduce", lambda self, values: 2 * values
    )  # another process found the same
    twice = probes.evaluate(distributed, model, source, 8)
    assert twice["images"] == 300 and twice["top1"] == one["top1"]


@pytest.mark.parametrize(
    "flags",
    slow([[], ["--ema", "0.5"], ["--init", "scratch"]], fast=[["--ema", "0.5"]]),
    ids=["plain", "ema", "scratch"],
)
def test_finetune_then_evaluate_gives_the_same_numbers(pretrained, tmp_path, capsys, flags):
    start = [] if flags[:1] == ["--init"] else ["--checkpoint", pretrained / "run" / "last.pt"]
    here(
        finetune.main,
        "--data",
        pretrained / "data",
        *TUNE,
        *start,
        *flags,
        "--model",
        "swin_nano",
        "--epochs",
        2,
        "--output",
        tmp_path / "out",
    )
    trained = last_line(capsys)
    assert {"config.json", "log.jsonl", "last.pt", "confusion.png", "per_class.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert set(json.loads((tmp_path / "out" / "per_class.json").read_text())) == {"class0", "class1", "class2"}
    here(finetune.main, "--data", pretrained / "data", "--checkpoint", tmp_path / "out" / "last.pt", "--eval")
    evaluated = last_line(capsys)
    assert (
        trained.startswith("top-1 ") and "(21 images, " in trained and trained.split("(")[0] == evaluated.split("(")[0]
    )
    rows = [row for row in log(tmp_path / "out") if "eval_top1" in row]
    assert [row["epoch"] for row in rows] == [1, 2] and f"{rows[-1]['eval_top1']:.2f}" in trained


@pytest.mark.parametrize("real", slow([False, True], fast=[False]), ids=["forked", "torchrun"])
def test_two_processes_evaluate_and_train_as_one(pretrained, tmp_path, real):
    tune = [
        "--data",
        pretrained / "data",
        *TUNE[:-4],
        "--checkpoint",
        pretrained / "run" / "last.pt",
        "--epochs",
        1,
        "--mixup",
        0,
        "--cutmix",
        0,
        "--drop-path",
        0,
    ]
    here(finetune.main, *tune, "--batch-size", 12, "--output", tmp_path / "one")
    run("finetune.py", *tune, "--batch-size", 6, "--output", tmp_path / "two", processes=2, real=real)
    a, b = ([row for row in log(tmp_path / name)] for name in ("one", "two"))
    assert b[0]["loss"] == pytest.approx(a[0]["loss"], rel=1e-5)
    ends = []
    for count in (1, 2):
        done = run(
            "finetune.py",
            "--data",
            pretrained / "data",
            "--checkpoint",
            tmp_path / "one" / "last.pt",
            "--eval",
            processes=count,
        )
        ends.append(done.stdout.strip().splitlines()[-1])
    assert ends[0] == ends[1] and "(21 images" in ends[0]


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_frozen_protocols(pretrained, tmp_path, capsys, protocol):
    lines = []
    for k in range(2):
        here(
            finetune.main,
            "--data",
            pretrained / "data",
            *TUNE,
            "--checkpoint",
            pretrained / "run" / "last.pt",
            "--protocol",
            protocol,
            "--max-steps",
            30,
            "--output",
            tmp_path / str(k),
        )
        lines.append(last_line(capsys))
    assert lines[0] == lines[1] and float(lines[0].split()[1]) > 40, (
        lines
    )  # colours tell the classes apart; chance is 33


def test_finetuning_resumes_exactly(pretrained, tmp_path):
    tune = [
        "--data",
        pretrained / "data",
        *TUNE,
        "--checkpoint",
        pretrained / "run" / "last.pt",
        "--epochs",
        3,
        "--log-every",
        1,
    ]
    here(finetune.main, *tune, "--output", tmp_path / "whole")
    here(finetune.main, *tune, "--output", tmp_path / "part", "--max-steps", 3)
    here(finetune.main, *tune, "--output", tmp_path / "part", "--resume", "auto")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "part"))
    assert all(torch.equal(a[key], b[key]) for key in a) and log(tmp_path / "whole") == log(tmp_path / "part")


@pytest.mark.parametrize("memory", slow([[], ["--in-memory"]], fast=[[]]), ids=["files", "memory"])
def test_a_resumed_share_of_labels_is_the_same_share(pretrained, tmp_path, memory):
    tune = [
        "--data",
        pretrained / "data",
        *TUNE[:-4],
        "--batch-size",
        6,
        "--init",
        "scratch",
        "--model",
        "swin_nano",
        "--labels",
        0.5,
        "--epochs",
        2,
        "--log-every",
        1,
        *memory,
    ]
    here(finetune.main, *tune, "--output", tmp_path / "whole")
    here(finetune.main, *tune, "--output", tmp_path / "part", "--max-steps", 3)
    here(finetune.main, *tune, "--output", tmp_path / "part", "--resume", "auto")
    assert log(tmp_path / "whole") == log(tmp_path / "part") and log(tmp_path / "whole")[-1]["step"] == 6


def test_a_checkpoint_of_another_window_is_interpolated(pretrained, tmp_path, capsys):
    here(
        finetune.main,
        "--data",
        pretrained / "data",
        "--recipe",
        "micro",
        "--image-size",
        32,
        "--window",
        4,
        "--workers",
        0,
        "--batch-size",
        12,
        "--checkpoint",
        pretrained / "run" / "last.pt",
        "--max-steps",
        1,
        "--output",
        tmp_path / "out",
    )
    assert "interpolated" in capsys.readouterr().out


def test_public_weights_are_a_starting_point(pretrained, tmp_path, capsys):
    torch.save(torchvision.models.swin_t(weights=None).state_dict(), tmp_path / "swin_t.pt")
    here(
        finetune.main,
        "--data",
        pretrained / "data",
        "--image-size",
        64,
        "--workers",
        0,
        "--batch-size",
        4,
        "--checkpoint",
        tmp_path / "swin_t.pt",
        "--max-steps",
        1,
        "--output",
        tmp_path / "out",
    )
    out = capsys.readouterr().out
    assert (
        "(torchvision): loaded all " in out
        and "interpolated 8 relative position bias tables" in out
        and "swin_tiny at 64 px" in out
    )


def test_class_names_are_compared(pretrained, tmp_path):
    here(
        finetune.main,
        "--data",
        pretrained / "data",
        *TUNE,
        "--checkpoint",
        pretrained / "run" / "last.pt",
        "--max-steps",
        1,
        "--output",
        tmp_path / "out",
    )
    for part in ("train", "val"):
        make_images(tmp_path / "other" / part, classes=3, each=2)
        (tmp_path / "other" / part / "class2").rename(tmp_path / "other" / part / "eel")
        make_images(tmp_path / "fewer" / part, classes=2, each=2)
    for name, word in (("other", "'class2' and 'eel'"), ("fewer", "has 3 classes")):
        with pytest.raises(UserError, match=word):
            finetune.main(["--data", str(tmp_path / name), "--checkpoint", str(tmp_path / "out" / "last.pt"), "--eval"])


def test_without_flags_the_newest_run_is_used(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no pre-training run"):
        finetune.main([])
    crops = sources.MemoryImages(
        torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8), np.arange(64) % 2, ["a", "b"]
    )
    monkeypatch.setattr(images, "photographs", lambda size, held_out=False: crops)
    here(train.main, "--batch-size", 16, "--max-steps", 1, "--image-size", 32)
    here(finetune.main, "--max-steps", 1, "--workers", 0, "--labels", 1)
    out = capsys.readouterr().out.strip().splitlines()
    assert "from scratch: top-1" in out[-2] and out[-1].endswith("(64 images, runs/demo-eesmm-1/last.pt)")
    assert Image.open(next((tmp_path / "runs").glob("demo-finetune-1/confusion.png"))).size[0] > 300


def test_evaluation_is_of_the_whole_of_what_is_given(pretrained, tmp_path, capsys):
    here(
        finetune.main,
        "--data",
        pretrained / "data",
        *TUNE[:-4],
        "--checkpoint",
        pretrained / "run" / "last.pt",
        "--epochs",
        1,
        "--batch-size",
        12,
        "--output",
        tmp_path / "run",
    )
    whole = make_images(tmp_path / "whole", classes=3, each=9, seed=5)
    three = tmp_path / "three"
    for part, each in (("train", 5), ("val", 4), ("test", 3)):
        make_images(three / part, classes=3, each=each)
    for where, split, count in (
        (whole, [], 27),
        (three, [], 12),
        (three, ["--split", "test"], 9),
        (three, ["--split", "train"], 15),
    ):
        capsys.readouterr()
        here(finetune.main, "--eval", "--checkpoint", tmp_path / "run" / "last.pt", "--data", where, *split)
        assert f"({count} images, " in capsys.readouterr().out
    with pytest.raises(DataError, match="has no part for --split val"):
        finetune.main(
            ["--eval", "--checkpoint", str(tmp_path / "run" / "last.pt"), "--data", str(whole), "--split", "val"]
        )


REFERENCE = json.loads((Path(__file__).parent / "data" / "randaugment.json").read_text())


@pytest.fixture(scope="module")
def astronaut():
    image = Image.fromarray(skimage.data.astronaut()).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image).mean((0, 1)) - REFERENCE["image_mean"]).max() < 0.01
    return image


@pytest.mark.parametrize("operation", REFERENCE["operations"], ids=lambda operation: operation["name"])
def test_operations_of_randaugment_change_pixels_as_timm_s_do(astronaut, operation):
    """At magnitude 9 of 10, each sign: the mean absolute change of a value."""
    signed = operation["name"] in augment.SIGNED
    assert signed == operation["either_sign"] and len(augment.SIGNED) + len(augment.UNSIGNED) == len(
        REFERENCE["operations"]
    )
    function = (augment.SIGNED if signed else augment.UNSIGNED)[operation["name"]]
    before = np.asarray(astronaut).astype(float)
    found = [
        np.abs(np.asarray(function(astronaut, level)).astype(float) - before).mean()
        for level in ((-0.9, 0.9) if signed else (0.9,))
    ]
    assert found == pytest.approx(operation["mean_change_of_pixel_at_9"], abs=0.02), operation["name"]
    assert np.asarray(function(astronaut, 1.0)).shape == (224, 224, 3)


def test_randaugment_is_as_strong_as_timm_s(astronaut):
    """300 draws: mean change of a value and share of images left alone, within four standard errors of both samples."""
    assert augment.randaugment(0, PixelFormat()) is None
    transform, image = (
        augment.randaugment(27, PixelFormat()),
        v2.functional.pil_to_tensor(astronaut),
    )
    torch.manual_seed(0)
    made = [transform(image) for _ in range(300)]
    assert all(out.shape == image.shape and out.dtype == torch.uint8 for out in made)
    changes = torch.stack([(out.float() - image.float()).abs().mean() for out in made])
    for found, name in ((changes, "mean"), ((changes == 0).float(), "share_left_alone")):
        expected, error = REFERENCE["mean_absolute_change_of_pixel"][name]
        assert abs(found.mean() - expected) < 4 * (error**2 + (found.std() ** 2 / len(made)).item()) ** 0.5, name


def test_erasing_is_noise_in_a_rectangle_that_belongs_to_the_image():
    images_, keys = torch.full((400, 3, 32, 24), 7.0), np.stack([np.full(400, 2), np.arange(400)], axis=1)
    out = data.random_erasing(images_, keys, 0.25, seed=3, step=5)
    erased = (out != images_).all(1)
    assert torch.equal(erased, (out != images_).any(1))
    hit = erased.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32 and abs(out[out != 7].mean()) < 0.05 and abs(out[out != 7].std() - 1) < 0.05
    for mask in erased[hit]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == len(rows) * len(columns) and 0.01 < mask.float().mean() < 0.36
    assert torch.equal(
        data.random_erasing(images_[100:160], keys[100:160], 0.25, seed=3, step=5), out[100:160]
    )  # whatever batch or process it is in
    assert torch.equal(data.random_erasing(images_, keys, 0.0, seed=3, step=5), images_)
    assert not torch.equal(data.random_erasing(images_, keys, 0.25, seed=3, step=6), out)


def test_a_run_keeps_the_augmentation_that_it_began_with(pretrained, tmp_path, capfd):
    words = [
        "--data",
        pretrained / "data",
        *TUNE[:-4],
        "--init",
        "scratch",
        "--model",
        "swin_nano",
        "--epochs",
        2,
        "--batch-size",
        12,
    ]
    here(finetune.main, *words, "--max-steps", 1, "--output", tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    saved = torch.load(tmp_path / "old" / "last.pt", weights_only=True)
    saved["config"]["augmentation"] = augment.EARLIER_AUGMENTATION
    torch.save(saved, tmp_path / "old" / "last.pt")
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved["config"]))
    for name in ("new", "old"):
        here(finetune.main, *words, "--resume", "auto", "--output", tmp_path / name)
    assert "another setting" not in capfd.readouterr().err
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["augmentation"] for name in ("new", "old")]
    assert kinds == [augment.AUGMENTATION, augment.EARLIER_AUGMENTATION] and log(tmp_path / "new") != log(
        tmp_path / "old"
    )


def test_a_run_with_the_earlier_augmentation_goes_on_and_says_so(pretrained, tmp_path, capfd):
    words = [
        "--data",
        pretrained / "data",
        *TUNE[:-4],
        "--init",
        "scratch",
        "--model",
        "swin_nano",
        "--epochs",
        2,
        "--batch-size",
        12,
        "--output",
        tmp_path / "run",
    ]
    here(finetune.main, *words, "--max-steps", 1)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    saved["config"].pop("augmentation")
    saved["config"]["arguments"]["randaugment"] = 9
    torch.save(saved, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved["config"]))
    capfd.readouterr()
    here(finetune.main, *words, "--resume", "auto")
    warned = [
        line
        for line in capfd.readouterr().err.splitlines()
        if line.startswith("warning: resuming with another setting")
    ]
    assert (
        len(warned) == 2
        and "--randaugment was 9, is 27" in warned[0]
        and "operations with a chance of one half, erasing by noise" in warned[1]
    )
    here(finetune.main, *words, "--resume", "auto")
    assert "another setting" not in capfd.readouterr().err
