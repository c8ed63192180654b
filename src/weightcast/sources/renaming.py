"""Renaming: checkpoint names as the user says that engines have them, where they differ in what nobody else can know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from weightcast.errors import InvalidInput

Rename = Mapping[str, str] | Callable[[str], str]
"""Prefixes of names to what stands in their place, or a function of a name. Of several prefixes the longest counts."""


def renamed(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """Return the published name of each name. Raises InvalidInput where two names become one, or where a new name is no text. A prefix
    that begins no name here is no error, because another trainer rank may have such names."""
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if not isinstance(rename, Mapping) and not callable(rename):
        raise InvalidInput(f"rename is a mapping of prefixes or a function, not {rename!r}", field="rename")
    found = _by_prefix(names, rename) if isinstance(rename, Mapping) else {n: _by_function(n, rename) for n in names}
    seen: dict[str, str] = {}
    for name, new in found.items():
        if not isinstance(new, str) or not new:
            raise InvalidInput(
                f"rename makes {new!r} of {name!r}, which is no name",
                field="rename",
                hint="Have the function return each name, those that stay too",
            )
        if new in seen:
            raise InvalidInput(f"rename makes {new!r} of both {seen[new]!r} and {name!r}", field="rename")
        seen[new] = name
    return found


def _by_function(name: str, rename: Callable[[str], str]) -> str:
    try:
        return rename(name)
    except Exception as error:
        raise InvalidInput(
            f"rename raised {type(error).__name__}: {error}, for {name!r}",
            field="rename",
            hint="Have the function return each name, those that stay too",
        ) from error


def _by_prefix(names: list[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    if not all(isinstance(part, str) for pair in prefixes.items() for part in pair):
        raise InvalidInput(f"rename maps prefixes to prefixes, not {dict(prefixes)!r}", field="rename")
    longest = sorted(prefixes, key=len, reverse=True)
    found = {}
    for name in names:
        prefix = next((prefix for prefix in longest if name.startswith(prefix)), "")
        found[name] = prefixes.get(prefix, "") + name[len(prefix) :]
    return found


def renames(pairs: Iterable[str]) -> dict[str, str] | None:
    """Return the prefixes that a command line gives, each as OLD=NEW; None for none."""
    found = {}
    for pair in pairs:
        old, separator, new = pair.partition("=")
        if not separator:
            raise InvalidInput(f"a renaming is OLD=NEW, not {pair!r}", field="rename")
        found[old] = new
    return found or None
