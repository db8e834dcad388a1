"""The pictures of a run: each is a PNG, a CSV of the numbers in it, and a sentence for people who cannot see it.

Colours are told apart by people with any colour vision, and line styles or words say the same again. matplotlib is
loaded when the first picture is drawn, through its object interface: no window, no global figure, no style left behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trifuse.architectures.storage.atomic_files import atomic_write
from trifuse.architectures.storage.regular_file import open_regular
from trifuse.architectures.storage.text import printable
from trifuse.kernels import MissingExtra

from .tables import write_csv

# Okabe and Ito (2008), "Color universal design"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
VIOLET, LIME, BROWN = "#8F5CFF", "#A6E04A", "#A0703C"  # ours, for more classes than they have colours
INK, FAINT, GRID = "#222222", "#6B6B6B", "#E3E3E3"

DPI = 150
_BYTES_BEFORE_PIXELS = 1 << 16
SMALL, NORMAL, LARGE = 8, 9, 11  # points


@dataclass(frozen=True)
class Picture:
    """A picture on disk, the numbers in it, and the sentence that says what it shows."""

    title: str
    png: Path
    csv: Path
    alt: str


def new_figure(width_in: float, height_in: float) -> Any:
    """Return an empty figure that arranges its own axes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "med", "drawing a figure") from None
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axis: Any, grid: Literal["both", "x"] | None = "both") -> None:
    """Leave axes the lines on the left and below, small labels, and a faint grid behind what is drawn, if any."""
    axis.tick_params(labelsize=SMALL, colors=INK)
    if grid is not None:
        axis.grid(True, axis=grid, color=GRID, lw=0.8)
        axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def save_picture(
    figure: Any, out: Path, name: str, title: str, alt: str, header: Sequence[str], lines: Iterable[Sequence[object]]
) -> Picture:
    """Write ``<name>.png`` and ``<name>.csv``, each atomically and the same bytes for the same content.

    Args:
        figure: from `new_figure`.
        out: folder to write into; made where there is none.
        name: of both files, without suffix.
        title: of the picture, also kept in the PNG.
        alt: the sentence for people who cannot see it, also kept in the PNG.
        header: of the numbers in the picture.
        lines: these numbers.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    picture = Picture(title, out / f"{name}.png", out / f"{name}.csv", alt)
    write_csv(picture.csv, header, lines)
    _spell_out(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Title": printable(title), "Description": printable(alt)})
    with atomic_write(picture.png) as stream:
        stream.write(drawn.getvalue())
    return picture


def is_picture(path: Path) -> bool:
    """Tell whether a file is a PNG that `save_picture` wrote, by the texts in it."""
    with open_regular(path) as stream:
        head = stream.read(_BYTES_BEFORE_PIXELS).partition(b"IDAT")[0]
    return head.startswith(b"\x89PNG\r\n") and all(
        word in head for word in (b"Title\0", b"Description\0", b"Matplotlib")
    )


def _spell_out(figure: Any) -> None:
    """Let every text of a figure be what it says: a name may have dollars, or be no text."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if (spelled := [printable(label) for label in labels]) != labels:  # they are made anew whenever it is drawn
            axis.set_ticks(axis.get_ticklocs(), spelled)
