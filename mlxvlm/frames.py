"""A video among the pictures of a conversation: its frames are pictures, each one view.

    {"type": "video", "video": "clip.gif", "frames": 8}
        becomes, as InternVL 2.5 has it,
    Frame1: <image>
    Frame2: <image>
    ...

Layouts that bring pictures to the front of a turn have no text between them, so there the frames
follow each other unnamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .config import PromptConfig
from .errors import PromptError
from .images.picture import Picture
from .images.video import FRAMES, open_frames

# Layouts whose pictures do not stand where their parts are.
AT_THE_FRONT = ("vicuna_v1", "mistral", "plain")


def frames_of(source: Any, count: int, look: Callable[..., list[Any]]) -> list[Picture]:
    """At most `count` frames of a video, each as a single view. look: as `VLM.look`."""
    return [look([frame], 1)[0] for frame in open_frames(source, count)]


def label(number: int) -> str:
    """What stands before a frame, counted from 1."""
    return f"Frame{number}: "


def frame_parts(prompt: PromptConfig, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """The parts of a user's message that show a video of these pictures."""
    named = prompt.layout not in AT_THE_FRONT and prompt.image_placement == "turn"
    parts: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        if named:
            text = label(number)
            parts.append({"type": "text", "text": text if number == 1 else "\n" + text})
        parts.append({"type": "image", "image": picture})
    return parts


def with_frames(
    messages: Sequence[dict[str, Any]], prompt: PromptConfig, look: Callable[..., list[Any]]
) -> Sequence[dict[str, Any]]:
    """Messages whose videos have become pictures; themselves, where there is no video."""

    def is_video(part: Any) -> bool:
        return isinstance(part, dict) and part.get("type") == "video"

    def opened(part: dict[str, Any]) -> list[dict[str, Any]]:
        count = part.get("frames", FRAMES)
        if part.get("video") is None or type(count) is not int:
            raise PromptError(
                'a video is {"type": "video", "video": "clip.gif"}, with "frames", a whole number, '
                f"if not {FRAMES}."
            )
        return frame_parts(prompt, frames_of(part["video"], count, look))

    out = []
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list | tuple) and any(map(is_video, content)):
            if message.get("role") != "user":
                raise PromptError("only a user message may hold videos.")
            parts = [opened(part) if is_video(part) else [part] for part in content]
            message = {**message, "content": [one for some in parts for one in some]}
        out.append(message)
    return out if out else messages
