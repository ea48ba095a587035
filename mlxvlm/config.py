"""A model is five choices: tiling, vision, projector, prompt, language.

    picture -> TILING -> VISION -> PROJECTOR -> (PROMPT layout) -> LANGUAGE MODEL -> text

Each is one dataclass here and one object in `config.json`. Field names are Hugging Face's where it
has one. `language` stays a plain dict: it is the language model's own config.json, for mlx-lm.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError

MODEL_TYPE = "mlxvlm"
FORMAT_VERSION = 1
# Poolings of a view's square of tokens, and the side of the cells that they work on.
POOLS = {"none": 1, "mean2": 2, "concat2": 2, "concat2_columns": 2, "concat3": 3}
# A patch embedding layer in the stead of a vision encoder.
EVE = "eve_patch_embedding"
# Vision towers whose first token stands for the whole view.
CLASS_TOKENS = ("clip_vision_model", "internvl_vision")
# Projectors that take views of any grid, and give the same number of tokens for each.
TAKE_GRIDS = ("resampler", "spatial_resampler")
# Vision towers that may take views of any height and width.
TAKE_ANY_GRID = ("siglip_vision_model", "clip_vision_model", EVE)
# What a tower does with its table of learned positions; views of any grid go with all but "fixed".
POSITIONS = ("fixed", "buckets", "bicubic", "none")
# Projectors that give so many tokens a view, whatever the encoder gives them.
NUM_QUERY_TOKENS = {"c_abstractor": 144, "resampler": 96, "spatial_resampler": 144}
# Of these, those whose tokens are a square of them.
SQUARE = ("c_abstractor", "spatial_resampler")
PROJECTORS = ("attention", "mlp", *NUM_QUERY_TOKENS)
# Merges, and the tilings that each lays out; none: all of them.
LAYS_OUT: dict[str, tuple[str, ...]] = {
    "flat": (),
    "spatial_unpad": ("anyres",),
    "minicpm": ("slices",),
    "uhd": ("slices",),
    "separators": ("dynamic", "cover"),
    "index": ("dynamic", "cover"),
    "rows": ("whole",),
}

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

T = TypeVar("T")


@dataclass
class TilingConfig:
    """How a picture becomes views, as `images.tiling` does it.

    type: "single" (the whole picture is one view), "dynamic" (a grid of tiles close to the
        picture's aspect ratio, as InternVL), "anyres" (the whole, and a canvas of tiles with the
        picture in its middle, as LLaVA-NeXT), "slices" (an overview and a grid of slices, in the
        shapes that they have, as MiniCPM-V and LLaVA-UHD), "cover" (a canvas that covers the
        picture, and the whole behind it, of rows with fewer than three pictures, as MM1.5), "whole"
        (one view in the picture's own shape, as EVE) or "centred" (the same on a square canvas, for
        EVE's teacher).
    image_size: side of a view in pixels; of slices, the square root of about their pixels; of the
        whole, its long side.
    patch_size: what the sides of slices are multiples of, in pixels.
    cells: of "whole" and "centred", what the long side is divided into; the short one has a whole
        number of them.
    rounding: how slices come to such sides: "nearest" (MiniCPM-V) or "down" (LLaVA-UHD).
    resize: "squash" (both sides to image_size, as SigLIP), "crop" (shortest side to image_size,
        then the centre square, as CLIP), "pad" (a square canvas of `background`, as LLaVA-1.5).
        Of several views, the whole and dynamic tiles are squashed; "cover" pads everything.
    resample: "bicubic" or "bilinear" (Pillow's antialiased filters).
    background: RGB of the padding, 0-255.
    min_tiles, max_tiles: of a grid; the pictures of one row share a dynamic grid's max_tiles.
    use_thumbnail: whether the whole picture follows its tiles ("dynamic", "cover") as one more
        view, if it has several.
    grids: (columns, rows) that "anyres" and "cover" choose from, the first of equals: LLaVA-NeXT's
        pinpoints in tiles, MM1.5's static 2x2; empty means every grid of min_tiles to max_tiles, as
        LLaVA-1.5-HD and MM1.5's dynamic splitting.
    """

    type: str = "single"
    image_size: int = 384
    resize: str = "squash"
    resample: str = "bicubic"
    background: tuple[int, int, int] = (127, 127, 127)
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    grids: tuple[tuple[int, int], ...] = ()
    patch_size: int = 14
    rounding: str = "nearest"
    cells: int = 24

    def __post_init__(self) -> None:
        self.background = tuple(self.background)  # type: ignore[assignment]
        kinds = ("single", "dynamic", "anyres", "slices", "cover", "whole", "centred")
        _one_of("tiling.type", self.type, kinds)
        _one_of("tiling.resize", self.resize, ("squash", "crop", "pad"))
        _one_of("tiling.resample", self.resample, ("bicubic", "bilinear"))
        _one_of("tiling.rounding", self.rounding, ("nearest", "down"))
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"tiling.min_tiles (={self.min_tiles}) and tiling.max_tiles (={self.max_tiles}) "
                "must be at least 1, the first at most the second."
            )
        if self.varied and not 1 <= self.patch_size <= self.image_size:
            raise ConfigError(
                f"tiling.patch_size (={self.patch_size}) must lie between 1 and tiling.image_size "
                f"(={self.image_size})."
            )
        way = "pad" if self.type == "cover" else "squash"
        if self.type != "single" and self.resize != way:
            raise ConfigError(
                f"tiling.resize (={self.resize!r}) must be {way!r} for {self.type} tiles."
            )
        self._set_grids()
        # A cell is one token of 2 x 2 patches, or several.
        unit = 2 * self.patch_size if self.type == "whole" else 1
        if self.type in ("whole", "centred") and (
            self.cells < 1 or self.image_size % (self.cells * unit)
        ):
            raise ConfigError(
                f"tiling.image_size (={self.image_size}) must be a multiple of tiling.cells "
                f"(={self.cells}){f' x {unit} pixels' if unit > 1 else ''} for {self.type!r}."
            )

    def _set_grids(self) -> None:
        try:
            self.grids = tuple((columns, rows) for columns, rows in self.grids)
            good = all(type(n) is int and n > 0 for grid in self.grids for n in grid)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ConfigError(
                f"tiling.grids (={self.grids!r}) must be pairs of whole numbers from 1 up, columns "
                "and rows."
            )
        if self.grids and self.type not in ("anyres", "cover"):
            raise ConfigError(
                f"tiling.grids belong to 'anyres' and 'cover' tiles, not to {self.type!r}."
            )
        if self.grids:
            tiles = [columns * rows for columns, rows in self.grids]
            self.min_tiles, self.max_tiles = min(tiles), max(tiles)

    @property
    def varied(self) -> bool:
        """Whether views differ in height and width."""
        return self.type in ("slices", "whole")

    def resized(self, resize: str, image_mean: tuple[float, ...]) -> TilingConfig:
        """The same with another `resize`; a padded canvas has the encoder's mean colour."""
        background = tuple(int(255 * value) for value in image_mean[:3])
        padded = {"background": background} if resize == "pad" else {}
        return dataclasses.replace(self, resize=resize, **padded)

    def identity(self) -> dict[str, Any]:
        """The fields that views depend on, as plain JSON values."""
        of_tiles = ("min_tiles", "max_tiles", "use_thumbnail", "grids")
        of_shapes = ("patch_size", "rounding", "cells")
        unused = {
            "single": (*of_tiles, *of_shapes),
            "dynamic": ("resize", "background", "grids", *of_shapes),
            "anyres": ("resize", "use_thumbnail", *of_shapes),
            "slices": ("resize", "background", "min_tiles", "use_thumbnail", "grids", "cells"),
            "cover": ("resize", *of_shapes),
            "whole": ("resize", "background", "rounding", *of_tiles),
            "centred": ("resize", "patch_size", "rounding", *of_tiles),
        }[self.type]
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in unused}
        return json.loads(json.dumps(fields))


# Tilings by the names that `mlxvlm build` has for them: the fields of each, which say how views
# are resized whatever the encoder of its own does to a picture.
TILINGS: dict[str, dict[str, Any]] = {
    "single": {"type": "single"},
    "dynamic": {"type": "dynamic", "resize": "squash"},
    "anyres": {
        "type": "anyres",
        "resize": "squash",
        "background": (0, 0, 0),
        "grids": ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)),
    },
    "anyres-hd": {
        "type": "anyres",
        "resize": "squash",
        "background": (0, 0, 0),
        "max_tiles": 6,
    },
    "slices": {"type": "slices", "resize": "squash", "max_tiles": 9},
    "slices-uhd": {"type": "slices", "resize": "squash", "max_tiles": 7, "rounding": "down"},
    # MM1.5's two: 4 to 9 tiles in training (9 of 672 pixels are 4 million), and always four.
    "cover": {"type": "cover", "resize": "pad", "min_tiles": 4, "max_tiles": 9},
    "cover-2x2": {"type": "cover", "resize": "pad", "grids": ((2, 2),)},
}


