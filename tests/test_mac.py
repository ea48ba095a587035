"""What is done on a Mac alone: its tools as they answer there, and nothing elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxvlm.machine import backup, power, sync

ON_BATTERY = (
    "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=123)\t81%; discharging; 5:02 left\n"
)
ON_MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=123)\t100%; charged; 0:00\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Commands that were run; each answers with `reply`, or raises it."""
    calls = SimpleNamespace(commands=[], reply=subprocess.CompletedProcess([], 0, "", ""))

    def run(command, **options):
        assert options["timeout"] and not options["check"]
        calls.commands.append(command)
        if isinstance(calls.reply, Exception):
            raise calls.reply
        return calls.reply

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "platform", "darwin")
    return calls


def test_elsewhere_nothing_happens(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert not backup.exclude(tmp_path / "cache") and not (tmp_path / "cache").exists()
    assert power.warning() is None and sync.warning(tmp_path / "Desktop" / "cache") is None
    assert asked.commands == []


def test_a_cache_is_kept_out_of_time_machine(asked, tmp_path):
    assert backup.exclude(tmp_path / "a" / "cache")
    assert asked.commands == [["/usr/bin/tmutil", "addexclusion", str(tmp_path / "a" / "cache")]]
    assert (tmp_path / "a" / "cache").is_dir()  # what is not there cannot be marked
    for reply in (
        subprocess.CompletedProcess([], 1, "", "no"),
        FileNotFoundError(),
        subprocess.TimeoutExpired("tmutil", 20),
    ):
        asked.reply = reply
        assert not backup.exclude(tmp_path)


def test_a_battery_is_warned_of(asked):
    asked.reply = subprocess.CompletedProcess([], 0, ON_BATTERY, "")
    assert "battery (81%)" in str(power.warning())
    assert asked.commands == [["/usr/bin/pmset", "-g", "batt"]]
    asked.reply = subprocess.CompletedProcess([], 0, ON_MAINS, "")
    assert power.warning() is None
    asked.reply = FileNotFoundError()
    assert power.warning() is None


def test_synced_folders_are_warned_of(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for inside in ("Desktop/cache", "Documents/a/b", "Library/Mobile Documents/x"):
        assert "iCloud" in str(sync.warning(tmp_path / inside))
    for outside in ("cache", "Library/Caches/mlxvlm", "Desktop2/cache"):
        assert sync.warning(tmp_path / outside) is None
    (tmp_path / "Documents").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Documents")
    assert "~/Documents" in str(sync.warning(tmp_path / "link" / "cache"))
