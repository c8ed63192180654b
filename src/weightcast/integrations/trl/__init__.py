"""TRL's trainers with weightcast: a callback, or one line for each of TRL's own ways to sync weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightcast.lazy import lazy_names

if TYPE_CHECKING:
    from weightcast.integrations.trl.async_grpo import WeightTransfer
    from weightcast.integrations.trl.callback import PublishCallback
    from weightcast.integrations.trl.colocate import use_in_colocate_mode
    from weightcast.integrations.trl.server_mode import use_in_server_mode

__all__ = ["PublishCallback", "WeightTransfer", "use_in_colocate_mode", "use_in_server_mode"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PublishCallback": "callback",
        "WeightTransfer": "async_grpo",
        "use_in_colocate_mode": "colocate",
        "use_in_server_mode": "server_mode",
    },
    __all__,
)