@dataclass
class VisionConfig:
    """A vision tower. Defaults are SigLIP-So400m/14 at 384 pixels.

    vision_feature_layer: which hidden state feeds the projector, counted as transformers does:
        0 the embeddings, -1 the last block's output, -2 the one before it.
    vision_feature_norm: whether the tower's final LayerNorm follows (`post_layernorm`).
    vision_feature_select_strategy: "full" (every token) or "default" (drop the first: CLIP's class
        token, and on SigLIP, as transformers does, a patch).
    vision_use_head: whether the checkpoint carries SigLIP's attention-pooling head.
    positions: how views get learned positions: "fixed" (all are image_size squares, a position for
        each patch), or views of any grid, from a square table: "buckets" (a patch has the entry at
        its share of the height and width, as NaViT and Idefics2) or "bicubic" (the table is resized
        to the view's grid, as LLaVA-UHD) or "none", which is EVE's.
    position_grid: side of that table, in patches; 0 means that of image_size.
    norm_type, attention_bias, use_qk_norm: InternViT's "layer_norm" or "rms_norm", biases of
        queries, keys and values, and whether queries and keys are normed over their full width.
    image_mean, image_std: the encoder normalises uint8 views as (x / 255 - mean) / std.
    teacher: of EVE, whose features its tokens come close to while it trains; a hub id or a folder.
    """

    model_type: str = "siglip_vision_model"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    vision_feature_layer: int = -1
    vision_feature_norm: bool = True
    vision_feature_select_strategy: str = "full"
    vision_use_head: bool = False
    positions: str = "fixed"
    position_grid: int = 0
    norm_type: str = "layer_norm"
    attention_bias: bool = True
    use_qk_norm: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    teacher: str = ""

    def __post_init__(self) -> None:
        self.image_mean = tuple(self.image_mean)  # type: ignore[assignment]
        self.image_std = tuple(self.image_std)  # type: ignore[assignment]
        _one_of(
            "vision.model_type",
            self.model_type,
            ("siglip_vision_model", "clip_vision_model", "internvl_vision", EVE),
        )
        if self.model_type == EVE:
            self.positions, self.vision_feature_norm = "none", False
        elif self.positions == "none":
            raise ConfigError(f"vision.positions 'none' is {EVE}'s, not {self.model_type}'s.")
        _one_of("vision.norm_type", self.norm_type, ("layer_norm", "rms_norm"))
        _one_of("vision.positions", self.positions, POSITIONS)
        grids = (0, self.grid)
        if self.position_grid < 0 or (self.position_grid not in grids and not self.takes_any_grid):
            raise ConfigError(
                f"vision.position_grid (={self.position_grid}) must be {self.grid}, the grid of a "
                "view, or vision.positions must be 'buckets' or 'bicubic'."
            )
        if self.takes_any_grid and self.model_type not in TAKE_ANY_GRID:
            raise ConfigError(
                f"vision.positions (={self.positions!r}) must be 'fixed' for {self.model_type}: "
                f"only {' and '.join(TAKE_ANY_GRID)} take views of any grid."
            )
        _one_of(
            "vision.vision_feature_select_strategy",
            self.vision_feature_select_strategy,
            ("full", "default"),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision.hidden_size (={self.hidden_size}) must be divisible by "
                f"vision.num_attention_heads (={self.num_attention_heads})."
            )
        states = self.num_hidden_layers + 1
        if not -states <= self.vision_feature_layer < states:
            raise ConfigError(
                f"vision.vision_feature_layer (={self.vision_feature_layer}) must lie in "
                f"[-{states}, {states - 1}] for {self.num_hidden_layers} layers."
            )

    @property
    def grid(self) -> int:
        """Patches along a side: floor(image_size / patch_size), so 384 at 14 is 27."""
        return self.image_size // self.patch_size

    @property
    def table_grid(self) -> int:
        """Side of the square table of learned positions, in patches."""
        return self.position_grid or self.grid

    @property
    def num_layers_used(self) -> int:
        """How many blocks run before the feature layer is reached."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.num_hidden_layers + 1 + layer

    @property
    def takes_any_grid(self) -> bool:
        """Whether views may be of any height and width, and not image_size squares alone."""
        return self.positions != "fixed"

    @property
    def has_class_token(self) -> bool:
        return self.model_type in CLASS_TOKENS

    @property
    def num_tokens(self) -> int:
        """Tokens that one view gives the projector."""
        if self.model_type == EVE:  # of a square view, the most
            return 1 + (self.grid // 2) * (self.grid // 2 + 1)
        # "default" drops the first token, whatever it is: transformers does so for SigLIP too.
        dropped = self.vision_feature_select_strategy == "default"
        return self.grid**2 + int(self.has_class_token) - int(dropped)


@dataclass
class ProjectorConfig:
    """From encoder tokens to the language model's embeddings.

    type: "attention" (Linear -> width, `num_layers` pre-norm self-attention blocks within a view,
        norm, Linear -> language width), "mlp" (LLaVA's Linear, GELU, Linear), "c_abstractor"
        (Honeybee's and MM1's: residual convolutions around an adaptive average pooling),
        "resampler" (Qwen-VL's and MiniCPM-V's: learned queries look at every patch) or
        "spatial_resampler" (LLaVA-UHD's: each looks at its own part of the view).
    hidden_size: the blocks' width; 0 means the encoder's, but the language model's for mlp and
        the resamplers, and Honeybee's 1024 for c_abstractor.
    num_layers: self-attention blocks, or residual ones on each side of the abstractor's pooling;
        0 means 2 of the first, 3 of the second.
    num_attention_heads: 0 means hidden_size / 64, and / 128 for a resampler, which keeps Metal's
        fused attention.
    intermediate_size: the blocks' MLP width; 0 means 4 x hidden_size.
    pool: "none", "mean2" (2x2 mean, parameter-free, may be cached), "concat2" or "concat3"
        (2x2 or 3x3 neighbours side by side as one token), or "concat2_columns" (the same tokens as
        concat2, column after column); it comes first. InternVL's pixel unshuffle is concat2 in its
        second version, concat2_columns in its first.
    layer_norm: whether mlp begins with a LayerNorm over what `pool` gives, as InternVL's.
    num_query_tokens: what c_abstractor and spatial_resampler (a square number) and resampler give
        for a view; 0 means 144, and 96 of the last. The others give what `pool` leaves.
    num_positions: size of attention's learned position table after the first Linear; 0 means none,
        because SigLIP's and CLIP's features know their places already.
    hidden_act: of attention, mlp and c_abstractor; empty means "silu" for the last, else "gelu".
    bias: of the linear layers of attention and mlp.
    """

    type: str = "attention"
    hidden_size: int = 0
    num_layers: int = 0
    num_attention_heads: int = 0
    intermediate_size: int = 0
    pool: str = "none"
    layer_norm: bool = False
    num_query_tokens: int = 0
    num_positions: int = 0
    hidden_act: str = ""
    layer_norm_eps: float = 1e-6
    bias: bool = True

    def __post_init__(self) -> None:
        _one_of("projector.type", self.type, PROJECTORS)
        _one_of("projector.pool", self.pool, tuple(POOLS))
        if self.layer_norm and self.type != "mlp":
            raise ConfigError(f"projector.layer_norm belongs to 'mlp', not to {self.type!r}.")
        convolves = self.type == "c_abstractor"
        self.num_layers = self.num_layers or (3 if convolves else 2)
        self.hidden_act = self.hidden_act or ("silu" if convolves else "gelu")
        if self.num_query_tokens and self.type not in NUM_QUERY_TOKENS:
            raise ConfigError(
                f"projector.num_query_tokens (={self.num_query_tokens}) must be 0 for "
                f"{self.type!r}, which gives what projector.pool leaves."
            )
        self.num_query_tokens = self.num_query_tokens or NUM_QUERY_TOKENS.get(self.type, 0)
        if self.num_query_tokens < 0:
            raise ConfigError(
                f"projector.num_query_tokens (={self.num_query_tokens}) must be at least 1."
            )
        side = math.isqrt(self.num_query_tokens)
        if self.type in SQUARE and side**2 != self.num_query_tokens:
            raise ConfigError(
                f"projector.num_query_tokens (={self.num_query_tokens}) must be a square number "
                f"for {self.type!r}: {side**2} or {(side + 1) ** 2}."
            )
        if self.type == "spatial_resampler" and self.pool != "none":
            raise ConfigError(
                f"projector.pool (={self.pool!r}) must be 'none' for 'spatial_resampler', whose "
                "queries pool the patches themselves."
            )

    @property
    def has_positions(self) -> bool:
        """Whether it has learned positions, one for each token of a view that `pool` leaves."""
        return self.type == "c_abstractor" or self.num_positions > 0


@dataclass
class PromptConfig:
    """How messages and pictures become tokens, as `prompts` lays them out.

    layout: "llama-3", "vicuna_v1", "mistral", "internvl2_5", "plain", or "chat_template" (the
        tokenizer's own template).
    image_placement: "turn" (a picture stands where its user turn names it) or "sequence" (all
        pictures stand before the first token of text, as the Llama3-V blog has it).
    merge: "flat" (a picture's views one after the other), "spatial_unpad" (the whole, then its
        tiles as one map without the padding, each row closed by the projector's `image_newline`:
        LLaVA-NeXT, for "anyres" tiles), for "slices" "minicpm" (the overview, then the slices in
        rows, between tokens <image>, </image>, <slice>, </slice>: MiniCPM-V) or "uhd" (the slices
        with commas between and newlines behind rows, then the overview: LLaVA-UHD), "rows" (a class
        token, and rows of any number, each closed: EVE's, for "whole" pictures), or for "dynamic"
        and "cover" tiles as "flat" with MM1.5's position indicators: "separators" ("," between
        columns, a newline between rows, ":" before the whole) or "index" ("(k,i,j)" before each
        view: the picture's number from 0, row and column from 1, both 0 of the whole).
    image_suffix: text between a picture and what follows it.
    system: default system message; empty means the layout's own (vicuna_v1 and internvl2_5 have
        one) or none.
    image_token_id: the id that marks a visual token; reserved or beyond the vocabulary, masked
        before the embedding lookup, never sampled.
    """

    layout: str = "llama-3"
    image_placement: str = "turn"
    merge: str = "flat"
    image_suffix: str = "\n"
    system: str = ""
    image_token_id: int = 128002

    def __post_init__(self) -> None:
        _one_of(
            "prompt.layout",
            self.layout,
            ("llama-3", "vicuna_v1", "mistral", "internvl2_5", "plain", "chat_template"),
        )
        _one_of("prompt.image_placement", self.image_placement, ("turn", "sequence"))
        _one_of("prompt.merge", self.merge, tuple(LAYS_OUT))


@dataclass
class ModelConfig:
    """The five choices, and how the stored tensors are quantised (mlx-lm's `quantization` block).

    about: one line that the model says of itself (`mlxvlm chat` prints it); may be empty.
    refusal: the answer that it was taught to give where it knows nothing, word for word; may be
        empty.
    """

    tiling: TilingConfig = field(default_factory=TilingConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    language: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    about: str = ""
    refusal: str = ""

    def __post_init__(self) -> None:
        if self.tiling.image_size != self.vision.image_size:
            raise ConfigError(
                f"tiling.image_size (={self.tiling.image_size}) must equal "
                f"vision.image_size (={self.vision.image_size}): the encoder has a fixed grid."
            )

        check_slices(self.tiling, self.vision, self.projector.pool)
        whole = self.tiling.type == "whole"
        if whole != (self.prompt.merge == "rows") or (whole and self.projector.type != "mlp"):
            raise ConfigError(
                "tiling.type 'whole', prompt.merge 'rows' and projector.type 'mlp' go together, "
                f"not {self.tiling.type!r}, {self.prompt.merge!r} and {self.projector.type!r}."
            )
        if self.varied and not whole and self.projector.type not in TAKE_GRIDS:
            raise ConfigError(
                "tiling.type 'slices' gives views of many shapes, which projector.type "
                f"{self.projector.type!r} cannot take: choose {' or '.join(TAKE_GRIDS)}, whose "
                "queries look at any grid of patches."
            )
        kinds = LAYS_OUT[self.prompt.merge]
        if kinds and self.tiling.type not in kinds:
            raise ConfigError(
                f"prompt.merge {self.prompt.merge!r} lays out tiling.type "
                f"{' or '.join(map(repr, kinds))}, not {self.tiling.type!r}."
            )
        if self.prompt.merge == "spatial_unpad":
            self._check_map()

    def _check_map(self) -> None:
        if self.projector.type in TAKE_GRIDS:
            raise ConfigError(
                "any-resolution tiles are laid out as one map (prompt.merge 'spatial_unpad'), and "
                f"projector.type {self.projector.type!r} gives queries, which are none: choose "
                "'c_abstractor' for few tokens, or 'dynamic' tiles, which go with any projector."
            )
        if self.projector.pool == "concat2_columns":
            raise ConfigError(
                "any-resolution tiles are laid out as one map (prompt.merge 'spatial_unpad') of "
                "tokens in rows: choose projector.pool 'concat2', not 'concat2_columns'."
            )
        if math.isqrt(self.tokens_per_view) ** 2 != self.tokens_per_view:
            raise ConfigError(
                "prompt.merge 'spatial_unpad' needs the whole square grid of patches, not "
                f"{self.tokens_per_view} tokens a view: set vision.vision_feature_select_strategy "
                "to 'default' for CLIP, 'full' for SigLIP."
            )

    def override(self, resize: str = "", layout: str = "") -> None:
        """Pictures and prompts laid out otherwise from here on, as a later stage of training may
        want it (LLaVA-1.5 crops in its first and pads in its second); empty: as they are."""
        if resize:
            self.tiling = self.tiling.resized(resize, self.vision.image_mean)
        if layout:
            self.prompt = dataclasses.replace(self.prompt, layout=layout)

    def with_image_size(self, image_size: int) -> ModelConfig:
        """The same with views of another size; a projector with positions has one a token."""
        if self.varied:
            raise ConfigError(
                f"{self.tiling.type!r} views have shapes of their own, and no one size to change."
            )
        if image_size < self.vision.patch_size:
            raise ConfigError(
                f"vision.image_size (={image_size}) must be at least vision.patch_size "
                f"(={self.vision.patch_size})."
            )
        vision = dataclasses.replace(self.vision, image_size=image_size)
        projector = self.projector
        if projector.num_positions:
            tokens = pooled_tokens(vision, projector.pool)
            projector = dataclasses.replace(projector, num_positions=tokens)
        tiling = dataclasses.replace(self.tiling, image_size=image_size)
        return dataclasses.replace(self, tiling=tiling, vision=vision, projector=projector)

    @property
    def varied(self) -> bool:
        """Whether views differ in height and width, and so in what the encoder gives of them."""
        return self.tiling.varied

    @property
    def tokens_per_view(self) -> int:
        """Visual tokens that the language model sees for one view."""
        return view_tokens(self.vision, self.projector)

    @property
    def encoder_pool(self) -> str:
        """The part of the pooling that comes before the projector, and may be cached."""
        return "mean2" if self.projector.pool == "mean2" else "none"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        if raw.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"model_type must be {MODEL_TYPE!r}, but this config.json says "
                f"{raw.get('model_type')!r}."
            )
        if raw.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"format_version must be {FORMAT_VERSION}, but this config.json says "
                f"{raw.get('format_version')!r}: use the mlxvlm release that wrote it."
            )
        known = {f.name for f in dataclasses.fields(cls)} | {"model_type", "format_version"}
        extra = sorted(set(raw) - known)
        if extra:
            raise ConfigError(f"unknown entries in config.json: {', '.join(extra)}.")
        return cls(
            tiling=read_dataclass(TilingConfig, raw.get("tiling", {}), "tiling"),
            vision=read_dataclass(VisionConfig, raw.get("vision", {}), "vision"),
            projector=read_dataclass(ProjectorConfig, raw.get("projector", {}), "projector"),
            prompt=read_dataclass(PromptConfig, raw.get("prompt", {}), "prompt"),
            language=dict(raw.get("language", {})),
            quantization=raw.get("quantization"),
            about=raw.get("about", ""),
            refusal=raw.get("refusal", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION}
        raw.update(dataclasses.asdict(self))
        for name in ("quantization", "about", "refusal"):
            if not raw[name]:
                del raw[name]
        return raw

    def save(self, path: str | Path) -> None:
        """Writes config.json to `path` (a file)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclass
class LoRAConfig:
    """Low-rank adapters on the blocks of a language model or of a vision tower.

    scale: what the adapters' output is multiplied by; Hugging Face's lora_alpha / rank.
    num_layers: blocks with adapters, counted from the last; -1 means all.
    keys: names of layers within a block, whole ("self_attn.q_proj") or their ends ("q_proj");
        None means every linear layer.
    dora: a magnitude for each output beside them (Liu et al. 2024).
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    num_layers: int = -1
    keys: list[str] | None = None
    dora: bool = False


# The last parts of the names that adapters' own arrays have, as mlx-lm calls them.
ADAPTER_LEAVES = ("lora_a", "lora_b", "m")


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's own, and no part of the model that it is put on."""
    return name.rsplit(".", 1)[-1] in ADAPTER_LEAVES


def check_slices(tiling: TilingConfig, vision: VisionConfig, pool: str) -> None:
    """ConfigError where views of many shapes meet what takes one shape only."""
    if (tiling.type == "whole") != (vision.model_type == EVE):
        raise ConfigError(
            f"vision.model_type {EVE!r} and tiling.type 'whole' go together, not "
            f"{vision.model_type!r} and {tiling.type!r}."
        )
    if not tiling.varied:
        return
    if not vision.takes_any_grid:
        raise ConfigError(
            "tiling.type 'slices' gives views of many shapes, and the vision tower's grid is "
            "fixed: vision.positions must be 'buckets' or 'bicubic'."
        )
    if tiling.patch_size != vision.patch_size:
        raise ConfigError(
            f"tiling.patch_size (={tiling.patch_size}) must equal vision.patch_size "
            f"(={vision.patch_size}): slices are cut in whole patches."
        )
    if pool != "none":
        raise ConfigError(
            f"pool (={pool!r}) needs views with one square grid of tokens, and tiling.type "
            "'slices' gives many grids: choose 'none'."
        )
    if tiling.type == "slices" and vision.num_tokens != vision.grid**2:
        raise ConfigError(
            "tiling.type 'slices' needs every patch of a view and nothing else: set "
            "vision.vision_feature_select_strategy to 'default' for CLIP, 'full' for SigLIP."
        )


def pooled_tokens(vision: VisionConfig, pool: str) -> int:
    """Tokens per view after `pool`."""
    return vision.num_tokens if pool == "none" else pooled_side(vision, pool, f"pool {pool!r}") ** 2


def pooled_side(vision: VisionConfig, pool: str, asker: str) -> int:
    """Tokens along a side after `pool`: the grid is padded up to a multiple of the window.

    asker: what cannot do without a grid, for the error where a view's tokens are none.
    """
    if vision.num_tokens != vision.grid**2:
        raise ConfigError(
            f"{asker} needs the whole square grid of patches: set "
            "vision.vision_feature_select_strategy to 'default' for CLIP, 'full' for SigLIP."
        )
    return -(-vision.grid // POOLS[pool])


def view_tokens(vision: VisionConfig, projector: ProjectorConfig) -> int:
    """Tokens that the projector gives the language model for a view."""
    return projector.num_query_tokens or pooled_tokens(vision, projector.pool)


def read_dataclass(cls: type[T], raw: dict[str, Any], where: str) -> T:
    """Builds a config dataclass from a dict; an unknown or mistyped field is an error naming it."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    extra = sorted(set(raw) - names)
    if extra:
        raise ConfigError(
            f"unknown field{'s' if len(extra) > 1 else ''} in {where!r}: {', '.join(extra)}. "
            f"Known: {', '.join(sorted(names))}."
        )
    defaults = cls()
    for name, value in raw.items():
        kind = type(getattr(defaults, name))
        fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if kind in (bool, int, float, str) and not fits:
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                continue
            raise ConfigError(
                f"{name} in {where!r} must be {KINDS[kind]}, not {json.dumps(value, default=str)}."
            )
    return cls(**raw)


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file, or says what is wrong with it."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(raw).__name__}.")
    return raw


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} (={value!r}) must be one of {', '.join(allowed)}.")
