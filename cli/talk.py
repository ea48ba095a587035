"""`mlxvlm chat`'s prompt loop: a conversation as the terminal has it, and its commands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlxvlm.cli.boundary import describe
from mlxvlm.cli.lines import Lines, dragged
from mlxvlm.errors import PictureError, UsageError

if TYPE_CHECKING:
    from mlxvlm.chat import Conversation
    from mlxvlm.cli.draw import Drawing
    from mlxvlm.reply import Chunk, Reply

HELP = """\
/image PATH...  show pictures; the next question is about them (quote a path with spaces).
                A picture dragged into the window is shown too.
/video PATH...  show videos or animations, as frames
/images         list the pictures shown
/retry [TEMP]   ask the last question again, at another temperature if you like
/system [TEXT]  another system message from now on; without TEXT, say what it is
/stats          tokens and times of the last answer
/save FILE      write the talk to a .jsonl file, as a row that training reads
/clear          forget the conversation and its pictures
/help           show this
/exit           leave, as Ctrl-D does
A question of several lines stands between two \"\"\", or has a \\ at its lines' ends.
Ctrl-C stops an answer and keeps the conversation."""

# For what the small model does not know: LLaVA-1.5 7B in 4 bits, ungated.
LARGER = "mlx-community/llava-1.5-7b-4bit"
LARGER_SIZE = "4 GB"


@dataclass
class Talk:
    """A conversation as the terminal has it.

    pictures: paths and URLs of what it shows. hints: whether no model was named, so that a refusal
    is to be followed, once, by a command that names one. last: the last answer. frames: of a video.
    videos: those among the pictures.
    """

    conversation: Conversation
    pictures: list[str]
    drawing: Drawing | None
    hints: bool
    last: Reply | None = None
    frames: int = 8
    videos: list[str] = field(default_factory=list)

    def ask(self, question: str, once: bool = False) -> None:
        self.say(self.conversation.ask(question), question if once else "")

    def say(self, chunks: Generator[Chunk, None, None], question: str = "") -> None:
        """Streams an answer to stdout, and does what else is done with an answer."""
        reply = self.last = _stream(chunks)
        if self.hints and reply.text.strip() == self.conversation.vlm.config.refusal != "":
            self.hints = False
            asked = ["-p", question] if question else []
            command = shlex.join(["mlxvlm", "chat", *self.pictures, *asked, "-m", LARGER])
            note(f"For photographs name a model ({LARGER_SIZE} to download): {command}")
        if self.drawing:
            self.drawing.answer(reply, self.pictures)

    def show(self, paths: list[str]) -> None:
        if self.drawing:
            self.drawing.check(paths)
        self.conversation.add(*paths)
        self.pictures = [*self.pictures, *paths]
        waiting = self.conversation.waiting
        note(f"({waiting} picture{'s' if waiting > 1 else ''} for the next question)")

    def show_videos(self, paths: list[str]) -> None:
        """Each as pictures that go by the video's name."""
        for path in paths:
            added = self.conversation.add_video(path, self.frames)
            self.pictures = [*self.pictures, *[path] * len(added)]
            self.videos.append(path)

    def clear(self) -> None:
        self.conversation.clear()
        self.pictures, self.videos = [], []
        self.last = None

    def row(self) -> dict[str, object]:
        """The talk so far, as a row of training data; pictures that no question shows stay out."""
        if self.videos:
            raise UsageError(
                f"this talk shows frames of {self.videos[0]}, which are no files that a row could "
                "name: `mlxvlm data frames` writes them as pictures."
            )
        shown = self.pictures[: len(self.pictures) - self.conversation.waiting]
        images = [path if "://" in path else str(Path(path).resolve()) for path in shown]
        return {"images": images, "messages": self.conversation.messages}


def _image(talk: Talk, rest: str) -> None:
    talk.show(_paths(rest, "/image", "/image cat.jpg 'my dog.png'"))


def _video(talk: Talk, rest: str) -> None:
    if talk.drawing:
        raise UsageError("--draw draws on pictures, and not on a video.")
    talk.show_videos(_paths(rest, "/video", "/video clip.gif"))
    note(f"({talk.conversation.waiting} pictures for the next question)")


def _paths(rest: str, command: str, example: str) -> list[str]:
    if not rest:
        raise PictureError(f"{command} wants at least one path: {example}")
    try:
        # Typed by hand, a path may hold a bare space or apostrophe: it is one if the file exists.
        paths = [rest] if Path(rest).expanduser().is_file() else shlex.split(rest)
    except ValueError:
        raise PictureError(f"the quotes in {rest!r} do not match.") from None
    return [checked(path) for path in paths]


