"""Checks of one sampling field each: a value that does not fit raises InvalidInput with the field's name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from weightcast.errors import InvalidInput


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """One string or several, none of them empty, as a tuple."""
    strings = _items(value, name, single=str)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise InvalidInput(f"{name} holds non-empty strings, not {text!r}", field=name)
    return strings


def stop_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several, as a tuple."""
    ids = _items(value, name, single=int)
    for token in ids:
        if not _is_integer(token) or token < 0:
            raise InvalidInput(f"{name} holds token ids, not {token!r}", field=name)
    return ids


def biases(name: str, value: Any, *, bound: float) -> dict[int, float]:
    """A number from -bound to bound per token id; token ids may be texts, as JSON has them."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name} gives a number for each token id, not {value!r}", field=name)
    found: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, bool) or not isinstance(key, int | str) or not str(key).isdecimal() or len(str(key)) > 18:
            raise InvalidInput(f"{name} is keyed by token ids, not {str(key)[:40]!r}", field=name)
        number(name, bias, low=-bound, high=bound)
        found[int(key)] = float(bias)
    return found


def boolean(name: str, value: Any) -> None:
    """True or False, no number."""
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} is true or false, not {value!r}", field=name)


def integer(name: str, value: Any, *, low: int, high: int | None = None, optional: bool = False) -> None:
    """An integer from ``low`` to ``high``, both included; None only where the field is optional."""
    if value is None and optional:
        return
    if not _is_integer(value):
        raise InvalidInput(f"{name} is an integer, not {value!r}", field=name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidInput(f"{name} is {bound}, not {value}", field=name)


def number(name: str, value: Any, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    """A finite number from ``low`` to ``high``; with ``low_open`` above ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{name} is a finite number, not {value!r}", field=name)
    if value < low or value > high or (low_open and value == low):
        above = "above" if low_open else "at least"
        bound = f"{above} {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        raise InvalidInput(f"{name} is {bound}, not {value!r}", field=name)


def _items(value: Any, name: str, *, single: type) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, single):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        raise InvalidInput(f"{name} is a list, not {value!r}", field=name)
    return tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
