"""Frames of an animation (GIF, WebP, APNG: Pillow reads them) or of a video file (PyAV), taken
evenly over its time.

    count = 4     |----x----|----x----|----x----|----x----|     the middle of each of equal parts

As InternVL 2.5 samples, which takes 8 to 32 frames of a video.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError, PictureError
from .colour import to_rgb
from .open import MAX_PIXELS, check_size, identify, open_file

FRAMES = 8
# What Pillow says of a frame without a duration is 0, and browsers show such a one so long.
SILENT_MS = 100
# How containers begin: of these, PyAV is asked.
CONTAINERS = ((4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"OggS"), (0, b"FLV"))
CONTAINERS += ((0, b"\x00\x00\x01\xba"), (0, b"G@"), (4, b"moov"), (4, b"mdat"))

Source = str | os.PathLike[str] | bytes


def open_frames(
    source: Source, count: int = FRAMES, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """At most `count` RGB images of a video or an animation, in order; a picture that does not move
    is one frame, and no frame comes twice.

    source: a path or a file's bytes. Raises PictureError where there is nothing to see.
    """
    if count < 1:
        raise ConfigError(f"frames (={count}) must be at least 1.")
    if isinstance(source, bytes):
        with io.BytesIO(source) as file:
            return _open(file, "the video in memory", count, max_pixels)
    with open_file(source) as file:
        return _open(file, os.fspath(Path(source)), count, max_pixels)


def middles(count: int) -> list[float]:
    """The middles of `count` equal parts of 0 to 1."""
    return [(number + 0.5) / count for number in range(count)]


def _open(file: Any, name: str, count: int, max_pixels: int) -> list[Image.Image]:
    prefix = file.read(16)
    file.seek(0)
    try:
        image = identify(file, name)
    except PictureError:
        if not any(prefix[at : at + len(magic)] == magic for at, magic in CONTAINERS):
            raise
    else:
        check_size(image.size, max_pixels, name)
        return _animation(image, name, count)
    file.seek(0)
    return _video(file, name, count, max_pixels)


def _animation(image: Image.Image, name: str, count: int) -> list[Image.Image]:
    try:
        total = getattr(image, "n_frames", 1)
        lasts = []
        for number in range(total):
            image.seek(number)
            lasts.append(image.info.get("duration") or SILENT_MS)
        chosen = _shown(lasts, count)
        frames = []
        for number in chosen:
            image.seek(number)
            frames.append(to_rgb(image, name))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise PictureError(f"{name} is damaged ({error}): get it again from its source.") from error
    return frames


def _shown(lasts: Sequence[float], count: int) -> list[int]:
    """Which frames are to be seen in the middles; all, where they are no more than `count`."""
    if len(lasts) <= count:
        return list(range(len(lasts)))
    ends = list(accumulate(lasts))
    times = [ends[-1] * middle for middle in middles(count)]
    return sorted({next(i for i, end in enumerate(ends) if time < end) for time in times})


def _video(file: Any, name: str, count: int, max_pixels: int) -> list[Image.Image]:
    try:
        import av  # type: ignore[import-not-found]
        from av.error import FFmpegError  # type: ignore[import-not-found]
    except ImportError:
        raise PictureError(
            f"{name} is a video file, and reading those takes PyAV: pip install 'mlxvlm[video]'. "
            "A GIF, WebP or APNG is read without it."
        ) from None
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise PictureError(
                    f"{name} has no pictures in it: it is sound alone, or cut short."
                )
            stream = container.streams.video[0]
            check_size((stream.width, stream.height), max_pixels, name)
            start, length = _span(container, stream)
            found: dict[int, Image.Image] = {}
            for middle in middles(count):
                frame = _frame_at(container, stream, start + int(length * middle))
                if frame is not None and frame.pts not in found:
                    found[frame.pts] = _upright(frame)
    except PictureError:
        raise
    except FFmpegError as error:
        raise PictureError(
            f"{name} is a video that is cut short or damaged ({error}): get it again from its "
            "source."
        ) from error
    if not found:
        raise PictureError(f"{name} is a video without a frame that can be read.")
    return [found[pts] for pts in sorted(found)]


def _span(container: Any, stream: Any) -> tuple[int, int]:
    """First time and length of a stream, in its own ticks."""
    start = stream.start_time or 0
    if stream.duration:
        return start, stream.duration
    if container.duration:  # microseconds
        return start, int(container.duration / 1e6 / stream.time_base)
    # Neither says how long it is: every frame is looked at once.
    last = start
    for packet in container.demux(stream):
        last = max(last, packet.pts if packet.pts is not None else last)
    return start, last - start + 1


def _frame_at(container: Any, stream: Any, time: int) -> Any:
    """The frame that is shown at `time` (in the stream's ticks), or the last before the end."""
    container.seek(time, stream=stream, backward=True)
    shown = None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        if frame.pts > time and shown is not None:
            break
        shown = frame
    return shown


def _upright(frame: Any) -> Image.Image:
    """RGB pixels, turned as the container says that they are to be shown."""
    image = frame.to_image()
    with suppress(AttributeError):  # older PyAVs do not tell
        if frame.rotation % 360:
            image = image.rotate(frame.rotation, expand=True)
    return image
