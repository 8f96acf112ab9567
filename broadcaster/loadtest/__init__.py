"""The load test: a fleet of subscribers, their delivery logs, and the report made from these files.

Knows the hub only from the wire, so that it can measure any hub.
"""
