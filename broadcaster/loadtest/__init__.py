"""The load test: a fleet of subscribers, their delivery logs, and the report made from these files.

Knows the hub only by its wire protocol, so that it can measure any hub.
"""
