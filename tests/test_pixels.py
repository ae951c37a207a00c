"""decoding.py, formats.py: every kind of file becomes the numbers that numpy makes of it; ranges, means, channels;
what cannot be read is one line.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import ROOT, make_images
from PIL import Image

from engine.errors import DataError
from images import decode, folders, open_train_and_val
from images.cache import cache_key, open_cached
from images.decode import open_file
from images.formats import MEAN, PixelFormat, measure_format
from images.sources import FileImages, load_into_memory

RNG = np.random.default_rng(0)
SMOOTH = np.linspace(0, 1, 20 * 24).reshape(20, 24)
DEEP = np.rint(4095 * SMOOTH).astype(np.uint16)  # 12 bits in 16
COLOUR16 = np.stack([DEEP, DEEP[::-1] // 2, DEEP.T.reshape(20, 24) // 3], axis=-1)
COLOUR8 = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
GREY8 = COLOUR8[..., 0]
BANDS = RNG.normal(size=(20, 24, 5)).astype(np.float32) * [1, 10, 100, 0.1, 3]
STACK = RNG.integers(100, 60000, (6, 20, 24)).astype(np.uint16)


def png16(path, values):
    """A PNG of 16 bits a channel, which Pillow does not write in colour."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[-1]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    )


def saved(values, **more):
    return lambda path: Image.fromarray(values).save(path, **more)


def tiff(values, **more):
    return lambda path: tifffile.imwrite(path, values, **more)


def luma(colour):
    return np.asarray(Image.fromarray(colour).convert("L"))[..., None]


def stretched(values):
    """What auto makes of a folder of this one file: lowest to highest value of each channel as 0 to 255."""
    values = values.reshape(*values.shape[:2], -1).astype(np.float64)
    low, high = values.min((0, 1)), values.max((0, 1))
    return (values - low) / (high - low) * 255


def decoded(image):
    """What Pillow shows of a file that loses something when it is written."""
    return lambda path: np.asarray(Image.open(path).convert(image))


