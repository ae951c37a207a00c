"""folders.py: data sets as people keep them; images as cameras and programs leave them; what is bad is named
wherever it is.
"""

import numpy as np
import pytest
from helpers import SMALL, make_images, run, slow
from PIL import Image, PngImagePlugin

from engine.errors import DataError
from images import folders, open_train_and_val, sources

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))


def grow(root, *paths):
    """Images, other files and links ("link > target") by their paths."""
    for path in paths:
        path, _, target = path.partition(" > ")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / path).symlink_to(target)
        elif path.endswith((".jpg", ".png")):
            PIXELS.save(root / path)
        else:
            (root / path).write_text('{"kind": "pretrain", "arguments": {}}' if path.endswith("config.json") else "")
    return root


BOTH = ["train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"]
FORMS = {  # what is there: (paths, training files, held-out files, what the lines say)
    "train and val": (BOTH, 3, 2, ["3 images of 2 classes (cat to dog); held out: 2 images of val/"]),
    "Training and Validation": (
        [path.replace("train", "Training").replace("val", "Validation") for path in BOTH],
        3,
        2,
        ["2 images of Validation/"],
    ),
    "train_set and test_set": (
        [path.replace("train", "train_set").replace("val", "test_set") for path in BOTH],
        3,
        2,
        ["2 images of test_set/"],
    ),
    "val before test": ([*BOTH, "test/cat/1.jpg"], 3, 2, ["2 images of val/; not used: test/"]),
    "a part of another name": (
        [*BOTH, "extra/cat/1.jpg", ".cache/x.jpg"],
        3,
        2,
        ["2 images of val/; not used: extra/"],
    ),
    "what systems leave": (
        [
            *BOTH,
            "train/cat/._1.jpg",
            "train/.hidden/1.jpg",
            "train/__MACOSX/cat/1.jpg",
            "train/cat/@eaDir/1.jpg",
            "val/#recycle/1.jpg",
            "train/lost+found/1.jpg",
            "train/dog/Thumbs.db",
        ],
        3,
        2,
        ["(cat to dog)"],
    ),
    "a run in the data": (
        [*BOTH, "train/runs/demo-1/config.json", "train/runs/demo-1/loss.png"],
        3,
        2,
        ["warning: ", "train/runs/demo-1: the folder of a run"],
    ),
    "ImageNet's flat val": (
        [*BOTH[:3], "val/1.jpg", "val/2.jpg"],
        3,
        2,
        ["warning: ", "val: images outside class folders, held out as they are; to fine-tune"],
    ),
    "a val of other folders": ([*BOTH[:3], "val/eel/1.jpg", "val/cat/2.jpg"], 3, 2, ["held out: 2 images of val/"]),
    "a link to a class": (
        [*BOTH, "train/a_cat > cat"],
        3,
        2,
        ["warning: ", "train/a_cat: a link to cat, which is included already; skipped"],
    ),
    "a link to itself": (
        [*BOTH, "train/dog/again > .."],
        3,
        2,
        ["warning: ", "train/dog/again: a link to the folder that it is in"],
    ),
    "a link outside": (
        [*BOTH, "../elsewhere/1.jpg", "train/eel > ../../elsewhere", "val/eel > ../../elsewhere"],
        4,
        3,
        ["3 classes (cat to eel)"],
    ),
    "kinds that are not read": (
        [*BOTH, "train/cat/a.HEIC", "train/dog/b.heic", "train/dog/c.svg"],
        3,
        2,
        ["warning: ", "are not read: 2 .heic, 1 .svg"],
    ),
    "a mistyped part": (
        ["trian/cat/1.jpg", "trian/cat/2.jpg", "trian/dog/1.jpg", "val/cat/1.jpg"],
        3,
        1,
        ["warning: ", "trian/, val/ read as classes, because there is no train/", "no train/ with val/ or test/"],
    ),
    "a folder too high": (
        [f"mine/{path}" for path in BOTH],
        4,
        1,
        ["warning: ", "holds mine/ alone, with train/ in it", "data/mine"],
    ),
    "classes named almost like parts": (
        ["rain/1.jpg", "rain/2.jpg", "dog/1.jpg"],
        2,
        1,
        ["2 images of 2 classes (dog to rain)"],
    ),
    "no parts": (
        ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"],
        2,
        1,
        ["2 images of 2 classes (cat to dog); held out: 1 of 3 images (5 %"],
    ),
    "a flat folder": (["1.jpg", "2.jpg", "3.jpg"], 2, 1, ["2 images without classes; held out: 1 of 3"]),
    "no classes": (["1.jpg", "2.jpg", "deep/3.jpg"], 2, 1, ["2 images without classes; held out: 1 of 3"]),
}


