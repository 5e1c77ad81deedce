"""A tenant's usage as the Tinker SDK reads it: events of an hour, a base and a kind."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from openmint.catalog.records import UsageHour

Json = dict[str, Any]


def billing_events_of(hour: UsageHour) -> list[Json]:
    """One event for each kind of which there was any. Nothing has a price."""
    kinds: list[tuple[int, Json]] = [
        (hour.trained_tokens, {"type": "training", "token_count": hour.trained_tokens}),
        (hour.prompt_tokens, _prefill(hour.prompt_tokens, cached=False)),
        (hour.cached_tokens, _prefill(hour.cached_tokens, cached=True)),
        (hour.sampled_tokens, {"type": "sampling_sample", "token_count": hour.sampled_tokens}),
        (hour.checkpoints, {"type": "checkpoint", "count": hour.checkpoints}),
    ]
    return [
        {
            "bucket_start": hour.hour.isoformat(),
            "bucket_end": (hour.hour + timedelta(hours=1)).isoformat(),
            "base_model": hour.base_name,
            "user_id": f"openmint:tenant:{hour.tenant}",
            "user_name": hour.tenant,
            "event_info": info,
        }
        for count, info in kinds
        if count
    ]


def _prefill(num_tokens: int, *, cached: bool) -> Json:
    return {"type": "sampling_prefill", "cached": cached, "token_count": num_tokens}
