"""Connections to Redis, and starting a redis-server; the only importer of redis-py and hiredis. Knows no hub."""
