"""Every cell of the fault matrix: a named error in time, nobody hangs, no mixed version, the next round works, nothing leaks."""

from __future__ import annotations

import pytest

from weightcast.testing.matrix import Cell, cells, network_obstacle


def parameters() -> list[object]:
    return [pytest.param(cell, id=cell.id, marks=[pytest.mark.gpu] if cell.needs_gpu else []) for cell in cells()]


@pytest.fixture(scope="module")
def why_no_network() -> str | None:
    return network_obstacle()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("cell", parameters())
def test_cell(cell: Cell, why_no_network: str | None, record_property: pytest.FixtureRequest) -> None:
    if cell.needs_network and why_no_network is not None:
        pytest.skip(f"networks: {why_no_network}")
    if cell.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
    outcome = cell.run()
    assert outcome
    record_property("outcome", outcome)  # type: ignore[operator]
