"""Reports: lists of blocks that are written as Markdown and as one HTML page.

A block is a string (a paragraph), a list of strings (a bulleted list), or what `heading`, `code`,
`table` or `plot` returns. It holds plain text; the templates escape what Markdown and HTML would
interpret.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import RunError, in_place_of
from fastlora.files import atomic_open

if TYPE_CHECKING:  # matplotlib is optional; other modules take these names from here
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

NO_PLOTS = "There are no plots: matplotlib is not installed."
TEMPLATES = Path(__file__).parent / "templates"

Block = str | list[str] | dict[str, Any]


def heading(text: str, level: int = 2) -> Block:
    """The heading of a section; level 1 is the page's title."""
    return {"kind": "heading", "text": text, "level": level}


def code(text: str, language: str = "toml") -> Block:
    """A block of code; `language` is for the viewer's syntax highlighting."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return {"kind": "code", "text": text.rstrip("\n"), "language": language, "fence": fence}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Block:
    """A table, in which columns of numbers are aligned right."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    numeric = [all(re.fullmatch(r"[\d.,%+-]*|n/a", cell) for cell in column) for column in columns]
    return {"kind": "table", "rows": [header, *rows], "numeric": numeric}


def plot(
    folder: str | Path, name: str, panels: int, draw: Callable[[Figure, list[Axes]], None]
) -> Block | None:
    """Write `folder`/plots/NAME.png: `panels` panels in rows of up to three, which `draw` fills.

    Where matplotlib is not installed, writes nothing and returns None.
    """
    if not find_spec("matplotlib"):
        return None
    with in_place_of(ValueError, RunError, "matplotlib cannot be used: "):  # a wrong MPLBACKEND
        from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would keep the figure in a global list

    rows, picture = math.ceil(panels / 3), BytesIO()
    with rc_context(fname=TEMPLATES / "plots.mplstyle"):
        figure = Figure(figsize=(8, 3 * rows), dpi=150, layout="constrained")
        draw(figure, [figure.add_subplot(rows, -(-panels // rows), i + 1) for i in range(panels)])
        figure.savefig(picture)
    with atomic_open(Path(folder, "plots", f"{name}.png")) as file:
        file.buffer.write(picture.getvalue())
    return {"kind": "picture", "name": name, "png": base64.b64encode(picture.getvalue()).decode()}


def write_pages(folder: str | Path, title: str, blocks: Iterable[Block | None]) -> None:
    """Write `folder`/report.md and `folder`/report.html, which contains its plots.

    Blocks that are None are left out. If matplotlib is not installed, both pages say so.
    """
    shown = [block for block in blocks if block]
    if not find_spec("matplotlib"):
        shown.append(NO_PLOTS)
    for name in ("report.md", "report.html"):
        with atomic_open(Path(folder, name)) as file:
            file.write(render(name, title=title, blocks=shown))


def without_folders(value: Any) -> Any:
    """Settings as a report shows them: of an absolute path, such as `data`, only the last part."""
    if isinstance(value, dict):
        return {k: v if k == "labels" else without_folders(v) for k, v in value.items()}
    if isinstance(value, (str, Path)) and str(value).startswith(("/", "~")):
        return Path(value).name
    return value


def render(template: str, **values: Any) -> str:
    """Fill in a file of templates/; the values are escaped in .html files."""
    # Imported here because only the end of a command writes a page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    how: Any = dict.fromkeys(("trim_blocks", "lstrip_blocks", "keep_trailing_newline"), True)
    how |= {"loader": FileSystemLoader(TEMPLATES), "undefined": StrictUndefined}
    environment = Environment(autoescape=select_autoescape(["html"]), **how)
    environment.filters["markdown"] = _markdown
    return environment.get_template(template).render(values)


def _markdown(text: str) -> str:
    """Text on one line, with everything escaped that Markdown or HTML would interpret."""
    text = re.sub(r"([\\`*_\[\]~|$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    # Headings, lists and rules at the start of a line, but not numbers such as -0.5.
    return re.sub(r"^(\d*)([#=+.)-])(?!\d)", r"\1\\\2", text)
