"""Texts that end an answer, found while it streams."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError


class StopStrings:
    """Hands text on, except what may yet turn out to be the start of a stop string.

    The answer ends before the stop string that is complete first; of two that end together, before
    the one that begins first.
    """

    def __init__(self, stops: str | Sequence[str] = ()):
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if bad := [stop for stop in self.stops if not isinstance(stop, str) or not stop]:
            raise ConfigError(f"stop (={bad[0]!r}) must be one text or several, none empty.")
        self.found = False
        self._held = ""

    def add(self, text: str) -> str:
        """What may be shown, now that `text` has come too."""
        if not self.stops:
            return text
        if self.found:
            return ""
        self._held += text
        ends = [
            (self._held.find(stop) + len(stop), self._held.find(stop))
            for stop in self.stops
            if stop in self._held
        ]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        safe = len(self._held) - max(self._begun(stop) for stop in self.stops)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """How many characters at the end of the held text are the start of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
