"""What reports are made of: tables and plots in Markdown, and the pages they are read as.

matplotlib is an extra: without it there are no plots.
"""

from __future__ import annotations

import base64
import html
import math
import mimetypes
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_PLOTS = 'plots: install the report extra (pip install "fastlora-bert[report]")'
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be named "$5 to $9"
}
# The policy makes sure that a page asks no place for anything and runs no script.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: auto; padding: 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: left }}
pre, th {{ background: #8882 }}
pre {{ padding: 1rem; overflow-x: auto }}
img {{ max-width: 100%; background: white }}
</style>
{body}
</html>
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are flush right, pipes and tags in cells are escaped."""
    cells = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row]
        for row in (header, *rows)
    ]
    columns = list(zip(*cells[1:], strict=True)) or [()] * len(header)
    numeric = [all(re.fullmatch(r"[\d.,%+-]*|n/a", cell) for cell in column) for column in columns]
    cells.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot(path: Path, panels: int, draw: Callable[[Figure, list[Axes]], None]) -> str:
    """Write the PNG that `draw` makes of a figure with empty panels, in rows of up to three.

    Returns the Markdown that shows `FOLDER/plots/NAME.png` in `FOLDER/report.md`; without
    matplotlib returns "" and writes nothing.
    """
    if not find_spec("matplotlib"):
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot's: no window, no global list

    rows = math.ceil(panels / 3)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3 * rows), dpi=150, layout="constrained")
        columns = math.ceil(panels / rows)
        draw(figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)])
        with atomic_open(path) as file:
            figure.savefig(file.buffer)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def write_pages(folder: Path, text: str) -> None:
    """Write Markdown as `folder/report.md` and as one self-contained page, `report.html`.

    Both end with how to get plots where matplotlib is missing. Images, named by their paths in
    `folder`, become part of the page; OSError when one is missing.
    """
    # Imported here: only the end of a command writes a page.
    from markdown import markdown

    def inline(match: re.Match[str]) -> str:
        kind, _ = mimetypes.guess_type(match[1])
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:{kind};base64,{data}"'

    if not find_spec("matplotlib"):
        text += f"\n\n{NO_PLOTS}"
    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r'(?<= )src="([^":]+)"(?=[^<>]*>)', inline, body)
    heading = re.search("^# (.+)", text, re.MULTILINE)
    page = PAGE.format(title=html.escape(heading[1] if heading else folder.name), body=body)
    for name, content in (("report.md", text + "\n"), ("report.html", page)):
        with atomic_open(folder / name) as file:
            file.write(content)
