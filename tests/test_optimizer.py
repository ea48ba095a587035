"""Every rule in groups, the schedule as a table, and a state that survives a checkpoint exactly."""

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.errors import UsageError, WeightsError
from mlxvlm.train import checkpoint
from mlxvlm.train.optimizer import Optimizer, clip, learning_rate
from mlxvlm.train.stages import OPTIMIZERS, TrainConfig, fingerprint

RATES = [
    # (config, step of 100, share of the peak)
    ({"warmup": 0}, 0, 1.0),
    ({"warmup": 0.1}, 0, 1 / 11),
    ({"warmup": 0.1}, 9, 10 / 11),
    ({"warmup": 0.1}, 10, 1.0),
    ({"warmup": 10}, 0, 1 / 11),
    ({"warmup": 0.1}, 55, 0.5),
    ({"warmup": 0, "schedule": "linear"}, 25, 0.75),
    ({"warmup": 0, "schedule": "linear", "min_learning_rate": 0.2}, 100, 0.2),
    ({"warmup": 0, "schedule": "linear", "hold": 0.4}, 40, 1.0),
    ({"warmup": 0, "schedule": "linear", "hold": 0.4}, 70, 0.5),
    ({"warmup": 0, "schedule": "constant"}, 99, 1.0),
]


@pytest.mark.parametrize(("fields", "step", "share"), RATES)
def test_schedule(fields, step, share):
    assert learning_rate(TrainConfig(**fields), step, 100) == pytest.approx(share)


def parameters() -> dict[str, mx.array]:
    return {
        "projector.norm.weight": mx.ones(4),
        "projector.out_proj.weight": mx.random.normal((4, 4)),
        "language.lm_head.weight": mx.random.normal((4, 4)),
    }


def gradients(step: int) -> dict[str, mx.array]:
    key = mx.random.split(mx.random.key(step), 3)
    return {
        n: mx.random.normal(v.shape, key=k)
        for (n, v), k in zip(parameters().items(), key, strict=True)
    }


def test_adamw_by_hand():
    """Two steps against the formula in float64, with decay on matrices only and its own rate."""
    config = TrainConfig(
        train="projector,lm", learning_rate=0.1, projector_learning_rate=0.01, weight_decay=0.5
    )
    before = parameters()
    optimizer = Optimizer(config, before)
    state = {n: np.array(v, dtype=np.float64) for n, v in before.items()}
    first = {n: np.zeros_like(v) for n, v in state.items()}
    second = {n: np.zeros_like(v) for n, v in state.items()}
    now = before
    for step in (1, 2):
        grads = gradients(step)
        now = optimizer.apply(grads, now, 0.5)
        for name, value in state.items():
            g = np.array(grads[name], dtype=np.float64)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            rate = 0.5 * (0.01 if name.startswith("projector") else 0.1)
            decay = 0.5 if value.ndim > 1 else 0.0
            move = first[name] / (1 - 0.9**step)
            move /= np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            state[name] = value * (1 - rate * decay) - rate * move
    for name, value in state.items():
        np.testing.assert_allclose(np.array(now[name]), value, rtol=2e-4, atol=2e-5)


