"""How slices stand in a prompt: order, words, counts."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from tiny_vlm import sliced_config, sliced_vlm

from mlxvlm.config import TilingConfig
from mlxvlm.data.samples import Sample
from mlxvlm.errors import ConfigError, PromptError
from mlxvlm.images.picture import Cut
from mlxvlm.images.slices import plan
from mlxvlm.merge import spelling, unbroken, visual_tokens

UHD = TilingConfig("slices", 336, max_tiles=7, rounding="down")
# LLaVA-UHD's visual tokens and separators, 144 a view, of a picture (width, height).
TOKENS = {
    (336, 336): 144,
    (300, 200): 144,
    (640, 480): 724,
    (672, 1088): 1014,
    (1088, 672): 1014,
    (1000, 300): 579,
    (1920, 1080): 1014,
}


def of(merge, tokens=4):
    config = sliced_config()
    return dataclasses.replace(
        config,
        prompt=dataclasses.replace(config.prompt, merge=merge),
        projector=dataclasses.replace(config.projector, num_query_tokens=tokens),
    )


@pytest.mark.parametrize("size", TOKENS)
def test_llava_uhd_has_so_many_tokens(size):
    laid = spelling(of("uhd", 144), plan(size, UHD, None))
    assert sum(part if isinstance(part, int) else 1 for part in laid) == TOKENS[size]


def test_uhd_has_commas_between_newlines_behind_and_the_overview_last():
    config, cut = of("uhd"), Cut(7, (2, 3), (90, 60))
    assert spelling(config, cut) == (4, ",", 4, ",", 4, "\n", 4, ",", 4, ",", 4, "\n", 4)
    assert spelling(config, Cut(1, (1, 1), (9, 9))) == (4,)
    assert visual_tokens(config, cut) == 28 and unbroken(config, cut) == [4] * 7
    vlm = sliced_vlm(config)
    views = mx.arange(9 * 4, dtype=mx.float32).reshape(9, 4, 1)
    merged = vlm.merge(views, [Cut(1, (1, 1), (9, 9)), cut, Cut(1, (1, 1), (9, 9))])
    wanted = [*range(4), *range(8, 32), *range(4, 8), *range(32, 36)]
    assert np.array(merged)[:, 0].tolist() == wanted


def test_minicpm_has_its_tokens_around_each_view_and_the_overview_first():
    config, cut = of("minicpm"), Cut(5, (2, 2), (60, 60))
    view = ("<image>", 4, "</image>")
    assert spelling(config, Cut(1, (1, 1), (9, 9))) == view
    row = (*view, *view)
    assert spelling(config, cut) == (*view, "<slice>", *row, "\n", *row, "</slice>")
    vlm = sliced_vlm(config)
    views = mx.arange(20, dtype=mx.float32).reshape(5, 4, 1)
    assert np.array(vlm.merge(views, [cut]))[:, 0].tolist() == [*range(20)]


@pytest.mark.parametrize("merge", ["minicpm", "uhd"])
def test_merges_of_slices_refuse_what_is_none(merge):
    with pytest.raises(PromptError, match="one of each slice"):
        spelling(of(merge), Cut(4, (2, 2), (60, 60)))
    config = of(merge)
    with pytest.raises(ConfigError, match="'slices', not 'single'"):
        dataclasses.replace(config, tiling=TilingConfig("single", 32))


def test_a_row_keeps_the_words_among_its_visual_tokens():
    vlm = sliced_vlm(of("uhd"))
    rng = np.random.default_rng(0)
    (picture,) = vlm.look([rng.integers(0, 256, (30, 100, 3), dtype=np.uint8)])
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A strip."}]
    prompt = vlm.tokenize(asked, [picture, picture])
    count = visual_tokens(vlm.config, picture.cut)
    slices = picture.grid[0] * picture.grid[1]
    assert slices > 1 and [n for _, n in prompt.slots] == [count + slices] * 2
    row = Sample(prompt.tokens, prompt.supervised, ["a", "b"], slots=prompt.slots)
    assert np.array_equal(row.tokens, prompt.tokens) and row.slots == prompt.slots
    assert np.array_equal(row.supervised, prompt.supervised)
    assert row.num_visual == 2 * count and row.num_supervised == prompt.supervised.sum()
    assert len(row._text) == len(prompt) - 2 * count


@pytest.mark.parametrize("merge", ["flat", "uhd"])
def test_a_prompt_is_embedded_alike_from_any_place_on(merge):
    """A chat goes on where its kept prefix ends, be it between two slices."""
    vlm = sliced_vlm(of(merge))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((30, 100), (64, 40))]
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    prompt = vlm.tokenize([{"role": "user", "content": content}], images)
    whole = np.array(vlm.embed(prompt.tokens, prompt.pictures)[0])
    (start, length), _ = prompt.slots
    for at in (0, start, start + 3, start + 5, start + length - 1, start + length, len(prompt) - 1):
        rest = vlm.embed_after(prompt.tokens, prompt.pictures, at)
        assert np.abs(np.array(rest) - whole[at:]).max() < 1e-5, at
    moved = prompt.tokens.copy()
    moved[start + 1] = 65
    with pytest.raises(PromptError):
        vlm.embed(moved, prompt.pictures)
