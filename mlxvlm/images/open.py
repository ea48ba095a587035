"""Opens a picture: any format that Pillow reads, as an upright RGB image and its sha256."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import PictureError
from .colour import array_to_rgb, to_rgb
from .fetch import fetch

# Decoded and as RGB, 4 bytes a pixel each and 2 more in a progressive JPEG: 1.2 GB. Pillow's own
# limit (2 x PIL.Image.MAX_IMAGE_PIXELS) stays in force above it.
MAX_PIXELS = 120_000_000
# Decoders that hold twice as much.
GREEDY = ("WEBP", "AVIF", "HEIF", "JPEG2000")

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

ORIENTATION = 0x0112
# What undoes each EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose header says what size they decode to, before they are turned upright.
WITH_SIZE = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def open_picture(
    source: Source, *, allow_urls: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, str]:
    """An upright RGB image, and the sha256 of the file's bytes (of an image or array: of its RGB
    pixels).

    source: a path, an http(s) URL (only with allow_urls), a file's bytes, a PIL image (its current
        frame), or an array as `colour.array_to_rgb` takes it. Of an animation, the first frame.
    max_pixels: a larger picture is refused from its header, before anything is decoded.

    Raises PictureError where there is no usable picture. Safe in threads; leaves no file open.
    """
    if isinstance(source, np.ndarray):
        if source.ndim in (2, 3):
            check_size((source.shape[1], source.shape[0]), max_pixels, "the array")
        return _with_pixel_digest(array_to_rgb(source))
    if isinstance(source, Image.Image):
        check_size(source.size, max_pixels, "the image")
        return _with_pixel_digest(_decode(source, "the image", ours=False))
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_bytes(bytes(source), "the picture in memory", max_pixels)
    if isinstance(source, str) and (scheme := _scheme(source)):
        if scheme not in ("http", "https"):
            raise PictureError(
                f"{_short(source)} is neither a file nor an http(s) address: save the picture to a "
                "file and name that."
            )
        if not allow_urls:
            raise PictureError(
                f"{_short(source)} is a web address, and none is fetched unasked: pass "
                "--allow-urls (allow_urls=True), or download the picture and name the file."
            )
        return _open_bytes(fetch(source), _short(source), max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"a picture is a path, bytes, a PIL image or a NumPy array, not {type(source).__name__}"
        )
    with open_file(source) as file:
        return _open_stream(file, _short(os.fspath(source)), max_pixels)


def upright_size(source: Source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `open_picture` gives, from the header where that is enough."""
    if isinstance(source, str | os.PathLike) and not (isinstance(source, str) and _scheme(source)):
        with open_file(source) as file:
            found = _size_in_header(file, _short(os.fspath(source)), max_pixels)
    elif isinstance(source, bytes | bytearray | memoryview):
        with io.BytesIO(source) as file:
            found = _size_in_header(file, "the picture in memory", max_pixels)
    else:
        found = None
    return found or open_picture(source, max_pixels=max_pixels)[0].size


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes, as `open_picture` gives it, without decoding."""
    with open_file(path) as file:
        return _digest(file, _short(os.fspath(path)))


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file for reading, or a PictureError that says why not."""
    name = _short(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise PictureError(f"{name} is a folder, not a picture: name a file in it.")
        if not stat.S_ISREG(mode):
            raise PictureError(f"{name} is not a regular file: name a picture file.")
        return Path(path).open("rb")
    except FileNotFoundError:
        raise PictureError(f"{name} does not exist: check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{name} cannot be opened: {reason}.") from error


def _open_bytes(data: bytes, name: str, max_pixels: int) -> tuple[Image.Image, str]:
    with io.BytesIO(data) as file:
        return _open_stream(file, name, max_pixels)


def _open_stream(file: IO[bytes], name: str, max_pixels: int) -> tuple[Image.Image, str]:
    image = identify(file, name)
    check_size(image.size, _limit(image, max_pixels), name)
    place = file.tell()
    digest = _digest(file, name)
    file.seek(place)
    return _decode(image, name, ours=True), digest


def _size_in_header(file: IO[bytes], name: str, max_pixels: int) -> tuple[int, int] | None:
    image = identify(file, name)
    if image.format not in WITH_SIZE:
        return None
    width, height = image.size
    check_size(image.size, _limit(image, max_pixels), name)
    try:
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # as in `_decode`
        turned = False
    return (height, width) if turned else (width, height)


def _digest(file: IO[bytes], name: str) -> str:
    try:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror or error}.") from error


