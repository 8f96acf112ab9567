"""The subscriber's half: the client library, and what it asks a hub over HTTP. Knows hubs from the wire only."""
