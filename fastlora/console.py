"""A command's output in the terminal, and the same as plain text in a run's train.log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without output when its reader is gone, because a run's work is not in it."""
        self.quiet = True


class Log:
    """Writes lines and tables to the terminal and, where `file` is set, to a run's train.log.

    The terminal gets nothing if `quiet`, and only the progress bar if `brief`.
    """

    def __init__(self, quiet: bool, brief: bool = False) -> None:
        # Without highlighting and wrapping, lines are the same in a pipe and easy to search.
        self.console = _Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.brief = brief
        self.file: Path | None = None

    def line(self, text: str) -> None:
        """Write a line of text."""
        if not self.brief:
            # A path may have characters that the terminal's encoding lacks.
            shown = text.encode(coding := self.console.encoding, "backslashreplace").decode(coding)
            self.console.print(shown, markup=False)
        self._write_file(text)

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Write a line for each name and its text, with the texts aligned."""
        for name, text in pairs:
            self.line(f"{name:<10} {text}")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Write a table; its columns are plain text in train.log."""
        table = Table(*header, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(table.columns):
            column.justify, column.overflow = "right" if number > 1 else "left", "fold"
        for row in rows:
            table.add_row(*map(Text, row))  # texts may look like rich's markup
        for row in (header, *rows):
            self._write_file("  ".join(f"{cell:<12}" for cell in row))
        if not self.brief:
            self.console.print(table)

    def _write_file(self, text: str) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text + "\n")


class Bar:
    """A progress bar in a terminal, or a line every `LINE_EVERY` seconds elsewhere."""

    def __init__(self, log: Log, total: int, done: int) -> None:
        self.log, self.total, self.last = log, total, time.monotonic()
        bar = ("step", BarColumn(), "{task.completed}/{task.total}")
        times = (TimeElapsedColumn(), TimeRemainingColumn(), "{task.fields[status]}")
        hidden = log.console.quiet or not log.console.is_terminal
        self.progress = Progress(*bar, *times, console=log.console, transient=True, disable=hidden)
        self.task = self.progress.add_task("step", total=total, completed=done, status="")
        self.progress.start()

    def update(self, step: int, status: str) -> None:
        """Show that `step` steps are done."""
        self.progress.update(self.task, completed=step, status=status)
        if self.progress.disable and time.monotonic() - self.last >= LINE_EVERY:
            self.last = time.monotonic()
            self.log.line(f"step {step}/{self.total}  {status}")

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()


def format_score(value: float | None) -> str:
    """A score with three decimals, or "n/a" if it is not defined."""
    return "n/a" if value is None else f"{value:.3f}"


def format_scores(values: Mapping[str, float | None]) -> str:
    """Task names and their losses or scores on one line."""
    return "  ".join(f"{name} {format_score(value)}" for name, value in values.items())