def _with_pixel_digest(image: Image.Image) -> tuple[Image.Image, str]:
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return image, digest.hexdigest()


def identify(file: IO[bytes], name: str) -> Image.Image:
    """Reads the header alone."""
    _hush_pillow()
    prefix = b""
    try:
        prefix = file.read(16)
        if not prefix:
            raise PictureError(f"{name} is empty (0 bytes): get it again from its source.")
        if prefix[4:8] == b"ftyp":
            _register_heif()
        return Image.open(file)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, error) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} {_why_unknown(prefix)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a plugin may raise anything on a bad header
        raise _damaged(name, "", error) from error


def _why_unknown(prefix: bytes) -> str:
    """Why Pillow cannot name a file: cut short, a missing codec, or no picture at all."""
    if prefix[4:8] == b"ftyp" and prefix[8:12] in HEIF_BRANDS and not _register_heif():
        return "is a HEIC picture: `pip install pillow-heif` to read those, or save it as JPEG."
    for kind in Image.ID:
        accept = Image.OPEN[kind][1]
        try:
            reply = accept(prefix) if accept else False
        except Exception:  # some need more bytes than a stump has
            reply = False
        if isinstance(reply, str):  # what this build of Pillow lacks
            return f"cannot be read by this Pillow ({reply}): save it as PNG or JPEG."
        if reply:
            return f"begins like a picture ({kind}) but is cut short or damaged: get it again."
    return "is not a picture: no format that Pillow reads begins as it does."


def _decode(image: Image.Image, name: str, ours: bool) -> Image.Image:
    """Pixels of an identified image: loaded, RGB over white, upright. ours: it is given up for
    them, so that no more than two copies are held."""
    _hush_pillow()
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(name, error) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise _damaged(name, image.format or "", error) from error
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF does not make a picture unusable
        orientation = 1
    rgb = to_rgb(image, name)
    if ours:
        image.close()
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if method is None else rgb.transpose(method)


def _damaged(name: str, kind: str, error: Exception) -> PictureError:
    what = f"picture ({kind})" if kind else "picture"
    return PictureError(
        f"{name} is a {what} that is cut short or damaged "
        f"({str(error) or type(error).__name__}): get it again from its source."
    )


def _too_large(name: str, error: Exception) -> PictureError:
    """Pillow's own refusal, which comes before the size can be asked."""
    pixels, limit = (*map(int, re.findall(r"\d+", str(error))), 0, 0)[:2]
    return PictureError(
        f"{name} is too large: it has {pixels / 1e6:.1f} million pixels, and the limit is "
        f"{min(limit, MAX_PIXELS) / 1e6:.1f} million: make it smaller first."
    )


def check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Refuses a picture of no pixels, or of more than `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(f"{name} has no pixels: its size is {width} x {height}.")
    if width * height > max_pixels:
        raise PictureError(
            f"{name} is too large: {width} x {height} is {width * height / 1e6:.1f} million "
            f"pixels, and the limit is {max_pixels / 1e6:.1f} million: make it smaller first."
        )


def _limit(image: Image.Image, max_pixels: int) -> int:
    """The most pixels that this picture may have."""
    return min(max_pixels, MAX_PIXELS // 2) if image.format in GREEDY else max_pixels


def _scheme(source: str) -> str:
    """The scheme of a URL in lower case; empty for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):", source)
    return (match[1] or match[2]).lower() if match else ""


def _short(name: str | bytes, limit: int = 200) -> str:
    """A name fit for one line of an error."""
    text = os.fsdecode(name)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@functools.cache
def _register_heif() -> bool:
    """Lets Pillow read HEIC where pillow-heif is installed."""
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _hush_pillow() -> None:
    """Pillow's warnings about large or odd files say less than our limit and errors do.

    A plain filter, looked for at each call: warnings.catch_warnings is not safe in threads.
    """
    wanted = (
        ("", Image.DecompressionBombWarning),
        (r"PIL\.", UserWarning),
    )
    for module, category in wanted:
        known = any(
            f[0] == "ignore"
            and f[2] is category
            and (f[3].pattern if isinstance(f[3], re.Pattern) else f[3] or "") == module
            for f in warnings.filters
        )
        if not known:
            warnings.filterwarnings("ignore", category=category, module=module)
