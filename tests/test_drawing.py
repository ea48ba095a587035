"""images/drawing.py: frames where the boxes are, labels that can be read, files that are whole."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from mlxvlm.boxes import Box
from mlxvlm.errors import PictureError, UsageError
from mlxvlm.images.drawing import COLOURS, check_target, draw, save


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def changed(before, after):
    return np.any(np.array(before) != np.array(after), axis=-1)


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_a_frame_lies_on_the_edges_of_its_box():
    image = grey(500, 250)
    drawn = draw(image, [Box("", 200, 400, 600, 800)])  # pixels 100..300, 100..200; no label
    assert image.getpixel((100, 100)) == (128, 128, 128) and drawn.size == image.size
    rows, columns = np.nonzero(changed(image, drawn))
    assert (columns.min(), columns.max()) == (99, 300) and (rows.min(), rows.max()) == (99, 200)
    for x, y in ((100, 150), (299, 150), (200, 100), (200, 199)):
        assert drawn.getpixel((x, y)) == rgb(COLOURS[0])
    assert not changed(image, drawn)[110:190, 110:290].any()


def test_colours_cycle_and_a_point_is_ringed():
    boxes = [Box("", 100 * i, 300, 100 * i + 80, 600) for i in range(9)]
    drawn = draw(grey(900, 300), boxes)
    seen = [drawn.getpixel((round(90 * i + 36), 90)) for i in range(9)]
    assert seen == [rgb(COLOURS[i % len(COLOURS)]) for i in range(9)]
    assert len(set(seen)) == len(COLOURS)
    image = grey(400, 400)
    mark = changed(image, draw(image, [Box("", 500, 250, 500, 250)]))
    rows, columns = np.nonzero(mark)
    assert abs(columns.mean() - 200) < 1 and abs(rows.mean() - 100) < 1 and mark.sum() > 30


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (40, 40), (640, 480), (1600, 1200)])
def test_every_label_is_inside_and_read_at_every_size(size):
    """A corner each; what is drawn is the same where there is more room around the picture."""
    corners = ((0, 0, 1, 1), (999, 0, 1000, 1), (0, 999, 1, 1000), (990, 990, 1000, 1000))
    boxes = [Box(f"label {i}", *corner) for i, corner in enumerate(corners)]
    boxes += [Box("a tip", 1000, 1000, 1000, 1000), Box("the longest of all labels", 0, 0, 1000, 9)]
    image = grey(*size)
    assert changed(image, draw(image, boxes)).any()
    if min(size) >= 40:  # a chip is a filled rectangle with letters of another colour on it
        drawn = draw(image, [Box("label", 0, 0, 1000, 1000)])
        chip = np.all(np.array(drawn) == rgb(COLOURS[0]), axis=-1)
        assert chip.sum() > 4 * (size[0] + size[1]) ** 0.5
        # Letters and casing; the frame alone has neither antialiased ink nor so much of it.
        assert len(drawn.getcolors(10**6) or ()) > 4


def test_labels_do_not_cover_each_other_nor_a_point():
    image = grey(600, 400)
    names = ["one", "two", "three"]
    boxes = [Box(name, 300, 300, 700, 700) for name in names]
    drawn = np.array(draw(image, boxes))
    for colour in COLOURS[:3]:  # of three frames on one place, each chip can be seen
        assert np.all(drawn == rgb(colour), axis=-1).sum() > 200
    for x, y in ((0, 0), (1000, 0), (0, 1000), (1000, 1000), (500, 10)):
        dot = draw(image, [Box("tip", x, y, x, y)])
        at = (min(round(x * 0.6), 599), min(round(y * 0.4), 399))
        assert dot.getpixel(at) == (0, 0, 0)  # the dot in the ring's middle


def test_letters_that_the_font_lacks_become_plain_or_a_number():
    image = grey(400, 300)

    def drawn(label, boxes=1):
        return draw(image, [Box(label, 100 + 50 * i, 200, 600, 900) for i in range(boxes)])

    assert drawn("caf\u00e9") == drawn("cafe") != drawn("caff")
    assert drawn("\u7ea2\u661f") == drawn("1") != drawn("")
    assert drawn("", 2) != drawn("a", 2)


def test_saved_whole_in_the_format_of_the_ending(tmp_path):
    image = draw(grey(60, 40), [Box("", 100, 100, 900, 900)])
    for name, kind in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")):
        save(image, check_target(tmp_path / name))
        with Image.open(tmp_path / name) as read:
            assert read.format == kind and read.size == (60, 40)
    assert Image.open(tmp_path / "a.png").convert("RGB") == image
    save(grey(10, 10), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (10, 10)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.JPG", "c.webp"]
    with pytest.raises(PictureError, match=r"17000 x 1 .* name a .png"):
        save(grey(17000, 1), tmp_path / "c.webp")
    assert Image.open(tmp_path / "c.webp").size == (60, 40)


def test_a_target_that_cannot_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    for name, said in (
        ("a.gif", ".png, .jpg"),
        ("a", ".png, .jpg"),
        ("folder.png", "is a folder"),
        ("none/a.png", "no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            check_target(tmp_path / name)
    monkeypatch.setattr("mlxvlm.images.drawing.os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="may not be written"):
        check_target(tmp_path / "a.png")
