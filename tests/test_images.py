"""Opening, colour, orientation, views."""

from __future__ import annotations

import gc
import hashlib
import http.server
import importlib.util
import io
import os
import struct
import subprocess
import sys
import threading
import types
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from mlxvlm.config import TilingConfig
from mlxvlm.errors import ConfigError, PictureError
from mlxvlm.images import colour, preprocess
from mlxvlm.images import open as opening
from mlxvlm.images.colour import to_rgb, to_uint8
from mlxvlm.images.fetch import fetch
from mlxvlm.images.open import MAX_PIXELS, open_picture, sha256_file
from mlxvlm.images.tiling import look, tile

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_preprocess", GOLDEN / "make_preprocess.py")
assert spec is not None and spec.loader is not None
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels_of(source, **kwargs) -> np.ndarray:
    image, digest = open_picture(source, **kwargs)
    assert image.mode == "RGB" and len(digest) == 64
    return np.asarray(image)


def png(image: Image.Image, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **kwargs)
    return file.getvalue()


def grey(values: list[int]) -> list[tuple[int, int, int]]:
    return [(v, v, v) for v in values]


def row(image: Image.Image | np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(v) for v in pixel) for pixel in np.asarray(image)[0]]


def strip(mode: str, values: list) -> Image.Image:
    """An image one pixel high."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def raw_tiff(
    values: bytes, size: tuple[int, int], bits: int, photometric: int = 1, sample_format: int = 1
) -> bytes:
    """A little-endian TIFF with one uncompressed strip of one channel."""
    entries = [
        (256, 3, size[0]),
        (257, 3, size[1]),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, size[1]),
        (279, 4, len(values)),
        (339, 3, sample_format),
    ]
    ifd = struct.pack("<H", len(entries))
    ifd += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + ifd + b"\0\0\0\0"


def raw_png(kind: int, bits: int, line: bytes, width: int, clear: bytes) -> bytes:
    """A PNG one pixel high, with a tRNS chunk, in types that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">2I5B", width, 1, bits, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + line)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts) + chunk(b"IEND", b"")


# Colour


def palette_image(values: list[int], alpha: bytes | int | None = None) -> bytes:
    image = strip("P", values)
    image.putpalette([*RED, *GREEN, *BLUE])
    return png(image) if alpha is None else png(image, transparency=alpha)


HALF = (127, 127, 255)  # blue at half over white

COLOURS = {
    "RGB": (png(strip("RGB", [RED, GREEN, BLUE])), [RED, GREEN, BLUE]),
    "grey": (png(strip("L", [0, 7, 255])), grey([0, 7, 255])),
    "1-bit": (png(strip("1", [0, 255, 0])), grey([0, 255, 0])),
    "grey with alpha": (png(strip("LA", [(0, 255), (0, 0), (0, 51)])), grey([0, 255, 204])),
    "RGBA": (
        png(strip("RGBA", [(*RED, 255), (*GREEN, 0), (*BLUE, 128)])),
        [RED, (255, 255, 255), HALF],
    ),
    "palette": (palette_image([0, 1, 2]), [RED, GREEN, BLUE]),
    "palette, one clear index": (palette_image([0, 1, 2], 1), [RED, (255, 255, 255), BLUE]),
    "palette, alpha table": (
        palette_image([0, 1, 2], bytes([255, 0, 128])),
        [RED, (255, 255, 255), HALF],
    ),
    "tRNS grey": (png(strip("L", [0, 7, 255]), transparency=7), grey([0, 255, 255])),
    "tRNS RGB": (
        png(strip("RGB", [RED, GREEN, BLUE]), transparency=GREEN),
        [RED, (255, 255, 255), BLUE],
    ),
    "tRNS 1-bit": (png(strip("1", [0, 255, 0]), transparency=0), grey([255, 255, 255])),
    "tRNS 16-bit grey": (
        png(Image.fromarray(np.array([[0, 257, 65535, 2570]], np.uint16)), transparency=2570),
        grey([0, 1, 255, 255]),
    ),
    "16-bit PNG": (
        png(Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))),
        grey([0, 1, 128, 255]),
    ),
    "12-bit TIFF": (
        raw_tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), (4, 1), 12),
        grey([0, 128, 255, 0]),
    ),
    "16-bit TIFF, white is zero": (
        raw_tiff(struct.pack("<3H", 0, 257, 65535), (3, 1), 16, photometric=0),
        grey([255, 254, 0]),
    ),
    "16-bit signed TIFF": (
        raw_tiff(struct.pack("<3h", -1000, 0, 1000), (3, 1), 16, sample_format=2),
        grey([0, 128, 255]),
    ),
    "tRNS 16-bit RGB": (
        raw_png(
            2, 16, struct.pack(">6H", 9000, 0, 0, 65535, 0, 0), 2, struct.pack(">3H", 9000, 0, 0)
        ),
        [(255, 255, 255), RED],
    ),
    "16-bit PGM, dark": (b"P5 2 1 65535\n" + struct.pack(">2H", 100, 200), grey([0, 1])),
    "16-bit PGM": (b"P5 2 1 65535\n" + struct.pack(">2H", 100, 65535), grey([0, 255])),
    "10-bit PGM": (b"P5 2 1 1023\n" + struct.pack(">2H", 512, 1023), grey([128, 255])),
    "float TIFF": (
        raw_tiff(struct.pack("<3f", 0, 0.5, 1), (3, 1), 32, sample_format=3),
        grey([0, 128, 255]),
    ),
    "float TIFF, any range": (
        raw_tiff(struct.pack("<3f", -40, 0, 60.5), (3, 1), 32, sample_format=3),
        grey([0, 101, 255]),
    ),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colour(name: str) -> None:
    data, expected = COLOURS[name]
    assert row(pixels_of(data)) == expected


