"""The hub as one of several: its name, the port that hubs share, and what they announce of themselves in Redis."""
