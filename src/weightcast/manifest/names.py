"""Names of checkpoint tensors: short lists for messages, patterns that tell two sets apart, prefixes that differ. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from weightcast.errors import InvalidInput

SHOWN = 4


def shown(names: Sequence[str], most: int = SHOWN, *, between: str = ", ") -> str:
    """The first names, and how many there are beside them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def number_of(count: int, noun: str) -> str:
    """A count with its noun: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def kind_of(name: str) -> str:
    """The name without its numbers: tensors of one kind have the same role in different layers or experts."""
    return re.sub(r"\d+", "#", name)


def matching(patterns: Iterable[str], names: Collection[str]) -> set[str]:
    """The names that one of the shell-style patterns matches; ``*`` matches dots, too."""
    return {name for pattern in patterns for name in names if fnmatchcase(name, pattern)}


def check_patterns(unused: object) -> tuple[str, ...]:
    """The patterns of ``unused=``; raises InvalidInput for what is no sequence of strings."""
    if isinstance(unused, str) or not isinstance(unused, Iterable):
        raise InvalidInput(f"unused is a sequence of patterns, not {unused!r}", field="unused")
    patterns = tuple(unused)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise InvalidInput(f"unused is a sequence of patterns, not {patterns!r}", field="unused")
    return patterns


def patterns_for(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Shell-style patterns that match all of ``names`` and none of ``others``, as few and as short as names are by dots."""
    known = {other[:at] for other in others for at in range(len(other)) if other[at] == "."}
    exact = dict.fromkeys(_prefix_pattern(name, known) or _escaped(name) for name in names)
    # Layers of one kind become one pattern, where that takes nothing else.
    general = {pattern: re.sub(r"(?<=\.)\d+(?=\.)", "*", pattern) for pattern in exact}
    several = {pattern for pattern, count in Counter(general.values()).items() if count > 1}
    wanted = {pattern for pattern in several if not matching([pattern], others)}
    return list(dict.fromkeys(every if every in wanted else one for one, every in general.items()))


def _prefix_pattern(name: str, known: Collection[str]) -> str | None:
    """A pattern by the shortest module path of a name under which none of the others lie."""
    for at, letter in enumerate(name):
        if letter == "." and name[:at] not in known:
            return f"{_escaped(name[:at])}.*"
    return None


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def renaming(given: Iterable[str], wanted: Sequence[str]) -> tuple[str, str, str, str] | None:
    """The prefix that ``given`` names have instead of another one in ``wanted`` names: (given name, wanted name, old prefix, new
    prefix) of the pair of prefixes that most names differ in; None where no two names end alike."""
    by_ending: dict[str, list[str]] = {}
    for name in given:
        for ending in _endings(name):
            by_ending.setdefault(ending, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for name in wanted:
        for ending in _endings(name):  # the longest first
            if found := by_ending.get(ending):
                for other in found[:2]:
                    prefixes = (other[: len(other) - len(ending)], name[: len(name) - len(ending)])
                    votes[prefixes] += 1
                    examples.setdefault(prefixes, (other, name))
                break
    if not votes:
        return None
    prefixes = votes.most_common(1)[0][0]
    return (*examples[prefixes], *prefixes)


def _endings(name: str) -> list[str]:
    """What is left of a name without its first parts, the longest first; at least two parts, which one name has by chance."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(max(len(parts) - 1, 1))]


def renaming_hint(given: Iterable[str], wanted: Sequence[str]) -> str | None:
    """What to do where names differ in a prefix; None where they differ otherwise."""
    found = renaming(given, wanted)
    if found is None or kind_of(found[2]) == kind_of(found[3]):
        return None
    other, name, old, new = found
    return f"{other!r} is given and {name!r} is wanted: give rename={{{old!r}: {new!r}}} if these are the same tensor"
