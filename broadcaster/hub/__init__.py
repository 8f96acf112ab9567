"""The hub: takes events from Redis and pushes them to every subscriber. It may not know the load test.

Directly in this folder is what puts the parts together; the folders within may not import it.
"""
