"""The prompt loop's lines: words as a shell reads them, completion, dragged pictures, blocks."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.cli.lines import Lines, completions, dragged, first_word, history_file

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("/image", "/images", "/save")


def is_picture(path: Path) -> bool:
    return path.suffix == ".png" and path.is_file()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("cat.png", "my dog.png", "it's.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "more pictures").mkdir()
    (tmp_path / "more pictures" / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(st.text(alphabet="ab'\"\\ \t/é", max_size=12), st.text(alphabet="xy ", max_size=6))
def test_words_written_by_a_shells_rules_come_back(word, rest):
    import shlex

    if word:
        found, written, after = first_word(f"{shlex.quote(word)} {rest}")
        assert (found, written, after) == (word, shlex.quote(word), f" {rest}")


def test_pictures_dragged_into_the_window(folder):
    home = folder / "my dog.png"
    for written in ("my\\ dog.png", "'my dog.png'", '"my dog.png"', "my dog.png"):
        assert dragged(written, is_picture) == (["my dog.png"], "")
    assert dragged(f"file://{folder}/my%20dog.png", is_picture) == ([str(home)], "")
    assert dragged("cat.png 'my dog.png' what are they?", is_picture) == (
        ["cat.png", "my dog.png"],
        "what are they?",
    )
    for text in ("what is cat.png?", "missing.png what?", "", "it's fine", "notes.txt"):
        assert dragged(text, is_picture) == ([], text)


def complete(line: str) -> list[str]:
    """Whole lines, as a terminal would show them: what readline replaces begins after a blank."""
    begin = max(line.rfind(c) for c in " \t\n") + 1
    return [line[:begin] + found for found in completions(line, begin, COMMANDS)]


def test_tab_completes_commands_and_paths(folder):
    assert complete("/im") == ["/image ", "/images "]
    assert complete("/image c") == ["/image cat.png "]
    assert complete("/image cat.png my") == ["/image cat.png my\\ dog.png "]
    assert complete("/image my\\ d") == ["/image my\\ dog.png "]
    assert complete("/image 'my d") == ["/image 'my dog.png' "]
    assert complete("/image it") == ["/image it\\'s.png "]
    assert complete("/image more\\ pictures/") == ["/image more\\ pictures/a.png "]
    assert complete("/image m") == ["/image more\\ pictures/", "/image my\\ dog.png "]
    assert complete("/image .h") == ["/image .hidden.png "]
    assert complete("/image nowhere/x") == [] == complete("/image zz")
    assert all(".hidden" not in found for found in complete("/image "))
    assert complete(f"{folder}/ca") == [f"{folder}/cat.png "]


def entries(monkeypatch, text: str) -> list[str]:
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    lines, found = Lines(COMMANDS), []
    while True:
        try:
            found.append(lines.read())
        except EOFError:
            return found


def test_one_question_of_several_lines(monkeypatch):
    text = 'one\n\n"""two\n  and\n\nmore""" rest\nthree\\\nfour\n"""five"""\nsix\\'
    assert entries(monkeypatch, text) == [
        "one",
        "",
        "two\n  and\n\nmore",
        "three\nfour",
        "five",
        "six",
    ]
    assert entries(monkeypatch, '"""no end\nin sight') == ["no end\nin sight"]


SCRIPT = """
from mlxvlm.cli.lines import Lines
lines = Lines(("/image",))
while True:
    try:
        print("got", repr(lines.read()), flush=True)
    except EOFError:
        break
"""


def at_terminal(typed: list[bytes], state: Path) -> str:
    """What a terminal shows of SCRIPT when these are typed, each at a prompt."""
    leader, follower = pty.openpty()
    env = {**os.environ, "XDG_STATE_HOME": str(state), "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=follower, stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    shown = b""
    for keys in [*typed, b"\x04"]:
        deadline = time.monotonic() + 20
        while not shown.rstrip().endswith(b">") and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 4096)
        os.write(leader, keys)
        shown += b"|"
    child.wait(20)
    while select.select([leader], [], [], 0.2)[0]:
        try:
            shown += os.read(leader, 4096)
        except OSError:
            break
    os.close(leader)
    return shown.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems echo otherwise")
def test_history_and_completion_at_a_terminal(tmp_path, folder):
    assert "got 'what is this?'" in at_terminal([b"what is this?\n"], tmp_path / "state")
    kept = tmp_path / "state" / "mlxvlm" / "history"
    assert "what is this?" in kept.read_text() and kept.stat().st_mode & 0o077 == 0
    up = b"\x1b[A"
    assert "got 'what is this?'" in at_terminal([up + b"\n"], tmp_path / "state")
    assert "got '/image cat.png'" in at_terminal([b"/image ca\t\n"], tmp_path / "state")


def test_history_lies_where_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "mlxvlm" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert history_file() == Path.home() / ".local" / "state" / "mlxvlm" / "history"
