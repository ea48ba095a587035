"""`chat --draw`: the boxes that an answer names, on the picture that was shown last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxvlm.errors import PictureError, UsageError

if TYPE_CHECKING:
    from mlxvlm.reply import Reply


class Drawing:
    """A file that each answer with boxes in it is drawn into; `tell` hears what came of it."""

    def __init__(self, path: str, allow_urls: bool, tell: Callable[[str], None]):
        from mlxvlm.images.drawing import check_target

        self.path = check_target(path)
        self.allow_urls = allow_urls
        self.tell = tell

    def check(self, pictures: list[str]) -> None:
        """Refuses a picture that drawing would overwrite."""
        for picture in pictures:
            local = "://" not in picture and self.path.exists()
            if local and self.path.samefile(picture):
                raise UsageError(
                    f"--draw {self.path} would overwrite the picture itself: name another file."
                )

    def answer(self, reply: Reply, pictures: list[str]) -> Path | None:
        """Draws what an answer names on the last picture shown; the file, if there was anything."""
        from mlxvlm.images.drawing import draw, save
        from mlxvlm.images.open import open_picture

        if reason := reply.boxes_left_out:
            more = f", and {len(reason) - 1} more" if len(reason) > 1 else ""
            self.tell(f"(left out {reason[0]}{more})")
        if not reply.boxes:
            self.tell("(no box in this answer, nothing drawn)")
            return None
        if not pictures:
            raise PictureError("there is no picture to draw on: /image PATH shows one.")
        image, _ = open_picture(pictures[-1], allow_urls=self.allow_urls)
        save(draw(image, reply.boxes), self.path)
        last = f", the last of {len(pictures)} pictures" if len(pictures) > 1 else ""
        self.tell(f"({_counted(reply)} drawn on {pictures[-1]}{last}: {self.path})")
        return self.path


def _counted(reply: Reply) -> str:
    points = sum(box.is_point for box in reply.boxes)
    amounts = ((len(reply.boxes) - points, "box", "boxes"), (points, "point", "points"))
    return " and ".join(f"{n} {one if n == 1 else many}" for n, one, many in amounts if n)
