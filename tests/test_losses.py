"""However rows are batched, a step's loss and gradients are the same, and nothing leaks."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_vlm import IMAGE, LFM2, picture, tiny_config, tiny_vlm

from mlxvlm.config import LoRAConfig
from mlxvlm.data.batching import Batching
from mlxvlm.data.buckets import collate, group
from mlxvlm.data.feed import Feed
from mlxvlm.data.packing import collate_lines
from mlxvlm.data.samples import Sample, Target
from mlxvlm.errors import ConfigError
from mlxvlm.language.forward import check_head, head, head_module, hidden_states
from mlxvlm.language.load import build_language
from mlxvlm.language.lora import add_lora
from mlxvlm.language.packed import longest_pack
from mlxvlm.model import VLM
from mlxvlm.train import losses
from mlxvlm.train.losses import batch_loss, count
from mlxvlm.train.stages import AuxiliaryTarget

TARGETS = {"ground": AuxiliaryTarget(2, 0.5), "align": AuxiliaryTarget(0, 0.25)}
VISUAL = 16
DECODERS = {
    "llama": {},
    "sliding llama": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
    },
    "qwen2": {"model_type": "qwen2"},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
    },
}


def make_samples(rows_a_picture: int = 3, pictures: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(pictures):
        for row in range(rows_a_picture):
            words = rng.integers(3, 200, int(rng.integers(6, 15)))
            tokens = np.concatenate([[1, 2], [IMAGE] * VISUAL, words]).astype(np.int32)
            supervised = np.zeros(len(tokens), bool)
            supervised[-1 - number :] = True
            targets = {"ground": [target(VISUAL + 4, 5, 6)]}
            if row == 0:
                targets["align"] = [target(4, 7)]
            slots = [(2, VISUAL)]
            samples.append(Sample(tokens, supervised, [str(number)], 2 + VISUAL, targets, slots))
    return samples


def target(position: int, *words: int) -> Target:
    share = np.full(len(words), 1 / len(words), np.float32)
    return Target(position, np.array(words, np.int32), share)


def step(
    vlm,
    samples,
    share_prefix,
    batch_size,
    grad_checkpoint=False,
    targets=TARGETS,
    pack_length=0,
    loss="token",
):
    """Loss and gradients of one step over all samples."""
    pictures = {str(n): vlm.look([picture(n)])[0] for n in range(3)}
    kind = "pack" if pack_length else "buckets"
    batching = Batching(batch_size, kind, 8, pack_length)
    feed = Feed(samples, Names(), batching, share_prefix, loss=loss)
    batches = [batch for batch, _ in feed.once()]
    assert all((batch.segments is not None) == bool(pack_length) for batch in batches)
    totals = count(batches)
    vlm.vision.freeze()
    gradient = nn.value_and_grad(vlm, batch_loss)
    parameters = vlm.trainable_parameters()
    total, gradients = 0.0, {}
    for batch in batches:
        views = mx.stack([f.views[0] for f in vlm.features([pictures[n] for n in batch.images])])
        flat, parts = losses.gradients(
            gradient, vlm, batch, views, targets, totals, grad_checkpoint
        )
        weights = {"loss": 1.0} | {name: targets[name].weight for name in targets}
        total += sum(weights[name] * part.item() for name, part in parts.items())
        for name, value in flat.items():
            gradients[name] = gradients.get(name, 0) + value
    vlm.update(parameters)
    return total, gradients


class Names:
    """Stands in for a source of pictures: `step` looks at its own."""

    def of(self, row: Sample, time: tuple[int, int] | None = None) -> list[str]:
        return row.images


def decoder(name: str):
    config = tiny_config()
    config.language |= DECODERS[name]
    return tiny_vlm(config)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("share_prefix", "batch_size", "grad_checkpoint"),
    [(0, 4, False), (3, 2, False), (2, 2, False), (0, 9, True)],
)
def test_batches_equal_one_by_one(name, share_prefix, batch_size, grad_checkpoint):
    vlm, samples = decoder(name), make_samples()
    alone = step(vlm, samples, 0, 1)
    agree(step(vlm, samples, share_prefix, batch_size, grad_checkpoint), alone)


def agree(found, wanted) -> None:
    """Loss and gradient are the same, to 1e-5 of their size, and each array to 3e-5 of its own.
    Some are only rounding (a key's bias moves all scores alike), so none counts as below 0.1."""
    (other, others), (loss, gradients) = found, wanted
    assert other == pytest.approx(loss, rel=1e-5)
    assert others.keys() == gradients.keys()
    size = {key: mx.linalg.norm(value).item() for key, value in gradients.items()}
    off = {key: mx.linalg.norm(others[key] - value).item() for key, value in gradients.items()}
    assert np.linalg.norm([*off.values()]) < 1e-5 * np.linalg.norm([*size.values()])
    for key, value in off.items():
        assert value < 3e-5 * max(size[key], 0.1), (key, value / size[key])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("pack_length", "packs", "grad_checkpoint"), [(100, 1, False), (128, 2, True), (300, 4, False)]
)
def test_packs_equal_one_by_one(name, pack_length, packs, grad_checkpoint):
    """Full training, with both auxiliary targets, and pictures in the middle of a line."""
    vlm, samples = decoder(name), make_samples()
    alone = step(vlm, samples, 0, 1)
    agree(step(vlm, samples, 0, packs, grad_checkpoint, pack_length=pack_length), alone)


