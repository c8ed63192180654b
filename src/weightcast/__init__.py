"""weightcast syncs freshly trained LLM weights from an RL trainer into running inference engines.

with Publisher(model, engines=["http://127.0.0.1:8000"], token=token) as publisher:
    publisher.connect()
    report = publisher.publish()

Names are imported when first used: the command line sets variables that torch reads while it is imported, and has commands that do
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightcast import errors
from weightcast.errors import (
    AnswerLost,
    AuthError,
    BaseMismatch,
    DeadlineExceeded,
    DigestMismatch,
    EngineError,
    GroupBroken,
    InvalidInput,
    LoadError,
    NotShared,
    PeerLost,
    PlanMismatch,
    PromptTooLong,
    ProtocolError,
    RoundFailed,
    ShadowError,
    StateError,
    TransportError,
    UnknownModel,
    Unsupported,
    WakeFailed,
    WeightcastError,
    WeightsMoved,
    WorkerLeft,
)
from weightcast.lazy import lazy_names

if TYPE_CHECKING:
    from weightcast.report.model import Report
    from weightcast.sources.streamed import StreamSource
    from weightcast.trainer.publisher import Publisher
    from weightcast.weight_transfer.config import WeightTransferConfig

__version__ = "0.2.0"

__all__ = [
    "Publisher",
    "Report",
    "StreamSource",
    "WeightTransferConfig",
    "__version__",
    "errors",
    # What a caller may have to catch; weightcast.errors draws the tree.
    "WeightcastError",
    "InvalidInput",
    "StateError",
    "BaseMismatch",
    "WeightsMoved",
    "PromptTooLong",
    "UnknownModel",
    "AuthError",
    "Unsupported",
    "WakeFailed",
    "ProtocolError",
    "PlanMismatch",
    "LoadError",
    "DigestMismatch",
    "ShadowError",
    "TransportError",
    "NotShared",
    "GroupBroken",
    "PeerLost",
    "WorkerLeft",
    "AnswerLost",
    "DeadlineExceeded",
    "EngineError",
    "RoundFailed",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Publisher": "trainer.publisher",
        "Report": "report.model",
        "StreamSource": "sources.streamed",
        "WeightTransferConfig": "weight_transfer.config",
    },
    __all__,
)
