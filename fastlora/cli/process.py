"""Sets a command's signal handlers and malloc options, which a library must not change."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading

from fastlora.training.stopping import Stop


def command_stop() -> Stop:
    """Keep freed memory, and return a request to stop that Ctrl-C and SIGTERM set."""
    keep_freed_memory()
    # A full disk in TensorBoard's thread is an error of the main thread, too, which reports it.
    report = threading.excepthook
    threading.excepthook = lambda e: None if issubclass(e.exc_type, OSError) else report(e)
    return Stop(signal.SIGINT, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, because returned memory costs page faults at every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap, too
