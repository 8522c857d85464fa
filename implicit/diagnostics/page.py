"""A diagnosis as one HTML page that needs no other file."""

import base64
import html
import io

from implicit.diagnostics.diagnosis import Diagnosis

_STYLE = (
    ":root{color-scheme:light dark}"  # the browser's own colors; figures stay on white
    "body{font-family:sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}"
    "pre{background:color-mix(in srgb,currentColor 6%,transparent);padding:1em;overflow-x:auto}"
    "h2~pre{white-space:pre-wrap}img{max-width:100%}"
)


def html_page(diagnosis: Diagnosis, title: str, *extra: str) -> str:
    """Return the page: the report, further texts, and a figure for each layer. Needs matplotlib."""
    heading = html.escape(title)
    parts = [f"<h1>{heading}</h1>", *(f"<pre>{html.escape(text)}</pre>" for text in (str(diagnosis), *extra))]
    for name, layer in diagnosis.layers.items():
        image = io.BytesIO()
        diagnosis.plot(name).savefig(image, format="png", dpi=90)
        code = base64.b64encode(image.getvalue()).decode("ascii")
        text = html.escape(layer.name)
        parts.append(f'<h2>{text}</h2><img alt="figures of {text}" src="data:image/png;base64,{code}">')
        parts.append(f"<pre>{html.escape(str(layer))}</pre>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{heading}</title><style>{_STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
