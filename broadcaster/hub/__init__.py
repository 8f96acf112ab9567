"""The hub: takes events from Redis and pushes them to every subscriber. It may not import `loadtest`.

Directly in this folder stands what puts the parts together; a part may not import it.
"""
