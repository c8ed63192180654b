"""Wording: what an error tells a program to do, said as somebody at the command line does it. Pure.

Errors are worded for the program that calls the library: ``Publisher(unused=[...])``. A command has an option in place of each such
setting.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable

from weightcast.errors import WeightcastError

TOKEN_WORDS = "Give --token-file FILE, or set WEIGHTCAST_TOKEN"


def in_options(error: WeightcastError) -> str:
    """The text of an error, with options in place of a program's settings."""
    text = str(error)
    for pattern, say in _SAID:
        text = re.sub(pattern, say, text)
    return text


def _patterns(found: re.Match[str]) -> str:
    try:
        given = ast.literal_eval(found[1])
        patterns = [given] if isinstance(given, str) else [str(pattern) for pattern in given]
    except (ValueError, SyntaxError):
        return found[0]
    return " ".join(f"--unused {shlex.quote(pattern)}" for pattern in patterns)


def _prefixes(found: re.Match[str]) -> str:
    try:
        prefixes = dict(ast.literal_eval(found[1]))
    except (ValueError, SyntaxError):
        return found[0]
    return " ".join(f"--rename {shlex.quote(f'{old}={new}')}" for old, new in prefixes.items())


_SAID: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # In the hint, or in the message of a server that told its error as one text.
    (
        r"Send 'Authorization: Bearer \.\.\.': Publisher\(token=\.\.\.\), or --token-file or WEIGHTCAST_TOKEN of a command",
        TOKEN_WORDS,
    ),
    (r"""\bunused=(\[(?:'[^']*'|"[^"]*"|[^\]'"])*\])""", _patterns),
    (r"""\bunused=('[^']*'|"[^"]*")""", _patterns),
    (r"""\brename=(\{(?:'[^']*'|"[^"]*"|[^}'"])*\})""", _prefixes),
    (r"""\bPublisher\(\{"": model, "draft\.": draft\}, \.\.\.\)""", "--draft FOLDER"),
    (r"""\bkeep=\["draft"\]""", "--keep draft"),
    (r"\bwith takeover(=True)?\b|\btakeover=True\b", "with --takeover"),
    (r"\bmode=?\s?\"?(in_place|staged)\"?", r"--mode \1"),
    (r"\btransport=\"(\w+)\"", r"--transport \1"),
    (r'\bcheck_finite="count" publishes them[^;.]*', "without --check-finite they are published"),
    (r"\btimeout_s\b", "--timeout"),
    (r"\b[Cc]all publish\(\) again|\b[Pp]ublish again|\b[Cc]all connect\(\) again", "Run the command again"),
)
"""What to look for, and what to say instead."""
