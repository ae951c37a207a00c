"""images.py, chance.py, data.py: every kind of file comes out right, and batches are a function of seed and step."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import make_images
from PIL import Image, ImageDraw

from engine import data, rng, runs
from engine.errors import DataError
from images import cache, decode, folders, open_train_and_val, sources
from images.crops import denormalize, random_crop_boxes
from images.folders import all_images
from images.formats import PixelFormat


def picture(width=48, height=32):
    """Red left half, green upper right, blue lower right."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 2, 0, width, height // 2 - 1), fill=(30, 200, 30))
    draw.rectangle((width // 2, height // 2, width, height), fill=(30, 30, 200))
    return image


EXPECTED = {(0.25, 0.5): (200, 30, 30), (0.75, 0.25): (30, 200, 30), (0.75, 0.75): (30, 30, 200)}


def corners(path):
    out = decode.to_chw(decode.to_rgb(decode.open_image(path)))
    return {at: out[:, int(at[1] * out.shape[1]), int(at[0] * out.shape[2])].tolist() for at in EXPECTED}


def close(path, expected=EXPECTED, most=12):
    found = corners(path)
    worst = max(abs(a - b) for at, colour in expected.items() for a, b in zip(found[at], colour))
    assert worst <= most, (found, expected)


GOOD = {
    "rgb.jpg": lambda p: picture().save(p, quality=95),
    "png_named.jpg": lambda p: picture().save(p, "PNG"),
    "palette.png": lambda p: picture().quantize(16).save(p),
    "rgba.png": lambda p: picture().convert("RGBA").save(p),
    "bitmap.bmp": lambda p: picture().save(p),
    "web.webp": lambda p: picture().save(p, lossless=True),
    "cmyk.jpg": lambda p: picture().convert("CMYK").save(p, quality=95),
    "animated.gif": lambda p: (
        picture().quantize(16).save(p, save_all=True, append_images=[Image.new("RGB", (48, 32), "white").quantize(16)])
    ),
    "tiff.tif": lambda p: picture().save(p),
}


@pytest.mark.parametrize("name", GOOD)
def test_kinds_of_images(tmp_path, name):
    GOOD[name](tmp_path / name)
    close(tmp_path / name, most=40 if "cmyk" in name else 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = picture(480, 320)
    stored = image.transpose(back[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    stored.save(path, exif=exif, quality=95)
    close(path)
    source = sources.FileImages(tmp_path, ["turned.jpg"], None, [])
    draws = np.full(22, 0.5)
    crop = source.crop(0, draws, 32, (1, 1), (1, 1))  # no square has the whole area: the central square, 320 x 320
    assert crop[:, 16, 4].tolist()[0] > 150 and crop[1, 4, 24] > 150 and crop[2, 28, 24] > 150
    assert torch.equal(
        source.crop(0, draws, 8, (1, 1), (1, 1)) > 127, torch.nn.functional.avg_pool2d(crop.float(), 4) > 127
    )


def test_sixteen_bits_grey_and_transparency(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    out = decode.to_chw(decode.to_rgb(decode.open_image(tmp_path / "deep.png")))
    assert (out.float() - torch.from_numpy(values / 257.0)).abs().max() <= 1 and torch.equal(out[0], out[2])
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    assert (decode.to_chw(decode.to_rgb(decode.open_image(tmp_path / "grey.png"))) == 77).all()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode.to_chw(decode.to_rgb(decode.open_image(tmp_path / "clear.png"))) == 255).all()


def bad_files(folder):
    """Twelve kinds of file that no run should stumble over, by name."""
    good = folder / "whole.tmp"
    picture(200, 150).save(good, "JPEG")
    whole = good.read_bytes()
    good.unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photograph")
    (folder / "header.jpg").write_bytes(whole[:20])
    (folder / "corrupt.jpg").write_bytes(b"\0" * 10 + whole[10:])
    (folder / "folder.jpg").mkdir()
    os.symlink(folder / "nowhere", folder / "dangling.jpg")
    picture(6, 40).save(folder / "thin.png")
    Image.new("1", (12000, 9000)).save(folder / "bomb.png")
    (folder / "truncated.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:6000])
    (folder / "cut.gif").write_bytes(b"GIF89a\x40\x00")
    return [
        "truncated.jpg",
        "empty.jpg",
        "text.jpg",
        "header.jpg",
        "corrupt.jpg",
        "folder.jpg",
        "dangling.jpg",
        "thin.png",
        "bomb.png",
        "truncated.png",
        "cut.png",
        "cut.gif",
    ]


def test_bad_files_are_replaced_by_the_next_good_one_and_named(tmp_path):
    bad = bad_files(tmp_path)
    for k in range(4):
        picture().save(tmp_path / f"zz{k}.jpg")
    names = folders.ImageTree(tmp_path).paths
    assert names == sorted(bad + [f"zz{k}.jpg" for k in range(4)])
    crops = data.Crops(sources.FileImages(tmp_path, names, None, []), 16)
    batch = crops.__getitems__([(0, index) for index in range(len(names))])
    assert batch["images"].shape == (len(names), 3, 16, 16)
    named = {names[index]: reason for index, reason in batch["bad"]}
    assert set(named) == set(bad)
    for name, word in {
        "empty.jpg": "empty",
        "folder.jpg": "folder",
        "dangling.jpg": "link to nothing",
        "thin.png": "under 8",
        "bomb.png": "more than",
        "text.jpg": "not an image",
    }.items():
        assert word in named[name], named[name]
    again = crops.__getitems__([(0, index) for index in range(len(names))])
    assert torch.equal(batch["images"], again["images"])
    for name in names:
        if name.startswith("zz"):
            (tmp_path / name).unlink()
    with pytest.raises(DataError, match="none of the 16 images can be read; bomb.png: 12000 x 9000 pixels"):
        crops.__getitems__([(0, 0)])


def test_draft_decoding_does_not_move_the_crop(tmp_path):
    image = picture(1200, 900)
    image.save(tmp_path / "large.jpg", quality=95)
    source = sources.FileImages(tmp_path, ["large.jpg"], None, [])
    for seed in range(5):
        draws = rng.uniform(22, seed)
        top, left, h, w = random_crop_boxes(np.array([[900, 1200]]), draws[None], (0.3, 0.9), (3 / 4, 4 / 3))[0]
        plain = image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        out = source.crop(0, draws, 32, (0.3, 0.9), (3 / 4, 4 / 3))
        assert (out.float() - decode.to_chw(plain).float()).abs().mean() < 3


def test_crop_boxes_are_distributed_as_torchvisions():
    scale, ratio, count = (0.2, 1.0), (3 / 4, 4 / 3), 4000
    boxes = random_crop_boxes(np.tile([300, 400], (count, 1)), rng.uniform(22, 7, np.arange(count)), scale, ratio)
    torch.manual_seed(0)
    peer = torchvision.transforms.RandomResizedCrop
    theirs = np.array([peer.get_params(torch.zeros(3, 300, 400), scale, ratio) for _ in range(count)])
    error = np.abs(boxes.mean(0) - theirs.mean(0)) / (theirs.std(0) * np.sqrt(2 / count))
    assert error.max() < 4.5, error  # standard errors, four means
    assert (
        (boxes[:, 0] + boxes[:, 2] <= 300).all()
        and (boxes[:, 1] + boxes[:, 3] <= 400).all()
        and (boxes[:, 2:] > 0).all()
    )


def test_small_images_are_cropped_on_the_device_as_torchvision_does():
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    pixels = torch.nn.functional.avg_pool2d(pixels.float(), 5, 1, 2).to(
        torch.uint8
    )  # bicubic kernels differ slightly on noise
    crops = data.Crops(sources.MemoryImages(pixels, None, []), 32)
    batch = crops.__getitems__([(3, index) for index in range(6)])
    out = denormalize(data.prepare_batch(batch, torch.device("cpu"), 32)) * 255
    for k in range(6):
        top, left, h, w = batch["boxes"][k].tolist()
        plain = torchvision.transforms.v2.functional.resized_crop(
            pixels[k].float(), top, left, h, w, [32, 32], 3, antialias=False
        )
        plain = plain.clamp(0, 255)
        plain = plain.flip(-1) if batch["flip"][k] else plain
        assert (out[k] - plain)[:, 2:-2, 2:-2].abs().max() < 4


def test_hash_is_a_good_source_of_numbers():
    values = rng.uniform(20000, 0, "test", 3)
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert len({int(rng.hash64(s, "a", e, i)) for s in range(5) for e in range(20) for i in range(50)}) == 5000
    assert rng.hash64(0, "a", 1) != rng.hash64(0, "b", 1)
    together = rng.uniform(3, 0, "x", np.array([4, 5]), np.array([6, 7]))
    assert np.array_equal(together[1], rng.uniform(3, 0, "x", 5, 7))


@pytest.mark.parametrize("parts, accumulate", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_batches_do_not_depend_on_processes_accumulation_or_start(parts, accumulate):
    make = lambda rank, start: data.BatchSampler(50, 16, 5, start, 7, rank, parts, accumulate)
    whole = [pairs for pairs in data.BatchSampler(50, 16, 5, 0, 7)]
    dealt = [list(make(rank, 0)) for rank in range(parts)]
    for step in range(7):
        together = []
        for micro in range(accumulate):
            for rank in range(parts):
                together += dealt[rank][step * accumulate + micro]
        assert together == whole[step]
    assert list(make(0, 4)) == dealt[0][4 * accumulate :]
    epoch = [index for pairs in whole[:3] for _, index in pairs]
    assert len(set(epoch)) == 48 and [e for pairs in whole for e, _ in pairs] == [0] * 48 + [1] * 48 + [2] * 16
    assert whole[0] != whole[3]


@pytest.mark.parametrize("workers", [0, 3])
def test_loader_gives_the_same_batches_with_any_number_of_workers(workers):
    pixels = torch.arange(40)[:, None, None, None].expand(40, 3, 16, 16).to(torch.uint8)
    crops = data.Crops(
        sources.MemoryImages(pixels, np.arange(40), []),
        16,
        augment=lambda image: image + torch.randint(0, 9, (1,), dtype=torch.uint8),
    )
    batches = [batch for batch in data.make_loader(crops, data.BatchSampler(40, 8, 1, 2, 9), workers, pin=False)]
    expected = [crops.__getitems__(keys) for keys in data.BatchSampler(40, 8, 1, 2, 9)]
    for a, b in zip(batches, expected, strict=True):
        assert (
            torch.equal(a["images"], b["images"])
            and torch.equal(a["labels"], b["labels"])
            and torch.equal(a["flip"], b["flip"])
        )


def make_folder(root, parts, classes, each):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for k in range(each):
                picture().save(root / part / name / f"{k}.jpg")


def test_forms_of_folders(tmp_path):
    make_folder(tmp_path / "a", ["train", "test"], ["cat", "dog"], 3)
    train, held, line = folders.train_and_val(tmp_path / "a")
    assert (
        len(train) == len(held) == 6
        and train.classes == held.classes == ["cat", "dog"]
        and "6 images of 2 classes (cat to dog); held out: 6 images of test/" in line[0]
    )
    assert held.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.names[0] == "cat/0.jpg"
    make_folder(tmp_path / "b", ["."], ["cat", "dog"], 20)
    train, held, line = folders.train_and_val(tmp_path / "b")
    assert (len(train), len(held)) == (38, 2) and not set(train.names) & set(held.names) and "2 of 40" in line[0]
    assert folders.train_and_val(tmp_path / "b")[1].names == held.names
    for k in range(3):
        (tmp_path / "c" / "deep").mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / "c" / "deep" / f"{k}.png")
    picture().save(tmp_path / "c" / "top.webp")
    train, held, _ = folders.train_and_val(tmp_path / "c")
    assert len(train) + len(held) == 4 and train.labels is None
    memory = sources.load_into_memory(folders.train_and_val(tmp_path / "a")[0])
    assert memory.pixels.shape == (6, 3, 32, 48) and memory.name(0) == "cat/0.jpg"
    picture(20, 20).save(tmp_path / "a" / "train" / "cat" / "odd.jpg")
    with pytest.raises(DataError, match="one size"):
        sources.load_into_memory(folders.train_and_val(tmp_path / "a")[0])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "no images found"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "no images found"),
        (lambda root: (make_folder(root, ["train"], ["cat"], 2), (root / "val").mkdir()), "no images found"),
        (lambda root: (root.mkdir(), picture().save(root / "a.jpg")), "one image alone"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, spoil, message):
    spoil(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        open_train_and_val(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda root: (
                make_folder(root, ["train"], ["cat", "dog"], 2),
                make_folder(root, ["val"], ["cat", "dog", "eel"], 2),
            ),
            "lacks: eel",
        ),
        (lambda root: make_folder(root, ["train", "val"], ["cat"], 2), "one class alone"),
        (
            lambda root: (make_folder(root, ["train"], ["cat", "dog"], 2), make_folder(root, ["val"], ["cat"], 2)),
            "no images of 1 of 2 classes: dog",
        ),
        (
            lambda root: (make_folder(root, ["train", "val"], ["cat", "dog"], 2), (root / "train" / "eel").mkdir()),
            "without images: eel",
        ),
        (lambda root: (root.mkdir(), [picture().save(root / f"{k}.jpg") for k in range(9)]), "folder per class"),
    ],
)
def test_folders_that_cannot_be_classified(tmp_path, spoil, message):
    spoil(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        open_train_and_val(str(tmp_path / "x"), labelled=True)


def test_held_out_images_are_the_same_with_any_number_of_workers(tmp_path):
    make_images(tmp_path)
    (tmp_path / "class0" / "003.png").write_bytes(b"no image")
    source = all_images(str(tmp_path), PixelFormat())
    chunks, found = [list(range(k, min(k + 5, len(source)))) for k in range(0, len(source), 5)], []
    for workers in (0, 2):
        bad = {}
        found.append((list(data.iterate_center_crops(source, chunks, 16, bad, workers)), bad))
    (here, bad), (there, too) = found
    assert (
        bad == too
        and len(bad) == 1
        and [i for i, _ in here] == [i for i, _ in there]
        and sum(len(i) for i, _ in here) == len(source) - 1
    )
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(here, there, strict=True))


def test_photographs_are_held_out_with_a_gap():
    for size in (32, 64):
        train, held = sources.photographs(size), sources.photographs(size, held_out=True)
        assert len(train.classes) == 8 and set(train.labels) == set(range(8))
        assert np.bincount(held.labels).tolist() == [81] * 8 and len(train) > 1500

        def rows(crops):
            values = crops.pixels.transpose(1, 2).reshape(-1, 3 * size).numpy()
            different = 1 + (np.diff(np.sort(values, axis=1), axis=1) > 0).sum(axis=1)
            return {bytes(row) for row in values[different > 40]}  # plain sky and black borders are alike everywhere

        assert len(rows(train)) > 5 * len(rows(held)) > 1000 and not rows(train) & rows(held)


def test_cifar_is_read_from_its_own_files(tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="--download"):
        open_train_and_val("cifar10")
    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    kind = torchvision.datasets.CIFAR10
    for name in [n for n, _ in kind.train_list + kind.test_list]:
        rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *arguments: True)
    train, held, _ = open_train_and_val("cifar10")
    assert train.pixels.shape == (20, 3, 32, 32) and len(held) == 4 and train.classes[0] == "a"
    assert train.pixels[0, 1, 0, 3] == rows[0, 1024 + 3]
    with pytest.raises(DataError, match="not elsewhere"):
        sources.download("elsewhere")


def test_the_cache_gives_what_the_files_give(tmp_path):
    make_folder(tmp_path / "a", ["train", "test"], ["cat", "dog"], 4)
    (tmp_path / "a" / "train" / "cat" / "bad.png").write_bytes(b"no image")
    picture(600, 400).save(tmp_path / "a" / "train" / "dog" / "large.png")
    plain, _, _ = open_train_and_val(str(tmp_path / "a"), size=24)
    for _ in range(2):  # written, then read
        kept, _, _ = open_train_and_val(str(tmp_path / "a"), size=24, cache=tmp_path / "cache")
        assert len(list((tmp_path / "cache").iterdir())) == 4  # two parts, no temporary files
        assert kept.names == plain.names and (kept.labels == plain.labels).all()
        for k, name in enumerate(plain.names):
            draws = rng.uniform(22, 0, "crop", k)
            if "bad" in name:
                with pytest.raises(DataError, match="not an image"):
                    kept.crop(k, draws, 24, (0.2, 1), (0.75, 1.333))
            elif "large" in name:
                assert kept.decode(k).shape == (256, 384, 3)
                near = (kept.center_crop(k, 24).float() - plain.center_crop(k, 24).float()).abs().mean()
                assert near < 3, near
            else:
                assert torch.equal(
                    kept.crop(k, draws, 24, (0.2, 1), (0.75, 1.333)), plain.crop(k, draws, 24, (0.2, 1), (0.75, 1.333))
                )
                assert torch.equal(kept.center_crop(k, 24), plain.center_crop(k, 24))
    share = kept.relisted(kept.names[1:4])
    assert (
        torch.equal(share.center_crop(0, 24), kept.center_crop(1, 24))
        and share.labels.tolist() == kept.labels[1:4].tolist()
    )
    other = kept.relisted([*kept.names[:2], "dog/vanished.png"])  # as when a run resumes that began with one more file
    with pytest.raises(DataError, match="no such file"):
        other.center_crop(2, 24)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        open_train_and_val(str(tmp_path / "a"), cache=tmp_path / "file")


def test_the_cache_sees_a_changed_image_and_a_damaged_file(tmp_path, capsys):
    make_folder(tmp_path / "a", ["train", "test"], ["cat", "dog"], 4)
    name = "cat/1.jpg"

    def load():
        return open_train_and_val(str(tmp_path / "a"), size=24, cache=tmp_path / "cache")[0]

    before = load()
    number = list(before.names).index(name)
    assert capsys.readouterr().err == ""
    picture(30, 40).save(tmp_path / "a" / "train" / name)
    after = load()
    assert "warning: 1 of 8 files changed" in capsys.readouterr().err
    assert after.decode(number).shape == (40, 30, 3) and before.decode(number).shape != (40, 30, 3)
    status = os.stat(tmp_path / "a" / "train" / name)
    os.utime(tmp_path / "a" / "train" / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    load()
    assert "1 of 8 files changed" in capsys.readouterr().err
    again = pickle.loads(pickle.dumps(after))  # as a spawned worker gets it
    assert len(pickle.dumps(after)) < 3000 and torch.equal(again.center_crop(number, 24), after.center_crop(number, 24))
    pixels, index = after.path, after.path.with_suffix(".npz")
    whole = pixels.read_bytes(), index.read_bytes()
    for path, content, said in (
        (pixels, whole[0][:-100], "another length"),
        (index, b"garbage", "damaged cache"),
        (index, whole[1][:200], "damaged cache"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=f"{said}.*delete .*{index.name}.* rebuilt|{index.name}: a {said}.*delete it.* rebuilt"
        ):
            load()
        index.unlink()
        assert torch.equal(load().center_crop(number, 24), after.center_crop(number, 24))


def test_names_are_a_list_of_any_names():
    given = ["a", "", "zoë/ü.png", "c\udce4t.png"]
    names = sources.FileNames(given)
    assert (
        list(names) == given
        and names[-1] == given[-1]
        and names[1:3] == given[1:3]
        and "a" in names
        and len(names) == 4
    )
    with pytest.raises(IndexError):
        names[4]
    assert len(sources.FileNames([])) == 0 and pickle.loads(pickle.dumps(names)) == given


def test_one_process_fills_the_cache_again_after_a_file_vanished(tmp_path, monkeypatch):
    """On resume with --cache: the first process fills it while the others wait, and nobody fills it twice."""
    make_images(tmp_path / "data")
    (tmp_path / "run").mkdir()
    source = all_images(str(tmp_path / "data"), PixelFormat())
    (tmp_path / "run" / "files.txt").write_text("\n".join(source.names))
    (tmp_path / "data" / source.names[3]).unlink()
    images_now, fill, where = (
        cache.open_cached(all_images(str(tmp_path / "data"), PixelFormat()), tmp_path / "cache", 16),
        cache.fill,
        [],
    )
    monkeypatch.setattr(cache, "fill", lambda *inputs: (where.append(first[0]), fill(*inputs)))
    first = [False]

    def run_on_first(function):
        first[0] = True
        function()
        first[0] = False

    restored = runs.restore_file_list(
        images_now,
        tmp_path / "run" / "files.txt",
        None,
        SimpleNamespace(world_size=2, run_on_main=run_on_first),
    )
    assert list(restored.names) == list(source.names) and where == [True]