@pytest.mark.parametrize("what", FORMS)
def test_forms_of_folders(tmp_path, what):
    paths, training, held_out, said = FORMS[what]
    train, held, lines = folders.train_and_val(grow(tmp_path / "data", *paths))
    assert (len(train), len(held)) == (training, held_out), (list(train.names), list(held.names))
    assert all(any(words in line for line in lines) for words in said), lines
    assert any(line.startswith("warning: ") for line in lines) == ("warning: " in said), lines


REFUSED = {
    "flat val": ([*BOTH[:3], "val/1.jpg"], "val: images outside class folders.*ImageNet's validation images come so"),
    "one class": (
        ["train/cat/1.jpg", "train/cat/2.jpg", "val/cat/1.jpg"],
        r"one class alone \(cat\).*the folder that holds the class folders",
    ),
    "the folder of one class": (["1.jpg", "2.jpg", "3.jpg"], "a folder per class"),
    "empty classes, once each": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg", "train/eel/x", "val/eel/x"],
        "without images: eel$",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_cannot_be_classified(tmp_path, what):
    paths, message = REFUSED[what]
    with pytest.raises(DataError, match=message):
        folders.train_and_val(grow(tmp_path / "data", *paths), labelled=True)
    with pytest.raises(DataError, match="--data is empty"):
        open_train_and_val("")


# pixels ---------------------------------------------------------------------------------------------------------------


def odd_exif(path, tag, value, kind):
    """A JPEG whose EXIF has one entry: (tag, TIFF type, count, four bytes)."""
    entry = (
        b"\x01\x00"
        + tag.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + value
        + bytes(4)
    )
    PIXELS.save(path, exif=b"Exif\0\0II*\0\x08\0\0\0" + entry)


UNUSUAL = {
    "orientation in words": lambda path: odd_exif(path, 0x0112, b"6\0\0\0", 2),
    "orientation out of range": lambda path: odd_exif(path, 0x0112, b"\x63\0\0\0", 3),
    "a signed resolution": lambda path: odd_exif(path, 0x011A, b"\xff\xff\xff\xff", 9),
    "a long text": lambda path: PIXELS.save(path, "PNG", pnginfo=long_text()),
}


def long_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    return text


@pytest.mark.parametrize("what", UNUSUAL)
def test_photographs_with_odd_tags_are_used_as_they_lie(tmp_path, what):
    UNUSUAL[what](tmp_path / "odd.jpg")
    source = sources.FileImages(tmp_path, ["odd.jpg"], None, [])
    assert source.decode(0).shape[1::-1] == PIXELS.size
    crop = source.crop(0, np.full(22, 0.5), 16, (0.2, 1.0), (0.75, 1.333))
    assert crop.shape == (3, 16, 16) and crop.float().std() > 5


def test_values_of_unknown_range_are_refused_and_known_ones_are_not(tmp_path):
    share = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    for name, values in (("float.tif", share), ("int.tif", (share * 1e9).astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(
            DataError, match="32-bit (float|integer) values, whose range is not known: save the image with 8 or 16 bits"
        ):
            sources.FileImages(tmp_path, [name], None, []).center_crop(0, 16)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        Image.fromarray((share * 65535).astype(np.uint16)).save(tmp_path / name)
        decoded = np.asarray(sources.FileImages(tmp_path, [name], None, []).decode(0)).astype(float)
        assert abs(decoded[..., 0] - 255 * share).max() <= 1, name


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".jp2"])
def test_suffixes_that_pillow_reads(tmp_path, suffix):
    if suffix not in Image.registered_extensions():
        assert suffix in folders.NOT_READ  # and is counted among what is not read
        return
    PIXELS.save(tmp_path / f"1{suffix}")
    assert (
        folders.ImageTree(tmp_path).paths == [f"1{suffix}"]
        and sources.FileImages(tmp_path, [f"1{suffix}"], None, []).decode(0).shape[1::-1] == PIXELS.size
    )


# bad files ------------------------------------------------------------------------------------------------------------


def spoiled(folder, *names):
    make_images(folder / "train")
    make_images(folder / "val", each=6, seed=1)
    for name in names:
        (folder / name).write_bytes(b"no image")
    return folder


TUNE = [*SMALL[:6], "--workers", 0, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--init", "scratch"]
PROGRAMS = {
    "train.py": ["train.py", *SMALL, "--recipe", "cifar", "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0],
    "finetune.py": ["finetune.py", *TUNE],
    "linear": ["finetune.py", *TUNE, "--protocol", "linear"],
    "knn": ["finetune.py", *TUNE, "--protocol", "knn"],
}


@pytest.mark.parametrize("program", slow(PROGRAMS, fast=["train.py", "linear"]))
def test_bad_files_are_named_wherever_they_are(tmp_path, program):
    spoiled(tmp_path / "data", "train/class0/003.png", "val/class0/003.png")
    words = [*PROGRAMS[program], "--data", "data", "--max-bad-share", 0.2]
    done = run(*words, "--output", "out", cwd=tmp_path)
    listed = (tmp_path / "out" / "bad_files.txt").read_text().splitlines()
    assert listed == ["class0/003.png\tnot an image", "val/class0/003.png\tnot an image"]
    assert "warning: unreadable, left out: val/class0/003.png (not an image)" in done.stderr
    for name in ("000", "001"):
        (tmp_path / "data" / "val" / "class0" / f"{name}.png").write_bytes(b"")
    error = run(*words, "--output", "again", cwd=tmp_path, status=2).stderr
    assert "3 of 12 files cannot be read, more than --max-bad-share 0.2" in error.splitlines()[-1]
    assert (
        len((tmp_path / "again" / "bad_files.txt").read_text().splitlines()) == 4
    )  # they are listed before that ends the run


@pytest.mark.parametrize("program", slow(PROGRAMS, fast=["train.py", "knn"]))
def test_a_held_out_part_without_a_readable_image_is_an_error(tmp_path, program):
    spoiled(tmp_path / "data", *(f"val/class{c}/{k:03}.png" for c in range(2) for k in range(6)))
    error = run(
        *PROGRAMS[program], "--data", "data", "--max-bad-share", 1, "--output", "out", cwd=tmp_path, status=2
    ).stderr
    last = error.splitlines()[-1]
    assert ("none of the" in last or "no image of class0, class1 can be read" in last) and "Traceback" not in error


@pytest.mark.parametrize(
    "part, program",
    slow(
        [(part, program) for part in ("train", "val") for program in list(PROGRAMS)[1:]],
        fast=[("train", "knn"), ("val", "finetune.py")],
    ),
)
def test_a_class_without_a_readable_image_is_an_error(tmp_path, program, part):
    spoiled(tmp_path / "data", *(f"{part}/class1/{k:03}.png" for k in range(12 if part == "train" else 6)))
    error = run(
        *PROGRAMS[program], "--data", "data", "--max-bad-share", 1, "--output", "out", cwd=tmp_path, status=2
    ).stderr
    assert "no image of class1 can be read" in error.splitlines()[-1] and "Traceback" not in error


def test_the_limit_of_pixels_is_a_flag_that_reaches_the_workers(tmp_path):
    Image.new("RGB", (400, 300)).save(spoiled(tmp_path / "data") / "train" / "class0" / "000.png")
    words = [
        "train.py",
        *SMALL[:-1],
        2,
        "--recipe",
        "cifar",
        "--batch-size",
        8,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--data",
        "data",
        "--max-bad-share",
        0.5,
    ]
    assert "unreadable" not in run(*words, "--output", "a", cwd=tmp_path).stderr
    assert (
        "400 x 300 pixels, more than 0.1 million"
        in run(*words, "--output", "b", "--max-megapixels", 0.1, cwd=tmp_path).stderr
    )


def test_a_warm_up_as_long_as_the_run_and_small_images_are_warned_of(tmp_path):
    make_images(tmp_path / "data")
    words = ["train.py", "--data", "data", *SMALL, "--recipe", "cifar", "--batch-size", 8, "--max-steps", 1]
    error = run(*words, "--epochs", 2, "--warmup-epochs", 2, "--output", "a", cwd=tmp_path).stderr
    assert (
        "warning: a warm-up of 2 epochs in a run of 2: the learning rate never reaches its peak" in error
        and "shorter side" not in error
    )
    error = run(*words, "--epochs", 2, "--warmup-epochs", 1, "--image-size", 48, "--output", "b", cwd=tmp_path).stderr
    assert (
        "warning: the shorter side of the images is 16 pixels, less than half of the input's 48" in error
        and "see --recipe" in error
        and "warm-up" not in error
    )
