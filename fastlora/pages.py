"""A stand-in with the signatures of the real pages.py, to be replaced by it when merging."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlora.files import atomic_open


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path: Path, panels: int, draw: Callable[[Any, list[Any]], None]) -> str:
    """Write the PNG that `draw` makes of a figure; returns its Markdown, "" if not possible."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3), dpi=150, layout="constrained")
    draw(figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)])
    figure.savefig(path)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def write_pages(folder: Path, text: str) -> None:
    """Write report.md and report.html."""
    for name, content in (("report.md", text + "\n"), ("report.html", f"<pre>{text}</pre>")):
        with atomic_open(folder / name) as file:
            file.write(content)
