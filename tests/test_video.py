"""Frames of animations and of video files, and how a conversation shows them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from internvl_folders import write_internvl
from PIL import Image
from tiny_tokenizers import vicuna
from tiny_vlm import tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.chat import Conversation
from mlxvlm.cli.main import app
from mlxvlm.config import PromptConfig
from mlxvlm.data.records import parse_record
from mlxvlm.errors import ConfigError, PictureError, PromptError
from mlxvlm.frames import frame_parts
from mlxvlm.images.video import middles, open_frames
from mlxvlm.prompts import normalize_messages, render

KINDS = {"gif": "GIF", "webp": "WEBP", "png": "PNG"}


def drawn(number: int, total: int = 10) -> Image.Image:
    """A frame that says its number: so many tenths of it are white."""
    image = Image.new("RGB", (80, 40), "navy")
    image.paste((255, 255, 255), (0, 0, 80 * number // total, 40))
    return image


def number_of(image: Image.Image) -> int:
    return round(10 * (np.asarray(image)[20, :, 0] > 128).mean())


def animation(path: Path, numbers=range(10), duration: int | list[int] = 100) -> Path:
    first, *rest = [drawn(number) for number in numbers]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, **options)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("count", "seen"),
    [(1, [5]), (2, [2, 7]), (4, [1, 3, 6, 8]), (5, [1, 3, 5, 7, 9]), (10, [*range(10)])],
)
def test_an_animations_frames_are_the_middles_of_equal_parts(tmp_path, kind, count, seen):
    path = animation(tmp_path / f"a.{kind}")
    for source in (path, str(path), path.read_bytes()):
        frames = open_frames(source, count)
        assert [number_of(frame) for frame in frames] == seen
    assert all(frame.mode == "RGB" and frame.size == (80, 40) for frame in frames)
    assert [number_of(frame) for frame in open_frames(path, 99)] == [*range(10)]


def test_frames_are_sampled_in_time_and_none_comes_twice(tmp_path):
    path = animation(tmp_path / "a.gif", range(4), [1400, 100, 100, 400])
    assert [number_of(frame) for frame in open_frames(path, 2)] == [0, 2]
    assert [number_of(frame) for frame in open_frames(path, 3)] == [0, 3]
    assert [number_of(frame) for frame in open_frames(path, 4)] == [0, 1, 2, 3]
    assert middles(4) == [0.125, 0.375, 0.625, 0.875]


def test_a_picture_that_does_not_move_is_one_frame(tmp_path):
    drawn(3).save(tmp_path / "a.jpg", quality=95)
    assert [number_of(frame) for frame in open_frames(tmp_path / "a.jpg")] == [3]


def test_what_cannot_be_seen(tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("not a video at all")
    with pytest.raises(PictureError, match="text.mp4 is not a picture"):
        open_frames(tmp_path / "text.mp4")
    with pytest.raises(PictureError, match="does not exist"):
        open_frames(tmp_path / "gone.gif")
    with pytest.raises(ConfigError, match=r"frames \(=0\) must be at least 1"):
        open_frames(animation(tmp_path / "a.gif"), 0)
    whole = animation(tmp_path / "b.webp").read_bytes()
    with pytest.raises(PictureError, match="damaged"):
        open_frames(whole[: len(whole) // 2], 10)
    with pytest.raises(PictureError, match="too large"):
        open_frames(whole, max_pixels=100)
    (tmp_path / "c.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        PictureError, match=r"c.mp4 is a video file.* pip install 'mlxvlm\[video\]'"
    ):
        open_frames(tmp_path / "c.mp4")


def encoded(rotation: int = 0, seconds: float = 2.0) -> bytes:
    """An MP4 of ten pictures, each shown for a tenth of `seconds`."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=round(10 / seconds))
        stream.width, stream.height, stream.pix_fmt = 80, 40, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(10):
            for packet in stream.encode(av.VideoFrame.from_image(drawn(number))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(("count", "seen"), [(1, [5]), (4, [1, 3, 6, 8]), (10, [*range(10)])])
def test_a_video_files_frames(tmp_path, count, seen):
    path = tmp_path / "a.mp4"
    path.write_bytes(encoded())
    for source in (path, path.read_bytes()):
        frames = open_frames(source, count)
        assert [number_of(frame) for frame in frames] == seen
    assert [number_of(frame) for frame in open_frames(path, 30)] == [*range(10)]
    assert all(frame.mode == "RGB" and frame.size == (80, 40) for frame in frames)


def test_a_damaged_video_file(tmp_path):
    whole = encoded()
    with pytest.raises(PictureError, match="in memory has no pictures in it"):
        open_frames(whole[: len(whole) // 3])


def test_a_prompt_names_its_frames(tmp_path):
    vlm = mlxvlm.load(write_internvl(tmp_path / "model"))
    path = animation(tmp_path / "a.gif")
    video = {"type": "video", "video": path, "frames": 3}
    question = {"role": "user", "content": [video, {"type": "text", "text": "What moves?"}]}
    prompt = vlm.tokenize([question])
    text = vlm.tokenizer.decode(prompt.tokens, skip_special=False)
    view = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    wanted = "".join(f"Frame{number}: {view}" for number in (1, 2, 3)) + "What moves?<|im_end|>"
    assert f"<|im_start|>user\n{wanted}" in text
    assert [len(picture.views) for picture in prompt.pictures] == [1, 1, 1]  # one tile each
    # A row of data that names the frames itself is laid out alike.
    lines = [f"Frame{number}: <image>" for number in (1, 2, 3)]
    row = {
        "images": ["a", "b", "c"],
        "messages": [
            {"role": "user", "content": "\n".join([*lines, "What moves?"])},
            {"role": "assistant", "content": ""},
        ],
    }
    messages, _ = normalize_messages(parse_record(row, "row").messages, row["images"])
    laid = render(messages, [4, 4, 4], vlm.tokenizer, vlm.config.prompt, False)
    assert (laid.tokens[: len(prompt.tokens) - 12] == prompt.tokens[:-12]).all()


def test_layouts_with_pictures_in_front_do_not_name_frames():
    prompt = PromptConfig(layout="vicuna_v1", image_token_id=999)
    messages = [{"role": "user", "content": [*frame_parts(prompt, "ab"), {"type": "image"}]}]
    parts, images = normalize_messages(messages, ["c"])
    assert images == ["a", "b", "c"]
    laid = render(parts, [1, 1, 1], vicuna(), prompt, True)
    assert "Frame" not in vicuna().decode(laid.tokens.tolist())


@pytest.mark.parametrize(
    ("part", "says"),
    [({"video": None}, "a video is"), ({"video": "a.gif", "frames": 2.5}, "a whole number")],
)
def test_a_part_that_is_no_video(part, says):
    with pytest.raises(PromptError, match=says):
        tiny_vlm().tokenize([{"role": "user", "content": [{"type": "video", **part}]}])
    turn = {"role": "system", "content": [{"type": "video", "video": "a.gif"}]}
    with pytest.raises(PromptError, match="only a user message may hold videos"):
        tiny_vlm().tokenize([turn, {"role": "user", "content": "?"}])


def test_a_conversation_shows_a_video_and_goes_on(tmp_path):
    vlm = tiny_vlm(tiny_config())
    path = animation(tmp_path / "a.gif")
    chat = Conversation(vlm, max_tokens=4)
    assert len(chat.add_video(path, 3)) == 3 and chat.waiting == 3
    first = "".join(chunk.text for chunk in chat.ask("What?"))
    video = {"type": "video", "video": path, "frames": 3}
    question = {"role": "user", "content": [video, {"type": "text", "text": "What?"}]}
    assert vlm.generate([question], max_tokens=4).text == first and chat.waiting == 0
    chat.add(drawn(3))
    assert "".join(chunk.text for chunk in chat.retry()) == first and chat.waiting == 1
    then = [question, {"role": "assistant", "content": first}]
    then.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]})
    again = "".join(chunk.text for chunk in chat.ask("And?"))
    assert again == vlm.generate(then, [drawn(3)], max_tokens=4).text


