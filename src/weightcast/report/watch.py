"""The live page: versions over time, and the latest rounds phase by phase, of one engine or a fleet.

The page holds no data: its script asks ``weightcast/rounds`` beside it again and again, and puts texts in as texts.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files

PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""What a server sends with the page: no other page may show it in a frame."""


def watch_page(title: str) -> str:
    """The page as HTML text; served at any path whose sibling ``weightcast/rounds`` answers."""
    assets = files("weightcast.report").joinpath("assets")
    style = "".join(assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "watch.css"))
    script = assets.joinpath("watch.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; connect-src 'self'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f'<body><main><header><h1>{escape(title)}</h1><p id="state">asking …</p></header>'
        '<section><h2>Versions over time</h2><div id="lanes"></div></section>'
        '<section><h2>Rounds, phase by phase</h2><ul class="legend" id="legend"></ul><div id="engines"></div></section>'
        f'</main><div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )
