"""The prompt loop's lines: history, completion, several lines at once, paths dragged in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import typer

BLOCK = '"""'  # alone or in front: the lines up to the next one are one question
HISTORY = 1000  # lines kept
PROMPT, MORE = "> ", "... "


def history_file() -> Path:
    """Where lines are kept from one talk to the next, as the XDG base directories have it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlxvlm" / "history"


class Lines:
    """What a user types, entry by entry; at a terminal with history and completion.

    commands: what completion offers behind a "/" that begins a line.
    """

    def __init__(self, commands: Sequence[str]):
        self._edited = sys.stdin.isatty() and sys.stdout.isatty()
        if not self._edited:
            return
        try:
            import readline
        except ImportError:
            return  # a Python without it still reads lines
        self._prepare(readline, commands)

    def _prepare(self, readline: Any, commands: Sequence[str]) -> None:
        import atexit

        file = history_file()
        try:
            readline.read_history_file(file)
        except OSError:
            pass  # none yet, or not readable: a talk without a past
        readline.set_history_length(HISTORY)

        def keep() -> None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(file)
                file.chmod(0o600)  # what one asks is nobody else's business
            except OSError:
                pass

        atexit.register(keep)

        def complete(text: str, state: int) -> str | None:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            found = completions(line, readline.get_begidx(), commands)
            return found[state] if state < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        # macOS' Python is linked with libedit, which has its own words for it.
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def read(self) -> str:
        """One entry, stripped; a backslash at a line's end joins the next, and \"\"\" up to the
        next \"\"\" holds any lines. EOFError where there is no more."""
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(MORE))
            except EOFError:
                break
        return "\n".join(lines).strip()

    def _block(self, line: str) -> str:
        lines = []
        while BLOCK not in line:
            lines.append(line)
            try:
                line = self._line(MORE)
            except EOFError:
                break
        else:
            lines.append(line.partition(BLOCK)[0])
        return "\n".join(lines).strip()

    def _line(self, prompt: str) -> str:
        if self._edited:
            return text_of(input(prompt))
        if sys.stdin.isatty():
            typer.echo(prompt, nl=False, err=True)  # stdout is a pipe or a file, for answers alone
        line = sys.stdin.buffer.readline().decode("utf-8", "replace")
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def text_of(raw: str) -> str:
    """Bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def first_word(line: str) -> tuple[str, str, str]:
    """The first word as a shell reads it, how it was written, and the rest of the line.

    A quote that is not closed reaches to the end.
    """
    word, quote, at = "", "", len(line) - len(line.lstrip())
    start = at
    while at < len(line):
        c = line[at]
        if quote:
            if c == quote:
                quote = ""
            elif c == "\\" and quote == '"' and line[at + 1 : at + 2] in ('"', "\\"):
                at += 1
                word += line[at]
            else:
                word += c
        elif c.isspace():
            break
        elif c in "'\"":
            quote = c
        elif c == "\\" and at + 1 < len(line):
            at += 1
            word += line[at]
        else:
            word += c
        at += 1
    return word, line[start:at], line[at:]


def dragged(line: str, is_picture: Callable[[Path], bool]) -> tuple[list[str], str]:
    """Paths of pictures that a line begins with, as terminals write a file dragged into them
    (quoted, with backslashes, or a file:// address), and the rest of the line."""
    whole = Path(line.strip()).expanduser()
    if is_picture(whole):  # typed by hand, a path may hold a bare space
        return [str(whole)], ""
    paths = []
    while line.strip():
        word, _, rest = first_word(line)
        if word.startswith("file://"):
            word = unquote(urlsplit(word).path)
        path = Path(word).expanduser()
        if not is_picture(path):
            break
        paths.append(str(path))
        line = rest
    return paths, line.strip()


def completions(line: str, begin: int, commands: Sequence[str]) -> list[str]:
    """What may stand from `begin` on in place of the line's last word: a command or a path.

    Of a path with spaces only what lies behind `begin` is given, written as the word was begun: in
    its quotes, or with backslashes.
    """
    word, written, rest = first_word(line)
    start = line.index(written) if written else len(line)
    if not rest and word.startswith("/"):
        found = [command for command in commands if command.startswith(word)]
        if found:
            return [f"{command} " for command in found]
    while rest:
        start = len(line) - len(rest.lstrip())
        word, written, rest = first_word(rest)
    quote = written[:1] if written[:1] in ("'", '"') else ""
    folder, name = os.path.split(word)
    try:
        inside = sorted(Path(folder or ".").expanduser().iterdir())
    except OSError:
        return []
    found = []
    for path in inside:
        if not path.name.startswith(name) or (path.name.startswith(".") and not name):
            continue
        told = os.path.join(folder, path.name) + ("/" if path.is_dir() else "")
        told = quote + told if quote else re.sub(r"([\s'\"\\])", r"\\\1", told)
        end = quote + " " if quote else " "
        found.append((told if path.is_dir() else told + end)[begin - start :])
    return found
