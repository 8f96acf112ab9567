"""The hub: takes events from Redis and pushes them to everybody who is connected."""
