"""The life of a connection: handshake, admission, heartbeats, close. May not know Redis."""
