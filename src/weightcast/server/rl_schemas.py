"""Bodies of vLLM's RL routes, with what its clients of several generations still send."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class InitBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /init_weight_transfer_engine."""

    init_info: dict[str, Any]


class StartBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /start_weight_update. ``is_checkpoint_format`` is of older clients; weights always have checkpoint names."""

    is_checkpoint_format: bool | None = None


class UpdateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /update_weights. A list holds one object per worker rank."""

    update_info: dict[str, Any] | list[dict[str, Any]]


class FinishBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /finish_weight_update."""

    weight_version: str | int | None = None


class VersionBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /update_weight_version. ``abort_all_requests`` is SGLang's."""

    new_version: str | int
    abort_all_requests: bool = False


class CheckerBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weight_checker."""

    action: Literal["checksum", "reset", "compare"]
    baseline: dict[str, str] | None = None


class AbortBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /abort_requests. Without ids: all requests."""

    request_ids: list[str] | None = None


class PauseBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /pause; the query has precedence."""

    mode: str | None = None
    clear_cache: bool | None = None
    wait_for_inflight_requests: bool | None = None
    timeout_s: float | None = None


class ResetBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /reset_prefix_cache; the query has precedence."""

    reset_running_requests: bool | None = None
    reset_external: bool | None = None


class EmptyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """No body, or an empty object."""
