"""Trainers of released frameworks on a CPU, beside one served engine. Without them (make test-frameworks has them) nothing here can run."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

HERE = Path(__file__).parent
HAS_FRAMEWORKS = find_spec("verl") is not None  # the environment of other tests may have some of the frameworks

if HAS_FRAMEWORKS:
    from tests.frameworks.served import Served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Served]":
    """A tiny model behind ``weightcast serve``."""
    from tests.frameworks.served import served_policy
    from tests.support.processes import start_fork_server

    start_fork_server("tests.frameworks.trl_ranks")
    with served_policy(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray, whose workers find the tests' own modules."""
    import ray

    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.frameworks)
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(600))


collect_ignore_glob = [] if HAS_FRAMEWORKS else ["test_*.py"]
