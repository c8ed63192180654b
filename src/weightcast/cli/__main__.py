"""``python -m weightcast.cli``: the weightcast command without its script on the path."""

from weightcast.cli import app

app()
