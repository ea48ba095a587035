"""What a validation tells: the best step so far, and what the model says of a few fixed rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.batching import MicroBatch
from ..data.feed import Feed
from ..data.samples import Sample
from ..language.generate import generate_tokens
from ..model import VLM
from .losses import visual_of

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

MAX_TOKENS = 64


@dataclass
class Best:
    """The validation with the lowest loss so far, and how many have passed since.

    rows: digest of the rows validated on; losses over other rows cannot be compared.
    """

    rows: str = ""
    step: int = 0
    val_loss: float = float("inf")
    stale: int = 0

    def see(self, step: int, val_loss: float) -> bool:
        """Whether a validation is the best so far."""
        if val_loss < self.val_loss:
            self.step, self.val_loss, self.stale = step, val_loss, 0
            return True
        self.stale += 1
        return False

    def state(self) -> dict[str, Any]:
        return asdict(self) if self.step else {"rows": self.rows}

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("rows") == self.rows:
            for name, value in state.items():
                setattr(self, name, value)


def sample_answers(vlm: VLM, feed: Feed, count: int, projected: bool) -> list[dict[str, Any]]:
    """Greedy answers to the first question of `count` rows, the same ones at every call.

    Each is {"question", "answer", "wanted"}: the last text before the answer, or the pictures'
    names where they stand alone; what the model says; what the row has. A document that begins with
    text asks nothing. projected: as for `batch_loss`.
    """
    places = np.linspace(0, len(feed.groups), count, endpoint=False).astype(int)
    found = []
    for place in dict.fromkeys(places.tolist()):
        sample = feed.groups[place].rows[0]
        if sample.supervised[:2].any():  # with or without BOS before it
            continue
        batch, pictures = feed.fetch(MicroBatch([[place]]))
        if batch is not None:
            found.append(_answer(vlm, feed, sample, pictures, projected))
    return found


def _answer(
    vlm: VLM, feed: Feed, sample: Sample, pictures: list[Any], projected: bool
) -> dict[str, Any]:
    tokenizer = vlm.tokenizer
    assert tokenizer is not None
    tokens, supervised = sample.tokens, sample.supervised
    start = int(np.argmax(supervised))
    stop = start + int(np.argmin(np.append(supervised[start:], False)))
    prompt, wanted = tokens[:start], tokens[start:stop]
    image = vlm.config.prompt.image_token_id
    # A later turn's pictures are not asked about yet.
    shown = sum(place < start for place, _ in sample.slots)
    cuts = [picture.cut for picture in pictures[:shown]]
    seen = feed.pictures.views(pictures[:shown])
    visual = None if seen is None else visual_of(vlm, seen, cuts, projected)
    ids = generate_tokens(
        vlm.language,
        prompt,
        vlm.splice(prompt[None], visual)[0],
        max_tokens=MAX_TOKENS,
        # The end as the layout has it: not every one ends with a token that ends all answers.
        stop_ids={*tokenizer.eos_token_ids, int(wanted[-1])},
        banned_ids=(image,),
        vocab_size=tokenizer.vocab_size,
    )
    return {
        "question": _question(tokenizer, prompt, image) or ", ".join(sample.images),
        "answer": tokenizer.decode(list(ids)).strip(),
        "wanted": tokenizer.decode(wanted.tolist()).strip(),
    }


def _question(tokenizer: Tokenizer, prompt: np.ndarray, image: int) -> str:
    """The last text of a prompt, pictures and the answer's own header left out."""
    ends = np.isin(prompt, [image, *tokenizer.control.values()])
    runs = np.split(prompt, np.flatnonzero(ends))
    texts = [tokenizer.decode(run[np.isin(run, prompt[~ends])].tolist()).strip() for run in runs]
    texts = [text for text in texts if text]
    if len(texts) > 1 and texts[-1] == "assistant":
        texts.pop()
    # The header of a turn without text, as a caption's is.
    return texts[-1] if texts and texts[-1] != "user" else ""
