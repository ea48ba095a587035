"""Bounds on what MLX keeps, and a Mac kept awake for as long as a run lasts and no longer."""

import resource
import subprocess
import sys

import mlx.core as mx
import pytest

from mlxvlm.machine import limits


@pytest.fixture(autouse=True)
def restore():
    before = mx.set_cache_limit(10**9)
    mx.set_cache_limit(before)
    yield
    mx.set_cache_limit(before)


@pytest.mark.parametrize(
    ("gigabytes", "training", "serving"), [(8, 2e9, 0.8e9), (16, 4e9, 1.6e9), (64, 16e9, 2e9)]
)
def test_cache_limits(monkeypatch, gigabytes, training, serving):
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": gigabytes * 10**9})
    assert limits.limit_training() == training
    assert mx.set_cache_limit(1) == training
    assert limits.limit_serving() == serving
    assert mx.set_cache_limit(1) == serving


def test_memory_size_without_metal(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "cpu"})
    assert limits.memory_size() > 10**9


def test_freed_buffers_stay_under_the_limit(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 40 * 10**6})
    limits.limit_training()
    for size in range(1, 30):
        mx.eval(mx.zeros((size, 100_000)))
    assert mx.get_cache_memory() <= 10 * 10**6


def test_open_files(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: asked.append(pair))
    limits.allow_open_files()
    assert asked == [(4096, 4096)]


def test_awake_only_while_the_block_runs_and_only_on_a_mac(monkeypatch):
    started = []

    class Guard:
        def __init__(self, command, **_):
            started.append(command)

        def terminate(self):
            started.append("terminate")

        def wait(self):
            started.append("wait")

    monkeypatch.setattr(subprocess, "Popen", Guard)
    monkeypatch.setattr(sys, "platform", "linux")
    with limits.awake():
        assert started == []
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ZeroDivisionError), limits.awake():
        assert started[0][:2] == ["/usr/bin/caffeinate", "-i"] and "-d" not in started[0]
        raise ZeroDivisionError
    assert started[1:] == ["terminate", "wait"]
