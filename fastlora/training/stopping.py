"""A request to a run to stop after the step at hand."""

from __future__ import annotations

import signal
import time
from types import FrameType

ECHO = 1.0  # seconds in which a signal is the first one again: torchrun and `timeout` pass it on


class Stop:
    """A request to a run to end after the step at hand: `asked`, which any thread may set.

    While the run is in its steps, `signals` ask, too; one that comes later than `ECHO` after the
    first does what it did before.
    """

    def __init__(self, *signals: int) -> None:
        self.signals, self.asked, self.first = signals, False, 0.0

    def __enter__(self) -> None:
        self.previous = {number: signal.signal(number, self._hear) for number in self.signals}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.asked, now = True, time.monotonic()
        self.first = self.first or now
        if now - self.first > ECHO:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
