"""What a command does to its process, and a library leaves to its host: signals and malloc."""

from __future__ import annotations

import ctypes
import signal
import sys

from fastlora.training.stopping import Stop


def command_stop() -> Stop:
    """Make the process a training command's: it keeps memory, Ctrl-C and SIGTERM ask it to stop."""
    keep_freed_memory()
    return Stop(signal.SIGINT, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees: given back, it is faulted in again every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap, too
