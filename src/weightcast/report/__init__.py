"""What rounds did: the record, a log of it, a page and a live table."""

from weightcast.report.model import EngineReport, Outcome, Phase, Report, WorkerReport, format_bytes
from weightcast.report.roundlog import RoundLog, read_rounds

__all__ = [
    "EngineReport",
    "Outcome",
    "Phase",
    "Report",
    "RoundLog",
    "WorkerReport",
    "format_bytes",
    "read_rounds",
]
