"""The example with a served SGLang: the same program as with the other engines."""

from tests.examples.example_runs import learnt, run_example


def test_the_served_example_learns() -> None:
    assert learnt(run_example("rlhf_http.py", "--engine", "sglang", timeout_s=280)) > 0.1