def test_clip_is_by_global_norm():
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip(grads, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert clipped["a"][0].item() == pytest.approx(0.6, rel=1e-4)
    assert clipped["b"].item() == pytest.approx(0.8, rel=1e-4)
    assert clip(grads, 0)[0]["b"].item() == 4.0
    assert clip(grads, 10.0)[0]["a"][0].item() == 3.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_adamws_and_spares_vectors(name):
    """Without a gradient's say: what two runs that differ in decay alone differ by."""
    if name == "adam":
        with pytest.raises(UsageError, match="adamw is Adam with it"):
            TrainConfig(optimizer=name, weight_decay=0.5)
        return
    before, after = parameters(), []
    for decay in (0.0, 0.5):
        fields = {"learning_rate": 0.1, "weight_decay": decay, "optimizer": name}
        optimizer = Optimizer(TrainConfig(train="projector,lm", **fields), before)
        after.append(optimizer.apply(gradients(1), before, 1.0))
    plain, decayed = after
    for key, value in before.items():
        lost = 0.05 * value if value.ndim > 1 else mx.zeros_like(value)
        assert mx.allclose(plain[key] - decayed[key], lost, atol=1e-5).item(), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_goes_down(name):
    """|x - y|^2 over a matrix and a vector, from far away."""
    wanted = {k: v + 1 for k, v in parameters().items()}
    now = parameters()
    rate = {"adagrad": 0.3, "sgd": 0.02}.get(name, 0.05)
    optimizer = Optimizer(
        TrainConfig(train="projector,lm", learning_rate=rate, optimizer=name), now
    )
    first = sum(mx.square(now[k] - wanted[k]).sum().item() for k in now)
    for _ in range(100):
        now = optimizer.apply({k: 2 * (now[k] - wanted[k]) for k in now}, now, 1.0)
    assert sum(mx.square(now[k] - wanted[k]).sum().item() for k in now) < 0.2 * first


def test_muon_takes_matrices_with_steps_as_large_as_adamws():
    now = parameters() | {"language.model.embed_tokens.weight": mx.ones((8, 4))}
    now["language.mlp.weight"] = mx.random.normal((64, 32))
    now["projector.query"] = mx.ones((8, 4))
    grads = {k: mx.random.normal(v.shape, key=mx.random.key(len(k))) for k, v in now.items()}
    config = TrainConfig(train="projector,lm", learning_rate=0.1, optimizer="muon")
    optimizer = Optimizer(config, now)
    kinds = {name: type(g.rule).__name__ for g in optimizer.groups for name in g.names}
    assert {name for name, kind in kinds.items() if kind == "Muon"} == {
        "projector.out_proj.weight",
        "language.mlp.weight",
    }
    step = (
        optimizer.apply(grads, now, 1.0)["language.mlp.weight"] - now["language.mlp.weight"]
    ) / 0.1
    assert mx.sqrt(mx.square(step).mean()).item() == pytest.approx(0.2, rel=0.2)
    # 32 columns, orthogonal: all singular values are alike.
    values = np.linalg.svd(np.array(step), compute_uv=False)
    assert values.max() < 2 * values.min()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_restores_everything_bit_for_bit(tmp_path, name):
    config = TrainConfig(train="projector,lm", out=str(tmp_path), optimizer=name)
    now = parameters()
    optimizer = Optimizer(config, now)
    now = optimizer.apply(gradients(1), now, 1.0)
    checkpoint.save(tmp_path, 1, now, optimizer, fingerprint(config), keep=2)
    expected = optimizer.apply(gradients(2), now, 1.0)

    other = Optimizer(config, parameters())
    step, weights, _ = checkpoint.load(tmp_path, other, fingerprint(config))
    assert step == 1
    again = other.apply(gradients(2), weights, 1.0)
    for name, value in expected.items():
        assert mx.array_equal(again[name], value).item(), name


def test_old_checkpoints_are_pruned_and_a_torn_one_is_no_checkpoint(tmp_path):
    config = TrainConfig(train="projector,lm")
    optimizer = Optimizer(config, parameters())
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, parameters(), optimizer, fingerprint(config), keep=2)
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_resume_with_another_recipe_names_the_field(tmp_path):
    optimizer = Optimizer(TrainConfig(train="projector,lm"), parameters())
    before = fingerprint(TrainConfig(train="projector,lm"))
    checkpoint.save(tmp_path, 1, parameters(), optimizer, before, keep=1)
    after = fingerprint(TrainConfig(train="projector,lm", batch_size=7))
    with pytest.raises(Exception, match="batch_size was 4, now 7"):
        checkpoint.load(tmp_path, optimizer, after)


def test_resume_with_another_model_names_what_does_not_fit(tmp_path):
    config = TrainConfig(train="projector,lm")
    optimizer = Optimizer(config, parameters())
    checkpoint.save(tmp_path, 1, parameters(), optimizer, fingerprint(config), keep=1)
    name, *_ = parameters()
    wider = parameters() | {name: mx.zeros((9, 9))}
    with pytest.raises(WeightsError, match=f"misshapen: {name} "):
        checkpoint.load(tmp_path, Optimizer(config, wider), fingerprint(config))
