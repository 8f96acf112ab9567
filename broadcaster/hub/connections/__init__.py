"""A connection's life: handshake, admission, subscribing, heartbeats, close. Knows the channels, and no Redis."""
