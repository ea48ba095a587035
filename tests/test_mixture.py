"""How many rows of each source an epoch has, and which."""

import json
from collections import Counter

import numpy as np
import pytest

from mlxvlm.data.mixture import Mixture, Source, complete, drawn, mix
from mlxvlm.data.samples import Sample
from mlxvlm.errors import ConfigError, UsageError
from mlxvlm.train.stages import stage_config

ONE = np.ones(4, np.int32)


def rows(count, images=1, name="a"):
    names = [f"{name}{n}.jpg" for n in range(images)]
    return [Sample(ONE, ONE > 0, names, where=f"{name}:{number}") for number in range(count)]


def mixed(sizes, sources, mixture=None, seed=0):
    """Of sources with `sizes` rows, how often each row is taken: by source, row -> times."""
    sources = complete(sources, {})
    mixture = mixture or Mixture()
    mixture.check(sources)
    each = []
    for at, size in enumerate(sizes):
        each.append(size if isinstance(size, list) else rows(size))
        for sample in each[-1]:
            sample.source = at
    out = [Counter() for _ in sizes]
    for sample in mix(each, sources, mixture, seed):
        out[sample.source][sample.where.split(" #")[0]] += 1
    return out


def totals(found):
    return [sum(counts.values()) for counts in found]


def test_without_options_every_row_comes_once_in_order():
    each = [rows(5), rows(3, name="b")]
    sources = complete([Source("x"), Source("y")], {})
    assert mix(each, sources, Mixture(), 0) == each[0] + each[1]


@pytest.mark.parametrize("repeat, whole", [(1, 1), (3, 3), (2.3, 2), (0.4, 0)])
def test_repeats(repeat, whole):
    (found,) = mixed([10], [Source("x", repeat=repeat)])
    assert sum(found.values()) == round(10 * repeat)
    assert {found[f"a:{n}"] - whole for n in range(10)} <= {0, 1}


def test_copies_know_that_they_are_and_neighbours_stay():
    sources = complete([Source("x", repeat=2)], {})
    wheres = [sample.where for sample in mix([rows(2)], sources, Mixture(), 0)]
    assert wheres == ["a:0", "a:1", "a:0 #2", "a:1 #2"]


def test_weights_share_an_epoch_as_long_as_all_rows():
    found = mixed([90, 10], [Source("x", weight=1), Source("y", weight=3)])
    assert totals(found) == [25, 75]
    assert set(found[0].values()) == {1} and set(found[1].values()) == {7, 8}


def test_alpha_is_beside_general():
    sources = [Source("g1"), Source("g2", repeat=2), Source("s", category="science")]
    sources += [
        Source("c1", category="code"),
        Source("c2", category="code"),
        Source("t", category="x"),
    ]
    mixture = Mixture(alpha={"science": 0.1, "code": 1.5})
    found = mixed([100, 50, 400, 10, 30, 7], sources, mixture)
    assert totals(found) == [100, 100, 20, 75, 225, 7]  # code: 300, as 10 to 30


def test_ratio_keeps_all_rows_of_one_picture():
    both = rows(40, name="one") + rows(100, 0, "none")
    mixture = Mixture(ratio={"single": 0.8, "multi": 0.1, "text": 0.1})
    found = mixed([both, rows(40), rows(3, 2)], [Source("a"), Source("b"), Source("c")], mixture)
    assert totals(found) == [50, 40, 10] and all(found[0][f"one:{n}"] == 1 for n in range(40))
    without = Mixture(ratio={"single": 1})
    assert totals(mixed([both, rows(3, 2)], [Source("a"), Source("b")], without)) == [40, 0]


def test_same_seed_same_rows_and_more_include_fewer():
    few, more = (mixed([100], [Source("x", repeat=r)])[0] for r in (0.2, 0.5))
    assert few == mixed([100], [Source("x", repeat=0.2)])[0] and set(few) < set(more)
    assert set(few) != set(mixed([100], [Source("x", repeat=0.2)], seed=1)[0])
    assert set(few) != set(mixed([100], [Source("y", repeat=0.2)])[0])


def test_another_source_changes_no_picks():
    """Also where it is put first, or brings the same file."""
    alone = mixed([50], [Source("x", repeat=0.5)])[0]
    after = mixed([50, 70], [Source("x", repeat=0.5), Source("y", repeat=0.1)])[0]
    before = mixed([70, 50], [Source("y", repeat=0.1), Source("x", repeat=0.5)])[1]
    twice = mixed([50, 50], [Source("x", repeat=0.5), Source("x", repeat=0.5)])
    assert alone == after == before == twice[0] != twice[1]


def test_fractions_and_caps_are_drawn():
    places = [f"a:{n}" for n in range(100)]
    found = {
        (fraction, cap): drawn(Source("x", "x", fraction=fraction, cap=cap), 0, lambda: places)
        or set()
        for fraction, cap in ((1, 0), (0.3, 0), (0.3, 10), (1, 10), (1, 1000))
    }
    assert not found[1, 0] and len(found[0.3, 0]) == 30 and len(found[1, 1000]) == 100
    assert found[0.3, 10] == found[1, 10] < found[0.3, 0] and len(found[1, 10]) == 10
    assert max(int(place[2:]) for place in found[1, 10]) > 20  # not the first ten
    assert found[1, 10] != drawn(Source("x", "x", cap=10), 1, lambda: places)


