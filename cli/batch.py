"""`mlxvlm chat --batch`: a file of questions, answered many at a time into another file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.talk import note
from mlxvlm.errors import DataError, UsageError, VLMError

if TYPE_CHECKING:
    from mlxvlm.batch import Ask
    from mlxvlm.model import VLM


class BatchFile:
    """Rows of a .jsonl file and their answers in another, one JSON object each:

        {"row": 3, "input": {...}, "text": "A cat.", "finish_reason": "stop", ...}
        {"row": 4, "input": {...}, "error": "..."}

    Rows are written as they are answered. One that `out` has an answer of is not asked again; one
    that failed is.
    """

    def __init__(self, source: str, out: str, system: str = ""):
        self.source, self.out, self.system = Path(source).expanduser(), Path(out), system
        if not self.source.is_file():
            raise UsageError(f"--batch {source} is no file; it wants a .jsonl file of questions.")
        if self.out.exists() and self.out.samefile(self.source):
            raise UsageError(f"--out {out} is the file of the questions: name another.")
        text = self.source.read_text(encoding="utf-8", errors="replace")
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        self.rows: dict[int, Any] = {i: _read(line) for i, line in lines}
        self.answered = self._kept()

    def _kept(self) -> set[int]:
        """Rows that have answers; lines that hold none leave the file."""
        if not self.out.exists():
            return set()
        from mlxvlm.durable import write_whole

        kept: dict[int, str] = {}
        lines = self.out.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines:
            found = _read(line)
            # A line that was cut short is no object.
            if not isinstance(found, dict) or "text" not in found:
                continue
            row = found.get("row")
            if self.rows.get(row) != found.get("input"):
                raise UsageError(
                    f"--out {self.out} holds answers to other questions than {self.source} has "
                    f"(row {row}): name another file, or remove it."
                )
            kept[row] = line
        write_whole(self.out, "".join(line + "\n" for line in kept.values()).encode())
        return set(kept)

    def answer(self, vlm: VLM, **options: Any) -> None:
        """Asks what has no answer yet; options as in `vlm.batch`."""
        todo = [row for row in self.rows if row not in self.answered]
        if self.answered:
            note(f"({len(self.answered)} of {len(self.rows)} rows have answers already)")
        asked: list[int] = []
        failed = 0
        with self.out.open("a", encoding="utf-8") as file:

            def write(row: int, result: dict[str, Any]) -> None:
                nonlocal failed
                failed += "error" in result
                line = {"row": row, "input": self.rows[row], **result}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            def asks() -> Iterator[Ask]:
                for row in todo:
                    try:
                        ask = self._ask(row)
                    except VLMError as error:
                        write(row, {"error": str(error)})
                        continue
                    asked.append(row)
                    yield ask

            try:
                for index, reply in vlm.batch(asks(), **options):
                    if isinstance(reply, VLMError):
                        write(asked[index], {"error": str(reply)})
                        continue
                    told = asdict(reply)
                    del told["tokens"]
                    write(asked[index], told)
            except KeyboardInterrupt:
                note(f"(stopped; the same command goes on with {self.out})")
                raise
        bad = f', {failed} could not be (see their "error")' if failed else ""
        note(f"({len(todo) - failed} of {len(todo)} rows answered{bad}: {self.out})")

    def _ask(self, row: int) -> Ask:
        """A row's messages up to its last question, and its pictures."""
        from mlxvlm.data.records import parse_record

        where, raw = f"{self.source.name}:{row}", self.rows[row]
        if isinstance(raw, dict) and isinstance(raw.get("prompt"), str) and "completion" not in raw:
            raw = {k: v for k, v in raw.items() if k != "prompt"} | {
                "messages": [{"role": "user", "content": raw["prompt"]}]
            }
        record = parse_record(raw, where)
        messages = record.messages
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # what it is to be compared with
        if not messages or messages[-1]["role"] != "user":
            raise DataError(f"{where}: there is no question at the end of its messages.")
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        folder = self.source.parent
        return messages, [name if "://" in name else str(folder / name) for name in record.images]


def _read(line: str) -> Any:
    """A line's JSON; of another text, the text."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line
