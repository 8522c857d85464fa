"""A page of HTML that stands by itself: no file beside it, no network, no script."""

from collections.abc import Sequence
from html import escape

from imixer.reproduction.tables import Table

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1b1f24; --muted: #57606a; --ground: #ffffff; --line: #d0d7de; --code: #f3f5f7;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --muted: #9aa5b1; --ground: #14181d; --line: #363d46; --code: #20262d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 4rem; color: var(--text); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.3rem; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; }
p, li { max-width: 46rem; }
nav ul { padding-left: 1.2rem; columns: 18rem; }
a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line); }
th, td { white-space: nowrap; }
details td:last-child { white-space: normal; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure.pictures svg { image-rendering: pixelated; }
figcaption, .muted { color: var(--muted); font-size: 0.9rem; max-width: 46rem; }
pre { background: var(--code); padding: 0.75rem 1rem; overflow-x: auto; font-size: 0.85rem; }
details { margin: 0.5rem 0; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: Its title and first heading, as text.
        body: Its elements, as HTML.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str, anchor: str) -> str:
    """A heading that links can lead to."""
    return f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'


def contents(entries: Sequence[tuple[str, str]]) -> str:
    """A list of links to headings: anchors and texts."""
    items = "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in entries)
    return f"<nav><ul>{items}</ul></nav>"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where the window is narrow."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>'


def table_element(table: Table) -> str:
    """The table of an experiment."""
    return table_of(table.header, table.rows)


def figure_element(svg: str, caption: str) -> str:
    """A figure with its caption."""
    kind = ' class="pictures"' if "<image" in svg else ""
    return f'<figure{kind}><div class="wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def code(text: str) -> str:
    """Lines of code."""
    return f"<pre><code>{escape(text)}</code></pre>"


def folded(summary: str, content: str) -> str:
    """Something that is opened by a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