def test_names_and_defaults():
    sources = [Source("d/a.json"), Source("e/a.json", cache="none"), Source("f", name="b")]
    found = complete(sources, {"images": "i", "cache": "c", "filter": "none"})
    assert [source.name for source in found] == ["a", "a-2", "b"]
    assert [source.cache for source in found] == ["c", "", "c"]
    assert {source.images for source in found} == {"i"} and not found[0].filters


BAD = [
    ([Source("")], {}, "needs 'data'"),
    ([Source("x", repeat=0)], {}, "repeat"),
    ([Source("x", fraction=1.5)], {}, "fraction"),
    ([Source("x", cap=-1)], {}, "cap"),
    ([Source("x", weight=1, repeat=2)], {}, "weight and a repeat"),
    ([Source("x", weight=1), Source("y")], {}, "y has no weight"),
    ([Source("x", augment="blur")], {}, "jpeg or none"),
    ([Source("x", augment="jpeg", cache="c")], {}, "has their features already"),
    ([Source("x", response_format="long")], {}, "short, choice"),
    ([Source("x", filter="repetition,spam")], {}, "'spam'"),
    ([Source("x", name="n"), Source("y", name="n")], {}, "two sources are named 'n'"),
    ([Source("x")], {"alpha": {"science": 1}}, "names 'science'; .* are none"),
    ([Source("x", category="code")], {"alpha": {"code": 1}}, "no source is of that"),
    ([Source("x", weight=1), Source("y", weight=1, category="c")], {"alpha": {"c": 1}}, "choose"),
    ([Source("x")], {"ratio": {"video": 1}}, "names 'video'"),
    ([Source("x")], {"ratio": {"text": 1}}, "share of single"),
    ([Source("x")], {"ratio": {"single": 1, "text": "a"}}, "text .*must be a number"),
]


@pytest.mark.parametrize("sources, mixture, error", BAD)
def test_what_cannot_be_meant(sources, mixture, error):
    with pytest.raises(UsageError, match=error):
        Mixture(**mixture).check(complete(sources, {}))


def test_ratios_that_have_no_rows():
    with pytest.raises(UsageError, match="0.5 of text rows; there are none"):
        mixed([5], [Source("x")], Mixture(ratio={"single": 0.5, "text": 0.5}))
    with pytest.raises(UsageError, match="beside rows of one picture"):
        mixed([rows(5, 0)], [Source("x")], Mixture(ratio={"single": 0.5, "text": 0.5}))


RECIPE = """
model = "m"
out = "o"
images = "pictures"
response_format = "short"

[[sources]]
data = "a.json"
repeat = 2
images = "more"

[[sources]]
data = "owner/name"
category = "science"
response_format = "none"

[mixture]
alpha = {science = 0.1}
"""


def test_recipes(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    config = stage_config("sft", {}, path)
    first, second = config.all_sources
    assert first.data == str(tmp_path / "a.json") and first.images == str(tmp_path / "more")
    assert (first.response_format, first.repeat) == ("short", 2)
    assert (second.data, second.images) == ("owner/name", str(tmp_path / "pictures"))
    assert second.response_format == "" and config.mixture.alpha == {"science": 0.1}
    # flags win, and several make sources of their own
    (one,) = stage_config("sft", {"data": ["x.json"]}, path).all_sources
    assert one.data == "x.json" and one.repeat == 1
    two = stage_config("sft", {"data": ["x.json", "y.json"]}, path).all_sources
    assert [source.data for source in two] == ["x.json", "y.json"]


WRONG = [
    ('sources = ["a"]', r"\[\[sources\]\]"),
    ('[[sources]]\ndata = "a"\nshare = 1', "share"),
    ('[[sources]]\ndata = "a"\nrepeat = "x"', "repeat"),
    ('data = "a"\n[[sources]]\ndata = "a"', "choose one"),
    ('data = ["a", "b"]\n[[sources]]\ndata = "a"', "choose one"),
    ('data = "a"\n[mixture]\nbeta = 1', "beta"),
    ('data = "a"\n[mixture]\nalpha = 1', "must be a table"),
    ('mixture = 3\ndata = "a"', r"\[mixture\]"),
    ("", "--data is missing"),
]


@pytest.mark.parametrize("text, error", WRONG)
def test_recipes_say_what_is_wrong(tmp_path, text, error):
    (tmp_path / "r.toml").write_text('model = "m"\nout = "o"\n' + text)
    with pytest.raises(ConfigError, match=error):
        stage_config("sft", {}, tmp_path / "r.toml")


def test_a_run_of_sources_goes_on_wherever_they_lie(tmp_path):
    from mlxvlm.train.stages import fingerprint

    sources = [Source("x", name="n", cache="c")]
    config = stage_config("sft", {"model": "m", "out": "o", "sources": sources})
    moved = stage_config("sft", {"model": "m", "out": "o", "sources": [Source("z", name="n")]})
    other = stage_config(
        "sft", {"model": "m", "out": "o", "sources": [Source("x", name="n", repeat=2)]}
    )
    assert json.dumps(fingerprint(config)) == json.dumps(fingerprint(moved))
    assert fingerprint(config) != fingerprint(other)
