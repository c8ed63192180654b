"""weightcast serve: a model behind OpenAI's and vLLM's routes, ready for new weights."""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from weightcast.cli.shared import TokenFileOption, TokenOption, chosen_token, reported_errors
from weightcast.errors import InvalidInput
from weightcast.untrusted.secret import usable_token

ROOT_VARIABLE = "WEIGHTCAST_CHECKPOINT_ROOT"
API_KEY_VARIABLE = "WEIGHTCAST_API_KEY"
TRANSFER_CONFIG_HINT = (
    'Give an object such as {"backend": "weightcast", "mode": "staged"}, in single quotes of the shell'
)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


class LoadFormat(StrEnum):
    """Where the first weights come from."""

    auto = "auto"
    dummy = "dummy"


class LogFormat(StrEnum):
    """How log lines are written."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """What is written to standard error."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model.")],
    host: Annotated[
        str | None,
        typer.Option(help="Address to bind; others than loopback need a token.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 picks a free port.", show_default="8000")
    ] = None,
    unix_path: Annotated[
        Path | None,
        typer.Option(
            "--unix-socket", help="Serve on a unix socket at this path, for this user alone, instead of host and port."
        ),
    ] = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            help=f"Key for /v1. Every user of this machine sees it in the list of processes: better give {API_KEY_VARIABLE}.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in /v1/models.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name, if not beside the model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str | None, typer.Option(help="torch device; the engine chooses without it.")] = None,
    load_format: Annotated[LoadFormat, typer.Option(help="dummy: random weights.")] = LoadFormat.auto,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in one forward pass.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens whose keys and values fit.")] = None,
    max_waiting: Annotated[int | None, typer.Option(min=1, help="Requests that may wait for a place.")] = None,
    max_adapters: Annotated[
        int | None, typer.Option(min=1, help="Versions of LoRA adapters at a time; each adapter takes two.")
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of an adapter.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of dummy weights and of unseeded requests.")] = 0,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    wait_for_weights: Annotated[
        bool,
        typer.Option(
            "--wait-for-weights",
            help="Generate nothing before the first weights have come: /ready answers 503 until then, /health 200.",
        ),
    ] = False,
    weight_transfer_config: Annotated[
        str | None, typer.Option(help='JSON, such as \'{"backend": "weightcast", "mode": "staged"}\'.')
    ] = None,
    checkpoint_root: Annotated[
        list[Path] | None,
        typer.Option(
            envvar=ROOT_VARIABLE, help="Folder below which files that a trainer names are read (shm); repeat it."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python that comes with MODEL, and unpickle its weights.")
    ] = False,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request body.")] = 64,
    max_connections: Annotated[
        int, typer.Option(min=16, help="Connections at a time; fewer where the process may open fewer files.")
    ] = 4096,
    ready_file: Annotated[Path | None, typer.Option(help="Gets the URL once it listens.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged.")] = LogLevel.info,
    log_format: Annotated[LogFormat, typer.Option(help="Lines for people, or JSON objects.")] = LogFormat.text,
) -> None:
    """Serve MODEL over HTTP until SIGTERM or SIGINT."""
    # Spinning OpenMP threads would take the cores from the trainer; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if checkpoint_root:
        os.environ[ROOT_VARIABLE] = os.pathsep.join(str(root.absolute()) for root in checkpoint_root)
    given = {
        "tokenizer": tokenizer,
        "served_model_name": served_model_name,
        "device": device,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_tokens": kv_cache_tokens,
        "max_waiting": max_waiting,
        "num_threads": num_threads,
        "max_adapters": max_adapters,
        "max_lora_rank": max_lora_rank,
    }
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    arguments |= {
        "dtype": dtype,
        "load_format": load_format.value,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    _configure_logging(log_level.value, log_format)
    with reported_errors():
        arguments["weight_transfer_config"] = _transfer_config(weight_transfer_config, wait_for_weights)
        given_token = chosen_token(token, token_file)
        _serve(
            model,
            arguments,
            _bound(host, port, unix_path, given_token),
            given_token,
            usable_token(api_key or None, field="api_key"),
            max_body_mib << 20,
            max_connections,
            ready_file,
        )


def _transfer_config(text: str | None, wait_for_weights: bool) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if text is not None:
        import json

        try:
            config = json.loads(text)
        except ValueError as error:
            raise InvalidInput(
                f"--weight-transfer-config is not JSON: {error}",
                field="weight_transfer_config",
                hint=TRANSFER_CONFIG_HINT,
            ) from None
        if not isinstance(config, dict):
            raise InvalidInput(
                "--weight-transfer-config must be a JSON object",
                field="weight_transfer_config",
                hint=TRANSFER_CONFIG_HINT,
            )
    return config | {"wait_for_weights": True} if wait_for_weights else config


def _bound(
    host: str | None, port: int | None, unix_path: Path | None, token: str | None
) -> AbstractContextManager[socket.socket]:
    """The socket to serve on, bound when the context begins or before."""
    from weightcast.server.auth import check_host
    from weightcast.server.run import bind
    from weightcast.server.unix_socket import unix_socket

    if unix_path is None:
        check_host(host or DEFAULT_HOST, token)
        return bind(host or DEFAULT_HOST, DEFAULT_PORT if port is None else port)
    if host is not None or port is not None:
        raise InvalidInput(
            "--unix-socket takes the place of --host and --port", field="unix_socket", hint="Leave those out"
        )
    return unix_socket(unix_path)


def _serve(
    model: str,
    arguments: dict[str, Any],
    bound: AbstractContextManager[socket.socket],
    token: str | None,
    api_key: str | None,
    max_body_nbytes: int,
    max_connections: int,
    ready_path: Path | None,
) -> None:
    """The address is bound before the model is loaded: a taken port is reported at once."""
    from weightcast.server.run import ready_file, run_server, url_of

    with bound as sock, ready_file(ready_path) as write_ready:
        from weightcast.engines.embedded import AsyncLLM
        from weightcast.server import ServerConfig, create_app
        from weightcast.weight_transfer.config import WeightTransferConfig

        transfer = WeightTransferConfig.of(arguments["weight_transfer_config"])
        engine = AsyncLLM(model, **arguments)
        config = ServerConfig(
            token=token,
            api_key=api_key,
            max_body_nbytes=max_body_nbytes,
            dtype=engine.dtype,
            weight_transfer_config={"backend": transfer.backend, "mode": transfer.mode},
        )
        app = create_app(engine, config)

        def announce() -> None:
            url = url_of(sock)
            if token is None:
                typer.echo(f"weightcast: no token: {_who(sock)} may change weights (--token-file, WEIGHTCAST_TOKEN)")
            if transfer.wait_for_weights:
                typer.echo("weightcast: /ready and /v1 answer 503 until the first weights have come")
            typer.echo(f"weightcast: serving {engine.model_name} at {url}")
            write_ready(url)

        run_server(app, engine, sock, announce, max_connections=max_connections)


def _who(sock: socket.socket) -> str:
    """Who reaches a server that has no token."""
    return (
        "whoever may open the socket" if sock.family == socket.AF_UNIX else "every user of this machine, and no other,"
    )


def _configure_logging(level: str, form: LogFormat) -> None:
    import logging

    from weightcast.logs import JsonFormatter

    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if form is LogFormat.json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    for name in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
