"""Documents are run in a network of their own; with CI set a machine that cannot make one fails."""

import os

import pytest
from tests.documents.blocks import obstacle


@pytest.fixture(scope="session")
def needs_own_network() -> None:
    why = obstacle()
    if why is not None and os.environ.get("CI"):
        pytest.fail(why)
    elif why is not None:
        pytest.skip(why)
