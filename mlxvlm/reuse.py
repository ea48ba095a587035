"""What a model has computed and need not compute again: features by a picture's content, and the
keys and values of prompts by their tokens and pictures.

reuse = mlxvlm.Reuse(vlm)
vlm.generate([{"role": "user", "content": "What is this?"}], ["cat.jpg"], reuse=reuse)
vlm.generate([{"role": "user", "content": "What colour?"}], ["cat.jpg"], reuse=reuse)
# The second call runs no encoder, and reads the tokens of its question alone.

Answers are those of a fresh call, up to the rounding of float32 (or of the model's dtype): the
same sums in other pieces. Conversation has one of its own; conversations may share one.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .cache.format import plan_of
from .images.open import sha256_file
from .images.picture import Features, Picture
from .language.kv import KVSettings, copied, cut, is_free, make_caches
from .language.load import translate
from .machine.limits import memory_size
from .prefixes import TAIL, Place, Prefixes
from .prompt_cache import PromptCache
from .vision.encoder import same_arrays, tensors_of

if TYPE_CHECKING:
    from .cache import EmbeddingCache
    from .model import VLM
    from .prompts import Prompt

# Of this computer's memory: what prefixes may take, and what features may.
PREFIX_SHARE = 0.1
FEATURE_SHARE = 0.02


class Reuse:
    """Of one model, in memory, the parts used last within `limit` bytes.

    limit: bytes of keys and values (a tenth of the computer's memory by default); 0 keeps none.
    cache: an embedding cache whose pictures are not encoded here, nor decoded; CacheError if
        another encoder made it.
    disk: prefixes are kept there too, for other runs.

    New weights in the model, or an adapter, make all of it forgotten at the next question; weights
    that change inside their arrays are not noticed (call `clear`).
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        limit: int | None = None,
        cache: EmbeddingCache | None = None,
        disk: PromptCache | None = None,
    ):
        self.vlm = vlm
        self.cache = cache
        self.disk = disk
        if cache is not None:
            encoder = vlm.projected_encoder if cache.projected else vlm.encoder
            cache.require(encoder.identity())
        self.prefixes = Prefixes(int(PREFIX_SHARE * memory_size()) if limit is None else limit)
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._most = int(FEATURE_SHARE * memory_size())
        self._weights: list[mx.array] = []
        self._pure = pure_length(vlm.config.language)

    def clear(self) -> None:
        """Forgets everything but what is on disk."""
        self.prefixes.clear()
        self._features.clear()

    def look(
        self, images: Sequence[Any], max_tiles: int | None = None, allow_urls: bool = False
    ) -> list[Picture | Features]:
        """As `vlm.look`; a file whose content is in the embedding cache is not even decoded."""
        return [self._look(image, max_tiles, allow_urls) for image in images]

    def features(self, pictures: Sequence[Picture | Features]) -> list[Features]:
        """Features of pictures, from memory where their content has been seen."""
        new = {
            content_of(picture): picture
            for picture in pictures
            if isinstance(picture, Picture) and content_of(picture) not in self._features
        }
        found: dict[str, Features] = {}
        if new:
            features = self.vlm.features(list(new.values()))
            # Now, not lazily with the prompt: the tower's memory is free before the prefill.
            mx.eval([view for item in features for view in item.views])
            found = dict(zip(new, features, strict=True))
        out: list[Features] = []
        for picture in pictures:
            if isinstance(picture, Features):
                out.append(picture)
                continue
            key = content_of(picture)
            if key not in found:
                found[key] = self._features[key]
            out.append(found[key])
        for key, features in found.items():
            self._features[key] = features
            self._features.move_to_end(key)
        while self._features and sum(map(_nbytes, self._features.values())) > self._most:
            self._features.popitem(last=False)
        return out

    def check_weights(self) -> None:
        """Forgets what other weights have computed."""
        arrays = [x for _, x in tensors_of(self.vlm)]
        if not same_arrays(arrays, self._weights):
            self.clear()
            self._weights = arrays
            if self.disk is not None:
                self.disk.bind(self.vlm)

    def take(
        self, tokens: np.ndarray, places: list[Place], kv: KVSettings, most: int
    ) -> tuple[list[Any], int] | None:
        """As `Prefixes.take`, from memory, or from disk where that knows clearly more."""
        if self.disk is not None:
            known = self.prefixes.reach(tokens, places, kv, most)[0]
            found = self.disk.take(tokens, places, kv, most, known + TAIL)
            if found is not None:
                return found
        return self.prefixes.take(tokens, places, kv, most)

    def put(
        self,
        tokens: np.ndarray,
        places: list[Place],
        kv: KVSettings,
        caches: list[Any],
        ends: Sequence[int] = (),
    ) -> None:
        """Keeps a state; on disk also as it was at `ends`."""
        self.prefixes.put(tokens, places, kv, caches)
        if self.disk is not None:
            self.disk.put(tokens, places, kv, caches, ends)

    def usable(self, prompt: Prompt, kv: KVSettings) -> bool:
        """Whether what a prompt's tokens leave behind hangs on the tokens before them alone."""
        limits = [limit for limit in (kv.max_size, self._pure) if limit is not None]
        return len(prompt) <= min(limits, default=len(prompt))

    def _look(self, image: Any, max_tiles: int | None, allow_urls: bool) -> Picture | Features:
        if isinstance(image, (Picture, Features)):
            return image
        if self.cache is not None and isinstance(image, str | os.PathLike):
            if "://" not in str(image):
                found = self._cached(sha256_file(image), max_tiles)
                if found is not None:
                    return found
        picture = self.vlm.look([image], max_tiles, allow_urls)[0]
        if self.cache is not None and picture.sha256 is not None:
            return self._cached(picture.sha256, max_tiles) or picture
        return picture

    def _cached(self, sha256: str, max_tiles: int | None) -> Features | None:
        assert self.cache is not None
        return self.cache.find(sha256, plan_of(max_tiles))


