"""The subscriber: the client library, and a hub's status over HTTP. Knows hubs by their wire protocol only."""
