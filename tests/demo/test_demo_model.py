"""weightcast demo model: a folder that every other command can start from."""

from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from weightcast.cli import app


def _demo(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_folder_has_a_model_whose_heads_vllm_runs_on_a_cpu_and_a_tokenizer(tmp_path: Path) -> None:
    status, said = _demo("model", tmp_path / "policy", "--seed", "7")
    assert status == 0, said
    assert AutoConfig.from_pretrained(tmp_path / "policy").head_dim == 32
    text = "Weights arrive while I speak."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    _demo("model", tmp_path / "other", "--seed", "8")
    others = load_file(tmp_path / "other" / "model.safetensors")
    assert not any(weights[name].equal(others[name]) for name in weights)


def test_a_folder_that_has_files_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    status, said = _demo("model", tmp_path)
    assert (status, "is not empty" in said) == (1, True), said
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.json", "mine")]


def test_demos_that_write_no_folder_refuse_one() -> None:
    status, said = _demo("smollm", "policy")
    assert (status, "weightcast demo model policy" in said) == (1, True), said
