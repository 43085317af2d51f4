"""The look of a report: one style sheet, and small pieces of HTML. What comes from outside is escaped in :func:`escape` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdcache.evaluate.plots import STYLE, escape

# Roles, as they are called on the page.
NAMES = {"student": "student", "baseline": "baseline", "full": "full student", "teacher": "teacher"}
# What stands where a number would, of a model that gives NaN.
DIVERGED = "diverged"
# Nothing is fetched and nothing runs, whatever a corpus holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
CSS = """
:root{color-scheme:light dark;--ink:#1d1f23;--soft:#5a6069;--line:#dcdfe4;--page:#fff;--tint:#f5f6f8;--heat:224,110,20}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6ea;--soft:#a2a9b4;--line:#363a41;--page:#16181c;--tint:#1f2227;--heat:240,140,50}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:980px;padding:20px 16px 80px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;line-height:1.25;margin:8px 0 4px;overflow-wrap:anywhere}h2{font-size:18px;margin:40px 0 6px;padding-top:10px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:18px 0 4px}p{margin:6px 0;max-width:72ch}.soft{color:var(--soft);font-size:13.5px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}
caption{text-align:left;color:var(--soft);font-size:13.5px;padding-bottom:4px}
th,td{padding:4px 14px 4px 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td.left,th.left{text-align:left;font-weight:normal}thead th{color:var(--soft);font-weight:600;white-space:normal}
td.text{white-space:normal;overflow-wrap:anywhere;text-align:left;unicode-bidi:isolate}.range{display:block;color:var(--soft);font-size:12px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:8px 28px}
figure{margin:10px 0;min-width:0}figcaption{font-weight:600;margin-bottom:2px}svg.plot{width:100%;height:auto;display:block}
details{margin:6px 0}summary{cursor:pointer;color:var(--soft);font-size:13.5px}
.said{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr));gap:8px;margin:6px 0 20px;align-items:start}
.answer{background:var(--tint);padding:8px 10px;border-radius:6px;min-width:0;font-size:14px}.answer h4{margin:0 0 4px;font-size:13px;color:var(--soft)}
.prompt{border-left:3px solid var(--line);padding-left:10px}
.strip{font:15px/2 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.strip span{border-bottom:2px solid transparent;border-radius:2px 2px 0 0;outline:0}
.h1{background:rgba(var(--heat),.14)}.h2{background:rgba(var(--heat),.28);border-color:rgba(var(--heat),.5)!important}
.h3{background:rgba(var(--heat),.42);border-color:rgba(var(--heat),.8)!important}.h4{background:rgba(var(--heat),.58);border-color:rgb(var(--heat))!important;font-weight:700}
.strip span[data-said]:hover,.strip span[data-said]:focus{box-shadow:0 0 0 1px var(--ink)}
.strip span[data-said]:hover::after,.strip span[data-said]:focus::after{content:attr(data-said);position:fixed;left:0;right:0;bottom:0;z-index:1;padding:10px 16px;
background:var(--ink);color:var(--page);font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-height:40vh;overflow:hidden}
.key span{padding:1px 7px;margin-right:4px;white-space:nowrap;display:inline-block;border-bottom:2px solid transparent}
@media(max-width:560px){body{padding:12px 12px 80px}table{font-size:12.5px}th,td{padding-right:6px}th:last-child,td:last-child{padding-right:0}th:first-child{white-space:normal}.range{font-size:11px;white-space:normal}.long{display:none}}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document."""
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>\n<style>{CSS}{STYLE}</style>\n</head>\n<body>\n<main>",
        *body,
        "</main>\n</body>\n</html>\n",
    ])  # fmt: skip


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = ()) -> str:
    """A table whose cells are HTML already; the first of each row is its header.

    Args:
        caption: What it holds; plain text.
        head: Of the columns; plain text.
        rows: Cells.
        text_columns: Columns that hold text, and may wrap.
    """
    top = "".join(
        f'<th scope="col"{" class=left" if i in text_columns else ""}>{escape(name)}</th>'
        for i, name in enumerate(head)
    )
    lines = [
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td class="text">{cell}</td>' if i in text_columns else f"<td>{cell}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    ]  # fmt: skip
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def figure(caption: str, plot: str, data: str) -> str:
    """A plot with its numbers under it."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>\n{plot}<details><summary>numbers</summary>{data}</details></figure>"


def number(shape: str, value: float) -> str:
    """A value as ``shape.format`` writes it; of a model that gives NaN the word for that."""
    return DIVERGED if math.isnan(value) else shape.format(value)


def paragraph(text: str, *, soft: bool = False) -> str:
    """Plain text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"