GREY = dict(photometric="minisblack")
# as docs/data.md has them: (file, how it is written, --channels, --pages, the image that is looked at, what it must be)
KINDS = {
    "JPEG, 8 bits, colour": ("a.jpg", saved(COLOUR8), 3, "channels", "a.jpg", decoded("RGB")),
    "JPEG, 8 bits, colour, by luma": (
        "a.jpg",
        saved(COLOUR8),
        1,
        "channels",
        "a.jpg",
        lambda path: luma(np.asarray(Image.open(path))),
    ),
    "JPEG, 8 bits, grey, repeated": ("a.jpg", saved(GREY8), 3, "channels", "a.jpg", decoded("RGB")),
    "JPEG, CMYK": (
        "a.jpg",
        lambda path: Image.fromarray(COLOUR8).convert("CMYK").save(path),
        3,
        "channels",
        "a.jpg",
        decoded("RGB"),
    ),
    "PNG, 8 bits, grey": ("a.png", saved(GREY8), 1, "channels", "a.png", GREY8),
    "PNG, 1 bit": ("a.png", saved(GREY8 > 99), 1, "channels", "a.png", 255 * (GREY8 > 99)),
    "PNG, palette": (
        "a.png",
        lambda path: Image.fromarray(COLOUR8).quantize(8).save(path),
        3,
        "channels",
        "a.png",
        decoded("RGB"),
    ),
    "PNG, 8 bits, transparent": (
        "a.png",
        saved(np.dstack([COLOUR8, 255 * (GREY8 > 99)]).astype(np.uint8)),
        3,
        "channels",
        "a.png",
        np.where((GREY8 > 99)[..., None], COLOUR8, 255),
    ),
    "PNG, 8 bits, four channels": (
        "a.png",
        saved(np.dstack([COLOUR8, GREY8])),
        4,
        "channels",
        "a.png",
        np.dstack([COLOUR8, GREY8]),
    ),
    "PNG, 16 bits, grey": ("a.png", saved(DEEP), 1, "channels", "a.png", stretched(DEEP)),
    "PNG, 16 bits, grey, repeated": ("a.png", saved(DEEP), 3, "channels", "a.png", stretched(DEEP).repeat(3, -1)),
    "PNG, 16 bits, colour": ("a.png", lambda path: png16(path, COLOUR16), 3, "channels", "a.png", stretched(COLOUR16)),
    "PNG, 16 bits, colour, by luma": (
        "a.png",
        lambda path: png16(path, COLOUR16),
        1,
        "channels",
        "a.png",
        stretched(COLOUR16 @ [0.299, 0.587, 0.114]),
    ),
    "PNG, 16 bits, transparent": (
        "a.png",
        lambda path: png16(path, np.dstack([DEEP, 65535 * (GREY8 > 99)])),
        1,
        "channels",
        "a.png",
        stretched(np.where(GREY8 > 99, DEEP, 65535)),
    ),
    "PNG, 16 bits, four channels": (
        "a.png",
        lambda path: png16(path, np.dstack([COLOUR16, DEEP])),
        4,
        "channels",
        "a.png",
        stretched(np.dstack([COLOUR16, DEEP])),
    ),
    "TIFF, 8 bits, transparent": (
        "a.tif",
        tiff(np.dstack([COLOUR8, 255 * (GREY8 > 99)]).astype(np.uint8), photometric="rgb", extrasamples=["unassalpha"]),
        3,
        "channels",
        "a.tif",
        np.where((GREY8 > 99)[..., None], COLOUR8, 255),
    ),
    "GIF, animated": (
        "a.gif",
        lambda path: Image.fromarray(GREY8).save(path, save_all=True, append_images=[Image.fromarray(255 - GREY8)]),
        1,
        "channels",
        "a.gif",
        GREY8,
    ),
    "WebP": ("a.webp", saved(COLOUR8, lossless=True), 3, "channels", "a.webp", COLOUR8),
    "BMP": ("a.bmp", saved(COLOUR8), 3, "channels", "a.bmp", COLOUR8),
    "PGM, 16 bits": ("a.pgm", saved(DEEP), 1, "channels", "a.pgm", stretched(DEEP)),
    "PPM, 16 bits, colour": (
        "a.ppm",
        lambda path: path.write_bytes(b"P6 24 20 65535\n" + COLOUR16.astype(">u2").tobytes()),
        3,
        "channels",
        "a.ppm",
        stretched(COLOUR16),
    ),
    "JPEG 2000, 16 bits, grey": ("a.jp2", saved(DEEP, irreversible=False), 1, "channels", "a.jp2", stretched(DEEP)),
    "TIFF, 8 bits, colour": ("a.tif", saved(COLOUR8), 3, "channels", "a.tif", COLOUR8),
    "TIFF, 8 bits, pages in colour": (
        "a.tif",
        tiff(np.stack([COLOUR8, 255 - COLOUR8]), photometric="rgb"),
        3,
        "channels",
        "a.tif",
        COLOUR8,
    ),
    "TIFF, 8 bits, pages in colour as images": (
        "a.tif",
        tiff(np.stack([COLOUR8, 255 - COLOUR8]), photometric="rgb"),
        3,
        "images",
        "a.tif#1",
        255 - COLOUR8,
    ),
    "TIFF, 8 bits, four bands": (
        "a.tif",
        tiff(np.dstack([COLOUR8, GREY8]), photometric="rgb", extrasamples=["unspecified"]),
        4,
        "channels",
        "a.tif",
        np.dstack([COLOUR8, GREY8]),
    ),
    "TIFF, 16 bits, grey": ("a.tif", tiff(GREY8.astype(np.uint16)), 1, "channels", "a.tif", stretched(GREY8)),
    "TIFF, 16 bits, colour": ("a.tif", tiff(COLOUR16, photometric="rgb"), 3, "channels", "a.tif", stretched(COLOUR16)),
    "TIFF, 16 bits, signed": ("a.tif", tiff(DEEP.astype(np.int16) - 2000), 1, "channels", "a.tif", stretched(DEEP)),
    "TIFF, 16 bits, grey, LZW": ("a.tif", saved(DEEP, compression="tiff_lzw"), 1, "channels", "a.tif", stretched(DEEP)),
    "TIFF, 32 bits, unsigned": (
        "a.tif",
        tiff(DEEP.astype(np.uint32) * 1_000_000),
        1,
        "channels",
        "a.tif",
        stretched(DEEP),
    ),
    "TIFF, half precision": (
        "a.tif",
        tiff(SMOOTH.astype(np.float16)),
        1,
        "channels",
        "a.tif",
        stretched(SMOOTH.astype(np.float16)),
    ),
    "TIFF, float": (
        "a.tif",
        tiff(SMOOTH.astype(np.float32)),
        1,
        "channels",
        "a.tif",
        stretched(SMOOTH.astype(np.float32)),
    ),
    "TIFF, double precision": ("a.tif", tiff(SMOOTH), 1, "channels", "a.tif", stretched(SMOOTH)),
    "TIFF, float, five bands in planes": (
        "a.tif",
        tiff(BANDS.transpose(2, 0, 1), planarconfig="separate", **GREY),
        5,
        "channels",
        "a.tif",
        stretched(BANDS),
    ),
    "TIFF, float, five bands pixel by pixel": (
        "a.tif",
        tiff(BANDS, planarconfig="contig", **GREY),
        5,
        "channels",
        "a.tif",
        stretched(BANDS),
    ),
    "TIFF, pages as channels": (
        "a.tif",
        tiff(STACK, **GREY),
        6,
        "channels",
        "a.tif",
        stretched(STACK.transpose(1, 2, 0)),
    ),
    "TIFF, pages as images": (
        "a.tif",
        tiff(STACK, **GREY),
        1,
        "images",
        "a.tif#4",
        (STACK[4] - 1.0 * STACK.min()) / np.ptp(STACK) * 255,
    ),
    "TIFF, ImageJ's channels and slices": (
        "a.tif",
        tiff(STACK.reshape(3, 2, 20, 24), imagej=True, metadata={"axes": "ZCYX"}),
        2,
        "images",
        "a.tif#1",
        [(STACK[2 + k] - 1.0 * STACK[k::2].min()) / np.ptp(STACK[k::2]) * 255 for k in range(2)],
    ),
    ".npy, (h, w)": ("a.npy", lambda path: np.save(path, SMOOTH), 1, "channels", "a.npy", stretched(SMOOTH)),
    ".npy, (h, w, c)": ("a.npy", lambda path: np.save(path, BANDS), 5, "channels", "a.npy", stretched(BANDS)),
    ".npy, (c, h, w)": (
        "a.npy",
        lambda path: np.save(path, BANDS.transpose(2, 0, 1)),
        5,
        "channels",
        "a.npy",
        stretched(BANDS),
    ),
    ".npy, (n, h, w) as images": (
        "a.npy",
        lambda path: np.save(path, STACK),
        1,
        "images",
        "a.npy#5",
        (STACK[5] - 1.0 * STACK.min()) / np.ptp(STACK) * 255,
    ),
    ".npy, true and false": (
        "a.npy",
        lambda path: np.save(path, GREY8 > 99),
        1,
        "channels",
        "a.npy",
        255 * (GREY8 > 99),
    ),
    ".npy, 8 bits": ("a.npy", lambda path: np.save(path, COLOUR8), 3, "channels", "a.npy", COLOUR8),
    ".npz, one array": (
        "a.npz",
        lambda path: np.savez_compressed(path, x=BANDS),
        5,
        "channels",
        "a.npz",
        stretched(BANDS),
    ),
}