@pytest.mark.parametrize("name", DECODERS)
def test_packs_equal_one_by_one_through_adapters(name):
    vlm, samples = decoder(name), make_samples()
    vlm.language.freeze()
    add_lora(vlm.language, LoRAConfig(rank=4, dropout=0.0))
    for module in vlm.language.modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    alone = step(vlm, samples, 0, 1)
    assert any("lora_a" in name for name in alone[1])
    assert any(name.startswith("projector.") for name in alone[1])
    for grad_checkpoint in (False, True):
        agree(step(vlm, samples, 0, 2, grad_checkpoint, pack_length=128), alone)
    agree(step(vlm, samples, 0, 4), alone)


@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_a_pack_do_not_see_each_other(name):
    """Bit for bit: a token moves no logit before it, and none of another row."""
    vlm, rows = decoder(name), make_samples(3, 1)
    ends = np.cumsum([0] + [row.length for row in rows])
    views = mx.stack([vlm.features(vlm.look([picture(0)]))[0].views[0]] * 3)
    visual = vlm.project_views(views)

    def logits(changed: dict[int, int]) -> mx.array:
        batch = collate_lines([rows], 128)
        for place, token in changed.items():
            batch.tokens[0, place] = token
        hidden, _ = losses.hidden_of(vlm, batch, visual, (), False)
        return losses.head(vlm.language, hidden)

    before = logits({})
    for row in range(3):
        for place in (ends[row], ends[row] + VISUAL + 3, ends[row + 1] - 1):
            after = logits({int(place): 201})
            moved = np.flatnonzero(np.array(mx.any(before != after, axis=-1)))
            assert moved[0] == place and moved[-1] < ends[row + 1], (row, place)
            if place < ends[row + 1] - 1 and "sliding" not in name and name != "gemma3":
                assert moved[-1] == ends[row + 1] - 1
    pad = logits({127: 201})
    assert mx.array_equal(before[: ends[3]], pad[: ends[3]]).item()


