"""Weightcast's lines in vLLM's log: in vLLM's form, written by vLLM's own handlers, and only where nobody else writes them."""

from __future__ import annotations

import logging
import os


class _IntoVllmLog(logging.Handler):
    """Hands each record to the handlers that vLLM's logger has at that moment: vLLM configures its logging again and again."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or logging.getLogger("weightcast").handlers != [self]:
            return  # the application writes these lines; vLLM must not write them once more
        for handler in logging.getLogger("vllm").handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


def log_like_vllm() -> None:
    """Have weightcast's log lines of this process appear in vLLM's log. A second call does nothing. An application that has set up
    logging keeps its set-up, and the root logger is left alone."""
    logger = logging.getLogger("weightcast")
    if logger.handlers or logger.level != logging.NOTSET or logging.getLogger().handlers:
        return
    if os.environ.get("VLLM_CONFIGURE_LOGGING", "1") == "0":
        return
    logger.addHandler(_IntoVllmLog())
    logger.setLevel(logging.INFO)
