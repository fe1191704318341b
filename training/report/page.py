"""A self-contained page: one template, numbers as text, figures in light and dark."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure


TEMPLATE = Path(__file__).with_name("page.html.jinja")
# The figures' ink: mid-tones would not be legible on both pages.
INKS = {"light": "#2b3440", "dark": "#cfd7e1"}


def write_page(path: Path, **content: Any) -> None:
    """
    Writes a page to `path` in one move, so that nobody ever opens half a page. content: `title`, `kicker`, `heading`,
    `summary` (paragraphs), `verdict` {"text", "good"} or None, `tiles` (name, value, note), and `sections` (id, title,
    blocks); a block is {"text"}, {"head", "rows", "label"}, {"figure"} (of `drawing`) or {"pairs"}.
    All but figures is text, which the template escapes.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = as_percent
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(page + "\n", encoding="utf-8")
    temporary.replace(path)


def as_number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    if value is None or not np.isfinite(value):
        return "—"
    return f"{value:{form}}{unit}".replace("-", "−")


def as_percent(value: float | None) -> str:
    return as_number(None if value is None else 100 * value, ".0f", " %")


def as_interval(bounds: Sequence[float | None] | None, form: str = ".2f", unit: str = "") -> str:
    lower, upper = (as_number(bound, form) for bound in bounds or (None, None))
    return "—" if "—" in (lower, upper) else f"{lower} to {upper}{unit}"


def drawing(title: str, draw: Callable[[Figure], None], height: float, caption: str) -> Markup:
    """A headed figure, its drawing embedded as SVG once for light and once for dark pages."""
    sources = {}
    for theme, ink in INKS.items():
        style: dict[Any, Any] = {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink}
        style |= {"ytick.color": ink, "font.size": 9, "axes.titlesize": 9.5, "axes.linewidth": 0.6}
        # names come from data: a dollar sign in one must not start a formula; the salt makes the file repeatable
        style |= {"text.parse_math": False, "svg.hashsalt": "fmrilm", "legend.frameon": False}
        style |= {"axes.spines.top": False, "axes.spines.right": False}
        with rc_context(style):
            figure = Figure(figsize=(10.5, height), layout="constrained")
            draw(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        sources[theme] = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    # nothing in it is markup but what stands here
    return Markup(  # noqa: S704
        f"<h3>{escape(title)}</h3><figure><div><picture>"
        f'<source media="(prefers-color-scheme:dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{escape(title)}"></picture></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
