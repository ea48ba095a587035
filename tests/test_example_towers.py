"""The drawn world's towers: SigLIP's own loss, what it writes, and how towers are compared."""

import dataclasses
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.shapes import encoder, readout, sigmoid, thaw, world  # noqa: E402
from examples.shapes.camera import as_drawn  # noqa: E402
from examples.shapes.drawing import draw  # noqa: E402
from mlxvlm.cli.main import app  # noqa: E402
from mlxvlm.weights.load import load_encoder, load_siglip  # noqa: E402

SMALL = dataclasses.replace(
    encoder.CONFIG,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
)
TOKENIZER = sigmoid.make_tokenizer()
SCENES = [world.make_scene(seed) for seed in range(300)]
SHOTS = [as_drawn(scene) for scene in SCENES[:5]]


@pytest.fixture(scope="module")
def model():
    mx.random.seed(3)
    found = sigmoid.make_model(TOKENIZER, SMALL)
    found.logit_bias = mx.array([-2.5])
    return found


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    sigmoid.save(model, TOKENIZER, folder)
    return folder


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


def test_the_loss_is_the_papers(model):
    shown, ids = sigmoid.batch(TOKENIZER, SHOTS[:5])
    image = np.array(model.vision_model.pooled(shown), np.float64)
    text = np.array(model.text_model(ids), np.float64)
    image /= np.linalg.norm(image, axis=-1, keepdims=True)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    logits = np.exp(np.log(10)) * image @ text.T - 2.5
    total = sum(softplus(-(1 if i == j else -1) * logits[i, j]) for i in range(5) for j in range(5))
    assert sigmoid.loss(model, shown, ids).item() == pytest.approx(total / 5, rel=1e-4)


def test_it_starts_as_siglip_does():
    fresh = sigmoid.make_model(TOKENIZER)
    assert mx.exp(fresh.logit_scale).item() == pytest.approx(10)
    assert fresh.logit_bias.item() == -10
    names = {name for name, _ in fresh.vision_model.named_modules()}
    tower = encoder.Teacher(encoder.CONFIG).tower
    assert {name for name, _ in tower.named_modules()} == {n for n in names if "head" not in n}


def test_captions_name_what_is_there():
    for scene in SCENES:
        text = sigmoid.caption(scene)
        assert text == sigmoid.caption(world.make_scene(scene.seed))
        words = text.replace(".", "").replace(",", "").replace(":", "").split()
        items = scene.bars or scene.items
        known = {word for item in items for word in item.words}
        for word in words:
            if word in world.COLORS or word in world.SHAPES or word in world.SIZES:
                assert word in known, text
            if word in world.WORDS or word.isdigit():
                assert word in known, text
        assert (text == sigmoid.NOTHING) == (scene.kind == "texture")


def test_captions_fit_and_every_word_of_them_is_known():
    longest = 0
    for scene in SCENES:
        text = TOKENIZER.canonical(sigmoid.caption(scene))
        ids = TOKENIZER.tokenizer.encode(text)[0]
        # The space before a number is a token of its own.
        assert len(ids) == len(text.split()) + sum(word.isdigit() for word in text.split()), text
        longest = max(longest, len(ids))
    assert 30 < longest < sigmoid.LENGTH
    whole = "Top left: a big red star. Top right: the number 42. Bottom left: the word STOP."
    row = TOKENIZER([whole])[0]
    assert row.shape == (sigmoid.LENGTH,)
    assert row[17] == TOKENIZER.eos_id and set(row[18:]) == {TOKENIZER.pad_id}


def test_training_brings_pairs_together():
    mx.random.seed(0)
    model = sigmoid.make_model(TOKENIZER, SMALL)
    shown, ids = sigmoid.batch(TOKENIZER, SHOTS[:4])
    losses = [
        value
        for _, value in encoder.fit(model, sigmoid.loss, iter([(shown, ids)] * 120), 120, 3e-3)
    ]
    # Knowing only that one pair in four agrees would give 2.25.
    assert losses[-1] < 1.0
    scores = np.array(model.scores(shown, ids))
    assert (scores.argmax(1) == np.arange(4)).all()
    assert model.logit_bias.item() != -10 and model.logit_scale.item() != pytest.approx(np.log(10))


