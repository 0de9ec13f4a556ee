"""Draw the site's figures, as a hook of mkdocs: numbers come from the tables of performance.md.

python docs/tools/figures.py FOLDER      # the same files without mkdocs
"""

import re
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

PERFORMANCE = Path(__file__).parents[1] / "performance.md"
BLUE, ORANGE, GREY, PALE = "#3f51b5", "#ef6c00", "#9e9e9e", "#e8eaf6"
WIDTH = 5.0  # inches: with letters of 10 points, a phone shows them in a readable size


def table(first_cell: str) -> list[list[str]]:
    """The rows of the table of performance.md whose heading starts so, the heading with them."""
    rows: list[list[str]] = []
    for line in PERFORMANCE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows and not line.startswith("|"):
            break
        if (rows or cells[0] == first_cell) and not set(line) <= set("|- "):
            rows.append(cells)
    if len(rows) < 2:
        raise ValueError(f"{PERFORMANCE.name}: no table starts with {first_cell!r}")
    return rows


def ratio(cell: str) -> float:
    """The first ratio of a cell, such as 1.56 of "1.56x [1.44, 1.76]"."""
    found = re.match(r"([\d.]+)x", cell)
    if not found:
        raise ValueError(f"{PERFORMANCE.name}: {cell!r} starts with no ratio")
    return float(found[1])


def blank(height: float) -> tuple[Figure, Axes]:
    """A figure for a drawing whose unit is a tenth of an inch."""
    figure = Figure((WIDTH, height / 10), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 10 * WIDTH), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = PALE) -> None:
    """A rounded box with a text of one or two lines."""
    axes.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0.3", fc=colour, ec=BLUE, lw=1))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "->", "color": GREY, "lw": 1.3}
    axes.annotate("", end, start, arrowprops=style)


def data_flow() -> Figure:
    """The way of a batch from a file to a run folder."""
    figure, axes = blank(41)
    axes.add_patch(Rectangle((0.5, 9.5), 49, 22, fc="none", ec=GREY, ls="--"))
    axes.text(2, 29, "multitask: one pass for all tasks", va="center")
    for x, y, text in [
        (1, 35, "file\nCSV, TSV, JSONL"),
        (29, 35, "data\ntasks, tokens, batches"),
        (2, 21, "bert\nencoder on real tokens"),
        (28, 21, "lora\n$W_0x + s\\,BAx$"),
        (2, 11.5, "heads\none for each task"),
        (28, 11.5, "kernels\nCPU or Triton"),
        (1, 1, "training\nloss, AdamW"),
        (29, 1, "runs\nadapter, scores, report"),
    ]:
        box(axes, x, y, 20, 5, text)
    for start, end in [
        ((21.4, 37.5), (28.6, 37.5)),
        ((39, 34.6), (39, 31.9)),
        ((22.4, 23.5), (27.6, 23.5)),
        ((38, 20.6), (38, 17)),
        ((12, 20.6), (12, 17)),
        ((11, 9.1), (11, 6.5)),
        ((21.4, 3.5), (28.6, 3.5)),
    ]:
        arrow(axes, start, end)
    return figure