def test_colour_of_pil_images() -> None:
    table = {
        "CMYK": ([(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)], [255, 0, 0]),
        "YCbCr": ([(255, 128, 128), (76, 85, 255), (0, 128, 128)], [255, 254, 0]),
        "HSV": ([(0, 0, 255), (0, 255, 255), (0, 0, 0)], [255, 255, 0]),
        "LAB": ([(255, 128, 128), (138, 209, 198), (0, 128, 128)], [255, 254, 0]),
        "RGBX": ([(255, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 0)], [255, 255, 0]),
        "RGBa": ([(0, 0, 0, 0), (128, 0, 0, 128), (0, 0, 0, 255)], [255, 255, 0]),
        "La": ([(0, 0), (0, 0), (0, 255)], [255, 255, 0]),
        "I": ([70000, 35000, 0], [255, 128, 0]),
        "F": ([1.0, 0.2, 0.0], [255, 51, 0]),
    }
    for mode, (values, expected) in table.items():
        picture = pixels_of(strip(mode, values))
        found = [int(v) for v in picture[0, :, 0]]
        if mode == "CMYK":
            assert row(picture) == [(255, 255, 255), RED, (0, 0, 0)]
        else:
            room = 4 if mode == "LAB" else 1  # 8-bit LAB is coarse
            assert np.abs(np.subtract(found, expected)).max() <= room, (mode, found)


