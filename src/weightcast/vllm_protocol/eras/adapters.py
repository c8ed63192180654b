"""AdapterNames: what an adapter's name stands for in a process that takes requests for vLLM.

Load-bearing: a request's version is settled when vLLM takes the request in, on the thread that moves names, so that none is taken in
for a version that is gone. vLLM keys its prefix cache by an adapter's name and path, so both have the version.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from weightcast.errors import InvalidInput, UnknownModel

SCHEME = "weightcast://"
"""How the path of an adapter begins that came from a trainer. Nothing is read from there."""


def is_ours(request: Any) -> bool:
    """Whether a LoRARequest is for an adapter that came from a trainer."""
    return str(request.lora_path).startswith(SCHEME)


class AdapterNames:
    """The names and versions of adapters in one process."""

    def __init__(self, processor: Any) -> None:
        """``processor`` is vLLM's InputProcessor of the engine object, which makes a request of what a user gives."""
        self._requests: dict[str, dict[str, Any]] = {}
        self._served: dict[str, Any] = {}
        self._of_model: frozenset[str] = frozenset()
        self._take_in(processor)

    def show(self, served: dict[str, Any], of_model: Iterable[str]) -> None:
        """Have an API server take names and versions for models. ``served`` is the mapping in which the server looks adapters up,
        ``of_model`` are the names of the model itself."""
        self._served, self._of_model = served, frozenset(of_model)

    def check(self, name: str) -> None:
        """Raise InvalidInput for a name that stands for something else."""
        if name in self._of_model:
            raise InvalidInput(
                f"{name!r} is the name of the model itself",
                field="adapter",
                hint="Name the adapter otherwise, or start vLLM with another --served-model-name",
            )
        if name in self._served and name not in self._requests:
            raise InvalidInput(
                f"{name!r} is an adapter that vLLM loaded itself",
                field="adapter",
                hint="Name the adapter otherwise, or unload that one",
            )

    def point(self, name: str, label: str, ids: Mapping[str, int]) -> None:
        """Have a name stand for a version, or for nothing where ``label`` is empty. ``ids`` are the versions that are there."""
        kind: Any = sys.modules["vllm.lora.request"].LoRARequest  # the engine's own
        requests = {each: kind(each, number, f"{SCHEME}{each}") for each, number in ids.items()}
        if label:
            requests[name] = requests[label]
        for gone in self._requests.get(name, {}):
            self._served.pop(gone, None)
        self._requests[name] = requests
        self._served.update(requests)

    def retire(self, name: str, there: Collection[str]) -> None:
        """Forget the versions of an adapter that are not ``there`` any more, before a request for one could be taken in."""
        requests = self._requests.get(name, {})
        for each in [key for key, request in requests.items() if request.lora_name not in there]:
            del requests[each]
            self._served.pop(each, None)

    def standing(self, name: str) -> str:
        """The version that a name stands for; empty for none."""
        request = self._requests.get(name, {}).get(name)
        return "" if request is None else str(request.lora_name)

    def resolved(self, request: Any) -> Any:
        """The LoRARequest of a version, for one that a user made of a name or a version; others as they are. UnknownModel where nothing
        is served by that name."""
        if request is None or not is_ours(request):
            return request
        name = str(request.lora_name)
        found = self._requests.get(name.partition("@")[0], {}).get(name)
        if found is None:
            known = sorted(label for requests in self._requests.values() for label in requests)
            raise UnknownModel(
                f"no adapter {name[:120]!r} is served: it was never published here, or that version is retired",
                field="lora_request",
                hint=f"Served adapters: {', '.join(known) or 'none'}",
            )
        return found

    def _take_in(self, processor: Any) -> None:
        process = processor.process_inputs
        process_async: Any = getattr(processor, "process_inputs_async", None)

        def process_inputs(*arguments: Any, lora_request: Any = None, **options: Any) -> Any:
            return process(*arguments, lora_request=self.resolved(lora_request), **options)

        async def process_inputs_async(*arguments: Any, lora_request: Any = None, **options: Any) -> Any:
            self.resolved(lora_request)  # what is refused is not tokenised first
            request = await process_async(*arguments, lora_request=lora_request, **options)
            request.lora_request = self.resolved(lora_request)
            return request

        processor.process_inputs = process_inputs
        if process_async is not None:
            processor.process_inputs_async = process_inputs_async
