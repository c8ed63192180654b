"""A process that has imported SGLang and starts servers by forking: python -m tests.sglang.launcher.

SGLang's imports take a core for half a minute, and each of a server's processes makes them anew. Here they are made once: what is forked
goes the way of ``sglang serve``, with SGLang's own processes forked as well. Servers that are started the usual way are tested beside these.

Reads one JSON object a line: {"argv": [...], "env": {...}, "log": path}; answers with the server's process id.
"""

import json
import multiprocessing
import os
import sys


def imported() -> None:
    """Everything that a server imports, plug-ins aside."""
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.data_parallel_controller
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.registry  # noqa: F401


def serve(argv: list[str], env: dict[str, str], log: str) -> None:
    """Be an SGLang server, until it ends."""
    os.setsid()
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(env)
    sys.argv = ["sglang", "serve", *argv]
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # type: ignore[assignment]
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
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            try:
                serve(wanted["argv"], wanted["env"], wanted["log"])
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
