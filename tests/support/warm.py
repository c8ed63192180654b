"""Warm: a process that has imported torch, transformers and weightcast, and runs commands of Python as forks of itself.

``weightcast``, ``torchrun`` and ``python``, found first on ``PATH``, are small clients (tests.support.warm_client) that hand arguments,
environment and standard files to the warm process and live as long as their command: a signal is passed on, and a client that is killed
takes its command along. A fork is what a new interpreter is but for the seconds of importing, from ``sys.path`` to ``atexit``; its
``sys.executable`` is a client again. All commands live in a network and a process tree of their own, which end with the warm process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

CLIENT = Path(__file__).with_name("warm_client.py")
MODULES = (
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.qwen3.modeling_qwen3", "weightcast.cli.serve",
    "weightcast.server.run", "weightcast.engines.embedded", "weightcast.trainer.publisher", "weightcast_demo.policy",
)  # fmt: skip
PYTHONS = ("python", "weightcast", "torchrun")
CLEAR = "clear"
"""Not a program: ends whatever still runs."""


class Warm:
    """The warm process, in a folder that it uses alone. It needs what ``obstacle`` asks for."""

    def __init__(self, folder: Path, modules: Sequence[str] = MODULES) -> None:
        self._clients, self._log = folder / "bin", folder / "warm.log"
        address = folder / "socket"
        self._client = client(address)
        self._clients.mkdir()
        for name in PYTHONS:
            program = self._clients / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(self._client)} {name} "$@"\n')
            program.chmod(0o755)
        paths = (str(self._clients), str(Path(sys.executable).parent), os.environ["PATH"])
        self._environment = {
            **os.environ, "PATH": os.pathsep.join(paths), "PYTHON_EXEC": str(self._clients / "python"),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self._environment.pop("WEIGHTCAST_TOKEN", None)
        command = [
            *own_network(),
            sys.executable,
            "-m",
            "tests.support.warm",
            str(address),
            str(self._clients),
            *modules,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], env=self._environment, stdout=log, stderr=log
            )
        wait_until_warm(self._process, address, self._log)

    def run(self, *command: str, folder: Path, timeout_s: float) -> str:
        """Run a command in a folder, end whatever it left, and return all that was printed. AssertionError when the command fails."""
        printed = folder / "printed.log"
        with printed.open("wb") as output:
            client = subprocess.Popen(
                [*self._client, *command], cwd=folder, env=self._environment, stdout=output, stderr=output
            )
            try:
                client.wait(timeout_s)
            except subprocess.TimeoutExpired:
                client.kill()
            finally:
                client.wait()
                subprocess.run([*self._client, CLEAR], check=True, timeout=20)
        text = printed.read_text(errors="replace")
        assert client.returncode == 0, text[-6000:]
        return text

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


def client(address: Path) -> list[str]:
    """The command that has the warm process at an address run the command that follows."""
    return [sys.executable, "-IS", str(CLIENT), str(address)]


def wait_until_warm(process: subprocess.Popen[bytes], address: Path, log: Path, timeout_s: float = 120.0) -> None:
    """Return once a warm process serves. AssertionError with its log when it ends instead, or takes too long."""
    end = time.monotonic() + timeout_s
    while not address.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, "the warm process did not start"
        time.sleep(0.05)


def own_network() -> list[str]:
    """The command that gives another one a network and a process tree of its own, which ends with it."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--fork", "--pid", "--kill-child", "--mount-proc"]


