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


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure for a drawing whose unit is a tenth of an inch."""
    figure = Figure((width / 10, height / 10), layout="constrained")
    axes = figure.add_subplot(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = PALE) -> None:
    """A rounded box with a text of one or two lines."""
    axes.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0.3", fc=colour, ec=BLUE, lw=1))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "->", "color": GREY, "lw": 1.3}
    axes.annotate("", end, start, arrowprops=style)


def data_flow() -> Figure:
    """The way of a batch from a file to a run folder."""
    figure, axes = blank(78, 26)
    axes.add_patch(Rectangle((22, 1), 32, 24, fc="none", ec=GREY, ls="--"))
    axes.text(38, 22.5, "multitask: one pass for all tasks", ha="center", fontsize=8)
    box(axes, 1, 10, 8, 5, "file\nCSV, JSONL")
    box(axes, 12, 10, 8, 5, "data\ntokens")
    box(axes, 24, 14, 12, 5, "bert\nreal tokens only")
    box(axes, 40, 14, 12, 5, "lora\n$W_0x + s\\,BAx$")
    box(axes, 40, 3, 12, 5, "kernels\nCPU or Triton")
    box(axes, 24, 3, 12, 5, "heads\none a task")
    box(axes, 56.5, 10, 9, 5, "training\nloss, AdamW")
    box(axes, 68.5, 10, 8.5, 5, "runs\nreport")
    for start, end in [
        ((9.3, 12.5), (11.7, 12.5)),
        ((20.3, 12.5), (23.5, 15.5)),
        ((36.3, 16.5), (39.7, 16.5)),
        ((46, 13.7), (46, 8.4)),
        ((30, 13.7), (30, 8.4)),
        ((54, 12.5), (56.2, 12.5)),
        ((65.8, 12.5), (68.2, 12.5)),
    ]:
        arrow(axes, start, end)
    return figure


def training_ratios() -> Figure:
    """How much longer other trainers take, by the table on training."""
    rows = [row for row in table("fastlora against")[1:] if not row[0].startswith("fastlora")]
    figure = Figure((7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{name} ({batches})".replace("`", "") for name, batches, *_ in rows][::-1]
    bars = axes.barh(names, [ratio(row[2]) for row in rows][::-1], color=BLUE)
    axes.bar_label(bars, fmt="%.2fx", padding=3, fontsize=8)
    axes.axvline(1, color=GREY, lw=1)
    axes.set_xlabel("time of the other side / time of fastlora (machine C, two CPU cores, fp32)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure


def batch_sizes() -> Figure:
    """What `accelerate` gives by the number of sentences in a batch."""
    heading, *rows = table("sentences in a batch, random order")
    figure = Figure((6.5, 3), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    for (name, *cells), colour in zip(rows, (BLUE, ORANGE), strict=True):
        axes.plot(
            [int(n) for n in heading[1:]], [ratio(c) for c in cells], "o-", c=colour, label=name
        )
    axes.axhline(1, color=GREY, lw=1)
    axes.set_xticks([int(n) for n in heading[1:]], heading[1:])
    axes.minorticks_off()
    axes.set_xlabel("sentences in a batch, random order (machine D, two CPU cores, fp32)")
    axes.set_ylabel("PEFT's time / accelerated")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def real_tokens() -> Figure:
    """The same four sentences as a padded square, and as the rows that fastlora computes."""
    lengths = [9, 4, 6, 2]
    figure, axes = blank(66, 14)
    for row, length in enumerate(lengths):
        for column in range(max(lengths)):
            colour = BLUE if column < length else "white"
            axes.add_patch(Rectangle((1 + 2.2 * column, 8.5 - 2.2 * row), 2, 2, fc=colour, ec=GREY))
    for position in range(sum(lengths)):
        column, row = position % 11, position // 11
        axes.add_patch(Rectangle((36 + 2.2 * column, 6.5 - 2.2 * row), 2, 2, fc=BLUE, ec=GREY))
    total = len(lengths) * max(lengths)
    axes.text(1, 12, f"padded: every layer computes {total} positions", fontsize=8)
    axes.text(36, 12, f"real tokens: every layer computes {sum(lengths)}", fontsize=8)
    arrow(axes, (23, 6), (34, 6))
    return figure


def matrix(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
    """A matrix as a rectangle, with its name."""
    axes.add_patch(Rectangle((x, y), w, h, fc=colour, ec="black", lw=0.8))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9)


def extended_k() -> Figure:
    """The forward pass of route gemm: the low-rank product inside the frozen GEMM."""
    figure, axes = blank(60, 22)
    matrix(axes, 2, 6, 12, 12, "x", PALE)
    matrix(axes, 14, 6, 2.5, 12, "u", ORANGE)
    axes.text(19, 12, "times", ha="center", va="center", fontsize=8)
    matrix(axes, 22, 5.5, 12, 12, "$W_0^T$", PALE)
    matrix(axes, 22, 3, 12, 2.5, "$B^T$", ORANGE)
    axes.text(37, 12, "=", ha="center", va="center", fontsize=12)
    matrix(axes, 40, 6, 12, 12, "y", PALE)
    axes.text(
        2, 19.5, "one GEMM with K + r in place of K: y never travels to memory twice", fontsize=8
    )
    axes.text(2, 0.8, "$u = c\\,(m * x)A^T$ is written beside x by a small kernel", fontsize=8)
    return figure


def backward() -> Figure:
    """The kernel for dx and dA: both read one pass over the gradient and redraw the mask."""
    figure, axes = blank(64, 22)
    box(axes, 1, 14, 12, 5, "g (from above)")
    box(axes, 1, 3, 12, 5, "x, u, seed\n(kept)")
    box(axes, 20, 14, 16, 5, "one GEMM\n$gW_0$ and $v = gB$")
    box(axes, 20, 3, 16, 5, "mask m\nredrawn from the seed")
    box(axes, 43, 14, 19, 5, "$dx = gW_0 + c\\,m*(vA)$")
    box(axes, 43, 8.3, 19, 4, "$dA = c\\,v^T(m*x)$")
    box(axes, 43, 2.5, 19, 4, "$dB = g^Tu$")
    for start, end in [
        ((13.3, 16.5), (19.7, 16.5)),
        ((36.3, 16.5), (42.7, 16.5)),
        ((36.3, 15), (42.7, 10.8)),
        ((36.3, 6), (42.7, 9.8)),
        ((13.3, 5.5), (19.7, 5.5)),
        ((13.3, 4), (42.7, 4)),
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