class Reading:
    """One prompt on its way through the decoder: what of it is known, and what it leaves behind.

    start: how many of its tokens `caches` hold already. embeddings: [L - start, D], of the others.
    pauses: where the prefill should stop and call `pause`.
    """

    def __init__(self, vlm: VLM, prompt: Prompt, kv: KVSettings, reuse: Reuse | None):
        self.prompt, self.kv = prompt, kv
        self.start = 0
        self.pauses: list[int] = []
        pictures = prompt.pictures
        taken = None
        self._reuse = reuse if reuse is not None and reuse.usable(prompt, kv) else None
        if reuse is not None:
            reuse.check_weights()
        if self._reuse is not None:
            starts = [start for start, _ in prompt.slots]
            contents = [content_of(picture) for picture in pictures]
            self.places: list[Place] = list(zip(starts, contents, strict=True))
            # The last token is read in any case: its logits are the answer's first word.
            most = len(prompt) - 1
            taken = self._reuse.take(prompt.tokens, self.places, kv, most)
        self.caches, self.start = taken or (make_caches(vlm.language, kv), 0)
        self._free = is_free(self.caches)
        self._known = self.start  # tokens that every layer has taken in, whatever happens
        self._settled = True
        self._answer: list[int] = []
        self._paused: list[tuple[int, list[Any]]] = []
        self._ends = [start + length for start, length in prompt.slots]
        try:
            if reuse is not None:
                each = zip(pictures, self._ends, strict=True)
                needed = [picture for picture, end in each if end > self.start]
                pictures = [*pictures[: len(pictures) - len(needed)], *reuse.features(needed)]
                if self._reuse is not None and not self._free:
                    self.pauses = sorted({*self._ends[-1:], len(prompt) - 1})
            self.embeddings = vlm.embed_after(prompt.tokens, pictures, self.start)
            mx.eval(self.embeddings)
        except BaseException:
            self.close()  # what was handed over goes back
            raise

    def pause(self, at: int) -> None:
        """Copies a state that cannot be cut back to, for other questions and retries."""
        self._known = at
        self._paused.append((at, copied(self.caches)))

    def follow(self, ids: Iterator[int]) -> Iterator[int]:
        """The ids as they come, noting what the decoder has surely taken in."""
        while True:
            # Until a token is here, layers may differ in what they hold: Ctrl-C may fall between.
            self._settled = False
            token = next(ids, None)
            self._settled = True
            if token is None:
                return
            self._answer.append(token)
            self._known = len(self.prompt) + len(self._answer)
            yield token

    def close(self) -> None:
        """Keeps the prompt and its answer as far as they got."""
        if self._reuse is None or not self._known:
            return
        tokens = np.concatenate([self.prompt.tokens, np.array(self._answer, np.int32)])
        states: list[tuple[int, list[Any] | None]] = list(self._paused)
        if self._free:
            states.append((self._known, cut(self.caches, self._known, self._known)))
        elif self._settled and self._answer:
            states.append((self._known, self.caches))
        for length, caches in states:
            overwritten = self.kv.max_size is not None and length >= self.kv.max_size
            if caches is not None and not overwritten:
                self._reuse.put(tokens[:length], self.places, self.kv, caches, self._ends)


def content_of(picture: Picture | Features) -> str:
    """What a picture's embeddings depend on: its content or its features, and how it is cut."""
    digest = picture.sha256
    if digest is None or isinstance(picture, Features):
        hashed = hashlib.sha256()
        for view in picture.views:
            hashed.update(_bits(view))
        digest = hashed.hexdigest()
    shapes = tuple((tuple(v.shape), str(v.dtype)) for v in picture.views)
    kind = "picture" if isinstance(picture, Picture) else f"features {picture.projected}"
    return f"{kind} {digest} {tuple(picture.cut)} {shapes}"


def _bits(view: Any) -> Any:
    if isinstance(view, mx.array):
        # NumPy has no bfloat16, and bits are what is asked for.
        view = view.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[view.itemsize])
    return np.ascontiguousarray(np.array(view)).data


def _nbytes(features: Features) -> int:
    return sum(view.nbytes for view in features.views)


def pure_length(language: dict[str, Any]) -> int | None:
    """Up to which length a token's keys are those of its own position; None: always.

    Dynamic NTK turns all positions otherwise once a text outgrows the trained length.
    """
    config = translate(language)
    config = config.get("text_config", config)
    scaling = config.get("rope_scaling") or {}
    if "dynamic" in (scaling.get("type"), scaling.get("rope_type")):
        return int(config.get("max_position_embeddings") or 2048)
    return None
