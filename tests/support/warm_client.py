"""Have a warm process (tests.support.warm) run a command with this process's standard files; signals go on, and the exit status comes back.

Run by path and without site, in a hundredth of a second: ``warm_client.py ADDRESS COMMAND ARGUMENTS...``.
"""

import json
import os
import signal
import socket
import sys
from types import FrameType


def main() -> None:
    address, *argv = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    socket.send_fds(connection, [b"+"], [0, 1, 2])
    connection.sendall(json.dumps([argv, os.getcwd(), dict(os.environ)]).encode() + b"\n")

    def forward(number: int, frame: FrameType | None) -> None:
        connection.sendall(bytes([number]))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    with connection.makefile() as answer:
        status = int(answer.readline() or -signal.SIGKILL)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