def test_16_bit_ramp_stays_a_ramp(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 65536, 64, dtype=np.uint16), (4, 1))
    exact = np.round(ramp / 257)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        pixels = pixels_of(tmp_path / name)
        assert (pixels == exact[:, :, None]).all()
    assert pixels.min() == 0 and pixels.max() == 255 and (np.diff(pixels[0, :, 0]) >= 0).all()
    assert (pixels_of(Image.fromarray(ramp.astype(">u2"))) == pixels).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 255], np.uint8), [0, 255]),
        (np.array([False, True]), [0, 255]),
        (np.array([0, 100, 65535], np.uint16), [0, 0, 255]),
        (np.array([0, 200], np.int64), [0, 200]),
        (np.array([0, 300, 65535], np.int32), [0, 1, 255]),
        (np.array([-2, 0, 2], np.int8), [0, 128, 255]),
        (np.array([0, 2**31, 2**32 - 1], np.uint32), [0, 128, 255]),
        (np.array([0, 0.5, 1], np.float16), [0, 128, 255]),
        (np.array([0, 17, 255], np.float32), [0, 17, 255]),
        (np.array([0.0, 17.5, 70.0]), [0, 64, 255]),
        (np.array([-1.0, 0.0, 1.0]), [0, 128, 255]),
        (np.array([-3e38, 0, 3e38], np.float32), [0, 128, 255]),
        (np.array([np.nan, 0, 0.2, 1, np.inf]), [0, 0, 51, 255, 255]),
        (np.array([-np.inf, 1.5, 2.5]), [0, 0, 255]),
        (np.array([1e6, 1e6]), [0, 0]),
        (np.array([-5, -5]), [0, 0]),
    ],
)
def test_numbers_become_bytes(values: np.ndarray, expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = to_uint8(values)
    assert pixels.dtype == np.uint8 and pixels.tolist() == expected


def test_arrays() -> None:
    rgb = golden.scene(5, 4)
    assert (pixels_of(rgb) == rgb).all()
    assert (pixels_of(rgb.astype(np.float32) / 255) == rgb).all()
    assert (pixels_of(rgb[:, ::-1]) == rgb[:, ::-1]).all()
    assert (pixels_of(rgb[:, :, 0]) == rgb[:, :, :1]).all()
    assert (pixels_of(rgb[:, :, :1]) == rgb[:, :, :1]).all()
    clear = np.dstack([rgb, np.zeros((4, 5), np.uint8)])
    assert (pixels_of(clear) == 255).all()
    assert (pixels_of(np.zeros((4, 5, 2), np.float32)) == 255).all()
    for bad in (
        np.zeros((3, 9, 9)),
        np.zeros(4),
        np.zeros((2, 2), complex),
        np.full((2, 2), np.nan),
    ):
        with pytest.raises(PictureError, match="^the array "):
            open_picture(bad)
    with pytest.raises(PictureError, match="no pixels"):
        open_picture(np.zeros((0, 3, 3), np.uint8))


def test_black_text_on_nothing_is_seen() -> None:
    image = Image.new("RGBA", (60, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((2, 2), "hello", fill=(0, 0, 0, 255))
    pixels = pixels_of(png(image))
    assert (pixels == 255).mean() > 0.5 and (pixels < 64).sum() > 50


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    cmyk.save(tmp_path / "a.jpg", quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in data  # which marks its ink values as inverted
    assert np.abs(pixels_of(data).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("options", [{}, {"transparency": GREEN}])
def test_metadata_does_not_come_along(options: dict) -> None:
    image = strip("RGB", [RED, GREEN, BLUE])
    image.getexif()[0x0112] = 6
    first, _ = open_picture(png(image, exif=image.getexif(), **options))
    again, _ = open_picture(first)
    assert first.info == {} and first.size == again.size == (1, 3)
    assert (np.asarray(first) == np.asarray(again)).all()


def test_the_source_image_is_left_alone() -> None:
    image = Image.open(io.BytesIO(png(strip("RGB", [RED, GREEN, BLUE]), transparency=GREEN)))
    open_picture(image)
    assert image.info["transparency"] == GREEN and image.mode == "RGB"
    plain = Image.new("RGB", (2, 2), RED)
    open_picture(plain)[0].putpixel((0, 0), BLUE)
    assert plain.getpixel((0, 0)) == RED


# Orientation

# 2x3 letters as seen upright, and how each EXIF orientation stores them.
STORED = {
    1: ["ab", "cd", "ef"],
    2: ["ba", "dc", "fe"],
    3: ["fe", "dc", "ba"],
    4: ["ef", "cd", "ab"],
    5: ["ace", "bdf"],
    6: ["bdf", "ace"],
    7: ["fdb", "eca"],
    8: ["eca", "fdb"],
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    def draw(letters: list[str]) -> np.ndarray:
        values = np.array([[(ord(c) - ord("a")) * 50 for c in line] for line in letters], np.uint8)
        return values.repeat(8, 0).repeat(8, 1)  # JPEG's blocks, so that each stays flat

    image = Image.fromarray(draw(STORED[orientation])).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    image.save(tmp_path / f"a{suffix}", exif=exif.tobytes(), **options)
    pixels = pixels_of(tmp_path / f"a{suffix}").astype(int)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels - draw(STORED[1])[:, :, None].astype(int)).max() <= 3


def test_broken_exif_is_passed_over(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), RED)
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert pixels_of(tmp_path / "a.jpg").shape == (4, 8, 3)
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hex at all")
    assert pixels_of(png(image, pnginfo=text)).shape == (4, 8, 3)
    for value in (0, 9, 77):
        image.getexif()[0x0112] = value
        assert pixels_of(png(image, exif=image.getexif())).shape == (4, 8, 3)


# Animations


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", ".mpo"])
def test_animation_gives_its_first_frame(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 5), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert getattr(image, "n_frames", 1) == 3
    pixels = pixels_of(tmp_path / f"a{suffix}").astype(int)
    assert np.abs(pixels - RED).max() <= (2 if suffix == ".mpo" else 0)  # MPO holds JPEGs


# What is no picture


def refused(source, **kwargs) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_missing_empty_folder_text(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("Dear reader, this is no picture at all.\n")
    assert "does not exist" in refused(tmp_path / "none.png")
    assert "is empty" in refused(tmp_path / "empty.png")
    assert "is empty" in refused(b"")
    assert "is a folder" in refused(tmp_path)
    assert "is not a picture" in refused(tmp_path / "text.png")
    assert "is not a picture" in refused(b"x")
    assert str(tmp_path / "text.png") in refused(str(tmp_path / "text.png"))
    assert "cannot be opened" in refused("a\0b")
    assert len(refused("x" * 10_000)) < 400
    assert "not a regular file" in refused("/dev/null")
    with pytest.raises(TypeError, match="not int"):
        open_picture(3)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    path.chmod(0)
    assert "cannot be opened: Permission denied" in refused(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_truncated(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(golden.scene(64, 48)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: max(12, int(len(data) * share))])
    assert "cut short or damaged" in refused(path)


def test_damaged_bytes_never_escape_as_other_errors() -> None:
    # On these Pillow raises ValueError, one in the header and one in the data.
    for data in (b"P6 x y 255\n", b"P2 2 1 255 ab cd\n"):
        assert "cut short or damaged" in refused(data)
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "ICO", "PPM", "BMP", "TGA", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(golden.scene(32, 32)).save(file, kind)
        data = np.frombuffer(file.getvalue(), np.uint8)
        for _ in range(12):
            bad = data.copy()
            places = rng.integers(0, min(len(bad), 400), 6)
            bad[places] = rng.integers(0, 256, 6)
            try:
                open_picture(bad.tobytes(), max_pixels=10**6)
            except PictureError as error:
                assert "\n" not in str(error)


def test_too_large_is_known_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def header(width: int, height: int) -> bytes:
        # No pixel data at all: a decoder would fail.
        size = struct.pack(">2I", width, height)
        data = png(Image.new("RGB", (1, 1)))
        ihdr = b"IHDR" + size + data[24:29]
        return data[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + data[33:]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "400.0 million pixels, and the limit is 120.0" in refused(header(20000, 20000))
        assert "too large" in refused(header(13400, 13400))
        assert "limit is 120.0 million" in refused(header(12000, 12000))
        assert "cut short" in refused(header(9500, 9500))  # of which Pillow would warn
        message = refused(header(400, 300), max_pixels=100_000)
        assert "400 x 300" in message and "0.1 million" in message
        assert "too large" in refused(np.zeros((9, 9), np.uint8), max_pixels=80)
        assert "too large" in refused(Image.new("L", (9, 9)), max_pixels=80)
        # An app's own, lower limit of Pillow's holds too.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert "too large" in refused(header(30, 30))
        assert pixels_of(png(Image.new("L", (4, 4)))).shape == (4, 4, 3)
    assert [str(w.message) for w in caught] == []
    assert MAX_PIXELS < 2 * (1024**3 // 4 // 3)  # where Pillow itself would refuse


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "I", "F", "RGB", "L"])
def test_bands_are_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((rng.normal(0, 1, (9, 7)) * 9000 + 30000).astype(kind))
        image.info["transparency"] = int(np.asarray(image)[0, 0])
    else:
        image = Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8)).convert(mode)
        if mode == "P":
            image.info["transparency"] = image.getpixel((3, 3))
    numbers = np.asarray(image)
    whole, bytes_ = np.asarray(to_rgb(image)), to_uint8(numbers)
    for band in (1, 20):
        monkeypatch.setattr(colour, "BAND", band)
        assert (np.asarray(to_rgb(image)) == whole).all()
        assert (to_uint8(numbers) == bytes_).all()
    assert len(np.unique(whole)) > 20


# One picture's peak, above what Python and the libraries take.
PEAK = """
import resource, sys
from mlxvlm.config import TilingConfig
from mlxvlm.images.tiling import look
look(sys.argv[1], TilingConfig(image_size=32))
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
look(sys.argv[2], TilingConfig(image_size=384))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    "rgb.png rgba.png palette.png 16-bit.png plain.jpg progressive.jpg turned.jpg rgb.tif "
    "float.tif picture.webp".split(),
)
def test_the_largest_pictures_stay_under_a_gigabyte_and_a_half(name: str, tmp_path: Path) -> None:
    """Measured on 16 million pixels, at so much a pixel as the limit allows."""
    side = 4000
    ramp = Image.linear_gradient("L").resize((side, side))
    whole = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_90), ramp))
    exif = Image.Exif()
    exif[opening.ORIENTATION] = 6
    if name.startswith("rgba"):
        whole.putalpha(ramp)
    options = {"turned.jpg": {"exif": exif}, "progressive.jpg": {"progressive": True}}
    wide = {"16-bit.png": np.uint16, "float.tif": np.float32, "palette.png": np.uint8}
    if name in wide:
        whole = Image.fromarray(np.asarray(ramp).astype(wide[name]))
        whole = whole.convert("P") if name == "palette.png" else whole
    if name == "progressive.jpg":
        options[name]["subsampling"] = 0
    if name.endswith(".png"):
        options[name] = {"compress_level": 1}
    whole.save(tmp_path / name, **options.get(name, {}))
    Image.new("RGB", (64, 64)).save(tmp_path / f"small{Path(name).suffix}")
    files = [str(tmp_path / f"small{Path(name).suffix}"), str(tmp_path / name)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files], capture_output=True, text=True, check=True
    )
    most = MAX_PIXELS // (2 if name.endswith(".webp") else 1)
    # A band's own copies do not grow with the picture.
    beside = 150e6
    assert int(done.stdout) - beside < side**2 * (1.2e9 / most)


@pytest.mark.slow
def test_a_picture_of_400_million_pixels_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    ihdr = b"IHDR" + struct.pack(">2I5B", 20000, 20000, 1, 0, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(bytes(20000 * 2501), 1)
    parts = [ihdr, idat, b"IEND"]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
        )
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small.png"), str(path)],
        capture_output=True,
        text=True,
    )
    assert "PictureError" in done.stderr and "huge.png is too large" in done.stderr


def test_files_are_closed(tmp_path: Path) -> None:
    if not os.path.isdir("/dev/fd"):
        pytest.skip("no /dev/fd to count open files in")
    Image.fromarray(golden.scene(20, 20)).save(tmp_path / "a.png")
    frames = [Image.new("L", (9, 9), c) for c in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("text")
    names = ("a.png", "a.gif", "a.tif", "bad.png", "text.png")
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/dev/fd"))
        kept = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            for name in names:
                try:
                    kept.append(open_picture(tmp_path / name)[0])
                except PictureError as error:
                    kept.append(error)
                sha256_file(tmp_path / name)
        assert len(os.listdir("/dev/fd")) == before
    finally:
        gc.enable()


# Content


def test_sha256(tmp_path: Path) -> None:
    image = Image.fromarray(golden.scene(30, 20))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    image.save(tmp_path / "c.bmp")
    plain = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert open_picture(tmp_path / "a.png")[1] == plain == sha256_file(tmp_path / "b.png")
    assert open_picture((tmp_path / "b.png").read_bytes())[1] == plain
    assert open_picture(tmp_path / "c.bmp")[1] != plain
    pixels = golden.scene(30, 20)
    by_pixels = open_picture(pixels)[1]
    assert by_pixels == open_picture(image)[1] == open_picture(pixels.copy())[1]
    assert by_pixels == "e9f253b0cedffb386660d4823fb39b01eafc05d08acb8949c4d378c722c783c2"
    assert by_pixels != open_picture(pixels.reshape(30, 20, 3))[1]
    pixels[0, 0, 0] ^= 1
    assert by_pixels != open_picture(pixels)[1]
    with pytest.raises(PictureError, match="does not exist"):
        sha256_file(tmp_path / "none.png")


def test_threads_agree(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(golden.scene(90 + i, 70)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i % 6}.png" for i in range(24)]
    tiling = TilingConfig(image_size=32)
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda path: look(path, tiling), paths))
    for path, picture in zip(paths, pictures, strict=True):
        alone = look(path, tiling)
        assert picture.sha256 == alone.sha256 and (picture.views[0] == alone.views[0]).all()


# HEIC


def test_heic_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    opening._register_heif.cache_clear()
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    assert "pip install pillow-heif" in refused(data)
    calls = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    opening._register_heif.cache_clear()
    refused(data)
    refused(data)
    assert calls == [1]
    opening._register_heif.cache_clear()


def test_heic_is_read_where_pillow_heif_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    ramp = Image.linear_gradient("L").resize((64, 48))
    ramp.convert("RGB").save(tmp_path / "a.heic", quality=95)
    found = pixels_of(tmp_path / "a.heic")
    assert found.shape == (48, 64, 3)
    assert np.abs(found - np.asarray(ramp, float)[:, :, None]).mean() < 3


# The web


class Server(http.server.BaseHTTPRequestHandler):
    body = png(Image.new("RGB", (6, 4), RED))

    def do_GET(self) -> None:
        if self.path == "/a.png":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(5000))
        elif self.path == "/huge":
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            self.end_headers()
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body[:20])
        elif self.path == "/slow":
            self.server.slow.wait(5)  # type: ignore[attr-defined]
        elif self.path in ("/moved", "/to-file", "/to-ftp"):
            goals = {"/moved": "/a.png", "/to-file": "file:///etc/hosts", "/to-ftp": "ftp://x/y"}
            self.send_response(302)
            self.send_header("Location", goals[self.path])
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.slow = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.slow.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()
        server.server_close()


def test_urls(site: str) -> None:
    for name in ("/a.png", "/moved"):
        image, digest = open_picture(site + name, allow_urls=True)
        assert (np.asarray(image) == RED).all() and image.size == (6, 4)
        assert digest == hashlib.sha256(Server.body).hexdigest()
    assert "404" in refused(site + "/none.png", allow_urls=True)
    assert "cannot be fetched" in refused(site + "/to-file", allow_urls=True)
    assert "cannot be fetched" in refused(site + "/to-ftp", allow_urls=True)
    assert "broke off" in refused(site + "/short", allow_urls=True)
    assert "larger than the limit" in refused(site + "/huge", allow_urls=True)
    with pytest.raises(PictureError, match="larger than the limit"):
        fetch(site + "/endless", max_bytes=4000)
    with pytest.raises(PictureError, match="timed out"):
        fetch(site + "/slow", timeout=0.2)
    assert len(fetch(site + "/endless", max_bytes=5000)) == 5000


def test_urls_that_are_refused() -> None:
    message = refused("http://example.com/a.png")
    assert "--allow-urls" in message and "allow_urls=True" in message
    assert "--allow-urls" in refused("HTTPS://example.com/a.png")
    for url in ("ftp://a/b.png", "file:///etc/hosts", "data:image/png;base64,AAAA", "s3://b/k"):
        assert "http(s)" in refused(url, allow_urls=True)
    assert "cannot be fetched" in refused("http://[bad/a.png", allow_urls=True)
    assert "cannot be fetched" in refused("http:///a.png", allow_urls=True)
    assert "cannot be fetched" in refused("http://127.0.0.1:1/a b.png", allow_urls=True)


# Views

RESIZE = {"siglip": "squash", "clip": "crop", "llava": "pad"}


@pytest.mark.parametrize("kind", RESIZE)
def test_views_equal_transformers_golden(kind: str) -> None:
    stored = np.load(golden.FILE)
    mean, std = (np.array(c, np.float32) for c in golden.MEAN_STD[kind])
    background = tuple(int(c * 255) for c in golden.MEAN_STD[kind][0])

    def view(pixels: np.ndarray, size: int, resample: str) -> np.ndarray:
        tiling = TilingConfig("single", size, RESIZE[kind], resample, background)
        (only,) = tile(Image.fromarray(pixels), tiling).views
        return only

    for width, height in golden.SIZES:
        pixels, name = golden.scene(width, height), f"{width}x{height}"
        for resample in ("bicubic", "bilinear"):
            small = view(pixels, golden.SMALL, resample)
            np.testing.assert_array_equal(small, stored[f"small/{kind}/{resample}/{name}"], name)
        real = view(pixels, golden.REAL[kind], "bicubic")
        normalised = (real.astype(np.float32) / 255 - mean) / std
        np.testing.assert_allclose(
            golden.sample(normalised), stored[f"real/{kind}/{name}"], rtol=0, atol=1e-6
        )
        digest = hashlib.sha256(real.tobytes()).digest()
        assert digest == stored[f"sums/{kind}/{name}"].tobytes(), (kind, name)


@pytest.mark.parametrize("size", [(700, 300), (300, 700), (64, 1), (1, 64), (50, 49), (40, 40)])
def test_pad_equals_a_resize_of_the_padded_square(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(golden.scene(*size))
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    for band in (preprocess.BAND, 1, 997):
        monkeypatch.setattr(preprocess, "BAND", band)
        for resample, kernel in preprocess.FILTERS.items():
            for goal in (24, 40, 96):
                expected = np.asarray(square.resize((goal, goal), kernel))
                found = preprocess.pad(image, goal, resample, (122, 116, 104))
                np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    size=st.integers(1, 48),
    resize=st.sampled_from(["squash", "crop", "pad"]),
    resample=st.sampled_from(["bicubic", "bilinear"]),
)
def test_any_size_gives_a_square_view(
    width: int, height: int, size: int, resize: str, resample: str
) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    picture = tile(image, TilingConfig("single", size, resize, resample, (10, 200, 30)))
    (view,) = picture.views
    assert view.shape == (size, size, 3) and view.dtype == np.uint8 and view.flags.writeable
    assert (view == (10, 200, 30)).all()  # a flat picture stays flat, whatever is cut or added
    assert picture.size == (width, height) and picture.grid == (1, 1)


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (3, 70_000)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_extreme_strips_stay_small_in_memory(
    size: tuple[int, int], resize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "MAX_PAD_SIDE", 2000)  # for speed
    made, resize_image = [], Image.Image.resize

    def recorded(self: Image.Image, goal: tuple[int, int], *args) -> Image.Image:
        made.append(goal[0] * goal[1])
        return resize_image(self, goal, *args)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    image = Image.new("RGB", size, RED)
    (view,) = tile(image, TilingConfig("single", 16, resize, "bicubic", RED)).views
    assert (view == RED).all() and view.shape == (16, 16, 3)
    assert max(made) < 1_000_000


def test_crop_keeps_the_middle_of_an_extreme_strip() -> None:
    image = Image.new("RGB", (1001, 5), RED)
    image.paste(BLUE, (498, 0, 503, 5))
    (view,) = tile(image, TilingConfig("single", 5, "crop", "bilinear")).views
    assert (view == BLUE).all()


def test_look_opens_orients_and_tiles(tmp_path: Path) -> None:
    image = Image.fromarray(golden.scene(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    picture = look(tmp_path / "a.png", TilingConfig(image_size=32))
    assert picture.size == (20, 40) and picture.grid == (1, 1)
    assert picture.sha256 == sha256_file(tmp_path / "a.png")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert (picture.views[0] == preprocess.squash(upright, 32, "bicubic")).all()
    with pytest.raises(PictureError, match="--allow-urls"):
        look("http://example.com/a.png", TilingConfig())
    with pytest.raises(PictureError, match="too large"):
        look(image, TilingConfig(), max_pixels=700)


def test_tile_takes_any_mode_and_minds_max_tiles() -> None:
    image = strip("LA", [(0, 255), (0, 0)])
    picture = tile(image, TilingConfig(image_size=2), max_tiles=1)
    assert (picture.views[0] == tile(to_rgb(image), TilingConfig(image_size=2)).views[0]).all()
    assert row(picture.views[0]) == grey([0, 255])
    with pytest.raises(ConfigError, match="max_tiles"):
        tile(image, TilingConfig(), max_tiles=0)
