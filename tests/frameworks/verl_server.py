"""The actor under whose name verl finds a rollout server."""

from __future__ import annotations


class Server:
    """Tells the address of a server that runs elsewhere."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def get_server_address(self) -> tuple[str, int]:
        return self._address
