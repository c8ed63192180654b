"""What a user installs: the wheel in an environment that has weightcast's dependencies and nothing else."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.documents.blocks import ROOT

pytestmark = pytest.mark.timeout(300)  # a busy machine takes its time to import torch in new processes
PUBLIC = ("weightcast", "weightcast.sources", "weightcast.report", "weightcast.trainer.clients")
"""Modules whose ``__all__`` users import from."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the wheel is installed, beside copies by link of what the wheel says it needs."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    for name in _needed(_requirements(wheel)):
        _link(distribution(name), site)
    return python


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


def _needed(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for requirements of which no extra is asked for."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for asked in ("", *requirement.extras):
            if (requirement.name.lower(), asked) not in found:
                found.add((requirement.name.lower(), asked))
                waiting += [(Requirement(text), asked) for text in distribution(requirement.name).requires or []]
    return {name for name, _ in found}


def _link(package: Distribution, site: Path) -> None:
    """Link what a distribution installed beside Python's own modules."""
    for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
        target = Path(str(package.locate_file(top)))
        if not (site / top).exists():
            (site / top).symlink_to(target)


def _run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), "-I", *arguments], capture_output=True, text=True, timeout=250, cwd=python.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_the_library_and_its_types_and_no_tests(built: Path) -> None:
    (wheel,) = built.glob("weightcast-0.2.0-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "weightcast/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"weightcast", "weightcast_demo", "weightcast-0.2.0.dist-info"}
    (source,) = built.glob("weightcast-0.2.0.tar.gz")
    with tarfile.open(source) as archive:
        inside = set(archive.getnames())
    assert {f"weightcast-0.2.0/{name}" for name in ("pyproject.toml", "LICENSE", "README.md", "conftest.py")} <= inside


def test_the_command_runs_where_nothing_but_its_dependencies_is(installed: Path) -> None:
    assert _run(installed, "-m", "weightcast", "--version").split()[-1] == "0.2.0"


def test_doctor_tries_real_transfers(installed: Path) -> None:
    found = _run(installed, "-m", "weightcast", "doctor")
    lines = {tuple(line.split()[1:3]): line for line in found.splitlines() if line.split()[:1] in (["✓"], ["✗"])}
    for name in ("shm", "tcp"):
        line = lines["transport", name]
        assert line.startswith("✓"), line
        assert line.rstrip().endswith("exact")
    assert version("torch") in lines["package", "torch"]
    assert "/dev/shm" not in found
    assert "limits of containers counted" in found


def test_every_public_name_is_there_without_any_extra(installed: Path) -> None:
    code = (
        "import importlib, sys, weightcast\n"
        f"for name in {PUBLIC!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for public in module.__all__: getattr(module, public)\n"
        "assert weightcast.__file__.startswith(sys.prefix), weightcast.__file__\n"
        "assert weightcast.__version__ == '0.2.0'\n"
        "absent = {'transformers', 'vllm', 'pytest'} & set(sys.modules)\n"
        "assert not absent, absent\n"
    )
    _run(installed, "-c", code)
