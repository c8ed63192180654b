"""What commands print: for people, for pipes and files, and for programs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tests.support.engine_process import TOKEN, EngineProcess, values_of
from tests.support.ports import HeldPort
from typer.testing import CliRunner, Result

import weightcast
from weightcast import Publisher
from weightcast.cli import app, progress
from weightcast.cli.shared import console, print_table
from weightcast.cli.status import status_table
from weightcast.content.layout_digest import digest_tensor
from weightcast.deadline import Deadline
from weightcast.manifest import Manifest
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.progress import Step

HTTP_ONLY = (("--help",), ("status", "--help"), ("push", "--help"), ("watch", "--help"), ("serve", "--help"))


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess("staged") as made:
        assert isinstance(made, EngineProcess)
        yield made


@pytest.fixture
def gone() -> Iterator[str]:
    """The URL of nobody: a port that is held, and not listened on."""
    held = HeldPort()
    yield f"http://127.0.0.1:{held.number}"
    held.close()


def run_here(*arguments: object, token: str | None = TOKEN) -> Result:
    """A command in this process, which has torch already."""
    environment = {"WEIGHTCAST_TOKEN": token, "COLUMNS": None}
    return CliRunner().invoke(app, [*map(str, arguments)], env=environment)


def run(*arguments: object, token: str | None = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
    """A command whose output goes into a pipe, without a hint of how wide a terminal might be."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TERM", "WEIGHTCAST_TOKEN")} | more
    if token is not None:
        environment["WEIGHTCAST_TOKEN"] = token
    command = [sys.executable, "-m", "weightcast", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def checkpoint_of(seed: int, folder: Path) -> Path:
    save_file(values_of(seed), folder / "model.safetensors")
    return folder


def told(ended: subprocess.CompletedProcess[str] | Result) -> Any:
    """The one line of JSON that a command printed."""
    assert ended.stdout.count("\n") == 1, ended.stdout
    return json.loads(ended.stdout)


@pytest.mark.parametrize("option", ["--timeout", "--wait"])
@pytest.mark.parametrize("seconds", ["1e12", "inf", "nan", "0"])
def test_a_time_that_cannot_be_is_told_before_anything_is_loaded(option: str, seconds: str, tmp_path: Path) -> None:
    ended = run_here("push", tmp_path, "--to", "http://127.0.0.1:9", option, seconds)
    assert ended.exit_code == 2, ended.output
    assert f"Invalid value for '{option}'" in ended.output
    assert "loading" not in ended.output


@pytest.mark.parametrize("command", ["verify", "status", "push"])
def test_two_tokens_are_one_too_many(command: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a" * 32)
    url, given = "http://127.0.0.1:9", ("--token-file", file)
    words = {"verify": (url, "--checkpoint", tmp_path), "status": (url,), "push": (tmp_path, "--to", url)}[command]
    both = run_here(command, *words, "--token", "b" * 32, *given)
    assert both.exit_code != 0
    assert "--token and --token-file are two tokens. Give one of them" in " ".join(both.output.split())
    assert "two tokens" not in run_here(command, *words, *given).output


@pytest.mark.parametrize("token", [None, "w" * 32])
def test_a_token_that_is_missing_or_wrong_is_told_in_options(
    engine: EngineProcess, token: str | None, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(4, tmp_path)
    commands = (("verify", engine.url, "--checkpoint", checkpoint), ("push", checkpoint, "--to", engine.url))
    for words in commands:
        refused = run_here(*words, token=token)
        said = " ".join(refused.output.split())
        assert refused.exit_code == 1, said
        assert "AuthError: wrong token" in said if token else "AuthError: this route needs the token" in said
        assert "Give --token-file FILE, or set WEIGHTCAST_TOKEN" in said
        assert "Bearer" not in said
    (tmp_path / "token").write_text(TOKEN)
    followed = run_here(*commands[1], "--token-file", tmp_path / "token", token=None)
    assert followed.exit_code == 0, followed.output


def test_a_demo_that_writes_no_folder(tmp_path: Path) -> None:
    refused = run_here("demo", "smollm", tmp_path / "policy")
    assert refused.exit_code == 1
    assert f"the demo smollm writes no folder. Leave {tmp_path / 'policy'} out" in "".join(refused.output.split("\n"))
    followed = run_here("demo", "model", tmp_path / "policy")
    assert followed.exit_code == 0, followed.output
    assert (tmp_path / "policy" / "config.json").is_file()


def test_the_version_in_both_ways() -> None:
    assert run("--version").stdout == f"weightcast {weightcast.__version__}\n"
    script = Path(sys.executable).with_name("weightcast")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def test_a_shell_completes_commands_and_options() -> None:
    for words, wanted in (("weightcast sta", "status"), ("weightcast push --tran", "--transport")):
        number = str(len(words.split()) - 1)
        ended = run(_WEIGHTCAST_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
        assert wanted in ended.stdout.split(), ended
    assert "--show-completion" in run("--help").stdout


def test_commands_that_only_ask_do_not_import_torch(engine: EngineProcess) -> None:
    commands = [*HTTP_ONLY, ("status", engine.url), ("status", engine.url, "--json")]
    code = (
        "import sys; from weightcast.cli import app\n"
        f"for words in {commands!r}:\n"
        "    app(words, standalone_mode=False)\n"
        "    assert not {'torch', 'numpy', 'starlette'} & set(sys.modules), words\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(engine.url) == 2


def test_a_piped_table_has_whole_cells(engine: EngineProcess, gone: str) -> None:
    ended = run("status", engine.url, gone)
    assert ended.returncode == 1
    head, served, lost = ended.stdout.splitlines()
    assert head.split() == ["engine", "model", "version", "digest", "state", "running", "waiting", "syncs"]
    assert served.startswith(engine.url)
    assert lost.rstrip().endswith("Connection refused. Is the server running?")


def test_what_an_engine_does_not_know_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    client = HttpEngineClient("http://127.0.0.1:9")
    row = {"model": "m", "weight_version": "1-a", "digest": None, "ready": True, "num_running": 0, "num_waiting": None}
    print_table(console(), status_table([client], [row]))
    assert capsys.readouterr().out.splitlines()[1].split() == [client.name, "m", "1-a", "-", "ready", "0", "-", "-"]


def test_status_as_json_has_all_that_an_engine_says(engine: EngineProcess, gone: str) -> None:
    ended = run("status", engine.url, gone, "--json")
    assert ended.returncode == 1
    first, second = told(ended)["engines"]
    assert (first["engine"], first["error"], first["status"]["dirty"]) == (engine.url, None, False)
    assert (second["engine"], second["status"], second["error"]["kind"]) == (gone, None, "PeerLost")


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_into_a_file_leaves_what_changed_there(engine: EngineProcess, tmp_path: Path, as_json: bool) -> None:
    written = tmp_path / "log"
    command = [sys.executable, "-m", "weightcast", "status", engine.url, "--watch", "--interval", "0.1"]
    with written.open("w") as file:
        watching = subprocess.Popen([*command, *(["--json"] if as_json else [])], stdout=file, stderr=file)
    try:
        _wait(lambda: engine.url in written.read_text())
        with Publisher(values_of(3), [engine.url], token=TOKEN, timeout_s=20) as publisher:
            version = publisher.publish().version
        _wait(lambda: version in written.read_text())
    finally:
        watching.send_signal(2)
        assert watching.wait(15) == 0
    lines = written.read_text().splitlines()
    if as_json:
        seen = [json.loads(line)["engines"][0]["status"]["weight_version"] for line in lines]
        assert seen[-1] == version
    else:
        assert all(engine.url in line and "version" in line for line in lines)
        assert len(lines) == len({line.partition(": ")[2] for line in lines}), "a line for each change, and no other"


def test_push_and_verify_as_json(engine: EngineProcess, tmp_path: Path) -> None:
    report = told(run_here("push", checkpoint_of(5, tmp_path), "--to", engine.url, "--json"))
    assert report["outcome"] == "committed"
    assert engine.call("holds", 5)
    found = told(run_here("verify", engine.url, "--checkpoint", tmp_path, "--json"))
    assert (found["proven"], found["version"], found["error"]) == (True, report["version"], None)
    assert sorted(found["equal"]) == sorted(values_of(5))
    other = tmp_path / "other"
    other.mkdir()
    ended = run_here("verify", engine.url, "--checkpoint", checkpoint_of(6, other), "--json")
    assert ended.exit_code == 1
    assert sorted(told(ended)["different"]) == sorted(values_of(6))


def test_a_draft_that_is_not_compared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that speculates says so of its draft, where the checkpoint has nothing of the draft."""
    folders = [tmp_path / name for name in ("policy", "draft")]
    for number, folder in enumerate(folders, 1):
        folder.mkdir()
        checkpoint_of(number, folder)
    live = {**values_of(1), **{f"draft.{name}": value for name, value in values_of(2).items()}}

    def speculating(_: HttpEngineClient, manifest: Manifest, __: Deadline) -> dict[str, Any]:
        held = {
            spec.name: {"dtype": spec.dtype, "digest": f"{digest_tensor(live[spec.name]):016x}"}
            for spec in manifest.tensors
        }
        alone = {} if any(name.startswith("draft.") for name in held) else {"draft.": {"reason": "in no checkpoint"}}
        return {"weight_version": "1-x", "tensors": held | alone}

    monkeypatch.setattr(HttpEngineClient, "tensor_digests", speculating)
    asked = ("verify", "http://127.0.0.1:9", "--checkpoint", folders[0])
    ended = run_here(*asked)
    assert ended.exit_code == 1
    assert "not compared: draft. (in no checkpoint)" in ended.stdout
    assert "--draft FOLDER" in ended.stdout
    assert "--keep draft" in ended.stdout
    found = told(run_here(*asked, "--json"))
    assert (found["proven"], found["not_compared"]) == (False, {"draft.": "in no checkpoint"})
    assert sorted(found["equal"]) == sorted(values_of(1))
    assert run_here(*asked, "--keep", "draft").exit_code == 0
    assert sorted(told(run_here(*asked, "--draft", folders[1], "--json"))["equal"]) == sorted(live)
    ended = run_here(*asked, "--draft", folders[0], "--keep", "draft", "--json")
    assert ended.exit_code == 1
    assert sorted(told(ended)["different"]) == sorted(f"draft.{name}" for name in values_of(2))


def test_an_error_as_json_and_in_words(engine: EngineProcess, tmp_path: Path) -> None:
    checkpoint_of(1, tmp_path)
    ended = run_here("push", tmp_path, "--to", engine.url, "--json", token=None)
    assert ended.exit_code == 1
    assert told(ended)["error"]["kind"] == "AuthError"
    assert "AuthError" in ended.stderr
    assert told(run_here("verify", engine.url, "--checkpoint", tmp_path, "--json", token="wrong"))["error"]["kind"]
    assert told(run_here("status", "ftp://x", "--json"))["error"]["field"] == "engines"


def test_doctor_as_json() -> None:
    found = told(run_here("doctor", "--no-transfer", "--json"))
    assert found["works"] is True
    states = {(entry["topic"], entry["name"]): entry["state"] for entry in found["findings"]}
    assert states["transport", "tcp"] == "ok"
    assert states["package", "torch"] == "ok"


def test_a_push_is_read_in_short_lines(engine: EngineProcess, tmp_path: Path) -> None:
    pushed = run_here("push", checkpoint_of(8, tmp_path), "--to", engine.url)
    assert pushed.exit_code == 0, pushed.stderr
    row = next(line.split() for line in pushed.stdout.splitlines() if line.startswith(engine.url))
    assert row[2] == "tcp", pushed.stdout
    assert "\ntransport tcp (shm: the engine opens no files in " in pushed.stdout
    assert "cuda" not in pushed.stdout, "what is for GPUs is not news on a CPU"
    assert len(next(line for line in pushed.stdout.splitlines() if line.startswith(engine.url)).rstrip()) < 80


def test_a_push_says_what_it_is_doing_and_keeps_it_off_the_report(engine: EngineProcess, tmp_path: Path) -> None:
    pushed = run_here("push", checkpoint_of(9, tmp_path), "--to", engine.url, "--wait", 5, "--json")
    assert told(pushed)["outcome"] == "committed"
    said = [line.partition(" s  ")[2] for line in pushed.stderr.splitlines() if " s  " in line]
    for phase in (
        "loading",
        "waiting for the server",
        "connecting",
        "joining",
        "recording",
        "transferring",
        "committing",
    ):
        assert any(line.startswith(phase) for line in said), (phase, pushed.stderr)
    assert any(line == "transferring, 1 of 1 workers" for line in said)
    assert run_here("push", tmp_path, "--to", engine.url, "--quiet").stderr == ""


def test_a_tensor_without_a_place_is_told_in_options(engine: EngineProcess, tmp_path: Path) -> None:
    save_file({**values_of(2), "v_head.weight": torch.randn(3)}, tmp_path / "model.safetensors")
    pushed = run_here("push", tmp_path, "--to", engine.url, "--quiet")
    assert pushed.exit_code == 1
    assert "--unused 'v_head.*'" in pushed.stderr
    assert "unused=" not in pushed.stderr
    again = run_here("push", tmp_path, "--to", engine.url, "--quiet", "--unused", "v_head.*")
    assert "1 tensor left out: v_head.weight" in again.stdout, again.stderr
    mistyped = run_here("push", tmp_path, "--to", engine.url, "--quiet", "--unused", "head.*")
    assert "--unused 'head.*' matches none" in mistyped.stderr


def test_a_push_of_values_that_are_none_is_refused(engine: EngineProcess, tmp_path: Path) -> None:
    values = values_of(2)
    values["layers.0.scale"][3] = float("nan")
    save_file(values, tmp_path / "model.safetensors")
    pushed = run_here("push", tmp_path, "--to", engine.url, "--check-finite", "--json")
    assert pushed.exit_code == 1
    assert "layers.0.scale (1)" in told(pushed)["error"]["message"]


def test_a_step_that_takes_long_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AGAIN_S", 0.05)
    out = io.StringIO()
    with progress.ShownProgress(Console(file=out, width=200)) as shown:
        shown.tell(Step(phase="record", engine="e"))
        _wait(lambda: "recording where tensors go e ..." in out.getvalue())


def test_a_bar_in_a_terminal_goes_on_with_each_phase() -> None:
    out = io.StringIO()
    with progress.ShownProgress(Console(file=out, width=100, force_terminal=True)) as shown:
        for phase in ("connect", "record", "transfer", "commit"):
            shown.tell(Step(phase=phase, total=4, done=2))
    assert "committing, 2 of 4 workers" in out.getvalue()


def _wait(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
