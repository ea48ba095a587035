"""A conversation about pictures.

chat = Conversation(vlm)
chat.add("cat.jpg")
for chunk in chat.ask("What is this?"):
    print(chunk.text, end="")
for chunk in chat.ask("What colour is it?"):  # the encoder does not run again
    ...
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .errors import PromptError
from .frames import frame_parts, frames_of
from .images.picture import Features, Picture
from .images.tiling import tiles_each
from .images.video import FRAMES
from .reply import Chunk, answer
from .reuse import Reuse

if TYPE_CHECKING:
    from .model import VLM


class Conversation:
    """Messages and pictures, turn after turn.

    A picture is encoded once, by content: shown again, or in a later turn, its features are reused.
    A turn reads only what is new since the last one. Answers are those of
    `vlm.generate(chat.messages, chat.pictures)` at each turn.

    system: what the system message says; empty means the layout's default.
    reuse: what is kept between turns, where conversations share it or an embedding cache serves
        pictures; by default one of its own.
    options: as in `reply.stream`, for every question unless `ask` says otherwise.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        system: str = "",
        allow_urls: bool = False,
        reuse: Reuse | None = None,
        **options: Any,
    ):
        self.vlm = vlm
        self._own = reuse is None
        self.reuse = reuse or Reuse(vlm)
        self.system = system
        self.allow_urls = allow_urls
        self.options = options
        self.clear()

    def clear(self) -> None:
        """Forgets messages and pictures, and what it alone has kept of them; the system message
        and options stay."""
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.pictures: list[Picture | Features] = []
        self._places: list[dict[str, Any]] = []  # of the pictures that wait for a question
        self._tries = 0  # of the last question, beyond the first
        if self._own:
            self.reuse.clear()

    def set_system(self, text: str) -> None:
        """Another system message, from the next question on; what was said so far stays."""
        if self.system:
            del self.messages[0]
        self.system = text
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def add(self, *images: Any) -> list[Picture | Features]:
        """Opens pictures for the next question: what `vlm.look` takes, or Picture or Features.

        All of them or, if one cannot be read, none. They share the tiling's budget, as those of one
        row of data; what was added before keeps its tiles.
        """
        limit = tiles_each(self.vlm.config.tiling, len(images))
        added = [
            image
            if isinstance(image, (Picture, Features))
            else self.reuse.look([image], limit, self.allow_urls)[0]
            for image in images
        ]
        self.pictures += added
        self._places += [{"type": "image"} for _ in added]
        return added

    def add_video(self, source: Any, frames: int = FRAMES) -> list[Picture | Features]:
        """Shows a video with the next question: a path or bytes of an animation, or of a video file
        (which takes PyAV), as at most so many frames of one view each."""
        added: list[Any] = frames_of(source, frames, self.reuse.look)
        self.pictures += added
        for part in frame_parts(self.vlm.config.prompt, added):
            self._places.append(part if part["type"] == "text" else {"type": "image"})
        return added

    @property
    def waiting(self) -> int:
        """How many of the last pictures no question has been asked about yet."""
        return sum(place["type"] == "image" for place in self._places)

    def ask(self, text: str, **options: Any) -> Generator[Chunk, None, None]:
        """Asks, and yields the answer as `vlm.stream` does.

        The turn is kept as far as its answer got: closed early, the words so far stand as the
        answer, and a question that got none is forgotten while its pictures go on waiting.
        """
        started = time.perf_counter()
        if not text.strip() and not self._places:
            raise PromptError("there is no question: give a text, a picture, or both.")
        parts = list(self._places)
        if text:
            parts.append({"type": "text", "text": text})
        question = {"role": "user", "content": parts}
        prompt = self.vlm.tokenize(
            [*self.messages, question], self.pictures, add_generation_prompt=True
        )
        options = {**self.options, **options}
        self._tries = 0
        chunks = answer(self.vlm, prompt, reuse=self.reuse, started=started, **options)
        return self._kept(question, chunks)

    def retry(self, **options: Any) -> Generator[Chunk, None, None]:
        """Asks the last question again, in the place of its answer.

        Pictures that were added since go on waiting. Closed before any word came, the earlier
        answer stands. With a seed, each try draws with the next one; greedy decoding
        (temperature 0) gives the same answer again.
        """
        started = time.perf_counter()
        if len(self.messages) < 2:
            raise PromptError("there is no answer yet to try again: ask a question first.")
        messages, question = self.messages[:-2], self.messages[-2]
        waiting = self.waiting
        pictures = self.pictures[: len(self.pictures) - waiting]
        prompt = self.vlm.tokenize([*messages, question], pictures, add_generation_prompt=True)
        options = {**self.options, **options}
        self._tries += 1
        if options.get("seed") is not None:
            options["seed"] += self._tries
        chunks = answer(self.vlm, prompt, reuse=self.reuse, started=started, **options)
        return self._kept(question, chunks, instead=True)

    def _kept(
        self, question: dict[str, Any], chunks: Generator[Chunk, None, None], instead: bool = False
    ) -> Generator[Chunk, None, None]:
        messages = self.messages  # clear() starts another list: a stream still open leaves it alone
        pieces: list[str] = []
        done = False
        try:
            with closing(chunks):
                for chunk in chunks:
                    pieces.append(chunk.text)
                    done = chunk.reply is not None
                    yield chunk
        finally:
            text = "".join(pieces)
            if (done or text) and messages is self.messages:
                turn = [question, {"role": "assistant", "content": text}]
                if instead:
                    messages[-2:] = turn
                else:
                    messages += turn
                    self._places = []
