"""ActiveRequests: which engine requests belong to an id that a client knows."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ActiveRequests:
    """Ids in flight. Engine ids are unique even when a proxy reuses the client's, so nobody aborts a stranger's request."""

    def __init__(self) -> None:
        self._engine_ids: dict[str, set[str]] = {}
        self._num_requests = 0

    def __len__(self) -> int:
        """How many requests are in work, whatever number of ids each has."""
        return self._num_requests

    @contextmanager
    def running(self, names: Iterable[str], num_prompts: int) -> Iterator[list[str]]:
        """Engine ids for ``num_prompts`` prompts, found under any of ``names`` until the context ends."""
        names = tuple(dict.fromkeys(names))
        stem = f"{names[0]}-{uuid.uuid4().hex[:12]}"
        ids = [f"{stem}-{index}" for index in range(num_prompts)]
        for name in names:
            self._engine_ids.setdefault(name, set()).update(ids)
        self._num_requests += 1
        try:
            yield ids
        finally:
            self._num_requests -= 1
            for name in names:
                left = self._engine_ids[name] - set(ids)
                if left:
                    self._engine_ids[name] = left
                else:
                    del self._engine_ids[name]

    def engine_ids(self, names: Iterable[str]) -> list[str]:
        """Engine ids in flight under these client ids; unknown ones add nothing."""
        found: dict[str, None] = {}
        for name in names:
            found.update(dict.fromkeys(sorted(self._engine_ids.get(name, ()))))
        return list(found)
