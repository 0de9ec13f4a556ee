"""A request to a run to stop after its current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


class Stop:
    """A request to a run to stop after its current step: `asked`, which any thread may set.

    While a run trains in the main thread, `signals` set it, too; other threads may not have signal
    handlers. A second signal has its previous effect, KeyboardInterrupt for Ctrl-C. Signals within
    `echo` seconds of the first count as one, because torchrun passes on what the terminal has sent
    to each process already, and `timeout` sends twice.
    """

    def __init__(self, *signals: int) -> None:
        self.signals, self.asked, self.first = signals, False, 0.0
        self.echo = 1.0 if "WORLD_SIZE" in os.environ else 0.02

    def __enter__(self) -> None:
        heard = self.signals if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._hear) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.asked, now = True, time.monotonic()
        self.first = self.first or now
        if now - self.first > self.echo:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