def run(*words: object, code: int = 0, text: str | None = None) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], input=text)
    assert done.exit_code == code, done.output
    return done.output


def test_videos_through_the_commands(tmp_path):
    path = animation(tmp_path / "a.gif")
    said = run("chat", "--video", path, "--frames", 2, "-p", "What?", "--json", "--max-tokens", 4)
    said = json.loads(said.splitlines()[-1])
    assert said["videos"] == [str(path)] and said["images"] == []
    eight = json.loads(run("chat", "--video", path, "-p", "What?", "--json", "--max-tokens", 4))
    assert eight["prompt_tokens"] > said["prompt_tokens"]
    told = run(
        "chat", "--max-tokens", 2, text=f"/video {path}\n/images\nWhat?\n/save {tmp_path}/t.jsonl\n"
    )
    assert "(8 pictures for the next question)" in told and "`mlxvlm data frames` writes" in told
    assert "--frames is of a --video" in run("chat", "--frames", 2, "-p", "What?", code=2)
    wrong = ("chat", "--video", path, "--draw", tmp_path / "b.png", "-p", "What?")
    assert "--draw draws on pictures" in run(*wrong, code=2)
    words = ("data", "frames", path, "--out", tmp_path / "frames", "--frames", 2)
    row = json.loads(run(*words, "--answer", "A bar grows."))
    assert row["images"] == ["a-1.png", "a-2.png"]
    assert row["messages"][0]["content"] == "Frame1: <image>\nFrame2: <image>\nWhat happens?"
    assert [number_of(Image.open(tmp_path / "frames" / name)) for name in row["images"]] == [2, 7]
    assert "exists already" in run(*words, code=2)
