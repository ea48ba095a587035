"""Reading a cache: features by a picture's name or content, checked at every read."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import TilingConfig
from ..errors import CacheError
from .about import differences, plain, read_about
from .format import PLAN, Row, Source, source_name, told
from .index import Index, IndexDamaged, Totals
from .parts import is_part
from .records import OpenShards
from .verify import Problem, lost_names, verify_shards

if TYPE_CHECKING:
    from ..images.picture import Cut, Features
    from .codecs import Codec
    from .packed import PackedFeatures

_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


class EmbeddingCache:
    """A folder of features: `cache["a.jpg"]` or `cache[sha256]` -> Features.

    Views are NumPy float32 [tokens, width], whatever the codec. Names are as in the data, relative
    to the folder of images; a name given as an absolute path is looked up as it is, then relative
    to `images`. Reads may come from any thread and in any order. len() counts pictures, a picture
    under ten names once; iteration gives their sha256.
    """

    def __init__(self, folder: str | Path, images: str | Path | None = None):
        self.folder = Path(folder)
        self.images = Path(images) if images is not None else None
        self.meta: dict[str, Any] = read_about(self.folder)
        self._index: Index | None = Index.open(self.folder, self.meta)
        self._checked = False  # whether the index has been read whole
        self._lock = threading.Lock()
        self._shards = OpenShards(self.folder)

    @classmethod
    def open(cls, folder: str | Path, images: str | Path | None = None) -> EmbeddingCache:
        """Opens a cache; CacheError if there is none, or a newer release wrote it."""
        return cls(folder, images)

    def close(self) -> None:
        with self._lock:
            index, self._index = self._index, None
        self._shards.close()
        if index:
            index.close()

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker opens the cache for itself.
        return EmbeddingCache, (self.folder, self.images)

    @cached_property
    def codec(self) -> Codec:
        from .codecs import codec_named

        return codec_named(self.meta.get("codec"))

    @property
    def projected(self) -> bool:
        """Whether the features are what the language model sees (`--at projector`)."""
        return self.meta.get("encoder", {}).get("at") == "projector"

    # Lookups

    def __len__(self) -> int:
        return self.totals().pictures

    def __iter__(self) -> Iterator[str]:
        return self._pages(lambda index, after: index.pictures(after))

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str | Path):
            return False
        label = str(key)
        sources = self._sure(lambda index: self._named(index, label))
        plans = [PLAN, *(s.plan for s in sources if s.sha256 and s.plan != PLAN)]
        return any(self._find(label, plan) for plan in plans)

    def __getitem__(self, key: str | Path) -> Features:
        return self.get(key)

    def get(self, key: str | Path, plan: str = PLAN) -> Features:
        """A picture's features under a tiling plan (`format.plan_of`)."""
        from ..images.picture import Features

        packed = self.packed(key, plan)
        return Features(
            packed.decode(), packed.grid, packed.size, packed.sha256, projected=self.projected
        )

    def find(self, key: str | Path, plan: str = PLAN) -> Features | None:
        """As `get`, but None for a picture that is not in the cache, or could not be cached."""
        return self.get(key, plan) if self._find(str(key), plan) else None

    def packed(self, key: str | Path, plan: str = PLAN) -> PackedFeatures:
        """A picture's records, checked but not decoded: for `unpack` to decode on the device."""
        from .packed import PackedFeatures

        label = str(key)
        number, row = self._found(label, plan)
        shard = self._shards.open(number)
        records = [shard.read(view, label) for view in row.views]
        codec = self._shards.codec(shard) if self.codec.whitened else self.codec
        shapes = [view.shape for view in row.views]
        return PackedFeatures(codec, records, shapes, row.grid, row.size, row.sha256)

    def cut(self, key: str | Path, plan: str = PLAN) -> Cut:
        """How a picture is cut under a tiling plan, without reading its views."""
        from ..images.picture import Cut

        row = self._found(str(key), plan)[1]
        return Cut(len(row.views), row.grid, row.size)

    def sha256_of(self, key: str | Path) -> str:
        """The content of the picture that a name stands for."""
        sources = self._sure(lambda index: self._named(index, str(key)))
        found = [source.sha256 for source in sources if source.sha256]
        if not found:
            raise CacheError(self._missing(str(key), PLAN))
        return found[0]

    def names(self) -> Iterator[str]:
        """Every name of the input, those of failures included."""
        return self._pages(lambda index, after: index.names(after))

    def failures(self) -> list[tuple[str, str]]:
        """(name, reason) of the pictures that could not be cached."""
        return [(told(s), s.reason) for s in self._sure(lambda index: index.failures())]

    def damaged_shards(self) -> list[str]:
        """What is wrong with shards that cannot be read at all; `verify` looks deeper."""
        return list(self._sure(lambda index: index.problems()).values())

    def totals(self) -> Totals:
        """How much the cache holds."""
        return self._sure(lambda index: index.totals())

    def require(self, identity: dict[str, Any]) -> None:
        """CacheError unless the features are those of the encoder with this identity."""
        self._require(self.meta.get("encoder", {}), plain(identity))

    def require_tiling(self, tiling: TilingConfig) -> None:
        """The same of the views alone, where there is no encoder to ask."""
        theirs = self.meta.get("encoder", {})
        ours = {f"tiling.{name}": value for name, value in tiling.identity().items()}
        self._require({k: v for k, v in theirs.items() if k.startswith("tiling.")}, plain(ours))

    def _require(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        different = differences(theirs, ours)
        if not different:
            return
        way_out = "Use the encoder that made it, or make a cache with this one in another folder."
        resize = ours.get("tiling.resize")
        if resize and resize != theirs.get("tiling.resize"):
            way_out = (
                f"Stages that resize pictures otherwise need a cache each: mlxvlm cache-embeddings "
                f"--resize {resize} makes this one's, in another folder."
            )
        raise CacheError(
            f"{self.folder} was made by another encoder; they differ in {'; '.join(different)}. "
            + way_out
        )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Reads everything, and says what is damaged, naming pictures and shards."""
        problems = verify_shards(self.folder, self.meta, progress)
        self._sure(lambda index: index.check())
        return problems + lost_names(self._lost(elsewhere=False))

    def elsewhere(self) -> list[str]:
        """Names of pictures that the parts before this one have, of a cache that is a part."""
        return [told(source) for _, source in self._lost(elsewhere=True)]

    # Inside

    def _lost(self, elsewhere: bool) -> list[tuple[int, Source]]:
        """Names without features: of a part, those that sound shards have are elsewhere."""
        lost = self._sure(lambda index: index.lost())
        damaged = self._sure(lambda index: index.problems())
        part = is_part(self.folder)
        return [one for one in lost if (part and one[0] not in damaged) == elsewhere]

    def _found(self, key: str, plan: str) -> tuple[int, Row]:
        found = self._find(key, plan)
        if found is None:
            raise CacheError(self._missing(key, plan))
        return found

    def _find(self, key: str, plan: str = PLAN) -> tuple[int, Row] | None:
        found = self._sure(lambda index: self._search(index, key, plan))
        if found is None and not self._checked:
            # A damaged key hides its row: a miss is believed once the index was read whole.
            self._sure(lambda index: index.check())
            self._checked = True
            found = self._sure(lambda index: self._search(index, key, plan))
        return found

    def _search(self, index: Index, key: str, plan: str) -> tuple[int, Row] | None:
        if _SHA256.fullmatch(key):
            found = index.picture(key, plan)
            if found:
                return found
        # A name of one plan leads to the content, which another name may have under this one.
        for source in sorted(self._named(index, key), key=lambda s: s.plan != plan):
            found = index.picture(source.sha256, plan) if source.sha256 else None
            if found:
                return found
        return None

    def _named(self, index: Index, key: str) -> list[Source]:
        found = index.named(source_name(key))
        if not found and self.images is not None:
            found = index.named(source_name(key, self.images))
        return found

    def _missing(self, key: str, plan: str) -> str:
        sources = self._sure(lambda index: self._named(index, key))
        failed = [s for s in sources if s.sha256 is None]
        damaged = self.damaged_shards()
        for source in failed:
            if source.plan == plan or len(failed) == len(sources):
                return f"{key} could not be cached in {self.folder}: {source.reason}."
        if damaged:
            return f"{key} is not to be found in {self.folder}, and {damaged[0]}"
        if key in self:
            return (
                f"{key} is in the cache {self.folder}, but not under the tiling plan {plan!r}, "
                "which depends on how many pictures are in its row: run `mlxvlm cache-embeddings` "
                "with these rows too."
            )
        return (
            f"{key} is not in the cache {self.folder}: run `mlxvlm cache-embeddings` with data "
            "that name it (names are relative to --images), or leave its rows out."
        )

    def _sure(self, ask: Callable[[Index], T]) -> T:
        """Asks the index; one that turns out to be damaged is rebuilt first."""
        index = self._need_index()
        try:
            return ask(index)
        except IndexDamaged:
            pass
        with self._lock:
            if self._index is index:
                index.close()
                self._index = Index.open(self.folder, self.meta, distrust=True)
        return ask(self._need_index())

    def _pages(self, ask: Callable[[Index, str], list[str]]) -> Iterator[str]:
        page = self._sure(lambda index: ask(index, ""))
        while page:
            yield from page
            last = page[-1]
            page = self._sure(lambda index, last=last: ask(index, last))

    def _need_index(self) -> Index:
        if self._index is None:
            raise CacheError(f"the cache {self.folder} was closed; open it again to read from it.")
        return self._index
