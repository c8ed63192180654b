"""weightcast serve on a unix socket: whom its permissions let in, what is published over it, and what becomes of its file."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from serve_process import START, Served, environment, refused, serving
from typer.testing import CliRunner

from weightcast import Publisher
from weightcast.cli import app
from weightcast.cli.watch import WatchServer
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, DeadlineExceeded, InvalidInput, PeerLost
from weightcast.server.unix_socket import unix_socket
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint
from weightcast.trainer.clients import HttpEngineClient, VllmDevClient
from weightcast.trainer.clients.urls import endpoint_of
from weightcast.unix_urls import url_of_path

NOBODY = 65534
# What the server computes with, written out by torch when a signal asks for it.
DUMPING = f"""
import gc, os, signal
def dump(number, frame):
    from safetensors.torch import save_file
    from transformers import PreTrainedModel
    models = [each for each in gc.get_objects() if isinstance(each, PreTrainedModel)]
    model = max(models, key=lambda each: sum(1 for _ in each.parameters()))
    path = os.environ["DUMP"]
    save_file({{name: value.clone() for name, value in model.state_dict().items()}}, path + ".part")
    os.rename(path + ".part", path)
signal.signal(signal.SIGUSR1, dump)
{START}
"""
# Imports as this user, asks as another one.
ANOTHER_USER = """
import os, sys
from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.trainer.clients import HttpEngineClient
client = HttpEngineClient(sys.argv[1])
os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    print(client.status(Deadline(20))["weight_version"])
except WeightcastError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("unix") / "model", "llama", "float32")


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a server without a token."""
    with (
        open_folder() as made,
        serving(model, tmp_path_factory.mktemp("served"), unix_path=made / "s"),
    ):
        yield made / "s"


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter and none but this one may change, with a name that is short enough."""
    made = Path(tempfile.mkdtemp(prefix="wc"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def live(server: Served, path: Path) -> dict[str, torch.Tensor]:
    """The tensors that the server computes with."""
    path.unlink(missing_ok=True)
    server.process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return load_file(path)


def same_bytes(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(have[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)


def said_by_another_user(url: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", ANOTHER_USER, url],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout.strip()


def left_behind(path: Path) -> None:
    """A socket of a process that is gone."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
        gone.listen()


def entries(folder: Path) -> dict[str, tuple[int, int, str]]:
    """What lies in a folder: which file under each name, when it was changed, and its text."""
    found = {each: each.lstat() for each in folder.iterdir()}
    return {
        path.name: (entry.st_ino, entry.st_mtime_ns, path.read_text() if stat.S_ISREG(entry.st_mode) else "")
        for path, entry in found.items()
    }


def refusal(path: Path) -> InvalidInput:
    with pytest.raises(InvalidInput, match="cannot serve on") as caught, unix_socket(path):
        pass
    assert caught.value.field == "unix_socket"
    return caught.value


def test_weights_are_published_over_it_byte_for_byte(model: Path, folder: Path, tmp_path: Path) -> None:
    path, dump = folder / "engine 1.sock", tmp_path / "live"
    weights = random_state_dict(model)
    with serving(model, tmp_path, unix_path=path, start=DUMPING, DUMP=str(dump)) as server:
        assert server.url == f"unix://{folder}/engine%201.sock"
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        for mode in ("staged", "in_place"):
            with Publisher(weights, [server.url], mode=mode, timeout_s=60) as publisher:
                for _ in range(2):
                    for name, value in random_state_dict(model).items():
                        weights[name].copy_(value)
                    assert not same_bytes(live(server, dump), weights)
                    report = publisher.publish()
                    assert (report.digests_match, report.engines[0].name) == (True, server.url)
                    assert same_bytes(live(server, dump), weights)
        status, output = server.stop(signal.SIGTERM)
    assert status == 0, output
    assert "whoever may open the socket may change weights" in output
    assert f"at {server.url}" in output
    assert not list(folder.iterdir())
    assert not server.ready_file.exists()


def test_commands_reach_it(model: Path, folder: Path, tmp_path: Path) -> None:
    weights = random_state_dict(model)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", weights, model)
    token = secrets.token_urlsafe(12)
    with serving(model, tmp_path, unix_path=folder / "s", WEIGHTCAST_TOKEN=token) as server:

        def run(*arguments: object) -> str:
            named = {"WEIGHTCAST_TOKEN": token, "COLUMNS": "300"}
            ended = CliRunner().invoke(app, [str(each) for each in arguments], env=named)
            assert ended.exit_code == 0, ended.output
            return ended.output

        assert "matches what is live" in run("push", checkpoint, "--to", server.url)
        assert server.url in run("status", server.url)
        assert "equal" in run("verify", server.url, "--checkpoint", checkpoint)
        with WatchServer([server.url]) as watching:
            (engine,) = watching.rounds()["engines"]
        assert engine["name"] == server.url
        assert len(engine["rounds"]) == 1
        # A token that was given is asked for here as well.
        with pytest.raises(AuthError), Publisher(weights, [server.url], timeout_s=20) as publisher:
            publisher.connect()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_its_permissions_decide_who_gets_in(served: Path) -> None:
    url = url_of_path(str(served))
    said = said_by_another_user(url)
    assert said.startswith("PeerLost"), said
    assert f"no permission to use {served}" in said
    assert "permissions of the socket" in said
    served.chmod(0o666)
    assert said_by_another_user(url) == "default"
    served.chmod(0o600)


def test_what_a_proxy_or_a_browser_sends_is_refused_there_too(served: Path) -> None:
    over = httpx.HTTPTransport(uds=str(served))
    with httpx.Client(transport=over, base_url="http://localhost") as client:
        assert client.get("/weightcast/status").status_code == 200
        for headers in (
            {"X-Forwarded-For": "127.0.0.1"},
            {"Host": "evil.example"},
            {"Origin": "https://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            assert client.get("/weightcast/status", headers=headers).status_code == 401, headers
            assert client.post("/pause", headers=headers).status_code == 401, headers
        assert client.get("/is_paused").json() == {"is_paused": False}


def test_a_server_that_runs_keeps_its_socket(model: Path, folder: Path, tmp_path: Path) -> None:
    path = folder / "s"
    with serving(model, tmp_path, unix_path=path) as server:
        assert "another server has it" in refused(model, "--unix-socket", path)
        assert HttpEngineClient(server.url).status(Deadline(20))["weight_version"] == "default"
        # A server that was killed leaves its file behind, and the next one takes it over.
        server.process.kill()
        server.process.wait(20)
        assert path.is_socket()
        server.ready_file.unlink()
    with serving(model, tmp_path, unix_path=path) as server:
        assert HttpEngineClient(server.url).status(Deadline(20))["weight_version"] == "default"


def test_a_socket_that_nobody_listens_on_is_replaced(folder: Path) -> None:
    path = folder / "s"
    left_behind(path)
    before = path.lstat()
    with unix_socket(path) as sock:
        sock.listen()
        assert not os.path.samestat(before, path.lstat()) or before.st_mtime_ns != path.lstat().st_mtime_ns
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
    assert not list(folder.iterdir())


def test_a_socket_is_for_its_user_from_the_first_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    bind = socket.socket.bind

    def watched(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        modes.append(stat.S_IMODE(Path(address).lstat().st_mode))

    monkeypatch.setattr(socket.socket, "bind", watched)
    before = os.umask(0)
    try:
        with unix_socket(folder / "s"):
            pass
        assert os.umask(0) == 0, "the mask is as it was"
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_server_that_does_not_listen_yet_has_its_path(folder: Path) -> None:
    path = folder / "s"
    with unix_socket(path) as sock:
        made = path.lstat()
        assert "another server has it" in str(refusal(path))
        assert os.path.samestat(made, path.lstat())
        sock.listen()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_sockets_of_other_programs_are_kept(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:  # a full queue is no sign that nobody listens
            waiting.connect(str(path))
            assert "another process listens there" in str(refusal(path))
        assert path.is_socket()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        path.unlink()
        other.bind(str(path))
        refusal(path)
        assert path.is_socket()


def _file(path: Path) -> None:
    path.write_text("mine")


def _link(path: Path) -> None:
    left_behind(path.with_name("target"))
    path.symlink_to(path.with_name("target"))


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


@pytest.mark.parametrize("make", [_file, _link, _dangling, Path.mkdir, os.mkfifo], ids=lambda make: make.__name__)
def test_what_is_no_socket_is_left_as_it_is(folder: Path, make: Callable[[Path], None]) -> None:
    path = folder / "s"
    make(path)
    before = entries(folder)
    assert "no socket" in str(refusal(path))
    assert entries(folder) == before


def test_a_lock_that_is_somebody_elses_is_left_as_it_is(folder: Path) -> None:
    lock = folder / ".s.lock"
    target = folder / "private"
    target.write_text("mine")
    lock.symlink_to(target)
    refusal(folder / "s")
    lock.unlink()
    lock.write_text("notes")
    assert "is no lock" in str(refusal(folder / "s"))
    assert (target.read_text(), lock.read_text()) == ("mine", "notes")
    lock.unlink()
    os.mkfifo(lock)
    refusal(folder / "s")
    assert not (folder / "s").exists()


def test_a_path_that_cannot_be_is_named(folder: Path) -> None:
    assert "more than 107 bytes" in str(refusal(folder / ("x" * 120)))
    assert "No such file" in str(refusal(folder / "none" / "s"))
    ended = CliRunner().invoke(app, ["serve", str(folder), "--unix-socket", str(folder / "s"), "--port", "0"])
    assert ended.exit_code == 1
    assert "--unix-socket takes the place of --host and --port" in ended.stderr


def test_what_took_the_place_of_the_file_is_not_removed(folder: Path) -> None:
    path = folder / "s"
    with unix_socket(path):
        path.rename(folder / "moved")
        path.write_text("mine")
    assert path.read_text() == "mine"


# -- the other end


def _nothing(path: Path) -> None:
    """No file at all."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_nothing, "No such file"),
        (_file, "is no socket"),
        (Path.mkdir, "is no socket"),
        (os.mkfifo, "is no socket"),
        (left_behind, "nobody listens on"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_socket_that_is_not_there_is_told_at_once(folder: Path, make: Callable[[Path], None], said: str) -> None:
    path = folder / "s"
    make(path)
    url = url_of_path(str(path))
    deadline = Deadline(60)
    for client in (HttpEngineClient(url), VllmDevClient(url)):
        with pytest.raises(PeerLost, match=said) as caught:
            client.world_size(deadline)
        assert not caught.value.reached
        assert str(path) in str(caught.value)
    with pytest.raises(PeerLost, match=said), Publisher({"w": torch.rand(4)}, [url], timeout_s=60) as publisher:
        publisher.publish()
    assert deadline.remaining_s() > 30, "no deadline was waited for"


def test_a_server_that_accepts_nobody_ends_with_the_deadline(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as waiting:
        deaf.bind(str(path))
        deaf.listen(0)
        waiting.connect(str(path))
        with pytest.raises(DeadlineExceeded):
            HttpEngineClient(url_of_path(str(path))).status(Deadline(0.5))
        deadline = Deadline(60)
        threading.Timer(0.3, deadline.cancel).start()
        with pytest.raises(DeadlineExceeded):
            HttpEngineClient(url_of_path(str(path))).status(deadline)
        assert deadline.at > time.monotonic()


@pytest.mark.parametrize("path", ["/run/a.sock", "/run/with space/ü?#%.sock", "/run/a@b:c"])
def test_a_path_and_its_url_are_one_name(path: str) -> None:
    endpoint = endpoint_of(url_of_path(path), "t0ken")
    assert (endpoint.socket_path, endpoint.url, endpoint.host) == (path, url_of_path(path), "127.0.0.1")
    assert endpoint.headers == {"Authorization": "Bearer t0ken"}
    assert endpoint_of(f"{endpoint.url}/").url == endpoint.url


@pytest.mark.parametrize(
    "url", ["unix:", "unix://", "unix:///", "unix://relative", "unix:/run/s", "unix://u:s3cret@h/run/s", "unix:///a%00b", "unix:///a b",
            "unix:///a?b", "unix:///a#b", "unix:///" + "x" * 120, "unix:///ü"],
)  # fmt: skip
def test_a_url_that_names_no_socket_is_refused(url: str) -> None:
    for make in (HttpEngineClient, VllmDevClient, lambda url: Publisher({"w": torch.rand(2)}, [url])):
        with pytest.raises(InvalidInput, match="unix:///path of a socket") as caught:
            make(url)
        assert caught.value.field == "engines"
        assert "s3cret" not in str(caught.value) + repr(caught.value)
