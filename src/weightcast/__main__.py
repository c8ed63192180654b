"""``python -m weightcast``: the weightcast command without its script on the path."""

from weightcast.cli import app

if __name__ == "__main__":
    app(prog_name="weightcast")