def one(folder, name, write, channels, pages, value_range="auto"):
    """A folder's only file as a source, with the format that is found for it."""
    write(folder / name)
    asked = PixelFormat(channels, pages, value_range)
    source = FileImages(folder, decode.expand_pages(folder, [name], asked), None, [], form=asked)
    source.form, lines = measure_format(source, asked)
    return source, lines


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_what_numpy_makes_of_it(tmp_path, kind):
    name, write, channels, pages, looked_at, expected = KINDS[kind]
    source, lines = one(tmp_path, name, write, channels, pages)
    found = source.decode(list(source.names).index(looked_at))
    if callable(expected):
        expected = expected(tmp_path / name)
    expected = np.stack(expected, -1) if isinstance(expected, list) else np.asarray(expected, float).reshape(20, 24, -1)
    assert found.shape == (20, 24, channels) == expected.shape and found.dtype == (
        np.float32 if source.form.is_float else np.uint8
    )
    assert np.abs(found - expected).max() < (1e-2 if source.form.is_float else 0.5), kind
    assert source.open(0).sides == (20, 24) and bool(lines) == (not source.form.is_rgb8)


def with_exif(values, orientation, **more):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda path: Image.fromarray(values).save(path, exif=exif, **more)


def png16_with_exif(values, orientation):
    """Pillow writes no colour of 16 bits; the chunk goes before the pixels."""

    def write(path):
        png16(path, values)
        data, exif = path.read_bytes(), Image.Exif()
        exif[0x0112] = orientation
        chunk = exif.tobytes().removeprefix(b"Exif\0\0")
        place = data.index(b"IDAT") - 4
        path.write_bytes(
            data[:place]
            + struct.pack(">I", len(chunk))
            + b"eXIf"
            + chunk
            + struct.pack(">I", zlib.crc32(b"eXIf" + chunk))
            + data[place:]
        )

    return write


