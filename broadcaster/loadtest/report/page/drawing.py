"""How a picture is drawn: by matplotlib, once for wide pages and once for narrow ones, as SVG.

Its colours are variables of the page, so that one drawing is light and dark.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

logging.getLogger("matplotlib").setLevel(logging.ERROR)
"""That it uses a folder for one process where it cannot write its own is nobody's concern."""

WIDE, NARROW = 760, 358
"""Width of the drawings, in CSS pixels at their natural size."""

SIZE: Final = 12.0
INK, MUTED, GRID, BLUE, ORANGE, RED, GREEN = (f"#0000{number:02x}" for number in range(1, 8))
HUES = tuple(f"#0001{number:02x}" for number in range(1, 6))
"""Of parts of one bar: they are told apart also without colours, by how light they are."""
_VARIABLES: Final = {
    INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", ORANGE: "orange", RED: "red", GREEN: "green",
    **{hue: f"hue{number}" for number, hue in enumerate(HUES, 1)},
}  # fmt: skip
"""Colours that stand for a CSS variable of the page."""

_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "broadcaster",
    "font.size": SIZE,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.axisbelow": True,
}
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))

ROWS_SHOWN: Final = 60
"""Of a table; of longer ones, so many rows at equal distances."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        name: Of its place in the page.
        title: What it shows.
        description: How to read it.
        wide, narrow: SVG.
        heads, rows: Its figures as a table.
        points: Of each point its horizontal place (0 to 1) in the wide and the narrow drawing, and what it is.
    """

    name: str
    title: str
    description: str
    wide: str
    narrow: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn into the axes of a figure, and where its points are (in coordinates of the data).

    `foot` and `top` are its margins in pixels, the upper one of the wide drawing and of the narrow one.
    """

    height: int
    draw: Callable[[Axes, bool], None]
    points: Sequence[tuple[float, str]] = ()
    foot: int = 46
    top: tuple[int, int] = (14, 14)


def picture(
    name: str, title: str, description: str, drawing: Drawing, heads: Sequence[str], rows: Iterable[Sequence[str]]
) -> Picture:
    wide, wide_x = _svg(drawing, name, is_narrow=False)
    narrow, narrow_x = _svg(drawing, name, is_narrow=True)
    points = [(x, y, text) for x, y, (_, text) in zip(wide_x, narrow_x, drawing.points, strict=True)]
    return Picture(name, title, description, wide, narrow, heads, _thinned([*rows]), points)


def _thinned(rows: list[Sequence[str]]) -> list[Sequence[str]]:
    if len(rows) <= ROWS_SHOWN:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, ROWS_SHOWN).round().astype(int)]


def _svg(drawing: Drawing, name: str, *, is_narrow: bool) -> tuple[str, list[float]]:
    """A drawing as SVG, and where its points are, from 0 (left) to 1."""
    width, height = NARROW if is_narrow else WIDE, drawing.height
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        left, right, top, foot = 52, 24, drawing.top[is_narrow], drawing.foot
        box = (left / width, foot / height, (width - left - right) / width, (height - foot - top) / height)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        drawing.draw(axes, is_narrow)
        axes.xaxis.set_tick_params(length=0, pad=6)
        axes.yaxis.set_tick_params(length=0, pad=6)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=_NO_METADATA)  # type: ignore[no-untyped-call]
        places = [float(axes.transData.transform((x, 1.0))[0]) / width for x, _ in drawing.points]
    return _cleaned(file.getvalue(), f"{name}-{'narrow' if is_narrow else 'wide'}"), places


def _cleaned(svg: str, prefix: str) -> str:
    """The SVG element alone: colours are variables, ids are the page's own, and its size is that of the page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*pt" height="[^"]*pt"', r"\1", svg.replace("\n", " "), count=1)
    svg = re.sub(r' version="[^"]*"| xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href=")#|(url\()#', lambda found: f"{found[1] or found[2]}#{prefix}-", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r" {2,}", " ", svg)


def in_ms(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.3f}" if value < 10 else f"{value:,.2f}"
