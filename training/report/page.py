"""Pieces of a self-contained page: numbers as text, tables, figures in light and dark."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure


# The figures' ink: mid-tones would not be legible on both pages.
INKS = {"light": "#2b3440", "dark": "#cfd7e1"}
STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1a2330;--soft:#566273;--line:#e0e4ea;--accent:#0b6cab;
--fill:#e8edf3;--good:#0a6b4f;--good-fill:#dcf3ea;--bad:#a3370b;--bad-fill:#fde7db}
@media(prefers-color-scheme:dark){:root{--page:#10141a;--card:#191f28;--ink:#e4e9ef;--soft:#9ba7b6;--line:#2c3541;
--accent:#5db2ee;--fill:#28313d;--good:#6fdcb6;--good-fill:#12372c;--bad:#ffa679;--bad-fill:#432212}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:3.5rem 1.25rem 4rem}
.kicker{margin:0;color:var(--accent);font-size:.8rem;font-weight:650;letter-spacing:.09em;text-transform:uppercase}
h1{margin:.2rem 0 .8rem;font-size:clamp(1.9rem,4vw,2.7rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:0 0 .35rem;font-size:1.35rem;line-height:1.3;letter-spacing:-.01em}
h3{margin:2rem 0 .3rem;font-size:1.02rem}
p{max-width:46rem;margin:.4rem 0}.summary p{font-size:1.1rem}.summary .kicker,p.note{font-size:.9rem}
.verdict{padding:.1rem 0 .1rem 1rem;border-left:4px solid var(--good)}.verdict.no{border-color:var(--bad)}
.note,figcaption{color:var(--soft);font-size:.9rem;line-height:1.5}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:1.6rem 0 0;font-size:.92rem}
a{color:var(--accent);text-underline-offset:.2em}
.card{margin-top:1.5rem;padding:1.7rem 1.8rem;background:var(--card);border:1px solid var(--line);border-radius:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.8rem;margin:1.6rem 0 0}
.tiles div{padding:.9rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
dt,dd{margin:0;color:var(--soft);font-size:.82rem}
dd b{display:block;color:var(--ink);font-size:1.75rem;font-weight:650;line-height:1.3;letter-spacing:-.02em}
figure{margin:.8rem 0 0}figure div{overflow-x:auto}figure img{display:block;width:100%;min-width:40rem;height:auto}
figcaption{max-width:46rem;margin-top:.6rem}
.scroll{overflow:auto;max-height:60rem;margin-top:1rem}.answers td:first-child{min-width:15rem}
.answers td:last-child{white-space:nowrap}
table{width:100%;border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .9rem .5rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--card);color:var(--soft);font-size:.82rem;vertical-align:bottom}
.numbers :is(td,th):not(:first-child),.stages :is(td,th):last-child{text-align:right;white-space:nowrap}
:is(.numbers,.stages) tr:last-child td{font-weight:650;border-bottom:0}.stages td{vertical-align:middle}
small{display:block;color:var(--soft);font-size:.82rem;font-weight:400}
.pill{padding:.1rem .6rem;border-radius:1rem;font-size:.82rem;font-weight:650;white-space:nowrap}
.pill.yes{color:var(--good);background:var(--good-fill)}.pill.no{color:var(--bad);background:var(--bad-fill)}
.choices{display:grid;grid-auto-flow:column;grid-auto-columns:6.2rem;gap:.9rem;font-size:.82rem;color:var(--soft)}
.choices .chosen{color:var(--ink);font-weight:650}.choices span{float:right}
.bar{display:block;height:.45rem;border-radius:1rem;
background:linear-gradient(var(--accent) 0 0) 0/var(--share) 100% no-repeat var(--fill)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:.8rem 2rem;padding:1.1rem 0}
.pair+.pair{border-top:1px solid var(--line)}.pair h3{grid-column:1/-1;margin:0}.pair p{margin:0}
@media print{.scroll{max-height:none}body{background:none}}
"""


def write_page(path: Path, title: str, header: str, sections: dict[str, tuple[str, str]]) -> None:
    """
    Writes a page to `path` in one move, so that nobody ever opens half a page. header, and the body of each section
    (key: title, body), are HTML; the title is text.
    """
    links = "".join(f'<a href="#{key}">{name}</a>' for key, (name, _) in sections.items())
    cards = "".join(
        f'<section class="card" id="{key}"><h2>{name}</h2>{body}</section>' for key, (name, body) in sections.items()
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"{header}<nav>{links}</nav>{cards}"
        '<footer><p class="note">A demonstration, not a medical device: nothing here says anything about a person\'s '
        "health.</p></footer></main></body></html>\n"
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def as_text(value: Any) -> str:
    return "—" if value is None else escape(str(value))


def as_number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    if value is None or not np.isfinite(value):
        return "—"
    return f"{value:{form}}{unit}".replace("-", "−")


def as_percent(value: float | None) -> str:
    return as_number(None if value is None else 100 * value, ".0f", " %")


def as_points(value: float | None) -> str:
    return as_number(None if value is None else 100 * value, "+.0f", " points")


def as_interval(bounds: Sequence[float | None] | None, form: str = ".0f", unit: str = " %") -> str:
    lower, upper = (as_number(None if bound is None else 100 * bound, form) for bound in bounds or (None, None))
    return "—" if "—" in (lower, upper) else f"{lower} to {upper}{unit}"


def as_count(number: int | None, one: str, many: str) -> str:
    return f"{as_number(number, ',')} {one if number == 1 else many}"


def mean_of(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def bar(share: float) -> str:
    return f'<i class="bar" style="--share:{100 * share:.1f}%"></i>'


def pill(value: bool | None, yes: str, no: str) -> str:
    return "—" if value is None else f'<span class="pill {"yes" if value else "no"}">{yes if value else no}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str, label: str) -> str:
    """A table of cells that are HTML already; it scrolls inside its card and can be reached by keyboard."""
    header = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{style}">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def drawing(title: str, draw: Callable[[Figure], None], height: float, caption: str) -> str:
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
    return (
        f"<h3>{title}</h3><figure><div><picture>"
        f'<source media="(prefers-color-scheme:dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{title}"></picture></div><figcaption>{caption}</figcaption></figure>'
    )
