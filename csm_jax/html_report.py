"""Reports as one HTML file without links to others: figures, plots and tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, ALARM = "#2a5d84", "#9fb8c9", "#b5452c"
"""Colours of plots: what is counted, what is beside it, and what is wrong."""

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem}
dt{color:#666;font-size:.85rem}dd{margin:0;font-size:1.3rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(28rem,1fr));gap:1rem}
img{width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
"""


class Markup(str):
    """Text that is HTML already; other text is escaped where it is put."""


def page(
    title: str,
    heading: str,
    numbers: Mapping[str, str],
    plots: Mapping[str, bytes],
    sections: Iterable[str],
    *,
    notes: Iterable[str] = (),
    style: str = "",
) -> str:
    """Returns a report's HTML.

    Args:
        title: Of the window.
        heading: Of the page.
        numbers: What to see first, by name.
        plots: PNG files, by what they show.
        sections: What follows, such as `table`.
        notes: Lines below the numbers.
        style: CSS besides.
    """
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in numbers.items()
    )
    images = "".join(
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for alt, png in plots.items()
    )
    told = "".join(f"<p>{escaped(line)}</p>" for line in notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}{style}</style><h1>{html.escape(heading)}</h1><dl>{cells}</dl>{told}"
        f'<h2>How it went</h2><div class="plots">{images}</div>' + "".join(sections) + "</html>\n"
    )


def escaped(value: Any) -> str:
    """Returns a value as HTML."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a titled table; `Markup` in its cells stays as it is."""
    lines = [
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    if not lines:
        return f"<h2>{html.escape(title)}</h2><p>None.</p>"
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<h2>{html.escape(title)}</h2><table><tr>{first}</tr>{''.join(lines)}</table>"


def check_plots(*, extra: str) -> None:
    """Checks that plots can be drawn, before there is anything to lose.

    Args:
        extra: Of this package, with which matplotlib is installed.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ImportError(
            f"the report's plots need matplotlib: pip install 'csm_jax[{extra}]', or "
            "pip install matplotlib"
        ) from error


def draw(plots: Mapping[str, Callable[[Axes], None]], *, extra: str) -> dict[str, bytes]:
    """Returns plots as PNG files, by what they show, which is their title as well.

    Args:
        plots: What draws each.
        extra: Of this package, with which matplotlib is installed.

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
    """
    check_plots(extra=extra)
    from matplotlib.figure import Figure

    found = {}
    for alt, plot in plots.items():
        figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.set_title(alt, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        found[alt] = image.getvalue()
    return found