def _images(talk: Talk, rest: str) -> None:
    waiting = talk.conversation.waiting
    first = len(talk.pictures) - waiting
    for i, path in enumerate(talk.pictures):
        note(f"{i + 1}  {path}{'  (for the next question)' if i >= first else ''}")
    if not talk.pictures:
        note("(no picture was shown; /image PATH shows one)")


def _retry(talk: Talk, rest: str) -> None:
    options = {}
    if rest:
        try:
            options["temperature"] = float(rest)
        except ValueError:
            raise UsageError(f"/retry takes a temperature or nothing, not {rest!r}.") from None
    talk.say(talk.conversation.retry(**options))


def _system(talk: Talk, rest: str) -> None:
    if rest:
        talk.conversation.set_system(rest)
        note("(from the next question on)")
    else:
        note(talk.conversation.system or "(the model's own; /system TEXT gives another)")


def _stats(talk: Talk, rest: str) -> None:
    reply = talk.last
    if reply is None:
        note("(no answer yet)")
        return
    speed = f" at {reply.generation_tps:.1f} tokens/s" if reply.generation_tps else ""
    note(
        f"({reply.generation_tokens} tokens{speed}; prompt {reply.prompt_tokens}, of which "
        f"{reply.reused_tokens} were read before; first token after "
        f"{reply.time_to_first_token_s:.2f} s; peak memory {reply.peak_memory_gb:.2f} GB)"
    )


def _save(talk: Talk, rest: str) -> None:
    path = Path(rest).expanduser()
    if not rest or path.suffix != ".jsonl":
        raise UsageError(f"/save wants a .jsonl file: /save talk.jsonl, not {rest!r}.")
    if not any(message["role"] == "assistant" for message in talk.conversation.messages):
        raise UsageError("there is no answer yet to save: ask a question first.")
    row = json.dumps(talk.row(), ensure_ascii=False)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(row + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    note(f"(one row added to {path}; `mlxvlm sft` and `lora` take it as --data)")


def _clear(talk: Talk, rest: str) -> None:
    talk.clear()
    note("(forgotten, pictures too)")


def _help(talk: Talk, rest: str) -> None:
    note(HELP)


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/image": _image,
    "/video": _video,
    "/images": _images,
    "/retry": _retry,
    "/system": _system,
    "/stats": _stats,
    "/save": _save,
    "/clear": _clear,
    "/help": _help,
}
LEAVE = ("/exit", "/quit")


def loop(talk: Talk) -> None:
    """Reads entries until /exit or the end of input; each is a command, pictures or a question."""
    lines = Lines((*COMMANDS, LEAVE[0]))
    if sys.stdin.isatty():
        note("/help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            line = lines.read()
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return
        except KeyboardInterrupt:
            note("\n(/exit or Ctrl-D leaves)")
            continue
        if line.partition(" ")[0] in LEAVE:
            return
        try:
            _enter(talk, line)
        except KeyboardInterrupt:
            note("(stopped)")
        except Exception as error:
            # What a user can mend ends the turn, not the conversation.
            if (message := describe(error)) is None:
                raise
            note(f"mlxvlm: error: {message}")


def _enter(talk: Talk, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command in COMMANDS:
        COMMANDS[command](talk, rest.strip())
        return
    pictures, question = dragged(line, _is_picture)
    if pictures:
        talk.show(pictures)
        line = question
    elif command.startswith("/") and not line.startswith("//") and "/" not in command[1:]:
        note(f"There is no command {command}; /help lists them.")
        return
    if line:
        talk.ask(line)


def _is_picture(path: Path) -> bool:
    from mlxvlm.data.sources import PICTURE_SUFFIXES

    try:
        return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    except (OSError, ValueError):
        return False  # longer than a name may be, or with a NUL: no path


def _stream(chunks: Generator[Chunk, None, None]) -> Reply:
    """Streams an answer to stdout and ends its line, also where it is cut short."""
    reply = None
    with closing(chunks):
        try:
            for chunk in chunks:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                reply = chunk.reply
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
    assert reply is not None  # the last chunk carries it
    return reply


def checked(image: str) -> str:
    """A picture's path, known to exist before a model is loaded for it; a URL as it is."""
    if "://" in image:
        return image
    path = Path(image).expanduser()
    if not path.exists():
        raise PictureError(f"there is no picture {image}.")
    return str(path)


def note(text: str) -> None:
    typer.echo(text, err=True)
