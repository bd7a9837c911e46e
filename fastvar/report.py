"""The demo's report: one HTML file with its pictures inside, so that it opens offline and can be mailed."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvar.files import write_text
from fastvar.pictures import png

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd; } img.plot { image-rendering: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; } .group { display: flex; gap: .1rem; }
.gallery figure { margin: 0; width: min-content; min-width: 4.6rem; text-align: center; }
.gallery img { max-width: none; border: 0; }
.gallery figcaption { font-size: .75rem; line-height: 1.2; } .wrong { color: #b00020; font-weight: bold; }
pre { background: #f3f3f3; padding: .6rem .8rem; overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; } code { background: #f3f3f3; padding: 0 .2rem; }
"""
_WRONG = ' class="wrong"'


class Report:
    """Collects headings, text, tables and pictures, and writes them as one HTML page.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells}</tr>{body}</table>")

    def picture(self, image: Image, caption: str, *, plot: bool = False) -> None:
        """Add a PIL image; pixels stay sharp unless it is a plot."""
        self._parts.append(
            f"<figure>{_inline(image, caption, plot=plot)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def gallery(self, groups: Sequence[Sequence[tuple[Image, str, bool]]]) -> None:
        """Add groups of small pictures, those of a group side by side.

        Args:
            groups: of (PIL image, label, whether the label tells of a mistake and is to be red).
        """
        self._parts.append('<div class="gallery">')
        for group in groups:
            cells = (
                f"<figure>{_inline(image, label)}<figcaption{_WRONG if wrong else ''}>{html.escape(label)}</figcaption>"
                "</figure>"
                for image, label, wrong in group
            )
            self._parts.append(f'<div class="group">{"".join(cells)}</div>')
        self._parts.append("</div>")

    def commands(self, lines: Sequence[str]) -> None:
        """Add commands to copy, one a line."""
        text = "\n".join(lines)
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, path: Path) -> None:
        """Write the page; an interrupted write leaves the former one whole."""
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(self._parts)}</body></html>"
        )
        write_text(path, page)


def _inline(image: Image, alt: str, *, plot: bool = False) -> str:
    data = base64.b64encode(png(image)).decode()
    kind = ' class="plot"' if plot else ""
    return f'<img{kind} alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def curves(runs: dict[str, list[dict[str, float]]], metric: str, *, ylabel: str) -> Image:
    """A plot of one metric over steps, a line per run; `runs` holds the lines of their metrics.jsonl."""
    lines_by_run = {
        name: [(line["step"], line[metric]) for line in lines if metric in line] for name, lines in runs.items()
    }
    return points(lines_by_run, xlabel="step", ylabel=ylabel)


def points(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    level: float | None = None,
    log: bool = False,
) -> Image:
    """A plot of named lines through (x, y) points, with a dashed line at a level; y on a logarithmic axis if asked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image as pil

    figure = Figure(figsize=(7, 3), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, places in lines.items():
        axes.plot(*zip(*places, strict=True), label=name, marker="o" if len(places) < 12 else None)
    if level is not None:
        axes.axhline(level, color="grey", linestyle="--")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    canvas.draw()
    return pil.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