def test_the_folder_loads_whole_and_as_a_tower(model, saved):
    whole, tokenizer, tiling = load_siglip(saved)
    shown, ids = sigmoid.batch(TOKENIZER, SHOTS[:3])
    texts = [sigmoid.caption(scene) for scene in SCENES[:3]]
    assert (tokenizer(texts) == np.array(ids)).all()
    assert mx.array_equal(whole.logits(shown, ids), model.logits(shown, ids))
    assert tiling.image_size == 96
    tower = load_encoder(saved)
    assert mx.array_equal(tower.vision(shown), model.vision_model(shown))
    seen = tower.encode(tower.look([draw(SCENES[0])]))[0]
    assert np.allclose(np.array(seen.views[0]), np.array(model.vision_model(shown)[0]), atol=1e-4)


def test_score_reads_it(model, saved, tmp_path):
    picture = tmp_path / "scene.png"
    draw(SCENES[0]).save(picture)
    texts = [sigmoid.caption(SCENES[0]), "something that no vocabulary lists: naïve café"]
    done = CliRunner().invoke(app, ["score", str(picture), *texts, "-m", str(saved), "--json"])
    assert done.exit_code == 0, done.output
    found = [one["score"] for one in json.loads(done.output)["scores"]]
    shown, ids = encoder.pixels(map(draw, SCENES[:1])), mx.array(TOKENIZER(texts))
    assert np.allclose(found, np.array(model.scores(shown, ids))[0], atol=1e-5)


def test_a_readout_learns_on_frozen_features(saved, tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    tower = encoder.Teacher(SMALL).tower
    encoder.save(tower, SMALL, tmp_path / "labels")
    shown = encoder.pixels(map(draw, SCENES[:2]))
    opened, config = readout.open_tower(str(tmp_path / "labels"))
    assert mx.array_equal(opened(shown), tower(shown)) and config.hidden_size == 32
    earlier, _ = readout.open_tower(f"{saved}@-2")
    assert not np.allclose(
        np.array(earlier(shown)), np.array(readout.open_tower(str(saved))[0](shown))
    )
    arguments = [str(saved), str(tmp_path / "labels"), "--scenes", "64", "--steps", "80"]
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--eval", "32", "--out", str(out)])
    readout.main()
    results = json.loads(out.read_text())
    assert [result["tower"] for result in results] == arguments[:2]
    # What a guess at random among each group's classes costs.
    blind = sum(w * np.log(len(g)) for w, g in zip(encoder.WEIGHTS, encoder.GROUPS, strict=True))
    assert all(result["loss"] < 0.9 * blind for result in results)
    assert readout.table(results).count("\n") == 3


def test_frozen_and_unfrozen_runs(saved, tmp_path, capsys, monkeypatch):
    for extra in ([], ["--unfrozen"], ["--table"]):
        arguments = ["--out", str(tmp_path), "--steps", "2", "--scenes", "8", "--each", "1"]
        arguments += extra if "--table" in extra else ["--tower", str(saved), *extra]
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        thaw.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"| {saved.name} | frozen | 1 | 2 |")
    assert lines[-1].startswith(f"| {saved.name} | unfrozen | 1 | 2 |")
    moved = {}
    for way in ("frozen", "unfrozen"):
        weights = mx.load(str(tmp_path / f"{saved.name}-{way}-0" / "model" / "model.safetensors"))
        start = mx.load(str(tmp_path / f"{saved.name}-{way}-0" / "base" / "model.safetensors"))
        name = "vision.encoder.layers.0.mlp.fc1.weight"
        moved[way] = not mx.array_equal(weights[name], start[name])
    assert moved == {"frozen": False, "unfrozen": True}


def test_the_small_world_asks_what_is_right():
    asked = thaw.take(3)
    assert len(asked) == 3 * len(thaw.KINDS)
    for scene, qa in asked:
        assert len(scene.items) <= thaw.MOST and scene.seed >= world.SPLITS["heldout"]
        assert qa.kind in thaw.KINDS