TURNED = {  # (file, how it is written with an orientation, --channels, its values as they are stored)
    "PNG, 8 bits, colour": ("a.png", lambda turn: with_exif(COLOUR8, turn), 3, COLOUR8),
    "PNG, 8 bits, grey": ("a.png", lambda turn: with_exif(GREY8, turn), 1, GREY8),
    "PNG, 8 bits, four channels": (
        "a.png",
        lambda turn: with_exif(np.dstack([COLOUR8, GREY8]), turn),
        4,
        np.dstack([COLOUR8, GREY8]),
    ),
    "PNG, 16 bits, grey": ("a.png", lambda turn: with_exif(DEEP, turn), 1, DEEP),
    "PNG, 16 bits, colour": ("a.png", lambda turn: png16_with_exif(COLOUR16, turn), 3, COLOUR16),
    **{
        f"TIFF, {name}": (
            "a.tif",
            lambda turn, values=values, more=more: tiff(values, extratags=[(274, "H", 1, turn, True)], **more),
            channels,
            values,
        )
        for name, values, channels, more in (
            ("8 bits, colour", COLOUR8, 3, dict(photometric="rgb")),
            ("8 bits, grey", GREY8, 1, dict(photometric="minisblack")),
            ("16 bits, colour", COLOUR16, 3, dict(photometric="rgb")),
            ("16 bits, grey", DEEP, 1, dict(photometric="minisblack")),
            ("float", SMOOTH.astype(np.float32), 1, dict(photometric="minisblack")),
            ("pages as channels", STACK.transpose(1, 2, 0), 6, dict(photometric="minisblack", planarconfig="contig")),
        )
    },
}


@pytest.mark.parametrize("kind", TURNED)
def test_images_of_every_depth_are_turned_and_so_are_their_sides(tmp_path, kind):
    """All eight orientations of EXIF and TIFF, by what the standard says of each: where the first row and column of
    the file belong.
    """
    name, write, channels, stored = TURNED[kind]
    stored = stored.reshape(20, 24, -1).astype(float)
    flip = lambda values, axis: np.flip(values, axis)
    turned = {1: stored, 2: flip(stored, 1), 3: flip(flip(stored, 0), 1), 4: flip(stored, 0)}
    turned |= {
        turn: upright.transpose(1, 0, 2)
        for turn, upright in ((5, stored), (6, flip(stored, 0)), (7, flip(flip(stored, 0), 1)), (8, flip(stored, 1)))
    }
    for turn, expected in turned.items():
        source, _ = one(tmp_path, name, write(turn), channels, "channels")
        found = source.decode(0)
        assert source.open(0).sides == found.shape[:2] == expected.shape[:2], turn
        expected = stretched(expected) if source.form.is_float else expected
        assert np.abs(found - expected).max() < (1e-2 if source.form.is_float else 0.5), turn


@pytest.mark.parametrize("values, magic", [(DEEP, b"P2"), (COLOUR16, b"P3")])
def test_plain_text_is_read_as_numbers(tmp_path, values, magic):
    """PGM and PPM whose values stand in the file as text, with a comment between them."""
    text = (
        b" ".join(str(value).encode() for value in values.ravel()[:100])
        + b"\n# the rest\n"
        + b"\n".join(str(value).encode() for value in values.ravel()[100:])
    )
    source, _ = one(
        tmp_path,
        "a.ppm" if magic == b"P3" else "a.pgm",
        lambda path: path.write_bytes(magic + b"\n24 20\n4095\n" + text),
        values.shape[-1] if magic == b"P3" else 1,
        "channels",
        (0, 4095),
    )
    assert np.abs(source.decode(0) / 255 - values.reshape(20, 24, -1) / 4095).max() < 1e-6


