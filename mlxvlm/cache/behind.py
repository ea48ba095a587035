"""Work done behind the encoder's back: in order, in one thread, and no more after an error."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """`do(act)` has `act` done soon; it waits while `depth` others are to be done before.

    An error ends it: what was to come is never done, and whoever hands over the next act, or
    waits, gets the error. NumPy and files only: another thread owns MLX.
    """

    def __init__(self, depth: int = 2):
        self.depth = depth
        self._waiting: deque[Future[None]] = deque()
        self._stopped = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlxvlm-write")

    def do(self, act: Callable[[], None]) -> None:
        while len(self._waiting) >= self.depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, act))

    def wait(self) -> None:
        """Until all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Ends after the act that is being done; the others are dropped."""
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _do(self, act: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            act()
        except BaseException:
            self._stopped = True
            raise
