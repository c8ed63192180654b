"""HeldPort: a TCP port that is nobody else's while whoever serves it dies and comes back. Linux."""

from __future__ import annotations

from weightcast.server.run import bind


class HeldPort:
    """Bound, and never listened on: the kernel gives the port to nobody who asks for any, and who names it can still bind it.

    Without it another process may be given the port of a server that was killed before its successor binds it again.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._socket = bind(host, 0)
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Let go of it; idempotent."""
        self._socket.close()
