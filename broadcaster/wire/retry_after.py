"""`Retry-After` of a refusal (RFC 9110 10.2.3)."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

from broadcaster.core.runtime import CLOCK


def retry_after_s(value: str) -> float:
    """Seconds that a server asks a client to stay away, as a number or as a date; 0 if it does not say."""
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - CLOCK.wall_ns() / 1e9)
    except (ValueError, OverflowError):
        return 0.0