def test_the_table_of_kinds_in_the_docs_is_that_of_the_test():
    rows = [
        line.split("|")[1].strip()
        for line in (ROOT / "docs" / "data.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    assert set(KINDS) <= set(rows) and len(KINDS) >= 25


REFUSED = {
    "channels that do not fit": (
        "a.tif",
        tiff(BANDS.transpose(2, 0, 1), planarconfig="separate", **GREY),
        3,
        "channels",
        "5 channels, where --channels is 3",
    ),
    "colour for five": ("a.png", saved(COLOUR8), 5, "channels", "3 channels, where --channels is 5"),
    "pages that do not fit": (
        "a.tif",
        tiff(STACK, **GREY),
        1,
        "channels",
        "6 pages taken as channels, where --channels is 1; --pages images takes",
    ),
    "8-bit bands beside the colours": (
        "a.tif",
        tiff(np.dstack([COLOUR8, GREY8]), photometric="rgb", extrasamples=["unspecified"]),
        1,
        "channels",
        "4 channels, where --channels is 1",
    ),
    "two 8-bit bands": (
        "a.tif",
        tiff(COLOUR8[..., :2], photometric="minisblack", planarconfig="contig"),
        1,
        "channels",
        "2 channels, where --channels is 1",
    ),
    "pages of channels": (
        "a.tif",
        tiff(STACK.reshape(3, 2, 20, 24), imagej=True, metadata={"axes": "ZCYX"}),
        2,
        "channels",
        "3 pages of several channels each; --pages images",
    ),
    "two arrays": (
        "a.npz",
        lambda path: np.savez(path, a=SMOOTH, b=SMOOTH),
        1,
        "channels",
        r"2 arrays \(a, b\), where one is expected",
    ),
    "pickled objects": (
        "a.npy",
        lambda path: np.save(path, np.array([{}] * 9), allow_pickle=True),
        1,
        "channels",
        "unreadable: .*Python objects",
    ),
    "complex numbers": (
        "a.npy",
        lambda path: np.save(path, SMOOTH * 1j),
        1,
        "channels",
        "values of type complex128, which are no real numbers",
    ),
    "five axes": ("a.npy", lambda path: np.save(path, np.zeros((2, 2, 2, 9, 9))), 1, "channels", "an array of 5 axes"),
    "a stack without --pages": (
        "a.npy",
        lambda path: np.save(path, np.zeros((2, 1, 9, 9))),
        1,
        "channels",
        "--pages images takes the first axis",
    ),
    "a text": ("a.npy", lambda path: path.write_text("no array"), 1, "channels", "unreadable"),
    "an empty file": ("a.tif", lambda path: path.write_text(""), 1, "channels", "an empty file"),
    "a cut file": (
        "a.tif",
        lambda path: (tifffile.imwrite(path, STACK[0]), path.write_bytes(path.read_bytes()[:300])),
        1,
        "channels",
        "unreadable",
    ),
    "no number at all": (
        "a.npy",
        lambda path: np.save(path, SMOOTH * np.nan),
        1,
        "channels",
        "a channel without a number in it",
    ),
    "a thin array": (
        "a.npy",
        lambda path: np.save(path, np.zeros((4, 90))),
        1,
        "channels",
        "90 x 4 pixels, a side under 8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, what):
    name, write, channels, pages, message = REFUSED[what]
    with pytest.raises(DataError, match=message) as raised:
        one(tmp_path, name, write, channels, pages)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_ranges(tmp_path):
    """Auto over several files, numbers, each image's percentiles; no-data values; what lies outside."""
    files = [DEEP, DEEP // 2 + 100, np.where(DEEP == 0, np.nan, DEEP.astype(np.float32))]
    for k, values in enumerate(files):
        np.save(tmp_path / f"{k}.npy", values)
    names = [f"{k}.npy" for k in range(3)]

    def source(value_range):
        images = FileImages(tmp_path, names, None, [], form=PixelFormat(1, "channels", value_range))
        images.form, lines = measure_format(images, images.form)
        return images, lines

    auto, lines = source("auto")
    assert (auto.form.low, auto.form.high, auto.form.is_float) == (
        (0.0,),
        (4095.0,),
        True,
    ) and "values 0 to 4095 (measured on 3 of 3 images)" in lines[0]
    shares = np.stack([auto.decode(k)[..., 0] / 255 for k in range(3)])
    assert shares[2].flat[0] == 0 and np.isfinite(shares).all() and np.abs(shares[0] - DEEP / 4095).max() < 1e-6
    assert np.allclose([auto.form.mean[0], auto.form.std[0]], [shares.mean(), shares.std()], rtol=1e-4)
    fixed, _ = source((1000, 2000))
    assert np.abs(fixed.decode(0)[..., 0] / 255 - ((DEEP - 1000.0) / 1000).clip(0, 1)).max() < 1e-6
    own, lines = source("p1,p99")
    for k in range(2):
        low, high = np.percentile(files[k], (1, 99))
        assert np.abs(own.decode(k)[..., 0] / 255 - ((files[k] - low) / (high - low)).clip(0, 1)).max() < 1e-5
    assert "each image's own 1 to 99 %" in lines[0] and abs(own.form.mean[0] - 0.5) < 0.02
    np.save(tmp_path / "3.npy", np.where(DEEP < 40, -99999.0, DEEP))  # a value for no data
    names.append("3.npy")
    assert "warning: 99 % of the values of channel 1 lie between" in source("auto")[1][1]


def test_eight_bit_colour_is_left_as_it_was_and_a_deep_file_among_it_is_not_guessed(tmp_path):
    make_images(tmp_path)
    train, held, lines = open_train_and_val(str(tmp_path), form=PixelFormat(value_range="auto"), measured=False)
    assert train.form.is_rgb8 and train.form.mean == MEAN and len(lines) == 1
    before = open_train_and_val(str(tmp_path))[0]
    assert all(
        np.array_equal(train.decode(k), before.decode(k)) and train.decode(k).dtype == np.uint8
        for k in range(len(train))
    )
    tifffile.imwrite(
        tmp_path / "late.tif", np.dstack([COLOUR8, GREY8]), photometric="rgb", extrasamples=["unspecified"]
    )
    with pytest.raises(DataError, match="4 channels, where --channels is 3"):  # nothing is dropped unsaid
        FileImages(tmp_path, ["late.tif"], None, [], form=train.form).decode(0)
    tifffile.imwrite(tmp_path / "late.tif", DEEP)
    with pytest.raises(DataError, match="uint16 values, whose range is unknown.* give --value-range LOW HIGH"):
        FileImages(tmp_path, ["late.tif"], None, [], form=train.form).decode(0)
    mixed = FileImages(tmp_path, [*train.names, "late.tif"], None, [])
    form, lines = measure_format(mixed, PixelFormat(value_range="auto"))
    mixed.form = form
    assert form.is_float and "of 8-bit files 0 to 255" in lines[0]
    assert np.array_equal(mixed.decode(0), train.decode(0).astype(np.float32)) and mixed.decode(len(train)).max() == 255


def test_pages_are_held_out_by_file_or_with_a_warning(tmp_path):
    (tmp_path / "few").mkdir()
    tifffile.imwrite(tmp_path / "few" / "a.tif", np.tile(STACK, (4, 1, 1)), **GREY)
    form = PixelFormat(1, "images", "auto")
    train, held, lines = folders.train_and_val(tmp_path / "few", pixel_format=form)
    assert (len(train), len(held)) == (23, 1) and any(
        "pages of stacks of which others are trained on" in line for line in lines
    )
    (tmp_path / "many").mkdir()
    for k in range(40):
        tifffile.imwrite(tmp_path / "many" / f"{k:02}.tif", STACK, **GREY)
    train, held, lines = folders.train_and_val(tmp_path / "many", pixel_format=form)
    assert (
        (len(train), len(held)) == (228, 12)
        and len({decode.file_name(name) for name in held.names}) == 2
        and len(lines) == 1
    )


def test_arrays_are_images_only_where_there_are_no_others(tmp_path):
    make_images(tmp_path)
    np.save(tmp_path / "class0" / "features.npy", SMOOTH)
    tree = folders.ImageTree(tmp_path)
    assert len(tree.paths) == 24 and any("not read: 1 .npy" in line for line in tree.warnings)
    (tmp_path / "only").mkdir()
    np.save(tmp_path / "only" / "a.npy", SMOOTH)
    assert folders.ImageTree(tmp_path / "only").paths == ["a.npy"]


@pytest.mark.parametrize("channels, pages", [(1, "images"), (6, "channels")])
def test_cache_and_memory_hold_the_same_numbers(tmp_path, channels, pages):
    (tmp_path / "data").mkdir()
    for k in range(3):
        tifffile.imwrite(tmp_path / "data" / f"{k}.tif", np.roll(STACK, k, axis=0), **GREY)
    asked = PixelFormat(channels, pages, "auto")
    names = decode.expand_pages(tmp_path / "data", [f"{k}.tif" for k in range(3)], asked)
    files = FileImages(tmp_path / "data", names, None, [], form=asked)
    files.form, _ = measure_format(files, asked)
    held, memory = open_cached(files, tmp_path / "cache", (16, 24)), load_into_memory(files)
    draws = np.linspace(0.1, 0.8, 22)
    for k in (0, len(files) - 1):
        assert np.array_equal(held.decode(k), files.decode(k)) and torch.equal(
            memory.pixels[k], decode.to_chw(files.decode(k))
        )
        crops = [source.crop(k, draws, (16, 24), (0.3, 0.9), (0.75, 1.33)) for source in (files, held, memory)]
        assert (
            crops[0].shape == (channels, 16, 24) and torch.equal(crops[0], crops[1]) and torch.equal(crops[0], crops[2])
        )
        centres = [source.center_crop(k, (16, 24)) for source in (files, held)]
        assert (
            torch.equal(*centres)
            and centres[0].shape == (channels, 16, 24)
            and 0 <= centres[0].min()
            and centres[0].max() <= 255
        )
    other = FileImages(tmp_path / "data", names, None, [], form=PixelFormat(channels, pages, (0, 60000), is_float=True))
    assert open_cached(other, tmp_path / "cache", (16, 24)).path != held.path


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_oblong_crops_are_cut_in_the_input_s_form(tmp_path, size):
    """A crop's ratio is spread around the input's, so that it is stretched no more than a square's is; centres are
    the largest such part.
    """
    values = np.stack(np.broadcast_arrays(*np.meshgrid(np.arange(90), np.arange(60), indexing="ij"), 0.0), axis=-1)
    np.save(tmp_path / "a.npy", values)
    source = FileImages(tmp_path, ["a.npy"], None, [], form=PixelFormat(3, "channels", (0, 255), is_float=True))
    for seed in range(20):
        draws = np.random.default_rng(seed).random(22)
        crop = source.crop(0, draws, size, (0.3, 0.9), (3 / 4, 4 / 3))
        down, across = (float(crop[k].max() - crop[k].min()) / side for k, side in enumerate(size))
        assert 0.7 < across / down < 1.4
    middle = source.center_crop(0, size, crop_pct=1.0)
    spans = [float(middle[k].max() - middle[k].min()) for k in range(2)]
    assert abs(spans[0] / spans[1] / (size[0] / size[1]) - 1) < 0.1 and max(spans[0] / 90, spans[1] / 60) > 0.9


def test_a_page_is_opened_by_its_name(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, **GREY)
    form = PixelFormat(1, "images", (0, 65535), is_float=True)
    assert np.allclose(open_file(tmp_path / "a.tif#2", form).array()[..., 0], STACK[2] / 257, atol=1e-3)


def test_caches_of_earlier_commits_keep_their_names():
    """The hash of a format that is not 8-bit colour has the name "deep" for `is_float`."""
    names, form = ["a.tif", "b.tif"], PixelFormat(1, "channels", (0, 9), (0.0,), (9.0,), True, (0.5,), (0.25,))
    assert cache_key(FileImages(Path("/data"), names, None, [], form=form), 256) == "fb720d91ff58ec6a"
    assert cache_key(FileImages(Path("/data"), names, None, []), 256) == "6b3f3d5aed8db903"
