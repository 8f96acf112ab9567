"""Tests of the load test, and what several of them need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broadcaster.loadtest.deliveries import Deliveries, joined
from broadcaster.loadtest.records import DeliveryRecord, PublishedRecord


def columns(published: Sequence[PublishedRecord], rows: Sequence[DeliveryRecord]) -> Deliveries:
    """Rows as they are read from their file."""
    return joined(
        published,
        np.array([row.client for row in rows], np.int64),
        np.array([row.event_id for row in rows], "S40"),
        np.array([row.received_mono_ns for row in rows], np.int64),
    )