def obstacle() -> str | None:
    """Why a Warm cannot be made on this machine; None when it can."""
    for program in ("unshare", "ip", "bash", "curl", "openssl"):
        if shutil.which(program) is None:
            return f"needs {program}"
    tried = subprocess.run([*own_network(), "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this system allows no network namespaces"


class _Commands:
    """The commands that run, each with the connection to its client."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._pids: dict[socket.socket, int] = {}
        self._ended, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wakes.fileno())

    def serve(self) -> Callable[[], None]:
        """Start what is asked for. Returns in forks only, with what the fork has to run."""
        while True:
            for source in select.select([self._listener, self._ended, *self._pids], [], [])[0]:
                if source is self._listener:
                    if (run := self._start(self._listener.accept()[0])) is not None:
                        return run
                elif source is self._ended:
                    self._ended.recv(4096)
                    self._reap()
                elif source in self._pids:
                    self._hear(source)

    def _start(self, client: socket.socket) -> Callable[[], None] | None:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile() as lines:
            argv, folder, environment = json.loads(lines.readline())
        if argv == [CLEAR]:
            self._clear()
            client.sendall(b"0\n")
            client.close()
        elif pid := os.fork():
            self._pids[client] = pid
        else:
            for number, file in enumerate(files):
                os.dup2(file, number)
            self._forget(client)
        for file in files:
            os.close(file)
        return None if argv == [CLEAR] or pid else partial(_become, argv, folder, environment)

    def _hear(self, client: socket.socket) -> None:
        """Pass a signal on. A client that is gone takes its command along."""
        said = client.recv(1)
        os.kill(self._pids[client], said[0] if said else signal.SIGKILL)
        if not said:
            self._pids.pop(client)
            client.close()

    def _reap(self) -> None:
        """Tell clients how their commands ended. Orphans end here too, and have none."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for client in [client for client, pid in self._pids.items() if pid == ended[0]]:
                    del self._pids[client]
                    with client, suppress(BrokenPipeError):
                        client.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())

    def _clear(self) -> None:
        """End everything in this tree of processes, and return once it is gone."""
        assert os.getpid() == 1, "it ends all processes that it sees"
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        while self._pids:
            self._pids.popitem()[0].close()

    def _forget(self, client: socket.socket) -> None:
        """Keep nothing of this in a fork."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for open_one in (self._listener, self._ended, self._wakes, client, *self._pids):
            open_one.close()


def _become(argv: list[str], folder: str, environment: Mapping[str, str]) -> None:
    """Run a command in place of this process."""
    os.chdir(folder)
    if argv[0] not in PYTHONS:
        os.execvpe(argv[0], argv, dict(environment))
    os.environ.clear()
    os.environ.update(environment)
    if argv[0] == "weightcast":
        argv = ["python", "-m", *argv]
    elif argv[0] == "torchrun":
        argv = ["python", "-m", "torch.distributed.run", *argv[1:]]
    _, *arguments = (argument for argument in argv if argument != "-u")
    match arguments:
        case ["-m", module, *_]:
            sys.argv, sys.path[0] = arguments[1:], folder
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *_]:
            _run(code, "<string>", ["-c", *arguments[2:]], "")
        case []:
            _run(sys.stdin.read(), "<stdin>", [""], "")
        case [file, *_]:
            _run(Path(file).read_text(encoding="utf-8"), file, arguments, str(Path(file).parent))


def _run(code: str, file: str, arguments: list[str], path: str) -> None:
    main = types.ModuleType("__main__")
    if not file.startswith("<"):  # multiprocessing runs the file of __main__ again in what it starts
        main.__file__ = file
    sys.modules["__main__"] = main
    sys.argv, sys.path[0] = arguments, path
    exec(compile(code, file, "exec"), main.__dict__)


def main() -> Callable[[], None]:
    """Import everything, serve, and return in forks."""
    address, clients, *modules = sys.argv[1:]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for module in modules:
        importlib.import_module(module)
    sys.executable = os.path.join(clients, "python")
    return serve(address)


def serve(address: str) -> Callable[[], None]:
    """Be the warm process at an address of its own. Returns in forks only, with what the fork has to run."""
    assert len(os.listdir("/proc/self/task")) == 1, "a thread of the warm process would be missing in its forks"
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    return _Commands(listener).serve()


if __name__ == "__main__":
    main()()
