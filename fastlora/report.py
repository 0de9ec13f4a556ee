"""A stand-in with the signatures of the real report.py, to be replaced by it when merging."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlora.files import atomic_open

NO_PLOTS = 'plots: install the report extra (pip install "fastlora-bert[report]")'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Write the PNG of what `draw` puts on a figure; returns its Markdown, "" if not possible."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=150)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def write_pages(folder: Path, text: str) -> None:
    """Write report.md and report.html."""
    for name, content in (("report.md", text), ("report.html", f"<pre>{text}</pre>")):
        with atomic_open(folder / name) as file:
            file.write(content)
