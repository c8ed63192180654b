"""A process that has imported SGLang and starts servers by forking: python -m tests.sglang.launcher.

SGLang's imports take a core for half a minute, and each of a server's processes makes them anew. Here they are made once: what is forked
goes the way of ``sglang serve``, with SGLang's own processes forked as well. Servers that are started the usual way are tested beside these.

Reads one JSON object a line: {"argv": [...], "env": {...}, "log": path}, with "run" the name of a function instead of a server; answers with the
process id. To {"wait": pid} the answer is what the process ended with: its exit code, or a signal's number below zero.
"""

import json
import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path

from tests.sglang import memory_saver

FAULT = "WEIGHTCAST_TEST_FAULT"
"""Names a file. While the file is there, the worker whose rank the file holds cannot carry out a commit; the file goes with that."""
SLEEPS = "WEIGHTCAST_TEST_MEMORY_SAVER"
"""The server's memory saver is the stand-in of memory_saver.py."""


def imported() -> None:
    """Everything that a server imports, plug-ins aside."""
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.data_parallel_controller
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.registry  # noqa: F401


def start(wanted: dict[str, object]) -> None:
    """Be what is wanted, until it ends."""
    os.setsid()
    with open(str(wanted["log"]), "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    env: dict[str, str] = wanted["env"]  # type: ignore[assignment]
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # type: ignore[assignment]
    read_again(env)
    if FAULT in env:
        install_fault(env[FAULT])
    if SLEEPS in env:
        memory_saver.install()
    argv: list[str] = wanted["argv"]  # type: ignore[assignment]
    if "run" in wanted:
        module, _, name = str(wanted["run"]).partition(":")
        sys.argv = [module, *argv]
        getattr(import_module(module), name)()
        os._exit(0)
    serve(argv)


def read_again(env: dict[str, str]) -> None:
    """SGLang reads this variable when it is imported."""
    from sglang.srt.managers import io_struct

    if "SGLANG_USE_PICKLE_IPC" in env:
        io_struct._USE_PICKLE_IPC = env["SGLANG_USE_PICKLE_IPC"] == "1"


def install_fault(path: str) -> None:
    from weightcast.receiver.receiver import Receiver

    commit = Receiver._commit

    def failing(receiver: Receiver, *arguments: object) -> None:
        try:
            rank = Path(path).read_text()
        except FileNotFoundError:  # or another rank has taken it away meanwhile
            rank = ""
        if rank == str(receiver._rank):
            os.unlink(path)
            raise MemoryError("no memory, says the test")
        commit(receiver, *arguments)  # type: ignore[arg-type]

    Receiver._commit = failing  # type: ignore[method-assign, assignment]


def serve(argv: list[str]) -> None:
    sys.argv = ["sglang", "serve", *argv]
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(argv))


def main() -> None:
    imported()
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if "wait" in wanted:
            print(os.waitstatus_to_exitcode(os.waitpid(wanted["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            try:
                start(wanted)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