@pytest.mark.parametrize("rope", [None, "llama3", "linear", "yarn"])
def test_positions_that_run_on_equal_positions_that_start_again(rope):
    config = tiny_config()
    config.language["max_position_embeddings"] = 2048
    if rope:
        config.language["rope_scaling"] = {
            "rope_type": rope,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    vlm = tiny_vlm(config)
    row = make_samples(1, 1)[0]
    filler = Sample(np.full(2000, 7, np.int32), np.ones(2000, bool), [])
    batch = collate_lines([[filler, row]], 2048)
    visual = vlm.project_views(vlm.features(vlm.look([picture(0)]))[0].array[:1])
    hidden, _ = losses.hidden_of(vlm, batch, visual, (), False)
    alone, _ = losses.hidden_of(vlm, collate(group([row], 0), 1), visual, (), False)
    far = hidden[2000 : 2000 + row.length]
    # An angle of 2,000 radians is known to 1e-4 in float32.
    near = collate_lines([[row, row]], 128)
    again, _ = losses.hidden_of(vlm, near, mx.concatenate([visual] * 2), (), False)
    second = again[row.length : 2 * row.length]
    scale = mx.abs(alone).max().item()
    assert mx.abs(second - alone).max().item() < 4e-6 * scale
    assert mx.abs(far - alone).max().item() < 1e-4 * scale
    assert longest_pack(vlm.language) == 2048


HYBRID = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 272, "intermediate_size": 96}
REFUSED = {
    "lfm2": LFM2,
    "rwkv7": {
        "norm_eps": 1e-5,
        "head_dim": 32,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
        "tie_word_embeddings": False,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "time_step_rank": 4,
        "use_bias": False,
        "use_conv_bias": True,
    },
    # Scales its queries by their place in the whole line.
    "ministral3": {
        "head_dim": 16,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_whose_rows_would_feel_each_other_are_not_packed(name):
    lm = build_language(HYBRID | REFUSED[name] | {"model_type": name})
    with pytest.raises(ConfigError, match=f"cannot be packed under .* type '{name}'"):
        longest_pack(lm)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_attention_alone_are_packed(name, dtype):
    lm = decoder(name).language
    lm.set_dtype(dtype)
    assert longest_pack(lm) == 512  # its max_position_embeddings


def test_recomputed_blocks_drop_what_the_forward_pass_dropped():
    vlm, samples = tiny_vlm(), make_samples(1, 2)
    vlm.freeze()
    add_lora(vlm.language, LoRAConfig(rank=4, dropout=0.3))
    for module in vlm.language.modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    vlm.train()
    found = []
    for grad_checkpoint in (False, True):
        mx.random.seed(3)
        loss, gradients = step(vlm, samples, 0, 1, grad_checkpoint)
        found.append((loss, gradients, mx.random.uniform().item()))
    (loss, plain, drawn), (other, recomputed, also) = found
    assert other == pytest.approx(loss, rel=1e-6) and drawn == also
    for name, value in plain.items():
        assert mx.allclose(recomputed[name], value, rtol=1e-4, atol=1e-6).item(), name


def test_a_decoder_inside_another_is_found():
    """mlx-lm's Mistral 3 holds its decoder as `language_model`, its sizes in text_config."""
    inner = tiny_config().language | {"model_type": "mistral"}
    vlm = tiny_vlm(tiny_config(language=inner))
    outer = VLM(tiny_config(language={"model_type": "mistral3", "text_config": inner}))
    outer.language.language_model.update(vlm.language.parameters())
    outer.vision, outer.projector = vlm.vision, vlm.projector
    check_head(outer.language)
    samples = make_samples()
    assert step(outer, samples, 3, 2)[0] == pytest.approx(step(vlm, samples, 0, 1)[0], rel=1e-5)


POWERS = {"token": 0.0, "sample": 1.0, "square": 0.5}


@pytest.mark.parametrize("kind", POWERS)
@pytest.mark.parametrize(("share_prefix", "batch_size"), [(0, 1), (0, 4), (0, 9), (3, 2)])
def test_loss_weighs_tokens_rows_or_between(kind, share_prefix, batch_size):
    """Against InternVL 2.5's formula on full logits, however the step is cut into micro-batches:
    sum of w CE / sum of w, w = 1, 1 / n or 1 / sqrt(n) of a row's n supervised tokens."""
    vlm, samples = tiny_vlm(), make_samples()
    loss, _ = step(vlm, samples, share_prefix, batch_size, targets={}, loss=kind)
    total, weight = 0.0, 0.0
    for sample in samples:
        images = vlm.look([picture(int(sample.images[0]))])
        logits = vlm(sample.tokens[None], images)[0, :-1]
        each = nn.losses.cross_entropy(logits, mx.array(sample.tokens[1:]))
        count = sample.supervised[1:].sum()
        total += (each * mx.array(sample.supervised[1:])).sum().item() / count ** POWERS[kind]
        weight += count ** (1 - POWERS[kind])
    assert loss == pytest.approx(total / weight, rel=1e-5)


def test_float16_gradients_survive_many_supervised_tokens():
    """Of a mean over 20,000 tokens they would underflow; a big step's total stands in for them."""
    vlm, samples = tiny_vlm(), make_samples()
    _, exact = step(vlm, samples, 0, 9, targets={})
    vlm.language.set_dtype(mx.float16)
    batch = collate(group(samples, 0), 8)
    views = mx.stack(
        [f.views[0] for f in vlm.features([vlm.look([picture(int(n))])[0] for n in batch.images])]
    )
    here = count([batch])["loss"]
    gradient = nn.value_and_grad(vlm, batch_loss)
    vlm.language.freeze()
    found, _ = losses.gradients(gradient, vlm, batch, views, {}, {"loss": 20_000.0})
    wanted = {name: exact[name] * (here / 20_000) for name in found}
    off = sum(mx.square(found[name] - wanted[name]).sum().item() for name in found)
    assert off < 0.01**2 * sum(mx.square(value).sum().item() for value in wanted.values())


def test_chunked_logits_equal_whole(monkeypatch):
    vlm, samples = tiny_vlm(), make_samples()
    loss, gradients = step(vlm, samples, 0, 9)
    monkeypatch.setattr(losses, "CHUNK", 7 * 272)
    other, others = step(vlm, samples, 0, 9)
    assert other == pytest.approx(loss, rel=1e-6)
    for key, value in gradients.items():
        assert mx.allclose(others[key], value, rtol=1e-4, atol=1e-6).item(), key


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_last_mlp_runs_only_where_something_is_predicted(name, grad_checkpoint):
    lm = decoder(name).language
    block, mlp = lm.model.layers[-1], lm.model.layers[-1].mlp
    ran = []

    class Watched(type(mlp)):
        def __call__(self, x):
            ran.append(x.shape[:-1])
            return super().__call__(x)

    mlp.__class__ = Watched
    embeddings = mx.random.normal((2, 12, lm.args.hidden_size))
    # Position 0 is predicted from, and padding names it twice more.
    positions, counts = mx.array([0, 5, 23, 0, 0]), mx.array([1.0, 1.0, 1.0, 0.0, 0.0])
    kept, probe = mx.array([0, 5, 23]), mx.random.normal((3, lm.args.hidden_size))

    def wanted_states(params, embeddings, wanted):
        lm.update(params)
        last, _ = hidden_states(lm, embeddings, None, (), grad_checkpoint, wanted)
        states = last.reshape(24, -1)[kept]
        return (states * probe).sum(), states

    params = lm.trainable_parameters()
    found = mx.value_and_grad(wanted_states, argnums=(0, 1))
    (_, states), gradients = found(params, embeddings, (positions, counts))
    mx.eval(states, gradients)
    assert set(ran) == {(1, 5)} and block.mlp is mlp
    (_, whole), expected = found(params, embeddings, None)
    lm.update(params)
    assert (2, 12) in ran
    assert mx.allclose(states, whole, rtol=1e-5, atol=1e-6).item()
    pairs = zip(tree_flatten(gradients), tree_flatten(expected), strict=True)
    for (where, ours), (_, theirs) in pairs:
        scale = mx.abs(theirs).max().item() + 1e-3
        assert mx.abs(ours - theirs).max().item() < 1e-4 * scale, where


def test_the_head_in_pieces_follows_the_factor_before_it(monkeypatch):
    """A scaled loss has scaled gradients, of a trained head too, and nothing is left traced."""
    lm = tiny_vlm().language
    hidden, labels = mx.random.normal((9, lm.args.hidden_size)), mx.arange(9) * 7
    weights = mx.array([1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    module = head_module(lm)

    def scaled(params, hidden, whole):
        module.update(params)
        if whole:
            loss = (losses.cross_entropy(head(lm, hidden), labels) * weights).sum()
        else:
            loss = losses.supervised_loss(lm, hidden, labels, weights)
        return mx.square(loss)

    found = mx.value_and_grad(scaled, argnums=(0, 1))
    expected, by = found(module.trainable_parameters(), hidden, True)
    for chunk in (272 * 2, 272 * 9):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        value, of = found(module.trainable_parameters(), hidden, False)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert mx.allclose(of[0]["weight"], by[0]["weight"], rtol=1e-4, atol=1e-4).item()
        assert mx.allclose(of[1], by[1], rtol=1e-4, atol=1e-4).item()
        lm.eval()
        assert losses.supervised_loss(lm, hidden, labels, weights).item() ** 2 == pytest.approx(
            expected.item(), rel=1e-6
        )
        lm.train()


def test_targets_move_the_loss_and_only_through_their_layers():
    vlm, samples = tiny_vlm(), make_samples()
    plain, _ = step(vlm, samples, 0, 9, targets={})
    _, gradients = step(vlm, samples, 0, 9, targets={"align": AuxiliaryTarget(0, 1e6)})
    aided, _ = step(vlm, samples, 0, 9)
    assert aided > plain
    # Layer 0 is the projector's own output: a huge weight there dwarfs the last block's share.
    last = mx.abs(gradients["language.model.layers.1.mlp.up_proj.weight"]).max().item()
    assert mx.abs(gradients["projector.out_proj.weight"]).max().item() > 1e3 * last


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_no_later_token_moves_an_earlier_logit(training, rows):
    """Bit for bit, through the same functions that training and inference call."""
    vlm = tiny_vlm()
    sample = make_samples(1, 1)[0]
    everything = np.ones(sample.length, bool)
    images = vlm.look([picture(0)])
    views = mx.stack([f.views[0] for f in vlm.features(images)] * rows)

    def logits(tokens: np.ndarray) -> mx.array:
        if not training:
            return vlm(np.stack([tokens] * rows), images * rows)
        changed = Sample(tokens, everything, sample.images, sample.prefix)
        batch = collate(group([changed] * rows, 0), 8)
        hidden, _ = losses.hidden_of(vlm, batch, vlm.project_views(views), (), False)
        return losses.head(vlm.language, hidden).reshape(rows, -1, 272)

    before = logits(sample.tokens)
    for place in (VISUAL + 2, VISUAL + 4, len(sample.tokens) - 1):
        changed = sample.tokens.copy()
        changed[place] = 201
        after = logits(changed)
        assert mx.array_equal(before[:, :place], after[:, :place]).item()
        assert not mx.array_equal(before[:, place], after[:, place]).item()


def test_samples_give_back_what_they_were_made_of():
    rng = np.random.default_rng(0)
    for slots in ([], [(0, 3)], [(4, 2), (6, 5)], [(2, 4), (17, 3)]):
        tokens, supervised = rng.integers(3, 90, 20).astype(np.int32), rng.random(20) < 0.5
        for start, length in slots:
            tokens[start : start + length], supervised[start : start + length] = IMAGE, False
        sample = Sample(tokens, supervised, [], slots=slots)
        assert np.array_equal(sample.tokens, tokens) and sample.length == 20
        assert np.array_equal(sample.supervised, supervised)


def test_right_padded_batch_equals_single_rows():
    vlm = tiny_vlm()
    short, long = make_samples(2, 1)
    images = vlm.look([picture(0)])
    tokens = np.zeros((2, 40), np.int32)
    tokens[0, : len(short.tokens)] = short.tokens
    tokens[1, : len(long.tokens)] = long.tokens
    both = vlm(tokens, images * 2)
    for row, sample in enumerate((short, long)):
        alone = vlm(sample.tokens[None], images)[0]
        assert mx.allclose(both[row, : len(sample.tokens)], alone, rtol=1e-4, atol=1e-4).item()
