"""Weightcast's lines in vLLM's log: in its form, once each, and only where the application does not write them itself."""

from __future__ import annotations

import subprocess
import sys

# A process of its own: pytest has handlers on the root logger of this one.
PROCESS = """
import logging, logging.config, sys
from weightcast.engines.vllm.log import log_like_vllm

def configure(mark, level="INFO"):
    logging.config.dictConfig({
        "version": 1, "disable_existing_loggers": False,
        "formatters": {"vllm": {"format": mark + " %(levelname)s %(message)s"}},
        "handlers": {"vllm": {"class": "logging.StreamHandler", "formatter": "vllm", "level": level, "stream": "ext://sys.stdout"}},
        "loggers": {"vllm": {"handlers": ["vllm"], "level": level, "propagate": False}},
    })

ours = logging.getLogger("weightcast.receiver.receiver")
configure("(first)")
log_like_vllm()
log_like_vllm()
ours.info("one")
ours.debug("unsaid")
configure("(again)", level="WARNING")
ours.info("unsaid")
ours.warning("two")
root = logging.getLogger()
assert (root.handlers, root.level) == ([], logging.WARNING)
application = logging.StreamHandler(sys.stdout)
application.setFormatter(logging.Formatter("(application) %(message)s"))
root.addHandler(application)
ours.info("three")
root.removeHandler(application)
configure("(last)")
ours.info("four")
"""
CHOSEN = """
import logging
from weightcast.engines.vllm.log import log_like_vllm
logger = logging.getLogger("weightcast")
logger.setLevel(logging.ERROR)
log_like_vllm()
assert (logger.handlers, logger.level) == ([], logging.ERROR)
"""


def lines_of(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_lines_have_the_form_of_vllms_log_and_come_once() -> None:
    assert lines_of(PROCESS) == [
        "(first) INFO one", "(again) WARNING two", "(application) three", "(last) INFO four",
    ]  # fmt: skip


def test_a_level_that_the_application_chose_stays() -> None:
    assert lines_of(CHOSEN) == []
