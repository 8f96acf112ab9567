"""Typed, frozen settings and where each of them came from.

Five layers, the later one wins:

    defaults < broadcaster.toml < config/<preset>.toml < BROADCASTER_* environment < command line

`broadcaster.toml` explains every key; the defaults here and there are held together by a test.
*Config* always means files, *settings* the typed object.
"""

from broadcaster.settings.layers import CONFIG_FILE, TRACEBACK, Loaded, assignment, dump, load
from broadcaster.settings.tables import (
    ENVIRONMENT,
    ApiKey,
    AuthTable,
    ChannelsTable,
    EventTable,
    FleetTable,
    HistoryTable,
    HubTable,
    JwtKey,
    LoadtestTable,
    PublisherTable,
    RedisTable,
    ReportTable,
    Settings,
    SubscriberTable,
)
from broadcaster.settings.types import is_loopback
from broadcaster.settings.urls import redis_database, redis_server, websocket_url, without_credentials

__all__ = [
    "CONFIG_FILE",
    "ENVIRONMENT",
    "TRACEBACK",
    "ApiKey",
    "AuthTable",
    "ChannelsTable",
    "EventTable",
    "FleetTable",
    "HistoryTable",
    "HubTable",
    "JwtKey",
    "Loaded",
    "LoadtestTable",
    "PublisherTable",
    "RedisTable",
    "ReportTable",
    "Settings",
    "SubscriberTable",
    "assignment",
    "dump",
    "is_loopback",
    "load",
    "redis_database",
    "redis_server",
    "websocket_url",
    "without_credentials",
]