def training_ratios() -> Figure:
    """How much longer other trainers take, by the table on training."""
    measured = [row for row in table("fastlora against")[1:] if row[2]]  # on machine D
    rows = [row for row in measured if not row[0].startswith("fastlora")][::-1]
    figure = Figure((WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(rows)), [ratio(row[2]) for row in rows], 0.4, color=BLUE)
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    for place, (name, batches, *_) in enumerate(rows):
        text = axes.text(0.03, place + 0.28, f"{name} ({batches})".replace("`", ""), va="bottom")
        text.set_bbox({"fc": "white", "ec": "none", "pad": 1})
    axes.axvline(1, color=GREY, lw=1)
    axes.set_yticks([])
    axes.set_xlim(0, 4.8)
    axes.set_ylim(-0.5, len(rows) - 0.1)
    axes.set_xlabel("time of the other side / time of fastlora\n(machine D, two CPU cores, fp32)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def batch_sizes() -> Figure:
    """What `accelerate` gives by the number of sentences in a batch."""
    heading, *rows = table("sentences in a batch, random order")
    figure = Figure((WIDTH, 3), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    for (name, *cells), colour in zip(rows, (BLUE, ORANGE), strict=True):
        axes.plot(
            [int(n) for n in heading[1:]], [ratio(c) for c in cells], "o-", c=colour, label=name
        )
    axes.axhline(1, color=GREY, lw=1)
    axes.set_xticks([int(n) for n in heading[1:]], heading[1:])
    axes.minorticks_off()
    axes.set_xlabel("sentences in a batch, random order\n(machine D, two CPU cores, fp32)")
    axes.set_ylabel("PEFT's time / accelerated")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def real_tokens() -> Figure:
    """The same four sentences as a padded square, and as the rows that fastlora computes."""
    lengths = [9, 4, 6, 2]
    figure, axes = blank(15)
    for row, length in enumerate(lengths):
        for column in range(max(lengths)):
            colour = BLUE if column < length else "white"
            axes.add_patch(Rectangle((1 + 2.2 * column, 7.5 - 2.2 * row), 2, 2, fc=colour, ec=GREY))
    for position in range(sum(lengths)):
        column, row = position % 9, position // 9
        axes.add_patch(Rectangle((29 + 2.2 * column, 7.5 - 2.2 * row), 2, 2, fc=BLUE, ec=GREY))
    total = len(lengths) * max(lengths)
    axes.text(1, 10.7, f"padded:\n{total} positions in each layer")
    axes.text(29, 10.7, f"real tokens:\n{sum(lengths)} positions in each layer")
    arrow(axes, (22, 5), (28, 5))
    return figure


def matrix(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
    """A matrix as a rectangle, with its name."""
    axes.add_patch(Rectangle((x, y), w, h, fc=colour, ec="black", lw=0.8))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center")


def extended_k() -> Figure:
    """The forward pass of route gemm: the low-rank product inside the frozen GEMM."""
    figure, axes = blank(22)
    matrix(axes, 0.5, 7, 11, 11, "x", PALE)
    matrix(axes, 11.5, 7, 2.8, 11, "u", ORANGE)
    axes.text(16.2, 12.5, "\u00d7", ha="center", va="center")
    matrix(axes, 18, 8.4, 11, 9.6, "$W_0^T$", PALE)
    matrix(axes, 18, 5.6, 11, 2.8, "$B^T$", ORANGE)
    axes.text(31.5, 12.5, "=", ha="center", va="center")
    matrix(axes, 34, 7, 11, 11, "y", PALE)
    axes.text(0.5, 19.5, "one GEMM with K + r in place of K")
    axes.text(0.5, 0.8, "$u = c\\,(m * x)A^T$, written beside x by a small kernel")
    return figure


def backward() -> Figure:
    """The backward pass of route gemm: what each product and kernel reads."""
    figure, axes = blank(28)
    box(axes, 1, 21.5, 14, 5.5, "gradient g\n(from above)")
    box(axes, 19, 21.5, 12, 5.5, "$dB = g^Tu$")
    box(axes, 35, 21.5, 14, 5.5, "x, u, seed\n(kept)")
    box(axes, 1, 11.5, 19, 5.5, "one GEMM\n$gW_0$ and $v = gB$")
    box(axes, 27, 11.5, 22, 5.5, "$m * x$, with the mask m\nredrawn from the seed")
    box(axes, 1, 1, 21, 5.5, "$dx = gW_0 + c\\,m*(vA)$")
    box(axes, 30, 1, 19, 5.5, "$dA = c\\,v^T(m*x)$")
    for start, end in [
        ((15.4, 24.2), (18.6, 24.2)),
        ((34.6, 24.2), (31.4, 24.2)),
        ((8, 21.1), (8, 17.4)),
        ((42, 21.1), (42, 17.4)),
        ((8, 11.1), (8, 6.9)),
        ((17, 11.1), (33, 6.9)),
        ((33, 11.1), (17, 6.9)),
        ((42, 11.1), (42, 6.9)),
    ]:
        arrow(axes, start, end)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "data-flow": data_flow,
    "training-ratios": training_ratios,
    "batch-sizes": batch_sizes,
    "real-tokens": real_tokens,
    "extended-k": extended_k,
    "backward": backward,
}


def svg(figure: Figure) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the figures to the site, as figures/NAME.svg."""
    from mkdocs.structure.files import File

    for name, draw in FIGURES.items():
        files.append(File.generated(config, f"figures/{name}.svg", content=svg(draw())))
    return files


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (Path(sys.argv[1]) / f"{name}.svg").write_bytes(svg(draw()))
